"""Pictures from SDXL in 4 to 8 steps, with a TDD LoRA: prompts in, PNG files out.

    python sample.py --model models/sdxl --lora tdd.safetensors --prompt "a red fox in the snow"
    torchrun --nproc-per-node 8 sample.py --model models/sdxl --lora tdd.safetensors \\
        --prompts coco30k.txt --output coco/

The sampler is tdd.gamma_sample, its settings are sdxl/pipeline.py's SamplerConfig.
"""

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

from common import cli, files
from common.pictures import open_image, save_grid, to_images
from sdxl import pipeline
from sdxl.controlnet import ControlNet, ControlNetConfig
from sdxl.load import SDXL, find_weights, load_component, load_sdxl, use_exact_float32
from sdxl.pipeline import DTYPES, SCHEDULES, SamplerConfig
from tcd import TCF
from training import distributed
from unet import UNet, UNetConfig

LOW_MEMORY_TURN = 16  # pictures; so many are lost at most if the program is stopped
SETTINGS_VERSION = 2  # of pictures' settings; in version 1 --tune-guidance was the paper's w'

# -------------------------------------------------------------------------------------------- setup
#
# Flags are checked before the first gigabyte is read.


def check(args) -> None:
    """Raise ValueError in one line for flags that do not go together; fill in --solver-steps."""
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
    weights = [split_scale(entry)[0] for entry in args.lora]
    weights += find_weights(args.unet) if args.unet else []
    headers = {path: files.read_tensors(path)[1] for path in weights}
    # Weights that were trained for another f would be sampled wrongly without a word.
    for path, header in headers.items():
        if (tcf := header.get("tdd_tcf", args.tcf)) != args.tcf:
            raise ValueError(f"{path} was trained with --tcf {tcf}: sample it with that")
    args.solver_steps = args.solver_steps or trained_solver_steps(headers)
    SCHEDULES[args.schedule](args.steps, args.solver_steps)  # ValueError if there is none


def trained_solver_steps(headers: dict[Path, dict]) -> int:
    """N of the files that say what they were trained with; else the paper's."""
    key = "tdd_solver_steps"
    trained = {header[key] for header in headers.values() if key in header}
    if len(trained) > 1 or not all(N.isdecimal() for N in trained):
        values = " and ".join(sorted(trained))
        raise ValueError(f"--lora or --unet is of {values} solver steps: give --solver-steps")
    return int(trained.pop()) if trained else 250


def build_config(args) -> SamplerConfig:
    """The flags as a SamplerConfig, with guidance as the paper's w = g - 1."""
    w_distilled = None if args.tune_guidance is None else args.tune_guidance - 1
    return SamplerConfig(
        steps=args.steps, solver_steps=args.solver_steps, schedule=args.schedule, w=args.cfg - 1,
        w_distilled=w_distilled, sampler=args.sampler, gamma=args.gamma, tcf=args.tcf,
        clip_steps=args.clip_steps, clip_percentile=args.clip_percentile, clip_max=args.clip_max,
    )  # fmt: skip


def load_student(
    path: Path, tokenizer: Path | None, unet: Path | None, loras: list[tuple[Path, float]],
    tcf: str, steps: int, dtype: torch.dtype, device: str,
) -> tuple[SDXL, object]:  # fmt: skip
    """The model with every LoRA merged in, and the network to sample in so many steps."""
    model = load_sdxl(path, tokenizer, dtype)
    if unet is not None:
        model.unet = load_component(unet, UNet, UNetConfig, dtype)
    if model.unet.config.scalar and tcf != "s":
        raise ValueError(f"{unet or path}: its UNet takes a target time: give --tcf s")
    model.to(device)
    network = pipeline.merge_loras(model, loras, tcf, steps)
    # Pixels as rows of channels: transformers and convolutions then agree on the layout.
    model.unet.to(memory_format=torch.channels_last)
    return model, network


