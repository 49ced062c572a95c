"""LoRA: low-rank updates over a frozen base, switched per call, stacked, merged, read and written.

Teacher, student and target network live on one copy of the base: `attach` hands layers their
updates and `using` says which of them count, and how much, for the calls inside its block.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common import files
from common.files import read_json, read_tensors
from sdxl import keys
from sdxl.load import assign
from sdxl.lora import LoRA, Update, _layers
from unet import Told, UNet

# ----------------------------------------------------------------------------------------- reading
#
# Four spellings of the same three things. A file is read whole or not at all: a key that no layer
# answers to is an error, since a LoRA applied in part looks like a bad LoRA.

SUFFIXES = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",
}  # fmt: skip
DOTTED = ("unet", "text_encoder", "text_encoder_2")
KOHYA = ("lora_unet", "lora_te1", "lora_te2")
TOLD = "unet.told."


def read_lora(path: Path, unet: UNet, encoder_1: nn.Module, encoder_2: nn.Module) -> list[LoRA]:
    """A file's LoRAs for the UNet and both text encoders (empty where it has none).

    PEFT/diffusers, older diffusers and kohya naming, with our module names or the original ones.
    Raises ValueError naming keys that fit no layer, halves without the other, and wrong shapes.
    """
    tensors, metadata = read_tensors(path)
    own = {k.removeprefix(TOLD): tensors.pop(k) for k in [*tensors] if k.startswith(TOLD)}
    bases = [unet, encoder_1, encoder_2]
    layers, table = [_layers(base) for base in bases], _spellings(bases)
    # (component, layer) -> its down, up and alpha, as the keys come.
    found, strangers = {}, []
    # The oldest diffusers files hold attention processors: .processor.to_out_lora.up.weight
    oldest = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)")
    for key, tensor in tensors.items():
        key = oldest.sub(r".\1.lora.\2", key).replace(".to_out.lora.", ".to_out.0.lora.")
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        place = table.get(key.removesuffix(suffix or "").removeprefix("base_model.model."))
        if suffix is None or place is None:
            strangers.append(key)
        else:
            found.setdefault(place, {})[SUFFIXES[suffix]] = tensor
    if strangers or not found:
        some = ", ".join(strangers[:3]) or "no LoRA key at all"
        count = f"{len(strangers)} keys fit nothing"
        raise ValueError(f"{path} is no LoRA for this model: {count}: {some}")
    updates, header = [{}, {}, {}], _header(path, metadata)
    # Raw PEFT files keep their settings beside them, and only there.
    if any(key.startswith("base_model.model.") for key in tensors):
        config = read_json(Path(path).parent / "adapter_config.json")
        header = {f"unet.{name}": value for name, value in config.items()}
    for (component, name), parts in found.items():
        if "alpha" not in parts and "down" in parts:
            parts["alpha"] = _header_alpha(header, DOTTED[component], name, len(parts["down"]))
        updates[component][name] = _update(f"{path}: {name}", layers[component][name], **parts)
    told = _told(path, own, metadata.get("told"), unet) if own else None
    return [LoRA.of(each, None if i else told) for i, each in enumerate(updates)]


def _told(path: Path, tensors: dict[str, Tensor], of: str | None, unet: UNet) -> Told:
    if of not in ("s", "K"):
        raise ValueError(f"{path} has an embedding, but its header does not say what of")
    return assign(Told(unet.config.channels[0], of), tensors, path)


def _spellings(bases) -> dict[str, tuple[int, str]]:
    """Every spelling of a layer's name, to its component and name."""
    # kohya turns dots into underscores, which cannot be undone: look up, do not parse.
    table, original = {}, dict(keys.unet_modules(bases[0].config))
    for component, base in enumerate(bases):
        for name in _layers(base):
            # Transformers 5 drops text_model., raw PEFT files name no component.
            ours = [name, name.removeprefix("text_model.")]
            spelled = ours if component else [name, keys.original(name, original)]
            table |= {f"{DOTTED[component]}.{one}": (component, name) for one in ours}
            for one in spelled:
                table[f"{KOHYA[component]}_{one.replace('.', '_')}"] = component, name
            if component == 0:
                table[name] = component, name
    return table


def _update(where: str, layer: nn.Module, down=None, up=None, alpha=None) -> Update:
    if down is None or up is None:
        raise ValueError(f"{where} has an up or a down matrix only: the file is not whole")
    # Some write linear layers as 1x1 convolutions.
    if layer.weight.ndim == 2:
        down, up = down.flatten(1), up.flatten(1)
    out, *inner = layer.weight.shape
    if list(down.shape[1:]) != inner or len(up) != out or up.shape[1] != len(down):
        raise ValueError(
            f"{where} is {tuple(up.shape)} x {tuple(down.shape)}, its layer "
            f"{tuple(layer.weight.shape)}: a LoRA for another model"
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{where} is {down.dtype}: quantised LoRAs are not read")
    alpha = len(down) if alpha is None else torch.as_tensor(alpha).flatten()[0]
    return Update(down, up, float(alpha))


def _header(path: Path, metadata: dict) -> dict:
    """What PEFT writes into a file's header: its settings, by component."""
    try:
        header = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header's lora_adapter_metadata is broken")
    return header


def _header_alpha(header: dict, component: str, name: str, rank: int) -> float | None:
    """A layer's alpha by PEFT's rules, None if the header does not say."""
    # A pattern names layers by the end of their name, as a regular expression.
    patterns = header.get(f"{component}.alpha_pattern") or {}
    found = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name))
    alpha = next(found, header.get(f"{component}.lora_alpha"))
    # Rank-stabilised LoRA: alpha / sqrt(rank) instead of alpha / rank.
    stable = rank**0.5 if header.get(f"{component}.use_rslora") else 1.0
    return None if alpha is None else alpha * stable


# ----------------------------------------------------------------------------------------- writing
#
# alpha / rank is folded into the up matrices, which makes alpha = rank: right in every loader, in
# those that never look for alpha as well. Losing it makes published LoRAs eight times too strong.


def write_peft(path: Path, lora: LoRA, **metadata: str) -> None:
    """A UNet's LoRA in PEFT/diffusers naming; what it is told, in keys that only we read."""
    # Layers may differ in rank; the header names the largest, and the others one by one.
    tensors, ranks = {}, {}
    for name, update in lora.items():
        tensors[f"unet.{name}.lora_A.weight"] = update.down
        tensors[f"unet.{name}.lora_B.weight"] = update.scale * update.up
        ranks[name] = len(update.down)
    rank = max(ranks.values())
    config = {
        "unet.r": rank, "unet.lora_alpha": rank, "unet.target_modules": sorted(ranks),
        "unet.rank_pattern": {k: r for k, r in ranks.items() if r != rank},
        "unet.alpha_pattern": {k: r for k, r in ranks.items() if r != rank},
    }  # fmt: skip
    if lora.told is not None:
        tensors |= {TOLD + k: v for k, v in lora.told.state_dict().items()}
        metadata["told"] = lora.told.of
    metadata["lora_adapter_metadata"] = json.dumps(config)
    files.write_tensors(path, tensors, format="pt", **metadata)


def write_kohya(path: Path, lora: LoRA, **metadata: str) -> None:
    """A UNet's LoRA in kohya naming, which ComfyUI and diffusers read, alpha tensors included."""
    tensors = {}
    for name, update in lora.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = update.down
        tensors[f"{key}.lora_up.weight"] = update.scale * update.up
        tensors[f"{key}.alpha"] = torch.tensor(float(len(update.down)))
    files.write_tensors(path, tensors, format="pt", **metadata)
