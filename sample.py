"""Pictures from SDXL in 4 to 8 steps, with a TDD LoRA: prompts in, PNG files out.

    python sample.py --model models/sdxl --lora tdd.safetensors --prompt "a red fox in the snow"
    torchrun --nproc-per-node 8 sample.py --model models/sdxl --lora tdd.safetensors \\
        --prompts coco30k.txt --output coco/

The sampler is tdd.gamma_sample, its settings are sdxl/pipeline.py's SamplerConfig.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import cli, files
from common.pictures import control_pixels, to_images, write_grid
from sdxl import lora_files, num_steps, pipeline, png
from sdxl.load import SDXL, ModelPaths, component_files, load_controlnet, load_sdxl
from sdxl.pipeline import DTYPES, SCHEDULES, SamplerConfig
from sdxl.recipe import read_recipe, single_value
from sdxl.weights import find_weights, split_scale, use_exact_float32
from solvers import SOLVERS
from tcd import TCF
from training import distributed

LOW_MEMORY_TURN = 16  # pictures; so many are lost at most if the program is stopped
FROM_LORA = -1.0  # a bare --tune-guidance
EXPORT_FLAGS = {"model", "tokenizer", "unet", "vae", "lora", "output", "device", "dtype",
                "export_k"}  # fmt: skip

# -------------------------------------------------------------------------------------------- setup
#
# Flags are checked before the first gigabyte is read.


# What the header of a distilled file decides unless a flag does, and what holds without a header.
FROM_HEADER = {"sampler": "tdd", "steps": 4, "cfg": 2.0, "gamma": 0.2, "tcf": "1",
               "solver_steps": 250, "kmin": 4, "kmax": 8}  # fmt: skip


def check(args) -> None:
    """Raise ValueError in one line for flags that do not go together; fill in what headers say."""
    for name in ("height", "width"):
        if getattr(args, name) % 8:
            raise ValueError(f"--{name} {getattr(args, name)} is not a multiple of 8")
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give prompts by --prompt TEXT or by --prompts FILE, not both")
    controls = len(args.controlnet)
    if len(args.control_image) != controls or len(args.control_scale) not in (0, controls):
        raise ValueError("each --controlnet needs a --control-image, and a --control-scale or none")
    cli.check_device(args.device)
    if args.save_latents is not None:
        files.output_folder(args.save_latents.parent)
        files.check_replaceable("--save-latents", args.save_latents, {"latents"})
    reason = "as the header has it" if args.cfg is None else "where guidance is off"
    read_headers(args)
    check_sampler(args)
    if args.negative_prompt is not None and args.cfg == 1:
        hint = f"{reason}: give a larger --cfg, or leave it away"
        raise ValueError(f"--negative-prompt has no effect at --cfg 1, {hint}")
    # ValueError if there are none.
    _ = build_config(args).timesteps


def check_sampler(args) -> None:
    """ValueError for a flag that --sampler, or C as it is asked for, has no use for."""
    is_tdd = args.sampler == "tdd"
    clips = args.clip_steps > 0
    if args.tcf != "1" and not is_tdd:
        raise ValueError(f"--tcf works with --sampler tdd, not {args.sampler}")
    cli.check_uses(args, parser(), {
        "gamma": ("--sampler tdd", is_tdd), "clip_steps": ("--sampler tdd", is_tdd),
        "clip_max": ("--clip-steps", clips),
        "clip_percentile": ("--clip-steps with a --clip-max above 1", clips and args.clip_max > 1),
    })  # fmt: skip


def read_headers(args) -> None:
    """Fill in FROM_HEADER's flags, and the g' of a bare --tune-guidance; a line says from where."""
    paths = [split_scale(entry)[0] for entry in args.lora]
    if args.unet is not None:
        paths += find_weights(args.unet) if args.unet.is_dir() else [args.unet]
    recipes = [read_recipe(path, files.read_tensors(path)[1]) for path in paths]
    used = []
    for name, default in {**FROM_HEADER, "tune_guidance": None}.items():
        values = sorted({recipe[name] for recipe in recipes if name in recipe})
        asked = getattr(args, name, None)
        # None for a solver, which comes before it: so it is no part of a picture's settings.
        if name == "gamma" and args.sampler != "tdd":
            continue
        # K's range matters to the other schedule alone.
        if name in ("kmin", "kmax") and args.schedule == "equidistant":
            values = []
        if asked == FROM_LORA or (asked is None and name != "tune_guidance"):
            value = single_value(name, values, default)
            setattr(args, name, value)
            if values:
                used.append(f"{name.replace('_', '-')} {value}")
        # Weights that were trained for another f would be sampled wrongly without a word.
        elif name == "tcf" and single_value(name, values, asked) != asked:
            raise ValueError(
                f"--lora or --unet was trained with --tcf {values[0]}: sample it with that"
            )
    told = sorted({recipe["told_ks"] for recipe in recipes if "told_ks" in recipe})
    Ks = single_value("told_ks", told, ())
    told_k = num_steps.choose_k(args.tell_k, args.steps, Ks, "the --lora")
    num_steps.check_strength(recipes[: len(args.lora)], [split_scale(x)[1] for x in args.lora])
    if told_k != args.tell_k:
        args.tell_k = told_k
        used.append(f"tell-k {told_k}")
    if used:
        print(f"from the header of {', '.join(path.name for path in paths)}: {', '.join(used)}")


def build_config(args) -> SamplerConfig:
    """The flags as a SamplerConfig, with guidance as the paper's w = g - 1."""
    w_distilled = None if args.tune_guidance is None else args.tune_guidance - 1
    return SamplerConfig(
        steps=args.steps, solver_steps=args.solver_steps, schedule=args.schedule,
        kmin=args.kmin, kmax=args.kmax, w=args.cfg - 1, w_distilled=w_distilled,
        sampler=args.sampler, gamma=args.gamma or 0.0, tcf=args.tcf, clip_steps=args.clip_steps,
        clip_percentile=args.clip_percentile, clip_max=args.clip_max,
    )  # fmt: skip


