"""Target-Driven Distillation (arXiv 2409.01347), section 3 in the paper's order.

Eqs. 6, 9, 15, 16 and 18, which integrate the PF-ODE, are in solvers.py.

A network is any callable model(x_t, t, cond) -> eps, with x_t (b, ..), t (b,) and cond a tensor or
a dict of tensors with a leading axis b. `null` is the condition of an empty prompt, in the same
form with a leading axis of b or 1. Teacher, student and target network are three such callables.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from solvers import CLEAN, Schedule, ddim, eps_from_x0, renoise, solver_grid, to_device, x0_from_eps

# ------------------------------------------------------------- 3.2 target timestep selection
#
# The methods differ only in which targets tau they train from each start t_{n+1}. Eq. 5's times
# mT/k are rational and need not lie on the solver's grid, so a target has two sides: its exact time
# decides whether Eq. 7 admits it (750, not 751), and the grid timestep that a k-step schedule
# visits (751) is what the network is trained for and later sampled at.


@dataclass(frozen=True)
class TargetSet:
    """Target timesteps (Eq. 5) and, for each solver step n, those that a start may aim at.

    grid: (N + 1,) the solver's timesteps t_0..t_N
    tau: (M,) targets, on the grid points that the k-step schedules visit
    first, count: (N,) tau[first[n] : first[n] + count[n]] are admitted at t_n
    K: (M,) whose next stop each target is, of `next_stops`; None for Eqs. 5 and 7
    """

    grid: Tensor
    tau: Tensor
    first: Tensor
    count: Tensor
    K: Tensor | None = None

    def select(self, n: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eq. 7: tau_m, one of the targets at t_n, by uniform u in [0, 1); (b,). And its K."""
        m = self.first[n] + (u * self.count[n]).floor().long()
        return self.tau[m], None if self.K is None else self.K[m]


def target_set(N: int, kmin: int, kmax: int, e: float | None = None, T: int = 1000) -> TargetSet:
    """Eq. 5's targets for schedules of kmin..kmax steps, with Eq. 7's reach e (default T/kmin).

    Raises ValueError unless 1 <= kmin <= kmax <= N, N >= 2 divides T, and e leaves every t_n
    a target.
    """
    grid = solver_grid(N, T)
    if not 1 <= kmin <= kmax <= N or N < 2:
        raise ValueError(
            f"schedules of kmin {kmin} to kmax {kmax} steps do not fit N = {N} solver steps: "
            "1 <= kmin <= kmax <= N and N >= 2 are needed"
        )
    # A set: the 1/2 of k = 4, 6 and 8 is one time and no likelier than the others. On a coarse grid
    # two times may still fall on one timestep, which is then drawn twice as often.
    exact = sorted({Fraction(m * T, k) for k in range(kmin, kmax + 1) for m in range(k)})  # Eq. 5
    reach = Fraction(T, kmin) if e is None else Fraction(e)
    first, count = [], []
    for n in range(N):
        # Eq. 7's t is t_n: the target network starts there and cannot jump back up beyond it.
        t = Fraction(n * T, N)
        low, high = bisect_left(exact, t - reach), bisect_right(exact, t)  # Eq. 7
        if low >= high:
            raise ValueError(f"no target lies within e = {float(reach):g} below t = {float(t):g}")
        first.append(low)
        count.append(high - low)
    # `equidistant` visits index floor(iN/k) from above, which is ceil(mN/k) from below: 750 -> 751.
    tau = [grid[math.ceil(time * N / T)] for time in exact]
    return TargetSet(*map(torch.tensor, (grid, tau, first, count)))


