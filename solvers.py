"""Noise schedule, exponential-integrator steps and the PF-ODE driver (TDD Eqs. 9, 15, 16).

Everything a solver needs to know about the network is `model(x_t, t) -> eps` with t of shape (b,).
Every solver has one signature and takes one step from t down to s:

    x_s, past = solver(model, x_t, t, s, schedule, past)

t and s are timesteps, a number for the whole batch or a (b,) tensor, integer or not. `past` is what
a multistep solver remembers of its last step; None starts afresh and the others pass None along.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

CLEAN = -1  # the timestep of clean data: alpha = 1, sigma = 0. Timestep 0 still holds sigma_0.


# ------------------------------------------------------------------------------ noise schedule
#
# The table holds log alpha, and sigma follows from expm1: near t = 0 alpha is almost 1, and
# sqrt(1 - alpha^2) would lose half of its digits. Arithmetic stays in float64, on scalars or (b,)
# vectors, whatever the precision of the samples.


@dataclass(frozen=True)
class Schedule:
    """Variance-preserving noise schedule x_t = alpha_t x_0 + sigma_t eps on timesteps 0..T-1.

    log_alpha: (T + 1,) in float64; entry t + 1 belongs to timestep t, entry 0 to CLEAN. Between
    the entries log alpha is linear, which gives every real t in [-1, T-1] its alpha and sigma.
    """

    log_alpha: Tensor

    @property
    def T(self) -> int:
        return len(self.log_alpha) - 1

    def to(self, device) -> "Schedule":
        return Schedule(self.log_alpha.to(device))

    def at(self, t, ndim: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_t, sigma_t and lam_t = log(alpha_t / sigma_t), to broadcast over `ndim` axes."""
        # A number stays 0-dimensional: it broadcasts as it is and never promotes a dtype.
        t = torch.as_tensor(t, device=self.log_alpha.device).to(self.log_alpha.dtype)
        t = t.reshape(t.shape + (1,) * (ndim - t.ndim)) if t.ndim else t  # (b, 1, ..) or ()
        below = t.floor().long().clamp(-1, self.T - 2)
        low, high = self.log_alpha[below + 1], self.log_alpha[below + 2]
        log_alpha = low + (t - below) * (high - low)
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        return log_alpha.exp(), sigma, log_alpha - sigma.log()

    def lam(self, t, ndim: int = 0) -> Tensor:
        return self.at(t, ndim)[2]

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The real-valued timestep with log-SNR lam, the inverse of lam_t on [CLEAN, T-1]."""
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * lam.to(self.log_alpha.dtype))
        # searchsorted wants an ascending list, and alpha falls with t.
        falling = -self.log_alpha
        above = torch.searchsorted(falling, -log_alpha.contiguous()).clamp(1, self.T)
        low, high = self.log_alpha[above - 1], self.log_alpha[above]
        return above - 2 + (log_alpha - low) / (high - low)

    def diffuse(self, x_0: Tensor, eps: Tensor, t) -> Tensor:
        """A draw of x_t ~ N(alpha_t x_0, sigma_t^2 I) from unit noise eps (Alg. 1, line 10)."""
        alpha_t, sigma_t, _ = self.at(t, x_0.ndim)
        return _mix(alpha_t, x_0, sigma_t, eps)


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


# ------------------------------------------------------------------ eps, x_0 and v predictions
#
# x_t = alpha_t x_0 + sigma_t eps ties the three together: any one of them and x_t give the others.


def x0_from_eps(x_t: Tensor, eps: Tensor, t, schedule: Schedule) -> Tensor:
    alpha_t, sigma_t, _ = schedule.at(t, x_t.ndim)
    return _mix(1 / alpha_t, x_t, -sigma_t / alpha_t, eps)


def eps_from_x0(x_t: Tensor, x_0: Tensor, t, schedule: Schedule) -> Tensor:
    alpha_t, sigma_t, _ = schedule.at(t, x_t.ndim)
    return _mix(1 / sigma_t, x_t, -alpha_t / sigma_t, x_0)


def v_from_eps(x_t: Tensor, eps: Tensor, t, schedule: Schedule) -> Tensor:
    """v = alpha_t eps - sigma_t x_0."""
    alpha_t, sigma_t, _ = schedule.at(t, x_t.ndim)
    return _mix(1 / alpha_t, eps, -sigma_t / alpha_t, x_t)


def eps_from_v(x_t: Tensor, v: Tensor, t, schedule: Schedule) -> Tensor:
    alpha_t, sigma_t, _ = schedule.at(t, x_t.ndim)
    return _mix(alpha_t, v, sigma_t, x_t)


def _mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y in the tensors' precision, but at least float32: samples are not kept in half."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return a.to(x.device, dtype) * x.to(dtype) + b.to(x.device, dtype) * y.to(dtype)


# ---------------------------------------------------------------------- exponential integrator
#
# The PF-ODE is linear in x but for the network's prediction. In lam its linear part integrates
# exactly, which leaves these two forms: exact as far as eps (or x_0) does not change from t to s.


def integrate_eps(x_t: Tensor, eps: Tensor, t, s, schedule: Schedule) -> Tensor:
    """Eq. 15: x_s = alpha_s/alpha_t x_t - sigma_s (e^h - 1) eps, h = lam_s - lam_t.

    sigma_s (e^h - 1) is written as alpha_s (e^-lam_t - e^-lam_s), finite for s = CLEAN as well.
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
    """The x_0 by which Eq. 16 leads from x_t to x_s: of order 1 the prediction, else its mean."""
    _, sigma_t, lam_t = schedule.at(t, x_t.ndim)
    alpha_s, sigma_s, lam_s = schedule.at(s, x_t.ndim)
    share = -alpha_s * torch.expm1(lam_t - lam_s)
    return _mix(1 / share, x_s, -sigma_s / sigma_t / share, x_t)


