"""Schedule and solvers against closed forms and diffusers."""

import math

import numpy as np
import pytest
import torch

from solvers import (
    CLEAN,
    SOLVERS,
    ddim,
    dpm_2s,
    dpmpp_2s,
    eps_from_x0,
    integrate_eps,
    integrate_x0,
    solve,
    x0_from_eps,
)
from tdd import gamma_sample
from tests.helpers import (
    ALPHA,
    SCHEDULE,
    SDXL,
    SIGMA,
    gaussian_eps,
    gaussian_flow,
    lam_spaced,
    randn,
    toy_eps,
)
from tests.oracles import diffusers_run

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


def test_schedule_keeps_its_digits():
    """sigma from expm1, not from sqrt(1 - alpha^2); times in float64, not float32."""
    sigma = SCHEDULE.at(torch.tensor([-1 + 1e-9], dtype=torch.float64))[1].item()
    assert sigma == pytest.approx(math.sqrt(1e-9 * -math.log1p(-0.00085)), rel=1e-6)
    t = torch.tensor([998.123456789], dtype=torch.float64)
    assert SCHEDULE.t_of_lam(SCHEDULE.lam(t)).item() == pytest.approx(t.item(), abs=1e-9)
    assert SCHEDULE.t_of_lam(torch.tensor(math.inf)) == CLEAN
    rounded_down = SCHEDULE.lam(999) - 1e-13
    assert SCHEDULE.t_of_lam(rounded_down).item() == pytest.approx(999, abs=1e-9)


def test_predictions_convert():
    x_0, eps, t = randn(6, 3), randn(6, 3, seed=1), torch.tensor([0, 1, 250, 499, 750, 999])
    x_t = SCHEDULE.diffuse(x_0, eps, t)
    a, s = (torch.tensor(c[t.numpy() + 1])[:, None] for c in (ALPHA, SIGMA))
    assert torch.allclose(x_t, a * x_0 + s * eps)
    assert torch.allclose(x0_from_eps(x_t, eps, t, SCHEDULE), x_0)
    assert torch.allclose(eps_from_x0(x_t, x_0, t, SCHEDULE), eps)


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
    """Two steps, the last one to CLEAN for one example; vectors of times against numbers."""
    x_t, stops = randn(3, 2), torch.tensor([[999, 400, 37], [751, 60, 12], [300, CLEAN, 0]])
    together = solve(gaussian_eps, x_t, stops, SCHEDULE, SOLVERS[name]())
    for i in range(3):
        alone = solve(gaussian_eps, x_t[i : i + 1], stops[:, i].tolist(), SCHEDULE, SOLVERS[name]())
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-12)


@pytest.mark.parametrize("name", ["dpm2s", "dpm++2s"])
def test_singlestep_is_the_literal_midpoint_step(name):
    """As the papers print them, with u half-way in lam; a step to CLEAN is DDIM's."""
    x_t, t, s = randn(4, 2), 751, 499
    (a_t, s_t, l_t), (a_s, s_s, l_s) = SCHEDULE.at(t), SCHEDULE.at(s)
    l_u, h = (l_t + l_s) / 2, l_s - l_t
    a_u, s_u = 1 / (1 + (-2 * l_u).exp()).sqrt(), 1 / (1 + (2 * l_u).exp()).sqrt()

    def model(x, time):  # depends on t through lam alone, so that u need not be named
        return torch.tanh(x.flip(-1) + SCHEDULE.lam(time, 2))

    def at_u(x):
        return torch.tanh(x.flip(-1) + l_u)

    eps = model(x_t, torch.full((4,), t))
    if name == "dpm2s":
        x_u = a_u / a_t * x_t - s_u * (h / 2).expm1() * eps
        expected = a_s / a_t * x_t - s_s * h.expm1() * at_u(x_u)
    else:
        x_0 = (x_t - s_t * eps) / a_t
        x_u = s_u / s_t * x_t - a_u * (-h / 2).expm1() * x_0
        expected = s_s / s_t * x_t - a_s * (-h).expm1() * (x_u - s_u * at_u(x_u)) / a_u
    assert torch.allclose(SOLVERS[name]()(model, x_t, t, s, SCHEDULE), expected, rtol=1e-9)
    end = SOLVERS[name]()(model, x_t, t, CLEAN, SCHEDULE)
    assert torch.allclose(end, (x_t - s_t * eps) / a_t, rtol=1e-9)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_at_the_door(half):
    """Samples are at least float32, whether t is a number or a vector and whatever the network."""
    x_t, eps = randn(3, 4).to(half), randn(3, 4, seed=1).to(half)
    exact = x0_from_eps(x_t.double(), eps.double(), 999, SCHEDULE)
    for t in (999, torch.full((3,), 999)):
        x_0 = x0_from_eps(x_t, eps, t, SCHEDULE)
        assert x_0.dtype == torch.float32
        assert torch.allclose(x_0.double(), exact, rtol=1e-5, atol=1e-5)
    assert gamma_sample(lambda x, t: eps, x_t, [999, 499], SCHEDULE).dtype == torch.float32


def test_solve_calls_back_with_where_it_is():
    seen = []
    end = solve(
        toy_eps, randn(2, 3), [999, 500, CLEAN], SCHEDULE, callback=lambda s, x: seen.append((s, x))
    )
    assert [s for s, _ in seen] == [500, CLEAN]
    assert torch.equal(seen[-1][1], end)


@pytest.mark.parametrize(
    "name, order", [("ddim", 1), ("dpm2s", 2), ("dpm2m", 2), ("dpm++2s", 2), ("dpm++2m", 2)]
)
def test_solver_converges_to_gaussian_flow_with_its_order(name, order):
    x_t, steps = randn(16, 2), np.array([40, 80, 160, 320])
    exact = gaussian_flow(x_t, 999, 0)
    errors = [
        (solve(gaussian_eps, x_t, lam_spaced(n), SCHEDULE, SOLVERS[name]()) - exact)
        .abs()
        .max()
        .item()
        for n in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1 * order) and errors[-1] < 0.01


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
        [*scheduler.timesteps.tolist(), CLEAN if last == "zero" else 0], x_t, SOLVERS[name]()
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
        x_t = solver(toy_eps, x_t, times[i], times[i + 2], SCHEDULE, u=times[i + 1])
        assert torch.allclose(x_t, theirs[i + 1], atol=5e-5)
