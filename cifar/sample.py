"""Samples the CIFAR-10 teacher, or a student that cifar/train.py has made of it.

    python train_toy.py --data cifar10 --sample tdd --steps 4 --labels cat ship

The sampler is tdd.gamma_sample, the flags are those of sample.py.
"""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from cifar.data import CLASSES, condition, to_bytes
from cifar.stage import read_stage, weights_digest
from common import cli, files
from common.compare import Case, case_timesteps
from common.pictures import save_grid
from sdxl import num_steps
from sdxl.load import load_component
from sdxl.lora import merge
from sdxl.lora_files import read_lora
from sdxl.pipeline import DTYPES, SCHEDULES, null_condition, scalar_network
from sdxl.png import names_png
from sdxl.recipe import RECOMMENDED
from sdxl.weights import use_exact_float32
from solvers import ddim, noise_stream, sdxl_schedule
from tcd import TCF
from tdd import clip_x0, gamma_sample, guided
from unet import ScalarEmbedding, UNet, UNetConfig

# ------------------------------------------------------------------------------------- networks
#
# A student is its teacher with the LoRA merged in: it is sampled many times for the tables, and a
# copy of so small a network costs little.


@dataclass(frozen=True)
class LoadedModel:
    """A teacher, or a student with its LoRA merged in, and how to sample it."""

    unet: UNet
    scalar_embedding: ScalarEmbedding | None = None  # of students that take a scalar as an input
    jump: object = ddim
    solver_steps: int = 50  # N of a student's training, the grid of its schedules
    kmin: int = 4  # K's range in a student's training
    kmax: int = 8
    gamma: float = 0.0  # that its method is sampled with
    told_ks: tuple[int, ...] = ()  # the K that it is told apart


SHIPPED = Path(__file__).with_name("weights")  # stages that come with the code


def load_teacher(runs: Path, device, dtype: str = "float32") -> UNet:
    """The teacher of a folder of stages; ValueError if there is none."""
    if read_stage(runs / "teacher") is None:
        raise ValueError(f"{runs} holds no finished teacher: python train_toy.py --data cifar10")
    unet = load_component(runs / "teacher", UNet, UNetConfig, DTYPES[dtype])
    return unet.to(device, memory_format=torch.channels_last)


