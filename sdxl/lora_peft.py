"""PEFT's settings of a LoRA: alpha by layer, and starts that took something out of the base.

They stand in the file's header, where diffusers writes them, or in adapter_config.json beside it.
"""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from common import files
from sdxl.lora import Adapter

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# Settings under which an adapter is more than alpha / rank * up @ down.
VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "arrow_config",
            "monteclora_config", "alora_invocation_tokens")  # fmt: skip
# init_lora_weights. A start with B_0 A_0 = 0 leaves the base as it is. Others change it to
# W' = W - s B_0 A_0, so that the file alone says nothing. Two of them can be computed from W.
PLAIN_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
EXACT_STARTS = ("pissa", "olora")


def read_settings(path: Path, header: dict[str, str], beside: bool) -> dict[str, dict]:
    """A file's settings by component, {} where it has none for one.

    beside: they are in adapter_config.json, for all components. ValueError if they are broken.
    """
    if beside:
        return dict.fromkeys(COMPONENTS, files.read_json(path.parent / "adapter_config.json"))
    try:
        content = json.loads(header.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its header's lora_adapter_metadata is broken")
    settings = {component: {} for component in COMPONENTS}
    for name, value in content.items():
        component, _, rest = name.partition(".")
        if component in settings:
            settings[component][rest] = value
    if content and not any(settings.values()):
        # Diffusers' save_lora_adapter writes those of a UNet alone, without a prefix.
        if "r" not in content:
            raise ValueError(f"{path}: its header's lora_adapter_metadata is of other parts")
        settings["unet"] = content
    return settings


def parse_settings(source: str, content: dict, ranks: dict[str, int]) -> tuple[dict, str]:
    """A component's alphas by layer, {} if unknown, and how its layers began: see EXACT_STARTS.

    ranks: of its layers. scale = alpha / rank. ValueError, beginning with source, for any wrong
    setting.
    """
    if not content:
        return {}, ""
    kind = _entry(source, content, "peft_type", str, "LORA")
    if kind.upper() != "LORA":
        raise ValueError(f"{source} is of PEFT's {kind[:60]!r}: only plain LoRAs are read")
    for name in VARIANTS:
        if content.get(name):
            raise ValueError(f"{source} is no plain LoRA but one with {name}")
    alphas = _by_layer(source, content, "lora_alpha", "alpha_pattern", ranks)
    expected = _by_layer(source, content, "r", "rank_pattern", ranks)
    for name, rank in ranks.items():
        if expected[name] != rank:
            raise ValueError(f"{source}: {name} has rank {rank}, where it says {expected[name]:g}")
        # Rank-stabilised LoRA: alpha / sqrt(rank) instead of alpha / rank.
        if _entry(source, content, "use_rslora", bool, False):
            alphas[name] *= rank**0.5
    return alphas, _check_start(source, content.get("init_lora_weights", True))


def _entry(source: str, content: dict, name: str, kind: type, default=None):
    """A setting, of this type or null; ValueError otherwise."""
    value = content.get(name)
    # Not isinstance: True is an int in Python.
    if value is not None and type(value) is not kind:
        raise ValueError(f"{source}: its {name} is {_shown(value)}, not of type {kind.__name__}")
    return default if value is None else value


def _check_start(source: str, init) -> str:
    """Which of EXACT_STARTS init_lora_weights names, "" for a plain one; ValueError for others."""
    name = str(init).lower() if isinstance(init, str | bool | None) else _shown(init)
    if name in PLAIN_STARTS:
        return ""
    if name in EXACT_STARTS:
        return name
    hint = "convert it with PEFT's save_pretrained(.., path_initial_model_for_weight_conversion=..)"
    if name == "loftq":
        hint = "it fits its quantised base alone"
    raise ValueError(
        f"{source}: a LoRA that began as {_shown(init)} has its base changed, by what the file "
        f"does not tell: {hint}"
    )


def _shown(value) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _number(label: str, value) -> float:
    """A finite number other than 0; ValueError for anything else."""
    # An int of 400 digits has no float.
    if type(value) in (int, float) and value and abs(value) < 1e30:
        return float(value)
    raise ValueError(f"{label} is {_shown(value)}, not a finite number other than 0")


def _by_layer(source: str, content: dict, setting: str, patterns: str, names) -> dict[str, float]:
    """A layer's value of a setting: by the first pattern that its name ends in, if there is one."""
    # Eight is PEFT's default for both.
    default = _number(f"{source}: its {setting}", content.get(setting, 8))
    values = dict.fromkeys(names, default)
    # The first counts, so it comes last.
    for pattern, value in reversed(_entry(source, content, patterns, dict, {}).items()):
        # For PEFT it is a regular expression, but programs write names, or .* for some of one.
        if not re.fullmatch(r"\^?(\w|\.\*?)+", pattern):
            raise ValueError(f"{source}: {pattern[:60]!r} in its {patterns} is not a layer's name")
        ending = pattern.replace(".*", "*")
        ending = f".{ending[1:]}" if ending.startswith("^") else f"*.{ending}"
        value = _number(f"{source}: its {patterns}", value)
        for name in names:
            if fnmatchcase(f".{name}", ending):
                values[name] = value
    return values


# ----------------------------------------------------------------------------------------- starts


def subtract_start(adapter: Adapter, weight: Tensor, start: str) -> Adapter:
    """The adapter for W itself of one that was trained on W' = W - s B_0 A_0, of twice the rank.

    weight: W (out, in) in float32. start: "pissa", where s B_0 A_0 is the best approximation of W
    of that rank, or "olora", where B_0 A_0 is the first columns and rows of its QR decomposition.
    """
    rank = len(adapter.down)
    if start == "pissa":
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        up_0, down_0 = left[:, :rank] * singular[:rank], right[:rank]
    else:
        q, r = torch.linalg.qr(weight)
        up_0, down_0 = adapter.scale * q[:, :rank], r[:rank]
    # The file's matrices are in main memory; the base may be elsewhere.
    up = torch.cat([adapter.scale * adapter.up.float(), -up_0.cpu()], dim=1).double()
    down = torch.cat([adapter.down.float(), down_0.cpu()]).double()
    # The two products are as large as W and nearly cancel. Half precision would lose the rest, so
    # the new factors are those of the difference.
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, singular, right = torch.linalg.svd(r_up @ r_down.T)
    up, down = q_up @ left * singular.sqrt(), (q_down @ (right.T * singular.sqrt())).T
    return Adapter(down.float().contiguous(), up.float(), alpha=len(down))
