"""Settings of the CIFAR-10 experiment, and every student's settings in the terms of training/."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.compare import W_HIGH, equal_budget_steps
from training.build import DistillConfig

# Each student's method, and what it does not share with the others.
STUDENTS = {
    "cm": ("cm", {}), "pcm4": ("pcm", {"kmin": 4}), "tcd": ("tcd", {}),
    "tdd_eta0": ("tdd", {"eta": 0.0}), "tdd": ("tdd", {}), "tdd_adv": ("tdd", {"adv": True}),
    # The guidance study: no null conditions, and a high w' that Eq. 13 tunes down.
    "tdd_rho0": ("tdd", {"rho": 0.0}), "tdd_high": ("tdd", {"w": (W_HIGH, W_HIGH)}),
    # TCD's functions of second order and with the target time as an input.
    "tcd2": ("tcd", {"tcf": "2"}), "tcds": ("tcd", {"tcf": "s"}), "tdds": ("tdd", {"tcf": "s"}),
    # TDM for 4 steps, and for 1, 2 and 4.
    "tdm4": ("tdm", {"Ks": (4,)}), "tdm_unify": ("tdm", {"Ks": (1, 2, 4)}),
}  # fmt: skip


@dataclass(frozen=True)
class CifarConfig:
    """The experiment's settings, named as the flags are; cifar/train.py's --help explains them."""

    data_dir: Path
    output: Path
    methods: tuple[str, ...]
    channels: tuple[int, ...]
    classifier_steps: int
    teacher_steps: int
    teacher_batch: int
    teacher_lr: float
    teacher_ema: float
    drop: float
    steps: int
    batch_size: int
    lr: float
    ema: float
    rank: int
    kmin: int
    kmax: int
    rho: float
    guidance: float
    solver_steps: int
    samples: int
    seed: int
    dtype: str
    device: str
    compile: bool

    @property
    def w(self) -> float:
        """w', the guidance that students distil."""
        return self.guidance - 1


def student_config(config: CifarConfig, name: str) -> DistillConfig:
    """How a student is distilled."""
    method, changes = STUDENTS[name]
    student = replace(
        DistillConfig.of_method(method), w=(config.w, config.w), solver_steps=config.solver_steps,
        rank=config.rank, alpha=config.rank, seed=config.seed, checkpointing=False,
        compile=config.compile,
    )  # fmt: skip
    if method == "tdm":
        # The student's rate is lower than the fake score's, as in the paper.
        student = replace(student, lr=config.lr / 5, fake_lr=config.lr)
    else:
        # Pseudo-Huber, as published: in the squared distance the highest noise levels dominate.
        student = replace(
            student, lr=config.lr, adv_lr=config.lr, mu=config.ema, rho=config.rho,
            kmin=config.kmin, kmax=config.kmax, loss="huber",
        )  # fmt: skip
    return replace(student, **changes)


def student_steps(config: CifarConfig, name: str) -> int:
    """Training steps of a student: every student has as many UNet passes as TDD.

    The discriminator's passes are not counted.
    """
    student = student_config(config, name)
    return equal_budget_steps(config.steps, name if student.method == "tdm" else student.tcf)
