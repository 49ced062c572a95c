"""TDM's losses against closed forms: Gaussians and mixtures in one dimension, by quadrature."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import tdm
from sdxl.pipeline import null_condition
from solvers import CLEAN, SOLVERS
from tdd import equidistant
from tests.helpers import ALPHA, MU, SCHEDULE, SIGMA, V, gaussian_eps, randn, toy_eps
from tests.oracles import Theirs, example, same_gradients, tiny_tdm

# ------------------------------------------------------------------------- trajectories and draws


def test_draws_take_every_step_alike_and_keep_their_intervals_apart():
    generator, seen, where = torch.Generator().manual_seed(0), {}, {}
    for _ in range(3000):
        d = tdm.sample_step((1, 2, 4), (8, 2), 50, generator)
        t_next, t_m = d.stops[-2:]
        seen[d.K, t_m] = seen.get((d.K, t_m), 0) + 1
        where.setdefault((d.K, t_m), []).extend(d.tau.tolist())
        assert d.stops == [*equidistant(d.K, 50), CLEAN][: len(d.stops)]
        assert t_m < d.tau.min() and d.tau.max() <= t_next
    for K in (1, 2, 4):
        stops = [*equidistant(K, 50), CLEAN]
        own = {t: n for (k, t), n in seen.items() if k == K}
        assert sorted(own) == sorted(stops[1:])
        assert sum(own.values()) == pytest.approx(1000, abs=100)
        assert all(n == pytest.approx(1000 / K, rel=0.25) for n in own.values())
        # Uniform over an interval, and over all m the intervals share no time.
        for t_next, t_m in pairwise(stops):
            assert np.mean(where[K, t_m]) == pytest.approx((t_m + 1 + t_next) / 2, rel=0.03)
        sets = [set(where[K, t]) for t in stops[1:]]
        assert sum(map(len, sets)) == len(set().union(*sets))


@pytest.mark.parametrize("name", SOLVERS)
def test_generation_is_the_solver_with_a_gradient_through_one_step(name):
    stops = [*equidistant(4, 50), CLEAN]
    for taken in range(1, 5):
        a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        d = tdm.StepSample(
            4, stops[: taken + 1], randn(3, 2), torch.tensor([30]), randn(3, 2, seed=1)
        )
        tau = torch.full((3,), stops[taken] + 30)
        d = replace(d, tau=tau)
        p = tdm.generate(lambda x, t, a=a: a * toy_eps(x, t), d, SCHEDULE, SOLVERS[name])
        x, solver = d.x_T, SOLVERS[name]()
        for i in range(taken):
            factor = a.detach() if i < taken - 1 else a
            before, s = x, stops[i + 1]
            x = solver(lambda x, t, factor=factor: factor * toy_eps(x, t), x, stops[i], s, SCHEDULE)
        assert torch.allclose(p.x_m, x, rtol=1e-12)
        (grad,) = torch.autograd.grad(p.x_m.sum(), a, retain_graph=True)
        assert torch.allclose(grad, torch.autograd.grad(x.sum(), a)[0], rtol=1e-9)
        # x^: the x_0 on which a DDIM step of the same length would have landed there too.
        t = stops[taken - 1]
        eps = (before - ALPHA[t + 1] * p.x_hat) / SIGMA[t + 1]
        assert torch.allclose(ALPHA[s + 1] * p.x_hat + SIGMA[s + 1] * eps, p.x_m, rtol=1e-9)
        ratio = ALPHA[tau[0] + 1] / ALPHA[s + 1]
        assert torch.allclose(p.x_tau, ratio * p.x_m + math.sqrt(1 - ratio**2) * d.noise)


def test_matching_clean_samples_diffuses_the_prediction():
    stops = [999, 751, 499]
    d = tdm.StepSample(4, stops, randn(3, 2), torch.full((3,), 600), randn(3, 2, seed=1))
    noisy, clean = (tdm.generate(toy_eps, d, SCHEDULE, clean=c) for c in (False, True))
    assert torch.equal(clean.x_m, noisy.x_hat) and clean.t_m == CLEAN
    expected = ALPHA[601] * noisy.x_hat + SIGMA[601] * d.noise
    assert torch.allclose(clean.x_tau, expected)
    assert tdm.log_weight(clean, SCHEDULE).abs().max() < 1e-9


# -------------------------------------------------------------------------------- the fake score


def sample_of(d=(2, 3), n=5, t=751, t_m=499, tau=600, x_m=None):
    draws = tdm.StepSample(4, [t, t_m], randn(n, *d), torch.full((n,), tau), randn(n, *d, seed=1))
    return tdm.generate(toy_eps, draws, SCHEDULE)


def test_importance_weight_is_a_ratio_of_densities():
    p = sample_of()
    ratio = ALPHA[601] / ALPHA[500]
    near = Normal(ratio * p.x_m, math.sqrt(1 - ratio**2)).log_prob(p.x_tau).sum((1, 2))
    far = Normal(ALPHA[601] * p.x_hat, SIGMA[601]).log_prob(p.x_tau).sum((1, 2))
    assert torch.allclose(tdm.log_weight(p, SCHEDULE), far - near, rtol=1e-6, atol=1e-5)
    loss = {w: tdm.fake_loss(toy_eps, p, SCHEDULE, w) for w in tdm.WEIGHTS}
    eps = toy_eps(p.x_tau, p.tau)
    plain = (eps - (p.x_tau - ALPHA[601] * p.x_hat) / SIGMA[601]).square().mean((1, 2))
    assert torch.allclose(loss["none"].double(), plain, rtol=1e-5)
    assert torch.allclose(loss["density"].double(), (far - near).exp() * plain, rtol=1e-4)
    assert torch.allclose(loss["mean"].double(), ((far - near) / 6).exp() * plain, rtol=1e-5)


WEIGHT = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEAN, VAR = torch.tensor([[-1.5, 0.8], [0.05, 0.15]], dtype=torch.float64)


def mixture_eps(x_t, t):
    """-sigma times the exact score of a mixture of two Gaussians, diffused."""
    a, s, _ = (c[..., None] for c in SCHEDULE.at(t, x_t.ndim))
    var, gap = a**2 * VAR + s**2, x_t[..., None] - a * MEAN
    p = (WEIGHT.log() - var.log() / 2 - gap**2 / (2 * var)).softmax(-1)
    return (s * p * gap / var).sum(-1)


def best_fake(K: int, m: int, tau: int, weight: str):
    """At points x_tau: the eps that minimises fake_loss, the exact one, that of diffused x^; p."""
    e = torch.linspace(-6, 6, 2001, dtype=torch.float64)[:, None]
    stops = [*equidistant(K, 50), CLEAN][: K - m + 1]
    d = tdm.StepSample(K, stops, e, torch.full((len(e),), tau), torch.zeros_like(e))
    p = tdm.generate(mixture_eps, d, SCHEDULE)
    ratio, spread = (float(a.flatten()[0]) for a in p.bridge(SCHEDULE))
    prior, (a, s) = torch.exp(-(e[:, 0] ** 2) / 2), (ALPHA[tau + 1], SIGMA[tau + 1])
    low, high = (ratio * p.x_m).min().item(), (ratio * p.x_m).max().item()
    found, exact, clean, density = [], [], [], []
    for x in np.linspace(low, high, 25):
        # All draws that could have led to this x_tau, each as likely as it is.
        z = (x - ratio * p.x_m) / spread
        q = prior * torch.exp(-(z[:, 0] ** 2) / 2)
        here = replace(p, x_tau=torch.full_like(e, x), noise=z)

        def loss(eps, here=here, q=q):
            each = tdm.fake_loss(lambda x_t, t: torch.full_like(x_t, eps), here, SCHEDULE, weight)
            return (q * each.double().nan_to_num(0)).sum().item()

        # A parabola in eps: three values give its minimum.
        at = [loss(eps) for eps in (-1.0, 0.0, 1.0)]
        found.append((at[0] - at[2]) / (2 * (at[0] + at[2] - 2 * at[1])))
        exact.append(s / spread * ((q * z[:, 0]).sum() / q.sum()).item())
        far = (x - a * p.x_hat[:, 0]) / s
        r = prior * torch.exp(-(far**2) / 2)
        clean.append(((r * far).sum() / r.sum()).item())
        density.append(q.sum().item())
    return *(np.array(each) for each in (found, exact, clean)), np.array(density)


@pytest.mark.parametrize(
    "K, m, tau", [(1, 0, 400), (2, 1, 700), (4, 1, 300), (4, 2, 600), (4, 0, 90)]
)
def test_what_minimises_the_fake_loss(K, m, tau):
    """The paper's weight is unbiased for Eq. 7 (x^ diffused), not for Eq. 5 (x_{t_m} diffused)."""
    results = {w: best_fake(K, m, tau, w) for w in tdm.WEIGHTS}

    def bias(weight, towards):
        found, exact, clean, p = results[weight]
        gap = found - (exact if towards == "noisy" else clean)
        return math.sqrt((gap**2 * p).sum() / p.sum())

    assert bias("exact", "noisy") < 1e-4
    # The paper's own claim holds as far as it goes.
    assert bias("density", "clean") < 1e-4
    if m == 0:
        # The last step's x_{t_0} is x^ itself: every weight is 1, nothing is biased.
        assert all(bias(w, "noisy") < 1e-4 for w in tdm.WEIGHTS)
    else:
        assert bias("none", "clean") > 0.005
        assert bias("none", "noisy") > 0.005
        assert bias("density", "noisy") > 1.5 * bias("none", "noisy")


