"""How a distilled file is to be sampled, as its header says."""

import json
import re
from pathlib import Path

from solvers import SOLVERS
from tcd import TCF

# Guidance g and gamma that each method's students are sampled with: g from the appendix of TDD on
# its comparison, gamma from each method's paper.
RECOMMENDED = {"cm": (1.0, 1.0), "pcm": (1.6, 0.0), "tcd": (1.0, 0.2), "tdd": (2.0, 0.2),
               "tdm": (1.0, 0.0)}  # fmt: skip


def read_recipe(path: Path, header: dict[str, str]) -> dict:
    """How a file from train_sdxl.py is sampled, by sample.py's flags; {} if it says nothing.

    tune_guidance is g' = 1 + w', the middle of a range of w'; told_ks are the K that the student is
    told apart. ValueError if the header is broken.
    """
    entries = {k.removeprefix("tdd_"): v for k, v in header.items() if k.startswith("tdd_")}
    recipe, name = {}, "method"
    try:
        method = entries.get("method")
        if method is not None:
            recipe["cfg"], recipe["gamma"] = RECOMMENDED[method]
        for name, text in entries.items():
            recipe |= _read_entry(name, text, method)
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError):
        broken = f"tdd_{name} {entries[name]!r}"
        raise ValueError(f"{path}: its header is broken, {broken}: download it again") from None
    return recipe


def _read_entry(name: str, text: str, method: str | None) -> dict:
    """What one entry of the header says; KeyError, ValueError or TypeError if it is broken."""
    match name:
        case "cfg":
            return {"cfg": _within(0, float(text))}
        case "gamma":
            return {"gamma": _within(0, float(text), 1)}
        case "tcf" if TCF[text]:
            return {"tcf": text}
        case "solver_steps":
            return {"solver_steps": _within(1, int(text))}
        # The student's own steps; of other methods it is Phi, the teacher's. DDIM is the
        # gamma-sampler at TDM's gamma = 0.
        case "solver" if method == "tdm" and SOLVERS[text]:
            return {"sampler": "tdd" if text == "ddim" else text}
        case "w":
            low, high = w if isinstance(w := json.loads(text), list) else (w, w)
            return {"tune_guidance": _within(1, 1 + (low + high) / 2)}
        case "told_ks":
            return {"told_ks": _distinct(json.loads(text))}
        # "4-8" of TDD, [1, 2, 4] of TDM, the number of PCM's segments.
        case "K" if method in ("tdd", "pcm", "tdm"):
            Ks = [_within(1, int(k)) for k in re.findall(r"\d+", text)]
            if re.fullmatch(r"\d+-\d+", text):
                Ks = range(Ks[0], Ks[1] + 1)
            # Older files of PCM have TDD's range.
            Ks = Ks[:1] if method == "pcm" else Ks
            # TDM's most; of TDD's the fewest that it is meant for, K_min = 4, or its most.
            steps = max(Ks) if method == "tdm" else min([K for K in Ks if K >= 4], default=max(Ks))
            return {"steps": steps, "kmin": min(Ks), "kmax": max(Ks)}
    return {}


def _within(low, number, high=10_000):
    # NaN compares as false.
    if not low <= number <= high:
        raise ValueError
    return number


def _distinct(Ks) -> tuple[int, ...]:
    if not isinstance(Ks, list) or not Ks or len({*Ks}) < len(Ks):
        raise ValueError
    # True is an int in Python.
    if any(type(K) is not int for K in Ks):
        raise TypeError
    return tuple(_within(1, K) for K in Ks)


def single_value(name: str, values: list, default):
    """What all headers say, or the default; ValueError if they differ, or if there is neither."""
    flag = f"--{name.replace('_', '-')}"
    if len(values) > 1:
        hint = "one of them" if name in ("tcf", "kmin", "kmax", "told_ks") else flag
        trained = " and ".join(map(str, values))
        raise ValueError(f"--lora and --unet were trained for {trained}: give {hint}")
    if not values and default is None:
        raise ValueError(f"{flag}: no header says a value: give it as a number")
    return values[0] if values else default
