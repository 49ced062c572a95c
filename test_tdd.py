"""Every value against an independent source: closed forms, diffusers, or a second derivation."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from solvers import (
    CLEAN,
    SOLVERS,
    ddim,
    dpm_2s,
    dpmpp_2s,
    eps_from_v,
    eps_from_x0,
    integrate_eps,
    integrate_x0,
    sdxl_schedule,
    solve,
    solver_grid,
    v_from_eps,
    x0_from_eps,
)
from tdd import (
    Draws,
    clip_x0,
    clipped,
    draw,
    ema_update,
    equidistant,
    gamma_sample,
    guided,
    noise_stream,
    nonequidistant,
    offset,
    pseudo_huber,
    squared_l2,
    target_set,
    targets_of,
    tdd_loss,
    tuned,
)

SCHEDULE = sdxl_schedule()
ALPHA = np.concatenate(
    [[1.0], np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))]
)
SIGMA = np.sqrt(1 - ALPHA**2)  # both at [t + 1], so that [0] is CLEAN


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------- closed form: Gaussian data N(mu, v)

MU, V = 0.7, 0.3


def gaussian_eps(x_t, t):
    """-sigma_t times the exact score of N(alpha_t mu, alpha_t^2 v + sigma_t^2)."""
    alpha_t, sigma_t, _ = SCHEDULE.at(t, x_t.ndim)
    return sigma_t * (x_t - alpha_t * MU) / (alpha_t**2 * V + sigma_t**2)


def gaussian_flow(x_t, t, s):
    """The PF-ODE's solution: x - alpha mu scales with the deviation of the marginal."""
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = SCHEDULE.at(t), SCHEDULE.at(s)
    scale = ((alpha_s**2 * V + sigma_s**2) / (alpha_t**2 * V + sigma_t**2)).sqrt()
    return alpha_s * MU + scale * (x_t - alpha_t * MU)


def lam_spaced(steps, t=999, s=0):
    lam = torch.linspace(SCHEDULE.at(t)[2].item(), SCHEDULE.at(s)[2].item(), steps + 1)
    return [t, *SCHEDULE.t_of_lam(lam.double())[1:-1].tolist(), s]


# ---------------------------------------------------------------------------- schedule, solvers


def test_schedule_is_sdxls():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alpha, sigma, lam = SCHEDULE.at(torch.arange(1000))
    assert torch.allclose(alpha.square(), theirs.alphas_cumprod.double(), rtol=2e-6)
    assert np.allclose(alpha, ALPHA[1:], rtol=1e-12) and np.allclose(sigma, SIGMA[1:], rtol=1e-12)
    assert np.allclose(lam, np.log(ALPHA[1:] / SIGMA[1:]), rtol=1e-10)
    assert alpha[0] ** 2 == pytest.approx(0.99915, abs=1e-9) and sigma[0] == pytest.approx(
        0.02915, abs=1e-5
    )
    assert [a.item() for a in SCHEDULE.at(CLEAN)] == [1.0, 0.0, math.inf]


def test_lam_inverts():
    t = torch.cat(
        [
            torch.arange(1000.0),
            torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1000 - 1,
        ]
    )
    t = t.double().clamp(max=999)
    assert torch.allclose(SCHEDULE.t_of_lam(SCHEDULE.at(t)[2]), t, atol=1e-7)


def test_between_timesteps_log_alpha_is_linear():
    alpha, sigma, _ = SCHEDULE.at(torch.tensor([300.25]))
    assert alpha.item() == pytest.approx(ALPHA[301] ** 0.75 * ALPHA[302] ** 0.25, rel=1e-12)
    assert sigma.item() == pytest.approx(math.sqrt(1 - alpha.item() ** 2), rel=1e-12)


def test_predictions_convert():
    x_0, eps, t = randn(6, 3), randn(6, 3, seed=1), torch.tensor([0, 1, 250, 499, 750, 999])
    x_t = SCHEDULE.diffuse(x_0, eps, t)
    a, s = (torch.tensor(c[t.numpy() + 1])[:, None] for c in (ALPHA, SIGMA))
    assert torch.allclose(x_t, a * x_0 + s * eps)
    assert torch.allclose(x0_from_eps(x_t, eps, t, SCHEDULE), x_0)
    assert torch.allclose(eps_from_x0(x_t, x_0, t, SCHEDULE), eps)
    assert torch.allclose(v_from_eps(x_t, eps, t, SCHEDULE), a * eps - s * x_0)
    assert torch.allclose(eps_from_v(x_t, a * eps - s * x_0, t, SCHEDULE), eps)


