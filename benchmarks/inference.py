"""Speed and memory beside diffusers: same weights, same run, alternating; medians and ratios.

    python bench.py unet       one forward pass of the UNet
    python bench.py load       loading a full-size UNet from disk (writes 5 GB to --dir)
    python bench.py sample     prompt embeddings to pixels: four guided steps and the decoder
    python bench.py train      one training step, beside the published recipe (needs peft too)

On a CPU all but `load` run a mid-size UNet, on a GPU the full one. Needs diffusers.
"""

import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import alternate, child, peak_gpu, peak_rss, report
from common import files
from sdxl.load import cast, load_component
from sdxl.pipeline import null_of
from sdxl.vae import VAE, VAEConfig
from solvers import sdxl_schedule
from tdd import equidistant, gamma_sample, guided, noise_stream
from unet import UNet, UNetConfig

# SDXL in small: the same levels and kinds of blocks, for machines that would wait a minute a pass.
MID = UNetConfig(channels=(128, 256, 512), depths=(0, 2, 4), heads=(2, 4, 8), mid_depth=4)


# -------------------------------------------------------------------------------------- both sides
#
# Random weights: speed does not depend on what they are, and these fit both sides. Ours runs in
# channels_last, as sample.py has it; diffusers runs as its users run it.


def theirs_config(config: UNetConfig) -> dict:
    """A UNetConfig in diffusers' words."""
    attends = [depth > 0 for depth in config.depths]
    return {
        "in_channels": 4, "out_channels": 4, "block_out_channels": config.channels,
        "layers_per_block": config.blocks, "norm_num_groups": config.groups,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "transformer_layers_per_block": [max(1, d) for d in config.depths],
        "attention_head_dim": config.heads, "cross_attention_dim": config.tokens,
        "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": config.added,
    }  # fmt: skip


