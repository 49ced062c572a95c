"""The UNet, loading and a 4-step picture, each beside diffusers with its defaults."""

import statistics
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import BenchConfig, alternate, peak_gpu, peak_rss, report, run_alone
from common import files
from sdxl.load import cast, load_component
from sdxl.pipeline import null_condition
from sdxl.vae import VAE, VAEConfig
from solvers import sdxl_schedule
from tdd import equidistant, gamma_sample, guided, noise_stream
from unet import UNet, UNetConfig

# -------------------------------------------------------------------------------------- both sides
#
# Random weights, the same on both sides: speed does not depend on them. Ours runs in channels_last,
# as sample.py does; diffusers runs as its users run it.


def theirs_config(config: UNetConfig) -> dict:
    """A UNetConfig in diffusers' words."""
    attends = [depth > 0 for depth in config.transformer_depth]
    return {
        "in_channels": 4, "out_channels": 4, "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block, "norm_num_groups": config.groups,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "transformer_layers_per_block": [max(1, d) for d in config.transformer_depth],
        "attention_head_dim": config.heads, "cross_attention_dim": config.cross_attention_dim,
        "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.add_embedding_dim,
    }  # fmt: skip


def both_unets(config: BenchConfig, dtype):
    """Our UNet, and diffusers' with the same random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(config.device):
        theirs = UNet2DConditionModel(**theirs_config(config.unet)).to(dtype).eval()
        ours = UNet(config.unet).eval()
    cast(ours, dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(memory_format=torch.channels_last), theirs


def inputs(config: BenchConfig, b: int, dtype):
    """x_t (b, 4, side, side), t (b,) and the condition in dtype, at random."""
    unet, side = config.unet, config.side
    with torch.device(config.device):
        cond = {
            "prompt_embeds": torch.randn(b, 77, unet.cross_attention_dim, dtype=dtype),
            "pooled": torch.randn(b, unet.add_embedding_dim - 6 * 256, dtype=dtype),
            "time_ids": torch.full((b, 6), 8 * side),
        }
        return torch.randn(b, 4, side, side), torch.full((b,), 751), cond


def as_theirs(unet, x, t, cond):
    """Diffusers' UNet called with our condition."""
    prompt_embeds = cond["prompt_embeds"]
    text_and_sizes = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    x = x.to(prompt_embeds.dtype)
    return unet(x, t, prompt_embeds, added_cond_kwargs=text_and_sizes, return_dict=False)[0]


# --------------------------------------------------------------------------------------- benchmarks
#
# A user's alternative is diffusers with its defaults: its UNet, its pipeline, its loader. Each
# function returns our call, for --profile.


def bench_unet(config: BenchConfig):
    """One forward pass, batch 2."""
    for dtype in [torch.bfloat16] if config.on_gpu else [torch.float32, torch.bfloat16]:
        ours, theirs = both_unets(config, dtype)
        batch = inputs(config, 2, dtype)
        sides = {"diffusers": partial(as_theirs, theirs, *batch), "ours": partial(ours, *batch)}
        if config.compile:
            sides["diffusers compiled"] = partial(as_theirs, torch.compile(theirs), *batch)
            sides["ours compiled"] = partial(torch.compile(ours), *batch)
        title = f"UNet, batch 2, {8 * config.side} pixels, {dtype}"
        with torch.inference_mode():
            report(title, alternate(sides, config.rounds, config.device))
    return sides["ours"]


