"""What CIFAR-10's samples with noise are compared with: exact jumps of the teacher."""

from itertools import pairwise
from types import SimpleNamespace

import torch

from cifar.evaluate import Evaluation
from solvers import CLEAN, ddim
from tdd import equidistant, gamma_sample
from tests.helpers import SCHEDULE, randn, toy_eps


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
