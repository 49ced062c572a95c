"""Trajectory Distribution Matching on the 2-D toy: TDM-4, TDM-unify, and the paper's ablations."""

from dataclasses import dataclass, replace

import torch

import tdm
from common.compare import PASSES
from solvers import SOLVERS, Schedule
from tdd import bind, guided, told
from toy.data import CLASSES, one_hot
from toy.model import Ensemble, fit

BETAS = (0.0, 0.999)
STUDENT_LR, FAKE_LR = 0.2, 2.0  # of --lr; a tenth, as in the paper's 2e-6 against 2e-5


@dataclass(frozen=True)
class Matched:
    """A TDM student as it is trained, in the terms of tdm.py; w is the teacher's guidance.

    together: the student against the fake score of before its step, as distill.Matching has it.
    """

    method: str
    Ks: tuple[int, ...] = (4,)
    told: bool = False
    weight: str = "exact"
    loss: str = "huber"
    clean: bool = False
    solver: str = "ddim"
    together: bool = False
    w: float = 0.0
    variant: str = ""


MATCHED = {"tdm4": Matched("tdm4"), "tdm_unify": Matched("tdm_unify", (1, 2, 4), told=True)}


def matched_of(args) -> list[Matched]:
    """The TDM students among --methods."""
    names = [name for name in MATCHED if name in args.methods]
    return [replace(MATCHED[name], w=args.guidance - 1) for name in names]


def train_matched(
    args, m: Matched, teacher: Ensemble, schedule: Schedule, start: Ensemble | None = None,
    steps: int | None = None,
) -> Ensemble:  # fmt: skip
    """TDM's Algorithm 1 for every seed's teacher, from the teacher itself unless from `start`."""
    steps = steps or round(args.steps * PASSES["1"] / PASSES[m.method])
    members, rows = range(args.seeds), args.seeds * args.batch_size
    student, fake = (net.pick(members) for net in (start or teacher, teacher))
    if m.told:
        student, fake = student.telling("K"), fake.telling("K")
    student.requires_grad_()
    optimizer = torch.optim.Adam(fake.parameters(), FAKE_LR * args.lr, BETAS, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # Not the other students' seed, and the same one for all variants.
    generator, null = torch.Generator().manual_seed(args.seed + 2), torch.zeros(1, CLASSES)

    def loss():
        label = torch.randint(CLASSES, (rows,), generator=generator)
        # Lines 3-7; no data is drawn.
        d, cond = tdm.draw(m.Ks, (rows, 2), args.solver_steps, generator), one_hot(label)

        def known(network):
            return bind(told(network, d.K) if m.told else network, cond)

        p = tdm.generate(known(student), d, schedule, SOLVERS[m.solver], m.clean)
        # Lines 9 and 10: the fake score first ...
        fake.requires_grad_()
        of_fake = tdm.fake_loss(known(fake), p.detach(), schedule, m.weight).mean()
        optimizer.zero_grad()
        (of_fake * fake.members).backward()
        if not m.together:
            optimizer.step()
        # ... and lines 12 and 13, by what it says then.
        fake.requires_grad_(False)
        real = guided(teacher, cond, null, m.w)
        of_student = tdm.student_loss(real, known(fake), p, schedule, m.loss)
        if m.together:
            optimizer.step()
        cosine.step()
        return of_student

    return fit(student, loss, steps, STUDENT_LR * args.lr, m.method, betas=BETAS)
