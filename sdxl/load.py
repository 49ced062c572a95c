"""SDXL checkpoints: published folders and single files, or a part from elsewhere."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import fingerprint, read_json, read_tensors
from sdxl import keys
from sdxl.clip import TextConfig, TextEncoder, Tokenizer, check_same, check_vocabulary
from sdxl.controlnet import ControlNet, ControlNetConfig
from sdxl.vae import VAE, VAEConfig
from sdxl.weights import HALF, build_on_meta, find_weights, load_strict, summary
from unet import UNet, UNetConfig


def read_config(folder: Path, config_cls):
    """The sizes in a component's config.json; ValueError if it is broken or another family's."""
    path = folder / "config.json"
    content = read_json(path)
    try:
        return config_cls.from_json(content)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def load_component(folder: Path, cls, config_cls, dtype=None) -> nn.Module:
    """One component of a published folder, a `cls` of the sizes in its config.json."""
    config, tensors = read_config(folder, config_cls), {}
    paths = find_weights(folder, dtype in HALF)
    for path in paths:
        tensors |= read_tensors(path)[0]
    # Transformers 5 writes the first encoder without the prefix that published folders have.
    if cls is TextEncoder and "final_layer_norm.weight" in tensors:
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    # A buffer of older libraries: 0, 1, 2, ..
    tensors = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
    source = paths[0] if len(paths) == 1 else folder
    return load_strict(build_on_meta(cls, config), tensors, source, dtype)


# ------------------------------------------------------------------------------- what is predicted
#
# Models that predict v, or were trained on another noise schedule, have SDXL's very tensors: with
# eps and SDXL's schedule their pictures would be noise.

SCHEDULER = {
    "prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "num_train_timesteps": 1000, "trained_betas": None,
    "rescale_betas_zero_snr": False,
}  # fmt: skip
V_MARKERS = ("v_pred", "ztsnr", "edm_vpred.", "edm_mean")


def check_scheduler(path: Path) -> None:
    """ValueError if a scheduler_config.json is not that of eps-prediction on SDXL's schedule."""
    content = read_json(path)
    for name, expected in SCHEDULER.items():
        if (actual := content.get(name, expected)) != expected:
            kind = "v-prediction" if "v" in str(actual) else "another noise schedule than SDXL's"
            raise ValueError(
                f"{path}: {name} is {actual!r}, not {expected!r}: this model is of {kind}; "
                "only eps-prediction on SDXL's schedule is supported"
            )
    kind = str(content.get("_class_name", ""))
    if "EDM" in kind or "Flow" in kind:
        raise ValueError(f"{path}: {kind} is for another kind of diffusion than SDXL's")


def check_prediction(path: Path, tensors, metadata: dict[str, str]) -> None:
    """ValueError if a single file says, in its header or by a marker, that it does not predict eps.

    tensors: their names.
    """
    kind = metadata.get("modelspec.prediction_type", "epsilon")
    markers = [name for name in tensors if name.startswith(V_MARKERS)]
    if markers or kind not in ("epsilon", "eps", ""):
        reason = f"it holds {markers[0]!r}" if markers else f"its header says {kind!r}"
        raise ValueError(
            f"{path} is a v-prediction model or the like ({reason}): only eps-prediction is "
            "supported"
        )


# ------------------------------------------------------------------------------------ single files


def read_checkpoint(path: Path, prefix: str, first: str) -> dict[str, Tensor]:
    """A single file's tensors; where its names begin at `first`, with the prefix before them."""
    tensors, metadata = read_tensors(path)
    check_prediction(path, tensors, metadata)
    if any(name.startswith(first) for name in tensors):
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    return tensors


def build_original(
    cls, config, prefix: str, table: dict[str, str], tensors: dict, path: Path, dtype
) -> tuple[nn.Module, set[str]]:
    """A component from its part of the tensors with original names, and the names it used."""
    module, weights, used = build_on_meta(cls, config), {}, set()
    for name in module.state_dict():
        key = prefix + keys.to_original_key(name, table)
        if key in tensors:
            weights[name] = keys.convert_tensor(tensors, name, key)
            used.add(key)
    return load_strict(module, weights, path, dtype), used


def check_used(path: Path, tensors, used: set[str]) -> None:
    """ValueError if a file has tensors that no component used: they may make it another model."""
    unused = sorted(k for k in tensors if k not in used and not keys.IGNORED.search(k))
    if unused:
        raise ValueError(f"{path} holds {summary('tensors unknown to SDXL', unused)}")


def load_unet(path: Path, like: UNetConfig, dtype=None) -> UNet:
    """A UNet from a folder, or from a single file of the sizes `like`.

    Its names are ours or the original ones; of a whole checkpoint the UNet alone is read.
    """
    if path.is_dir():
        return load_component(path, UNet, UNetConfig, dtype)
    tensors = read_checkpoint(path, keys.UNET, "input_blocks.")
    if keys.UNET + "input_blocks.0.0.weight" not in tensors:
        kind = "target_time" if "scalar_embedding.linear_1.weight" in tensors else ""
        return load_strict(build_on_meta(UNet, replace(like, scalar=kind)), tensors, path, dtype)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(keys.UNET)}
    table = keys.unet_modules(like)
    unet, used = build_original(UNet, like, keys.UNET, table, tensors, path, dtype)
    check_used(path, tensors, used)
    return unet