def test_integrators_are_equations_15_and_16():
    x_t, eps = randn(5, 2), randn(5, 2, seed=1)
    t, s = torch.tensor([999, 751, 499, 20, 1]), torch.tensor([0, 300, 498, 0, 0])
    a_t, s_t, a_s, s_s = (
        torch.tensor(c[i.numpy() + 1])[:, None] for i in (t, s) for c in (ALPHA, SIGMA)
    )
    h = torch.log(a_s / s_s) - torch.log(a_t / s_t)
    eq15 = a_s / a_t * x_t - s_s * (h.exp() - 1) * eps
    x_0 = (x_t - s_t * eps) / a_t
    eq16 = s_s / s_t * x_t - a_s * ((-h).exp() - 1) * x_0
    assert torch.allclose(eq15, eq16)
    assert torch.allclose(integrate_eps(x_t, eps, t, s, SCHEDULE), eq15)
    assert torch.allclose(integrate_x0(x_t, x_0, t, s, SCHEDULE), eq16)
    assert torch.allclose(integrate_eps(x_t, eps, t, CLEAN, SCHEDULE), x_0)
    assert torch.allclose(integrate_x0(x_t, x_0, t, CLEAN, SCHEDULE), x_0)


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_takes_each_example_its_own_times(name):
    x_t, t, s = randn(3, 2), torch.tensor([999, 400, 37]), torch.tensor([751, 0, 12])
    together, _ = SOLVERS[name](gaussian_eps, x_t, t, s, SCHEDULE)
    for i in range(3):
        alone, _ = SOLVERS[name](gaussian_eps, x_t[i : i + 1], t[i].item(), s[i].item(), SCHEDULE)
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-12)


@pytest.mark.parametrize(
    "name, order", [("ddim", 1), ("dpm2s", 2), ("dpm2m", 2), ("dpm++2s", 2), ("dpm++2m", 2)]
)
def test_solver_converges_to_gaussian_flow_with_its_order(name, order):
    x_t, steps = randn(16, 2), np.array([40, 80, 160, 320])
    exact = gaussian_flow(x_t, 999, 0)
    errors = [
        (solve(gaussian_eps, x_t, lam_spaced(n), SCHEDULE, SOLVERS[name]) - exact)
        .abs()
        .max()
        .item()
        for n in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1 * order) and errors[-1] < 0.01


def toy_eps(x_t, t):
    """A smooth, nonlinear stand-in for a network."""
    return torch.tanh(x_t.flip(-1) + 0.5 * x_t) + 0.001 * t.reshape(-1, *[1] * (x_t.ndim - 1))


def diffusers_run(scheduler, k, x_t, model=toy_eps, **step_options):
    """The states x after each step of a diffusers scheduler, and its timesteps."""
    states = []
    for t in scheduler.timesteps[:k]:
        eps = model(x_t, t.expand(len(x_t)))
        x_t = scheduler.step(eps, t, x_t, **step_options).prev_sample
        states.append(x_t)
    return states


SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = {**SDXL, "timestep_spacing": "trailing"}


def our_run(timesteps, x_t, solver):
    states = []
    solve(toy_eps, x_t, timesteps, SCHEDULE, solver, callback=lambda s, x: states.append(x))
    return states