# ----------------------------------------------------------------------------------- the student

M, S2 = 0.2, 0.6  # mean and variance that the student below takes the data to have


def gauss_hermite(n=40):
    x, w = np.polynomial.hermite_e.hermegauss(n)
    x, w = torch.tensor(x), torch.tensor(w / w.sum())
    one, other = torch.meshgrid(x, x, indexing="ij")
    return one.reshape(-1, 1), other.reshape(-1, 1), torch.outer(w, w).flatten()


def student_of(theta):
    """eps of N(theta_0, theta_1): in one step from noise its samples are Gaussian."""

    def eps(x_t, t):
        a, s, _ = SCHEDULE.at(t, x_t.ndim)
        return s * (x_t - a * theta[0]) / (a**2 * theta[1] + s**2)

    return eps


def affine(theta, t, t_m):
    """x_{t_m} = scale x_t + shift after the student's one DDIM step."""
    a, s, b, q = ALPHA[t + 1], SIGMA[t + 1], ALPHA[t_m + 1], SIGMA[t_m + 1]
    slope = s / (a**2 * theta[1] + s**2)
    return b / a * (1 - s * slope) + q * slope, (b * s / a - q) * slope * a * theta[0]


def diffused(theta, t, t_m, tau):
    """Mean and variance of the student's samples, diffused from t_m to tau."""
    scale, shift = affine(theta, t, t_m)
    ratio = ALPHA[tau + 1] / ALPHA[t_m + 1]
    return ratio * shift, ratio**2 * scale**2 + 1 - ratio**2