def next_stops(N: int, Ks: tuple[int, ...], T: int = 1000) -> TargetSet:
    """The next stop at or below t_n of the K-step schedule, for each K of Ks.

    One K is PCM's rule (Eq. 4). Of several, one is drawn for each start: all the jumps that
    samplers of these numbers of steps make, and no others. Not in the papers.
    Raises ValueError unless 1 <= K <= N for each K, and N >= 2 divides T.
    """
    grid = solver_grid(N, T)
    if not Ks or not 1 <= min(Ks) <= max(Ks) <= N or N < 2:
        raise ValueError(f"K of {[*Ks]} do not fit N = {N} solver steps: 1 <= K <= N and N >= 2")
    # m = floor(nK/N) makes mT/K the largest stop <= t_n. Eq. 4 prints tau < t_n; by PCM's paper a
    # segment's end is its own target, where the target network's jump is the identity.
    tau = [grid[-(-(n * K // N) * N // K)] for n in range(N) for K in Ks]
    first, count = [n * len(Ks) for n in range(N)], [len(Ks)] * N
    return TargetSet(*map(torch.tensor, (grid, tau, first, count, [*Ks] * N)))


def targets_of(
    method: str, N: int, kmin: int = 4, kmax: int = 8, reach: float | None = None,
    Ks: tuple[int, ...] = (), T: int = 1000,
) -> TargetSet:  # fmt: skip
    """The targets in which consistency distillation's methods differ (the remark below Eq. 5).

    kmin, kmax: TDD's K_min and K_max; PCM's number of segments is kmin; the others ignore both.
    reach: TDD's e of Eq. 7 in timesteps, T/kmin unless given. Ks: instead of all that, for TDD, the
    numbers of steps whose next stops are the targets.
    TCD/CTM may reach anywhere up to t_n: with Eq. 7's e = T/N they would be left two targets.
    """
    match method:
        case "cm":
            return target_set(N, 1, 1, T=T)
        case "pcm":
            return next_stops(N, (kmin,), T)
        case "ctm" | "tcd":
            return target_set(N, N, N, e=T, T=T)
        case "tdd":
            return next_stops(N, Ks, T) if Ks else target_set(N, kmin, kmax, reach, T)
    raise ValueError(f"unknown method {method!r}: cm, pcm, ctm, tcd or tdd")


def offset(tau: Tensor, eta: float, u: Tensor) -> Tensor:
    """Eq. 8: tau~ ~ U[(1 - eta) tau, tau] from uniform u in [0, 1), over whole timesteps.

    Both ends count, so that tau itself, where samplers without noise land, is among them.
    """
    # Against rounding: (1 - 0.7) * 10 is a little above 3, and the largest u times 474 is 474.
    lowest = ((1 - eta) * tau.double() - 1e-6).ceil()
    return torch.minimum((lowest + u * (tau - lowest + 1)).floor().long(), tau)


# ------------------------------------------------------------------------------- the loss
#
# Algorithm 1 in two halves, so that a test can compare the loss of a fixed sample with the paper's
# lines one by one: `sample_step` holds all of its randomness, `tdd_loss` all of its arithmetic.


@dataclass(frozen=True)
class StepSample:
    """What Algorithm 1 draws for a batch: times, who keeps the prompt, and the noise."""

    t_next: Tensor  # (b,) t_{n+1}
    t_n: Tensor  # (b,)
    tau: Tensor  # (b,) tau~
    keep_prompt: Tensor  # (b,) bool
    noise: Tensor | None  # (b, ..)
    guided_rows: Tensor | None  # indices of the examples with a prompt; None guides all b
    K: Tensor | None = None  # (b,) whose next stop tau is, of `next_stops`
    x_next: Tensor | None = None  # (b, ..) x_{t_{n+1}}, where that is not noised data

    def to(self, device) -> "StepSample":
        tensors = (getattr(self, field.name) for field in fields(self))
        return StepSample(*(x if x is None else to_device(x, device) for x in tensors))


def sample_step(
    targets: TargetSet, shape, eta: float, rho: float, generator: torch.Generator
) -> StepSample:
    """Algorithm 1, lines 8-9 and 11, for x_0 of the given shape (b, ..), from a CPU generator.

    Random numbers from a CPU are the same on every device, and no GPU has to be waited for.
    """
    u_n, u_tau, u_eta, u_rho = torch.rand((4, shape[0]), generator=generator, dtype=torch.float64)
    n = (u_n * len(targets.count)).floor().long()  # n ~ U[0, N - 1]
    tau, K = targets.select(n, u_tau)  # Eq. 7
    tau = offset(tau, eta, u_eta)  # Eq. 8
    keep_prompt = u_rho >= rho  # line 11
    noise = torch.randn(shape, generator=generator)
    guided_rows = keep_prompt.nonzero()[:, 0]
    return StepSample(targets.grid[n + 1], targets.grid[n], tau, keep_prompt, noise, guided_rows, K)


def squared_l2(d: Tensor) -> Tensor:
    """Eq. 10's distance as a mean over all axes but the first, (b, ..) -> (b,)."""
    # The mean, as in the published script: Adam ignores the factor but gradient clipping does not,
    # and with the sum, clipping would depend on the picture's size.
    return d.float().square().flatten(1).mean(1)


def pseudo_huber(d: Tensor, c: float = 0.001) -> Tensor:
    """sqrt(d^2 + c^2) - c in the same mean: the published training script's setting."""
    return ((d.float().square() + c * c).sqrt() - c).flatten(1).mean(1)


class TDDLoss(NamedTuple):
    """The loss of each example, and what a further loss may build on."""

    loss: Tensor  # (b,)
    prediction: Tensor  # (b, ..) f_theta(x_{t_{n+1}}, t_{n+1}, tau~)
    target: Tensor  # (b, ..) f_theta-(x_{t_n}, t_n, tau~)
    cond: Tensor | dict  # the condition used, null where the prompt was dropped
    x_n: Tensor  # (b, ..) where the teacher's step has led


def tdd_loss(
    student, target_net, teacher, x_0: Tensor | None, cond, null, sample: StepSample, w,
    schedule: Schedule, solver=ddim, jump=ddim, distance=squared_l2,
) -> TDDLoss:  # fmt: skip
    """Algorithm 1, lines 10-16: the consistency loss that CM, PCM, TCD and TDD share (Eqs. 3, 10).

    x_0: (b, ..) data, unless the sample has x_next. w: the guidance w' = g - 1, a number or (b,).
    solver: Phi, one step of the teacher's PF-ODE. jump: f, Eq. 15's `ddim` or another of tcd.TCF.
    distance: (b, ..) -> (b,).

    With every grid point as a target this is TCD's Algorithms 1 and 2.
    """
    t_next, t_n, tau, x_next = sample.t_next, sample.t_n, sample.tau, sample.x_next
    # Line 10: x_{t_{n+1}} ~ N(alpha x_0, sigma^2 I), unless it is on the teacher's own path.
    x_next = schedule.diffuse(x_0, sample.noise, t_next) if x_next is None else x_next
    # Line 11: the condition, or with probability rho the null condition.
    cond = where_cond(sample.keep_prompt, cond, null)
    with torch.no_grad():
        # Lines 12-15, Eq. 9: one teacher step, guided (Eq. 12) where the prompt was kept. Elsewhere
        # cond is null already, so guidance has no effect.
        eps_hat = guided(teacher, cond, null, w, sample.guided_rows)
        x_n = solver(eps_hat, x_next, t_next, t_n, schedule)
        # Line 16, Eqs. 10 and 11: f_theta-(x_{t_n}, t_n, tau~) ..
        target = jump(conditioned(target_net, cond), x_n, t_n, tau, schedule)
    # .. and f_theta(x_{t_{n+1}}, t_{n+1}, tau~), which is to agree with it.
    prediction = jump(conditioned(student, cond), x_next, t_next, tau, schedule)
    return TDDLoss(distance(prediction - target), prediction, target, cond, x_n)


@torch.no_grad()
def ema_update(target_net, student, mu: float) -> None:
    """Algorithm 1, line 18: theta- <- mu theta- + (1 - mu) theta, over two lists of tensors."""
    torch._foreach_lerp_(list(target_net), list(student), 1 - mu)


# ------------------------------------------------------------------ 3.3 decoupled guidance
#
# The paper's w counts from 0 (off); users know g = 1 + w. Line 12 mixes two teacher steps Phi; here
# the two eps are mixed before one step. For DDIM, which is linear in eps, that is the same, and for
# a solver of higher order it is the guided PF-ODE that Phi stands for.


def conditioned(model, cond):
    """model(x_t, t, cond) as the eps(x_t, t) that solvers take.

    Networks of one more input, a jump's target time or the number of steps, take it last, (b,).
    """
    return lambda x_t, t, *extra: model(x_t, t, cond, *extra)


def with_scalar(model, value):
    """model(x_t, t, cond, value) with one value for all examples, or (b,) of them."""
    return lambda x_t, t, cond, *extra: model(x_t, t, cond, torch.zeros_like(t) + value, *extra)


def guided(model, cond, null, w, rows: Tensor | None = None):
    """Eq. 12 (19): eps(x_t, t) = (1 + w) eps(x_t, t, c) - w eps(x_t, t), both passes in one batch.

    w: a number or (b,). rows: indices of the examples to guide, if not all: the others need no
    second pass. Unless w is the number 0 the result is at least float32, whatever the network's is.
    """
    if not torch.is_tensor(w) and w == 0:
        return conditioned(model, cond)
    rows = slice(None) if rows is None else rows
    both = _map_cond(lambda c, empty: torch.cat([c, empty.expand_as(c)[rows]]), cond, null)

    def eps_hat(x_t: Tensor, t: Tensor, *extra: Tensor) -> Tensor:
        x_both, t_both, *extra_both = (torch.cat([a, a[rows]]) for a in (x_t, t, *extra))
        eps = model(x_both, t_both, both, *extra_both)
        eps = eps.to(torch.promote_types(eps.dtype, torch.float32))
        eps_c, eps_u = eps[: len(x_t)].clone(), eps[len(x_t) :]
        w_rows = w
        if torch.is_tensor(w):
            w_rows = append_axes(w.to(eps).expand(len(x_t))[rows], eps)
        eps_c[rows] = (1 + w_rows) * eps_c[rows] - w_rows * eps_u
        return eps_c

    return eps_hat


def tuned(w: float, w_distilled: float) -> float:
    """Eq. 13 (24): the w at which a student distilled at w' acts as the teacher does at w.

    [eps_hat_w + w' eps(x_t, t)] / (1 + w') is Eq. 12 again, at 1 + w -> (1 + w) / (1 + w').
    For a student of a range of w' (Eq. 14, 25), w_distilled is the middle of the range.
    """
    return (1 + w) / (1 + w_distilled) - 1


def tuned_with_negative(model, cond, null, negative, w: float, w_distilled: float):
    """Eq. 13 as printed, [eps_hat_w + w' eps(x_t, t)] / (1 + w'), with a negative prompt.

    The student's w' is of the null condition that it was trained with. A negative prompt takes that
    one's place in eps_hat_w alone, so the two terms do not merge as in `tuned`: three passes.
    """
    eps_hat_w = guided(model, cond, negative, w)

    def eps_hat(x_t: Tensor, t: Tensor, *extra: Tensor) -> Tensor:
        empty = _map_cond(lambda c, empty: empty.expand_as(c), cond, null)
        eps_u = conditioned(model, empty)(x_t, t, *extra)
        eps_u = eps_u.to(torch.promote_types(eps_u.dtype, torch.float32))
        return (eps_hat_w(x_t, t, *extra) + w_distilled * eps_u) / (1 + w_distilled)

    return eps_hat


def where_cond(keep_prompt: Tensor, cond, null):
    """cond where keep_prompt (b,) is true, null elsewhere."""
    return _map_cond(
        lambda c, empty: torch.where(append_axes(keep_prompt, c), c, empty), cond, null
    )


def _map_cond(function, cond, null):
    """function(cond, null), tensor by tensor if they are dicts."""
    if isinstance(cond, dict):
        return {name: function(cond[name], null[name]) for name in cond}
    return function(cond, null)


def append_axes(a: Tensor, x: Tensor) -> Tensor:
    """a with trailing axes of size 1, to broadcast against x."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


# ---------------------------------------------------------------------------- 3.4 sampling
#
# A schedule lists the k timesteps at which the network is evaluated. The stop after its last one is
# CLEAN: training's target 0 still holds sigma_0 = 0.029, a finished sample should not.


def equidistant(k: int, N: int = 250, T: int = 1000) -> list[int]:
    """The k-step schedule: every N/k-th point of the solver grid, descending from T - 1.

    Raises ValueError unless 1 <= k <= N.
    """
    if not 1 <= k <= N:
        raise ValueError(f"{k} steps: from 1 to {N} (the solver steps N) are possible")
    return [solver_grid(N, T)[N - i * N // k] for i in range(k)]


def nonequidistant(k: int, N: int = 250, kmin: int = 4, kmax: int = 8, T: int = 1000) -> list[int]:
    """The kmin-step schedule with k - kmin of the kmax-step one's timesteps, the noisiest first.

    Raises ValueError unless kmin <= k <= kmax.
    """
    if not kmin <= k <= kmax:
        raise ValueError(f"no non-equidistant schedule of {k} steps: {kmin} to {kmax} are possible")
    coarse = equidistant(kmin, N, T)
    inserted = [t for t in equidistant(kmax, N, T) if t not in coarse][: k - kmin]
    return sorted(coarse + inserted, reverse=True)


def clip_x0(x_0: Tensor, percentile: float = 0.995, max_value: float = 1.0) -> Tensor:
    """C above Eq. 17: clamp to the percentile s of |x_0| and divide by it, s in [1, max_value].

    This is Imagen's dynamic thresholding, one s an example.
    """
    # With max_value = 1, the published default, s is 1 and C a plain clamp to [-1, 1].
    s = torch.quantile(x_0.abs().flatten(1).float(), percentile, dim=1).clamp(1, max_value)
    s = append_axes(s, x_0).to(x_0.dtype)
    return x_0.clamp(-s, s) / s


def with_x0_clipping(model, clip, schedule: Schedule):
    """eps(x_t, t) with C applied to its x_0, which turns every solver's Eq. 16 into Eq. 17."""

    def eps_hat(x_t: Tensor, t: Tensor, *extra: Tensor) -> Tensor:
        x_0 = x0_from_eps(x_t, model(x_t, t, *extra), t, schedule)
        return eps_from_x0(x_t, clip(x_0), t, schedule)

    return eps_hat


@torch.no_grad()
def gamma_sample(
    model, x_t: Tensor, timesteps: list[int], schedule: Schedule, gamma: float = 0.0,
    noise: Iterator[Tensor] | None = None, clip=None, clip_steps: int = 0, jump=ddim, callback=None,
) -> Tensor:  # fmt: skip
    """The gamma-sampler, Eqs. 15-18: jump down to s = (1 - gamma) p, then renoise up to p.

    It is TCD's Algorithm 4, and at gamma = 1 its Algorithm 3.

    model: eps(x_t, t), for instance from `guided`. x_t: (b, ..) noise at timesteps[0].
    timesteps: descending, as from `equidistant`; the last step returns the x_0 prediction.
    gamma: 0 is deterministic (DDIM), 1 is multistep consistency sampling. noise: a z for each step
    but the last, unless gamma = 0. clip: C, applied in the first clip_steps steps. jump: a one-step
    solver, or any function of its signature. callback(p, x_p) is called after each step.
    Raises ValueError for a gamma outside [0, 1], or above 0 without noise.
    """
    if not 0 <= gamma <= 1 or (gamma > 0 and noise is None):
        raise ValueError(f"gamma = {gamma} must lie in [0, 1], and above 0 noise must be given")
    for i, (t, p) in enumerate(pairwise([*timesteps, CLEAN])):
        # s = (1 - gamma) p; the 1e-6 guards against rounding: (1 - 0.9) * 250 is short of 25.
        s = CLEAN if p == CLEAN else math.floor((1 - gamma) * p + 1e-6)
        # Eqs. 15 and 16, or 17 with C on x_0: from t down to s.
        eps = with_x0_clipping(model, clip, schedule) if i < clip_steps else model
        x_s = jump(eps, x_t, t, s, schedule)
        # Eq. 18: from s back up to p.
        x_t = renoise(x_s, s, p, next(noise), schedule) if s < p else x_s
        if callback is not None:
            callback(p, x_t)
    return x_t
