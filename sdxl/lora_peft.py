"""PEFT's settings of a LoRA: alpha by layer, and starts that took something out of the base.

They stand in the file's header, where diffusers writes them, or in adapter_config.json beside it.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import files
from sdxl.lora import Adapter

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# Settings under which an adapter is more than alpha / rank * up @ down.
VARIANTS = {
    "use_dora": "DoRA", "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA",
    "arrow_config": "Arrow", "monteclora_config": "MonteCLoRA", "lora_bias": "LoRA with biases",
    "alora_invocation_tokens": "activated LoRA",
}  # fmt: skip
# init_lora_weights. A start with B_0 A_0 = 0 leaves the base as it is. Others change it to
# W' = W - s B_0 A_0, so that the file alone says nothing. Two of them can be computed from W.
PLAIN_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
EXACT_STARTS = ("pissa", "olora")
OTHER_STARTS = {
    "corda": "CorDA", "lora_ga": "LoRA-GA", "pissa_niter": "PiSSA by a randomised SVD",
    "loftq": "LoftQ",
}  # fmt: skip
MATCH_SECONDS = 5.0  # for all layers' names and patterns


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


@dataclass(frozen=True)
class PeftSettings:
    """One component's settings, checked: alpha and rank by layer, as far as they are known.

    start: one of EXACT_STARTS, or "" where the base stays as it is.
    """

    source: str
    alphas: dict[str, float]
    ranks: dict[str, float]
    rank_stabilised: bool
    start: str

    def alpha_of(self, name: str, rank: int) -> float | None:
        """A layer's alpha in this code's sense, scale = alpha / rank; None if unknown."""
        alpha = self.alphas.get(name)
        if alpha is not None and self.ranks.get(name, rank) != rank:
            wanted = f"{self.ranks[name]:g}"
            raise ValueError(f"{self.source}: {name} has rank {rank}, where it says {wanted}")
        # Rank-stabilised LoRA: alpha / sqrt(rank) instead of alpha / rank.
        return alpha * rank**0.5 if alpha is not None and self.rank_stabilised else alpha


def parse_settings(source: str, content: dict, names: list[str]) -> PeftSettings:
    """Settings for layers of these names; ValueError, beginning with source, for any wrong one."""
    kind = _entry(source, content, "peft_type", str, "LORA")
    if kind.upper() != "LORA":
        raise ValueError(f"{source} is of PEFT's {kind[:60]!r}: only plain LoRAs are read")
    for name, variant in VARIANTS.items():
        if content.get(name):
            raise ValueError(f"{source} is no plain LoRA but {variant} ({name})")
    alpha, rank = None, None
    if content:
        # Eight is PEFT's default for both.
        alpha = _number(f"{source}: its lora_alpha", content.get("lora_alpha", 8))
        rank = _number(f"{source}: its r", content.get("r", 8))
    return PeftSettings(
        source,
        alphas=_by_layer(source, content, "alpha_pattern", alpha, names),
        ranks=_by_layer(source, content, "rank_pattern", rank, names),
        rank_stabilised=_entry(source, content, "use_rslora", bool, False),
        start=_check_start(source, content.get("init_lora_weights", True)),
    )


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
    kind = next((kind for mark, kind in OTHER_STARTS.items() if name.startswith(mark)), "")
    hint = "convert it with PEFT's save_pretrained(.., path_initial_model_for_weight_conversion=..)"
    if kind == "LoftQ":
        hint = "it fits its quantised base alone"
    raise ValueError(
        f"{source}: a LoRA that began as {kind or 'something unknown here'} ({_shown(init)}) has "
        f"its base changed, by what the file does not tell: {hint}"
    )


def _shown(value) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _number(label: str, value) -> float:
    """A finite number other than 0; ValueError for anything else."""
    # An int of 400 digits has no float.
    if type(value) in (int, float) and value and abs(value) < 1e30:
        return float(value)
    raise ValueError(f"{label} is {_shown(value)}, not a finite number other than 0")


# ---------------------------------------------------------------------------------------- patterns
#
# A pattern names layers by the end of their name, as a regular expression; the first that matches
# counts. Some expressions take exponential time: repeated groups, many repeats or groups in a row.


def _by_layer(source: str, content: dict, setting: str, default, names: list[str]) -> dict:
    """A layer's value by the patterns of a setting; the default, if there is one, elsewhere."""
    patterns, values, start = [], {}, time.monotonic()
    for pattern, value in _entry(source, content, setting, dict, {}).items():
        patterns.append(
            (_compile(source, setting, pattern), _number(f"{source}: its {setting}", value))
        )
    for name in names:
        values[name] = next((value for p, value in patterns if p.match(name)), default)
        if time.monotonic() - start > MATCH_SECONDS:
            raise ValueError(f"{source}: the expressions in its {setting} take too long")
    return {name: value for name, value in values.items() if value is not None}


def _compile(source: str, setting: str, pattern: str) -> re.Pattern:
    label = f"{source}: {pattern[:60]!r} in its {setting}"
    repeats = len(re.findall(r"[*+?{]", pattern))
    if (
        repeats > 3
        or pattern.count("(") > 2
        or re.search(r"\)[*+?{]", pattern)
        or len(pattern) > 500
    ):
        raise ValueError(f"{label} is too involved an expression: name the layers")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError):
        raise ValueError(f"{label} is no regular expression") from None


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