def load_student(
    paths: ModelPaths, loras: list[tuple[Path, float]], tcf: str, dtype: torch.dtype, device: str
) -> tuple[SDXL, object]:
    """The model with every LoRA merged in, and the network to sample."""
    model = load_sdxl(paths, dtype=dtype)
    if model.unet.config.scalar and tcf != "s":
        raise ValueError(f"{paths.unet or paths.model}: its UNet takes a target time: give --tcf s")
    model.to(device)
    network = pipeline.merge_loras(model, loras, tcf)
    # Pixels as rows of channels: transformers and convolutions then agree on the layout.
    model.unet.to(memory_format=torch.channels_last)
    return model, network


def build_network(args) -> tuple[SDXL, object, list[nn.Module]]:
    """The model, the network to sample, and the modules that it consists of."""
    dtype = DTYPES[args.dtype]
    # Where the weights stay while they are not needed.
    home = "cpu" if args.low_memory else args.device
    # Read before the model is loaded, so that a bad image is refused at once.
    images = [control_pixels(path, args.width, args.height) for path in args.control_image]
    use_exact_float32(dtype)
    loras = [split_scale(entry) for entry in args.lora]
    model, network = load_student(model_paths(args), loras, args.tcf, dtype, home)
    if args.tell_k is not None:
        network = num_steps.with_k(network, args.tell_k)
    denoisers, controls = [model.unet], []
    scales = args.control_scale or [1.0] * len(images)
    for path, pixels, scale in zip(args.controlnet, images, scales, strict=True):
        controlnet = load_controlnet(path, model.unet.config, dtype)
        denoisers.append(controlnet.to(home, memory_format=torch.channels_last))
        controls.append((controlnet, pixels.to(args.device), scale))
    if controls:
        network = pipeline.with_controlnets(network, controls)
    if args.compile:
        for module in denoisers:
            pipeline.compile_blocks(module)
    return model, network, denoisers


def export_k(args) -> None:
    """--export-k: a told student for one K, as LoRA files that need no crop."""
    output = Path(args.output)
    unused = vars(args).keys() - EXPORT_FLAGS
    cli.check_uses(args, parser(), dict.fromkeys(unused, ("pictures, not --export-k", False)))
    if len(args.lora) != 1 or output.suffix != ".safetensors":
        raise ValueError("--export-k needs one --lora, and --output NAME.safetensors")
    path, scale = split_scale(args.lora[0])
    if scale != 1:
        raise ValueError(f"--lora {args.lora[0]}: --export-k is for full strength, without a scale")
    lora_files.check_export(path, args.export_k, output)
    files.output_folder(output.parent)
    model = load_sdxl(model_paths(args), dtype=DTYPES[args.dtype])
    paths = lora_files.export_for_one_K(path, args.export_k, model.unet, output)
    print(f"{path} for {args.export_k} steps: {', '.join(map(str, paths))}")