def bench_sample(config: BenchConfig):
    """Prompt embeddings to pixels in 4 guided steps, with each side's default: a float32 VAE."""
    device, side = config.device, config.side
    dtype = torch.bfloat16 if config.on_gpu else torch.float32
    unet, their_unet = both_unets(config, dtype)
    vae, their_vae = both_vaes(device)
    pipeline = make_pipeline(their_unet, their_vae)
    _, _, cond = inputs(config, 1, dtype)
    null = null_condition(cond)

    def ours():
        noise = noise_stream([0], (4, side, side), device)
        eps, x_T = guided(unet, cond, null, 1.0), next(noise)
        return vae.decode(gamma_sample(eps, x_T, equidistant(4), sdxl_schedule(), 0.2, noise))

    def theirs():
        return pipeline(
            prompt_embeds=cond["prompt_embeds"], pooled_prompt_embeds=cond["pooled"], eta=0.2,
            negative_prompt_embeds=null["prompt_embeds"],
            negative_pooled_prompt_embeds=null["pooled"],
            num_inference_steps=4, guidance_scale=2.0, height=8 * side, width=8 * side,
            generator=[torch.Generator().manual_seed(0)], output_type="pt",
        )  # fmt: skip

    sides, memory = {"diffusers": theirs, "ours": ours}, {}
    with torch.inference_mode():
        if config.on_gpu:
            for name, call in sides.items():
                memory[f"peak GiB {name}"] = f"{peak_gpu(call):.1f}"
        seconds = alternate(sides, config.rounds, device)
    report(f"4 steps, {8 * side} pixels, {dtype}", seconds, **memory)
    return ours


def both_vaes(device: str):
    """Our autoencoder, and diffusers' with the same weights."""
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": VAEConfig().channels, "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "scaling_factor": 0.13025,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip
    with torch.device(device):
        theirs, ours = AutoencoderKL(**config).eval(), VAE(VAEConfig()).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_pipeline(unet, vae):
    """Diffusers' SDXL pipeline with TCD's scheduler, without text encoders."""
    from diffusers import StableDiffusionXLPipeline, TCDScheduler

    scheduler = TCDScheduler(1000, 0.00085, 0.012, "scaled_linear", original_inference_steps=250)
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, text_encoder=None, text_encoder_2=None,
        tokenizer=None, tokenizer_2=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bench_load(config: BenchConfig) -> None:
    """Each load in a process of its own: until the module exists, and until its pages are read."""
    folder = config.dir / "unet"
    if not (folder / "config.json").exists():
        # A process inherits its parent's peak of memory, so the parent must not need any.
        run_alone(write_full_unet, folder)
    size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    runs = {"diffusers": [], "ours": []}
    for i in range(config.rounds + 1):
        for name, figures in runs.items():
            measured = run_alone(measure_load, config, name)
            # The first round brings the file into the system's cache, and does not count.
            if i > 0:
                figures.append(measured)
    loaded, touched, memory = {}, {}, {}
    for name, figures in runs.items():
        loaded[name], touched[name], peak = map(statistics.median, zip(*figures, strict=True))
        memory[f"peak over file, {name}"] = f"{peak * 1024 / size:.2f}"
    report(f"loading {size / 2**30:.2f} GiB of float16", loaded)
    report("  and reading every page", touched, **memory)


def measure_load(config: BenchConfig, side: str) -> list[float]:
    """Seconds to load, seconds to load and touch, and peak memory in KiB beyond the imports."""
    from diffusers import UNet2DConditionModel

    folder, before = config.dir / "unet", peak_rss()
    start = time.perf_counter()
    if side == "ours":
        unet = load_component(folder, UNet, UNetConfig)
    else:
        unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)
    loaded = time.perf_counter() - start
    # One number in each page of 4 KiB makes the system read it.
    for p in unet.parameters():
        p.detach().view(-1)[::1024].sum()
    return [loaded, time.perf_counter() - start, peak_rss() - before]


def write_full_unet(folder: Path) -> None:
    """A full-size UNet of random float16 weights in diffusers' layout."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    shapes = {name: p.shape for name, p in unet.state_dict().items()}
    half = {
        name: torch.empty(s, dtype=torch.float16).normal_(0, 0.02) for name, s in shapes.items()
    }
    files.output_folder(folder)
    files.write_tensors(folder / "diffusion_pytorch_model.safetensors", half, format="pt")
    config = {"_class_name": "UNet2DConditionModel", **theirs_config(UNetConfig())}
    files.write_json(folder / "config.json", config)
