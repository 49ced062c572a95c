"""TCD's three trajectory consistency functions, in training and sampling, against closed forms."""

import math

import numpy as np
import pytest
import torch

from solvers import CLEAN, integrate_eps, noise_stream, renoise, solve
from tcd import TCF, tcf_2, tcf_s
from tdd import clip_x0, equidistant, gamma_sample, guided, sample_step, targets_of, tdd_loss
from tests.helpers import (
    ALPHA,
    SCHEDULE,
    SDXL,
    SIGMA,
    Net,
    at,
    equation_22,
    gaussian_eps,
    gaussian_flow,
    lam_spaced,
    randn,
    toy_eps,
)
from tests.oracles import diffusers_run


@pytest.mark.parametrize("name, order", [("1", 1), ("2", 2)])
def test_as_a_solver_it_converges_to_the_gaussian_flow_with_its_order(name, order):
    x_t, steps = randn(16, 2), np.array([40, 80, 160, 320])
    exact = gaussian_flow(x_t, 999, 0)
    found = [solve(gaussian_eps, x_t, lam_spaced(n), SCHEDULE, TCF[name]) for n in steps]
    errors = [(x - exact).abs().max().item() for x in found]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1 * order) and errors[-1] < 0.01


# ----------------------------------------------------------------------------------- diffusers


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


def test_noise_stream_is_diffusers():
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator("cpu").manual_seed(5 + i) for i in range(4)]
    stream = noise_stream(range(5, 9), (4, 8, 6))
    for _ in range(3):
        assert torch.equal(next(stream), randn_tensor((4, 4, 8, 6), generator=generators))
    assert torch.equal(
        next(noise_stream([7], (4, 8, 6))), next(noise_stream(range(5, 9), (4, 8, 6)))[2:3]
    )


def test_tcf_2_is_equation_22():
    x_t = randn(5, 3)
    for t, s in [(999, 751), (499, 0), (20, 3)]:
        ours = tcf_2(toy_eps, x_t, t, s, SCHEDULE)
        assert torch.allclose(ours, equation_22(toy_eps, x_t, t, s)[0], rtol=1e-9)


@pytest.mark.parametrize("name", TCF)
def test_boundary_condition_is_equation_27(name):
    """f(x_s, s, s) = x_s, whatever the network says, for some rows of a batch or all."""
    x_t, t, s = randn(3, 2), torch.tensor([400, 19, 999]), torch.tensor([400, 19, 0])

    def model(x_t, t, s=None):
        return toy_eps(x_t, t) * 1e3

    ours = TCF[name](model, x_t, t, s, SCHEDULE)
    assert torch.equal(ours[:2], x_t[:2])
    assert not torch.allclose(ours[2], x_t[2])


def scalar_eps(x_t, t, s):
    """A network that takes its jump's target time."""
    return toy_eps(x_t, t) + 0.3 * torch.cos(s / 300).reshape(-1, *[1] * (x_t.ndim - 1))