def gradients(loss, t, t_m, tau):
    """The gradient that student_loss gives with the exact fake score, and (mean, var) by theta."""
    theta = torch.tensor([M, S2], dtype=torch.float64, requires_grad=True)
    x_T, noise, weight = gauss_hermite()
    d = tdm.StepSample(4, [t, t_m], x_T, torch.full((len(x_T),), tau), noise)
    p = tdm.generate(student_of(theta), d, SCHEDULE)
    mean, var = diffused(theta.detach(), t, t_m, tau)

    def fake(x, t):
        return SIGMA[tau + 1] * (x - mean) / var

    each = tdm.student_loss(gaussian_eps, fake, p, SCHEDULE, loss)
    (got,) = torch.autograd.grad((weight * each.double()).sum(), theta)
    return got, theta, diffused(theta, t, t_m, tau)


TIMES = [(999, CLEAN, 300), (999, CLEAN, 950), (999, 499, 700), (751, 499, 520), (251, CLEAN, 20)]


@pytest.mark.parametrize("t, t_m, tau", TIMES)
def test_students_gradient_is_that_of_the_kl_divergence(t, t_m, tau):
    """Eq. 5's gradient: that of KL(N(mean, var) || teacher's marginal), but for a known factor."""
    got, theta, (mean, var) = gradients("l2", t, t_m, tau)
    a, s, a_m = ALPHA[tau + 1], SIGMA[tau + 1], ALPHA[t_m + 1]
    m, v = a * MU, a**2 * V + s**2
    kl = (var / v + (mean - m) ** 2 / v - 1 - torch.log(var / v)) / 2
    (exact,) = torch.autograd.grad(kl, theta)
    # lambda_tau = sigma^2 on x / alpha; here both x_{t_m} and x_tau carry their own alpha.
    assert torch.allclose(got, 2 * (a_m * s / a) ** 2 * exact, rtol=1e-4)


