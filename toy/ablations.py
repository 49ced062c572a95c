"""Ablations on 2-D data: TDM's Tables 5 to 8 and Fig. 8, TDD's e of Eq. 7, and what is beyond."""

from dataclasses import replace

import torch
from torch import Tensor

from common import compare
from common.compare import BEYOND, NAMES, Case, format_table
from tdd import targets_of
from toy.data import Data, rmse
from toy.evaluate import Evaluation, seed_statistics
from toy.model import BatchedMLP
from toy.students import Group, Student, train_groups, train_students
from toy.tdm import TDM_STUDENTS, TDMStudent, train_tdm

# ------------------------------------------------------------------------------------ ablations
#
# What is taken away, and the numbers of steps to sample in. Distances are to the teacher's
# distribution: TDM does not promise to send noise where the teacher would.

TDM4, UNIFY = TDM_STUDENTS["tdm4"], TDM_STUDENTS["tdm_unify"]
ABLATIONS = {
    "TDM-unify": (UNIFY, (1, 2, 4)),
    "not told K": (replace(UNIFY, with_num_steps=False), (1, 2, 4)),
    "no surrogate (Eq. 6, DMD's normaliser)": (replace(UNIFY, loss="dmd"), (1, 2, 4)),
    "not unified: TDM-4": (TDM4, (1, 2, 4)),
    "weight: the paper's density ratio": (replace(TDM4, weight="density"), (4,)),
    "weight: its 1/d-th power": (replace(TDM4, weight="mean"), (4,)),
    "weight: none": (replace(TDM4, weight="none"), (4,)),
    "matching clean samples": (replace(TDM4, clean=True), (4,)),
    "Fisher's divergence": (replace(TDM4, loss="fisher"), (4,)),
    "student and fake score at once": (replace(TDM4, together=True), (4,)),
}


def ablate(groups: list[Group], ev: Evaluation, rows: list[dict]) -> None:
    """Add the rows of TDM's Tables 5 to 8 and Fig. 8 to `rows`, one as soon as it is there."""
    config = ev.config
    # A variant that several rows need, or that the tables had, is trained once.
    networks = {g.students[0]: g.network for g in groups if isinstance(g.students[0], TDMStudent)}

    def get_network(m: TDMStudent) -> BatchedMLP:
        if m not in networks:
            networks[m] = train_tdm(config, m, ev.teacher)
        return networks[m]

    def add_rows(name: str, network: BatchedMLP, w: float, ks=(4,), solver="ddim") -> None:
        for k in ks:
            statistics = seed_statistics(distance(ev, network, k, w, solver))
            rows.append({"name": name, "k": k, "metric": "sw", **statistics})

    for name, (variant, ks) in ABLATIONS.items():
        add_rows(name, get_network(replace(variant, w=config.w)), config.w, ks)
    # Without guidance the teacher's prediction is the score of a distribution, and of one alone.
    for weight in ("exact", "none", "density"):
        add_rows(f"unguided, weight {weight}", get_network(replace(TDM4, weight=weight)), 0.0)
    tdm4 = replace(TDM4, w=config.w)
    for solver in ("ddim", "dpm++2m"):
        network = get_network(replace(tdm4, solver=solver))
        for sampler in ("ddim", "dpm++2m"):
            name = f"trained with {solver}, sampled with {sampler}"
            add_rows(name, network, config.w, solver=sampler)
    # Fig. 8: TDM on top of an LCM, which is what CM is here.
    if groups and "cm" in groups[0].names:
        lcm = groups[0].select([groups[0].names.index("cm")])
        add_rows("LCM", lcm, config.w)
        for steps in (100, 400):
            network = train_tdm(config, tdm4, ev.teacher, start=lcm, steps=steps)
            add_rows(f"LCM and {steps} steps of TDM", network, config.w)


REACHES = (0.5, 1, 2, 4)  # of e, in T/K_min; the last are all targets below t_n


def ablate_reach(ev: Evaluation, data: Data, rows: list[dict]) -> None:
    """Add rows of TDD with shorter and longer e: rmse at gamma = 0 in kmin to kmax steps."""
    config, students = ev.config, []
    for reach in REACHES:
        e = reach * ev.schedule.T / config.kmin
        name = f"TDD, e = {e:g}"
        try:
            targets = targets_of("tdd", config.N, config.kmin, config.kmax, e)
        except ValueError as error:
            print(f"{name} is left out: {error}")
            continue
        students.append(Student(name, targets, config.eta, config.rho, config.w))
    generator = torch.Generator().manual_seed(config.seed + 4)
    group = train_students(config, students, ev.teacher, data, generator)
    for k in range(config.kmin, config.kmax + 1):
        samples = ev.sample(group.network, Case(k), 0.0)
        for student, x in zip(students, samples, strict=True):
            statistics = seed_statistics(rmse(x, ev.reference(Case(k), 0.0, config.w)))
            rows.append({"name": student.method, "k": k, "metric": "rmse", **statistics})


def ablate_beyond(groups: list[Group], ev: Evaluation, data: Data, rows: list[dict]) -> None:
    """Add rows of all of BEYOND beside TDD and PCM-4: rmse at gamma = 0."""
    config = ev.config
    names = [name for group in groups for name in group.names]
    others = tuple(name for name in BEYOND if name not in names)
    generator = torch.Generator().manual_seed(config.seed + 5)
    trained = train_groups(replace(config, methods=others), ev.teacher, data, generator)
    for group in (*groups, *trained):
        for i, student in enumerate(group.students):
            if student.variant or student.method not in (*BEYOND, "tdd", "tdd_eta0", "pcm4"):
                continue
            for k in compare.compared_steps(config.kmin, config.kmax):
                x = ev.sample(group.select([i]), Case(k), 0.0, Ks=[student.Ks])[0]
                statistics = seed_statistics(rmse(x, ev.reference(Case(k), 0.0, config.w)))
                row = {"name": NAMES[student.method], "k": k, "metric": "rmse", **statistics}
                rows.append(row)


def distance(ev: Evaluation, network: BatchedMLP, k: int, w: float, solver: str) -> Tensor:
    """Sliced Wasserstein distance of k deterministic steps to the teacher guided by w; (s,)."""
    if solver == "ddim":
        x = ev.sample(network, Case(k), 0.0)[0]
    else:
        x = ev.solution(network, k, 0.0, solver)[0]
    return ev.sw(x, ev.reference(Case(k), 0.0, w))


def table(rows: list[dict], metric: str) -> str:
    """The ablations over the number of steps, deviations over the seeds in brackets."""
    rows = [row for row in rows if row["metric"] == metric]
    ks = sorted({row["k"] for row in rows})
    cells = {}
    for row in rows:
        by_k = cells.setdefault(row["name"], dict.fromkeys(ks, ""))
        by_k[row["k"]] = f"{row['mean']:.3f} ({row['std']:.3f})"
    lines = [(name, by_k.values()) for name, by_k in cells.items()]
    return format_table(f"{metric}, deterministic", ks, lines, 42, 16)
