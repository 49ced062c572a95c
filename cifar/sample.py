"""Samples the CIFAR-10 teacher, or a student that train_toy.py has made of it.

    python train_toy.py --data cifar10 --sample tdd --steps 4 --labels cat ship

The sampler is tdd.gamma_sample, the flags are those of sample.py.
"""

import hashlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from cifar.data import CLASSES, condition, unfold
from common import cli, files
from common.files import read_tensors
from common.pictures import save_grid
from sdxl.load import load_component
from sdxl.lora import LoRA, merge
from sdxl.lora_files import read_lora
from sdxl.pipeline import DTYPES, SCHEDULES, null_of, tell, timesteps_of
from solvers import ddim, sdxl_schedule
from tcd import TCF
from tdd import clip_x0, gamma_sample, guided, noise_stream, tuned
from unet import UNet, UNetConfig

# ------------------------------------------------------------------------------------- networks
#
# A student is its teacher with a LoRA merged in: sampled as often as for the tables, the passes
# saved are worth a copy of so small a network.


def digest(folder: Path) -> str:
    """A finished teacher's or student's weights in a few letters, for what is made from them."""
    path = folder / "diffusion_pytorch_model.safetensors"
    path = path if path.exists() else folder / "lora.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def load_teacher(runs: Path, device, dtype: str = "float32") -> UNet:
    """The teacher of a folder of stages; ValueError if there is none."""
    if not (runs / "teacher/stage.json").exists():
        raise ValueError(f"{runs} holds no finished teacher: python train_toy.py --data cifar10")
    unet = load_component(runs / "teacher", UNet, UNetConfig, DTYPES[dtype])
    return unet.to(device, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Sampled:
    """A teacher, or a student with its LoRA merged in, and the jump to sample it with.

    N: the grid that it was trained on; to the teacher all are one.
    """

    unet: UNet
    lora: LoRA | None = None
    jump: object = ddim
    N: int = 50


def load_student(runs: Path, name: str, teacher: UNet) -> Sampled:
    """A student of this float32 teacher, its LoRA merged into a copy; ValueError if there is none.

    In float32 only: in half precision merging would round small updates away.
    """
    path = runs / name / "lora.safetensors"
    if not path.exists() or not path.with_name("stage.json").exists():
        there = " ".join(sorted(path.parent.name for path in runs.glob("*/lora.safetensors")))
        raise ValueError(f"{runs} holds no finished student {name!r}; there: {there or 'none'}")
    about = read_tensors(path)[1]
    if about.get("teacher") != digest(runs / "teacher"):
        raise ValueError(f"{path} is the student of another teacher than {runs / 'teacher'}")
    # Its LoRA is for the UNet alone; where the text encoders would be, nothing is.
    student, encoder = deepcopy(teacher), nn.Module()
    lora, *_ = read_lora(path, teacher, encoder, encoder)
    merge(student, lora.to(teacher.conv_in.weight.device))
    return Sampled(student, lora, TCF[about.get("tcf", "1")], int(about["solver_steps"]))


# ------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def pictures(
    model: Sampled, label: Tensor, seeds, timesteps, w: float, gamma: float, clip_steps: int,
) -> Iterator[Tensor]:  # fmt: skip
    """Batches of pictures (b, 3, 32, 32) in uint8 for labels (n,), picture i from seeds[i].

    w of Eq. 12, gamma of Eq. 18; C of Eq. 17, which clips x_0 to [-1, 1], in the first clip_steps.
    """
    device, schedule = model.unet.conv_in.weight.device, sdxl_schedule()
    network, clip = tell(model.unet, model.lora, len(timesteps)), (clip_x0, clip_steps)
    # On a CPU no more at a time than its caches hold: a fifth faster than 200.
    batch = 50 if device.type == "cpu" else 500
    for start in range(0, len(label), batch):
        part = slice(start, start + batch)
        cond = condition(label[part].to(device))
        noise = noise_stream(seeds[part], (12, 16, 16), device)
        eps = guided(network, cond, null_of(cond), w)
        x_T = next(noise).to(memory_format=torch.channels_last)
        x_0 = gamma_sample(eps, x_T, timesteps, schedule, gamma, noise, *clip, model.jump)
        yield unfold(x_0).cpu()  # (b, 3, 32, 32)


# -------------------------------------------------------------------------------------------- main


def main(args) -> None:
    cli.check_device(args.device)
    model = Sampled(load_teacher(args.runs, args.device))
    if args.sample != "teacher":
        model = load_student(args.runs, args.sample, model.unet)
    args.solver_steps = args.solver_steps or model.N
    timesteps = timesteps_of(args)
    # In terms of g = 1 + w guidance multiplies: Eq. 13 divides out what was distilled.
    w = args.cfg - 1
    if args.tune_guidance is not None:
        w = tuned(w, args.tune_guidance)
    clip_steps = args.steps if args.clip_steps is None else args.clip_steps
    # All classes, then all again: a column of the grid is then a class.
    label = torch.tensor([CLASSES.index(name) for name in args.labels] * args.num_images)
    seeds = range(args.seed, args.seed + len(label))
    drawn = torch.cat([*pictures(model, label, seeds, timesteps, w, args.gamma, clip_steps)])
    grid = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in drawn]
    files.output_folder(args.output.parent)
    save_grid(grid, args.output, len(args.labels))
    print(f"{len(label)} pictures of {args.sample} in {args.steps} steps: {args.output}")


def parser() -> cli.Parser:
    p = cli.Parser("Samples the CIFAR-10 teacher or a student of it, a column a class.")
    flag, number, gpu = p.add_argument, cli.number, torch.cuda.is_available()
    whole, share = number(int, 1), number(float, 0, 1)
    flag("--data", choices=["cifar10"], default="cifar10", help="what was trained on")
    flag("--sample", required=True, metavar="NAME", help="teacher, or a student, such as tdd")
    flag("--runs", type=Path, default=Path("runs/cifar10"), help="the folder it was trained into")
    flag("--labels", nargs="+", choices=CLASSES, default=CLASSES, metavar="CLASS", help="to draw")
    flag("--num-images", type=whole, default=8, help="pictures of each class")
    flag("--steps", type=whole, default=4, help="k, the number of steps")
    flag("--cfg", type=number(float, 0), default=1.0, help="g = 1 + w of Eq. 12; a teacher wants 3")
    flag("--tune-guidance", type=number(float, 0), metavar="W'",
         help="w' of the student's training: --cfg then acts as the teacher's, Eq. 13")  # fmt: skip
    flag("--gamma", type=share, default=0.2, help="gamma of Eq. 18")
    flag("--schedule", choices=SCHEDULES, default="equidistant",
         help="the k timesteps; the latter for 4 to 8 steps")  # fmt: skip
    flag("--solver-steps", type=whole, help="N, the grid of the schedules; else the student's own")
    flag("--clip-steps", type=number(int, 0), help="first steps with C (Eq. 17); all unless given")
    flag("--seed", type=number(int, 0, 2**62), default=0, help="of the first picture")
    flag("--output", type=Path, default=Path("cifar.png"), help="PNG, pictures in a grid")
    flag("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    return p
