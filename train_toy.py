"""TDD on 2-D data in minutes on a CPU: teacher, students, evaluation, pictures.

    python train_toy.py                     the whole experiment, into runs/toy
    python train_toy.py --quick             a first look in half a minute
    python train_toy.py --data cifar10      real images, and SDXL's code: see cifar_train.py

A teacher is trained from data, then every consistency-distillation method from that same teacher at
the same budget. Seeds, and methods as far as they are alike, train together as one batched network.
"""

import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange, repeat
from tqdm import tqdm

import cifar_sample
import cifar_train
import cli
import toy_figures
import toy_tdm
from solvers import SOLVERS, Schedule, ddim, sdxl_schedule
from tcd import TCF, tcf_1
from tdd import Draws, TargetSet, draw, ema_update, targets_of, tdd_loss
from toy import CLASSES, DATA, PASSES, Data, Ensemble, fit, one_hot
from toy_eval import GAMMAS, Case, Evaluation, steps_of
from toy_tdm import MATCHED, Matched, matched_of, train_matched

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


# ------------------------------------------------------------------------------------ evaluation
#
# Main cases are Figs. 4 and 5; the others, Figs. 6 and 7, add guidance at inference.


def main_cases(args) -> list[Case]:
    """Every k and gamma on the equidistant schedule; between kmin and kmax on the other as well."""
    plans = [(k, "equidistant") for k in steps_of(args)]
    plans += [(k, "nonequidistant") for k in range(args.kmin + 1, args.kmax)]
    return [Case(k, gamma, schedule) for gamma in GAMMAS for k, schedule in plans]


def guidance_cases(args, students: list[Student]) -> list[tuple[list[int], Case]]:
    """Guided students: rho 0 against rho (Fig. 6a), Eq. 13 (Fig. 6b), x_0 clipping (Fig. 7)."""
    low, high = ([i for i, s in enumerate(students) if s.variant == v] for v in ("w'=1", "w'=5"))
    tdd = [i for i, s in enumerate(students) if (s.method, s.variant) == ("tdd", "")]
    ends, clips = sorted({args.kmin, args.kmax}), sorted({0, 1, args.kmin})
    jobs = [(low, Case(k, w=w)) for k in ends for w in (0.0, 1.0, 2.0, 3.0)]
    jobs += [(high, Case(k)) for k in ends]
    jobs += [(high, Case(k, w=w, tune=5.0)) for k in ends for w in (1.0, 2.0, 3.0)]
    jobs += [(tdd, Case(args.kmin, w=w, clip_steps=n)) for w in (1.0, 2.0) for n in clips]
    return [(members, case) for members, case in jobs if members]


def evaluate(args, groups: list[Group], ev: Evaluation) -> None:
    """Every row of metrics.json: the main cases for teacher and students, then guided students."""
    cases = main_cases(args)
    jobs = [(ev.teacher_row, case) for case in cases]
    for group in groups:
        plain = [i for i, student in enumerate(group.students) if not student.variant]
        # Between kmin and kmax the other schedule is TDD's own question.
        own = [
            (plain, case) for case in cases
            if plain and (group.jump is tcf_1 or case.schedule == "equidistant")
        ]  # fmt: skip
        if group.jump is tcf_1:
            own += guidance_cases(args, group.students)
        jobs += [(ev.student_rows, group, *job) for job in own]
    for rows, *about in tqdm(jobs, desc="evaluate", mininterval=0.5, dynamic_ncols=True):
        rows(*about)


# ------------------------------------------------------------------------------------------ main


