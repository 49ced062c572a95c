"""TDD on 2-D data in minutes on a CPU: teacher, students, evaluation, pictures.

    python train_toy.py                     the whole experiment, into runs/toy
    python train_toy.py --quick             a first look in half a minute
    python train_toy.py --data cifar10      real images, and SDXL's code: see cifar/train.py

A teacher is trained from data, then every consistency-distillation method from that same teacher at
the same budget. Seeds, and methods as far as they are alike, train together as one batched network.
"""

import argparse
import time
from dataclasses import fields
from pathlib import Path

import torch

from common import cli, files
from common.compare import BEYOND, GAMMAS
from solvers import ONE_STEP, sdxl_schedule
from tcd import TCF
from tdd import equidistant, targets_of
from toy import ablations, explorer, figures
from toy.config import ToyConfig
from toy.data import DATA, Data
from toy.evaluate import Evaluation, evaluate
from toy.students import PATHS, STUDENTS, make_students, train_groups, train_teacher
from toy.tdm import TDM_STUDENTS


def main(args) -> None:
    start = time.time()
    if args.quick:
        args.steps, args.seeds, args.samples = min(args.steps, 500), 1, 512
        print(f"--quick: a first look ({args.steps} steps, 1 seed, 512 samples), not a result")
    config = build_config(args)
    check(args, config)
    output = files.output_folder(args.output)
    settings = {**vars(args), "output": str(output)}
    claim(output, settings)
    print(f"guidance to distil: g = {args.guidance:g}, the paper's w' = g - 1 = {config.w:g}")
    # The picture that needs no training comes first: something to look at meanwhile.
    figures.targets(output / "targets.png", make_students(config))
    data, generator = Data(config.data), torch.Generator().manual_seed(config.seed)
    teacher = train_teacher(config, data, sdxl_schedule(), generator)
    groups = train_groups(config, teacher, data, generator)
    ev, ablation_rows = Evaluation(config, teacher, data), []
    try:
        evaluate(groups, ev)
        figures.draw_all(output, ev, groups)
        explorer.write(output / "explore.html", ev, groups)
        if args.ablations:
            ablations.ablate_beyond(groups, ev, data, ablation_rows)
            ablations.ablate_reach(ev, data, ablation_rows)
            ablations.ablate(groups, ev, ablation_rows)
    finally:
        # After Ctrl-C too: the rows so far cost a minute or two.
        if ev.rows:
            metrics = {
                "settings": {**settings, "torch": torch.__version__},
                "rows": [*ev.rows.values()], "noise_floor": ev.noise_floor(),
                "efficiency": [*ev.efficiency.values()],
                "ablations": ablation_rows,
                "training_seconds": {" ".join(g.names): round(g.seconds, 1) for g in groups},
                "seconds": round(time.time() - start, 1),
            }  # fmt: skip
            files.write_json(output / "metrics.json", metrics)
    tables = [ev.table("rmse", gamma) for gamma in GAMMAS] + [ev.table("sw", 0.0)]
    if ev.efficiency:
        tables += [ev.efficiency_table(k) for k in config.ends]
    if ablation_rows:
        tables += [ablations.table(ablation_rows, metric) for metric in ("rmse", "sw")]
    print("\n\n".join(tables))
    print("* non-equidistant. rmse: to the teacher's exact sampler from the same noise; sw: sliced")
    print("Wasserstein distance to it. Passes of the network a step: guided teacher 2 (dpm++2s 4),")
    print("TCF(2) (tcd2, tdd2) 2, all other students 1.")
    print(f"{time.time() - start:.0f} s; metrics.json, pictures and explore.html are in {output}/")


def build_config(args) -> ToyConfig:
    """The run's settings; most flags are named after their field."""
    settings = {f.name: getattr(args, f.name) for f in fields(ToyConfig) if f.name in args}
    for name in ("methods", "tcf"):
        settings[name] = tuple(dict.fromkeys(settings[name]))  # each once, in the user's order
    settings |= {"w": args.guidance - 1, "N": args.solver_steps}
    return ToyConfig(**settings, reference_steps=80 if args.quick else 160)


