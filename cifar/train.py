"""CIFAR-10 through the code of SDXL: classifier, teacher, students, evaluation.

    python train_toy.py --data cifar10                  everything, into runs/cifar10
    python train_toy.py --data cifar10 --preset gpu     a larger teacher, for a large GPU

A finished stage is used again, an interrupted one is resumed, and changed settings are refused.
"""

import argparse
import sys
import time
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cifar import figures
from cifar.classifier import BORDER, Classifier, random_crop
from cifar.config import METHODS, PATHS, REPEATED, SEED, WALKERS, CifarConfig, student_config
from cifar.data import CLASSES, condition, read_split, teacher_loss, to_x0, unet_json
from cifar.evaluate import Evaluation
from cifar.sample import load_teacher
from cifar.stage import Stage, read_stage, weights_digest
from common import cli, files
from common.compare import PASSES, equal_budget_steps, path_steps
from sdxl import num_steps
from sdxl.lora_files import write_diffusers
from sdxl.pipeline import compile_blocks, null_condition
from sdxl.weights import load_strict, use_exact_float32
from solvers import sdxl_schedule
from tdd import ema_update, equidistant, targets_of
from training import distributed, loop
from training.build import DistillConfig, build_optimizers, build_step
from training.paths import PathLoader, count_walkers, start_steps
from unet import UNet, UNetConfig

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
CLASSIFIER_BATCH = 128


# ---------------------------------------------------------------------------------------- stages
#
# Whatever a stage's result depends on is among its settings. Classifier and teacher are the fixed
# points of the comparison: a student's settings hold the digest of its teacher's weights.


def build_stage(config: CifarConfig, name: str, data: tuple[Tensor, Tensor]) -> Stage:
    """The classifier, the teacher, or a student of the finished teacher, with all its settings."""
    folder, seed = config.output / name, config.seed
    if name == "classifier":
        return Stage(folder, data, config.classifier_steps, CLASSIFIER_BATCH, seed)
    if name == "teacher":
        settings = ["channels", "teacher_lr", "teacher_ema", "drop", "dtype"]
        values = {setting: getattr(config, setting) for setting in settings}
        return Stage(folder, data, config.teacher_steps, config.teacher_batch, seed, values)
    student = student_config(config, name)
    # The settings that matter to the method: they also go into the header of the LoRA.
    settings = ["method", "solver", "solver_steps", "rank", "lr", "loss", "Ks"]
    if student.told_ks:
        settings += ["told_ks", "k_lr"]
    if student.method == "tdm":
        settings += ["fake_lr", "fake_weight"]
    else:
        settings += ["tcf", "kmin", "kmax", "eta", "rho", "mu", "adv", "adv_weight", "adv_lr"]
        settings += ["pairs"]
    values = {"guidance": 1 + student.w[0], "dtype": config.dtype}
    values |= {setting: getattr(student, setting) for setting in settings}
    # Lists are JSON as strings as well.
    values |= {name: [*values[name]] for name in ("Ks", "told_ks") if name in values}
    values["teacher"] = weights_digest(config.output / "teacher")
    # Every student has as many UNet passes as TDD; the discriminator's are not counted.
    steps = equal_budget_steps(config.steps, name if name in PASSES else student.tcf)
    if student.pairs == "teacher":
        values["walkers"] = W = count_walkers(config.batch_size, config.walkers)
        staggering = start_steps(W, config.solver_steps)
        steps = path_steps(steps, config.batch_size, staggering, student.tcf)
    return Stage(folder, data, steps, config.batch_size, student.seed, values)


def train_all(config: CifarConfig, data: tuple[Tensor, Tensor]) -> None:
    """Train every stage that is not finished, each from the ones before."""
    train = {"classifier": train_classifier, "teacher": train_teacher}
    for names in (("classifier", "teacher"), config.methods):
        stages = [build_stage(config, name, data) for name in names]
        # All settings are compared before the first training.
        for stage in [stage for stage in stages if not stage.finished()]:
            train.get(stage.folder.name, train_student)(config, stage)


# ---------------------------------------------------------------------------------------- training
#
# Nothing of Algorithm 1 stands here: targets, random numbers, losses and networks of the students
# are SDXL's, from training/, and so is the loop. CIFAR-10 brings x_0 and the condition.


