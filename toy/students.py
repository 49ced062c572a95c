"""Teacher and students on 2-D data: who is trained, and Algorithm 1 for many students at once."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor

from common.compare import PATH, W_HIGH, W_RANGE, equal_budget_steps, path_steps, variant_of
from common.walkers import BATCHES, Walkers, stagger_steps
from solvers import SOLVERS, Schedule, ddim
from tcd import TCF
from tdd import StepSample, TargetSet, ema_update, sample_step, targets_of, tdd_loss, with_scalar
from toy.config import ToyConfig
from toy.data import CLASSES, Data, one_hot
from toy.model import BatchedMLP, train
from toy.tdm import TDM_STUDENTS, TDMStudent, train_tdm

# -------------------------------------------------------------------------------------- students
#
# The main comparison holds everything but the targets equal: teacher, w', rho, steps, batch, noise.
# eta belongs to TDD alone. PCM-4 and PCM-8 stand at the two ends of what TDD trains for. TCF(2) and
# TCF(S+) change the function f that a network stands for (tcd.py), for TCD's and for TDD's targets.

SEGMENTS = {"pcm4": 4, "pcm8": 8}
CONSISTENCY = ["cm", *SEGMENTS, "tcd", "tdd", "tdd_eta0"]
STUDENTS = [*CONSISTENCY, "tdd_rho0", *TDM_STUDENTS, "tdd_k4"]
PATHS = [name + PATH for name in CONSISTENCY]  # from the teacher's pairs


@dataclass(frozen=True)
class Student:
    """A method as it is trained: its targets, eta and rho, and the guidance w' it distils.

    w' is drawn from w - spread to w + spread for each example. Ks: the K that it is told apart.
    pairs: from "data" or the "teacher"'s path.
    """

    method: str
    targets: TargetSet
    eta: float
    rho: float
    w: float
    variant: str = ""
    tcf: str = "1"
    spread: float = 0.0
    Ks: tuple[int, ...] = ()
    pairs: str = "data"

    @property
    def kind(self) -> tuple:
        """What students share that are trained as one network: f, whether K is told, the pairs."""
        return self.tcf, bool(self.Ks), self.pairs


PLAIN = Student("", None, 0.0, 0.0, 0.0).kind  # as in the papers


@dataclass(frozen=True)
class Group:
    """Students trained together, members "(student seed)", and the jump to sample with.

    snapshots: what the network was after a share of its training, by share.
    """

    students: list[Student | TDMStudent]
    network: BatchedMLP
    jump: Callable = ddim
    seconds: float = 0.0  # how long the training took
    snapshots: dict[float, BatchedMLP] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"{student.method} {student.variant}".strip() for student in self.students]

    @property
    def plain(self) -> list[int]:
        """The indices of the students at the main guidance."""
        return [i for i, student in enumerate(self.students) if not student.variant]

    def select(self, indices, share: float = 1.0) -> BatchedMLP:
        """The networks of these students, by index, all seeds of each, at the end or before."""
        network = self.network if share == 1.0 else self.snapshots[share]
        members = torch.arange(network.members).view(len(self.students), -1)
        return network.select(members[list(indices)].flatten().tolist())


def make_students(config: ToyConfig) -> list[Student]:
    """The students of tdd_loss; tdd_rho0 stands for the three that the guidance study compares."""
    students = []
    for name in config.methods:
        if name == "tdd_rho0":
            students += guidance_students(config)
        elif name not in TDM_STUDENTS:
            functions = config.tcf if name in ("tcd", "tdd") else ("1",)
            students += [make_student(config, name, tcf) for tcf in functions]
    return students


def make_student(config: ToyConfig, name: str, tcf: str = "1") -> Student:
    """A student by its name; one whose K is drawn has eta = 0, as all but TDD's have."""
    variant = variant_of(name, config.kmin, config.kmax)
    segments = SEGMENTS.get(variant.method)
    # The name "tdd_eta0" begins with its targets' method.
    method = "pcm" if segments else variant.method.partition("_")[0]
    kmin = segments or config.kmin
    targets = targets_of(method, config.N, kmin, config.kmax, config.reach, variant.Ks)
    eta = config.eta if variant.method == "tdd" and not variant.Ks else 0.0
    label = name if tcf == "1" else name + tcf
    told = variant.Ks if variant.tell_k else ()
    return Student(label, targets, eta, config.rho, config.w, tcf=tcf, Ks=told, pairs=variant.pairs)


