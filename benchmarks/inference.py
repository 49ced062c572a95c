"""The UNet, loading and a 4-step picture beside diffusers; functions return our call to profile."""

import copy
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure, models
from benchmarks.measure import BenchConfig, Report, compare
from common import files
from common.pictures import to_images
from sdxl.load import load_component
from sdxl.lora import merge
from sdxl.lora_files import write_diffusers
from sdxl.pipeline import (
    DTYPES,
    SamplerConfig,
    compile_blocks,
    make_conditions,
    null_condition,
    sample_latents,
)
from sdxl.weights import build_on_meta
from solvers import noise_stream
from training.distill import LoRANetwork
from unet import UNet, UNetConfig

# --------------------------------------------------------------------------------- unet: one pass


@torch.no_grad()
def bench_unet(config: BenchConfig, report: Report):
    """A pass of diffusers' UNet, of ours, and of ours with a LoRA that is not merged, batch 2."""
    dtype, device = DTYPES[config.dtype], config.device
    theirs = models.diffusers_unet(config.unet, dtype, device)
    ours, base = (models.random_unet(config.unet, dtype, device) for _ in range(2))
    unmerged = LoRANetwork(base, "lora", models.random_lora(base))
    x_t, cond = models.random_batch(config.unet, 2, config.side, device, dtype)
    batch = (x_t, torch.full((2,), 751, device=device), cond)
    # Our blocks mark their inputs for torch.compile, so diffusers' has others.
    sides = {
        "diffusers": partial(models.call_diffusers, theirs, *copy.deepcopy(batch)),
        "ours": partial(ours, *batch), "ours_unmerged": partial(unmerged, *batch),
    }  # fmt: skip
    with report.part(f"{config.dtype}, {8 * config.side} pixels") as figures:
        figures["outputs_differ"] = measure.relative_error(sides["ours"](), sides["diffusers"]())
        figures |= compare(config, sides)
    if config.compile:
        theirs.compile()
        compile_blocks(ours)
        compile_blocks(base)
        with report.part("compiled") as figures:
            figures |= compare(config, sides)
    return torch.no_grad()(sides["ours"])


# ------------------------------------------------------------------------- load: a file of float16


def bench_load(config: BenchConfig, report: Report) -> None:
    """Each load in a process of its own: until the module exists, and until its pages are read."""
    folder = config.dir / "unet-float16"  # a name that no model's folder has
    if not (folder / "config.json").exists():
        # A process inherits its parent's peak of memory, so the parent must not need any.
        measure.run_alone(write_full_unet, folder)
    size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    runs = {"diffusers": [], "ours": []}
    for i in range(config.rounds + 1):
        for name, measurements in runs.items():
            measured = measure.run_alone(measure_load, folder, name)
            # The first round brings the file into the system's cache, and does not count.
            if i > 0:
                measurements.append(measured)
    for name, measurements in runs.items():
        with report.part(f"{name}, {size / 2**30:.2f} GiB of float16") as figures:
            for key in measurements[0]:
                figures[key] = statistics.median(each[key] for each in measurements)
            figures["peak_over_file"] = figures.pop("peak_kib") * 1024 / size


def measure_load(folder: Path, side: str) -> dict:
    """Seconds to load, seconds to load and read, and peak memory in KiB beyond the imports."""
    from diffusers import UNet2DConditionModel

    before, start = measure.peak_rss(), time.perf_counter()
    if side == "ours":
        unet = load_component(folder, UNet, UNetConfig)
    else:
        unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)
    figures = {"loaded_s": time.perf_counter() - start}
    # One number in each page of 4 KiB makes the system read it.
    for p in unet.parameters():
        p.detach().view(-1)[::1024].sum()
    figures["every_page_read_s"] = time.perf_counter() - start
    return figures | {"peak_kib": measure.peak_rss() - before}


def write_full_unet(folder: Path) -> None:
    """A full-size UNet of random float16 weights in diffusers' layout."""
    half = {}
    for name, p in build_on_meta(UNet, UNetConfig()).state_dict().items():
        half[name] = torch.empty(p.shape, dtype=torch.float16).normal_(0, 0.02)
    files.output_folder(folder)
    files.write_tensors(folder / "diffusion_pytorch_model.safetensors", half, format="pt")
    config = {"_class_name": "UNet2DConditionModel", **models.unet_json(UNetConfig())}
    files.write_json(folder / "config.json", config)


# ------------------------------------------------------------------ sample: a prompt to a picture

