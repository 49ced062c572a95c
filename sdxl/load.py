"""SDXL checkpoints: published folders and single files, read strictly and without a second copy.

Weights are memory-mapped and assigned to modules built on the meta device: no weight is initialised
only to be replaced, and a module uses the file's pages until its precision or device changes.
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
from sdxl.vae import VAE, VAEConfig
from unet import UNet, UNetConfig

HALF = torch.float16, torch.bfloat16


def find_weights(folder: Path, half: bool = False) -> list[Path]:
    """A component's weights, a file or shards: .fp16 last, or first if half; ValueError if none."""
    # Diffusers names the files of its networks one way, transformers the other.
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in (".fp16", "") if half else ("", ".fp16"):
            single = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if single.exists():
                return [single]
            if index.exists():
                if shards := set(read_json(index).get("weight_map", {}).values()):
                    return [folder / name for name in sorted(shards)]
                raise ValueError(f"{index} names no shards; download the folder again")
    raise ValueError(f"{folder} holds no diffusion_pytorch_model or model .safetensors")


# --------------------------------------------------------------------------------- strict loading
#
# load_state_dict's own message lists every key of a wrong file; a user needs the first few.


class _SkipInit(TorchFunctionMode):
    """Turns nn.init functions into no-ops: on the meta device they take half of a load's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_on_meta(cls, config) -> nn.Module:
    """A network without memory for its weights; `load_strict` gives it those."""
    # Thousands of new modules trigger the garbage collector again and again, in vain: that would
    # take longer than making the modules.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.device("meta"), _SkipInit():
            return cls(config)
    finally:
        if collecting:
            gc.enable()


def cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Convert weights to dtype, except that module.KEEP_IN_FP32's stay in float32 beside half.

    None leaves every weight in the file's precision.
    """
    for name, p in module.named_parameters():
        keep = dtype in HALF and name.split(".")[0] in getattr(module, "KEEP_IN_FP32", ())
        p.data = p.data.to(torch.float32 if keep else dtype)


def use_exact_float32(dtype: torch.dtype) -> None:
    """Convolutions in float32 where that was asked for, and not in torch's default, TF32."""
    # TF32 has ten bits, as fp16 has. Beside fp16 it is for the autoencoder, which has the bits to
    # spare; a LoRA's effect is off by 7 % in it.
    torch.backends.cudnn.allow_tf32 = dtype in HALF


