"""SDXL checkpoints: published folders and single files, or a part from elsewhere."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import fingerprint, read_json, read_tensors
from sdxl import keys
from sdxl.clip import TextConfig, TextEncoder, Tokenizer, check_same_tokens, check_vocabulary
from sdxl.controlnet import ControlNet, ControlNetConfig
from sdxl.vae import VAE, VAEConfig
from sdxl.weights import (
    HALF,
    build_on_meta,
    check_prediction,
    find_weights,
    load_strict,
    summary,
)  # fmt: skip
from unet import UNet, UNetConfig


def read_config(folder: Path, config_cls):
    """The sizes in a component's config.json; ValueError if it is broken or another family's."""
    path = folder / "config.json"
    content = read_json(path)
    try:
        return config_cls.from_json(content)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def component_files(path: Path, dtype=None) -> list[Path]:
    """The files of a component, a folder or one file, that are read to compute in dtype."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return [path / "config.json", *find_weights(path, dtype in HALF)] if path.is_dir() else [path]


def read_weights(path: Path, dtype=None) -> tuple[Path, dict[str, Tensor]]:
    """A component's tensors, and the file or folder to name in messages."""
    tensors, files = {}, component_files(path, dtype)
    # A folder's first file is its config.json.
    weights = files[1:] or files
    for file in weights:
        tensors |= read_tensors(file)[0]
    return weights[0] if len(weights) == 1 else path, tensors


def load_component(folder: Path, cls, config_cls, dtype=None) -> nn.Module:
    """One component of a published folder, a `cls` of the sizes in its config.json."""
    config = read_config(folder, config_cls)
    source, tensors = read_weights(folder, dtype)
    # Transformers 5 writes the first encoder without the prefix that published folders have.
    if cls is TextEncoder and "final_layer_norm.weight" in tensors:
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    # A buffer of older libraries: 0, 1, 2, ..
    tensors = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
    return load_strict(build_on_meta(cls, config), tensors, source, dtype)


# ------------------------------------------------------------------------------- noise schedule

SCHEDULER = {
    "prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "num_train_timesteps": 1000, "trained_betas": None,
    "rescale_betas_zero_snr": False,
}  # fmt: skip


def check_scheduler(path: Path) -> None:
    """ValueError if a scheduler_config.json is not that of eps-prediction on SDXL's schedule."""
    content = read_json(path)
    for name, expected in SCHEDULER.items():
        actual = content.get(name)
        if actual is not None and actual != expected:
            kind = "v-prediction" if actual == "v_prediction" else "another noise schedule"
            raise ValueError(
                f"{path}: {name} is {actual!r}, not {expected!r}: this model is of {kind}; "
                "only eps-prediction on SDXL's schedule is supported"
            )
    kind = str(content.get("_class_name", ""))
    if "EDM" in kind or "Flow" in kind:
        raise ValueError(f"{path}: {kind} is for another kind of diffusion than SDXL's")


# ------------------------------------------------------------------------------------ single files


def part_of(tensors: dict[str, Tensor], prefix: str, first: str) -> dict[str, Tensor]:
    """A single file's tensors below a prefix.

    A file of that part alone has no prefix: its names begin at `first`, or are ours.
    """
    if any(name.startswith(first) for name in tensors):
        return {prefix + name: tensor for name, tensor in tensors.items()}
    part = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return part or tensors


def build_original(cls, config, prefix, table, tensors: dict, path: Path, dtype) -> nn.Module:
    """A component from its part of the tensors with original names.

    ValueError for a tensor below the prefix that it has no place for: it may be of another model.
    """
    module, weights, used = build_on_meta(cls, config), {}, set()
    for name in module.state_dict():
        key = prefix + keys.to_original_key(name, table)
        if key in tensors:
            weights[name] = keys.convert_tensor(tensors, name, key)
            used.add(key)
    load_strict(module, weights, path, dtype)
    check_unused(path, {name for name in tensors if name.startswith(prefix)} - used)
    return module


def check_unused(path: Path, names: set[str]) -> None:
    """ValueError if some of the tensors that no component uses are not known as harmless."""
    if unknown := sorted(name for name in names if not keys.IGNORED.search(name)):
        raise ValueError(f"{path} holds {summary('tensors unknown to SDXL', unknown)}")