def test_tcf_s_is_equation_24_for_a_network_of_its_target_time():
    x_t = randn(4, 2)
    for t, s in [(999, 751), (499, 0)]:
        (a_t, s_t, l_t), (a_s, s_s, l_s) = at(t), at(s)
        eps = scalar_eps(x_t, torch.full((4,), t), torch.full((4,), s))
        F = (x_t - s_t * eps) / a_t
        expected = s_s / s_t * x_t - a_s * (math.exp(l_t - l_s) - 1) * F
        assert torch.allclose(tcf_s(scalar_eps, x_t, t, s, SCHEDULE), expected, rtol=1e-9)
    # Sampling's end is training's last target to the network, and sigma = 0 to the integrator.
    end = tcf_s(scalar_eps, x_t, 499, CLEAN, SCHEDULE)
    assert torch.allclose(end, F, rtol=1e-9)
    each = torch.tensor([751, 0, 20, 998])
    rows = tcf_s(scalar_eps, x_t, 999, each, SCHEDULE)
    for i, s in enumerate(each.tolist()):
        alone = tcf_s(scalar_eps, x_t[i : i + 1], 999, s, SCHEDULE)
        assert torch.allclose(rows[i : i + 1], alone, rtol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_strategic_stochastic_sampling_of_order_2(gamma):
    """Algorithm 4 over Eq. 22, written out: at gamma 1 every step goes by way of timestep 0."""
    x, times, z = randn(3, 2), equidistant(4, 50), randn(3, 3, 2, seed=4)
    ours = gamma_sample(toy_eps, x, times, SCHEDULE, gamma, iter(z), jump=tcf_2)
    for i, (t, p) in enumerate(zip(times, [*times[1:], None], strict=True)):
        if p is None:
            # The last jump is to 0; its bracket is the x_0 that sampling returns.
            x = equation_22(toy_eps, x, t, 0)[1]
        else:
            s = math.floor((1 - gamma) * p + 1e-6)
            ratio = ALPHA[p + 1] / ALPHA[s + 1]
            x = ratio * equation_22(toy_eps, x, t, s)[0] + math.sqrt(1 - ratio**2) * z[i]
    assert torch.allclose(ours, x, rtol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_guided_and_clipped_sampling_tells_the_network_of_s(gamma):
    """Eqs. 12 and 17 with a network that takes s: the same s in both passes of the guidance."""
    x, times, z = 2 * randn(3, 2), equidistant(3, 50), randn(2, 3, 2, seed=4)
    cond, null = randn(3, 4), torch.zeros(1, 4)
    net = Net(0, (2,))

    def model(x_t, t, c, s):
        return net(x_t, t, c) + 0.3 * torch.cos(s / 300)[:, None]

    ours = gamma_sample(
        guided(model, cond, null, 1.5), x, times, SCHEDULE, gamma, iter(z), clip_x0, 3, tcf_s
    )
    for i, (t, p) in enumerate(zip(times, [*times[1:], CLEAN], strict=True)):
        s = CLEAN if p == CLEAN else math.floor((1 - gamma) * p + 1e-6)
        (a_t, s_t, _), told = at(t), torch.full((3,), max(s, 0))
        time = torch.full((3,), t)
        eps = 2.5 * model(x, time, cond, told) - 1.5 * model(x, time, null.expand(3, 4), told)
        x_0 = ((x - s_t * eps) / a_t).clamp(-1, 1)
        eps = (x - a_t * x_0) / s_t
        x = ALPHA[s + 1] * x_0 + SIGMA[s + 1] * eps
        if s < p:
            x = renoise(x, s, p, z[i], SCHEDULE)
    assert torch.allclose(ours, x.to(ours), rtol=1e-8)


@pytest.mark.parametrize("name", TCF)
@pytest.mark.parametrize("method", ["tcd", "tdd"])
def test_loss_is_algorithm_2_with_each_function(name, method):
    """Guided TCD and TDD an example at a time: x_{n+1}, the teacher's step, both jumps to t_m."""
    nets = [Net(i) for i in range(3)]
    tell = name == "s"

    def network(i):
        def model(x_t, t, c, s=None):
            assert (s is not None) == (tell and i < 2)
            return nets[i](x_t, t, c) + (
                0.2 * torch.sin(s / 200)[:, None, None] if tell and i < 2 else 0
            )

        return model

    student, target, teacher = map(network, range(3))
    x_0, cond, null = randn(16, 2, 3), randn(16, 4, seed=5), torch.zeros(1, 4)
    d = sample_step(targets_of(method, 50), x_0.shape, 0.3, 0.4, torch.Generator().manual_seed(1))
    w = 2 + 12 * torch.rand(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    args = x_0, cond, null, d, w, SCHEDULE
    loss = tdd_loss(student, target, teacher, *args, jump=TCF[name]).loss

    def jump(model, x, t, s, c):
        if name == "2":
            return x if s == t else equation_22(lambda x, t: model(x, t, c), x, t, s)[0]
        told = [torch.tensor([s])] if tell and model is not teacher else []
        (a_t, s_t, _), (a_s, s_s, _) = at(t), at(s)
        eps = model(x, torch.tensor([t]), c, *told)
        return a_s * (x - s_t * eps) / a_t + s_s * eps

    for i in range(16):
        t1, t0, tau = (int(v[i]) for v in (d.t_next, d.t_n, d.tau))
        x, c = ALPHA[t1 + 1] * x_0[i : i + 1] + SIGMA[t1 + 1] * d.noise[i : i + 1], cond[i : i + 1]
        (a_t, s_t, _), (a_s, s_s, _), time = at(t1), at(t0), torch.tensor([t1])
        c = c if d.keep_prompt[i] else null
        eps = (1 + w[i]) * teacher(x, time, c) - w[i] * teacher(x, time, null)
        x_n = a_s * (x - s_t * eps) / a_t + s_s * eps
        apart = jump(student, x, t1, tau, c) - jump(target, x_n, t0, tau, c)
        assert loss[i].item() == pytest.approx(apart.square().mean().item(), rel=1e-5, abs=1e-9)
