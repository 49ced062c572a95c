"""Trajectory Distribution Matching (tdm.py) on 2-D data: its students and how they are trained."""

from dataclasses import dataclass

import torch

import tdm
from common.compare import equal_budget_steps
from solvers import SOLVERS
from tdd import conditioned, guided, with_scalar
from toy.config import ToyConfig
from toy.data import CLASSES, one_hot
from toy.model import BatchedMLP, train

BETAS = (0.0, 0.999)
STUDENT_LR, FAKE_LR = 0.2, 2.0  # of --lr; a tenth, as in the paper's 2e-6 against 2e-5


@dataclass(frozen=True)
class TDMStudent:
    """A TDM student as it is trained, in the terms of tdm.py; w is the teacher's guidance."""

    method: str
    Ks: tuple[int, ...] = (4,)
    with_num_steps: bool = False  # K is an input of the student and of the fake score
    weight: str = "exact"
    loss: str = "huber"
    clean: bool = False
    solver: str = "ddim"
    together: bool = False  # both take their step at once, as on SDXL, not the fake score first
    w: float = 0.0
    variant: str = ""


TDM_STUDENTS = {
    "tdm4": TDMStudent("tdm4"),
    "tdm_unify": TDMStudent("tdm_unify", (1, 2, 4), with_num_steps=True),
}


def train_tdm(
    config: ToyConfig, m: TDMStudent, teacher: BatchedMLP, start=None, steps: int | None = None,
    snapshots: dict | None = None,
) -> BatchedMLP:  # fmt: skip
    """TDM's Algorithm 1 for every seed; a student begins as its teacher or as network `start`."""
    # The main comparison's budget, unless the ablation asks for fewer steps.
    steps = steps or equal_budget_steps(config.steps, m.method)
    rows, schedule = config.seeds * config.batch_size, teacher.schedule
    student = (teacher if start is None else start).select(range(config.seeds))
    fake = teacher.select(range(config.seeds))
    if m.with_num_steps:
        student, fake = student.with_scalar("num_steps"), fake.with_scalar("num_steps")
    student.requires_grad_()
    optimizer = torch.optim.Adam(fake.parameters(), FAKE_LR * config.lr, BETAS, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # Not the other students' seed, and the same one for all variants.
    generator = torch.Generator().manual_seed(config.seed + 2)
    null = torch.zeros(1, CLASSES)

    def loss():
        # Lines 3-7. No data is used, only labels.
        cond = one_hot(torch.randint(CLASSES, (rows,), generator=generator))
        sample = tdm.sample_step(m.Ks, (rows, 2), config.N, generator)
        networks = student, fake
        if m.with_num_steps:
            networks = [with_scalar(network, sample.K) for network in networks]
        student_eps, fake_eps = (conditioned(network, cond) for network in networks)
        p = tdm.generate(student_eps, sample, schedule, SOLVERS[m.solver], m.clean)
        # Lines 9 and 10: the fake score first ..
        fake.requires_grad_()
        fake_loss = tdm.fake_loss(fake_eps, p.detach(), schedule, m.weight).mean()
        optimizer.zero_grad()
        (fake_loss * fake.members).backward()
        if not m.together:
            optimizer.step()
        # .. and lines 12 and 13: the student by the fake score of after its step.
        fake.requires_grad_(False)
        real_eps = guided(teacher, cond, null, m.w)
        student_loss = tdm.student_loss(real_eps, fake_eps, p, schedule, m.loss)
        if m.together:
            optimizer.step()
        cosine.step()
        return student_loss

    return train(
        student, loss, steps, STUDENT_LR * config.lr, m.method, betas=BETAS, snapshots=snapshots
    )