def load_unet(path: Path, like: UNetConfig, dtype=None) -> UNet:
    """A UNet from a folder, or from a single file of the sizes `like`.

    Its names are ours or the original ones; of a whole checkpoint the UNet alone is read.
    """
    if path.is_dir():
        # A published model's folder says there what its UNet predicts.
        scheduler = path.parent / "scheduler" / "scheduler_config.json"
        if scheduler.exists():
            check_scheduler(scheduler)
        return load_component(path, UNet, UNetConfig, dtype)
    tensors, header = read_tensors(path)
    check_prediction(path, tensors, header)
    tensors = part_of(tensors, keys.UNET, "input_blocks.")
    if keys.UNET + "input_blocks.0.0.weight" in tensors:
        table = keys.unet_modules(like)
        return build_original(UNet, like, keys.UNET, table, tensors, path, dtype)
    kind = "target_time" if "scalar_embedding.linear_1.weight" in tensors else ""
    return load_strict(build_on_meta(UNet, replace(like, scalar=kind)), tensors, path, dtype)


def load_vae(path: Path) -> VAE:
    """A float32 VAE from a folder or a single file, in diffusers' names or the original ones."""
    if path.is_dir():
        return load_component(path, VAE, VAEConfig, torch.float32)
    tensors = part_of(read_tensors(path)[0], keys.VAE, "encoder.down.")
    if keys.VAE + "encoder.conv_in.weight" in tensors:
        config = infer(path, keys.infer_vae_config, tensors)
        table = keys.vae_modules(config)
        return build_original(VAE, config, keys.VAE, table, tensors, path, torch.float32)
    return load_strict(build_on_meta(VAE, VAEConfig()), tensors, path, torch.float32)


CONTROL_KINDS = {
    "lora_controlnet": "a Control-LoRA", "task_embedding": "a ControlNet-Union",
    "lllite_": "a ControlNet-LLLite", "control_model.": "a ControlNet in the original names",
    "input_hint_block.": "a ControlNet in the original names", "adapter.": "a T2I adapter",
}  # fmt: skip


def load_controlnet(path: Path, like: UNetConfig, dtype=None) -> ControlNet:
    """A ControlNet for the UNet `like`, from a folder or a single file with diffusers' names."""
    config = ControlNetConfig(**vars(like) | {"scalar": ""})
    if path.is_dir():
        config = read_config(path, ControlNetConfig)
        try:
            config.check_fits(like)
        except ValueError as problem:
            raise ValueError(f"{path} does not fit the model: {problem}") from None
    source, tensors = read_weights(path, dtype)
    for mark, kind in CONTROL_KINDS.items():
        if any(name.startswith(mark) for name in tensors):
            raise ValueError(f"{path} is {kind}: only ControlNets in diffusers' names are read")
    return load_strict(build_on_meta(ControlNet, config), tensors, source, dtype)


def infer(path: Path, function, tensors: dict[str, Tensor]):
    """Sizes read off a single file's shapes; ValueError if it lacks a tensor of SDXL's."""
    try:
        return function(tensors)
    except (KeyError, ValueError) as problem:
        reason = f"it has no {problem}" if isinstance(problem, KeyError) else problem
        raise ValueError(f"{path} is no SDXL checkpoint: {reason}") from None


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


@dataclass(frozen=True)
class ModelPaths:
    """Where SDXL's parts are: a published folder or a single file, and what takes a part's place.

    tokenizer: its folder, which a single file needs.
    """

    model: Path
    tokenizer: Path | None = None
    unet: Path | None = None
    vae: Path | None = None

    def fingerprints(self, dtype=None) -> dict[str, str]:
        """The content of each part as it is read to compute in dtype: files.fingerprint by part."""
        parts = {"checkpoint": self.model, "unet": self.unet, "vae": self.vae}
        if self.model.is_dir():
            # The index marks a folder as a model; the components' configs repeat what is in it.
            read_json(self.model / "model_index.json")
            del parts["checkpoint"]
            for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
                parts[name] = parts.get(name) or self.model / name
        contents = {}
        for name, path in parts.items():
            if path is not None:
                # The VAE computes in float32.
                files = component_files(path, None if name == "vae" else dtype)
                contents[name] = fingerprint(*files)
        folder = self.tokenizer or self.model / "tokenizer"
        files = [*sorted(folder.glob("*.json")), *folder.glob("merges.txt")]
        return contents | {"tokenizer": fingerprint(*files)}