def guidance_students(config: ToyConfig) -> list[Student]:
    """The students of Fig. 6: guidance left to add (w' = 1), and guidance to take back.

    The paper takes it back from TCD, whose w' is drawn from a range (Eq. 14 has its middle), and
    from PCM; TDD stands beside them.
    """
    tcd, pcm = targets_of("tcd", config.N), targets_of("pcm", config.N, SEGMENTS["pcm4"])
    tdd = targets_of("tdd", config.N, config.kmin, config.kmax, config.reach)
    rho, high, wide = config.rho, f"w'={W_HIGH:g}", f"w'={W_RANGE[0]:g}..{W_RANGE[1]:g}"
    return [
        Student("tdd", tdd, config.eta, rho, w=1.0, variant="w'=1"),
        Student("tdd_rho0", tdd, config.eta, rho=0.0, w=1.0, variant="w'=1"),
        Student("tdd", tdd, config.eta, rho, W_HIGH, high),
        Student("pcm4", pcm, 0.0, rho, W_HIGH, high),
        Student("tcd", tcd, 0.0, rho, W_HIGH, wide, spread=(W_RANGE[1] - W_RANGE[0]) / 2),
    ]


# -------------------------------------------------------------------------------------- training
#
# All trainings are the same loop, toy.model.train; they differ in the loss and in what follows a
# step.

# Guidance needs the unconditional branch as well; 0.1 to 0.2 is what teachers are trained with.
LABEL_DROP = 0.15  # share of the teacher's examples trained under the null condition


def train_teacher(config: ToyConfig, data: Data, schedule: Schedule, generator) -> BatchedMLP:
    """An eps-prediction teacher for each seed, trained from data, its label dropped at times."""
    # Twice the students' batch and rate: it is one network against nine, and decides all the rest.
    teacher = BatchedMLP.init(config.seeds, schedule, generator)
    rows = config.seeds * 2 * config.batch_size

    def loss():
        x_0, label = data.sample(rows, generator)
        cond = one_hot(label) * (torch.rand((rows, 1), generator=generator) >= LABEL_DROP)
        t = torch.randint(schedule.T, (rows,), generator=generator)
        eps = torch.randn(x_0.shape, generator=generator)
        return (teacher(schedule.diffuse(x_0, eps, t), t, cond) - eps).square().mean(1)

    return train(teacher, loss, config.steps, 2 * config.lr, "teacher")


def train_students(
    config: ToyConfig, students: list[Student], teacher: BatchedMLP, data: Data, generator
) -> Group:
    """Every student of every seed by Algorithm 1, in one batched network, rows "(b m s)"."""
    m, s = len(students), config.seeds
    tcf, tell_k, pairs = students[0].kind  # which the students share
    # Algorithm 1's input: theta <- phi, and theta- <- theta.
    student = teacher.select(list(range(s)) * m)
    if tcf == "s" or tell_k:
        student = student.with_scalar("num_steps" if tell_k else "target_time")
    target_net = student.requires_grad_().select(range(m * s))
    w_middle = torch.tensor([x.w for x in students])[:, None]
    spread = torch.tensor([x.spread for x in students])[:, None]
    # Its own, so that the other random numbers are those of a run without a range.
    w_generator = torch.Generator().manual_seed(config.seed + 3)
    null, solver = torch.zeros(1, CLASSES), SOLVERS[config.solver]()
    draw = data_pairs(config, students, data, generator)
    if pairs == "teacher":
        draw = path_pairs(config, students, teacher, generator)

    def loss():
        x_0, label, sample, move_on = draw()
        cond = repeat(one_hot(label), "(b s) d -> (b m s) d", m=m, s=s)
        u = torch.rand((config.batch_size, 1, s), generator=w_generator)
        w = (w_middle + spread * (2 * u - 1)).flatten()  # (bms,)
        networks = student, target_net
        if tell_k:
            networks = [with_scalar(network, sample.K) for network in networks]
        result = tdd_loss(
            *networks, teacher, x_0, cond, null, sample, w, teacher.schedule,
            solver=solver, jump=TCF[tcf],
        )  # fmt: skip
        move_on(result.x_n)
        return result.loss

    theta, target_theta = list(student.parameters()), list(target_net.parameters())
    update_target_net = partial(ema_update, target_theta, theta, config.ema)  # line 18
    steps, start = equal_budget_steps(config.steps, tcf), time.time()
    if pairs == "teacher":
        staggering = stagger_steps(BATCHES * config.batch_size, config.N)
        steps = path_steps(steps, config.batch_size, staggering, tcf)
        if steps == 1:
            print("one step is left after the walkers: give more --steps", file=sys.stderr)
    name, snapshots = "students" if tcf == "1" else f"TCF({tcf})", {}
    name = "K told" if tell_k else name
    train(student, loss, steps, config.lr, name, update_target_net, snapshots=snapshots)
    return Group(students, student, TCF[tcf], time.time() - start, snapshots)


