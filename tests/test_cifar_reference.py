"""What CIFAR-10's samples with noise are compared with: exact jumps of the teacher."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import torch

from cifar.evaluate import Evaluation
from cifar.sample import LoadedModel
from common.compare import Case
from solvers import CLEAN, ddim
from tdd import equidistant, gamma_sample
from tests.helpers import SCHEDULE, randn, toy_eps


def test_exact_samples_are_the_guided_teachers_jumps():
    """Of the case that a student is sampled in, its own guidance aside; each but once."""
    evaluation, calls = object.__new__(Evaluation), []
    evaluation.config, evaluation.exact, evaluation.seeds = SimpleNamespace(w=2.0), {}, range(5)
    evaluation.sample = lambda *args, **kwargs: calls.append((args, kwargs)) or "samples"
    student = Case(4, 0.2, "nonequidistant", 1.0, 5.0, 4)
    for case in (student, replace(student, w=0.0, tune=None)):
        evaluation._add_exact(LoadedModel(None), case)
    ((method, model, sampled, seeds), kwargs), *more = calls
    assert not more and method == "teacher" and model.jump == evaluation.exact_jump
    assert sampled == Case(4, 0.2, "nonequidistant", 2.0, None, 4)
    assert seeds == range(5) and kwargs == {"exact": True}
    assert evaluation.exact == {(4, 0.2, "nonequidistant"): "samples"}


def test_exact_jumps_without_noise_are_the_teachers_own_steps():
    """By way of its own timesteps: one jump from 999 to the end is DDIM in all of its steps."""
    evaluation = object.__new__(Evaluation)
    evaluation.config = SimpleNamespace(solver_steps=10)
    x, exact = randn(3, 12, 4, 4), evaluation.exact_jump
    whole = exact(toy_eps, x, 999, CLEAN, SCHEDULE)
    assert torch.allclose(whole, gamma_sample(toy_eps, x, equidistant(10, 10), SCHEDULE))
    in_two = exact(toy_eps, exact(toy_eps, x, 999, 499, SCHEDULE), 499, CLEAN, SCHEDULE)
    assert torch.allclose(in_two, whole)
    off_grid = exact(toy_eps, x, 999, 450, SCHEDULE)  # (1 - gamma) p is between two of them
    stops = [999, 899, 799, 699, 599, 499, 450]
    by_hand = x
    for t, s in pairwise(stops):
        by_hand = ddim(toy_eps, by_hand, t, s, SCHEDULE)
    assert torch.allclose(off_grid, by_hand)