@pytest.mark.parametrize("t, t_m, tau", TIMES)
def test_fishers_gradient_is_that_of_fishers_divergence(t, t_m, tau):
    got, theta, (mean, var) = gradients("fisher", t, t_m, tau)
    a, s = ALPHA[tau + 1], SIGMA[tau + 1]
    m, v = a * MU, a**2 * V + s**2
    # E (s_phi - s_theta)^2 with both scores linear: slope^2 var + gap^2.
    slope, gap = 1 / var - 1 / v, (m - mean) / v
    fisher = slope**2 * var + gap**2
    (exact,) = torch.autograd.grad(fisher, theta)
    spread = math.sqrt(1 - (a / ALPHA[t_m + 1]) ** 2)
    assert torch.allclose(got, spread * s * exact, rtol=1e-4)


def losses_at(loss):
    p = sample_of()
    x_m = p.x_m.detach().requires_grad_()
    p = replace(p, x_m=x_m)
    real, fake = lambda x, t: toy_eps(x, t), lambda x, t: toy_eps(x, t) * 0.7 + 0.1
    each = tdm.student_loss(real, fake, p, SCHEDULE, loss)
    (grad,) = torch.autograd.grad(each.sum(), x_m)
    eps = [f(p.x_tau, p.tau) for f in (real, fake)]
    x_real, x_fake = ((p.x_tau - SIGMA[601] * e) / ALPHA[601] for e in eps)
    return p, each, grad, x_real, x_fake, eps


def test_surrogate_is_equation_11_and_its_gradient_points_along_equation_12():
    _, each, grad, x_real, x_fake, (eps_real, eps_fake) = losses_at("huber")
    revision = ALPHA[500] * (x_real - x_fake)
    c, size = 0.00054 * math.sqrt(6), revision.square().sum((1, 2)).sqrt()
    assert torch.allclose(each.double(), (size**2 + c**2).sqrt() - c, rtol=1e-5)
    # s_psi - s_phi, the scores being -eps / sigma; its length is a derivative of Eq. 11, where the
    # paper's Eq. 12 has a stray "- c" in its denominator.
    direction = (eps_real - eps_fake) / SIGMA[601]
    cosine = torch.cosine_similarity(grad.flatten(1), direction.flatten(1))
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-9)
    length = size / (size**2 + c**2).sqrt()
    assert torch.allclose(grad.square().sum((1, 2)).sqrt(), length, rtol=1e-5)


def test_equation_6_with_and_without_dmds_normaliser():
    p, each, grad, x_real, x_fake, _ = losses_at("l2")
    assert torch.allclose(
        each.double(), (ALPHA[500] * (x_real - x_fake)).square().sum((1, 2)), rtol=1e-5
    )
    assert torch.allclose(grad, 2 * ALPHA[500] * (x_fake - x_real), rtol=1e-5)
    *_, normalised, _, _, _ = losses_at("dmd")
    size = (p.x_hat - x_real).abs().mean((1, 2))
    assert torch.allclose(normalised, grad / size[:, None, None], rtol=1e-5)


# ------------------------------------------------------------------------------- SDXL's networks

STEPS = [
    # Ks, told_ks, weight, loss, solver
    ((4,), (), "density", "huber", "ddim"), ((1, 2, 4), (1, 2, 4), "exact", "l2", "ddim"),
    ((2, 4), (2, 4), "none", "fisher", "ddim"), ((4,), (), "mean", "dmd", "dpm++2m"),
    ((2, 4), (), "exact", "huber", "ddim"),
]  # fmt: skip


