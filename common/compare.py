"""What the 2-D experiment and CIFAR-10 share: cases, budgets, names and colours, tables, curves."""

from dataclasses import dataclass

import numpy as np

from common.plots import INK, Axes, Figure
from tdd import equidistant, nonequidistant, tuned

# ---------------------------------------------------------------------------- methods and budgets
#
# A method keeps its name and colour through all tables and pictures; one that has none here yet is
# drawn under its key, in ink. Budgets are counted in network passes, so a method with expensive
# training steps takes fewer of them.

NAMES = {
    "teacher": "teacher", "cm": "CM / LCM", "pcm4": "PCM-4", "pcm8": "PCM-8", "tcd": "TCD / CTM",
    "tdd": "TDD", "tdd_eta0": "TDD, eta 0", "tdd_rho0": "TDD, rho 0",
    "tcd2": "TCD, TCF(2)", "tcds": "TCD, TCF(S+)", "tdd2": "TDD, TCF(2)", "tdds": "TDD, TCF(S+)",
    "tdm4": "TDM-4", "tdm_unify": "TDM-unify", "tdd_adv": "TDD (adv)", "tdd_high": "TDD, w' = 5",
    "pcm4_path": "PCM-4, path", "tdd_eta0_path": "TDD, eta 0, path", "tdd_k4_data": "K told",
    "tdd_k4": "K told, path", "tdd_k": "K told from 1, path", "tdd_k4_blind_data": "K untold",
    "tdd_k4_blind": "K untold, path",
}  # fmt: skip
COLOURS = {
    "teacher": (130, 134, 144), "cm": (216, 120, 40), "pcm4": (60, 150, 95), "pcm8": (130, 180, 60),
    "tcd": (150, 90, 180), "tdd": (205, 45, 60), "tdd_eta0": (50, 110, 190), "tdd_rho0": (90,) * 3,
    "tcd2": (100, 60, 130), "tcds": (210, 160, 230), "tdd2": (130, 20, 35), "tdds": (240, 140, 130),
    "tdm4": (20, 140, 140), "tdm_unify": (210, 160, 20), "tdd_adv": (225, 130, 170),
    "pcm4_path": (30, 95, 55), "tdd_eta0_path": (20, 60, 120), "tdd_k": (0, 95, 140),
    "tdd_k4": (0, 165, 205), "tdd_k4_data": (130, 210, 230), "tdd_k4_blind": (170, 120, 0),
    "tdd_k4_blind_data": (220, 190, 110),
}  # fmt: skip

# Beyond the papers a student of TDD's has a K for each example, from the first number here to kmax
# (0: from kmin), and its targets are that K's next stops; then whether it is told K, and where its
# pairs come from. PATH ends the name of a method of the papers with pairs from the teacher's path.
DRAWN_KS = {
    "tdd_k4_blind_data": (0, False, "data"), "tdd_k4_data": (0, True, "data"),
    "tdd_k4_blind": (0, False, "teacher"), "tdd_k4": (0, True, "teacher"),
    "tdd_k": (1, True, "teacher"),
}  # fmt: skip
PATH = "_path"
BEYOND = (*DRAWN_KS, f"pcm4{PATH}", f"tdd_eta0{PATH}")  # those that the experiments train


def title_of(method: str) -> str:
    """A method's name in tables and pictures."""
    base = method.removesuffix(PATH)
    if method in NAMES or base == method:
        return NAMES.get(method, method)
    return f"{title_of(base)}, path"


def colour_of(method: str) -> tuple[int, int, int]:
    """A method's colour in pictures."""
    return COLOURS.get(method, INK)


@dataclass(frozen=True)
class Variant:
    """What a student's name says: a method of the papers, and what is beyond them.

    Ks: those that K is drawn from, if it is. pairs: from "data" or the "teacher"'s path.
    """

    method: str
    Ks: tuple[int, ...]
    tell_k: bool
    pairs: str


def variant_of(name: str, kmin: int, kmax: int) -> Variant:
    """A student's variant, by its name."""
    if name in DRAWN_KS:
        first, tell_k, pairs = DRAWN_KS[name]
        return Variant("tdd", tuple(range(first or kmin, kmax + 1)), tell_k, pairs)
    method = name.removesuffix(PATH)
    return Variant(method, (), True, "data" if method == name else "teacher")


# Forward passes of the network that a training step takes, a backward pass counted as two. By
# trajectory consistency function: guided teacher 2, target network 1 an evaluation, student 3 an
# evaluation. TDM: guided teacher 2, student 3, fake score 3 + 1, and before the step 1.5 (K = 4)
# or 0.67 (K of 1, 2, 4).
PASSES = {"1": 6, "2": 10, "s": 6, "tdm4": 10.5, "tdm_unify": 9.67}


