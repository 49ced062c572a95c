"""The pictures of the 2-D experiment, named after the paper's figures that they mirror."""

from dataclasses import dataclass

from tdd import equidistant, nonequidistant

# A method keeps its colour and its name through all of the pictures.
COLOURS = {
    "teacher": (130, 134, 144), "cm": (216, 120, 40), "pcm4": (60, 150, 95), "pcm8": (130, 180, 60),
    "tcd": (150, 90, 180), "tdd": (205, 45, 60), "tdd_eta0": (50, 110, 190), "tdd_rho0": (90,) * 3,
    "tcd2": (100, 60, 130), "tcds": (210, 160, 230), "tdd2": (130, 20, 35), "tdds": (240, 140, 130),
    "tdm4": (20, 140, 140), "tdm_unify": (210, 160, 20),
}  # fmt: skip
NAMES = {
    "teacher": "teacher", "cm": "CM / LCM", "pcm4": "PCM-4", "pcm8": "PCM-8", "tcd": "TCD / CTM",
    "tdd": "TDD", "tdd_eta0": "TDD, eta 0", "tdd_rho0": "TDD, rho 0",
    "tcd2": "TCD, TCF(2)", "tcds": "TCD, TCF(S+)", "tdd2": "TDD, TCF(2)", "tdds": "TDD, TCF(S+)",
    "tdm4": "TDM-4", "tdm_unify": "TDM-unify",
}  # fmt: skip

# The paper's Fig. 5: deterministic sampling, and the little noise that TCD and TDD advise.
GAMMAS = (0.0, 0.2)


# ---------------------------------------------------------------------------- cases and samplers
#
# Against the teacher's ODE samples a sampler with noise would always look wrong, however exact: its
# samples are other ones. Hence a reference that is fed the same step noise, and so lands where this
# sampler should.


@dataclass(frozen=True)
class Case:
    """One way to sample: the fields of a row in metrics.json. w is 0 for a student on its own."""

    k: int
    gamma: float = 0.0
    schedule: str = "equidistant"
    w: float = 0.0
    tune: float | None = None
    clip_steps: int = 0


def steps_of(args) -> list[int]:
    """The numbers of steps that methods are compared in."""
    # 1 and 2 lie outside of what TDD trains for; they show what that costs.
    return sorted({1, 2, *range(args.kmin, args.kmax + 1)})


def timesteps_of(args, case: Case) -> list[int]:
    """A case's schedule, for what has been trained with N, K_min and K_max as in args."""
    if case.schedule == "nonequidistant":
        return nonequidistant(case.k, args.solver_steps, args.kmin, args.kmax)
    return equidistant(case.k, args.solver_steps)


def table_of(title: str, ks: list[int], rows, width: int, cell: int) -> str:
    """Text over the numbers of steps; rows: a name, `width` wide, and cells, `cell` wide each."""
    rows = [(title, [f"k = {k}" for k in ks]), *rows]
    return "\n".join(f"{name:{width}}" + "".join(f"{x:>{cell}}" for x in xs) for name, xs in rows)


# ------------------------------------------------------------------------------------ training
#
# A method's budget is counted in network passes: its steps are those of the main comparison times
# PASSES["1"] / PASSES[method].

# Forward passes of the network that a training step takes, a backward pass counted as two. All but
# TDM: guided teacher 2, target network 1 an evaluation, student 3 an evaluation. TDM: guided
# teacher 2, student 3, fake score 3 + 1, and 1.5 (K = 4) or 0.67 (K of 1, 2, 4) before the step.
PASSES = {"1": 6, "2": 10, "s": 6, "tdm4": 10.5, "tdm_unify": 9.67}
