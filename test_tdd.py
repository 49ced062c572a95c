"""Section 3 of the paper: every value against a closed form or a second derivation."""

import math
from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from solvers import CLEAN, dpmpp_2s, integrate_eps, sdxl_schedule, solver_grid, x0_from_eps
from tdd import (
    StepSample,
    clip_x0,
    ema_update,
    equidistant,
    gamma_sample,
    guided,
    noise_stream,
    nonequidistant,
    offset,
    pseudo_huber,
    sample_step,
    squared_l2,
    target_set,
    targets_of,
    tdd_loss,
    tuned,
    tuned_with_negative,
    with_x0_clipping,
)
from tests.helpers import ALPHA, SCHEDULE, SIGMA, Net, V, randn, toy_eps

# --------------------------------------------------------------------- schedules, target sets


def test_selection_at_the_ends_of_its_uniform():
    targets = targets_of("ctm", 1000)
    n = torch.arange(1000)
    below_1 = torch.full((1000,), 1 - 2**-53, dtype=torch.float64)
    assert torch.equal(targets.select(n, below_1), targets.grid[:1000])
    assert (targets.select(n, 0 * below_1) == 0).all()


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
    for n in range(N):
        assert targets.admitted(n) == admitted_by_eq7(N, kmin, kmax, n)
        assert max(targets.admitted(n)) <= targets.grid[n]