def equal_budget_steps(steps: int, kind: str) -> int:
    """Training steps with as many passes as `steps` of the main comparison; kind: of PASSES."""
    return round(steps * PASSES["1"] / PASSES[kind])


def path_steps(steps: int, batch: int, staggering: int, kind: str = "1") -> int:
    """What is left of `steps` when walkers have been spread by so many of the teacher's steps."""
    # A run of a few steps, to try things out, keeps one.
    return max(1, steps - round(2 * staggering / (PASSES[kind] * batch)))


# ------------------------------------------------------------------------------------------ cases
#
# Fig. 5 compares deterministic sampling with the little noise that TCD and TDD advise. The guidance
# study (Fig. 6) adds guidance to a student, and takes it back from one distilled at a high w'.

GAMMAS = (0.0, 0.2)
W_ADDED = (1.0, 2.0, 3.0)  # w of the guidance study
W_HIGH = 5.0  # w' of the students that Eq. 13 tunes down
W_RANGE = (2.0, 8.0)  # of a student whose w' is drawn: W_HIGH is its middle, Eq. 14's


@dataclass(frozen=True)
class Case:
    """One way to sample: the fields of a row in metrics.json.

    w: guidance at inference; 0 samples a student as distilled. tune: its w', if Eq. 13 is used.
    tell_k: what a student that is told K is told instead of k.
    """

    k: int
    gamma: float = 0.0
    schedule: str = "equidistant"
    w: float = 0.0
    tune: float | None = None
    clip_steps: int = 0
    tell_k: int | None = None

    @property
    def w_inference(self) -> float:
        """The w of Eq. 12 to sample with: tuned by Eq. 13 where `tune` asks for it."""
        return self.w if self.tune is None else tuned(self.w, self.tune)


def compared_steps(kmin: int, kmax: int) -> list[int]:
    """The numbers of steps k that methods are compared in, ascending."""
    # 1 and 2 lie outside of what TDD trains for; they show what that costs.
    return sorted({1, 2, *range(kmin, kmax + 1)})


def case_timesteps(case: Case, N: int, kmin: int, kmax: int) -> list[int]:
    """A case's k timesteps on the grid of N solver steps, for a student of kmin to kmax steps."""
    if case.schedule == "nonequidistant":
        return nonequidistant(case.k, N, kmin, kmax)
    return equidistant(case.k, N)


# ------------------------------------------------------------------------------ tables and curves


def format_table(
    title: str, ks: list[int], rows, width: int, cell_width: int, heading: str = "k = {}"
) -> str:
    """Text over the numbers of steps; rows: pairs of a name and its cells, words in order of k."""
    lines = []
    for name, cells in [(title, map(heading.format, ks)), *rows]:
        lines.append(f"{name:{width}}" + "".join(f"{cell:>{cell_width}}" for cell in cells))
    return "\n".join(lines)


def log_limits(values) -> tuple[float, float]:
    """Limits of a logarithmic axis with a little room around the values."""
    return min(values) * 0.8, max(values) * 1.2


def curve_panel(
    figure: Figure, box, title: str, ylabel: str, ks: list[float], curves: dict, ylim, size: int,
    xlabel: str = "steps k", log_x: bool = False,
) -> Axes:  # fmt: skip
    """Curves over the number of steps, log scale; returns the axes, to draw more into them.

    box: left, top, width, height. curves: for each method (k, value, error) arrays; a band shows
    value +- error. ylim: as from `log_limits`. size: of the text.
    """
    ticks = np.outer([0.001, 0.01, 0.1, 1, 10, 100], [1, 2, 5]).flatten()
    ticks = ticks[(ylim[0] < ticks) & (ticks < ylim[1])]
    margin = 0.04 * (ks[-1] - ks[0]) or 0.3
    xlim = (ks[0] / 1.2, ks[-1] * 1.2) if log_x else (ks[0] - margin, ks[-1] + margin)
    axes = Axes(figure, box, xlim, ylim, log_y=True, log_x=log_x)
    axes.frame(title, xlabel, ylabel, ks, ticks, size)
    for method, (k, value, error) in curves.items():
        colour, dash = colour_of(method), 7 if method == "teacher" else None
        axes.band(k, np.maximum(value - error, ylim[0]), value + error, colour)
        axes.line(k, value, colour, 2.5, dash, dots=4)
    return axes


def legend(figure: Figure, methods: list[str], line: tuple[float, float], x: float, size: int):
    """A line from x = line[0] to line[1] and, at x, a name for each method, from y = 130 on."""
    for i, method in enumerate(methods):
        colour, dash = colour_of(method), 7 if method == "teacher" else None
        y = 130 + 34 * i
        figure.line([(line[0], y), (line[1], y)], colour, 3, dash)
        figure.text(x, y, title_of(method), size, colour)
