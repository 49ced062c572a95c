"""TDD on 2-D data in about two minutes on a CPU: teacher, students, evaluation, pictures.

    python train_toy.py                     the whole experiment, into runs/toy
    python train_toy.py --quick             a first look in under 20 seconds
    python train_toy.py --data cifar10      real images, and SDXL's code: see cifar_train.py

A teacher is trained from data, then every consistency-distillation method from that same teacher at
the same budget. All seeds and methods train together, as one batched network.
"""

import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange, repeat
from tqdm import tqdm, trange

import cifar_sample
import cifar_train
import cli
import toy_figures
from solvers import SOLVERS, Schedule, sdxl_schedule
from tdd import Draws, TargetSet, draw, ema_update, targets_of, tdd_loss
from toy import CLASSES, DATA, Data, Ensemble, one_hot
from toy_eval import GAMMAS, Case, Evaluation

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


# -------------------------------------------------------------------------------------- students
#
# The main comparison holds everything but the targets equal: teacher, w', rho, steps, batch, noise.
# eta belongs to TDD alone. PCM-4 and PCM-8 stand at the two ends of what TDD trains for.


STUDENTS = ["cm", "pcm4", "pcm8", "tcd", "tdd", "tdd_eta0", "tdd_rho0"]


def students_of(args) -> list[Student]:
    """The students to train; tdd_rho0 stands for the three that the guidance study compares."""
    students, w = [], args.guidance - 1
    for name in dict.fromkeys(args.methods):
        # PCM's number of segments stands in the place of kmin.
        kmin = int(name[3]) if name.startswith("pcm") else args.kmin
        targets = targets_of(name[:3], args.solver_steps, kmin, args.kmax)
        if name == "tdd_rho0":
            # Fig. 6 asks for guidance left to add (w' = 1) and for guidance to take back (w' = 5).
            study = ("tdd", args.rho, 1.0), ("tdd_rho0", 0.0, 1.0), ("tdd", args.rho, 5.0)
            students += [Student(m, targets, args.eta, rho, w, f"w'={w:g}") for m, rho, w in study]
        else:
            eta = args.eta if name == "tdd" else 0.0
            students.append(Student(name, targets, eta, args.rho, w))
    return students


# -------------------------------------------------------------------------------------- training
#
# Both trainings are the same loop, `fit`; they differ in the loss and in what follows a step. A
# loss has an entry a row "(b m)"; members share no weights, so its gradient is each member's own.


def fit(network: Ensemble, loss_of_step, steps: int, lr: float, name: str, after=None) -> Ensemble:
    """Adam with a cosine to zero on loss_of_step() -> (b*m,); the mean of each member's loss."""
    # Fused: 27 networks are few tensors, but Adam's dozen passes over each would still show.
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = trange(steps, desc=f"{name:8}", mininterval=0.5, dynamic_ncols=True)
    for step in bar:
        loss = loss_of_step().mean()
        optimizer.zero_grad()
        (loss * network.members).backward()
        optimizer.step()
        cosine.step()
        if after is not None:
            after()
        # Now and then only: looking at the loss waits for it.
        if step % 100 == 0 or step == steps - 1:
            if not loss.isfinite():
                raise ValueError(f"{name}: loss {loss} at step {step}; lower --lr or --guidance")
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return network.requires_grad_(False)


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


def train_students(args, students, teacher, data: Data, schedule: Schedule, generator) -> Ensemble:
    """Every student of every seed by Algorithm 1, as one ensemble with rows "(b method seed)"."""
    b, m, s = args.batch_size, len(students), args.seeds
    # Algorithm 1's input: theta <- phi, and theta- <- theta.
    student = teacher.pick(list(range(s)) * m).requires_grad_()
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
        return tdd_loss(student, target, teacher, x_0, cond, null, own, w, schedule, phi)

    theta = list(target.parameters()), list(student.parameters())
    # Line 18 follows every step.
    return fit(student, loss, args.steps, args.lr, "students", lambda: ema_update(*theta, args.ema))


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
    # 1 and 2 lie outside of what TDD trains for; they show what that costs.
    plans = [(k, "equidistant") for k in sorted({1, 2, *range(args.kmin, args.kmax + 1)})]
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


def evaluate(args, students: list[Student], network: Ensemble, ev: Evaluation) -> None:
    """Every row of metrics.json: the main cases for teacher and students, then guided students."""
    plain = [i for i, student in enumerate(students) if not student.variant]
    jobs = [(who, case) for who in ("teacher", plain) if who for case in main_cases(args)]
    jobs += guidance_cases(args, students)
    for members, case in tqdm(jobs, desc="evaluate", mininterval=0.5, dynamic_ncols=True):
        if members == "teacher":
            ev.teacher_row(case)
        else:
            ev.student_rows([students[i] for i in members], network, members, case)


# ------------------------------------------------------------------------------------------ main


def main(args) -> None:
    start = time.time()
    if args.quick:
        args.steps, args.seeds, args.samples = min(args.steps, 500), 1, 512
        print(f"--quick: a first look ({args.steps} steps, 1 seed, 512 samples), not a result")
    students, output = students_of(args), cli.output_folder(args.output)
    data, schedule = Data(args.data), sdxl_schedule()
    generator = torch.Generator().manual_seed(args.seed)
    # The picture that needs no training comes first: something to look at meanwhile.
    toy_figures.targets(output / "targets.png", students)
    teacher = train_teacher(args, data, schedule, generator)
    network = train_students(args, students, teacher, data, schedule, generator)
    ev = Evaluation(args, teacher, schedule, data)
    try:
        evaluate(args, students, network, ev)
        toy_figures.draw_all(output, ev, students, network)
    finally:
        # After Ctrl-C too: the rows that are there cost a minute or two.
        if ev.rows:
            settings = {**vars(args), "output": str(output), "torch": torch.__version__}
            whole = {"settings": settings, "rows": ev.rows, "noise_floor": ev.noise_floor()}
            whole["seconds"] = round(time.time() - start, 1)
            cli.write_json(output / "metrics.json", whole)
    print("\n\n".join(ev.table(gamma) for gamma in GAMMAS))
    print("* non-equidistant. Mean distance to the teacher's exact sampler from the same noise.")
    print(f"{time.time() - start:.0f} s; metrics.json and the pictures are in {output}/")


def parser() -> cli.Parser:
    p = cli.Parser("Trains a 2-D teacher, distils it with TDD and its rivals, and compares them.")
    flag, number = p.add_argument, cli.number
    whole, share, above = number(int, 1), number(float, 0, 1), number(float, 1, 100)
    some = f"students, of {' '.join(STUDENTS)}; the last brings the guidance study"
    # The defaults are the results' settings; the paper's own (N = 250, w' = 3.5) are SDXL's.
    flag(
        "--data",
        choices=DATA,
        default="spirals",
        help="the 2-D distribution; or cifar10, which has flags of its own: --data cifar10 --help",
    )
    flag("--methods", nargs="+", choices=STUDENTS, default=STUDENTS, metavar="M", help=some)
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
    flag("--quick", action="store_true", help="1 seed, 500 steps: under 20 s")
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
