"""Closed forms and small tools that several tests share; the six packages are enough."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from common import cli
from solvers import sdxl_schedule

SCHEDULE = sdxl_schedule()


ALPHA = np.concatenate(
    [[1.0], np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))]
)


SIGMA = np.sqrt(1 - ALPHA**2)  # both at [t + 1], so that [0] is CLEAN


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(script, monkeypatch, capsys, *words):
    """A script (its module) from the command line: exit code, stdout and stderr."""
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, words)])
    code = 0
    try:
        cli.run(script.main, script.parser())
    except SystemExit as stop:
        code = stop.code
    return (code, *capsys.readouterr())


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


def toy_eps(x_t, t):
    """A smooth, nonlinear stand-in for a network."""
    return torch.tanh(x_t.flip(-1) + 0.5 * x_t) + 0.001 * t.reshape(-1, *[1] * (x_t.ndim - 1))


SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


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


def load_rows(path):
    result = json.loads(path.read_text())
    fields = {"method", "variant", "k", "gamma", "schedule", "w", "tune", "clip_steps", "passes",
              "metric", "per_seed", "mean", "std"}  # fmt: skip
    assert all(set(row) == fields for row in result["rows"])

    def per_seed(method, ks=(4, 5, 6, 7, 8), metric="rmse", **case):
        """The mean over ks of a metric, for each seed."""
        w = result["settings"]["guidance"] - 1 if method == "teacher" else 0.0
        plain = {"variant": "", "gamma": 0.0, "schedule": "equidistant", "w": w, "tune": None,
                 "clip_steps": 0, "method": method, "metric": metric}  # fmt: skip
        match = {**plain, **case}
        rows = [r for r in result["rows"] if match.items() <= r.items() and r["k"] in ks]
        assert len(rows) == len(ks)
        return np.mean([row["per_seed"] for row in rows], axis=0)

    return result, per_seed


def read_table(page, after):
    """The first table of a page, such as "README.md", after these words: cells by row name."""
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    lines = text[text.index(after) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    rows = [line.split("|")[1:-1] for line in lines[first + 1 :]]
    end = next(i for i, row in enumerate(rows) if not row)
    return {row[0].strip(" *"): [cell.strip(" *") for cell in row[1:]] for row in rows[:end]}


def at(t):
    """alpha, sigma and lambda of an integer timestep, from the test's own schedule."""
    return ALPHA[t + 1], SIGMA[t + 1], math.log(ALPHA[t + 1] / SIGMA[t + 1])


def equation_22(model, x_t, t, s):
    """TCF(2) as TCD prints it, u being half-way in lambda; also its x_0, the bracket."""
    (a_t, s_t, l_t), (a_s, s_s, l_s) = at(t), at(s)
    h, l_u = l_s - l_t, (l_t + l_s) / 2
    a_u, s_u = 1 / math.sqrt(1 + math.exp(-2 * l_u)), 1 / math.sqrt(1 + math.exp(2 * l_u))
    u = float(np.interp(math.log(a_u), np.log(ALPHA[::-1]), np.arange(999, -2, -1)))
    x_hat = (x_t - s_t * model(x_t, torch.full((len(x_t),), t))) / a_t
    x_u = s_u / s_t * x_t - a_u * (math.exp(-h / 2) - 1) * x_hat
    at_u = (x_u - s_u * model(x_u, torch.full((len(x_t),), u, dtype=torch.float64))) / a_u
    r = (l_u - l_t) / h
    bracket = (1 - 1 / (2 * r)) * x_hat + 1 / (2 * r) * at_u
    return s_s / s_t * x_t - a_s * (math.exp(-h) - 1) * bracket, bracket
