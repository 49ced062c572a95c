"""Pairs (x_{t_{n+1}}, x_{t_n}) from the teacher's own path: walkers from noise to data.

Guided, the teacher leaves the diffused data, and it is on its own path that one samples. A walker
goes down that path by one teacher step of Algorithm 1 whenever it is used: no data is needed, and
no more passes than with it. Not in the papers; TBCM (arXiv 2511.20410) has it for other methods.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from solvers import Schedule, ddim, to_device
from tdd import StepSample, TargetSet, append_axes, guided, offset, where_cond

BATCHES = 4  # of walkers: the next batch is then not the one that was just moved on


def stagger_goal(W: int, N: int) -> Tensor:
    """The n at which each of W walkers is when they are spread over their paths, (W,)."""
    return N - 1 - torch.arange(W) * N // W


def stagger_steps(W: int, N: int, stride: int = 1) -> int:
    """How many steps of the teacher it takes to spread them, all from n = N - 1 down.

    stride: points of the grid that a step goes down by at most.
    """
    return int(((N - 1 - stagger_goal(W, N) + stride - 1) // stride).sum())


@dataclass
class Walkers:
    """Where each of W walkers is on its path, and what stays the same all along that path.

    shape: (W, ..). grid: (N + 1,) the solver's timesteps. draw_conds(count) lists new conditions,
    of any kind. generator: of all random numbers, on the CPU.

    Nobody walks before `stagger`. x: (W, ..) each at its t_{n+1}. n: (W,). keep_prompt: (W,) bool,
    false with probability rho. w: (W,) the guidance w', uniform in w_range. conds: W conditions.
    """

    shape: tuple[int, ...]
    grid: Tensor
    rho: float
    w_range: tuple[float, float]
    draw_conds: Callable[[int], list]
    generator: torch.Generator
    device: str = "cpu"

    def __post_init__(self):
        W = self.shape[0]
        self.x = torch.zeros(self.shape, device=self.device)
        self.n = torch.zeros(W, dtype=torch.int64)
        self.keep_prompt = torch.ones(W, dtype=torch.bool)
        self.w, self.conds = torch.zeros(W), [None] * W

    def _begin(self, rows: Tensor) -> None:
        """A new path from noise for each of these walkers."""
        u_rho, u_w = torch.rand((2, len(rows)), generator=self.generator)
        low, high = self.w_range
        self.n[rows] = len(self.grid) - 2
        self.keep_prompt[rows], self.w[rows] = u_rho >= self.rho, low + (high - low) * u_w
        noise = torch.randn((len(rows), *self.shape[1:]), generator=self.generator)
        self.x[to_device(rows, self.device)] = to_device(noise, self.device)
        for row, cond in zip(rows.tolist(), self.draw_conds(len(rows)), strict=True):
            self.conds[row] = cond

    def draw(self, b: int) -> Tensor:
        """The walkers to use next, (b,), all different."""
        return torch.randperm(len(self.n), generator=self.generator)[:b]

    def sample(self, rows: Tensor, targets: TargetSet, eta: float) -> StepSample:
        """Algorithm 1's random numbers for these walkers: line 8 and 9's targets are drawn anew."""
        u_tau, u_eta = torch.rand((2, len(rows)), generator=self.generator, dtype=torch.float64)
        tau, K = targets.select(self.n[rows], u_tau)
        return self._step_sample(rows, offset(tau, eta, u_eta), K)

    def _step_sample(self, rows: Tensor, tau: Tensor, K: Tensor | None = None) -> StepSample:
        n, keep_prompt = self.n[rows], self.keep_prompt[rows]
        x_next = self.x[to_device(rows, self.device)]
        return StepSample(
            self.grid[n + 1], self.grid[n], tau, keep_prompt, None, keep_prompt.nonzero()[:, 0],
            K, x_next,
        )  # fmt: skip

    def guidance(self, rows: Tensor) -> float | Tensor:
        """w' of these walkers: (b,), or a number if it is one for all, and w' = 0 is one pass."""
        low, high = self.w_range
        return low if low == high else to_device(self.w[rows], self.device)

    def advance(self, rows: Tensor, x_n: Tensor) -> None:
        """Move these walkers to x_n (b, ..); who has arrived at t_0 begins a new path."""
        there = to_device(rows, self.device)
        # Where half precision overflows, x stays and its time goes on: a path that is a step too
        # noisy, instead of one without numbers and a checkpoint that would be passed over.
        finite = append_axes(x_n.isfinite().flatten(1).all(1), x_n)
        self.x[there] = torch.where(finite, x_n.to(self.x), self.x[there])
        arrived = self.n[rows] == 0
        self.n[rows[~arrived]] -= 1
        self._begin(rows[arrived])

    @torch.no_grad()
    def stagger(
        self, teacher, encode, schedule: Schedule, solver=ddim, batch: int = 16, stride: int = 1,
        quiet: bool = True,
    ) -> int:  # fmt: skip
        """Begin, and spread the walkers evenly over their paths; returns the steps that took.

        Otherwise all would begin their paths together, time after time. encode(conds) gives the
        condition and null condition of a list of conditions. stride: as for `stagger_steps`.
        """
        N, W = len(self.grid) - 1, len(self.n)
        self._begin(torch.arange(W))
        goal, steps = stagger_goal(W, N), stagger_steps(W, N, stride)
        with tqdm(total=steps, desc="teacher's paths", disable=quiet, dynamic_ncols=True) as bar:
            while len(behind := (self.n > goal).nonzero()[:, 0]):
                for rows in behind.split(batch):
                    cond, null = encode([self.conds[row] for row in rows.tolist()])
                    # Down by a stride, or to where the goal's pair begins.
                    n = torch.maximum(self.n[rows] + 1 - stride, goal[rows] + 1)
                    x_n = self._teacher_step(rows, n, teacher, cond, null, schedule, solver)
                    self.n[rows] = n
                    self.advance(rows, x_n)
                    bar.update(len(rows))
        return steps

    def _teacher_step(
        self, rows: Tensor, n: Tensor, teacher, cond, null, schedule, solver
    ) -> Tensor:
        """Algorithm 1, lines 11-15, as in tdd.tdd_loss, down to t_n: x_n (b, ..)."""
        sample = replace(self._step_sample(rows, n), t_n=self.grid[n]).to(self.device)
        cond = where_cond(sample.keep_prompt, cond, null)
        eps_hat = guided(teacher, cond, null, self.guidance(rows), sample.guided_rows)
        return solver(eps_hat, sample.x_next, sample.t_next, sample.t_n, schedule)