# Every method sees the same noise, starts and uniforms: only its targets, eta and rho differ.


def data_pairs(config: ToyConfig, students: list[Student], data: Data, generator) -> Callable:
    """A function of no arguments that draws a batch of data.

    It returns x_0 (bms, 2), labels (bs,), a StepSample (bms,), and what to do with x_{t_n}.
    """
    rows, m, s = config.batch_size * config.seeds, len(students), config.seeds

    def draw():
        x_0, label = data.sample(rows, generator)
        state, samples = generator.get_state(), []
        for x in students:
            generator.set_state(state)
            samples.append(sample_step(x.targets, (rows, 2), x.eta, x.rho, generator))
        x_0 = repeat(x_0, "(b s) d -> (b m s) d", m=m, s=s)
        return x_0, label, _join(samples, s), lambda x_n: None

    return draw


def path_pairs(
    config: ToyConfig, students: list[Student], teacher: BatchedMLP, generator
) -> Callable:
    """As `data_pairs`, but from walkers on the teacher's path; there is no x_0.

    The students share rho and w'. A walker has a place and a label for each seed's teacher.
    """
    s, m, first = config.seeds, len(students), students[0]

    def draw_labels(count: int) -> list:
        return list(torch.randint(CLASSES, (count, s), generator=generator))

    def encode(labels: list) -> tuple:
        return one_hot(torch.stack(labels)), torch.zeros(1, 1, CLASSES)

    def of_each_seed(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        rows = (x.flatten(0, 1) for x in (x_t, t[:, None].expand(-1, s), cond))
        return teacher(*rows).view(x_t.shape)

    walkers = Walkers(
        (BATCHES * config.batch_size, s, 2), first.targets.grid, first.rho, (first.w, first.w),
        draw_labels, generator,
    )  # fmt: skip
    solver = SOLVERS[config.solver]()
    walkers.stagger(of_each_seed, encode, teacher.schedule, solver, config.batch_size)

    def draw():
        rows = walkers.draw(config.batch_size)
        label = torch.stack([walkers.conds[row] for row in rows.tolist()]).flatten()
        state, samples = generator.get_state(), []
        for x in students:
            generator.set_state(state)
            samples.append(_of_each_seed(walkers.sample(rows, x.targets, x.eta), s))

        def move_on(x_n: Tensor) -> None:
            # All students have the same teacher, and so the same x_{t_n}.
            walkers.advance(rows, rearrange(x_n, "(b m s) d -> m b s d", m=m, s=s)[0])

        return None, label, _join(samples, s), move_on

    return draw


def _of_each_seed(sample: StepSample, seeds: int) -> StepSample:
    """A sample of walkers, rows "b" and x_next (b, s, 2), with rows "(b s)"."""
    fields = {name: repeat(value, "b -> (b s)", s=seeds) for name, value in vars(sample).items()
              if value is not None and name in ROW_FIELDS}  # fmt: skip
    return StepSample(**fields, noise=None, guided_rows=None, x_next=sample.x_next.flatten(0, 1))


ROW_FIELDS = ("t_next", "t_n", "tau", "keep_prompt", "K")  # of StepSample, one number an example


def _join(samples: list[StepSample], seeds: int) -> StepSample:
    """Samples of each student, rows "(b s)", as one for the batched network, rows "(b m s)"."""
    joined = {"noise": None}
    for name in (*ROW_FIELDS, "noise", "x_next"):
        columns = [getattr(sample, name) for sample in samples]
        # Targets of Eqs. 5 and 7 have no K.
        if all(column is not None for column in columns):
            joined[name] = rearrange(columns, "m (b s) ... -> (b m s) ...", s=seeds)
    return StepSample(**joined, guided_rows=None)


def train_groups(config: ToyConfig, teacher: BatchedMLP, data: Data, generator) -> list[Group]:
    """All students: a group for each kind of Student, and for each TDM."""
    groups, state, students = [], generator.get_state(), make_students(config)
    for kind in sorted({x.kind for x in students}, key=lambda kind: (*kind[1:], kind[0])):
        alike = [student for student in students if student.kind == kind]
        # The same data and noise for every kind.
        generator.set_state(state)
        groups.append(train_students(config, alike, teacher, data, generator))
    for name in TDM_STUDENTS:
        if name in config.methods:
            student, start = replace(TDM_STUDENTS[name], w=config.w), time.time()
            snapshots = {}
            network = train_tdm(config, student, teacher, snapshots=snapshots)
            seconds = time.time() - start
            groups.append(Group([student], network, seconds=seconds, snapshots=snapshots))
    return groups
