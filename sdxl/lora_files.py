"""LoRA files: every common naming is read; PEFT/diffusers and kohya naming are written."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common import files
from sdxl import keys, load
from sdxl.lora import Adapter, LoRA, named_layers
from unet import ScalarEmbedding, UNet

# The start of a layer's key in PEFT's and diffusers' naming, and in kohya's.
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

# A student's scalar embedding has keys that only this project reads, and a header entry "told" with
# the paper's symbol for the scalar.
SCALAR = "unet.told."
SCALAR_KINDS = {"s": "target_time", "K": "num_steps"}
SCALAR_SYMBOLS = {kind: symbol for symbol, kind in SCALAR_KINDS.items()}

# ----------------------------------------------------------------------------------------- reading
#
# All namings spell the same three things: a layer's down matrix, up matrix and alpha. A file is
# read completely or not at all: a key that fits no layer is an error, since a LoRA applied in part
# looks like a bad LoRA.

SUFFIXES = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",
}  # fmt: skip
RAW_PEFT = "base_model.model."
# The oldest diffusers files hold attention processors: .processor.to_out_lora.up.weight
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)")


def read_lora(path: Path, unet: UNet, encoder_1: nn.Module, encoder_2: nn.Module) -> list[LoRA]:
    """A file's LoRAs for the UNet and both text encoders (empty where it has none).

    PEFT/diffusers, older diffusers and kohya naming, with our module names or the original ones.
    Raises ValueError naming keys that fit no layer, halves without the other, and wrong shapes.
    """
    tensors, metadata = files.read_tensors(path)
    embedding = _build_scalar_embedding(path, tensors, metadata.get("told"), unet)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(SCALAR)}
    bases = {"unet": unet, "text_encoder": encoder_1, "text_encoder_2": encoder_2}
    groups = _group_by_layer(path, tensors, bases)
    settings = _peft_settings(path, metadata)
    # Raw PEFT files have their settings in a file beside them, and only there.
    if any(key.startswith(RAW_PEFT) for key in tensors):
        config = files.read_json(Path(path).parent / "adapter_config.json")
        settings = {f"unet.{name}": value for name, value in config.items()}
    loras = []
    for component, base in bases.items():
        layers, adapters = named_layers(base), {}
        for name, parts in groups[component].items():
            if "alpha" not in parts and "down" in parts:
                parts["alpha"] = _peft_alpha(settings, component, name, rank=len(parts["down"]))
            adapters[name] = _build_adapter(f"{path}: {name}", layers[name], parts)
        loras.append(LoRA(adapters, embedding if component == "unet" else None))
    return loras


def _build_scalar_embedding(path: Path, tensors, symbol: str | None, unet: UNet):
    """The student's ScalarEmbedding, None if the file has none."""
    weights = {k.removeprefix(SCALAR): v for k, v in tensors.items() if k.startswith(SCALAR)}
    if not weights:
        return None
    if symbol not in SCALAR_KINDS:
        raise ValueError(f"{path} has a scalar embedding, but its header does not say of what")
    embedding = ScalarEmbedding(unet.config.channels[0], SCALAR_KINDS[symbol])
    return load.load_strict(embedding, weights, path)


def _group_by_layer(path: Path, tensors: dict[str, Tensor], bases: dict[str, nn.Module]) -> dict:
    """component -> layer -> its "down", "up" and "alpha", as far as the file has them."""
    spellings = _layer_spellings(bases)
    groups, unexpected_keys = {component: {} for component in bases}, []
    for key, tensor in tensors.items():
        spelled = PROCESSOR.sub(r".\1.lora.\2", key).replace(".to_out.lora.", ".to_out.0.lora.")
        suffix = next((suffix for suffix in SUFFIXES if spelled.endswith(suffix)), "")
        spelled = spelled.removesuffix(suffix).removeprefix(RAW_PEFT)
        if suffix and spelled in spellings:
            component, name = spellings[spelled]
            groups[component].setdefault(name, {})[SUFFIXES[suffix]] = tensor
        else:
            unexpected_keys.append(key)
    if unexpected_keys:
        message = load.summary("keys that fit nothing", unexpected_keys)
        raise ValueError(f"{path} is no LoRA for this model: {message}")
    if not any(groups.values()):
        raise ValueError(f"{path} is no LoRA for this model: it has no LoRA keys")
    return groups