def model_paths(args) -> ModelPaths:
    """Where the model's parts are."""
    return ModelPaths(args.model, args.tokenizer, args.unet, args.vae)


def expand_prompts(prompts: list[str] | None, file: Path | None, num_images: int) -> list[str]:
    """One prompt an image: each prompt, or line of the file, num_images times over."""
    prompts = prompts if file is None else files.read_lines("--prompts", file)
    return [prompt for prompt in prompts for _ in range(num_images)]


def read_contents(args) -> dict[str, str]:
    """The content of every file that a picture depends on, as files.fingerprint by its part."""
    contents = model_paths(args).fingerprints(DTYPES[args.dtype])
    for i, entry in enumerate(args.lora):
        path, scale = split_scale(entry)
        content = files.fingerprint(path)
        # By mistake, more likely than not, and twice as strong without a word.
        if any(other.startswith(content) for other in contents.values()):
            raise ValueError(f"--lora {path} is given twice: give it once, with the scales' sum")
        contents[f"lora {i + 1}"] = f"{content}:{scale:g}"
    for i, path in enumerate(args.controlnet):
        paths = component_files(path, DTYPES[args.dtype])
        contents[f"controlnet {i + 1}"] = files.fingerprint(*paths)
    for i, path in enumerate(args.control_image):
        contents[f"control image {i + 1}"] = files.fingerprint(path)
    return contents


# --------------------------------------------------------------------------------------------- main
#
# Under torchrun every process takes each world-th prompt; processes need not communicate.


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    prompt: str
    seed: int
    path: Path
    settings: dict


def main(args) -> None:
    # What a picture's settings say: a process of torchrun has a device of its own.
    device = args.device
    rank, world, args.device = distributed.get_dist_info(device)
    if args.export_k is not None:
        return export_k(args) if rank == 0 else None
    check(args)
    prompts = expand_prompts(args.prompt, args.prompts, args.num_images)
    if world > 1 and (args.save_latents or args.prompts is None):
        raise ValueError("several processes share a --prompts file, and save no latents")
    # A single picture may be a file; several are a folder, as is any file of prompts.
    output, several = Path(args.output), len(prompts) > 1 or args.prompts is not None
    single = png.names_png(args.output, several)
    files.output_folder(output.parent if single else output)
    paths = [output if single else output / f"{i:05}.png" for i in range(len(prompts))]
    flags, seed = vars(args) | {"device": device}, args.seed
    contents = read_contents(args)
    settings = [
        png.picture_settings(flags, contents, prompt, seed + i) for i, prompt in enumerate(prompts)
    ]
    todo = list(range(rank, len(prompts), world))
    # ValueError for a picture of other settings in a folder: it would be lost.
    finished = {i for i in todo if not single and png.is_finished(paths[i], settings[i])}
    # A file of thirty thousand captions is resumed: finished pictures are kept.
    if args.prompts is not None and args.save_latents is None:
        todo = [i for i in todo if i not in finished]
    latents = []
    if todo:
        config, size = build_config(args), (args.height, args.width)
        model, network, denoisers = build_network(args)
        print_cut(model, [args.negative_prompt or "", *(prompts[i] for i in todo)])
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
    if len(prompts) > 1 and args.prompts is None:
        write_grid(paths, output / "grid.png")
    print(f"{len(todo)} pictures sampled, {len(paths)} in {output}")


def print_cut(model: SDXL, prompts: list[str]) -> None:
    """A line for each prompt whose end the text encoders have no room for."""
    for prompt in dict.fromkeys(prompts):
        if tail := model.tokenizer.tail(prompt):
            print(f"prompt {prompt[:40]!r} ..: cut before {tail!r}, 75 tokens fit", file=sys.stderr)


