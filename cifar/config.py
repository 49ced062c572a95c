"""Settings of the CIFAR-10 experiment, and every student's settings in the terms of training/."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.compare import BEYOND, PATH, W_HIGH, variant_of
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
METHODS = [*STUDENTS, *BEYOND]  # unless others are asked for
GUIDANCE_STUDY = ("tdd_rho0", "tdd_high")
PATHS = [
    name + PATH for name, (method, _) in STUDENTS.items()
    if method != "tdm" and name not in GUIDANCE_STUDY
]  # fmt: skip
# Of these --repeats trains more than one, each from other random numbers.
REPEATED = ("pcm4", "tdd_eta0", "tdd_k4_data", "tdd_k4")
SEED = "-seed"  # ends the name of a repeat: pcm4-seed1


WALKERS = 512  # at least; batches are small here, and few walkers too much alike
K_LR = 1e-3  # of what is told of each K, like a new embedding's


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
    walkers: int
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
    """How a student, or a repeat of one, is distilled."""
    name, _, repeat = name.partition(SEED)
    variant = variant_of(name, config.kmin, config.kmax)
    method, changes = STUDENTS[variant.method]
    if variant.Ks:
        changes = {**changes, "Ks": variant.Ks, "tell_k": variant.tell_k, "eta": 0.0}
    student = replace(
        DistillConfig.of_method(method), w=(config.w, config.w), solver_steps=config.solver_steps,
        kmin=config.kmin, kmax=config.kmax, rho=config.rho, mu=config.ema,
        rank=config.rank, alpha=config.rank, seed=config.seed + int(repeat or 0),
        checkpointing=False, pairs=variant.pairs,
        compile=config.compile, adv_lr=config.lr, fake_lr=config.lr,
        # TDM's student learns more slowly than its fake score, as in the paper.
        lr=config.lr / 5 if method == "tdm" else config.lr,
        k_lr=K_LR / 5 if method == "tdm" else K_LR,
        # Pseudo-Huber, as published: in the squared distance the highest noise levels dominate.
        loss="huber",
    )  # fmt: skip
    return replace(student, **changes)