@pytest.mark.parametrize("Ks, told_ks, weight, loss, solver", STEPS)
def test_step_is_algorithm_1_over_diffusers(Ks, told_ks, weight, loss, solver, folder):
    """Both losses and every gradient of both LoRAs, with peft's adapters in the place of ours."""
    settings = {"w": 2.5, "fake_weight": weight, "loss": loss, "make_solver": SOLVERS[solver]}
    nets = tiny_tdm(folder, Ks=Ks, told_ks=told_ks, **settings)
    nets.base.checkpoint_blocks(loss == "fisher")
    loras = {"student": nets.lora, "fake": nets.fake_lora}
    theirs = Theirs(folder, loras, 4, 2.0, torch.float64)
    _, cond = example(2)
    null = null_condition(cond)
    for seed in range(3):
        d = nets.sample((2, 4, 8, 8), torch.Generator().manual_seed(seed), "cpu")
        found = nets.losses(None, cond, null, d)
        found["total"].backward()
        expected = [by_hand(theirs, cond, d, i, weight, loss, solver) for i in range(2)]
        assert found["loss"].item() == pytest.approx(sum(e[0] for e in expected) / 2, rel=1e-5)
        assert found["fake"].item() == pytest.approx(sum(e[1] for e in expected) / 2, rel=1e-5)
    for name, lora in loras.items():
        same_gradients(lora, theirs, name)
    assert all(p.grad is None for p in nets.base.parameters())


def by_hand(theirs, cond, d, i, weight, loss, solver):
    """Algorithm 1, lines 4-12, for one example; gradients left in theirs, both losses returned."""
    c = {k: v[i : i + 1] for k, v in cond.items()}
    empty = {k: v if k == "time_ids" else 0 * v for k, v in c.items()}
    x, past, tau = d.x_T[i : i + 1].double(), None, int(d.tau[i])
    for t, s in pairwise(d.stops):
        last = s == d.stops[-1]
        with torch.set_grad_enabled(last):
            eps = theirs.eps("student", x, t, c, K=d.K)
            x_hat = (x - SIGMA[t + 1] * eps) / ALPHA[t + 1]
            new = x_hat
            if past is not None and s != CLEAN:
                # DPM-Solver++(2M): the slope between this prediction and the last one.
                lam = [math.log(ALPHA[u + 1] / SIGMA[u + 1]) for u in (past[0], t, s)]
                r = (lam[1] - lam[0]) / (lam[2] - lam[1])
                new = x_hat + (x_hat - past[1]) / (2 * r)
            eps = (x - ALPHA[t + 1] * new) / SIGMA[t + 1]
            past = (t, x_hat.detach()) if solver == "dpm++2m" else None
            x = ALPHA[s + 1] * new + SIGMA[s + 1] * eps
    a, s, a_m = ALPHA[tau + 1], SIGMA[tau + 1], ALPHA[d.stops[-1] + 1]
    z, spread = d.noise[i : i + 1].double(), math.sqrt(1 - (a / a_m) ** 2)
    x_tau = a / a_m * x + spread * z
    # The fake score's loss.
    theirs.learns = {"fake"}
    still, here = x.detach(), x_tau.detach()
    eps = theirs.eps("fake", here, tau, c, K=d.K)
    if weight == "exact":
        told = (spread / s * eps - z).square().mean()
    else:
        clean = new.detach()
        near = Normal(a / a_m * still, spread).log_prob(here).sum()
        far = Normal(a * clean, s).log_prob(here).sum()
        log = {"density": far - near, "mean": (far - near) / x.numel(), "none": torch.zeros(())}
        told = log[weight].exp() * (eps - (here - a * clean) / s).square().mean()
    (told / 2).backward()
    # The student's, by scores -eps / sigma, with the fake score's weights held.
    theirs.learns = {"student"}
    with torch.set_grad_enabled(loss == "fisher"):
        cond_eps, null_eps = theirs.eps(None, x_tau, tau, c), theirs.eps(None, x_tau, tau, empty)
        real = -(3.5 * cond_eps - 2.5 * null_eps) / s
        fake = -theirs.eps("fake", x_tau, tau, c, K=d.K) / s
    if loss == "fisher":
        u = real - fake
        value = u.detach().square().sum() * s * spread
        each = (2 * u * (real + z / spread) - u.square()).sum() * s * spread
        each = each + (value - each.detach())
    else:
        revision = a_m * s**2 / a * (real - fake)
        if loss == "dmd":
            x_real = (x_tau + s**2 * real) / a
            revision = revision / (new - x_real).abs().mean().detach()
        square = (x - (x + revision).detach()).square().sum()
        constant = 0.00054 * math.sqrt(x.numel())
        each = (square + constant**2).sqrt() - constant if loss == "huber" else square
    (each / 2).backward()
    return each.item(), told.item()
