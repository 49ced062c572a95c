"""LoRA files: every common naming is read; those of diffusers and kohya are written."""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import files
from sdxl import keys, lora_kinds, lora_peft, num_steps
from sdxl.lora import Adapter, LoRA, named_layers
from sdxl.recipe import read_recipe
from sdxl.weights import HALF, find_lora, load_strict, summary
from unet import ScalarEmbedding, UNet, UNetConfig

# The start of a layer's name in kohya's naming, and in ComfyUI's for whole models.
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
COMFYUI = {
    "unet": "diffusion_model", "text_encoder": "text_encoders.clip_l.transformer",
    "text_encoder_2": "text_encoders.clip_g.transformer",
}  # fmt: skip

# A student's scalar embedding has keys that only this project reads, and a header entry "told" with
# the paper's symbol for the target time.
SCALAR, TARGET_TIME = "unet.told.", "s"

# ----------------------------------------------------------------------------------------- reading
#
# All namings spell the same three things: a layer's down matrix, up matrix and alpha. A file is
# read completely or not at all: a key that fits no layer is an error, since a LoRA applied in part
# looks like a bad LoRA.

PART = re.compile(
    r"\.(?P<down>(lora_A|lora\.down|lora_linear_layer\.down|lora_down)(\.default)?\.weight)$"
    r"|\.(?P<up>(lora_B|lora\.up|lora_linear_layer\.up|lora_up)(\.default)?\.weight)$"
    r"|\.(?P<alpha>alpha)$"
)
RAW_PEFT = "base_model.model."
# The oldest diffusers files hold attention processors: .processor.to_out_lora.up.weight
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)")
ATTENTION = re.compile(r"\.(to_[qkv]|to_out)(\.0)?\.lora$")


def read_lora(path: Path, unet: UNet, encoder_1: nn.Module, encoder_2: nn.Module) -> list[LoRA]:
    """The LoRAs of a file or its folder for the UNet and both text encoders, empty for one without.

    PEFT/diffusers, older diffusers, kohya and ComfyUI naming, with our module names or the original
    ones. Raises ValueError in one line for other kinds of adapters, for other models, and for keys
    that fit no layer, halves without the other, wrong shapes and numbers that are none.
    """
    path = find_lora(Path(path))
    tensors, header = files.read_tensors(path)
    lora_kinds.check_header(path, header)
    lora_kinds.check_keys(path, tensors)
    files.check_finite(path, tensors)
    embedding = _build_scalar_embedding(path, tensors, header.get("told"), unet)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(SCALAR)}
    bases = {"unet": unet, "text_encoder": encoder_1, "text_encoder_2": encoder_2}
    groups = _group_by_layer(path, tensors, bases)
    # Raw PEFT files have their settings in a file beside them, and only there.
    beside = any(RAW_PEFT in key for key in tensors)
    settings = lora_peft.read_settings(path, header, beside)
    loras = []
    for component, base in bases.items():
        adapters = {}
        if groups[component]:
            adapters = _build_adapters(path, base, groups[component], settings[component])
        loras.append(LoRA(adapters, embedding if component == "unet" else None))
    _check_k_adapter(path, loras[0], unet, header)
    return loras


def _check_k_adapter(path: Path, lora: LoRA, unet: UNet, header: dict) -> None:
    """ValueError if only one of layer and header says that the student is told K.

    The crop that tells it (sdxl/num_steps.py) would be taken for a crop.
    """
    adapter, original = lora.adapters.get(num_steps.LINEAR_1), "use the original"
    # CIFAR-10's stages have their settings without the prefix.
    if "tdd_told_ks" in header or "told_ks" in header:
        if adapter is None:
            raise ValueError(f"{path} has lost the layer for K, which its header has: {original}")
    elif adapter is not None and num_steps.reads_k(adapter, unet):
        message = "is told K, but has lost the header that says which (tdd_told_ks)"
        raise ValueError(f"{path} {message}: {original}")


def _build_scalar_embedding(path: Path, tensors, symbol: str | None, unet: UNet):
    """The student's ScalarEmbedding, None if the file has none."""
    weights = {k.removeprefix(SCALAR): v for k, v in tensors.items() if k.startswith(SCALAR)}
    if not weights and symbol is None:
        return None
    if not weights:
        raise ValueError(f"{path} has lost the embedding that its header names: use the original")
    if symbol == "K":
        message = "an embedding of K of an earlier version: K is told as a crop since"
        raise ValueError(f"{path} has {message}: train it again")
    if symbol != TARGET_TIME:
        raise ValueError(f"{path} has a scalar embedding, but its header does not say of what")
    return load_strict(ScalarEmbedding(unet.config.channels[0]), weights, path)