def load_strict(module: nn.Module, tensors: dict[str, Tensor], source, dtype=None) -> nn.Module:
    """Give a module made on the meta device its weights, in evaluation mode and without gradients.

    source: the file or folder, for messages. dtype: as for `cast`. Raises ValueError with all
    missing, unexpected and mis-shaped tensors: a user should not have to mend a file key by key.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    both = sorted(shapes.keys() & expected.keys())
    wrong = [f"{k} {shapes[k]} instead of {expected[k]}" for k in both if shapes[k] != expected[k]]
    problems = {"missing": sorted(expected.keys() - shapes.keys()),
                "unexpected": sorted(shapes.keys() - expected.keys()),
                "of another shape": wrong}  # fmt: skip
    message = "; ".join(summary(kind, names) for kind, names in problems.items() if names)
    if message:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {message}")
    module.load_state_dict(tensors, assign=True)
    cast(module, dtype)
    return module.eval().requires_grad_(False)


def summary(kind: str, entries: list[str]) -> str:
    """The number of entries and the first three of them."""
    more = " .." if len(entries) > 3 else ""
    return f"{len(entries)} {kind}: {', '.join(entries[:3])}{more}"


def load_component(folder: Path, cls, config_cls, dtype=None) -> nn.Module:
    """One component of a published folder, a `cls` of the sizes in its config.json."""
    config_file = folder / "config.json"
    content = read_json(config_file)
    try:
        config = config_cls.from_json(content)
    except KeyError as problem:
        raise ValueError(f"{config_file} has no {problem}: another family") from None
    except ValueError as problem:
        raise ValueError(f"{config_file}: {problem}") from None
    tensors = {}
    for path in find_weights(folder, half=dtype in HALF):
        tensors |= read_tensors(path)[0]
    # Transformers 5 writes the first encoder without the prefix that published folders have.
    if cls is TextEncoder and "final_layer_norm.weight" in tensors:
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    # A buffer of older libraries: 0, 1, 2, ..
    tensors = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
    return load_strict(build_on_meta(cls, config), tensors, folder, dtype)


# -------------------------------------------------------------------------------------- the model


@dataclass
class SDXL:
    """The parts that make an image."""

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
    load = _load_folder if path.is_dir() else _load_file
    model = load(path, tokenizer, dtype)
    unet, text_1, text_2 = model.unet.config, model.encoder_1.config, model.encoder_2.config
    # Inpainting and image-editing models take more channels than there are latents.
    pooled_and_sizes = (text_2.projection or 0) + 6 * unet.time_ids_width
    for name, taken, available in (
        ("latents", unet.in_channels, model.vae.config.latent_channels),
        ("prompt_embeds", unet.cross_attention_dim, text_1.hidden + text_2.hidden),
        ("pooled prompt and sizes", unet.add_embedding_dim, pooled_and_sizes),
    ):
        if taken != available:
            raise ValueError(f"{path}: its UNet takes {taken} channels of {name}, not {available}")
    return model


def _load_folder(path: Path, tokenizer: Path | None, dtype) -> SDXL:
    # The index marks a folder as a model; the components' configs repeat what is in it.
    read_json(path / "model_index.json")
    scheduler = path / "scheduler" / "scheduler_config.json"
    prediction = read_json(scheduler).get("prediction_type") if scheduler.exists() else None
    if prediction not in (None, "epsilon"):
        raise ValueError(f"{path} predicts {prediction}; this code samples eps-prediction models")
    return SDXL(
        unet=load_component(path / "unet", UNet, UNetConfig, dtype),
        vae=load_component(path / "vae", VAE, VAEConfig, torch.float32),
        encoder_1=load_component(path / "text_encoder", TextEncoder, TextConfig, dtype),
        encoder_2=load_component(path / "text_encoder_2", TextEncoder, TextConfig, dtype),
        tokenizer=Tokenizer.from_folder(tokenizer or path / "tokenizer"),
    )


def _load_file(path: Path, tokenizer: Path | None, dtype) -> SDXL:
    if tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer: name a folder with --tokenizer")
    tensors, _ = read_tensors(path)
    try:
        unet, vae, text_1, text_2 = keys.infer_configs(tensors)
    except KeyError as problem:
        raise ValueError(f"{path} is no SDXL checkpoint: it has no {problem}") from None
    unused = {name for name in tensors if not keys.IGNORED.search(name)}

    def build(cls, config, prefix: str, table: dict[str, str], dtype) -> nn.Module:
        """A component with its part of the tensors, which are then no longer unused."""
        module, weights = build_on_meta(cls, config), {}
        for name in module.state_dict():
            key = prefix + keys.to_original_key(name, table)
            if key in tensors:
                weights[name] = keys.convert_tensor(tensors, name, key)
                unused.discard(key)
        return load_strict(module, weights, path, dtype)

    model = SDXL(
        unet=build(UNet, unet, keys.UNET, keys.unet_modules(unet), dtype),
        vae=build(VAE, vae, keys.VAE, keys.vae_modules(vae), torch.float32),
        encoder_1=build(TextEncoder, text_1, keys.TEXT_1, {}, dtype),
        encoder_2=build(TextEncoder, text_2, keys.TEXT_2, keys.text_modules(text_2), dtype),
        tokenizer=Tokenizer.from_folder(tokenizer),
    )
    # An unknown tensor may be what makes the file another kind of model.
    if unused:
        raise ValueError(f"{path} holds {summary('tensors unknown to SDXL', sorted(unused))}")
    return model
