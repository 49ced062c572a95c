"""The settings of a run on 2-D data, which train_toy.py makes from its flags."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ToyConfig:
    """Settings of teacher, students and evaluation; train_toy.py --help describes each flag."""

    data: str
    methods: tuple[str, ...]
    tcf: tuple[str, ...]
    steps: int
    seeds: int
    seed: int
    batch_size: int
    lr: float
    ema: float
    kmin: int
    kmax: int
    reach: float | None  # e of Eq. 7, T/kmin unless given
    eta: float
    rho: float
    w: float  # the guidance w' to distil, g - 1
    N: int  # steps of the teacher's solver in training
    solver: str
    samples: int
    reference_steps: int  # steps of the teacher's solution that samples are compared with

    @property
    def ends(self) -> list[int]:
        """The fewest and the most steps, once if they are the same."""
        return sorted({self.kmin, self.kmax})
