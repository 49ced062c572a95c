"""Trajectory Consistency Distillation (arXiv 2402.19159): what it has beside TDD.

Most of TCD stands in tdd.py already, of which it is a special case:

    Algorithms 1 and 2 (Eq. 29)   jumps, with every grid point below t_n as a target
    skipping step k               N = T / k solver steps: TCD's 20 of 1,000 timesteps are N = 50
    Algorithm 3                   gamma_sample at gamma = 1
    Algorithm 4 (SSS, Eq. 33)     gamma_sample

What is left is its section 4.2: three ways to turn a network into the function f(x_t, t, s) which
leads along the PF-ODE from t to s. They go by the names 1, 2 and s wherever a jump can be chosen,
in training and in sampling, for TDD's targets as well as for TCD's.
"""

import torch
from torch import Tensor

from solvers import CLEAN, Schedule, ddim, dpmpp_2s, x0_of_step

# ------------------------------------------------------------- 4.2 trajectory consistency function
#
# All are solver steps, with a solver's signature. They meet the boundary condition f(x_s, s, s) =
# x_s (Eq. 27) whatever the network says: a step of no length leaves x_t where it is.


def tcf_1(model, x_t: Tensor, t, s, schedule: Schedule, past=None):
    """TCF(1), Eq. 21: one evaluation, and x_0 taken as constant from t to s; Eq. 6 of TDD."""
    return ddim(model, x_t, t, s, schedule, past)


def tcf_2(model, x_t: Tensor, t, s, schedule: Schedule, past=None):
    """TCF(2), Eq. 22: a second evaluation at u, half-way in log-SNR, and x_0 linear between."""
    # Appendix C.2 prints u = t_lambda(lambda_s + lambda_t), which lies outside of [s, t] for most
    # pairs; the middle wants the half of it.
    if not torch.is_tensor(s) and s == CLEAN and t > 0:
        # The middle of an endless step is nowhere. Training's last target is 0: what carries x_t
        # there is the prediction that ends the sampling.
        x_0, _ = dpmpp_2s(model, x_t, t, 0, schedule)
        return x0_of_step(x_t, x_0, t, 0, schedule), past
    return dpmpp_2s(model, x_t, t, s, schedule, past)


def tcf_s(model, x_t: Tensor, t, s, schedule: Schedule, past=None):
    """TCF(S+), Eq. 24: one evaluation of a network eps(x_t, t, s) that is told where to arrive."""
    # CLEAN is where sampling ends, 0 where training did; to the network they are one.
    end = torch.as_tensor(s, device=x_t.device).clamp(min=0).expand(len(x_t))
    return ddim(lambda x_t, t: model(x_t, t, end), x_t, t, s, schedule, past)


TCF = {"1": tcf_1, "2": tcf_2, "s": tcf_s}