def load_sdxl(paths: Path | ModelPaths, tokenizer: Path | None = None, dtype=None) -> SDXL:
    """A published folder or a single file; a single file holds no tokenizer, so name its folder.

    dtype: of the UNet and the text encoders; the VAE is float32. ValueError if anything is wrong.
    """
    paths = paths if isinstance(paths, ModelPaths) else ModelPaths(paths, tokenizer)
    path = paths.model
    if not path.exists():
        raise ValueError(f"--model {path} does not exist")
    load = _load_folder if path.is_dir() else _load_file
    model = load(paths, dtype)
    unet, text_1, text_2 = model.unet.config, model.encoder_1.config, model.encoder_2.config
    # Inpainting and image-editing models take more channels than there are latents.
    pooled_and_sizes = (text_2.projection or 0) + 6 * unet.time_ids_width
    for name, taken, available in (
        ("latents", unet.in_channels, model.vae.config.latent_channels),
        ("latents of its output", unet.out_channels, model.vae.config.latent_channels),
        ("prompt_embeds", unet.cross_attention_dim, text_1.hidden + text_2.hidden),
        ("pooled prompt and sizes", unet.add_embedding_dim, pooled_and_sizes),
    ):
        if taken != available:
            raise ValueError(f"{path}: its UNet takes {taken} channels of {name}, not {available}")
    check_vocabulary(model.tokenizer, model.encoder_1, model.encoder_2)
    # Stable Diffusion 1's autoencoder has SDXL's shapes, but its latents are not these.
    if (factor := model.vae.config.scaling_factor) != VAEConfig.scaling_factor:
        expected = f"{factor}, not SDXL's {VAEConfig.scaling_factor}"
        raise ValueError(f"{paths.vae or path}: its VAE has a scaling_factor of {expected}")
    return model


def _load_folder(paths: ModelPaths, dtype) -> SDXL:
    path = paths.model
    read_json(path / "model_index.json")
    like = read_config(path / "unet", UNetConfig)
    tokenizer = Tokenizer.from_folder(paths.tokenizer or path / "tokenizer")
    if paths.tokenizer is None and (path / "tokenizer_2").is_dir():
        check_same_tokens(tokenizer, Tokenizer.from_folder(path / "tokenizer_2"))
    return SDXL(
        unet=load_unet(paths.unet or path / "unet", like, dtype),
        vae=load_vae(paths.vae or path / "vae"),
        encoder_1=load_component(path / "text_encoder", TextEncoder, TextConfig, dtype),
        encoder_2=load_component(path / "text_encoder_2", TextEncoder, TextConfig, dtype),
        tokenizer=tokenizer,
    )


def _load_file(paths: ModelPaths, dtype) -> SDXL:
    path = paths.model
    if paths.tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer: name a folder with --tokenizer")
    tensors, _ = read_tensors(path)
    # Some converters leave the projection as transformers has it.
    if (projection := keys.TEXT_2 + "text_projection.weight") in tensors:
        tensors[keys.TEXT_2 + "text_projection"] = tensors.pop(projection).T
    like, text_1, text_2 = infer(path, keys.infer_configs, tensors)
    if paths.vae is None and keys.VAE + "encoder.conv_in.weight" not in tensors:
        raise ValueError(f"{path} holds no VAE: name one with --vae")
    unet = load_unet(paths.unet or path, like, dtype)
    known = (keys.UNET, keys.VAE, keys.TEXT_1, keys.TEXT_2)
    check_unused(path, {name for name in tensors if not name.startswith(known)})
    table = keys.text_modules(text_2)
    return SDXL(
        unet=unet,
        vae=load_vae(paths.vae or path),
        encoder_1=build_original(TextEncoder, text_1, keys.TEXT_1, {}, tensors, path, dtype),
        encoder_2=build_original(TextEncoder, text_2, keys.TEXT_2, table, tensors, path, dtype),
        tokenizer=Tokenizer.from_folder(paths.tokenizer),
    )