def load_student(runs: Path, name: str, teacher: UNet) -> LoadedModel:
    """A student, its LoRA merged into a copy of its float32 teacher; ValueError without one."""
    path = runs / name / "lora.safetensors"
    if not path.exists() or read_stage(path.parent) is None:
        students = " ".join(sorted(path.parent.name for path in runs.glob("*/lora.safetensors")))
        raise ValueError(f"{runs} holds no finished student {name!r}; there: {students or 'none'}")
    settings = files.read_tensors(path)[1]
    if settings.get("teacher") != weights_digest(runs / "teacher"):
        raise ValueError(f"{path} is the student of another teacher than {runs / 'teacher'}")
    student = deepcopy(teacher)
    # An empty module stands in for each text encoder: the LoRA is for the UNet alone.
    no_encoder = nn.Module()
    lora = read_lora(path, teacher, no_encoder, no_encoder)[0].float()
    # In half precision this would round small updates away.
    merge(student, [(lora, 1.0)])
    _, gamma = RECOMMENDED[settings["method"]]
    if settings["method"] == "tdd" and settings["Ks"] != "[]":
        gamma = 0.0  # it is trained for the stops alone
    return LoadedModel(
        student, lora.scalar_embedding, TCF[settings.get("tcf", "1")],
        int(settings["solver_steps"]), int(settings.get("kmin", 4)), int(settings.get("kmax", 8)),
        gamma, tuple(json.loads(settings.get("told_ks", "[]"))),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample_pictures(
    model: LoadedModel, label: Tensor, seeds, timesteps: list[int], case: Case
) -> Tensor:
    """Pictures (n, 3, 32, 32) in uint8 for labels (n,), picture i from seeds[i].

    Raises ValueError for samples that are not finite.
    """
    device, schedule, pictures = model.unet.conv_in.weight.device, sdxl_schedule(), []
    network = scalar_network(model.unet, model.scalar_embedding)
    network = num_steps.with_nearest_k(network, case.tell_k or len(timesteps), model.told_ks)
    # On a CPU 50 fit into the caches, which is a fifth faster than 200.
    batch_size = 50 if device.type == "cpu" else 500
    for start in range(0, len(label), batch_size):
        batch = slice(start, start + batch_size)
        cond = condition(label[batch].to(device))
        eps = guided(network, cond, null_condition(cond), case.w_inference)
        noise = noise_stream(seeds[batch], (12, 16, 16), device)
        x_T = next(noise).to(memory_format=torch.channels_last)
        # C of Eq. 17 clips x_0 to [-1, 1].
        x_0 = gamma_sample(
            eps, x_T, timesteps, schedule, case.gamma, noise, clip_x0, case.clip_steps, model.jump
        )
        if not x_0.isfinite().all():
            raise ValueError("samples are not finite: a diverged network, or too large a guidance")
        pictures.append(to_bytes(x_0).cpu())
    return torch.cat(pictures)


# -------------------------------------------------------------------------------------------- main


def main(args) -> None:
    cli.check_device(args.device)
    use_exact_float32(torch.float32)
    if args.sample == "teacher" and args.tune_guidance is not None:
        raise ValueError("--tune-guidance is for a student: no guidance is distilled in a teacher")
    if not names_png(str(args.output), several=False):
        raise ValueError(f"--output {args.output}: the grid is one PNG file: name it .png")
    files.output_folder(args.output.parent)
    if args.runs is None:
        args.runs = Path("runs/cifar10")
        stage = Path(args.sample, "stage.json")
        if not (args.runs / stage).exists() and (SHIPPED / stage).exists():
            args.runs = SHIPPED
            print(f"runs/cifar10 holds no finished {args.sample}: the weights are {SHIPPED}'s")
    model = LoadedModel(load_teacher(args.runs, args.device))
    if args.sample != "teacher":
        model = load_student(args.runs, args.sample, model.unet)
    K = num_steps.choose_k(args.tell_k, args.steps, model.told_ks, args.sample)
    tune = None if args.tune_guidance is None else args.tune_guidance - 1
    clip_steps = args.steps if args.clip_steps is None else args.clip_steps
    gamma = model.gamma if args.gamma is None else args.gamma
    case = Case(args.steps, gamma, args.schedule, args.cfg - 1, tune, clip_steps, K)
    N = args.solver_steps or model.solver_steps
    timesteps = case_timesteps(case, N, model.kmin, model.kmax)
    print(f"guidance g = {args.cfg:g} (w = {case.w:g}), applied as w = {case.w_inference:.3g}; "
          f"gamma = {gamma:g}")  # fmt: skip
    # All classes, then all again: a column of the grid is then a class.
    label = torch.tensor([CLASSES.index(name) for name in args.labels] * args.num_images)
    seeds = range(args.seed, args.seed + len(label))
    pictures = sample_pictures(model, label, seeds, timesteps, case).permute(0, 2, 3, 1).numpy()
    save_grid([Image.fromarray(x) for x in pictures], args.output, columns=len(args.labels))
    print(f"{len(label)} pictures of {args.sample} in {args.steps} steps: {args.output}")


def parser() -> cli.Parser:
    p = cli.Parser(
        "Samples the CIFAR-10 teacher or a student of it, a column for each class. Guidance is "
        "g = 1 + w, with the paper's w."
    )
    flag, count, gpu = p.add_argument, cli.positive_int, torch.cuda.is_available()
    flag("--data", choices=["cifar10"], default="cifar10", help="data set")
    flag("--sample", required=True, metavar="NAME", help="network: teacher, or a student like tdd")
    flag("--runs", type=Path,
         help="folder of the trained stages: runs/cifar10, or the weights shipped")  # fmt: skip
    flag("--labels", nargs="+", choices=CLASSES, default=CLASSES, metavar="CLASS", help="classes")
    flag("--num-images", type=count, default=8, help="number of pictures of each class")
    flag("--steps", type=count, default=4, help="number of steps k")
    flag("--cfg", type=cli.non_negative, default=1.0, help="guidance g, Eq. 12; a teacher wants 3")
    flag("--tune-guidance", type=cli.number(float, 1), metavar="G'",
         help="guidance g' of the student; --cfg then acts as on the teacher (Eq. 13)")  # fmt: skip
    flag("--gamma", type=cli.share, help="gamma of Eq. 18: that of the student's method")
    flag("--schedule", choices=SCHEDULES, default="equidistant",
         help="timesteps; nonequidistant from the student's fewest to its most steps")  # fmt: skip
    flag("--tell-k", type=count, metavar="K", help="K that a student that is told K is told: k")
    flag("--solver-steps", type=count, help="N, grid of the schedules; the student's unless given")
    flag("--clip-steps", type=cli.count, help="first steps with C of Eq. 17; all unless given")
    flag("--seed", type=cli.number(int, 0, 2**62), default=0, help="seed of the first picture")
    flag("--output", type=Path, default=Path("cifar.png"), help="PNG file, pictures in a grid")
    flag("--device", default="cuda" if gpu else "cpu", help="device, cpu or cuda")
    return p