def test_cm_pcm_and_ctm_are_special_target_sets():
    grid = solver_grid(250)
    cm, pcm, ctm = (targets_of(name, 250, 4, 8) for name in ("cm", "pcm", "ctm"))
    for n in range(250):
        assert cm.admitted(n) == [0]
        assert pcm.admitted(n) == [[0, 251, 499, 751][4 * n // 250]]  # m: m/4 <= n/250
        assert ctm.admitted(n) == grid[: n + 1]
    assert targets_of("cm", 250).tau.tolist() == [0]
    assert targets_of("tcd", 50).admitted(49) == solver_grid(50)[:50]
    with pytest.raises(ValueError, match="unknown method"):
        targets_of("foo", 250)


def test_target_set_refuses_what_cannot_be():
    for N, kmin, kmax in [(250, 8, 4), (250, 0, 4), (50, 4, 51), (1, 1, 1)]:
        with pytest.raises(ValueError, match="do not fit"):
            target_set(N, kmin, kmax)
    with pytest.raises(ValueError, match="must divide"):
        target_set(300, 4, 8)
    with pytest.raises(ValueError, match="no target lies within"):
        target_set(250, 4, 8, e=10)
    with pytest.raises(ValueError, match="no target lies within"):
        target_set(250, 4, 8, e=-200)


def test_targets_on_another_number_of_timesteps():
    """All of section 3.2 scales with T: at T = 500, N = 50 grid steps are 10 wide."""
    assert sdxl_schedule(500).T == 500
    assert solver_grid(50, 500) == [0, *range(9, 500, 10)]
    assert equidistant(4, 50, 500) == [499, 379, 249, 129]
    for method in ("cm", "pcm", "tcd", "tdd"):
        here, there = targets_of(method, 50, T=500), targets_of(method, 50)
        assert here.grid.tolist() == solver_grid(50, 500)
        for n in range(50):
            assert here.admitted(n) == [(tau + 1) // 2 - (tau > 0) for tau in there.admitted(n)]


@pytest.mark.parametrize("N, percent", [(250, 21), (50, 22)])
def test_share_of_targets_that_no_sampler_jumps_to(N, percent):
    """docs/differences.md: Eq. 7's targets that end no interval of an equidistant schedule."""
    targets, share = targets_of("tdd", N), 0.0
    for n in range(N):
        admitted, ends = targets.admitted(n), set()
        for k in range(4, 9):
            ends.add(max(s for s in (0, *equidistant(k, N)) if s <= targets.grid[n]))
        share += sum(tau not in ends for tau in admitted) / len(admitted) / N
    assert round(100 * share) == percent
    page = Path(__file__).with_name("docs") / "differences.md"
    assert f"{percent} %" in page.read_text(encoding="utf-8")


def test_reach_may_be_a_fraction():
    # At t_n = 376 (n = 94) e = 90.5 reaches 285.5: 2/7 = 285.71, visited at 287, is just in.
    assert target_set(250, 4, 16, e=90.5).admitted(94)[0] == 287
    assert target_set(250, 4, 16, e=90).admitted(94)[0] == 299  # 3/10


@pytest.mark.parametrize("method", ["tdd", "pcm", "ctm"])
def test_selection_is_uniform_over_the_admitted(method):
    targets = targets_of(method, 50)
    draws = sample_step(targets, (400_000, 1), 0.0, 0.0, torch.Generator().manual_seed(3))
    assert set(draws.t_n.tolist()) == set(targets.grid[:50].tolist())
    assert torch.equal(draws.t_next - draws.t_n, torch.where(draws.t_n > 0, 20, 19))
    chi2 = freedom = 0
    for n in range(50):
        drawn = Counter(draws.tau[draws.t_n == targets.grid[n]].tolist())
        expected, total = Counter(targets.admitted(n)), sum(drawn.values())
        assert set(drawn) == set(expected)
        for tau, weight in expected.items():
            mean = total * weight / sum(expected.values())
            chi2 += (drawn[tau] - mean) ** 2 / mean
        freedom += len(expected) - 1
    assert abs(chi2 - freedom) <= 4 * math.sqrt(2 * freedom)
    n_counts = torch.bincount(draws.t_n)[targets.grid[:50]].double()
    assert ((n_counts - n_counts.mean()) ** 2 / n_counts.mean()).sum() < 49 + 4 * math.sqrt(98)


def test_offset_is_uniform_over_whole_timesteps():
    """Eq. 8's interval in whole numbers, eta as tenths: each timestep in it has the same share."""
    cases = [(751, 3, 526), (499, 10, 0), (3, 3, 3), (10, 7, 3), (250, 9, 25), (0, 7, 0)]
    for tau, tenths, lowest in cases:
        assert 10 * lowest >= (10 - tenths) * tau > 10 * (lowest - 1)
        u = (torch.arange(100 * (tau - lowest + 1), dtype=torch.float64) + 0.5) / 100
        got = offset(torch.tensor(tau), tenths / 10, u / (tau - lowest + 1))
        assert torch.equal(got.bincount()[lowest:], torch.full((tau - lowest + 1,), 100))
        assert got.min() == lowest and got.max() == tau
    last = torch.tensor(1 - 2**-53, dtype=torch.float64)
    assert offset(torch.tensor(999), 0.3, last) == 999
    assert torch.equal(offset(torch.arange(1000), 0.0, torch.rand(1000)), torch.arange(1000))


def test_draws_follow_rho_eta_and_the_generator():
    targets, shape = targets_of("tdd", 250), (100_000, 2)
    draws = sample_step(targets, shape, 0.3, 0.2, torch.Generator().manual_seed(0))
    again = sample_step(targets, shape, 0.3, 0.2, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(vars(draws).values(), vars(again).values()))
    assert draws.keep_prompt.double().mean() == pytest.approx(0.8, abs=0.005)
    assert torch.equal(draws.guided_rows, torch.arange(100_000)[draws.keep_prompt])
    assert draws.noise.std() == pytest.approx(1, abs=0.01) and (draws.tau <= draws.t_n).all()
    # One draw tells nothing of another: whoever is kept, the times and offsets are as for the rest.
    high = draws.t_n > 250
    share = (draws.tau / draws.t_n.clamp(min=1)).double()
    table = torch.stack(
        [draws.t_n.double(), draws.keep_prompt.double(), share, draws.noise[:, 0].double()]
    )
    first, second = [0, 1, 0, 1, 2], [1, 2, 3, 3, 3]
    assert torch.corrcoef(table[:, high])[first, second].abs().max() < 0.015
    lowest, at_751 = min(targets.admitted(188)), draws.tau[draws.t_n == targets.grid[188]]
    assert math.floor(0.7 * lowest) <= at_751.min() < 0.71 * lowest and at_751.max() > 740


# ------------------------------------------------------------------------------------- the loss


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
        x1, c = a * x_0[i] + s * draws.noise[i], cond[i] if draws.keep_prompt[i] else null[0]
        if draws.keep_prompt[i]:
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
    """Loss to 1e-6, gradient to 1e-5, or 1e-4 where pseudo-Huber bends within float32's reach."""
    nets = student, target, teacher = Net(0), Net(1), Net(2)
    x_0, cond, null = randn(24, 2, 3), randn(24, 4, seed=5), torch.zeros(1, 4)
    draws = sample_step(
        targets_of(method, 50), x_0.shape, 0.3, rho, torch.Generator().manual_seed(1)
    )
    slow = slow_loss(*nets, x_0, cond, null, draws, 3.5, DISTANCES[distance])
    slow.mean().backward()
    expected, student.a.grad = student.a.grad, None
    loss = tdd_loss(*nets, x_0, cond, null, draws, 3.5, SCHEDULE, distance=distance).loss
    loss.mean().backward()
    assert torch.allclose(loss, slow.float(), rtol=1e-6, atol=1e-9)
    rough = 10 if distance is pseudo_huber else 1
    assert torch.allclose(student.a.grad, expected, rtol=1e-5 * rough, atol=1e-7 * rough)
    assert target.a.grad is None and teacher.a.grad is None


def test_loss_in_other_forms():
    """A dict condition, guiding all rows, and w' given per example change nothing."""
    nets, x_0, cond, null = (
        (Net(0), Net(1), Net(2)),
        randn(24, 2, 3),
        randn(24, 4),
        torch.zeros(1, 4),
    )
    d = sample_step(targets_of("tdd", 50), x_0.shape, 0.3, 0.4, torch.Generator().manual_seed(1))
    loss = tdd_loss(*nets, x_0, cond, null, d, 2.0, SCHEDULE).loss
    student, target, teacher = nets
    dpm = tdd_loss(*nets, x_0, cond, null, d, 2.0, SCHEDULE, solver=dpmpp_2s).loss
    x_next = SCHEDULE.diffuse(x_0, d.noise, d.t_next)
    c = torch.where(d.keep_prompt[:, None], cond, 0.0)
    guided_teacher = guided(teacher, c, null, 2.0)
    x_n = dpmpp_2s(guided_teacher, x_next, d.t_next, d.t_n, SCHEDULE)
    aim = integrate_eps(x_n, target(x_n, d.t_n, c), d.t_n, d.tau, SCHEDULE)
    pred = integrate_eps(x_next, student(x_next, d.t_next, c), d.t_next, d.tau, SCHEDULE)
    assert torch.allclose(dpm, (pred - aim).square().mean((1, 2)).float(), rtol=1e-6)
    assert not torch.allclose(dpm, loss, rtol=1e-4)
    all_rows = StepSample(d.t_next, d.t_n, d.tau, d.keep_prompt, d.noise, None)
    forms = [
        tdd_loss(*nets, x_0, {"label": cond}, {"label": null}, d, 2.0, SCHEDULE).loss,
        tdd_loss(*nets, x_0, cond, null, all_rows, 2.0, SCHEDULE).loss,
        tdd_loss(*nets, x_0, cond, null.expand(24, 4), d, torch.full((24,), 2.0), SCHEDULE).loss,
    ]
    assert all(torch.allclose(form, loss, rtol=1e-6) for form in forms)


def test_loss_of_half_precision_networks():
    """A bf16 teacher, student and target: the loss is still float32 arithmetic on what they say."""
    nets = [Net(i) for i in range(3)]
    halves = [lambda x_t, t, c, net=net: net(x_t.double(), t, c).bfloat16() for net in nets]
    x_0, cond, null = randn(64, 2, 3).float(), randn(64, 4).float(), torch.zeros(1, 4)
    d = sample_step(targets_of("tdd", 50), x_0.shape, 0.3, 0.4, torch.Generator().manual_seed(1))
    full = tdd_loss(*nets, x_0.double(), cond, null, d, 2.0, SCHEDULE).loss.mean()
    half = tdd_loss(*halves, x_0, cond, null, d, 2.0, SCHEDULE).loss.mean()
    assert half.item() == pytest.approx(full.item(), rel=0.05)


def test_unconditional_pass_is_only_for_the_kept():
    rows_seen = []

    def teacher(x_t, t, cond):
        rows_seen.append(len(x_t))
        return x_t

    x_0 = randn(40, 2)
    d = sample_step(targets_of("tdd", 50), x_0.shape, 0.3, 0.4, torch.Generator().manual_seed(1))
    tdd_loss(
        Net(0, (2,)), Net(1, (2,)), teacher, x_0, randn(40, 4), torch.zeros(1, 4), d, 2.0, SCHEDULE
    )
    assert rows_seen == [40 + int(d.keep_prompt.sum())]


def test_ema_is_line_18():
    target, student = (
        [randn(3, seed=1), randn(2, 2, seed=2)],
        [randn(3, seed=3), randn(2, 2, seed=4)],
    )
    expected = [0.95 * a + 0.05 * b for a, b in zip(target, student, strict=True)]
    ema_update(target, student, 0.95)
    assert all(torch.allclose(a, b) for a, b in zip(target, expected, strict=True))
    student = [s.requires_grad_() for s in student]
    ema_update(target, student, 0.0)
    assert not any(t.requires_grad for t in target)
    assert all(torch.equal(a, b) for a, b in zip(target, student, strict=True))


# ------------------------------------------------------- distilling one Gaussian, in closed form


def gaussian_coefficient(t):
    """eps(x_t, t) = c x_t for data N(0, V)."""
    alpha_t, sigma_t, _ = SCHEDULE.at(t)
    return sigma_t / (alpha_t**2 * V + sigma_t**2)


@cache
def distil_gaussian(method, eta, steps=2500, batch=2048):
    """Train eps = c[t] x with the real loss from the exact teacher; c at every grid timestep."""
    targets = targets_of(method, 50)
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
        draws = sample_step(targets, x_0.shape, eta, 0.0, generator)
        cond = torch.zeros(batch, 1)
        loss = tdd_loss(
            student, student, teacher, x_0, cond, cond, draws, 0.0, SCHEDULE, solver=dpmpp_2s
        ).loss
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
    c = distil_gaussian(method, 0.0)
    for n in range(1, 51):
        t, (tau,) = targets.grid[n].item(), targets.admitted(n - 1)
        assert jump_scale(c[n].item(), t, tau)[0] == pytest.approx(exact_scale(t, tau), rel=0.02)


def offset_weights(tau, eta):
    """P(tau~ = j) of Eq. 8: equal for all whole timesteps in [(1 - eta) tau, tau]."""
    timesteps = range(math.ceil((1 - Fraction(str(eta))) * tau), tau + 1)
    return dict.fromkeys(timesteps, 1 / len(timesteps))


def teacher_scale(t, s):
    """What the teacher's solver, one step of second order, makes of x on its way from t to s."""

    def teacher(x_t, t):
        return gaussian_coefficient(t)[:, None] * x_t

    return dpmpp_2s(teacher, torch.ones(1, 1, dtype=torch.float64), t, s, SCHEDULE).item()


def fixed_points(targets, eta, solution=exact_scale):
    """c at every grid timestep where the loss is least: a least-squares recursion in n."""
    grid = targets.grid.tolist()
    fixed = [0.0]  # time 0 is never a start: the jump from it to itself is the identity
    for n in range(len(grid) - 1):
        t1, t0 = grid[n + 1], grid[n]
        step, up, down = solution(t1, t0), 0.0, 0.0
        for tau in targets.admitted(n):
            for j, weight in offset_weights(tau, eta).items():
                A, B = jump_scale(0.0, t1, j)
                aim = jump_scale(fixed[n], t0, j)[0] * step
                up, down = up + weight * B * (A - aim), down + weight * B * B
        fixed.append(up / down)
    return fixed


@pytest.mark.parametrize(
    "method, eta", [("cm", 0.0), ("pcm", 0.0), ("tcd", 0.0), ("tdd", 0.0), ("tdd", 0.3)]
)
def test_training_meets_the_least_squares_fixed_point(method, eta):
    """No c fits all targets of a start; training ends at the compromise, at t_1 as well."""
    targets = targets_of(method, 50)
    c, fixed = distil_gaussian(method, eta).tolist(), fixed_points(targets, eta, teacher_scale)
    assert c[1:] == pytest.approx(fixed[1:], rel=0.02)
    full_jump = [jump_scale(x, 999, 751)[0] / exact_scale(999, 751) for x in (c[-1], fixed[-1])]
    assert full_jump[0] == pytest.approx(full_jump[1], rel=0.02)


@pytest.mark.parametrize(
    "name, method, eta, errors",
    [
        ("CM", "cm", 0.0, [-5, 17, 41, 47, 52, 55, 58]),
        ("PCM-4", "pcm", 0.0, [-92, -53, -3, -6, -3, -5, 9]),
        ("TCD", "tcd", 0.0, [-47, -21, 4, 11, 16, 19, 22]),
        ("TDD, eta = 0", "tdd", 0.0, [-84, -41, -1, 6, 11, 15, 19]),
        ("TDD", "tdd", 0.3, [-73, -34, 2, 10, 15, 19, 22]),
    ],
)
def test_the_table_of_one_gaussian(name, method, eta, errors):
    """What k steps of the fixed point make of the data's deviation, in per cent of it."""
    targets = targets_of(method, 250)
    c = dict(zip(targets.grid.tolist(), fixed_points(targets, eta), strict=True))
    for k, error in zip((1, 2, 4, 5, 6, 7, 8), errors, strict=True):
        stops = [*equidistant(k, 250), CLEAN]
        scale = math.prod(jump_scale(c[t], t, s)[0] for t, s in pairwise(stops))
        assert round(100 * (scale / exact_scale(999, CLEAN) - 1)) == error
    words = " | ".join(f"{e:+d} %" for e in errors)
    page = Path(__file__).with_name("docs") / "results-2d.md"
    assert f"| {name} | {words} |" in page.read_text(encoding="utf-8")


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

    def exact(model, x_t, t, s, schedule):
        return exact_scale(t, s) * x_t

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


def test_gamma_outside_its_range_is_refused():
    for gamma, noise in [(1.5, noises(1, 1)), (-0.1, noises(1, 1)), (0.2, None)]:
        with pytest.raises(ValueError, match="gamma"):
            gamma_sample(toy_eps, randn(1, 1), [999, 499], SCHEDULE, gamma, noise)


def test_floor_of_gamma_is_not_a_rounding_error():
    """(1 - 0.9) * 250 is 24.999999999999996 in floating point; s is 25."""
    seen = []

    def jump(model, x_t, t, s, schedule):
        seen.append(s)
        return x_t

    gamma_sample(None, randn(1, 1), [999, 250], SCHEDULE, 0.9, noises(1, 1), jump=jump)
    assert seen == [25, CLEAN]


def test_noise_stream_is_one_cpu_generator_an_image():
    stream = noise_stream(range(5, 8), (2, 4))
    generators = [torch.Generator("cpu").manual_seed(5 + i) for i in range(3)]
    for _ in range(3):
        draws = [torch.randn((1, 2, 4), generator=generator) for generator in generators]
        assert torch.equal(next(stream), torch.cat(draws))


# ------------------------------------------------------------------------------------- guidance


def test_guidance_is_equation_12():
    net, x_t, cond, null = Net(0), randn(5, 2, 3), randn(5, 4), torch.zeros(1, 4)
    t = torch.tensor([999, 5, 500, 20, 750])
    eps_c, eps_u = net(x_t, t, cond), net(x_t, t, null.expand(5, 4))
    for w in (0.5, 7.5):
        assert torch.allclose(guided(net, cond, null, w)(x_t, t), (1 + w) * eps_c - w * eps_u)
    assert torch.equal(guided(net, cond, null, 0.0)(x_t, t), eps_c)
    assert not gamma_sample(lambda x, t: net(x, t, cond), x_t, [999], SCHEDULE).requires_grad
    each_null = randn(5, 4, seed=8)
    expected = 3 * eps_c - 2 * net(x_t, t, each_null)
    some = torch.tensor([1, 4])
    assert torch.allclose(guided(net, cond, each_null, 2.0, some)(x_t, t)[some], expected[some])
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


@pytest.mark.parametrize("w", [1.0, 0.0])
def test_tuning_beside_a_negative_prompt_has_three_terms(w):
    """g = 2 tuned from g' = 4.5: 2/4.5 of the prompt, -1/4.5 of the negative, 3.5/4.5 of null."""
    prompt, empty, negative = torch.eye(3, dtype=torch.float64)

    def network(x_t, t, cond):  # its eps says which condition it had
        return cond

    x_t, t = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([999, 5])
    eps_hat = tuned_with_negative(network, prompt.expand(2, 3), empty[None], negative[None], w, 3.5)
    expected = torch.tensor([(1 + w) / 4.5, 3.5 / 4.5, -w / 4.5], dtype=torch.float64)
    assert torch.allclose(eps_hat(x_t, t), expected.expand(2, 3))


def test_clipping_is_numpys_percentile():
    x_0 = 3 * randn(6, 4, 5, 5)
    x_0[0] /= 100  # a percentile below 1 leaves the example as it is
    for percentile, top in [(0.995, 1.0), (0.9, 2.5), (0.5, 100.0)]:
        for x, got in zip(x_0.numpy(), clip_x0(x_0, percentile, top).numpy(), strict=True):
            s = np.clip(np.percentile(np.abs(x), 100 * percentile), 1, top)
            assert np.allclose(got, np.clip(x, -s, s) / s, rtol=1e-6)
    assert torch.allclose(clip_x0(x_0), x_0.clamp(-1, 1))
    assert torch.equal(clip_x0(x_0, max_value=9.0), clip_x0(x_0, 0.995, 9.0))


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
    x_t, eps = 2 * randn(3, 4), with_x0_clipping(toy_eps, clip_x0, SCHEDULE)
    x_0 = x0_from_eps(x_t, eps(x_t, torch.full((3,), 400)), 400, SCHEDULE)
    assert x_0.abs().max() == pytest.approx(1, rel=1e-9)
