"""The undamaged inputs of tests/fuzz.py: one of each kind, tiny, written and read again."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig

from benchmarks import models
from benchmarks.models import randomise
from common import files
from sdxl import keys, load, num_steps, png
from sdxl.clip import TextEncoder
from sdxl.lora import LoRA
from sdxl.lora_files import read_lora, write_diffusers, write_kohya
from sdxl.vae import VAE
from tests import datasets
from tests.fuzz import WrongLoadError
from training import cache, checkpoint
from training.images import Images
from training.streams import Entry, Loader
from unet import UNet, UNetConfig

# With SDXL's three levels of two blocks, and narrow.
TINY = UNetConfig(
    channels=(64, 128, 128), transformer_depth=(0, 1, 2), heads=(1, 2, 2), mid_transformer_depth=2,
    cross_attention_dim=128, time_ids_width=8, add_embedding_dim=48 + 6 * 8,
)  # fmt: skip

TOLD_KS = (4, 8)


@dataclass
class Base:
    """The undamaged inputs below root, and what they hold."""

    root: Path
    model: load.SDXL
    weights: dict[str, Tensor]
    controlnet: object
    deltas: dict[str, dict[str, Tensor]]
    images: dict[str, dict]
    states: dict[int, dict]
    rows: list[dict]


def build(root: Path) -> Base:
    """Write one of each kind and read it."""
    torch.set_num_threads(1)
    root = root.resolve()
    write_model(root / "sdxl")
    model = load.load_sdxl(root / "sdxl")
    write_single(model, root / "single.safetensors")
    controlnet = load.load_controlnet(root / "controlnet", model.unet.config)
    base = Base(root, model, weights_of(model), controlnet, {}, {}, {}, [])
    generator = torch.Generator().manual_seed(0)
    lora = LoRA.init(model.unet, 4, 2.0, generator)
    lora = num_steps.add_k_adapter(lora, model.unet, TOLD_KS, 4, 2.0, generator)
    for adapter in lora.adapters.values():
        torch.nn.init.normal_(adapter.up, std=0.1)
    header = {"tdd_method": "tdd", "tdd_K": "4-8", "tdd_w": "3.5", "tdd_tcf": "1",
              "tdd_told_ks": str([*TOLD_KS])}  # fmt: skip
    write_diffusers(root / "peft.safetensors", lora, **header, tdd_solver_steps="250")
    write_kohya(root / "kohya.safetensors", lora, **header)
    for name in ("peft", "kohya"):
        base.deltas[name] = read_deltas(root / f"{name}.safetensors", model)
    write_data(root / "data")
    base.images = read_images(root / "data")[0]
    loader = Loader(Images(root / "data", 16, 2, seed=0, once=True), workers=1)
    cache.fill(root / "cache", loader, encode, {"resolution": 16}, 0, 1, lambda: None)
    base.rows = read_cache(root / "cache")
    for step in (2, 4):
        base.states[step] = write_checkpoint(root / "run", step)
    png.save_png(picture(), root / "picture.png", SETTINGS)
    return base


# -------------------------------------------------------------------------------------------- model


def write_model(folder: Path) -> None:
    """A tiny SDXL with every entry that diffusers and transformers write into config.json."""
    text_1, text_2, vae = models.other_configs(models.TINY)
    unet = models.unet_json(TINY) | {"addition_time_embed_dim": TINY.time_ids_width}
    control = {k: v for k, v in unet.items() if not k.startswith(("up_", "out_"))}
    with torch.device("meta"):
        written = {
            "unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(**models.vae_json(vae)),
            "controlnet": ControlNetModel(**control),
        }  # fmt: skip
    configs = {name: json.loads(module.to_json_string()) for name, module in written.items()}
    modules = {"unet": UNet(TINY), "vae": VAE(vae), "text_encoder": TextEncoder(text_1),
               "text_encoder_2": TextEncoder(text_2)}  # fmt: skip
    weights = {name: randomise(module).state_dict() for name, module in modules.items()}
    for name, config in (("text_encoder", text_1), ("text_encoder_2", text_2)):
        content = models.text_json(config)
        configs[name] = CLIPTextConfig(**content).to_dict() | content
    shapes = written["controlnet"].state_dict()
    weights["controlnet"] = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    for name, config in configs.items():
        part = folder.parent / name if name == "controlnet" else folder / name
        part.mkdir(parents=True)
        stem = "model" if "text" in name else "diffusion_pytorch_model"
        files.write_tensors(part / f"{stem}.safetensors", weights[name], format="pt")
        files.write_json(part / "config.json", config)
    models.write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    files.write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    files.write_json(folder / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"})


SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
}  # fmt: skip


def write_single(model: load.SDXL, path: Path) -> None:
    """The model in the original names."""
    tensors = {}
    for prefix, module, table in (
        (keys.UNET, model.unet, keys.unet_modules(model.unet.config)),
        (keys.VAE, model.vae, keys.vae_modules(model.vae.config)),
        (keys.TEXT_1, model.encoder_1, {}),
        (keys.TEXT_2, model.encoder_2, keys.text_modules(model.encoder_2.config)),
    ):
        state = module.state_dict()
        for name, tensor in state.items():
            key = prefix + keys.to_original_key(name, table)
            if ".in_proj_" in key:
                names = [re.sub("[qkv]_proj", f"{part}_proj", name) for part in "qkv"]
                tensor = torch.cat([state[each] for each in names])
            elif key.endswith(".text_projection"):
                tensor = tensor.T
            elif ".attn_1." in key and "norm" not in key and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            tensors[key] = tensor.contiguous().clone()
    save_file(tensors, path, {"format": "pt"})


def weights_of(model: load.SDXL) -> dict[str, Tensor]:
    weights = {}
    for part in ("unet", "vae", "encoder_1", "encoder_2"):
        for name, tensor in getattr(model, part).state_dict().items():
            weights[f"{part}.{name}"] = tensor
    return weights


def read_deltas(path: Path, model: load.SDXL) -> dict[str, Tensor]:
    """What a file adds to each layer of the UNet; it has nothing for the text encoders."""
    unet, *others = read_lora(path, model.unet, model.encoder_1, model.encoder_2)
    if any(each.adapters for each in others):
        raise WrongLoadError("a text encoder has an adapter")
    deltas = {}
    for name, adapter in unet.adapters.items():
        up, down = (
            adapter.up.detach().double().flatten(1),
            adapter.down.detach().double().flatten(1),
        )
        deltas[name] = adapter.scale * up @ down
    return deltas


# --------------------------------------------------------------------------------------------- data

FORMATS = {"a.png": "PNG", "b.jpg": "JPEG", "c.webp": "WEBP", "d.bmp": "BMP", "e.tif": "TIFF",
           "f.gif": "GIF"}  # fmt: skip


def write_data(folder: Path) -> None:
    """Pictures of several kinds with captions, and some in a tar."""
    contents = {}
    for i, (name, kind) in enumerate(FORMATS.items()):
        contents[name] = datasets.encoded(datasets.noise(20, 24, 3, seed=i), kind)
        caption = json.dumps({"caption": f"number {i}"}) if i % 2 else f"number {i}"
        contents[name.partition(".")[0] + (".json" if i % 2 else ".txt")] = caption.encode()
    contents["z.tar"] = datasets.pairs(7, 8, 9)
    datasets.write(folder, contents)


def read_images(path: Path) -> tuple[dict[str, dict], dict[str, int]]:
    """All examples of a folder by name, and how many were left out by reason."""
    loader = Loader(Images(path, 16, 1, seed=0, once=True), workers=1, max_bad=10**6)
    examples = {}
    for batch in loader:
        examples[batch["names"][0]] = {k: v[0] for k, v in batch.items()}
    return examples, loader.left_out


# ------------------------------------------------------------------------ what this program writes


def encode(batch: dict) -> dict[str, Tensor]:
    """Stands for the autoencoder and the text encoders."""
    pixels = batch["images"]
    return {"latents": pixels[:, :, ::8, ::8], "prompt_embeds": pixels[:, 0],
            "pooled": pixels[:, 0, 0], "time_ids": batch["time_ids"]}  # fmt: skip


def read_cache(folder: Path) -> list[dict]:
    """All rows in their order."""
    cached = cache.Cached(folder, 1, seed=0)
    return [cached.example(Entry(0, row + 1, row)) for row in range(cached.rows)]


def make_state(output: Path, step: int) -> checkpoint.TrainState:
    """What training changes, after so many steps."""
    torch.manual_seed(step)
    net = torch.nn.Linear(4, 4)
    adam = torch.optim.AdamW(net.parameters(), 1e-3)
    net(torch.randn(2, 4)).square().sum().backward()
    adam.step()
    position = {"seed": 0, "rank": 0, "world": 1, "epoch": 0, "drawn": step, "left_out": {}}
    loader = SimpleNamespace(position=position, bad=0)
    state = checkpoint.TrainState(
        output, {"net": net}, {"adam": adam}, torch.Generator().manual_seed(step), loader,
        {"lr": "0.001", "batch_size": "2", "seed": "0"},
    )  # fmt: skip
    state.step = step
    return state


def write_checkpoint(output: Path, step: int) -> dict:
    """Write one and return what it holds."""
    output.mkdir(exist_ok=True)
    state = make_state(output, step)
    state.claim_output()
    state.save(keep=5)
    return {k: v.clone() for k, v in (state.weights() | state.moments()).items()}


SETTINGS = {"version": png.SETTINGS_VERSION, "prompt": ["a cat"], "seed": 7, "steps": 4, "cfg": 2.0}


def picture() -> Image.Image:
    return Image.fromarray(datasets.noise(16, 16, 3))