def load_control(folder: Path, dtype: torch.dtype, device: str) -> ControlNet:
    """The ControlNet of a folder."""
    controlnet = load_component(folder, ControlNet, ControlNetConfig, dtype)
    return controlnet.to(device, memory_format=torch.channels_last)


def build_network(args) -> tuple[SDXL, object, list[nn.Module]]:
    """The model, the network to sample, and the modules that it consists of."""
    dtype = DTYPES[args.dtype]
    # Where the weights stay while they are not needed.
    home = "cpu" if args.low_memory else args.device
    # Read before the model is loaded, so that a bad image is refused at once.
    image = None if args.control_image is None else open_image(args.control_image)
    use_exact_float32(dtype)
    loras = [split_scale(entry) for entry in args.lora]
    model, network = load_student(
        args.model, args.tokenizer, args.unet, loras, args.tcf, args.steps, dtype, home
    )
    denoisers = [model.unet]
    if image is not None:
        image = image.resize((args.width, args.height), Image.Resampling.LANCZOS)
        controlnet = load_control(args.controlnet, dtype, home)
        pixels = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w")
        pixels = pixels.to(args.device) / 255
        network = pipeline.with_controlnet(network, controlnet, pixels, args.control_scale)
        denoisers.append(controlnet)
    if args.compile:
        for module in denoisers:
            pipeline.compile_blocks(module)
    return model, network, denoisers


def split_scale(entry: str) -> tuple[Path, float]:
    """PATH or PATH:SCALE; a colon that no number follows belongs to the path, as on Windows."""
    path, _, scale = entry.rpartition(":")
    try:
        weight = float(scale) if path else 1.0
    except ValueError:
        return Path(entry), 1.0
    if not math.isfinite(weight):
        raise ValueError(f"--lora {entry}: the scale is {weight}")
    return Path(path or entry), weight


def expand_prompts(prompts: list[str] | None, file: Path | None, num_images: int) -> list[str]:
    """One prompt an image: each prompt, or line of the file, num_images times over."""
    prompts = prompts if file is None else files.read_lines("--prompts", file)
    return [prompt for prompt in prompts for _ in range(num_images)]


# ----------------------------------------------------------------------------------------- pictures
#
# An image file carries its settings and a command line that makes the same image again.


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    prompt: str
    seed: int
    path: Path
    settings: dict


def picture_settings(flags: dict, prompt: str, seed: int) -> dict:
    """All that decides one picture, as it is kept in its file."""
    settings = {**flags, "prompt": [prompt], "seed": seed, "num_images": 1}
    # Its place and the number of pictures sampled with it change nothing about a picture.
    for name in ("prompts", "output", "save_latents", "batch_size", "compile", "low_memory"):
        del settings[name]
    settings = {name: value for name, value in settings.items() if value not in (None, [])}
    return {"version": SETTINGS_VERSION, **settings}


def save_png(image: Image.Image, path: Path, settings: dict) -> None:
    """A PNG with its settings and the command that makes it again."""
    words = ["python", "sample.py"]
    for name, value in settings.items():
        if name != "version":
            for each in value if isinstance(value, list) else [value]:
                words.append(f"--{name.replace('_', '-')}={each}")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("settings", json.dumps(settings, default=str))
    info.add_itxt("command", shlex.join([*words, f"--output={path.name}"]))
    with files.atomic_write(path) as part:
        image.save(part, "PNG", pnginfo=info)


def is_finished(path: Path, settings: dict) -> bool:
    """Whether a whole picture of these settings exists; ValueError if it has other settings."""
    if not path.exists():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            saved = json.loads(getattr(image, "text", {}).get("settings", "{}"))
    except (OSError, ValueError, SyntaxError):
        return False
    if not saved:
        raise ValueError(f"{path} is not sample.py's: name another --output")
    settings = json.loads(json.dumps(settings, default=str))
    names = {**settings, **saved}.keys() - {"device"}
    changed = ", ".join(sorted(k for k in names if settings.get(k) != saved.get(k)))
    if changed:
        raise ValueError(f"{path} was made with another {changed}: name another --output")
    return True


