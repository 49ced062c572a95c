"""SDXL checkpoints: published folders and single files, read strictly and without a second copy.

Weights are memory-mapped and assigned to modules made on the meta device: nothing is initialised to
be thrown away, and a module holds the file's own pages until its precision or device changes.
"""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.files import read_json, read_tensors
from sdxl import keys
from sdxl.clip import TextConfig, TextEncoder, Tokenizer
from sdxl.controlnet import ControlNet, ControlNetConfig
from sdxl.vae import VAE, VAEConfig
from unet import UNet, UNetConfig


def find_weights(folder: Path, half: bool = False) -> list[Path]:
    """A component's weight files, one or the shards of an index: .fp16 last, or first if half."""
    # Diffusers' networks are called one way, transformers' the other.
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in (".fp16", "") if half else ("", ".fp16"):
            whole = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if whole.exists():
                return [whole]
            if index.exists():
                shards = set(read_json(index).get("weight_map", {}).values())
                return [folder / name for name in sorted(shards or {f"shards of {index.name}"})]
    raise ValueError(f"{folder} holds no diffusion_pytorch_model or model .safetensors")


# --------------------------------------------------------------------------------- strict loading
#
# load_state_dict's own message lists every key of a wrong file; a user needs the first few.


class _SkipInit(TorchFunctionMode):
    """No nn.init function does anything: on the meta device too they take half of a load's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def empty(cls, config) -> nn.Module:
    """A network without memory for its weights, to be given to `assign`."""
    # Thousands of new modules set the garbage collector off again and again, for nothing: it takes
    # longer than making them.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.device("meta"), _SkipInit():
            return cls(config)
    finally:
        if collecting:
            gc.enable()


def cast(module: nn.Module, dtype) -> None:
    """Weights to `dtype`; in half precision those stay in float32 that module.FLOAT32 names."""
    half = dtype in (torch.float16, torch.bfloat16)
    for name, p in module.named_parameters():
        precise = half and name.split(".")[0] in getattr(module, "FLOAT32", ())
        p.data = p.data.to(torch.float32 if precise else dtype)


def assign(module: nn.Module, tensors: dict[str, Tensor], where, dtype=None) -> nn.Module:
    """Give a module made on the meta device its weights, in evaluation mode and without gradients.

    dtype: as for `cast`. Raises ValueError that names every kind of mismatch: missing, unexpected
    or mis-shaped.
    """
    # One message with everything in it: a user should not have to mend a file key by key.
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    other = sorted(name for name, shape in wanted.items() if given.get(name, shape) != shape)
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another shape": [f"{name} {given[name]} instead of {wanted[name]}" for name in other],
    }
    said = [
        f"{len(v)} {kind}: {', '.join(v[:3])}{' ..' * (len(v) > 3)}"
        for kind, v in problems.items()
        if v
    ]
    if said:
        raise ValueError(f"{where} does not fit {type(module).__name__}: {'; '.join(said)}")
    module.load_state_dict(tensors, assign=True)
    cast(module, dtype)
    return module.eval().requires_grad_(False)


def load_component(folder: Path, cls, config_cls, dtype=None) -> nn.Module:
    """One component of a published folder: its config.json says what to build."""
    try:
        config = config_cls.from_json(read_json(folder / "config.json"))
    except KeyError as problem:
        raise ValueError(f"{folder / 'config.json'} has no {problem}: another family") from None
    except ValueError as problem:
        raise ValueError(f"{folder / 'config.json'}: {problem}") from None
    tensors = {}
    for path in find_weights(folder, dtype in (torch.float16, torch.bfloat16)):
        tensors |= read_tensors(path)[0]
    # Transformers 5 writes the first encoder without the prefix that published folders have.
    if cls is TextEncoder and "final_layer_norm.weight" in tensors:
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    # A buffer of older libraries: 0, 1, 2, ..
    tensors = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
    return assign(empty(cls, config), tensors, folder, dtype)


# -------------------------------------------------------------------------------------- the model


@dataclass
class SDXL:
    """The parts that make a picture."""

    unet: UNet
    vae: VAE
    encoder_1: TextEncoder
    encoder_2: TextEncoder
    tokenizer: Tokenizer

    def to(self, device) -> "SDXL":
        for module in (self.unet, self.vae, self.encoder_1, self.encoder_2):
            module.to(device)
        return self


def load_sdxl(path: Path, tokenizer: Path | None = None, dtype=None) -> SDXL:
    """A published folder or a single file; a single file holds no tokenizer, so name its folder.

    dtype: of the UNet and the text encoders; the VAE is float32. ValueError if anything is wrong.
    """
    if not path.exists():
        raise ValueError(f"--model {path} does not exist")
    model = (_load_folder if path.is_dir() else _load_file)(path, tokenizer, dtype)
    unet, text_1, text_2 = model.unet.config, model.encoder_1.config, model.encoder_2.config
    fits = {
        "latents": (unet.in_channels, model.vae.config.latent_channels),
        "tokens": (unet.tokens, text_1.hidden + text_2.hidden),
        "pooled prompt and sizes": (unet.added, (text_2.projection or 0) + 6 * unet.time_ids_width),
    }
    # Inpainting and image-editing models take more channels than there are latents.
    for what, (wanted, given) in fits.items():
        if wanted != given:
            raise ValueError(f"{path}: its UNet takes {wanted} channels of {what}, not {given}")
    return model


def _load_folder(path: Path, tokenizer: Path | None, dtype) -> SDXL:
    # Its presence is what makes a folder a model folder; what it says is in the configs as well.
    read_json(path / "model_index.json")
    scheduler = path / "scheduler" / "scheduler_config.json"
    kind = read_json(scheduler).get("prediction_type") if scheduler.exists() else None
    if kind not in (None, "epsilon"):
        raise ValueError(f"{path} predicts {kind}; this code samples eps-prediction models")
    return SDXL(
        load_component(path / "unet", UNet, UNetConfig, dtype),
        load_component(path / "vae", VAE, VAEConfig, torch.float32),
        load_component(path / "text_encoder", TextEncoder, TextConfig, dtype),
        load_component(path / "text_encoder_2", TextEncoder, TextConfig, dtype),
        Tokenizer.from_folder(tokenizer or path / "tokenizer"),
    )


def _load_file(path: Path, tokenizer: Path | None, dtype) -> SDXL:
    if tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer: name a folder with --tokenizer")
    tensors, _ = read_tensors(path)
    try:
        unet, vae, text_1, text_2 = keys.configs(tensors)
    except KeyError as problem:
        raise ValueError(f"{path} is no SDXL checkpoint: it has no {problem}") from None
    parts = [
        (UNet, unet, keys.UNET, dict(keys.unet_modules(unet))),
        (VAE, vae, keys.VAE, dict(keys.vae_modules(vae))),
        (TextEncoder, text_1, keys.TEXT_1, {}),
        (TextEncoder, text_2, keys.TEXT_2, dict(keys.text_modules(text_2))),
    ]
    # What no module asks for and nobody knows is an error: it may be what makes the model another.
    modules, rest = [], {name for name in tensors if not keys.IGNORED.search(name)}
    for cls, config, prefix, table in parts:
        module = empty(cls, config)
        sources = {name: prefix + keys.original(name, table) for name in module.state_dict()}
        own = {k: keys.take(tensors, k, v) for k, v in sources.items() if v in tensors}
        modules.append(assign(module, own, path, torch.float32 if cls is VAE else dtype))
        rest -= set(sources.values())
    if rest:
        some = ", ".join(sorted(rest)[:3])
        raise ValueError(f"{path} holds {len(rest)} tensors that SDXL has not: {some} ..")
    return SDXL(*modules, Tokenizer.from_folder(tokenizer))


def load_controlnet(folder: Path, dtype=None) -> ControlNet:
    return load_component(folder, ControlNet, ControlNetConfig, dtype)
