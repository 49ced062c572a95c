"""Noise schedule, exponential-integrator steps, PF-ODE driver (TDD Eqs. 6, 9, 15, 16, 18).

A network is `model(x_t, t) -> eps` with t of shape (b,). A solver takes one step from t down to s:

    x_s = ddim(model, x_t, t, s, schedule)

t and s are timesteps, a number for the whole batch or a (b,) tensor, integer or not. A multistep
solver remembers the step before, so a new one is made for each trajectory: SOLVERS maps names to
functions that return a solver.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

CLEAN = -1  # the timestep of clean data: alpha = 1, sigma = 0. Timestep 0 still holds sigma_0.


# ------------------------------------------------------------------------------ noise schedule
#
# The table holds log alpha, and sigma follows from expm1: near t = 0 alpha is almost 1, where
# sqrt(1 - alpha^2) loses half of its digits. The schedule's arithmetic is in float64 whatever the
# precision of the samples; it is done on scalars or (b,) vectors and costs nothing. Numbers are
# looked up on the CPU and timesteps of a batch where they are, so that no GPU has to be waited for.


@dataclass(frozen=True)
class Schedule:
    """Variance-preserving noise schedule x_t = alpha_t x_0 + sigma_t eps on timesteps 0..T-1.

    log_alpha: (T + 1,) in float64, on the CPU; entry t + 1 belongs to timestep t, entry 0 to CLEAN.
    Between the entries log alpha is linear, so alpha and sigma exist for every real t in [-1, T-1].
    """

    log_alpha: Tensor
    copies: dict = field(default_factory=dict, repr=False, compare=False)  # device -> log_alpha

    @property
    def T(self) -> int:
        return len(self.log_alpha) - 1

    def table(self, device: torch.device) -> Tensor:
        """log_alpha on a device, copied there once."""
        if device not in self.copies:
            self.copies[device] = to_device(self.log_alpha, device)
        return self.copies[device]

    def at(self, t, ndim: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_t, sigma_t and lam_t = log(alpha_t / sigma_t), to broadcast over `ndim` axes.

        They are on t's device. A number's stay 0-dimensional on the CPU: as such they broadcast
        with samples on any device, and never promote a dtype.
        """
        t = torch.as_tensor(t).to(self.log_alpha.dtype)
        table = self.table(t.device)
        t = t.reshape(t.shape + (1,) * (ndim - t.ndim)) if t.ndim else t  # (b, 1, ..) or ()
        below = t.floor().long().clamp(-1, self.T - 2)
        low, high = table[below + 1], table[below + 2]
        log_alpha = low + (t - below) * (high - low)
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        return log_alpha.exp(), sigma, log_alpha - sigma.log()

    def lam(self, t, ndim: int = 0) -> Tensor:
        return self.at(t, ndim)[2]

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The real-valued timestep with log-SNR lam, the inverse of lam_t on [CLEAN, T-1]."""
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * lam.to(self.log_alpha.dtype))
        # searchsorted wants an ascending list, and alpha falls with t.
        table = self.table(lam.device)
        above = torch.searchsorted(-table, -log_alpha.contiguous()).clamp(1, self.T)
        low, high = table[above - 1], table[above]
        return above - 2 + (log_alpha - low) / (high - low)

    def diffuse(self, x_0: Tensor, eps: Tensor, t) -> Tensor:
        """x_t ~ N(alpha_t x_0, sigma_t^2 I) from unit noise eps (Algorithm 1, line 10)."""
        alpha_t, sigma_t, _ = self.at(t, x_0.ndim)
        return _mix(alpha_t, x_0, sigma_t, eps)


def to_device(x: Tensor, device) -> Tensor:
    """A tensor on a device; from the CPU by way of pinned memory, for which no GPU has to stop.

    From other memory it would first finish all work that was queued before.
    """
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=x.device.type == "cpu")


def sdxl_schedule(T: int = 1000, beta_0: float = 0.00085, beta_T: float = 0.012) -> Schedule:
    """Stable Diffusion's "scaled linear" schedule: the square roots of beta are equally spaced."""
    beta = torch.linspace(beta_0**0.5, beta_T**0.5, T, dtype=torch.float64) ** 2
    log_alpha = 0.5 * torch.log1p(-beta).cumsum(0)
    return Schedule(torch.cat([log_alpha.new_zeros(1), log_alpha]))