def _group_by_layer(path: Path, tensors: dict[str, Tensor], bases: dict[str, nn.Module]) -> dict:
    """component -> layer -> its "down", "up" and "alpha", as far as the file has them."""
    spellings = _layer_spellings(bases)
    groups, unexpected_keys = {component: {} for component in bases}, []
    for key, tensor in tensors.items():
        spelled = PROCESSOR.sub(r".\1.lora.\2", key).replace(".to_out.lora.", ".to_out.0.lora.")
        part = PART.search(spelled)
        spelled = PART.sub("", spelled).replace(RAW_PEFT, "")
        if part and spelled in spellings:
            component, name = spellings[spelled]
            parts = groups[component].setdefault(name, {})
            if part.lastgroup in parts:
                raise ValueError(f"{path} holds {component} {name} twice, the second as {key}")
            parts[part.lastgroup] = tensor
        else:
            unexpected_keys.append(key)
    if unexpected_keys:
        family = lora_kinds.other_family(unexpected_keys)
        family = f" but for {family}" if family else ""
        message = summary("keys that fit nothing", unexpected_keys)
        raise ValueError(f"{path} is no LoRA for this model{family}: {message}")
    if not any(groups.values()):
        raise ValueError(f"{path} is no LoRA for this model: it has no LoRA keys")
    return groups