@torch.no_grad()
def sample_all(
    config: SamplerConfig, model: SDXL, network, denoisers: list[nn.Module], jobs: list[Job],
    size: tuple[int, int], negative: str | None, batch_size: int, turn: int, device: str,
) -> Iterator[Tensor]:  # fmt: skip
    """Sample, decode and save pictures of a size (height, width); yields each batch's latents.

    denoisers: the modules that the network consists of. turn: how many pictures are encoded,
    denoised and decoded together, with the modules for it on the device and no others need be.
    Raises ValueError for latents that are not finite.
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
                for batch, (cond, negative_cond) in zip(batches, conds, strict=True):
                    null, seeds = pipeline.null_condition(cond), [job.seed for job in batch]
                    latents.append(pipeline.sample_latents(
                        config, network, cond, null, shape, seeds, device, negative_cond
                    ))  # fmt: skip
            with pipeline.on_device(device, model.vae):
                for batch, x_0 in zip(batches, latents, strict=True):
                    if not x_0.isfinite().all():
                        reason = "its latents are NaN or infinite; try --dtype float32"
                        raise ValueError(
                            f"{batch[0].path} would be black, with its batch: {reason}"
                        )
                    for job, image in zip(batch, to_images(model.vae.decode(x_0)), strict=True):
                        png.save_png(image, job.path, job.settings)
                    bar.update(len(batch))
                    yield x_0.cpu()


def split(items: list, size: int) -> list[list]:
    """Parts of this size in order, the last one smaller if need be."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def sampler_flags(add) -> None:
    """One way to sample: SamplerConfig's fields."""
    # None: as the LoRA's header says, else FROM_HEADER.
    add("--steps", type=cli.positive_int, help="number of steps, k: the LoRA's, or 4")
    add("--cfg", type=cli.non_negative,
        help="guidance g = 1 + w of Eq. 12, 1 is off: the LoRA's, or 2")  # fmt: skip
    add("--gamma", type=cli.share, help="gamma of Eq. 18 (--sampler tdd): the LoRA's, or 0.2")
    add("--schedule", choices=SCHEDULES, default="equidistant",
        help="rule for the k timesteps; the latter for K_min to K_max of the LoRA")  # fmt: skip
    add("--tcf", choices=TCF, help="f, the jump that the LoRA was trained with: the LoRA's, or 1")
    add("--clip-steps", type=cli.count, default=0, help="number of first steps with C (Eq. 17)")
    add("--clip-percentile", type=cli.share, default=0.995, help="percentile of C")
    add("--clip-max", type=cli.number(float, 1), default=1.0, help="largest s of C")
    add("--tune-guidance", type=cli.number(float, 1), nargs="?", const=FROM_LORA, metavar="G'",
        help="g' = 1 + w' that the LoRA was distilled with, as a number or from its header: --cfg "
             "then acts as the teacher's (Eq. 13)")  # fmt: skip
    add("--tell-k", type=cli.positive_int, metavar="K",
        help="K that a student of several is told: --steps, or the nearest it knows")  # fmt: skip
    add("--export-k", type=cli.positive_int, metavar="K",
        help="instead of sampling, write --lora for one K to --output, without a crop")  # fmt: skip
    add("--solver-steps", type=cli.positive_int,
        help="grid of the schedules, N: that of the LoRA or --unet, or 250")  # fmt: skip
    add("--sampler", choices=["tdd", *SOLVERS],
        help="gamma-sampler, or a solver for the plain model: the header's, or tdd")  # fmt: skip


def parser() -> cli.Parser:
    p = cli.Parser("Samples SDXL, or SDXL with LoRAs, in few steps.")
    gpu = torch.cuda.is_available()
    add = p.add_argument
    add("--model", type=Path, required=True, help="SDXL: a folder or one .safetensors")
    add("--tokenizer", type=Path, help="tokenizer's folder, where the model is a single file")
    add("--unet", type=Path, metavar="PATH", help="UNet instead of the model's: a folder or file")
    add("--vae", type=Path, metavar="PATH", help="VAE instead of the model's: a folder or file")
    add("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="LoRA file; repeatable")
    add("--prompt", action="append", metavar="TEXT", help="prompt; repeatable")
    add("--prompts", type=Path, metavar="FILE", help="file with a prompt a line; resumable")
    add("--negative-prompt", help="prompt for the null condition, instead of zeros")
    sampler_flags(add)
    add("--controlnet", action="append", type=Path, default=[], metavar="PATH",
        help="SDXL ControlNet, a folder or file; repeatable")  # fmt: skip
    add("--control-image", action="append", type=Path, default=[], metavar="PNG",
        help="canny or depth image for each --controlnet, in their order")  # fmt: skip
    add("--control-scale", action="append", type=cli.non_negative, default=[], metavar="S",
        help="strength of each --controlnet: 1")  # fmt: skip
    add("--seed", type=cli.number(int, 0, 2**62), default=0, help="random seed of the first image")
    add("--num-images", type=cli.positive_int, default=1, help="number of images of each prompt")
    add("--height", type=cli.number(int, 8), default=1024, help="height in pixels, a multiple of 8")
    add("--width", type=cli.number(int, 8), default=1024, help="width in pixels, a multiple of 8")
    add("--batch-size", type=cli.positive_int, default=1, help="number of images sampled together")
    add("--output", default="sample.png", help="PNG file, or folder")
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