def solver_grid(N: int, T: int = 1000) -> list[int]:
    """The solver's timesteps t_0..t_N: t_n = nT/N - 1, and t_0 = 0 (TDD section 3.1).

    Raises ValueError unless N divides T.
    """
    if not 0 < N <= T or T % N:
        raise ValueError(f"the {N} solver steps (N) must divide the {T} timesteps (T)")
    return [0] + [n * (T // N) - 1 for n in range(1, N + 1)]


# --------------------------------------------------------------------- eps and x_0 predictions
#
# x_t = alpha_t x_0 + sigma_t eps: x_t and either prediction give the other.


def x0_from_eps(x_t: Tensor, eps: Tensor, t, schedule: Schedule) -> Tensor:
    alpha_t, sigma_t, _ = schedule.at(t, x_t.ndim)
    return _mix(1 / alpha_t, x_t, -sigma_t / alpha_t, eps)


def eps_from_x0(x_t: Tensor, x_0: Tensor, t, schedule: Schedule) -> Tensor:
    alpha_t, sigma_t, _ = schedule.at(t, x_t.ndim)
    return _mix(1 / sigma_t, x_t, -alpha_t / sigma_t, x_0)


def _mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y in the tensors' precision, but at least float32: samples are not kept in half."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return a.to(dtype) * x.to(dtype) + b.to(dtype) * y.to(dtype)


# ---------------------------------------------------------------------- exponential integrator
#
# The PF-ODE is linear in x except for the network's prediction. Its linear part integrates exactly
# in lam, which leaves these two forms: exact if eps (or x_0) stays constant from t to s.


def integrate_eps(x_t: Tensor, eps: Tensor, t, s, schedule: Schedule) -> Tensor:
    """Eq. 15: x_s = alpha_s/alpha_t x_t - sigma_s (e^h - 1) eps, h = lam_s - lam_t.

    sigma_s (e^h - 1) is computed as alpha_s (e^-lam_t - e^-lam_s), which is finite at s = CLEAN.
    """
    alpha_t, _, lam_t = schedule.at(t, x_t.ndim)
    alpha_s, _, lam_s = schedule.at(s, x_t.ndim)
    return _mix(alpha_s / alpha_t, x_t, -alpha_s * ((-lam_t).exp() - (-lam_s).exp()), eps)


def integrate_x0(x_t: Tensor, x_0: Tensor, t, s, schedule: Schedule) -> Tensor:
    """Eq. 16: x_s = sigma_s/sigma_t x_t - alpha_s (e^-h - 1) x_0, h = lam_s - lam_t."""
    _, sigma_t, lam_t = schedule.at(t, x_t.ndim)
    alpha_s, sigma_s, lam_s = schedule.at(s, x_t.ndim)
    return _mix(sigma_s / sigma_t, x_t, -alpha_s * torch.expm1(lam_t - lam_s), x_0)


def x0_of_step(x_t: Tensor, x_s: Tensor, t, s, schedule: Schedule) -> Tensor:
    """The x_0 with which Eq. 16 leads from x_t to x_s: the prediction itself for order 1."""
    _, sigma_t, lam_t = schedule.at(t, x_t.ndim)
    alpha_s, sigma_s, lam_s = schedule.at(s, x_t.ndim)
    coefficient = -alpha_s * torch.expm1(lam_t - lam_s)
    return _mix(1 / coefficient, x_s, -sigma_s / sigma_t / coefficient, x_t)


def renoise(x_s: Tensor, s, p, z: Tensor, schedule: Schedule) -> Tensor:
    """Eq. 18: x_p = alpha_p/alpha_s x_s + sqrt(1 - alpha_p^2/alpha_s^2) z, forward from s to p."""
    ratio = schedule.at(p, x_s.ndim)[0] / schedule.at(s, x_s.ndim)[0]
    return _mix(ratio, x_s, (1 - ratio**2).sqrt(), z)


# ------------------------------------------------------------------------------------- solvers
#
# Every second-order solver extrapolates the prediction along its slope in lam and then integrates
# it as a constant. Solvers differ in what they predict (eps, or x_0 in the ++ solvers) and in where
# the slope comes from: a second evaluation at u (2S) or the step before (2M).


def ddim(model, x_t: Tensor, t, s, schedule: Schedule) -> Tensor:
    """Order 1, Eq. 15 with one evaluation: a DDIM step, and Eq. 6's jump f_theta(x_t, t, s)."""
    eps = eps_theta(model, x_t, t, schedule)
    return integrate_eps(x_t, eps, t, s, schedule)


def dpm_2s(model, x_t: Tensor, t, s, schedule: Schedule, u=None) -> Tensor:
    """Order 2 on eps: DPM-Solver-2 (arXiv 2206.00927, Algorithm 1) through the midpoint u."""
    return _two_stage(eps_theta, integrate_eps, model, x_t, t, s, schedule, u)


def dpmpp_2s(model, x_t: Tensor, t, s, schedule: Schedule, u=None) -> Tensor:
    """Order 2 on x_0: DPM-Solver++(2S) (arXiv 2211.01095, Algorithm 1), also TCD's Eq. 22."""
    return _two_stage(x_theta, integrate_x0, model, x_t, t, s, schedule, u)


def dpm_2m():
    """A solver of order 2 on eps with one evaluation a step: multistep DPM-Solver."""
    return _two_step(eps_theta, integrate_eps)


def dpmpp_2m():
    """A solver of order 2 on x_0 with one evaluation a step: DPM-Solver++(2M), Algorithm 2."""
    return _two_step(x_theta, integrate_x0)


SOLVERS = {
    "ddim": lambda: ddim, "dpm2s": lambda: dpm_2s, "dpm2m": dpm_2m,
    "dpm++2s": lambda: dpmpp_2s, "dpm++2m": dpmpp_2m,
}  # fmt: skip
ONE_STEP = ("ddim", "dpm2s", "dpm++2s")  # Phi of Eq. 9: the others remember the step before


def eps_theta(model, x_t: Tensor, t, schedule: Schedule) -> Tensor:
    """model(x_t, t) with t expanded to one timestep an example, (b,)."""
    return model(x_t, per_example(t, x_t))


def per_example(t, x: Tensor) -> Tensor:
    """A number, or a 0-dimensional tensor on the CPU, for each of b examples; (b,) stays itself."""
    if not torch.is_tensor(t):
        return torch.full((len(x),), t, device=x.device)
    # Filling takes the value along; copying it to a GPU would make the host wait.
    return t if t.ndim else torch.full((len(x),), t.item(), dtype=t.dtype, device=x.device)


def x_theta(model, x_t: Tensor, t, schedule: Schedule) -> Tensor:
    """The x_0 prediction of the same network, which Eq. 16 integrates."""
    return x0_from_eps(x_t, eps_theta(model, x_t, t, schedule), t, schedule)


def _two_stage(predict, integrate, model, x_t, t, s, schedule, u):
    """Step to u, predict there too, and integrate t -> s with the prediction's slope in lam."""
    at_t = predict(model, x_t, t, schedule)
    if not torch.is_tensor(s) and s == CLEAN:
        return integrate(x_t, at_t, t, s, schedule)
    lam_t, lam_s = schedule.lam(t), schedule.lam(s)
    if u is None:
        u = schedule.t_of_lam(torch.where(lam_s.isinf(), lam_t, (lam_t + lam_s) / 2))
    x_u = integrate(x_t, at_t, t, u, schedule)
    at_u = predict(model, x_u, u, schedule)
    weight = _slope_weight(schedule, t, s, u, t, x_t.ndim)
    return integrate(x_t, _mix(1 - weight, at_t, weight, at_u), t, s, schedule)


def _two_step(predict, integrate):
    """A solver that takes the slope in lam between its last prediction and the present one."""
    last = None

    def solver(model, x_t: Tensor, t, s, schedule: Schedule) -> Tensor:
        nonlocal last
        at_t = prediction = predict(model, x_t, t, schedule)
        if last is not None:
            t_last, at_last = last
            weight = _slope_weight(schedule, t, s, t, t_last, x_t.ndim)
            prediction = _mix(1 + weight, at_t, -weight, at_last)
        last = t, at_t
        return integrate(x_t, prediction, t, s, schedule)

    return solver


def _slope_weight(schedule: Schedule, t, s, later, earlier, ndim: int) -> Tensor:
    """1/(2r) of two predictions' difference, r being their distance in lam over the step's."""
    step = schedule.lam(s, ndim) - schedule.lam(t, ndim)
    weight = step / (2 * (schedule.lam(later, ndim) - schedule.lam(earlier, ndim)))
    # A step to CLEAN is infinitely long in lam and has no slope: order 1, as in every sampler. A
    # step of no length needs none.
    return torch.where(step.isinf() | (step == 0), torch.zeros_like(weight), weight)


def solve(model, x_t: Tensor, timesteps, schedule: Schedule, solver=ddim, callback=None) -> Tensor:
    """Follow the PF-ODE through a descending list of timesteps (Phi of Eq. 9, repeated).

    timesteps: where x_t is, then every stop; end on CLEAN for data. callback(s, x_s) is called
    after each step.
    """
    for t, s in pairwise(timesteps):
        x_t = solver(model, x_t, t, s, schedule)
        if callback is not None:
            callback(s, x_t)
    return x_t


def noise_stream(seeds, shape, device="cpu") -> Iterator[Tensor]:
    """Endless draws of (b, *shape), image i from its own CPU generator seeded with seeds[i].

    The first draw is the starting noise: the same on every device, and the same as diffusers'.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    while True:
        draws = [torch.randn((1, *shape), generator=generator) for generator in generators]
        yield to_device(torch.cat(draws), device)
