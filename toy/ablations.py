"""The ablations of TDM's paper on the 2-D toy: its Tables 5 to 8 and Fig. 8."""

from dataclasses import replace

import torch

from common.compare import Case, table_of
from solvers import CLEAN, SOLVERS, Schedule, ddim, solve
from tdd import equidistant
from toy.evaluate import Evaluation
from toy.model import Ensemble
from toy.tdm import MATCHED, Matched, train_matched

# ------------------------------------------------------------------------------------ ablations
#
# What is taken away, and the numbers of steps that it is looked at in. Distances are to the
# teacher's distribution: TDM does not promise to send noise where the teacher would.

ABLATIONS = {
    "TDM-unify": (MATCHED["tdm_unify"], (1, 2, 4)),
    "not told K": (replace(MATCHED["tdm_unify"], told=False), (1, 2, 4)),
    "no surrogate (Eq. 6, DMD's normaliser)": (
        replace(MATCHED["tdm_unify"], loss="dmd"), (1, 2, 4)),
    "not unified: TDM-4": (MATCHED["tdm4"], (1, 2, 4)),
    "weight: the paper's density ratio": (replace(MATCHED["tdm4"], weight="density"), (4,)),
    "weight: its 1/d-th power": (replace(MATCHED["tdm4"], weight="mean"), (4,)),
    "weight: none": (replace(MATCHED["tdm4"], weight="none"), (4,)),
    "matching clean samples": (replace(MATCHED["tdm4"], clean=True), (4,)),
    "Fisher's divergence": (replace(MATCHED["tdm4"], loss="fisher"), (4,)),
    "student and fake score at once": (replace(MATCHED["tdm4"], together=True), (4,)),
}  # fmt: skip


def ablate(args, teacher, groups, schedule: Schedule, ev: Evaluation, rows: list[dict]) -> None:
    """Adds rows of TDM's Tables 5 to 8 and Fig. 8: sliced Wasserstein distances of all seeds."""
    w = args.guidance - 1
    # Some are variants of nothing, or have been trained for the tables already.
    trained = {g.students[0]: g.network for g in groups if isinstance(g.students[0], Matched)}

    def keep(name: str, m: Matched, ks=(4,), solver: str = "ddim") -> None:
        if m not in trained:
            trained[m] = train_matched(args, m, teacher, schedule)
        for k in ks:
            each = distance(ev, trained[m], k, m.w, solver)
            row = {"name": name, "k": k, "per_seed": each.tolist(), "mean": each.mean().item()}
            rows.append({**row, "std": each.std().item() if len(each) > 1 else 0.0})

    for name, (m, ks) in ABLATIONS.items():
        keep(name, replace(m, w=w), ks)
    # Without guidance what the teacher says is the score of a distribution, and of one alone.
    for weight in ("exact", "none", "density"):
        keep(f"unguided, weight {weight}", replace(MATCHED["tdm4"], weight=weight))
    plain = replace(MATCHED["tdm4"], w=w)
    for own in ("ddim", "dpm++2m"):
        m = replace(plain, solver=own)
        for test in ("ddim", "dpm++2m"):
            keep(f"trained with {own}, sampled with {test}", m, solver=test)
    names = groups[0].names if groups else []
    if "cm" in names:
        first = names.index("cm") * args.seeds
        start = groups[0].network.pick(range(first, first + args.seeds))
        lcm = replace(plain, variant="LCM")
        trained[lcm] = start
        keep("LCM", lcm)
        for steps in (100, 400):
            m = replace(plain, variant=f"LCM and {steps} steps of TDM")
            trained[m] = train_matched(args, m, teacher, schedule, start, steps)
            keep(m.variant, m)


def distance(ev: Evaluation, network: Ensemble, k: int, w: float, solver: str) -> torch.Tensor:
    """Of k deterministic steps to the teacher's distribution at w; sliced Wasserstein, (s,)."""
    timesteps = equidistant(k, ev.args.solver_steps)

    def whole(model, x_t, t, s, schedule, past=None):
        # One jump that is the whole solution: solvers that look back do not fit the gamma-sampler.
        return solve(model, x_t, [*timesteps, CLEAN], schedule, SOLVERS[solver]), past

    case, jump = (Case(k), ddim) if solver == "ddim" else (Case(1), whole)
    x = ev.sample(network, 1, case, 0.0, jump=jump)[0]
    return ev._sw(x, ev.reference(Case(k), 0.0, w))


def table(rows: list[dict]) -> str:
    """The ablations over the number of steps."""
    ks = sorted({row["k"] for row in rows})
    named = {row["name"]: {} for row in rows}
    for row in rows:
        named[row["name"]][row["k"]] = f"{row['mean']:.3f} ({row['std']:.3f})"
    cells = [(name, [own.get(k, "") for k in ks]) for name, own in named.items()]
    return table_of("TDM: sw, deterministic", ks, cells, 42, 16)
