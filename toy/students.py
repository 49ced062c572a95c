"""TDD on 2-D data in minutes on a CPU: teacher, students, evaluation, pictures.

    python train_toy.py                     the whole experiment, into runs/toy
    python train_toy.py --quick             a first look in half a minute
    python train_toy.py --data cifar10      real images, and SDXL's code: see cifar_train.py

A teacher is trained from data, then every consistency-distillation method from that same teacher at
the same budget. Seeds, and methods as far as they are alike, train together as one batched network.
"""

import time
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat

from common.compare import PASSES
from solvers import SOLVERS, Schedule, ddim
from tcd import TCF
from tdd import Draws, TargetSet, draw, ema_update, targets_of, tdd_loss
from toy.data import CLASSES, Data, one_hot
from toy.model import Ensemble, fit
from toy.tdm import MATCHED, Matched, matched_of, train_matched

# Guidance needs the unconditional branch as well; 0.1 to 0.2 is what teachers are trained with.
LABEL_DROP = 0.15  # share of the teacher's examples trained under the null condition


@dataclass(frozen=True)
class Student:
    """A method as it is trained: its targets, eta and rho, and the guidance w' it distils."""

    method: str
    targets: TargetSet
    eta: float
    rho: float
    w: float
    variant: str = ""
    tcf: str = "1"


@dataclass(frozen=True)
class Group:
    """Students that were trained together, rows "(b student seed)", and the jump to sample with."""

    students: list[Student | Matched]
    network: Ensemble
    jump: object = ddim
    seconds: float = 0.0

    @property
    def names(self) -> list[str]:
        return [" ".join(filter(None, (s.method, s.variant))) for s in self.students]


# -------------------------------------------------------------------------------------- students
#
# The main comparison holds everything but the targets equal: teacher, w', rho, steps, batch, noise.
# eta belongs to TDD alone. PCM-4 and PCM-8 stand at the two ends of what TDD trains for. TCF(2) and
# TCF(S+) change what is made of the network (tcd.py), for TCD's targets and for TDD's.

STUDENTS = ["cm", "pcm4", "pcm8", "tcd", "tdd", "tdd_eta0", "tdd_rho0", *MATCHED]


def students_of(args) -> list[Student]:
    """The students of tdd_loss; tdd_rho0 stands for the three that the guidance study compares."""
    students, w = [], args.guidance - 1
    for name in (name for name in dict.fromkeys(args.methods) if name not in MATCHED):
        # PCM's number of segments stands in the place of kmin.
        kmin = int(name[3]) if name.startswith("pcm") else args.kmin
        targets = targets_of(name[:3], args.solver_steps, kmin, args.kmax)
        if name == "tdd_rho0":
            # Fig. 6 asks for guidance left to add (w' = 1) and for guidance to take back (w' = 5).
            study = ("tdd", args.rho, 1.0), ("tdd_rho0", 0.0, 1.0), ("tdd", args.rho, 5.0)
            students += [Student(m, targets, args.eta, rho, w, f"w'={w:g}") for m, rho, w in study]
        else:
            eta = args.eta if name == "tdd" else 0.0
            for tcf in dict.fromkeys(args.tcf if name in ("tcd", "tdd") else "1"):
                method = name if tcf == "1" else name + tcf
                students.append(Student(method, targets, eta, args.rho, w, tcf=tcf))
    return students


# -------------------------------------------------------------------------------------- training
#
# All trainings are the same loop, toy.fit; they differ in the loss and in what follows a step.


def train_teacher(args, data: Data, schedule: Schedule, generator) -> Ensemble:
    """An eps-prediction teacher for each seed, trained from data, its label dropped at times."""
    # Twice the students' batch and rate: it is one network against nine, and decides all the rest.
    teacher = Ensemble.fresh(args.seeds, schedule, generator)
    rows = args.seeds * 2 * args.batch_size

    def loss():
        x_0, label = data.draw(rows, generator)
        cond = one_hot(label) * (torch.rand((rows, 1), generator=generator) >= LABEL_DROP)
        t = torch.randint(schedule.T, (rows,), generator=generator)
        eps = torch.randn(x_0.shape, generator=generator)
        return (teacher(schedule.diffuse(x_0, eps, t), t, cond) - eps).square().mean(1)

    return fit(teacher, loss, args.steps, 2 * args.lr, "teacher")


def train_students(args, students, teacher, data: Data, schedule: Schedule, generator) -> Group:
    """Every student of every seed by Algorithm 1, as one ensemble with rows "(b method seed)".

    All students of a call have the same trajectory consistency function.
    """
    b, m, s, tcf = args.batch_size, len(students), args.seeds, students[0].tcf
    # Algorithm 1's input: theta <- phi, and theta- <- theta.
    student = teacher.pick(list(range(s)) * m)
    student = (student.telling("s") if tcf == "s" else student).requires_grad_()
    target = student.pick(range(s * m))
    w = repeat(torch.tensor([x.w for x in students]), "m -> (b m s)", b=b, s=s)
    null, phi = torch.zeros(1, CLASSES), SOLVERS[args.solver]

    def loss():
        x_0, label = data.draw(b * s, generator)
        x_0, cond = (repeat(a, "(b s) d -> (b m s) d", m=m, s=s) for a in (x_0, one_hot(label)))
        # Every method sees the same noise, starts and uniforms: only its targets and rho differ.
        state, draws = generator.get_state(), []
        for x in students:
            generator.set_state(state)
            draws.append(draw(x.targets, (b * s, 2), x.eta, x.rho, generator))
        own = join(draws, s)
        return tdd_loss(*networks, x_0, cond, null, own, w, schedule, phi, jump=TCF[tcf])

    theta = list(target.parameters()), list(student.parameters())
    networks, steps = (student, target, teacher), round(args.steps * PASSES["1"] / PASSES[tcf])
    name = "students" if tcf == "1" else f"TCF({tcf})"
    # Line 18 follows every step.
    fit(student, loss, steps, args.lr, name, lambda: ema_update(*theta, args.ema))
    return Group(students, student, TCF[tcf])


def train_groups(args, teacher, data: Data, schedule: Schedule, generator) -> list[Group]:
    """All students: an ensemble for each trajectory consistency function, and for each TDM."""
    groups, state, students = [], generator.get_state(), students_of(args)
    jobs = [[student for student in students if student.tcf == tcf] for tcf in TCF]
    for own in [*filter(None, jobs), *([m] for m in matched_of(args))]:
        # The same data and noise for every function.
        generator.set_state(state)
        start = time.time()
        if isinstance(own[0], Matched):
            group = Group(own, train_matched(args, own[0], teacher, schedule))
        else:
            group = train_students(args, own, teacher, data, schedule, generator)
        groups.append(replace(group, seconds=round(time.time() - start, 1)))
    return groups


def join(draws: list[Draws], seeds: int) -> Draws:
    """Each method's draws with rows "(b s)" as those of the whole ensemble, "(b m s)"."""
    names = "t_next", "t_n", "tau", "kept", "noise"
    fields = ([getattr(d, name) for d in draws] for name in names)
    each = (rearrange(field, "m (b s) ... -> (b m s) ...", s=seeds) for field in fields)
    return Draws(*each, rows=None)