def renoise(x_s: Tensor, s, p, z: Tensor, schedule: Schedule) -> Tensor:
    """Eq. 18: x_p = alpha_p/alpha_s x_s + sqrt(1 - alpha_p^2/alpha_s^2) z, forward from s to p."""
    ratio = schedule.at(p, x_s.ndim)[0] / schedule.at(s, x_s.ndim)[0]
    return _mix(ratio, x_s, (1 - ratio**2).sqrt(), z)


# ------------------------------------------------------------------------------------- solvers
#
# All of second order do the same: correct the prediction for its slope in lam, then integrate as
# if it were constant. They differ in what they predict (eps, or x_0 in the ++ solvers) and in where
# the slope comes from: a second evaluation at u (2S), or the step before (2M).


def ddim(model, x_t: Tensor, t, s, schedule: Schedule, past=None):
    """Order 1, Eq. 15 with one evaluation: a DDIM step, and the jump f_theta(x_t, t, s) itself."""
    return integrate_eps(x_t, eps_theta(model, x_t, t, schedule), t, s, schedule), past


def dpm_2s(model, x_t: Tensor, t, s, schedule: Schedule, past=None, u=None):
    """Order 2 on eps: DPM-Solver-2 (arXiv 2206.00927, Algorithm 1) through the midpoint u."""
    return _two_stage(eps_theta, integrate_eps, model, x_t, t, s, schedule, u), past


def dpmpp_2s(model, x_t: Tensor, t, s, schedule: Schedule, past=None, u=None):
    """Order 2 on x_0: DPM-Solver++(2S) (arXiv 2211.01095, Algorithm 1), also TCD's Eq. 22."""
    return _two_stage(x_theta, integrate_x0, model, x_t, t, s, schedule, u), past


def dpm_2m(model, x_t: Tensor, t, s, schedule: Schedule, past=None):
    """Order 2 on eps from one evaluation and the last step's: multistep DPM-Solver."""
    return _two_step(eps_theta, integrate_eps, model, x_t, t, s, schedule, past)


def dpmpp_2m(model, x_t: Tensor, t, s, schedule: Schedule, past=None):
    """Order 2 on x_0 from one evaluation and the last step's: DPM-Solver++(2M), Algorithm 2."""
    return _two_step(x_theta, integrate_x0, model, x_t, t, s, schedule, past)


def eps_theta(model, x_t: Tensor, t, schedule: Schedule) -> Tensor:
    """model(x_t, t) with t spread to one timestep an example, (b,)."""
    return model(x_t, torch.as_tensor(t, device=x_t.device).expand(len(x_t)))


def x_theta(model, x_t: Tensor, t, schedule: Schedule) -> Tensor:
    """The x_0 prediction that Eq. 16 starts from."""
    return x0_from_eps(x_t, eps_theta(model, x_t, t, schedule), t, schedule)


def _two_stage(predict, integrate, model, x_t, t, s, schedule, u):
    """Step to u, predict there too, and integrate t -> s with the prediction's slope in lam."""
    at_t = predict(model, x_t, t, schedule)
    if not torch.is_tensor(s) and s == CLEAN:
        return integrate(x_t, at_t, t, s, schedule)
    lam_t, lam_s = schedule.lam(t), schedule.lam(s)
    if u is None:
        u = schedule.t_of_lam(torch.where(lam_s.isinf(), lam_t, (lam_t + lam_s) / 2))
    at_u = predict(model, integrate(x_t, at_t, t, u, schedule), u, schedule)
    over_2r = _over_2r(schedule, t, s, u, t, x_t.ndim)
    return integrate(x_t, _mix(1 - over_2r, at_t, over_2r, at_u), t, s, schedule)


def _two_step(predict, integrate, model, x_t, t, s, schedule, past):
    """Integrate t -> s with the slope in lam between the last prediction, in `past`, and this."""
    at_t = sloped = predict(model, x_t, t, schedule)
    if past is not None:
        at_last, last = past
        over_2r = _over_2r(schedule, t, s, t, last, x_t.ndim)
        sloped = _mix(1 + over_2r, at_t, -over_2r, at_last)
    return integrate(x_t, sloped, t, s, schedule), (at_t, t)


def _over_2r(schedule: Schedule, t, s, later, earlier, ndim: int) -> Tensor:
    """1/(2r), r the share of the step t -> s in lam that lies between the two predictions."""
    step = schedule.lam(s, ndim) - schedule.lam(t, ndim)
    over_2r = step / (2 * (schedule.lam(later, ndim) - schedule.lam(earlier, ndim)))
    # A step to CLEAN is infinitely long in lam, so it has no slope: order 1, as in every sampler.
    # One from t to t itself needs none.
    return torch.where(step.isinf() | (step == 0), torch.zeros_like(over_2r), over_2r)


SOLVERS = {"ddim": ddim, "dpm2s": dpm_2s, "dpm2m": dpm_2m, "dpm++2s": dpmpp_2s, "dpm++2m": dpmpp_2m}


def solve(model, x_t: Tensor, timesteps, schedule: Schedule, solver=ddim, callback=None) -> Tensor:
    """Follow the PF-ODE through a descending list of timesteps (Phi of Eq. 9, repeated).

    timesteps: where x_t is, then every stop; end on CLEAN for data. callback(s, x_s) after a step.
    """
    past = None
    for t, s in pairwise(timesteps):
        x_t, past = solver(model, x_t, t, s, schedule, past)
        if callback is not None:
            callback(s, x_t)
    return x_t