def _layer_spellings(bases: dict[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Every spelling of a layer's name -> its component and name."""
    # A table, because kohya's underscores for dots cannot be parsed back.
    spellings = {}
    original = keys.unet_modules(bases["unet"].config)
    for component, base in bases.items():
        for name in named_layers(base):
            # Transformers 5 leaves out text_model; kohya's may be the UNet's original names.
            short_name = name.removeprefix("text_model.")
            kohya_name = short_name
            if component == "unet":
                kohya_name = keys.to_original_key(name, original)
                # Raw PEFT files name no component.
                spellings[name] = component, name
            for each in (name, kohya_name):
                spellings[f"{KOHYA[component]}_{each.replace('.', '_')}"] = component, name
            for each in (name, short_name):
                spellings[f"{component}.{each}"] = component, name
    return spellings


def _build_adapter(source: str, layer: nn.Module, parts: dict) -> Adapter:
    """A layer's adapter from its matrices and alpha, where None means its rank.

    Raises ValueError, beginning with `source`, unless both matrices are there and fit the layer.
    """
    if "down" not in parts or "up" not in parts:
        raise ValueError(f"{source} has an up or a down matrix only: the file is incomplete")
    down, up, alpha = parts["down"], parts["up"], parts["alpha"]
    # Some tools write linear layers as 1x1 convolutions.
    if layer.weight.ndim == 2:
        down, up = down.flatten(1), up.flatten(1)
    out, *fan_in = layer.weight.shape
    if list(down.shape[1:]) != fan_in or len(up) != out or up.shape[1] != len(down):
        sizes = f"{tuple(up.shape)} x {tuple(down.shape)}, its layer {tuple(layer.weight.shape)}"
        raise ValueError(f"{source} is {sizes}: a LoRA for another model")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{source} is {down.dtype}: quantised LoRAs are not read")
    alpha = len(down) if alpha is None else torch.as_tensor(alpha).flatten()[0]
    return Adapter(down, up, float(alpha))


def _peft_settings(path: Path, metadata: dict[str, str]) -> dict:
    """PEFT's settings in a file's header, as "component.name"; {} if it has none."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: its header's lora_adapter_metadata is broken")
    return settings


def _peft_alpha(settings: dict, component: str, name: str, rank: int) -> float | None:
    """A layer's alpha by PEFT's rules, None if the settings have none."""
    patterns = settings.get(f"{component}.alpha_pattern") or {}
    # A pattern names layers by the end of their name, as a regular expression; the first counts.
    values = [value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", name)]
    alpha = values[0] if values else settings.get(f"{component}.lora_alpha")
    # Rank-stabilised LoRA: alpha / sqrt(rank) instead of alpha / rank.
    if alpha is not None and settings.get(f"{component}.use_rslora"):
        return alpha * rank**0.5
    return alpha


# ----------------------------------------------------------------------------------------- writing
#
# alpha / rank is folded into the up matrices, so alpha = rank: right in every loader, also in those
# that never look for alpha. Published LoRAs read without their alpha are eight times too strong.


def write_peft(path: Path, lora: LoRA, **metadata: str) -> None:
    """A UNet's LoRA in PEFT/diffusers naming, with its scalar embedding; metadata: the header's."""
    tensors, ranks = {}, {}
    for name, adapter in lora.adapters.items():
        tensors[f"unet.{name}.lora_A.weight"] = adapter.down
        tensors[f"unet.{name}.lora_B.weight"] = adapter.scale * adapter.up
        ranks[name] = len(adapter.down)
    # Layers may differ in rank: the settings have the largest, and a pattern for each other layer.
    rank = max(ranks.values())
    pattern = {name: r for name, r in ranks.items() if r != rank}
    settings = {
        "unet.r": rank, "unet.lora_alpha": rank, "unet.target_modules": sorted(ranks),
        "unet.rank_pattern": pattern, "unet.alpha_pattern": pattern,
    }  # fmt: skip
    if lora.scalar_embedding is not None:
        for name, tensor in lora.scalar_embedding.state_dict().items():
            tensors[SCALAR + name] = tensor
        metadata["told"] = SCALAR_SYMBOLS[lora.scalar_embedding.kind]
    metadata["lora_adapter_metadata"] = json.dumps(settings)
    files.write_tensors(path, tensors, format="pt", **metadata)


def write_kohya(path: Path, lora: LoRA, **metadata: str) -> None:
    """A UNet's LoRA in kohya naming, which ComfyUI and diffusers read, without the embedding."""
    tensors = {}
    for name, adapter in lora.adapters.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = adapter.down
        tensors[f"{key}.lora_up.weight"] = adapter.scale * adapter.up
        tensors[f"{key}.alpha"] = torch.tensor(float(len(adapter.down)))
    files.write_tensors(path, tensors, format="pt", **metadata)