# --------------------------------------------------------------------------------------------- main
#
# Under torchrun every process takes each world-th prompt; processes need not communicate.


def main(args) -> None:
    rank, world, args.device = distributed.get_dist_info(args.device)
    check(args)
    prompts = expand_prompts(args.prompt, args.prompts, args.num_images)
    if world > 1 and (args.save_latents or args.prompts is None):
        raise ValueError("several processes share a --prompts file, and save no latents")
    # A single picture is a file and several are a folder, as is any file of prompts.
    single = len(prompts) == 1 and args.prompts is None
    if single and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder; name a PNG file for a picture")
    files.output_folder(args.output.parent if single else args.output)
    paths = [args.output if single else args.output / f"{i:05}.png" for i in range(len(prompts))]
    flags, seed = vars(args), args.seed
    settings = [picture_settings(flags, prompt, seed + i) for i, prompt in enumerate(prompts)]
    todo = list(range(rank, len(prompts), world))
    # A file of thirty thousand captions is resumed: finished pictures are kept.
    if args.prompts is not None and args.save_latents is None:
        todo = [i for i in todo if not is_finished(paths[i], settings[i])]
    latents = []
    if todo:
        config, size = build_config(args), (args.height, args.width)
        model, network, denoisers = build_network(args)
        print(f"guidance g = {args.cfg:g} (w = {config.w:g}), applied as w = {config.w_tuned:.3g}")
        jobs = [Job(prompts[i], seed + i, paths[i], settings[i]) for i in todo]
        turn = LOW_MEMORY_TURN if args.low_memory else args.batch_size
        for x_0 in sample_all(
            config, model, network, denoisers, jobs, size, args.negative_prompt,
            args.batch_size, turn, args.device,
        ):  # fmt: skip
            if args.save_latents:
                latents.append(x_0)
    if args.save_latents:
        files.write_tensors(args.save_latents, {"latents": torch.cat(latents)})
    if not single and args.prompts is None:
        save_grid([Image.open(path) for path in paths], args.output / "grid.png")
    print(f"{len(todo)} pictures sampled, {len(paths)} in {args.output}")