def _layer_spellings(bases: dict[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Every spelling of a layer's name -> its component and name."""
    # A table, because kohya's underscores for dots cannot be parsed back.
    spellings = {}
    original = keys.unet_modules(bases["unet"].config)
    for component, base in bases.items():
        dotted = [f"{component}.", f"{COMFYUI[component]}."]
        underscored = [f"{KOHYA[component]}_"]
        if component == "unet":
            # Raw PEFT files name no component. LyCORIS' own prefix is SimpleTuner's.
            dotted += ["", "model.diffusion_model."]
            underscored += ["lycoris_"]
        for name in named_layers(base):
            # Transformers 5 leaves out text_model; the UNet may have its original names.
            names = [name, name.removeprefix("text_model.")]
            if component == "unet":
                names.append(keys.to_original_key(name, original))
            for spelled in names:
                for prefix in dotted:
                    spellings[prefix + spelled] = component, name
                for prefix in underscored:
                    spellings[prefix + spelled.replace(".", "_")] = component, name
    return spellings


def _build_adapters(path: Path, base: nn.Module, groups: dict, content: dict) -> dict[str, Adapter]:
    """One component's adapters by layer, for its base as it is; content: PEFT's settings."""
    layers, matrices, adapters = named_layers(base), {}, {}
    for name, parts in groups.items():
        matrices[name] = _read_matrices(f"{path}: {name}", layers[name], parts)
    ranks = {name: len(down) for name, (down, _) in matrices.items()}
    alphas, start = lora_peft.parse_settings(f"{path} by PEFT's settings", content, ranks)
    # A large layer's singular value decomposition takes a second on a CPU.
    for name, parts in tqdm(groups.items(), f"{path.name} from {start}", disable=not start):
        alpha = alphas.get(name, ranks[name])
        if "alpha" in parts:
            alpha = _read_alpha(f"{path}: {name}", parts["alpha"])
        adapters[name] = Adapter(*matrices[name], alpha)
        if start:
            weight = layers[name].weight
            _check_convertible(f"{path}: {name}", weight, start)
            adapters[name] = lora_peft.subtract_start(adapters[name], weight, start)
    return adapters


def _check_convertible(source: str, weight: Tensor, start: str) -> None:
    """ValueError unless an adapter that began this way can be converted with its layer's weight."""
    if weight.ndim != 2:
        raise ValueError(f"{source} is a convolution, which PEFT cannot begin as {start}")
    # Rounding to half precision moves W's singular vectors by as much as a LoRA's effect.
    if weight.dtype != torch.float32:
        raise ValueError(
            f"{source} began as {start} of its base's weight, which must be in float32 to convert "
            "it: sample with --dtype float32"
        )


def _read_matrices(source: str, layer: nn.Module, parts: dict) -> tuple[Tensor, Tensor]:
    """A layer's down and up matrix, shaped for it.

    Raises ValueError, beginning with `source`, unless both are there, of numbers, and fit.
    """
    if "down" not in parts or "up" not in parts:
        raise ValueError(f"{source} has an up or a down matrix only: the file is incomplete")
    matrices = []
    for tensor in (parts["down"], parts["up"]):
        if not tensor.is_floating_point():
            raise ValueError(f"{source} is {tensor.dtype}: quantised LoRAs are not read")
        # Torch does not compute with eight bits.
        tensor = tensor if tensor.dtype in HALF else tensor.float()
        # Some tools write linear layers as 1x1 convolutions, others the other way round.
        is_matrix = tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
        matrices.append(tensor.flatten(1) if is_matrix else tensor)
    down, up = matrices
    out, *fan_in = layer.weight.shape
    expected = fan_in if math.prod(fan_in[1:]) > 1 else fan_in[:1]
    rank = down.shape[0] if down.ndim else 0
    if not rank or list(down.shape[1:]) != expected or list(up.shape) != [out, rank]:
        sizes = f"{tuple(up.shape)} x {tuple(down.shape)}, its layer {tuple(layer.weight.shape)}"
        raise ValueError(f"{source} is {sizes}: a LoRA for another model")
    return down.reshape(rank, *fan_in), up.reshape(out, rank, *[1] * (len(fan_in) - 1))


def _read_alpha(source: str, alpha: Tensor) -> float:
    is_number = alpha.numel() == 1 and not alpha.is_complex() and alpha.dtype != torch.bool
    if not is_number or not float(alpha):
        value = alpha.item() if alpha.numel() == 1 else f"of shape {tuple(alpha.shape)}"
        raise ValueError(f"{source}: its alpha is {value}, not one number other than 0")
    return float(alpha)


# ----------------------------------------------------------------------------------------- writing
#
# alpha / rank is folded into the up matrices, so alpha = rank: right in every loader, also in those
# that never look for alpha. TDD's FLUX LoRA lost its alpha, and is eight times too strong.


def write_diffusers(path: Path, lora: LoRA, **metadata: str) -> None:
    """A UNet's LoRA in diffusers' naming, with its scalar embedding; metadata: the header's.

    Attention has the names from before PEFT: diffusers reads both, and ComfyUI these alone.
    """
    tensors, ranks = {}, {}
    for name, adapter in lora.adapters.items():
        key = ATTENTION.sub(r".processor.\1_lora", f"unet.{name}.lora")
        tensors[f"{key}.down.weight"] = adapter.down
        tensors[f"{key}.up.weight"] = adapter.scale * adapter.up
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
        metadata["told"] = TARGET_TIME
    metadata["lora_adapter_metadata"] = json.dumps(settings)
    files.write_tensors(path, tensors, format="pt", **metadata)


# What sd-scripts writes and other programs go by: without ss_base_model_version AUTOMATIC1111 takes
# a LoRA for one of Stable Diffusion 1, and does not list it.
KOHYA_HEADER = {
    "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False",
    "ss_network_module": "networks.lora", "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.prediction_type": "epsilon",
}  # fmt: skip


def write_kohya(path: Path, lora: LoRA, **metadata: str) -> None:
    """An SDXL UNet's LoRA in kohya naming, without the embedding; metadata: the header's entries.

    Layers have the names of the original code, which sd-scripts knows alone; AUTOMATIC1111, ComfyUI
    and diffusers read them too.
    """
    tensors, ranks = {}, set()
    # Sizes do not matter for the names, and the arrangement of blocks is the same in all of SDXL.
    original = keys.unet_modules(UNetConfig())
    for name, adapter in lora.adapters.items():
        key = f"lora_unet_{keys.to_original_key(name, original).replace('.', '_')}"
        rank = len(adapter.down)
        tensors[f"{key}.lora_down.weight"] = adapter.down
        tensors[f"{key}.lora_up.weight"] = adapter.scale * adapter.up
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
        ranks.add(rank)
    title = f"{metadata.get('tdd_method', '').upper()} LoRA".strip()
    # One number for all layers, or sd-scripts' word for several.
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"
    header = {"modelspec.title": title, "ss_network_dim": rank, "ss_network_alpha": rank}
    if side := metadata.get("tdd_resolution"):
        header["modelspec.resolution"] = f"{side}x{side}"
    files.write_tensors(path, tensors, format="pt", **KOHYA_HEADER | header | metadata)


# ------------------------------------------------------------------------------------ both namings


def kohya_beside(path: Path) -> Path:
    """Where the same LoRA in kohya's naming is written."""
    return path.with_name(f"{path.stem}_kohya.safetensors")


def write_both(path: Path, lora: LoRA, **metadata: str) -> list[Path]:
    """A UNet's LoRA in diffusers' naming, and beside it in kohya's; returns the files."""
    write_diffusers(path, lora, **metadata)
    # Kohya's naming has no place for a scalar embedding, without which it is another model.
    if lora.scalar_embedding is not None:
        return [path]
    write_kohya(kohya_beside(path), lora, **metadata)
    return [path, kohya_beside(path)]


def check_export(path: Path, K: int, output: Path) -> None:
    """ValueError in one line if this file is not told K, or would be written over."""
    Ks = read_recipe(path, files.read_tensors(path)[1]).get("told_ks", ())
    if K not in Ks:
        raise ValueError(f"--export-k {K}: {path} is told {[*Ks] if Ks else 'no K'}")
    for file in (output, kohya_beside(output)):
        if file.exists():
            raise ValueError(f"--output {output} would replace {file}: name another")


def export_for_one_K(path: Path, K: int, unet: UNet, output: Path) -> list[Path]:
    """A told student's file as `num_steps.for_one_K` makes it, in both namings."""
    header = files.read_tensors(path)[1]
    lora, *_ = read_lora(path, unet, nn.Module(), nn.Module())
    entries = {k: v for k, v in header.items() if k.startswith("tdd_") and k != "tdd_told_ks"}
    entries["tdd_K"] = str(K)
    return write_both(output, num_steps.for_one_K(lora, unet, K), **entries)
