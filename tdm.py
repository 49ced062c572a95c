"""Trajectory Distribution Matching (arXiv 2503.06674), section 3 and Algorithm 1.

Three eps-networks: the student f_theta takes K deterministic steps from noise; the teacher f_phi
gives the "real" score; f_psi gives the "fake" score, that of the student's samples. All three are
eps(x_t, t) with their condition bound. Training takes prompts alone, no data.

The paper writes x_t = x + sigma_t eps, so its samples are ours divided by alpha_t, and it leaves
lambda_tau open. Here it is sigma_tau^2 in the paper's terms, which makes the step from x_{t_i} to
its revised sample alpha_{t_i} times a difference of x_0 predictions; the second lambda_tau, in
front of Eq. 6's norm, is left out. Distances are between samples as they are here, not divided by
alpha_{t_i}, so noisy steps weigh less than in the paper's terms.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from solvers import CLEAN, SOLVERS, Schedule, eps_theta, renoise, to_device, x0_of_step, x_theta
from tdd import equidistant, squared_l2

# -------------------------------------------------------------------------- 3.1 the trajectory
#
# The student's K steps end at t_{K-1} > .. > t_0; a training step looks at the one that ends at
# t_m. Its sample is diffused to a tau of at most t_{m+1}: intervals of different m do not overlap,
# so one fake score can hold all of their distributions apart.


@dataclass(frozen=True)
class StepSample:
    """What Algorithm 1 draws for a batch: K, the step to look at, the times tau, and noise."""

    K: int
    stops: list[int]  # from T - 1 down to t_{m+1} and t_m
    x_T: Tensor  # (b, ..)
    tau: Tensor  # (b,), t_m < tau <= t_{m+1}
    noise: Tensor  # (b, ..)

    @property
    def timesteps(self) -> Tensor:
        """Where the samples are diffused to, for messages."""
        return self.tau

    def to(self, device) -> "StepSample":
        x_T, tau, noise = (to_device(x, device) for x in (self.x_T, self.tau, self.noise))
        return replace(self, x_T=x_T, tau=tau, noise=noise)


def sample_step(Ks: tuple[int, ...], shape, N: int, generator: torch.Generator) -> StepSample:
    """Algorithm 1, lines 3, 5 and 6, for samples of shape (b, ..), from a CPU generator.

    Ks: what K is drawn from, several for TDM-unify (Eq. 8). N: the grid that t_i = i T / K lie on.
    """
    # One K and one m for the batch: steps after t_m are not looked at and can be left out.
    u_K, u_m = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    K = Ks[int(u_K * len(Ks))]
    stops = [*equidistant(K, N), CLEAN][: 2 + int(u_m * K)]
    t_next, t_m = stops[-2:]
    tau = torch.randint(t_m + 1, t_next + 1, shape[:1], generator=generator)
    x_T = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    return StepSample(K, stops, x_T, tau, noise)


@dataclass(frozen=True)
class StudentSample:
    """A sample of the student's, x_{t_m}, and the same diffused to tau."""

    x_m: Tensor
    t_m: int
    x_hat: Tensor  # the clean sample that belongs to x_m
    x_tau: Tensor
    tau: Tensor  # (b,)
    noise: Tensor

    def detach(self) -> "StudentSample":
        x_m, x_hat, x_tau = self.x_m.detach(), self.x_hat.detach(), self.x_tau.detach()
        return replace(self, x_m=x_m, x_hat=x_hat, x_tau=x_tau)

    def bridge(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """ratio and spread of q(x_tau | x_{t_m}) = N(ratio x_{t_m}, spread^2 I), to broadcast."""
        ndim = self.x_m.ndim
        ratio = schedule.at(self.tau, ndim)[0] / schedule.at(self.t_m, ndim)[0]
        return ratio.to(self.x_m), (1 - ratio**2).sqrt().to(self.x_m)


def generate(
    student, sample: StepSample, schedule: Schedule, make_solver=SOLVERS["ddim"], clean=False
) -> StudentSample:
    """Algorithm 1, lines 4-7, with a gradient through the last step alone.

    make_solver: an entry of solvers.SOLVERS (Table 6). clean: look at the clean prediction of the
    step that ends at t_m instead of x_{t_m} (Table 7).
    """
    solver = make_solver()
    x = sample.x_T
    with torch.no_grad():
        for t, s in pairwise(sample.stops[:-1]):
            x = solver(student, x, t, s, schedule)
    t_next, t_m = sample.stops[-2:]
    x_m = solver(student, x, t_next, t_m, schedule)
    x_hat = x0_of_step(x, x_m, t_next, t_m, schedule)
    if clean:
        x_m, t_m = x_hat, CLEAN
    x_tau = renoise(x_m, t_m, sample.tau, sample.noise, schedule)
    return StudentSample(x_m, t_m, x_hat, x_tau, sample.tau, sample.noise)


def nearest(K: int, Ks: tuple[int, ...]) -> int:
    """What a student that knows Ks is told for K steps: K, or the nearest that it knows."""
    return min(Ks, key=lambda known: (abs(known - K), known))


# -------------------------------------------------------------------------- 3.1 the fake score
#
# Eq. 7 wants x_tau from q(x_tau | x^), but the score is needed around x_{t_m}: hence the importance
# weight q(x_tau | x^) / q(x_tau | x_{t_m}). The weighted loss is minimal at the score of x^
# diffused to tau, while Eq. 5 needs that of x_{t_m} diffused to tau. These are two distributions,
# because a deterministic step leaves x^ and the noise beside it dependent. Denoising to x_{t_m}
# without a weight has Eq. 5's score as its minimum: "exact" below, which is ours.

WEIGHTS = ("density", "mean", "none", "exact")


def fake_loss(fake, p: StudentSample, schedule: Schedule, weight: str = "density") -> Tensor:
    """Eq. 7's loss of each example, on eps, (b,).

    weight: "density", the paper's ratio; "mean", of the densities to the power of 1/d, as in the
    published code; "none"; or "exact", denoising to x_{t_m} instead of x^.
    """
    eps = eps_theta(fake, p.x_tau, p.tau, schedule)
    alpha, sigma, _ = (a.to(p.x_m) for a in schedule.at(p.tau, p.x_m.ndim))
    if weight == "exact":
        # -sigma times the score of q(x_tau | x_{t_m}) is (sigma / spread) noise, which has no bound
        # near t_m. A factor that depends on tau alone may multiply both sides.
        _, spread = p.bridge(schedule)
        return squared_l2(spread / sigma * eps - p.noise)
    loss = squared_l2(eps - (p.x_tau - alpha * p.x_hat) / sigma)
    if weight == "none":
        return loss
    power = 1 / p.x_m[0].numel() if weight == "mean" else 1.0
    return (power * log_weight(p, schedule)).exp() * loss


def log_weight(p: StudentSample, schedule: Schedule) -> Tensor:
    """log q(x_tau | x^) - log q(x_tau | x_{t_m}), densities of all dimensions, (b,)."""
    d = p.x_m[0].numel()
    alpha, sigma, _ = (a.to(p.x_m) for a in schedule.at(p.tau, p.x_m.ndim))
    _, spread = p.bridge(schedule)
    squares = squared_l2(p.noise) - squared_l2((p.x_tau - alpha * p.x_hat) / sigma)
    return d * (squares / 2 + (spread / sigma).flatten().log())


# --------------------------------------------------------------------- 3.1 and 3.3 the student

LOSSES = ("huber", "l2", "dmd", "fisher")


def student_loss(real, fake, p: StudentSample, schedule: Schedule, loss: str = "huber") -> Tensor:
    """The student's loss of each example, (b,).

    real: the teacher, guided if wanted. loss: "huber", the surrogate of Eq. 11; "l2", Eq. 6; "dmd",
    Eq. 6 with DMD's normaliser, as in the paper's ablation; "fisher", another divergence.
    """
    if loss == "fisher":
        return fisher_loss(real, fake, p, schedule)
    alpha_m = schedule.at(p.t_m)[0].to(p.x_m.dtype)
    with torch.no_grad():
        x_real, x_fake = (x_theta(f, p.x_tau, p.tau, schedule) for f in (real, fake))
        # x~ of Eq. 6 lies a step down the KL divergence from x_{t_m}.
        revision = alpha_m * (x_real - x_fake)
        if loss == "dmd":
            size = (p.x_hat - x_real).abs().flatten(1).mean(1).clamp(min=1e-6)
            revision = revision / size.reshape(-1, *[1] * (revision.ndim - 1))
        revised = p.x_m + revision
    square = (p.x_m - revised).float().square().flatten(1).sum(1)
    if loss != "huber":
        return square
    c = 0.00054 * math.sqrt(p.x_m[0].numel())
    return (square + c * c).sqrt() - c


def fisher_loss(real, fake, p: StudentSample, schedule: Schedule) -> Tensor:
    """Fisher's divergence E |s_phi - s_theta|^2 instead of the reverse KL (Table 8), (b,).

    The student's score depends on theta twice, through x_tau and in itself. The second part follows
    from E <u, s_theta> = E <u, score of q(x_tau | x_{t_m})> for any fixed u(x) (Zhou et al. 2024):
    with u = s_phi - s_psi the gradient is that of 2 <u, s_phi - score of q> - |u|^2.
    """
    _, spread = p.bridge(schedule)
    scale = spread / schedule.at(p.tau, p.x_m.ndim)[1].to(p.x_m)
    # The gradient goes through x_tau alone: neither network's weights may have one from this loss.
    with torch.enable_grad():
        x_tau = p.x_tau.detach().requires_grad_()
        eps_real, eps_fake = (eps_theta(f, x_tau, p.tau, schedule) for f in (real, fake))
        # Scores are written times -sigma, as eps; that of q is noise / scale: scale multiplies all.
        u = eps_fake - eps_real
        square = scale * u.square()
        (slope,) = torch.autograd.grad((2 * u * (p.noise - scale * eps_real) - square).sum(), x_tau)
    # The value is the divergence itself: a single sample of the other expression may be negative.
    value = square.detach() + slope * (p.x_tau - x_tau.detach())
    return value.float().flatten(1).sum(1)