@torch.no_grad()
def sample_all(
    config: SamplerConfig, model: SDXL, network, denoisers: list[nn.Module], jobs: list[Job],
    size: tuple[int, int], negative: str | None, batch_size: int, turn: int, device: str,
) -> Iterator[Tensor]:  # fmt: skip
    """Sample, decode and save pictures of a size (height, width); yields each batch's latents.

    denoisers: the modules that the network consists of. turn: how many pictures are encoded,
    denoised and decoded together, with the modules for it on the device and no others need be.
    """
    height, width = size
    shape = (4, height // 8, width // 8)
    with tqdm(total=len(jobs), desc="images", unit="image", dynamic_ncols=True) as bar:
        for batches in split(split(jobs, batch_size), math.ceil(turn / batch_size)):
            with pipeline.on_device(device, model.encoder_1, model.encoder_2):
                conds = []
                for batch in batches:
                    prompts = [job.prompt for job in batch]
                    conds.append(pipeline.make_conditions(model, prompts, negative, height, width))
            with pipeline.on_device(device, *denoisers):
                latents = []
                for batch, (cond, null) in zip(batches, conds, strict=True):
                    seeds = [job.seed for job in batch]
                    latents.append(pipeline.sample_latents(
                        config, network, cond, null, shape, seeds, device))  # fmt: skip
            with pipeline.on_device(device, model.vae):
                for batch, x_0 in zip(batches, latents, strict=True):
                    for job, image in zip(batch, to_images(model.vae.decode(x_0)), strict=True):
                        save_png(image, job.path, job.settings)
                    bar.update(len(batch))
                    yield x_0.cpu()


def split(items: list, size: int) -> list[list]:
    """Parts of this size in order, the last one smaller if need be."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def sampler_flags(add) -> None:
    """One way to sample: SamplerConfig's fields."""
    add("--steps", type=cli.positive_int, default=4, help="number of steps, k")
    add("--cfg", type=cli.non_negative, default=2.0, help="guidance g = 1 + w of Eq. 12; 1 is off")
    add("--gamma", type=cli.share, default=0.2, help="gamma of Eq. 18 (--sampler tdd)")
    add("--schedule", choices=SCHEDULES, default="equidistant",
        help="rule for the k timesteps; the latter for 4 to 8 steps")  # fmt: skip
    add("--tcf", choices=TCF, default="1", help="f, the jump that the LoRA was trained with")
    add("--clip-steps", type=cli.count, default=0, help="number of first steps with C (Eq. 17)")
    add("--clip-percentile", type=cli.share, default=0.995, help="percentile of C")
    add("--clip-max", type=cli.number(float, 1), default=1.0, help="largest s of C")
    add("--tune-guidance", type=cli.number(float, 1), metavar="G'",
        help="g' = 1 + w' that the LoRA was distilled with: --cfg then acts as the "
             "teacher's (Eq. 13)")  # fmt: skip
    add("--solver-steps", type=cli.positive_int,
        help="grid of the schedules, N: that of the LoRA or --unet, or 250")  # fmt: skip
    add("--sampler", choices=["tdd", "ddim", "dpm++2m", "dpm++2s"], default="tdd",
        help="gamma-sampler, or a solver for the plain model")  # fmt: skip


def parser() -> cli.Parser:
    p = cli.Parser("Samples SDXL, or SDXL with LoRAs, in few steps.")
    gpu = torch.cuda.is_available()
    add = p.add_argument
    add("--model", type=Path, required=True, help="SDXL: a folder or one .safetensors")
    add("--tokenizer", type=Path, help="tokenizer's folder, where the model is a single file")
    add("--unet", type=Path, metavar="DIR", help="folder of a --full UNet, instead of the model's")
    add("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="LoRA file; repeatable")
    add("--prompt", action="append", metavar="TEXT", help="prompt; repeatable")
    add("--prompts", type=Path, metavar="FILE", help="file with a prompt a line; resumable")
    add("--negative-prompt", help="prompt for the null condition, instead of zeros")
    sampler_flags(add)
    add("--controlnet", type=Path, metavar="DIR", help="folder of an SDXL ControlNet")
    add("--control-image", type=Path, metavar="PNG", help="canny or depth image for it")
    add("--control-scale", type=cli.non_negative, default=1.0, help="strength of the ControlNet")
    add("--seed", type=cli.number(int, 0, 2**62), default=0, help="random seed of the first image")
    add("--num-images", type=cli.positive_int, default=1, help="number of images of each prompt")
    add("--height", type=cli.number(int, 8), default=1024, help="height in pixels, a multiple of 8")
    add("--width", type=cli.number(int, 8), default=1024, help="width in pixels, a multiple of 8")
    add("--batch-size", type=cli.positive_int, default=1, help="number of images sampled together")
    add("--output", type=Path, default=Path("sample.png"), help="PNG file, or folder for several")
    add("--save-latents", type=Path, metavar="FILE", help="file for the latents before decoding")
    add("--device", default="cuda" if gpu else "cpu", help="cpu, cuda, cuda:1, ..")
    add("--dtype", choices=DTYPES, default="fp16" if gpu else "float32",
        help="precision of UNet and text encoders; the VAE is float32")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile for the UNet's blocks")
    add("--low-memory", action="store_true",
        help="text encoders, UNet and VAE on the device in turn: 1024 pixels in 8 GB")  # fmt: skip
    return p


if __name__ == "__main__":
    cli.run(main, parser())