PROMPT = "a red fox in the snow, with a lantern"
SAMPLER = SamplerConfig()  # 4 steps, gamma = 0.2, w = 1


class Ours:
    """Our model on the prompt, as sample.py runs it."""

    def __init__(self, config: BenchConfig):
        self.model = models.random_sdxl(config.unet, DTYPES[config.dtype], config.device)
        self.size, self.shape = 8 * config.side, (4, config.side, config.side)
        self.device = config.device

    def encode(self) -> tuple:
        cond, _ = make_conditions(self.model, [PROMPT], None, self.size, self.size)
        return cond, null_condition(cond)

    def denoise(self, cond: dict, null: dict, gamma: float = SAMPLER.gamma) -> Tensor:
        sampler = replace(SAMPLER, gamma=gamma)
        return sample_latents(sampler, self.model.unet, cond, null, self.shape, [0], self.device)

    def decode(self, x_0: Tensor) -> list:
        return to_images(self.model.vae.decode(x_0))

    def picture(self) -> list:
        return self.decode(self.denoise(*self.encode()))

    def latents(self) -> Tensor:
        """Latents without noise in between."""
        return self.denoise(*self.encode(), gamma=0.0)


@torch.no_grad()
def bench_sample(config: BenchConfig, report: Report):
    """Four guided steps with the same LoRA on both sides, text encoders and decoder included."""
    with tempfile.TemporaryDirectory() as name:
        folder, ours = Path(name), Ours(config)
        unet = ours.model.unet
        lora = models.random_lora(unet).half()
        write_diffusers(folder / "lora.safetensors", lora)
        plain = ours.latents()
        merge(unet, [(lora, 1.0)])
        unet.to(memory_format=torch.channels_last)
        latents = ours.latents()
        del lora
        with report.part("ours") as figures:
            figures["effect_of_lora"] = measure.relative_error(latents, plain)
            figures |= measure.memory_gib(config, ours.picture)
            conditions = ours.encode()
            parts = {
                "encode_s": ours.encode, "unet_s": partial(ours.denoise, *conditions),
                "decode_s": partial(ours.decode, latents), "whole_s": ours.picture,
            }  # fmt: skip
            figures |= measure.alternate(parts, config.rounds, config.device)
        others = measure.allocated_gib(config)
        models.write_tokenizer(folder / "tokenizer")
        pipeline = models.random_pipeline(
            config.unet, DTYPES[config.dtype], config.device, folder / "tokenizer"
        )
        theirs = partial(diffusers_picture, config, pipeline)
        pipeline.load_lora_weights(folder, weight_name="lora.safetensors")
        for state in ("unmerged", "merged"):
            if state == "merged":
                pipeline.fuse_lora()
                pipeline.unload_lora_weights()
            with report.part(f"diffusers, LoRA {state}") as figures:
                figures["latents_differ"] = measure.relative_error(theirs(0.0, "latent"), latents)
                figures |= measure.memory_gib(config, theirs, others)
                figures |= compare(config, {"diffusers": theirs, "ours": ours.picture})
    if config.compile:
        compiled_picture(config, report)
    return ours.picture


def diffusers_picture(
    config: BenchConfig, pipeline, gamma: float = SAMPLER.gamma, output_type: str = "pil"
):
    """The prompt's picture by diffusers, or its latents, from the same noise x_T as ours."""
    size, shape = 8 * config.side, (4, config.side, config.side)
    x_T = next(noise_stream([0], shape, config.device)).to(pipeline.unet.dtype)
    return pipeline(
        PROMPT, num_inference_steps=SAMPLER.steps, guidance_scale=1 + SAMPLER.w, eta=gamma,
        latents=x_T, height=size, width=size, output_type=output_type,
        generator=[torch.Generator().manual_seed(1)],
    ).images  # fmt: skip


@torch.no_grad()
def compiled_picture(config: BenchConfig, report: Report) -> None:
    """Our picture compiled, without a LoRA, which costs nothing when merged."""
    with report.part("compiled picture") as figures:
        ours = Ours(config)
        eager = ours.latents()
        compile_blocks(ours.model.unet)
        start = time.perf_counter()
        latents = ours.latents()
        figures["compiling_s"] = time.perf_counter() - start
        figures["latents_differ"] = measure.relative_error(latents, eager)
        figures |= compare(config, {"compiled": ours.picture})
        figures |= measure.memory_gib(config, ours.picture)
