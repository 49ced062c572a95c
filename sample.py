"""Pictures from SDXL in 4 to 8 steps, with a TDD LoRA: prompts in, PNG files out.

    python sample.py --model sdxl/ --lora tdd.safetensors --prompt "a red fox in the snow"
    torchrun --nproc-per-node 8 sample.py --model sdxl/ --lora tdd.safetensors \
        --prompts coco30k.txt --output coco/
"""

import json
import math
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from common import cli, files
from common.files import read_lines, read_tensors
from common.pictures import open_image, save_grid, to_images
from sdxl.load import SDXL, cast, find_weights, load_component, load_controlnet, load_sdxl
from sdxl.lora import LoRA, merge
from sdxl.lora_files import read_lora
from sdxl.pipeline import DTYPES, SCHEDULES, conditions, controlled, tell, timesteps_of
from solvers import CLEAN, SOLVERS, sdxl_schedule, solve
from tcd import TCF
from tdd import clip_x0, gamma_sample, guided, noise_stream, tuned
from training import distributed
from unet import UNet, UNetConfig


def latents_of(args, model: SDXL, network, prompts: list[str], seeds: list[int]) -> Tensor:
    """Final latents (b, 4, h/8, w/8), float32; each depends on its own prompt and seed alone."""
    schedule, device = sdxl_schedule(), model.unet.conv_in.weight.device
    cond, null = conditions(model, prompts, args.negative_prompt, args.height, args.width)
    w = args.cfg - 1
    if args.tune_guidance is not None:
        w = tuned(w, args.tune_guidance)
    eps = guided(network, cond, null, w)
    # Image i draws from its own CPU generator: alone, in a batch or on a GPU it is the same image.
    noise = noise_stream(seeds, (4, args.height // 8, args.width // 8), device)
    x_T, timesteps = next(noise), timesteps_of(args)
    if args.sampler != "tdd":
        return solve(eps, x_T, [*timesteps, CLEAN], schedule, SOLVERS[args.sampler])
    clip = partial(clip_x0, percentile=args.clip_percentile, max_value=args.clip_max)
    given = args.gamma, noise, clip, args.clip_steps
    return gamma_sample(eps, x_T, timesteps, schedule, *given, TCF[args.tcf])


# -------------------------------------------------------------------------------- loading, settings
#
# All that can be wrong with the flags is found before the first gigabyte is read.


def check(args) -> None:
    """Flags that no flag's own type can refuse; ValueError in one line."""
    for name in ("height", "width"):
        if getattr(args, name) % 8:
            raise ValueError(f"--{name} {getattr(args, name)} is not a multiple of 8")
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give prompts by --prompt TEXT or by --prompts FILE, not both")
    if (args.controlnet is None) != (args.control_image is None):
        raise ValueError("--controlnet and --control-image go together")
    if args.sampler != "tdd" and (args.clip_steps or args.tcf != "1"):
        name = "clip-steps" if args.clip_steps else "tcf"
        raise ValueError(f"--{name} works with --sampler tdd, not {args.sampler}")
    cli.check_device(args.device)
    if args.save_latents is not None:
        files.output_folder(args.save_latents.parent)
        if args.save_latents.is_dir():
            raise ValueError(f"--save-latents {args.save_latents} is a folder; name a file")
    # The same weights under another function would draw something, and nothing would say so.
    for path, made in trained_with(args, "tdd_tcf").items():
        if made != args.tcf:
            raise ValueError(f"{path} was trained with --tcf {made}: sample it with that")
    args.solver_steps = args.solver_steps or trained_grid(args)
    timesteps_of(args)


def trained_with(args, name: str) -> dict[Path, str]:
    """What the headers of the LoRAs and of --unet say about a setting, where they say it."""
    files = [Path(split_scale(entry)[0]) for entry in args.lora]
    files += [] if args.unet is None else find_weights(args.unet)
    headers = {path: read_tensors(path)[1] for path in files}
    return {path: header[name] for path, header in headers.items() if name in header}


def trained_grid(args) -> int:
    """N of the LoRAs, or the --unet, that tell what they were trained with; else the paper's."""
    made = set(trained_with(args, "tdd_solver_steps").values())
    if len(made) > 1 or not all(N.isdecimal() for N in made):
        some = " and ".join(sorted(made))
        raise ValueError(f"--lora or --unet is of {some} solver steps: give --solver-steps")
    return int(made.pop()) if made else 250


def build(args) -> tuple[SDXL, object]:
    """The model with every LoRA merged in, and the network to sample, ControlNet included."""
    dtype, image = DTYPES[args.dtype], args.control_image and open_image(args.control_image)
    # Merged: nothing is left to switch, and sampling then costs what the plain model costs. In the
    # file's own precision, since a LoRA's small updates would be rounded away in half.
    model = load_sdxl(args.model, args.tokenizer, None if args.lora else dtype).to(args.device)
    if args.unet is not None:
        model.unet = load_component(args.unet, UNet, UNetConfig).to(args.device)
    if model.unet.config.told and args.tcf != "s":
        raise ValueError(f"{args.unet or args.model}: its UNet is told of s: give --tcf s with it")
    network = tell(model.unet)
    for entry in args.lora:
        path, scale = split_scale(entry)
        loras = read_lora(Path(path), model.unet, model.encoder_1, model.encoder_2)
        for base, lora in zip((model.unet, model.encoder_1, model.encoder_2), loras, strict=True):
            merge(base, lora, scale)
        if loras[0].told is not None:
            network = told_network(args, entry, network, loras[0].to(args.device), scale)
    if args.tcf == "s" and network is model.unet:
        raise ValueError("--tcf s: neither a --lora nor a --unet was trained with it")
    for module in (model.unet, model.encoder_1, model.encoder_2):
        cast(module, dtype)
    # Pixels as rows of channels: transformers and convolutions then agree on the layout.
    model.unet.to(memory_format=torch.channels_last)
    if args.controlnet is None:
        return model, network
    controlnet = load_controlnet(args.controlnet, dtype)
    controlnet.to(args.device, memory_format=torch.channels_last)
    image = image.resize((args.width, args.height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).to(args.device) / 255
    pixels = rearrange(pixels, "h w c -> 1 c h w")
    return model, controlled(network, controlnet, pixels, args.control_scale)


def told_network(args, entry: str, network, lora: LoRA, scale: float):
    """The network of a LoRA with an embedding: told of --steps (TDM-unify), or of s by --tcf s."""
    of = lora.told.of
    if not isinstance(network, UNet) or (of == "s") != (args.tcf == "s"):
        hint = "give --tcf s with it, and only with it" if of == "s" else "leave --tcf s away"
        raise ValueError(f"--lora {entry} is told of {of}: {hint}, and no second LoRA of its kind")
    # Its last layer is linear, so that a scale there is a scale of the whole embedding.
    for p in lora.told.linear_2.parameters():
        p.mul_(scale)
    return tell(network, lora, args.steps)


def split_scale(entry: str) -> tuple[str, float]:
    """PATH or PATH:SCALE; a colon that no number follows belongs to the path."""
    # Windows paths and plain ones hold colons too.
    path, _, scale = entry.rpartition(":")
    try:
        weight = float(scale) if path else 1.0
    except ValueError:
        return entry, 1.0
    if not math.isfinite(weight):
        raise ValueError(f"--lora {entry}: the scale is {weight}")
    return path or entry, weight


def read_prompts(args) -> list[str]:
    """One prompt an image: each --prompt num_images times over, or a file's lines."""
    prompts = args.prompt if args.prompts is None else read_lines("--prompts", args.prompts)
    return [prompt for prompt in prompts for _ in range(args.num_images)]


def settings_of(args, prompt: str, seed: int) -> dict:
    """All that decides one picture, as it is kept in its file."""
    own = {"prompt": [prompt], "seed": seed, "num_images": 1}
    # Where it lies and how many were sampled with it changes nothing about a picture.
    left_out = ("prompts", "output", "save_latents", "batch_size")
    settings = {k: v for k, v in {**vars(args), **own}.items() if k not in left_out}
    return {k: v for k, v in settings.items() if v is not None and v != []}


def save_png(image: Image.Image, path: Path, args, prompt: str, seed: int) -> None:
    """A picture that tells how it was made: every setting, and the command that makes it again."""
    settings, words = settings_of(args, prompt, seed), ["python", "sample.py"]
    for name, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            words.append(f"--{name.replace('_', '-')}={one}")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("settings", json.dumps(settings, default=str))
    info.add_itxt("command", shlex.join([*words, f"--output={path.name}"]))
    with files.whole(path) as part:
        image.save(part, "PNG", pnginfo=info)


def is_made(path: Path, args, prompt: str, seed: int) -> bool:
    """Whether a whole picture of these settings is there; ValueError if it is one of others."""
    try:
        with Image.open(path) as image:
            image.load()
            made = json.loads(getattr(image, "text", {}).get("settings", "{}"))
    except (OSError, ValueError, SyntaxError):
        return False
    wanted = json.loads(json.dumps(settings_of(args, prompt, seed), default=str))
    other = [k for k in {**wanted, **made} if k != "device" and wanted.get(k) != made.get(k)]
    if other:
        how = f"was made with another {', '.join(other)}" if made else "is not sample.py's"
        raise ValueError(f"{path} {how}: name another --output")
    return True


# --------------------------------------------------------------------------------------------- main
#
# Under torchrun every process takes each world-th prompt; they never need to talk to each other.


def main(args) -> None:
    rank, world, args.device = distributed.identity(args.device)
    check(args)
    prompts = read_prompts(args)
    if world > 1 and (args.save_latents or args.prompts is None):
        raise ValueError("several processes share a --prompts file, and save no latents")
    # One picture is a file and many are a folder; a file of prompts is many, be it a single line.
    single = len(prompts) == 1 and args.prompts is None
    if single and args.output.is_dir():
        raise ValueError(
            f"--output {args.output} is a folder; name a PNG file for a single picture"
        )
    files.output_folder(args.output.parent if single else args.output)
    paths = [args.output if single else args.output / f"{i:05}.png" for i in range(len(prompts))]
    # Thirty thousand captions are not sampled twice: what an earlier run has left is kept.
    keep = args.prompts is not None and args.save_latents is None
    todo = [
        i for i in range(rank, len(prompts), world)
        if not (keep and paths[i].exists() and is_made(paths[i], args, prompts[i], args.seed + i))
    ]  # fmt: skip
    latents = sample_all(args, prompts, todo, paths) if todo else []
    if args.save_latents:
        files.write_tensors(args.save_latents, {"latents": torch.cat(latents)})
    if not single and args.prompts is None:
        save_grid([Image.open(path) for path in paths], args.output / "grid.png")
    print(f"{len(todo)} pictures sampled, {len(paths)} in {args.output}")


@torch.no_grad()
def sample_all(args, prompts: list[str], todo: list[int], paths: list[Path]) -> list[Tensor]:
    """Sample, decode and save the images numbered in `todo`; their latents if these are wanted."""
    model, network = build(args)
    latents = []
    with tqdm(total=len(todo), desc="images", unit="image", dynamic_ncols=True) as bar:
        for start in range(0, len(todo), args.batch_size):
            rows = todo[start : start + args.batch_size]
            seeds = [args.seed + i for i in rows]
            x_0 = latents_of(args, model, network, [prompts[i] for i in rows], seeds)
            latents += [x_0.cpu()] if args.save_latents else []
            images = to_images(model.vae.decode(x_0))
            for i, image, seed in zip(rows, images, seeds, strict=True):
                save_png(image, paths[i], args, prompts[i], seed)
            bar.update(len(rows))
    return latents


def parser() -> cli.Parser:
    p = cli.Parser("Samples SDXL, or SDXL with LoRAs, in few steps.")
    whole, share = cli.number(int, 1), cli.number(float, 0, 1)
    gpu = torch.cuda.is_available()
    add = p.add_argument
    add("--model", type=Path, required=True, help="SDXL: a folder or one .safetensors")
    add("--tokenizer", type=Path, help="its folder, where the model is a single file")
    add("--unet", type=Path, metavar="DIR", help="instead of the model's (--full)")
    add("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="repeatable")
    add("--prompt", action="append", metavar="TEXT", help="repeatable")
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line; resumable")
    add("--negative-prompt", help="the null condition, instead of zeros")
    add("--steps", type=whole, default=4, help="k, the number of steps")
    add("--cfg", type=cli.number(float, 0), default=2.0, help="g = 1 + w of Eq. 12")
    add("--gamma", type=share, default=0.2, help="gamma of Eq. 18 (--sampler tdd)")
    add("--schedule", choices=SCHEDULES, default="equidistant",
        help="the k timesteps; the latter for 4 to 8 steps")  # fmt: skip
    add("--tcf", choices=TCF, default="1", help="f, as the LoRA was trained with")
    add("--clip-steps", type=cli.number(int, 0), default=0, help="steps with C (Eq. 17)")
    add("--clip-percentile", type=share, default=0.995, help="percentile of C")
    add("--clip-max", type=cli.number(float, 1), default=1.0, help="upper end of C's s")
    add("--tune-guidance", type=cli.number(float, 0), metavar="W'",
        help="w' that the LoRA was distilled with: --cfg then acts as the "
             "teacher's (Eq. 13)")  # fmt: skip
    add("--solver-steps", type=whole,
        help="N, the grid of the schedules: that of the LoRA or --unet, or 250")  # fmt: skip
    add("--sampler", choices=["tdd", "ddim", "dpm++2m", "dpm++2s"], default="tdd",
        help="the gamma-sampler, or a solver for the plain model")  # fmt: skip
    add("--controlnet", type=Path, metavar="DIR", help="an SDXL ControlNet's folder")
    add("--control-image", type=Path, metavar="PNG", help="its canny or depth image")
    add("--control-scale", type=cli.number(float, 0), default=1.0, help="its strength")
    add("--seed", type=cli.number(int, 0, 2**62), default=0, help="of the first image")
    add("--num-images", type=whole, default=1, help="images of each prompt")
    add("--height", type=cli.number(int, 8), default=1024, help="pixels, eights")
    add("--width", type=cli.number(int, 8), default=1024, help="pixels, eights")
    add("--batch-size", type=whole, default=1, help="images sampled together")
    add("--output", type=Path, default=Path("sample.png"), help="PNG, or folder for many")
    add("--save-latents", type=Path, metavar="FILE", help="latents before decoding")
    add("--device", default="cuda" if gpu else "cpu", help="cpu, cuda, cuda:1, ..")
    add("--dtype", choices=DTYPES, default="bf16" if gpu else "float32",
        help="of UNet and text encoders; the VAE is float32")  # fmt: skip
    return p


if __name__ == "__main__":
    cli.run(main, parser())
