"""Trajectory Consistency Distillation (arXiv 2402.19159): what it has beside TDD.

Most of TCD stands in tdd.py already, as a special case:

    Algorithms 1 and 2 (Eq. 29)   tdd_loss, with every grid point up to t_n as a target
    skipping step k               N = T / k solver steps: TCD's 20 of 1,000 timesteps are N = 50
    Algorithm 3                   gamma_sample at gamma = 1
    Algorithm 4 (SSS, Eq. 33)     gamma_sample

Section 4.2 is what is left: three ways to turn a network into the function f(x_t, t, s) that leads
along the PF-ODE from t to s. They are called 1, 2 and s wherever a jump can be chosen, in training
and in sampling, for TDD's targets as well as for TCD's.
"""

import torch
from torch import Tensor

from solvers import CLEAN, Schedule, ddim, dpmpp_2s, per_example, x0_of_step

# ------------------------------------------------------------- 4.2 trajectory consistency function
#
# All three are solver steps. They meet the boundary condition f(x_s, s, s) = x_s (Eq. 27) whatever
# the network predicts, because a step of no length leaves x_t unchanged. TCF(1), Eq. 21, is DDIM:
# one evaluation, with x_0 taken as constant from t to s; Eq. 6 of TDD.


def tcf_2(model, x_t: Tensor, t, s, schedule: Schedule) -> Tensor:
    """TCF(2), Eq. 22: a second evaluation at u, half-way in log-SNR, and x_0 linear between."""
    # Appendix C.2 prints u = t_lambda(lambda_s + lambda_t), which lies outside of [s, t] for most
    # pairs; the midpoint is half of that sum.
    if not torch.is_tensor(s) and s == CLEAN and t > 0:
        # A step to CLEAN is infinitely long and has no midpoint. Training's last target is time 0,
        # so sampling returns the x_0 prediction that leads there.
        x_s = dpmpp_2s(model, x_t, t, 0, schedule)
        return x0_of_step(x_t, x_s, t, 0, schedule)
    return dpmpp_2s(model, x_t, t, s, schedule)


def tcf_s(model, x_t: Tensor, t, s, schedule: Schedule) -> Tensor:
    """TCF(S+), Eq. 24: one evaluation of a network eps(x_t, t, s) that also takes the target s."""
    # Sampling ends at CLEAN where training ended at time 0; the network knows only the latter.
    target_time = per_example(s, x_t).clamp(min=0)
    return ddim(lambda x_t, t: model(x_t, t, target_time), x_t, t, s, schedule)


TCF = {"1": ddim, "2": tcf_2, "s": tcf_s}