def main(args) -> None:
    start = time.time()
    if args.quick:
        args.steps, args.seeds, args.samples = min(args.steps, 500), 1, 512
        print(f"--quick: a first look ({args.steps} steps, 1 seed, 512 samples), not a result")
    # Of whatever targets: all are sampled in kmin to kmax steps.
    targets_of("tdd", args.solver_steps, args.kmin, args.kmax)
    students, output = students_of(args), cli.output_folder(args.output)
    data, schedule = Data(args.data), sdxl_schedule()
    generator = torch.Generator().manual_seed(args.seed)
    # The picture that needs no training comes first: something to look at meanwhile.
    toy_figures.targets(output / "targets.png", students)
    teacher = train_teacher(args, data, schedule, generator)
    groups = train_groups(args, teacher, data, schedule, generator)
    ev, ablations = Evaluation(args, teacher, schedule, data), []
    try:
        evaluate(args, groups, ev)
        toy_figures.draw_all(output, ev, groups)
        if args.ablations:
            toy_tdm.ablate(args, teacher, groups, schedule, ev, ablations)
    finally:
        # After Ctrl-C too: the rows that are there cost a minute or two.
        if ev.rows:
            settings = {**vars(args), "output": str(output), "torch": torch.__version__}
            whole = {"settings": settings, "rows": ev.rows, "noise_floor": ev.noise_floor()}
            seconds = {" ".join(g.names): g.seconds for g in groups}
            whole |= {"ablations": ablations, "training_seconds": seconds}
            whole["seconds"] = round(time.time() - start, 1)
            cli.write_json(output / "metrics.json", whole)
    tables = [ev.table("rmse", gamma) for gamma in GAMMAS] + [ev.table("sw", 0.0)]
    print("\n\n".join([*tables, *([toy_tdm.table(ablations)] if ablations else [])]))
    print("* non-equidistant. rmse: to the teacher's exact sampler from the same noise; sw: sliced")
    print("Wasserstein distance to it. TCF(2) (tcd2, tdd2) evaluates the network twice a step.")
    print(f"{time.time() - start:.0f} s; metrics.json and the pictures are in {output}/")


def parser() -> cli.Parser:
    p = cli.Parser("Trains a 2-D teacher, distils it with TDD and its rivals, and compares them.")
    flag, number = p.add_argument, cli.number
    whole, share, above = number(int, 1), number(float, 0, 1), number(float, 1, 100)
    some = f"students, of {' '.join(STUDENTS)}; tdd_rho0 brings the guidance study"
    # The defaults are the results' settings; the paper's own (N = 250, w' = 3.5) are SDXL's.
    sets = "the 2-D distribution; or cifar10, which has flags of its own: --data cifar10 --help"
    flag("--data", choices=DATA, default="spirals", help=sets)
    flag("--methods", nargs="+", choices=STUDENTS, default=STUDENTS, metavar="M", help=some)
    flag("--tcf", nargs="+", choices=TCF, default=list(TCF), metavar="F",
         help="f of tcd and tdd: of order 1, order 2, told of its end s")  # fmt: skip
    flag("--ablations", action="store_true",
         help="of TDM (its Tables 5-8, Fig. 8): 3 to 4 minutes more")  # fmt: skip
    flag("--steps", type=whole, default=3000, help="training steps, teacher and students")
    flag("--seeds", type=whole, default=3, help="independent teachers, each distilled")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of all random numbers")
    flag("--batch-size", type=whole, default=256, help="examples a step and student")
    flag("--lr", type=number(float, 0), default=1e-3, help="delta, the learning rate")
    flag("--ema", type=share, default=0.95, help="mu of the target network theta-")
    flag("--kmin", type=whole, default=4, help="K_min, fewest steps to distil for")
    flag("--kmax", type=whole, default=8, help="K_max, most steps to distil for")
    flag("--eta", type=share, default=0.3, help="eta of Eq. 8, the targets' random offset")
    flag("--rho", type=share, default=0.2, help="rho, share of null conditions")
    flag("--guidance", type=above, default=3.0, help="g = 1 + w', guidance to distil")
    flag("--solver-steps", type=whole, default=50, help="N, steps of the teacher's solver")
    flag("--solver", choices=["ddim", "dpm2s", "dpm++2s"], default="ddim", help="Phi")
    flag("--samples", type=number(int, 64), default=2048, help="evaluated a seed, in whole eights")
    flag("--output", type=Path, default=Path("runs/toy"), help="folder for the results")
    flag("--quick", action="store_true", help="1 seed, 500 steps: half a minute")
    return p


# CIFAR-10 has flags of its own, and so has sampling from what was trained on it.


def asked(name: str) -> str | None:
    """What a flag was given, said before it is known which parser is to read it."""
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    return dict(pairwise(words)).get(name)


if __name__ == "__main__":
    if asked("--data") != "cifar10":
        cli.run(main, parser())
    elif asked("--sample") is not None:
        cli.run(cifar_sample.main, cifar_sample.parser())
    else:
        cli.run(cifar_train.main, cifar_train.parser(asked("--preset")))
