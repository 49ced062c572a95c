"""Many small eps-networks as one batched network, and the loop that trains them.

Rows of a batch are laid out "(b m)", members last: row b*M + m belongs to member m of M.
"""

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import trange

from solvers import Schedule
from toy.data import CLASSES
from unet import timestep_embedding

# ------------------------------------------------------------------------------------- network
#
# Three seeds of nine students are 27 networks of 22,600 weights. One after the other they would be
# bound by the cost of calling operators; stacked, one step of all of them takes 20 ms on two cores.

T_WIDTH = 32  # sinusoids of the timestep, and of the scalar


class BatchedMLP(nn.Module):
    """M independent MLPs eps(x_t, t, cond), run as one batched matrix product a layer.

    x_t (b*m, 2), t (b*m,), cond (b*m, CLASSES) in the layout "(b m)"; any multiple of M rows.
    scalar: the kind of one more input (b*m,), as in unet.ScalarEmbedding, or "".
    The output is sigma_t x_t + net: with alpha_T = 0.068 an error of eps at t = T comes back 14.6
    times larger in x_0, and sigma_t x_t alone is already right there.
    """

    def __init__(self, weight: list[Tensor], bias: list[Tensor], schedule: Schedule, scalar=""):
        super().__init__()
        self.schedule, self.scalar, self.members = schedule, scalar, len(bias[0])
        self.weight = nn.ParameterList(weight)  # (m, in, out) a layer
        self.bias = nn.ParameterList(bias)  # (m, 1, out)

    @classmethod
    def init(cls, members: int, schedule: Schedule, generator, width: int = 96) -> "BatchedMLP":
        """Random weights, the last layer's zero: eps = sigma_t x_t to begin with."""
        weight, bias = [], []
        for c_in, c in pairwise([2 + T_WIDTH + CLASSES, width, width, width, 2]):
            weight.append(torch.randn(members, c_in, c, generator=generator) / c_in**0.5)
            bias.append(torch.zeros(members, 1, c))
        weight[-1] = 0 * weight[-1]
        return cls(weight, bias, schedule)

    def select(self, members) -> "BatchedMLP":
        """A frozen copy of these members, by index, in this order; one may be named repeatedly."""
        members = list(members)
        weight = [p.detach()[members] for p in self.weight]
        bias = [p.detach()[members] for p in self.bias]
        return BatchedMLP(weight, bias, self.schedule, self.scalar).requires_grad_(False)

    def with_scalar(self, kind: str) -> "BatchedMLP":
        """A frozen copy with an input "target_time" or "num_steps", of no effect at first."""
        first, *rest = (p.detach() for p in self.weight)
        first = torch.cat([first, first.new_zeros(self.members, T_WIDTH, first.shape[2])], 1)
        wider = BatchedMLP([first, *rest], list(self.bias), self.schedule, kind)
        return wider.select(range(self.members))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, *scalar: Tensor) -> Tensor:
        inputs = [x_t, timestep_embedding(t, T_WIDTH), cond]
        inputs += [timestep_embedding(value, T_WIDTH) for value in scalar]
        h = rearrange(torch.cat(inputs, 1), "(b m) i -> m b i", m=self.members)
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            h = torch.baddbmm(bias, nn.functional.silu(h) if i else h, weight)  # (m, b, width)
        sigma_t = self.schedule.at(t, 2)[1].float()
        return sigma_t * x_t + rearrange(h, "m b i -> (b m) i")  # (bm, 2)


# ------------------------------------------------------------------------------------- training

SNAPSHOTS = (1 / 30, 1 / 10, 1 / 3)  # shares of the steps: 100, 300, 1,000 of 3,000


def train(
    network: BatchedMLP, loss_of_step, steps: int, lr: float, name: str, on_step_end=lambda: None,
    betas=(0.9, 0.999), snapshots: dict | None = None,
) -> BatchedMLP:  # fmt: skip
    """Minimise loss_of_step() -> (b*m,) by Adam, its rate falling to zero as a cosine.

    Returns the network, frozen; snapshots takes copies from before the end, by share of the steps.
    Raises ValueError for a loss that is no number.
    """
    # Fused: 27 networks are few tensors, but Adam's dozen passes over each would still show.
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = trange(steps, desc=f"{name:8}", mininterval=0.5, dynamic_ncols=True)
    for step in bar:
        loss = loss_of_step().mean()
        optimizer.zero_grad()
        # Members share no weights: times their number, the gradient is that of each one's mean.
        (loss * network.members).backward()
        optimizer.step()
        cosine.step()
        on_step_end()
        for share in SNAPSHOTS if snapshots is not None else ():
            if step + 1 == round(share * steps):
                snapshots[share] = network.select(range(network.members))
        # Every 100 steps is enough to stop a diverging run.
        if step % 100 == 0 or step == steps - 1:
            if not loss.isfinite():
                raise ValueError(f"{name}: loss {loss} at step {step}; lower --lr or --guidance")
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return network.requires_grad_(False)
