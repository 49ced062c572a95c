"""TDD on 2-D data in minutes on a CPU: teacher, students, evaluation, pictures.

    python train_toy.py                     the whole experiment, into runs/toy
    python train_toy.py --quick             a first look in half a minute
    python train_toy.py --data cifar10      real images, and SDXL's code: see cifar/train.py

A teacher is trained from data, then every consistency-distillation method from that same teacher at
the same budget. Seeds, and methods as far as they are alike, train together as one batched network.
"""

import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

from common import cli, files
from common.compare import GAMMAS
from solvers import sdxl_schedule
from tcd import TCF
from tdd import targets_of
from toy import ablations as toy_ablations
from toy import figures
from toy.data import DATA, Data
from toy.evaluate import Evaluation, evaluate
from toy.students import STUDENTS, students_of, train_groups, train_teacher

# ------------------------------------------------------------------------------------------ main


def main(args) -> None:
    start = time.time()
    if args.quick:
        args.steps, args.seeds, args.samples = min(args.steps, 500), 1, 512
        print(f"--quick: a first look ({args.steps} steps, 1 seed, 512 samples), not a result")
    # Of whatever targets: all are sampled in kmin to kmax steps.
    targets_of("tdd", args.solver_steps, args.kmin, args.kmax)
    students, output = students_of(args), files.output_folder(args.output)
    data, schedule = Data(args.data), sdxl_schedule()
    generator = torch.Generator().manual_seed(args.seed)
    # The picture that needs no training comes first: something to look at meanwhile.
    figures.targets(output / "targets.png", students)
    teacher = train_teacher(args, data, schedule, generator)
    groups = train_groups(args, teacher, data, schedule, generator)
    ev, ablations = Evaluation(args, teacher, schedule, data), []
    try:
        evaluate(args, groups, ev)
        figures.draw_all(output, ev, groups)
        if args.ablations:
            toy_ablations.ablate(args, teacher, groups, schedule, ev, ablations)
    finally:
        # After Ctrl-C too: the rows that are there cost a minute or two.
        if ev.rows:
            settings = {**vars(args), "output": str(output), "torch": torch.__version__}
            whole = {"settings": settings, "rows": ev.rows, "noise_floor": ev.noise_floor()}
            seconds = {" ".join(g.names): g.seconds for g in groups}
            whole |= {"ablations": ablations, "training_seconds": seconds}
            whole["seconds"] = round(time.time() - start, 1)
            files.write_json(output / "metrics.json", whole)
    tables = [ev.table("rmse", gamma) for gamma in GAMMAS] + [ev.table("sw", 0.0)]
    print("\n\n".join([*tables, *([toy_ablations.table(ablations)] if ablations else [])]))
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
        from cifar import sample

        cli.run(sample.main, sample.parser())
    else:
        from cifar import train

        cli.run(train.main, train.parser(asked("--preset")))
