"""CIFAR-10 through the code of SDXL: classifier, teacher, students, evaluation.

    python train_toy.py --data cifar10                  everything, into runs/cifar10
    python train_toy.py --data cifar10 --preset gpu     a larger teacher, for a large GPU

A student is trained by what train_sdxl.py trains with: LoRA, Distillation and trainer.fit. What is
finished is used again, what was interrupted goes on, and other settings than before are refused.
"""

import argparse
import shutil
import statistics
import time
import zlib
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import train_sdxl
from cifar import figures
from cifar.classifier import Classifier, shifted
from cifar.data import Batches, condition, fold, read_split, teacher_loss, unet_json
from cifar.evaluate import HIGH, Evaluation
from cifar.sample import digest, load_teacher
from common import cli, files
from common.compare import PASSES
from common.files import read_json, read_tensors
from sdxl import pipeline
from sdxl.load import assign
from sdxl.lora_files import write_peft
from sdxl.pipeline import null_of
from solvers import sdxl_schedule
from tdd import ema_update, targets_of
from toy.tdm import MATCHED
from training import build, distributed, loop
from unet import UNet, UNetConfig

# Every student in the flags of train_sdxl.py; what is not named is the same for all.
STUDENTS = {
    "lcm": "--method cm", "pcm4": "--method pcm --kmin 4", "tcd": "--method tcd",
    "tdd_eta0": "--method tdd --eta 0", "tdd": "--method tdd", "tdd_adv": "--method tdd --adv",
    # The guidance study: no null conditions, and a w' that Eq. 13 is to tune down.
    "tdd_rho0": "--method tdd --rho 0", "tdd_high": f"--method tdd --guidance {HIGH}",
    # The other papers: TCD's functions of second order and told of s, TDM for 4 and for 1, 2, 4.
    "tcd2": "--method tcd --tcf 2", "tcds": "--method tcd --tcf s",
    "tdds": "--method tdd --tcf s",
    "tdm4": "--method tdm --ks 4", "tdm_unify": "--method tdm --ks 1 2 4",
}  # fmt: skip
PRESETS = {
    "cpu": {
        "device": "cpu", "dtype": "float32", "compile": False, "channels": [64, 128],
        "classifier_steps": 2400, "teacher_steps": 10_250, "teacher_batch": 32,
        "steps": 1600, "batch_size": 16, "samples": 2000,
    },
    "gpu": {
        "device": "cuda", "dtype": "bf16", "compile": True, "channels": [192, 384],
        "classifier_steps": 6000, "teacher_steps": 12_000, "teacher_batch": 256,
        "steps": 2000, "batch_size": 128, "samples": 10_000,
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------ stages
#
# Classifier, teacher and each student are a folder each. stage.json is written last: with it the
# stage is finished, without it there may be a checkpoint to go on from.


@dataclass
class Stage:
    """One training: its folder, and all that its result depends on."""

    folder: Path
    settings: dict
    data: tuple[Tensor, Tensor]
    steps: int
    batch_size: int
    seed: int

    def __post_init__(self):
        crc = zlib.crc32(self.data[1].numpy(), zlib.crc32(self.data[0].numpy()))
        own = {"steps": self.steps, "batch_size": self.batch_size, "seed": self.seed}
        self.settings = own | self.settings | {"data": f"{crc:08x}"}
        self.settings = {name: str(value) for name, value in self.settings.items()}

    def finished(self) -> bool:
        """Whether its result is there; ValueError if it, or what has begun, has other settings."""
        path = self.folder / "stage.json"
        if not path.exists():
            self._resume_point()
            return False
        if differ := files.difference(read_json(path).get("settings", {}), self.settings):
            raise ValueError(
                f"{self.folder} was made with {differ}: give the same, or name another --output"
            )
        print(f"{self.folder.name}: finished before, used again")
        return True

    def _resume_point(self) -> tuple[Path | None, dict]:
        # Not even the steps are free: the learning rate is a function of them.
        return loop.resume_point(self.folder, True, self.settings, free=())

    def train(self, modules, optimizers, losses, export, rate=lambda s: 1, after=lambda: None):
        """From the last checkpoint, if any, to the end: losses(batch, generator), export(folder).

        rate(s) is the share of the learning rate after the share s of all steps.
        """
        files.output_folder(self.folder)
        point, config = self._resume_point()
        place = config["positions"][0] if point else 0
        loader = Batches(*self.data, self.batch_size, self.seed, place)
        generator = torch.Generator().manual_seed(self.seed)
        run = loop.Run(self.folder, modules, optimizers, generator, loader, self.settings)
        if point:
            run.restore(point, config)
        print(f"{self.folder.name}: {self.steps} steps of {self.batch_size} pictures")
        plan = loop.Plan(
            self.steps, lambda step: rate(step / self.steps), save_every=250, keep=1,
            again="the same command",
        )  # fmt: skip
        loop.fit(run, plan, partial(losses, generator=generator), after)
        export(self.folder)
        # At its median speed: what else ran on the machine meanwhile is not the stage's own.
        speed = statistics.median(line["images_per_s"] for line in run.log)
        seconds = self.steps * self.batch_size / speed
        content = {"settings": self.settings, "seconds": round(seconds, 1)}
        files.write_json(self.folder / "stage.json", content)
        for old in loop.checkpoints(self.folder):
            shutil.rmtree(old)


def save_network(network: nn.Module, name: str, folder: Path) -> None:
    files.write_tensors(folder / f"{name}.safetensors", network.state_dict(), format="pt")


# -------------------------------------------------------------------------- classifier and teacher
#
# Once trained, both are fixed points of the comparison: students are distilled from this teacher's
# file and judged by this classifier's, and a student's settings hold the digest of the former.


def classifier_stage(args, data) -> Stage:
    return Stage(args.output / "classifier", {}, data, args.classifier_steps, 128, args.seed)


def train_classifier(args, stage: Stage) -> None:
    """The judge."""
    torch.manual_seed(args.seed)
    classifier = Classifier().to(args.device, memory_format=torch.channels_last)

    def losses(batch: dict, generator) -> dict:
        by = torch.randint(0, 9, (len(batch["labels"]), 2), generator=generator)
        images = shifted(batch["images"], by).to(args.device)
        batch["timesteps"] = torch.zeros(0)
        logits = classifier(fold(images))[1]
        # A tenth of the label is spread over all classes.
        loss = cross_entropy(logits, batch["labels"].to(args.device), label_smoothing=0.1)
        return {"total": loss, "loss": loss}

    # A fifth of the way up, then down to zero.
    optimizers = {"adam": loop.adamw(classifier.parameters(), 3e-3)}
    stage.train(
        {"classifier": classifier}, optimizers, losses, partial(save_network, classifier, "model"),
        rate=lambda s: min((s + 0.001) / 0.2, (1 - s) / 0.8),
    )  # fmt: skip


def teacher_stage(args, data) -> Stage:
    kept = ("channels", "teacher_lr", "teacher_ema", "drop", "dtype")
    settings = {name: getattr(args, name) for name in kept}
    folder = args.output / "teacher"
    return Stage(folder, settings, data, args.teacher_steps, args.teacher_batch, args.seed)


def train_teacher(args, stage: Stage) -> None:
    """The teacher, saved as a UNet in diffusers' layout: the moving average of what is trained."""
    torch.manual_seed(args.seed)
    config, schedule = unet_json(args.channels), sdxl_schedule().to(args.device)
    unet = UNet(UNetConfig.from_json(config)).to(args.device, memory_format=torch.channels_last)
    ema = deepcopy(unet).requires_grad_(False)
    if args.compile:
        pipeline.compile_blocks(unet)

    def losses(batch: dict, generator) -> dict:
        x_0, label = fold(batch["images"]), batch["labels"]
        t = torch.randint(schedule.T, (len(label),), generator=generator)
        eps = torch.randn(x_0.shape, generator=generator)
        kept = torch.rand(len(label), generator=generator) >= args.drop
        batch["timesteps"] = t
        x_0, label, t, eps, kept = (a.to(args.device) for a in (x_0, label, t, eps, kept))
        half = args.dtype == "bf16"
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=half):
            loss = teacher_loss(unet, x_0, condition(label, kept), t, eps, schedule)
        return {"total": loss, "loss": loss}

    def export(folder: Path) -> None:
        save_network(ema, "diffusion_pytorch_model", folder)
        files.write_json(folder / "config.json", config)

    # Constant, after a start of a fiftieth, and down to zero over the last two fifths.
    stage.train(
        {"teacher": unet, "ema": ema},
        {"adam": loop.adamw(unet.parameters(), args.teacher_lr)},
        losses, export, lambda s: min(1, (s + 0.001) / 0.02, (1 - s) / 0.4),
        partial(ema_update, list(ema.parameters()), list(unet.parameters()), args.teacher_ema),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- students
#
# Nothing of Algorithm 1 is here: targets, draws, loss and networks are those of train_sdxl.py, made
# from its own flags. What CIFAR-10 brings is x_0 and the condition.


def student_args(args, name: str):
    """The flags with which train_sdxl.py would train this student."""
    common = {
        "model": args.output / "teacher", "data": args.data_dir, "output": args.output / name,
        "guidance": args.guidance - 1, "solver-steps": args.solver_steps, "rank": args.rank,
        "lora-alpha": args.rank, "dtype": args.dtype, "device": args.device, "seed": args.seed,
        "batch-size": args.batch_size,
    }  # fmt: skip
    if name in MATCHED:
        # The student's rate is lower than the fake score's, as in the paper.
        common |= {"lr": args.lr / 5, "fake-lr": args.lr}
    else:
        # Pseudo-Huber, as published: under the squared distance the highest noise decides alone.
        common |= {"lr": args.lr, "adv-lr": args.lr, "ema": args.ema, "rho": args.rho,
                   "kmin": args.kmin, "kmax": args.kmax, "loss": "huber"}  # fmt: skip
    flags = [word for k, v in common.items() for word in (f"--{k}", str(v))]
    flags += [*STUDENTS[name].split(), "--no-checkpointing", *["--compile"] * args.compile]
    own = train_sdxl.parser().parse_args(flags)
    train_sdxl.check(own)
    # A step's UNet passes differ: all are to have as many as TDD. (The adversary's come on top.)
    passes = PASSES[name if name in MATCHED else own.tcf]
    own.steps = round(args.steps * PASSES["1"] / passes)
    return own


def student_stage(args, name: str, data) -> Stage:
    own = student_args(args, name)
    kept = ("method", "guidance", "solver_steps", "rho", "eta", "kmin", "kmax", "lr", "rank", "tcf",
            "ema", "loss", "solver", "adv", "adv_weight", "adv_lr", "dtype", "ks", "fake_lr",
            "fake_weight")  # fmt: skip
    settings = {key: getattr(own, key) for key in kept}
    settings["teacher"] = digest(args.output / "teacher")
    return Stage(args.output / name, settings, data, own.steps, args.batch_size, args.seed)


def train_student(args, stage: Stage) -> None:
    """A student's LoRA by Algorithm 1, on the teacher that lies beside it."""
    own = student_args(args, stage.folder.name)
    # Each student's graphs are its own; those of the last one only count against the limit.
    torch._dynamo.reset()
    teacher = load_teacher(args.output, args.device, args.dtype)
    nets = build.distillation_of(own, teacher, args.device)

    def losses(batch: dict, generator) -> dict:
        x_0 = fold(batch["images"]).to(args.device)
        cond = condition(batch["labels"].to(args.device))
        draws = nets.draw(x_0.shape, generator, args.device)
        batch["timesteps"] = draws.timesteps
        # TDM has no use for pictures, only for their labels.
        data = () if own.method == "tdm" else (x_0,)
        return nets.losses(*data, cond, null_of(cond), draws)

    def export(folder: Path) -> None:
        write_peft(folder / "lora.safetensors", nets.result.lora, **stage.settings)

    optimizers = build.optimizers_of(own, nets)
    stage.train(nets.modules, optimizers, losses, export, after=nets.after_step)


# -------------------------------------------------------------------------------------------- main
#
# What is refused is refused before the first hour of training: flags, data, and whatever lies in
# the folder with other settings.


def check(args) -> None:
    """Flags that no flag's own type can refuse; ValueError in one line."""
    cli.check_device(args.device)
    if distributed.identity(args.device)[1] > 1:
        raise ValueError("CIFAR-10 takes one process: start it without torchrun")
    if any(c % 32 for c in args.channels) or len(args.channels) > 4:
        raise ValueError(f"--channels {args.channels}: up to 4 levels, of a multiple of 32 each")
    # Of whatever targets: all are sampled in kmin to kmax steps.
    targets_of("tdd", args.solver_steps, args.kmin, args.kmax)
    args.methods = list(dict.fromkeys(args.methods))
    for name in args.methods:
        student_args(args, name)


def train_all(args, data) -> None:
    """Whatever is not finished, each stage from the one before."""
    first = [(classifier_stage, train_classifier), (teacher_stage, train_teacher)]
    stages = [(make(args, data), train) for make, train in first]
    for stage, train in [pair for pair in stages if not pair[0].finished()]:
        train(args, stage)
    students = [student_stage(args, name, data) for name in args.methods]
    for stage in [stage for stage in students if not stage.finished()]:
        train_student(args, stage)


def main(args) -> None:
    start = time.time()
    check(args)
    train, test = (read_split(args.data_dir, train=t) for t in (True, False))
    if args.samples > (most := min(len(train[1]), len(test[1]))):
        raise ValueError(f"--samples {args.samples}: there are {most} real ones to compare with")
    train_all(args, train)
    path = args.output / "classifier/model.safetensors"
    classifier = assign(Classifier(), read_tensors(path)[0], path).to(args.device)
    ev = Evaluation(args, classifier, train, test)
    ev.run(args.methods)
    write_metrics(args, ev)
    figures.draw_all(args.output, ev)
    print("\n\n".join(ev.tables()))
    print(f"The classifier is right about {ev.accuracy:.1%} of the test pictures.")
    print(f"{time.time() - start:.0f} s; metrics.json and the pictures are in {args.output}/")


def write_metrics(args, ev: Evaluation) -> None:
    """metrics.json: settings, every stage's seconds, the judge's accuracy, and all rows."""
    settings = {key: str(value) for key, value in vars(args).items()}
    stages = ["classifier", "teacher", *args.methods]
    seconds = {name: read_json(args.output / name / "stage.json")["seconds"] for name in stages}
    content = {"settings": settings | {"torch": torch.__version__}, "training_seconds": seconds}
    content |= {"classifier_accuracy": ev.accuracy, "rows": ev.rows}
    files.write_json(args.output / "metrics.json", content)


def parser(preset: str | None = None) -> cli.Parser:
    """With a preset's numbers as defaults; an unknown one is for the flag itself to refuse."""
    preset = preset if preset in PRESETS else "cpu"
    about = "Trains a CIFAR-10 teacher, distils it with TDD and its rivals, compares them."
    p = cli.Parser(f"{about} With --sample NAME it samples one of them, by flags of its own.")
    flag, number = p.add_argument, cli.number
    whole, share = number(int, 1), number(float, 0, 1)
    flag("--data", choices=["cifar10"], default="cifar10", help="the 2-D sets have their own flags")
    flag("--preset", choices=PRESETS, default=preset, help="decides the defaults below")
    flag("--data-dir", type=Path, default=Path("data/cifar-10-batches-bin"), help="the binaries")
    flag("--output", type=Path, default=Path("runs/cifar10"), help="folder for all stages")
    flag("--methods", nargs="+", choices=STUDENTS, default=list(STUDENTS), metavar="M",
         help=f"students, of {' '.join(STUDENTS)}")  # fmt: skip
    flag("--channels", type=whole, nargs="+", metavar="C", help="of the UNet's levels")
    flag("--classifier-steps", type=whole, help="the judge's, of 128 pictures")
    flag("--teacher-steps", type=whole, help="the teacher's")
    flag("--teacher-batch", type=whole, help="pictures a step of the teacher")
    flag("--teacher-lr", type=number(float, 0), default=1e-3, help="learning rate of the teacher")
    flag("--teacher-ema", type=share, default=0.998, help="of the teacher's weights")
    flag("--drop", type=share, default=0.12, help="share of null conditions for the teacher")
    flag("--steps", type=whole, help="training steps of each student")
    flag("--batch-size", type=whole, help="pictures a step of a student")
    flag("--lr", type=number(float, 0), default=4e-4, help="delta, the students' learning rate")
    flag("--ema", type=share, default=0.99, help="mu of the target network theta-")
    flag("--rank", type=whole, default=32, help="r of the LoRA, whose alpha is the same")
    flag("--kmin", type=whole, default=4, help="K_min, fewest steps to distil for")
    flag("--kmax", type=whole, default=8, help="K_max, most steps to distil for")
    flag("--rho", type=share, default=0.2, help="rho, share of null conditions")
    flag("--guidance", type=number(float, 1, 100), default=3.0, help="g = 1 + w', to distil")
    flag("--solver-steps", type=whole, default=50, help="N, steps of the teacher's solver")
    flag("--samples", type=number(int, 16), help="pictures that each figure is taken from")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of all random numbers")
    flag("--dtype", choices=["float32", "bf16"], help="bf16 pays on CPUs with AVX-512 or AMX too")
    flag("--device", help="cpu or cuda")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile UNet blocks")
    p.set_defaults(**PRESETS[preset])
    return p