def both_unets(config: UNetConfig, device: str, dtype):
    """Diffusers' UNet with its own random weights, and ours with the same."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        theirs = UNet2DConditionModel(**theirs_config(config)).to(dtype).eval()
        ours = UNet(config).eval()
    cast(ours, dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(memory_format=torch.channels_last), theirs


def inputs(config: UNetConfig, batch: int, side: int, device: str, dtype):
    """x_t (batch, 4, side, side), t and the condition, at random."""
    cond = {
        "tokens": torch.randn(batch, 77, config.tokens, device=device, dtype=dtype),
        "pooled": torch.randn(batch, config.added - 6 * 256, device=device, dtype=dtype),
        "time_ids": torch.full((batch, 6), 8 * side, device=device),
    }
    x_t = torch.randn(batch, 4, side, side, device=device)
    return x_t, torch.full((batch,), 751, device=device), cond


def as_theirs(unet, x, t, cond):
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    x = x.to(cond["tokens"].dtype)
    return unet(x, t, cond["tokens"], added_cond_kwargs=added, return_dict=False)[0]


# --------------------------------------------------------------------------------------- benchmarks
#
# What a user would pick instead is diffusers with its defaults: its UNet, its pipeline, its loader.
# Each returns our call, for --profile.


def bench_unet(args, config: UNetConfig, side: int):
    gpu = args.device.startswith("cuda")
    for dtype in [torch.bfloat16] if gpu else [torch.float32, torch.bfloat16]:
        ours, theirs = both_unets(config, args.device, dtype)
        batch = inputs(config, 2, side, args.device, dtype)
        sides = {"diffusers": partial(as_theirs, theirs, *batch), "ours": partial(ours, *batch)}
        if args.compile:
            sides["diffusers compiled"] = partial(as_theirs, torch.compile(theirs), *batch)
            sides["ours compiled"] = partial(torch.compile(ours), *batch)
        title = f"UNet, batch 2, {8 * side} pixels, {dtype}"
        with torch.inference_mode():
            report(title, alternate(sides, args.rounds, args.device))
    return sides["ours"]


def bench_sample(args, config: UNetConfig, side: int):
    """What is compared is the default of each: diffusers runs the VAE in float32 as well."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, TCDScheduler

    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    unet, their_unet = both_unets(config, args.device, dtype)
    config_vae = {"block_out_channels": VAEConfig().channels, "layers_per_block": 2,
                  "down_block_types": ["DownEncoderBlock2D"] * 4, "scaling_factor": 0.13025,
                  "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4}  # fmt: skip
    with torch.device(args.device):
        their_vae, vae = AutoencoderKL(**config_vae).eval(), VAE(VAEConfig()).eval()
    vae.load_state_dict(their_vae.state_dict())
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = TCDScheduler(**betas, original_inference_steps=250)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    parts |= {"vae": their_vae, "unet": their_unet, "scheduler": scheduler}
    pipeline = StableDiffusionXLPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    _, _, cond = inputs(config, 1, side, args.device, dtype)
    null = null_of(cond)

    def ours():
        noise = noise_stream([0], (4, side, side), args.device)
        eps, start = guided(unet, cond, null, 1.0), next(noise)
        return vae.decode(gamma_sample(eps, start, equidistant(4), sdxl_schedule(), 0.2, noise))

    def theirs():
        return pipeline(
            prompt_embeds=cond["tokens"], pooled_prompt_embeds=cond["pooled"], eta=0.2,
            negative_prompt_embeds=null["tokens"], negative_pooled_prompt_embeds=null["pooled"],
            num_inference_steps=4, guidance_scale=2.0, height=8 * side, width=8 * side,
            generator=[torch.Generator().manual_seed(0)], output_type="pt",
        )  # fmt: skip

    sides, memory = {"diffusers": theirs, "ours": ours}, {}
    with torch.inference_mode():
        if args.device.startswith("cuda"):
            memory = {f"peak GiB {name}": f"{peak_gpu(call):.1f}" for name, call in sides.items()}
        seconds = alternate(sides, args.rounds, args.device)
    report(f"4 steps, {8 * side} pixels, {dtype}", seconds, **memory)
    return ours


def bench_load(args, config: UNetConfig, side: int) -> None:
    """Each load in its own process: until the module stands, and until its pages are in too."""
    folder = args.dir / "unet"
    if not (folder / "config.json").exists():
        write_full_unet(folder)
    size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    runs = {"diffusers": [], "ours": []}
    for i in range(args.rounds + 1):
        for name, measured in runs.items():
            measured += [child(args, name)] * (i > 0)
    stands, touched, peak = (
        {name: statistics.median(run[i] for run in measured) for name, measured in runs.items()}
        for i in range(3)
    )
    report(f"loading {size / 2**30:.2f} GiB of float16", stands)
    memory = {f"peak over file, {k}": f"{v * 1024 / size:.2f}" for k, v in peak.items()}
    report("  and reading every page", touched, **memory)


def load_child(side: str, folder: Path) -> None:
    """Seconds to load, seconds to load and touch, and peak memory in KiB beyond the imports."""
    from diffusers import UNet2DConditionModel

    before = peak_rss()
    start = time.perf_counter()
    if side == "ours":
        unet = load_component(folder, UNet, UNetConfig)
    else:
        unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)
    stands = time.perf_counter() - start
    # One number a page of 4 KiB is enough to have the system fetch it.
    for p in unet.parameters():
        p.detach().view(-1)[::1024].sum()
    touched = time.perf_counter() - start
    print(json.dumps([stands, touched, peak_rss() - before]))


def write_full_unet(folder: Path) -> None:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in UNet(UNetConfig()).state_dict().items()}
    files.output_folder(folder)
    tensors = {k: torch.empty(s, dtype=torch.float16).normal_(0, 0.02) for k, s in shapes.items()}
    files.write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, format="pt")
    config = {"_class_name": "UNet2DConditionModel", **theirs_config(UNetConfig())}
    files.write_json(folder / "config.json", config)