def check(args, config: ToyConfig) -> None:
    """ValueError for values that do not go together, and for flags without use."""
    # Whatever the methods, all are sampled in kmin to kmax steps.
    targets_of("tdd", config.N, config.kmin, config.kmax)
    for name, student in TDM_STUDENTS.items():
        if args.ablations or name in config.methods:
            equidistant(max(student.Ks), config.N)
    students = make_students(config)
    tdd = [s.method for s in students if s.method.startswith("tdd") and s.targets.K is None]
    has_eta = args.ablations or any("eta0" not in method for method in tdd)
    has_tcf = not {"tcd", "tdd"}.isdisjoint(config.methods)
    consistency = "consistency methods", args.ablations or bool(students)
    cli.check_uses(args, parser(), {
        "tcf": ("--methods tcd and tdd", has_tcf), "reach": ("--methods tdd", bool(tdd)),
        "eta": ("--methods tdd", has_eta), "rho": consistency, "ema": consistency,
        "solver": consistency,
    })  # fmt: skip


def claim(output: Path, settings: dict) -> None:
    """Make the folder this run's; ValueError if it holds results of another, but for a first look.

    The same run with --ablations goes on from the one without.
    """
    path = output / "metrics.json"
    if path.exists():
        recorded = files.read_json(path).get("settings")
        recorded = recorded if isinstance(recorded, dict) else {}
        added = ("ablations",) if settings["ablations"] else ()
        difference = files.first_difference(recorded, settings, ("output", "torch", *added))
        if not difference:
            return
        if not recorded.get("quick"):
            raise ValueError(f"{output} holds results of {difference}: name another --output")
    # A picture that this run has nothing for must not stay beside its table.
    for name in ("metrics.json", "explore.html", *figures.PICTURES):
        (output / name).unlink(missing_ok=True)


def parser() -> cli.Parser:
    p = cli.Parser("Trains a 2-D teacher, distils it with TDD and its rivals, and compares them.")
    flag, number = p.add_argument, cli.number
    # The defaults are the results' settings; the paper's own (N = 250, w' = 3.5) are SDXL's.
    flag("--data", choices=DATA, default="spirals",
         help="2-D distribution; cifar10 has other flags: --data cifar10 --help")  # fmt: skip
    methods = list(dict.fromkeys([*STUDENTS, *BEYOND, *PATHS]))
    flag("--methods", nargs="+", choices=methods, default=STUDENTS, metavar="M",
         help=f"students, of {' '.join(methods)}; tdd_rho0 adds the guidance study")  # fmt: skip
    flag("--tcf", nargs="+", choices=TCF, default=list(TCF), metavar="F",
         help="functions f of tcd and tdd: order 1, order 2, s as an input")  # fmt: skip
    flag(
        "--ablations",
        action="store_true",
        help="what is beyond the papers, reach e of Eq. 7, TDM's Tables 5-8 and Fig. 8",
    )
    flag("--steps", type=cli.positive_int, default=3000, help="steps of teacher and students")
    flag("--seeds", type=cli.positive_int, default=3, help="number of teachers, each distilled")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="random seed")
    flag("--batch-size", type=cli.positive_int, default=256, help="examples a step and student")
    flag("--lr", type=cli.non_negative, default=1e-3, help="learning rate delta")
    flag("--ema", type=cli.below_1, default=0.95, help="decay mu of the target network theta-")
    flag("--kmin", type=cli.positive_int, default=4, help="K_min, fewest steps to distil for")
    flag("--kmax", type=cli.positive_int, default=8, help="K_max, most steps to distil for")
    flag("--reach", type=cli.non_negative, metavar="E", help="e of Eq. 7 for tdd: T/K_min")
    flag("--eta", type=cli.share, default=0.3, help="random offset eta of TDD's targets, Eq. 8")
    flag("--rho", type=cli.share, default=0.2, help="share rho of null conditions")
    flag("--guidance", type=number(float, 1, 100), default=3.0,
         help="guidance g to distil; g = 1 + w, so the paper's w' is g - 1")  # fmt: skip
    flag("--solver", choices=ONE_STEP, default="ddim", help="solver Phi")
    flag("--solver-steps", type=cli.positive_int, default=50, help="steps N of the solver Phi")
    flag("--samples", type=number(int, 64), default=2048,
         help="samples a seed in evaluation, rounded down to a multiple of 8")  # fmt: skip
    flag("--output", type=Path, default=Path("runs/toy"), help="folder for the results")
    flag("--quick", action="store_true", help="1 seed, 500 steps: half a minute")
    return p


if __name__ == "__main__":
    # CIFAR-10 has flags of its own, and so has sampling from what was trained on it: three flags
    # decide which parser reads the command line.
    early_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--data", "--sample", "--preset"):
        early_parser.add_argument(name, nargs="?")
    early = early_parser.parse_known_args()[0]
    if early.data != "cifar10":
        cli.run(main, parser())
    elif early.sample is not None:
        from cifar import sample

        cli.run(sample.main, sample.parser())
    else:
        from cifar import train

        cli.run(train.main, train.parser(early.preset))