@pytest.mark.parametrize("k", [4, 20])
def test_ddim_is_diffusers(k):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**TRAILING, clip_sample=False)
    scheduler.set_timesteps(k)
    x_t = randn(2, 3, 4)
    ours = our_run([*scheduler.timesteps.tolist(), CLEAN], x_t, ddim)
    for a, b in zip(ours, diffusers_run(scheduler, k, x_t), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("algorithm, name", [("dpmsolver++", "dpm++2m"), ("dpmsolver", "dpm2m")])
@pytest.mark.parametrize("k", [5, 20])
def test_multistep_is_diffusers(algorithm, name, k):
    from diffusers import DPMSolverMultistepScheduler

    last = "zero" if algorithm == "dpmsolver++" else "sigma_min"
    scheduler = DPMSolverMultistepScheduler(
        **TRAILING,
        algorithm_type=algorithm,
        solver_order=2,
        final_sigmas_type=last,
        lower_order_final=False,
    )
    scheduler.set_timesteps(k)
    x_t = randn(2, 3, 4)
    ours = our_run(
        [*scheduler.timesteps.tolist(), CLEAN if last == "zero" else 0], x_t, SOLVERS[name]
    )
    for a, b in zip(ours, diffusers_run(scheduler, k, x_t), strict=True):
        assert torch.allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("algorithm, solver", [("dpmsolver++", dpmpp_2s), ("dpmsolver", dpm_2s)])
def test_singlestep_is_diffusers(algorithm, solver):
    from diffusers import DPMSolverSinglestepScheduler

    scheduler = DPMSolverSinglestepScheduler(
        **SDXL,
        algorithm_type=algorithm, solver_order=2, final_sigmas_type="sigma_min",
    )  # fmt: skip
    scheduler.set_timesteps(8)
    x_t, times = randn(2, 3, 4), scheduler.timesteps.tolist()
    theirs = diffusers_run(scheduler, 8, x_t)
    assert scheduler.order_list[:6] == [1, 2] * 3  # the second steps restart where the first began
    for i in range(0, 6, 2):
        x_t, _ = solver(toy_eps, x_t, times[i], times[i + 2], SCHEDULE, u=times[i + 1])
        assert torch.allclose(x_t, theirs[i + 1], atol=5e-5)


# --------------------------------------------------------------------- schedules, target sets


def test_solver_grid():
    assert solver_grid(250)[:4] == [0, 3, 7, 11] and solver_grid(250)[-1] == 999
    assert solver_grid(4) == [0, 249, 499, 749, 999] and len(solver_grid(1000)) == 1001
    for N in (300, 0, -5, 2000):
        with pytest.raises(ValueError, match="must divide"):
            solver_grid(N)


def test_published_schedules():
    assert equidistant(4) == [999, 751, 499, 251]
    assert equidistant(5) == [999, 799, 599, 399, 199]
    assert equidistant(6) == [999, 835, 667, 499, 335, 167]
    assert equidistant(8) == [999, 875, 751, 627, 499, 375, 251, 127]
    assert nonequidistant(4) == equidistant(4) and nonequidistant(8) == equidistant(8)
    assert nonequidistant(5) == [999, 875, 751, 499, 251]
    assert nonequidistant(6) == [999, 875, 751, 627, 499, 251]
    assert nonequidistant(7) == [999, 875, 751, 627, 499, 375, 251]
    for k in (3, 9):
        with pytest.raises(ValueError, match="4 to 8 are possible"):
            nonequidistant(k)
    for k in (0, 251):
        with pytest.raises(ValueError, match="1 to 250"):
            equidistant(k)


def admitted_by_eq7(N, kmin, kmax, n):
    """Eqs. 5 and 7 in whole numbers: a = m/k of a trajectory cut into kmin-ths around n/N."""
    targets = set()
    for k in range(kmin, kmax + 1):
        visited = [0, *equidistant(k, N)[::-1]]  # the m-th stop before the end, for m = 0..k-1
        for m in range(k):
            if m * N <= n * k and (n * kmin - N) * k <= m * N * kmin:
                targets.add((Fraction(m, k), visited[m]))
    return sorted(timestep for _, timestep in targets)


@pytest.mark.parametrize("N, kmin, kmax", [(250, 4, 8), (50, 4, 8), (250, 2, 5), (100, 3, 7)])
def test_tdd_targets_are_equations_5_and_7(N, kmin, kmax):
    targets = targets_of("tdd", N, kmin, kmax)
    for n in range(1, N):
        assert targets.admitted(n) == admitted_by_eq7(N, kmin, kmax, n)
        assert max(targets.admitted(n)) <= targets.grid[n]


def test_cm_pcm_and_ctm_are_special_target_sets():
    grid = solver_grid(250)
    cm, pcm, ctm = (targets_of(name, 250, 4, 8) for name in ("cm", "pcm", "ctm"))
    for n in range(1, 250):
        assert cm.admitted(n) == [0]
        assert pcm.admitted(n) == [[0, 251, 499, 751][(4 * n - 1) // 250]]  # m: m/4 < n/250
        assert ctm.admitted(n) == grid[: n + 1]
    assert targets_of("lcm", 250).tau.tolist() == [0]
    assert targets_of("tcd", 50).admitted(49) == solver_grid(50)[:50]
    with pytest.raises(ValueError, match="unknown method"):
        targets_of("foo", 250)


def test_target_set_refuses_what_cannot_be():
    for N, kmin, kmax in [(250, 8, 4), (250, 0, 4), (50, 4, 51)]:
        with pytest.raises(ValueError, match="kmin <= kmax"):
            target_set(N, kmin, kmax)
    with pytest.raises(ValueError, match="must divide"):
        target_set(300, 4, 8)
    with pytest.raises(ValueError, match="no target lies within"):
        target_set(250, 4, 8, e=10)


@pytest.mark.parametrize("method", ["tdd", "pcm", "ctm"])
def test_selection_is_uniform_over_the_admitted(method):
    targets = targets_of(method, 50)
    draws = draw(targets, (400_000, 1), 0.0, 0.0, torch.Generator().manual_seed(3))
    assert set(draws.t_n.tolist()) == set(targets.grid[1:50].tolist())
    assert torch.equal(draws.t_next - draws.t_n, torch.where(draws.t_n > 0, 20, 19))
    chi2 = freedom = 0
    for n in range(1, 50):
        drawn = Counter(draws.tau[draws.t_n == targets.grid[n]].tolist())
        expected, total = Counter(targets.admitted(n)), sum(drawn.values())
        assert set(drawn) == set(expected)
        for tau, weight in expected.items():
            mean = total * weight / sum(expected.values())
            chi2 += (drawn[tau] - mean) ** 2 / mean
        freedom += len(expected) - 1
    assert abs(chi2 - freedom) <= 4 * math.sqrt(2 * freedom)
    n_counts = torch.bincount(draws.t_n)[targets.grid[1:50]].double()
    assert ((n_counts - n_counts.mean()) ** 2 / n_counts.mean()).sum() < 48 + 4 * math.sqrt(96)


def test_offset_covers_its_range():
    v = torch.arange(0, 1, 1e-4, dtype=torch.float64)
    for tau, eta in [(751, 0.3), (499, 1.0), (3, 0.3), (0, 0.7)]:
        got = offset(torch.tensor(tau), eta, v)
        assert got.max() == tau and got.min() == math.floor(tau * (1 - eta * v[-1]))
        assert torch.equal(got, torch.tensor([math.floor(tau - eta * tau * x) for x in v.tolist()]))
    assert torch.equal(offset(torch.arange(1000), 0.0, torch.rand(1000)), torch.arange(1000))


def test_draws_follow_rho_eta_and_the_generator():
    targets, shape = targets_of("tdd", 250), (100_000, 2)
    draws = draw(targets, shape, 0.3, 0.2, torch.Generator().manual_seed(0))
    again = draw(targets, shape, 0.3, 0.2, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(vars(draws).values(), vars(again).values()))
    assert draws.kept.double().mean() == pytest.approx(0.8, abs=0.005)
    assert torch.equal(draws.rows, torch.arange(100_000)[draws.kept])
    assert draws.noise.std() == pytest.approx(1, abs=0.01) and (draws.tau <= draws.t_n).all()
    lowest, at_751 = min(targets.admitted(188)), draws.tau[draws.t_n == targets.grid[188]]
    assert math.floor(0.7 * lowest) <= at_751.min() < 0.71 * lowest and at_751.max() > 740


# ------------------------------------------------------------------------------------- the loss


class Net(torch.nn.Module):
    """A small nonlinear eps-network with a condition."""

    def __init__(self, seed, shape=(2, 3)):
        super().__init__()
        size = math.prod(shape)
        self.a, self.b = (
            torch.nn.Parameter(randn(size, size, seed=seed)),
            randn(4, size, seed=seed + 1),
        )

    def forward(self, x_t, t, cond):
        cond = cond["label"] if isinstance(cond, dict) else cond
        h = x_t.flatten(1) @ self.a / 3 + cond.double() @ self.b + t[:, None] / 500
        return h.sin().reshape(x_t.shape)


def slow_loss(student, target, teacher, x_0, cond, null, draws, w, distance):
    """Algorithm 1, lines 10-16, an example at a time in the paper's own terms."""

    def coefficients(t):
        return ALPHA[int(t) + 1], SIGMA[int(t) + 1], math.log(ALPHA[int(t) + 1] / SIGMA[int(t) + 1])

    def step(net, x, t, s, c):
        (a_t, _, l_t), (a_s, s_s, l_s) = coefficients(t), coefficients(s)
        eps = net(x[None], torch.tensor([t]), c[None])[0]
        return a_s / a_t * x - s_s * (math.exp(l_s - l_t) - 1) * eps

    losses = []
    for i in range(len(x_0)):
        t1, t0, tau = (int(v[i]) for v in (draws.t_next, draws.t_n, draws.tau))
        a, s, _ = coefficients(t1)
        x1, c = a * x_0[i] + s * draws.noise[i], cond[i] if draws.kept[i] else null[0]
        if draws.kept[i]:
            x0 = (1 + w) * step(teacher, x1, t1, t0, c) - w * step(teacher, x1, t1, t0, null[0])
        else:
            x0 = step(teacher, x1, t1, t0, null[0])
        d = step(student, x1, t1, tau, c) - step(target, x0, t0, tau, c).detach()
        losses.append(distance(d))
    return torch.stack(losses)


DISTANCES = {
    squared_l2: lambda d: (d**2).mean(),
    pseudo_huber: lambda d: ((d**2 + 0.001**2).sqrt() - 0.001).mean(),
}


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("method", ["cm", "pcm", "tcd", "tdd"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_is_algorithm_1(rho, method, distance):
    nets = student, target, teacher = Net(0), Net(1), Net(2)
    x_0, cond, null = randn(24, 2, 3), randn(24, 4, seed=5), torch.zeros(1, 4)
    draws = draw(targets_of(method, 50), x_0.shape, 0.3, rho, torch.Generator().manual_seed(1))
    slow = slow_loss(*nets, x_0, cond, null, draws, 3.5, DISTANCES[distance])
    slow.mean().backward()
    expected, student.a.grad = student.a.grad, None
    loss = tdd_loss(*nets, x_0, cond, null, draws, 3.5, SCHEDULE, distance=distance)
    loss.mean().backward()
    assert torch.allclose(loss, slow.float(), rtol=1e-6, atol=1e-9)
    assert torch.allclose(student.a.grad, expected, rtol=1e-5, atol=1e-7)
    assert target.a.grad is None and teacher.a.grad is None


def test_loss_in_other_forms():
    """A dict condition, guiding all rows, and w' given per example change nothing."""
    nets, x_0, cond, null = (
        (Net(0), Net(1), Net(2)),
        randn(24, 2, 3),
        randn(24, 4),
        torch.zeros(1, 4),
    )
    d = draw(targets_of("tdd", 50), x_0.shape, 0.3, 0.4, torch.Generator().manual_seed(1))
    loss = tdd_loss(*nets, x_0, cond, null, d, 2.0, SCHEDULE)
    all_rows = Draws(d.t_next, d.t_n, d.tau, d.kept, d.noise, None)
    forms = [
        tdd_loss(*nets, x_0, {"label": cond}, {"label": null}, d, 2.0, SCHEDULE),
        tdd_loss(*nets, x_0, cond, null, all_rows, 2.0, SCHEDULE),
        tdd_loss(*nets, x_0, cond, null.expand(24, 4), d, torch.full((24,), 2.0), SCHEDULE),
    ]
    assert all(torch.allclose(form, loss, rtol=1e-6) for form in forms)


def test_unconditional_pass_is_only_for_the_kept():
    rows_seen = []

    def teacher(x_t, t, cond):
        rows_seen.append(len(x_t))
        return x_t

    x_0 = randn(40, 2)
    d = draw(targets_of("tdd", 50), x_0.shape, 0.3, 0.4, torch.Generator().manual_seed(1))
    tdd_loss(
        Net(0, (2,)), Net(1, (2,)), teacher, x_0, randn(40, 4), torch.zeros(1, 4), d, 2.0, SCHEDULE
    )
    assert rows_seen == [40 + int(d.kept.sum())]


def test_ema_is_line_18():
    target, student = (
        [randn(3, seed=1), randn(2, 2, seed=2)],
        [randn(3, seed=3), randn(2, 2, seed=4)],
    )
    expected = [0.95 * a + 0.05 * b for a, b in zip(target, student, strict=True)]
    ema_update(target, student, 0.95)
    assert all(torch.allclose(a, b) for a, b in zip(target, expected, strict=True))
    ema_update(target, student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(target, student, strict=True))


# ------------------------------------------------------- distilling one Gaussian, in closed form


def gaussian_coefficient(t):
    """eps(x_t, t) = c x_t for data N(0, V)."""
    alpha_t, sigma_t, _ = SCHEDULE.at(t)
    return sigma_t / (alpha_t**2 * V + sigma_t**2)


def distil_gaussian(targets, eta, steps=2500, batch=2048):
    """Train eps = c[t] x with the real loss from the exact teacher; c at every grid timestep."""
    grid = targets.grid
    log_c = gaussian_coefficient(torch.arange(1000)).log()
    shift = torch.zeros(1000, dtype=torch.float64, requires_grad=True)

    def student(x_t, t, cond):
        return (log_c + shift).exp()[t][:, None] * x_t

    def teacher(x_t, t, cond):
        return gaussian_coefficient(t)[:, None] * x_t

    optimizer = torch.optim.Adam([shift], lr=0.02)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x_0 = V**0.5 * torch.randn((batch, 1), generator=generator, dtype=torch.float64)
        draws = draw(targets, x_0.shape, eta, 0.0, generator)
        cond = torch.zeros(batch, 1)
        loss = tdd_loss(
            student, student, teacher, x_0, cond, cond, draws, 0.0, SCHEDULE, solver=dpmpp_2s
        )
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        decay.step()
    return ((log_c + shift).exp())[grid].detach()


def exact_scale(t, s):
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = SCHEDULE.at(t), SCHEDULE.at(s)
    return ((alpha_s**2 * V + sigma_s**2) / (alpha_t**2 * V + sigma_t**2)).sqrt().item()


def jump_scale(c, t, s):
    """f(x, t, s) / x = A - B c, and B, for eps = c x (Eq. 15)."""
    a_t, a_s, s_t, s_s = ALPHA[t + 1], ALPHA[s + 1], SIGMA[t + 1], SIGMA[s + 1]
    B = a_s * (s_t / a_t - s_s / a_s)
    return a_s / a_t - B * c, B


@pytest.mark.parametrize("method", ["cm", "pcm"])
def test_one_target_per_start_reaches_the_exact_flow(method):
    targets = targets_of(method, 50)
    c = distil_gaussian(targets, 0.0)
    for n in range(2, 51):
        t, (tau,) = targets.grid[n].item(), targets.admitted(n - 1)
        assert jump_scale(c[n].item(), t, tau)[0] == pytest.approx(exact_scale(t, tau), rel=0.02)


def offset_weights(tau, eta):
    """P(tau~ = j) of Eq. 8 with the floor: the share of [(1 - eta) tau, tau] in [j, j + 1)."""
    low = (1 - eta) * tau
    if low == tau:
        return {tau: 1.0}
    bins = range(math.floor(low), tau)
    return {j: (min(j + 1, tau) - max(j, low)) / (tau - low) for j in bins}


@pytest.mark.parametrize("method, eta", [("tcd", 0.0), ("tdd", 0.0), ("tdd", 0.3)])
def test_several_targets_per_start_meet_their_least_squares_compromise(method, eta):
    """No c fits all targets of a start; the fixed point is a least-squares recursion in n."""
    targets = targets_of(method, 50)
    c = distil_gaussian(targets, eta).tolist()
    fixed = [None, gaussian_coefficient(torch.tensor(19)).item()]  # t_1 is never a start: as it was
    for n in range(1, 50):
        t1, t0 = targets.grid[n + 1].item(), targets.grid[n].item()
        up = down = 0.0
        for tau in targets.admitted(n):
            for j, weight in offset_weights(tau, eta).items():
                A, B = jump_scale(0.0, t1, j)
                aim = jump_scale(fixed[n], t0, j)[0] * exact_scale(t1, t0)
                up, down = up + weight * B * (A - aim), down + weight * B * B
        fixed.append(up / down)
    assert c[2:] == pytest.approx(fixed[2:], rel=0.02)
    full_jump = [jump_scale(x, 999, 751)[0] / exact_scale(999, 751) for x in (c[-1], fixed[-1])]
    assert full_jump[0] == pytest.approx(full_jump[1], rel=0.02)


# ---------------------------------------------------------------------------------- the sampler


def noises(*shape, seed=7):
    return iter(randn(20, *shape, seed=seed))


@pytest.mark.parametrize("k", [1, 4, 7])
def test_gamma_0_is_ddim(k):
    x_T, times = randn(3, 2, 4), equidistant(k, 50)
    ours = gamma_sample(toy_eps, x_T, times, SCHEDULE, gamma=0.0)
    x = x_T
    for t, s in zip(times, [*times[1:], CLEAN], strict=True):
        x_0 = (x - SIGMA[t + 1] * toy_eps(x, torch.full((3,), t))) / ALPHA[t + 1]
        eps = (x - ALPHA[t + 1] * x_0) / SIGMA[t + 1]
        x = ALPHA[s + 1] * x_0 + SIGMA[s + 1] * eps
    assert torch.allclose(ours, x, rtol=1e-10)


def test_gamma_1_is_multistep_consistency_sampling():
    """Each step predicts timestep 0 (which holds sigma_0) and diffuses from there (TCD Alg. 3)."""
    x_T, times = randn(3, 2, 4), equidistant(5, 50)
    ours = gamma_sample(toy_eps, x_T, times, SCHEDULE, 1.0, noises(3, 2, 4))
    x, z = x_T, noises(3, 2, 4)
    for t, p in zip(times, [*times[1:], None], strict=True):
        eps = toy_eps(x, torch.full((3,), t))
        x_0 = (x - SIGMA[t + 1] * eps) / ALPHA[t + 1]
        at_0, ratio = ALPHA[1] * x_0 + SIGMA[1] * eps, ALPHA[(p or 0) + 1] / ALPHA[1]
        x = x_0 if p is None else ratio * at_0 + math.sqrt(1 - ratio**2) * next(z)
    assert torch.allclose(ours, x, rtol=1e-10)


@pytest.mark.parametrize("gamma", [0.2, 0.7, 1.0])
def test_renoising_keeps_the_marginal_variance(gamma):
    """With exact jumps on N(0, V) the sampler is linear in its noise, so variances just add up."""

    def exact(model, x_t, t, s, schedule, past=None):
        return exact_scale(t, s) * x_t, past

    times, draws = equidistant(6, 50), 6
    unit = torch.eye(draws, dtype=torch.float64)  # example i has 1 in the i-th draw, 0 elsewhere
    start = (ALPHA[1000] ** 2 * V + SIGMA[1000] ** 2) ** 0.5
    stops = []
    gamma_sample(
        None, start * unit[:, :1], times, SCHEDULE, gamma, iter(unit.T[1:, :, None]),
        jump=exact, callback=lambda p, x: stops.append((p, x)),
    )  # fmt: skip
    for p, x in stops:
        assert x.square().sum() == pytest.approx(
            ALPHA[p + 1] ** 2 * V + SIGMA[p + 1] ** 2, rel=1e-10
        )


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.3, 0.9, 1.0])
def test_sampler_is_diffusers_tcd_but_for_the_last_step(gamma):
    """TCDScheduler ends on timestep 0, with sigma_0 left in; the paper's sampler returns x_0."""
    from diffusers import TCDScheduler

    scheduler = TCDScheduler(**SDXL, original_inference_steps=50)
    scheduler.set_timesteps(6)
    assert scheduler.timesteps.tolist() == equidistant(6, 50)
    stream = noise_stream(range(3), (2, 4))
    x_T, stops = next(stream), []
    gamma_sample(toy_eps, x_T, equidistant(6, 50), SCHEDULE, gamma, stream,
                 callback=lambda p, x: stops.append(x))  # fmt: skip
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    assert torch.equal(x_T, torch.cat([torch.randn((1, 2, 4), generator=g) for g in generators]))
    theirs = diffusers_run(scheduler, 6, x_T, eta=gamma, generator=generators)
    for a, b in zip(stops[:-1], theirs[:-1], strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    last = scheduler.timesteps[-1]
    end = integrate_eps(stops[-2], toy_eps(stops[-2], last.expand(3)), last, 0, SCHEDULE)
    assert torch.allclose(end, theirs[-1], atol=2e-5)
    assert not torch.allclose(stops[-1], theirs[-1], atol=2e-3)


def test_floor_of_gamma_is_not_a_rounding_error():
    """(1 - 0.9) * 250 is 24.999999999999996 in floating point; s is 25."""
    seen = []

    def jump(model, x_t, t, s, schedule, past=None):
        seen.append(s)
        return x_t, past

    gamma_sample(None, randn(1, 1), [999, 250], SCHEDULE, 0.9, noises(1, 1), jump=jump)
    assert seen == [25, CLEAN]


def test_noise_stream_is_diffusers():
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator("cpu").manual_seed(5 + i) for i in range(4)]
    stream = noise_stream(range(5, 9), (4, 8, 6))
    for _ in range(3):
        assert torch.equal(next(stream), randn_tensor((4, 4, 8, 6), generator=generators))
    assert torch.equal(
        next(noise_stream([7], (4, 8, 6))), next(noise_stream(range(5, 9), (4, 8, 6)))[2:3]
    )


# ------------------------------------------------------------------------------------- guidance


def test_guidance_is_equation_12():
    net, x_t, cond, null = Net(0), randn(5, 2, 3), randn(5, 4), torch.zeros(1, 4)
    t = torch.tensor([999, 5, 500, 20, 750])
    eps_c, eps_u = net(x_t, t, cond), net(x_t, t, null.expand(5, 4))
    for w in (0.5, 7.5):
        assert torch.allclose(guided(net, cond, null, w)(x_t, t), (1 + w) * eps_c - w * eps_u)
    assert torch.equal(guided(net, cond, null, 0.0)(x_t, t), eps_c)
    w, rows = torch.tensor([2.0, 0.0, 1.0, 0.0, 0.0]), torch.tensor([0, 2])
    each = (1 + w[:, None, None]) * eps_c - w[:, None, None] * eps_u
    assert torch.allclose(guided(net, cond, null, w, rows)(x_t, t), each)


def test_tuning_is_equation_13_and_undoes_the_distilled_guidance():
    teacher, x_t, cond, null = Net(0), randn(5, 2, 3), randn(5, 4), torch.zeros(1, 4)
    t, w, w_distilled = torch.tensor([999, 5, 500, 20, 750]), 1.5, 7.0

    def student(x_t, t, c):  # a perfect one: the guided teacher, or unguided under the null
        is_null = (c == 0).all(1)[:, None, None]
        eps_u = teacher(x_t, t, torch.zeros_like(c))
        strong = (1 + w_distilled) * teacher(x_t, t, c) - w_distilled * eps_u
        return torch.where(is_null, eps_u, strong)

    eps_u = student(x_t, t, torch.zeros(5, 4))
    eps_hat = guided(student, cond, null, w)(x_t, t)
    literal = (eps_hat + w_distilled * eps_u) / (1 + w_distilled)
    ours = guided(student, cond, null, tuned(w, w_distilled))(x_t, t)
    assert torch.allclose(ours, literal)
    assert torch.allclose(ours, guided(teacher, cond, null, w)(x_t, t))


def test_clipping_is_numpys_percentile():
    x_0 = 3 * randn(6, 4, 5, 5)
    x_0[0] /= 100  # a percentile below 1 leaves the example as it is
    for percentile, top in [(0.995, 1.0), (0.9, 2.5), (0.5, 100.0)]:
        for x, got in zip(x_0.numpy(), clip_x0(x_0, percentile, top).numpy(), strict=True):
            s = np.clip(np.percentile(np.abs(x), 100 * percentile), 1, top)
            assert np.allclose(got, np.clip(x, -s, s) / s, rtol=1e-6)
    assert torch.allclose(clip_x0(x_0), x_0.clamp(-1, 1))


def test_clipped_sampling_is_equation_17():
    x_T, times = 2 * randn(3, 2, 4), equidistant(4, 50)
    ours = gamma_sample(toy_eps, x_T, times, SCHEDULE, 0.0, clip=clip_x0, clip_steps=2)
    x = x_T
    for i, (t, s) in enumerate(zip(times, [*times[1:], CLEAN], strict=True)):
        x_0 = (x - SIGMA[t + 1] * toy_eps(x, torch.full((3,), t))) / ALPHA[t + 1]
        x_0 = x_0.clamp(-1, 1) if i < 2 else x_0
        x = (
            SIGMA[s + 1] / SIGMA[t + 1] * x
            + (ALPHA[s + 1] - SIGMA[s + 1] * ALPHA[t + 1] / SIGMA[t + 1]) * x_0
        )
    assert torch.allclose(ours, x, rtol=1e-9)
    assert not torch.allclose(ours, gamma_sample(toy_eps, x_T, times, SCHEDULE, 0.0))


def test_clipping_under_a_higher_order_solver_acts_on_x0():
    x_t, eps = 2 * randn(3, 4), clipped(toy_eps, clip_x0, SCHEDULE)
    x_0 = x0_from_eps(x_t, eps(x_t, torch.full((3,), 400)), 400, SCHEDULE)
    assert x_0.abs().max() == pytest.approx(1, rel=1e-9)