def load_vae(path: Path) -> VAE:
    """A float32 VAE from a folder or a single file, in diffusers' names or the original ones."""
    if path.is_dir():
        return load_component(path, VAE, VAEConfig, torch.float32)
    tensors = read_checkpoint(path, keys.VAE, "encoder.down.")
    if keys.VAE + "encoder.conv_in.weight" not in tensors:
        return load_strict(build_on_meta(VAE, VAEConfig()), tensors, path, torch.float32)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(keys.VAE)}
    config = infer(path, keys.infer_vae_config, tensors)
    table = keys.vae_modules(config)
    vae, used = build_original(VAE, config, keys.VAE, table, tensors, path, torch.float32)
    check_used(path, tensors, used)
    return vae


def load_controlnet(path: Path, like: UNetConfig, dtype=None) -> ControlNet:
    """A ControlNet for the UNet `like`, from a folder or a single file with diffusers' names."""
    if path.is_dir():
        try:
            read_config(path, ControlNetConfig).check_fits(like)
        except ValueError as problem:
            raise ValueError(f"{path} does not fit the model: {problem}") from None
        return load_component(path, ControlNet, ControlNetConfig, dtype)
    tensors, _ = read_tensors(path)
    for mark, kind in CONTROL_KINDS.items():
        if any(name.startswith(mark) for name in tensors):
            raise ValueError(f"{path} is {kind}: only ControlNets in diffusers' names are read")
    config = ControlNetConfig(**vars(like) | {"scalar": ""})
    return load_strict(build_on_meta(ControlNet, config), tensors, path, dtype)


CONTROL_KINDS = {
    "lora_controlnet": "a Control-LoRA", "task_embedding": "a ControlNet-Union",
    "lllite_": "a ControlNet-LLLite", "control_model.": "a ControlNet in the original names",
    "input_hint_block.": "a ControlNet in the original names", "adapter.": "a T2I adapter",
    "image_proj": "an IP-Adapter",
}  # fmt: skip


def infer(path: Path, function, tensors: dict[str, Tensor]):
    """Sizes read off a single file's shapes; ValueError if it lacks a tensor of SDXL's."""
    try:
        return function(tensors)
    except KeyError as problem:
        raise ValueError(f"{path} is no SDXL checkpoint: it has no {problem}") from None
    except ValueError as problem:
        raise ValueError(f"{path} is no SDXL checkpoint: {problem}") from None


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

    def files(self, dtype=None) -> dict[str, list[Path]]:
        """The files of each part that are read to compute in dtype."""
        half, parts = dtype in HALF, {}
        if self.model.is_dir():
            # The index marks a folder as a model; the components' configs repeat what is in it.
            read_json(self.model / "model_index.json")
            for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
                parts[name] = _component_files(getattr(self, name, None) or self.model / name, half)
        else:
            parts = {"checkpoint": [self.model]}
            for name in ("unet", "vae"):
                if path := getattr(self, name):
                    parts[name] = _component_files(path, half)
        tokenizer = self.tokenizer or self.model / "tokenizer"
        parts["tokenizer"] = [*sorted(tokenizer.glob("*.json")), *tokenizer.glob("merges.txt")]
        return parts

    def fingerprints(self, dtype=None) -> dict[str, str]:
        """The content of each part, whatever its path: files.fingerprint by part."""
        for path in vars(self).values():
            if path is not None and not path.exists():
                raise ValueError(f"{path} does not exist")
        return {name: fingerprint(*paths) for name, paths in self.files(dtype).items()}


def _component_files(path: Path, half: bool) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path} is missing: the folder is incomplete, or no SDXL model's")
    return [path / "config.json", *find_weights(path, half)] if path.is_dir() else [path]


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
    if (scheduler := path / "scheduler" / "scheduler_config.json").exists():
        check_scheduler(scheduler)
    like = read_config(path / "unet", UNetConfig)
    tokenizer = Tokenizer.from_folder(paths.tokenizer or path / "tokenizer")
    if paths.tokenizer is None and (path / "tokenizer_2").is_dir():
        check_same(tokenizer, Tokenizer.from_folder(path / "tokenizer_2"))
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
    tensors = read_checkpoint(path, keys.UNET, "input_blocks.")
    unet_config, text_1, text_2 = infer(path, keys.infer_configs, tensors)
    if paths.vae is None and keys.VAE + "encoder.conv_in.weight" not in tensors:
        raise ValueError(f"{path} holds no VAE: name one with --vae")
    unet, used = build_original(
        UNet, unet_config, keys.UNET, keys.unet_modules(unet_config), tensors, path, dtype
    )
    encoder_1, used_1 = build_original(TextEncoder, text_1, keys.TEXT_1, {}, tensors, path, dtype)
    encoder_2, used_2 = build_original(
        TextEncoder, text_2, keys.TEXT_2, keys.text_modules(text_2), tensors, path, dtype
    )
    in_vae = {name for name in tensors if name.startswith(keys.VAE)}
    check_used(path, tensors, used | used_1 | used_2 | in_vae)
    if paths.unet is not None:
        unet = load_unet(paths.unet, unet_config, dtype)
    vae, tokenizer = load_vae(paths.vae or path), Tokenizer.from_folder(paths.tokenizer)
    return SDXL(unet, vae, encoder_1, encoder_2, tokenizer)