def half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in half precision: what is distilled and measured is then what a small file holds."""
    return {k: x.half() if x.is_floating_point() else x for k, x in weights.items()}


def train_classifier(config: CifarConfig, stage: Stage) -> None:
    """The classifier, saved as model.safetensors."""
    torch.manual_seed(config.seed)
    classifier = Classifier().to(config.device, memory_format=torch.channels_last)

    def losses(batch: dict, generator) -> dict:
        size = len(batch["labels"])
        corners = torch.randint(0, 2 * BORDER + 1, (size, 2), generator=generator)
        images = random_crop(batch["images"], corners).to(config.device)
        batch["timesteps"] = torch.zeros(0)
        _, logits = classifier(to_x0(images))
        # A tenth of the label is spread over all classes.
        loss = cross_entropy(logits, batch["labels"].to(config.device), label_smoothing=0.1)
        return {"total": loss, "loss": loss}

    stage.train(
        {"classifier": classifier}, {"adam": loop.adamw(classifier.parameters(), 3e-3)}, losses,
        export=lambda folder: files.write_tensors(
            folder / "model.safetensors", half(classifier.state_dict()), format="pt"),
        # Up for a fifth of the steps, then down to zero.
        lr_lambda=lambda s: min((s + 0.001) / 0.2, (1 - s) / 0.8),
    )  # fmt: skip


def train_teacher(config: CifarConfig, stage: Stage) -> None:
    """The teacher's moving average, saved as a UNet in diffusers' layout."""
    torch.manual_seed(config.seed)
    device, schedule = config.device, sdxl_schedule()
    unet_config = unet_json(config.channels)
    unet = UNet(UNetConfig.from_json(unet_config)).to(device, memory_format=torch.channels_last)
    ema = deepcopy(unet).requires_grad_(False)
    if config.compile:
        compile_blocks(unet)

    def losses(batch: dict, generator) -> dict:
        x_0, label = to_x0(batch["images"]).to(device), batch["labels"]
        t = torch.randint(schedule.T, label.shape, generator=generator)
        eps = torch.randn(x_0.shape, generator=generator).to(device)
        keep_label = torch.rand(label.shape, generator=generator) >= config.drop
        batch["timesteps"] = t
        cond = condition(label.to(device), keep_label.to(device))
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            loss = teacher_loss(unet, x_0, cond, t.to(device), eps, schedule)
        return {"total": loss, "loss": loss}

    def export(folder: Path) -> None:
        path = folder / "diffusion_pytorch_model.safetensors"
        files.write_tensors(path, half(ema.state_dict()), format="pt")
        files.write_json(folder / "config.json", unet_config)

    ema_weights, weights = list(ema.parameters()), list(unet.parameters())
    stage.train(
        {"teacher": unet, "ema": ema}, {"adam": loop.adamw(weights, config.teacher_lr)},
        losses, export,
        # Up for a fiftieth of the steps, constant, and down to zero over the last two fifths.
        lr_lambda=lambda s: min(1, (s + 0.001) / 0.02, (1 - s) / 0.4),
        after_step=lambda: ema_update(ema_weights, weights, config.teacher_ema),
    )  # fmt: skip


def train_student(config: CifarConfig, stage: Stage) -> None:
    """A student's LoRA, distilled from the teacher beside it and saved as lora.safetensors."""
    student, device = student_config(config, stage.folder.name), config.device
    # The compiled graphs of the student before are of no use, and count against the limit.
    torch._dynamo.reset()
    step = build_step(student, load_teacher(config.output, device, config.dtype), device)

    def encode(labels) -> tuple:
        cond = condition(torch.as_tensor(labels).to(device))
        return cond, null_condition(cond)

    def losses(batch: dict, generator) -> dict:
        if student.pairs == "teacher":
            x_0, labels, shape = None, batch["conds"], step.walkers.x[: stage.batch_size].shape
            sample = step.sample(shape, generator, device, batch["walkers"])
        else:
            x_0, labels = to_x0(batch["images"]).to(device), batch["labels"]
            sample = step.sample(x_0.shape, generator, device)
        batch["timesteps"] = sample.timesteps
        return step.losses(x_0, *encode(labels), sample)

    def export(folder: Path) -> None:
        lora = deepcopy(step.output_network.lora).half()
        write_diffusers(folder / "lora.safetensors", lora, **stage.settings)

    def make_paths(generator: torch.Generator, is_new: bool) -> PathLoader:
        def draw_conds(count: int) -> list:
            labels = torch.randint(len(CLASSES), (count,), generator=generator).tolist()
            return [(label, CLASSES[label]) for label in labels]

        shape = step.teacher.base.config.in_channels, 16, 16
        loader = PathLoader(
            step, shape, stage.batch_size, generator, device, draw_conds,
            range(len(CLASSES)).count, fewest=config.walkers,
        )  # fmt: skip
        if is_new:
            spent = loader.start(encode)
            print(f"{stage.folder.name}: {spent} steps of the teacher to spread the walkers, which "
                  "count to its budget")  # fmt: skip
            if stage.steps == 1:
                print("one step is left: give fewer --walkers or more --steps", file=sys.stderr)
        return loader

    optimizers = build_optimizers(student, step)
    stage.train(
        step.modules, optimizers, losses, export, after_step=step.after_step,
        make_paths=make_paths if student.pairs == "teacher" else None,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- main
#
# Everything that can be refused is refused before the first hour of training: flags, data, and
# stages in the output folder that have other settings.


def build_config(args) -> CifarConfig:
    """The flags as a config; ValueError for values that do not go together."""
    values = {field.name: getattr(args, field.name) for field in fields(CifarConfig)}
    values["channels"] = tuple(args.channels)
    values["methods"] = with_repeats(args.methods, args.repeats)
    config = CifarConfig(**values)
    if any(c % 32 for c in config.channels) or len(config.channels) > 4:
        channels = " ".join(map(str, config.channels))
        raise ValueError(f"--channels {channels}: up to 4 levels, of a multiple of 32 each")
    # Every student is sampled in kmin to kmax steps, whatever it is trained for.
    targets_of("tdd", config.solver_steps, config.kmin, config.kmax)
    students = {name: student_config(config, name) for name in config.methods}
    for name, student in students.items():
        try:
            check_student(config, student)
        except ValueError as problem:
            raise ValueError(f"--methods {name}: {problem}") from None
    has_walkers = any(student.pairs == "teacher" for student in students.values())
    consistency = "consistency methods", any(s.method != "tdm" for s in students.values())
    cli.check_uses(args, parser(args.preset), {
        "walkers": ("methods with the teacher's pairs", has_walkers),
        "rho": consistency, "ema": consistency,
    })  # fmt: skip
    if args.repeats > 1 and not students.keys() & {*REPEATED}:
        raise ValueError(f"--repeats is for {', '.join(REPEATED)}")
    return config


def check_student(config: CifarConfig, student: DistillConfig) -> None:
    """ValueError for a student that cannot be told what it is to be told, or has no targets."""
    if student.method == "tdd" and len(student.Ks) == 1:
        raise ValueError(f"K is drawn from several: --kmax must be above {student.Ks[0]}")
    if student.told_ks:
        num_steps.check_rank(student.told_ks, student.rank)
        num_steps.reader(student.told_ks, unet_json(config.channels)["addition_time_embed_dim"])
    if student.method == "tdm":
        equidistant(max(student.Ks), config.solver_steps)
    else:
        targets_of(student.method, config.solver_steps, student.kmin, student.kmax)


def with_repeats(methods: list[str], repeats: int) -> tuple[str, ...]:
    """Each method once, and its repeats beside it."""
    names = []
    for name in dict.fromkeys(methods):
        count = repeats if name in REPEATED else 1
        names += [name, *(f"{name}{SEED}{i}" for i in range(1, count))]
    return tuple(names)


def main(args) -> None:
    start = time.time()
    cli.check_device(args.device)
    use_exact_float32(torch.float32)
    if distributed.get_dist_info(args.device)[1] > 1:
        raise ValueError("CIFAR-10 takes one process: start it without torchrun")
    config = build_config(args)
    train, test = read_split(config.data_dir, True), read_split(config.data_dir, False)
    if config.samples > (most := min(len(train[1]), len(test[1]))):
        raise ValueError(f"--samples {config.samples}: there are {most} real ones to compare with")
    print(f"guidance to distil: g = {config.guidance:g}, the paper's w' = g - 1 = {config.w:g}")
    train_all(config, train)
    path = config.output / "classifier/model.safetensors"
    weights = files.read_tensors(path)[0]
    classifier = load_strict(Classifier(), weights, path).float().to(config.device)
    evaluation = Evaluation(config, classifier, train, test)
    evaluation.run(config.methods)
    settings = {name: str(value) for name, value in vars(args).items()}
    stages = ("classifier", "teacher", *config.methods)
    metrics = {
        "settings": {**settings, "torch": torch.__version__},
        "training_seconds": {name: read_stage(config.output / name)["seconds"] for name in stages},
        "classifier_accuracy": evaluation.test_accuracy,
        "rows": list(evaluation.rows.values()),
    }
    files.write_json(config.output / "metrics.json", metrics)
    figures.draw_all(config.output, evaluation)
    print("\n\n".join(evaluation.tables()))
    print(f"classifier accuracy on the test pictures: {evaluation.test_accuracy:.1%}")
    print(f"{time.time() - start:.0f} s; metrics.json and the pictures are in {config.output}/")


def parser(preset: str | None = None) -> cli.Parser:
    """The flags, with a preset's values as defaults; --preset itself refuses an unknown one."""
    preset = preset if preset in PRESETS else "cpu"
    p = cli.Parser(
        "Trains a CIFAR-10 teacher, distils it with TDD and its rivals, and compares them. "
        "Guidance is g = 1 + w, with the paper's w. --sample NAME samples, with other flags."
    )
    flag, number, count, share = p.add_argument, cli.number, cli.positive_int, cli.share
    flag("--data", choices=["cifar10"], default="cifar10", help="data set; others, other flags")
    flag("--preset", choices=PRESETS, default=preset, help="set of defaults for the flags below")
    flag("--data-dir", type=Path, default=Path("data/cifar-10-batches-bin"), help="data folder")
    flag("--output", type=Path, default=Path("runs/cifar10"), help="folder for all stages")
    methods = list(dict.fromkeys([*METHODS, *PATHS]))
    flag("--methods", nargs="+", choices=methods, default=METHODS, metavar="M",
         help=f"students, of {' '.join(methods)}")  # fmt: skip
    flag("--repeats", type=count, default=1, help=f"trainings of {', '.join(REPEATED)}")
    flag("--channels", type=count, nargs="+", metavar="C", help="channels of the UNet's levels")
    flag("--classifier-steps", type=count, help="training steps of the classifier")
    flag("--teacher-steps", type=count, help="training steps of the teacher")
    flag("--teacher-batch", type=count, help="pictures a step of the teacher")
    flag("--teacher-lr", type=cli.non_negative, default=1e-3, help="learning rate of the teacher")
    flag("--teacher-ema", type=cli.below_1, default=0.998, help="mu of the teacher's average")
    flag("--drop", type=share, default=0.12, help="share of null conditions for the teacher")
    flag("--steps", type=count, help="training steps of a student")
    flag("--batch-size", type=count, help="pictures a step of a student")
    flag("--walkers", type=count, default=WALKERS,
         help="walkers on the teacher's path, four batches or more")  # fmt: skip
    flag("--lr", type=cli.non_negative, default=4e-4, help="delta, the students' learning rate")
    flag("--ema", type=cli.below_1, default=0.99, help="mu of the target network theta-")
    flag("--rank", type=count, default=32, help="rank r of the LoRA, also its alpha")
    flag("--kmin", type=count, default=4, help="K_min, fewest steps to distil for")
    flag("--kmax", type=count, default=8, help="K_max, most steps to distil for")
    flag("--rho", type=share, default=0.2, help="rho, share of null conditions")
    flag("--guidance", type=number(float, 1, 100), default=3.0, help="guidance g to distil")
    flag("--solver-steps", type=count, default=50, help="N, steps of the teacher's solver")
    flag("--samples", type=number(int, 16), help="number of pictures for each figure")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="random seed")
    flag("--dtype", choices=["float32", "bf16"],
         help="precision; bf16 pays on CPUs with AVX-512 or AMX too")  # fmt: skip
    flag("--device", help="device, cpu or cuda")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile of UNet blocks")
    p.set_defaults(**PRESETS[preset])
    return p
