"""The 2-D playground: data, and many small eps-networks trained together as one.

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


class Ensemble(nn.Module):
    """M independent MLPs eps(x_t, t, cond), run as one batched matrix product a layer.

    x_t (b*m, 2), t (b*m,), cond (b*m, CLASSES) in the layout "(b m)"; any multiple of M rows.
    The output is sigma_t x_t + net: with alpha_T = 0.068 an error of eps at t = T comes back 14.6
    times larger in x_0, and sigma_t x_t alone is already right there.
    """

    def __init__(self, weight: list[Tensor], bias: list[Tensor], schedule: Schedule, of=""):
        super().__init__()
        self.schedule, self.members, self.told = schedule, len(bias[0]), of
        self.weight = nn.ParameterList(weight)  # (m, in, out) a layer
        self.bias = nn.ParameterList(bias)  # (m, 1, out)

    @classmethod
    def fresh(cls, members: int, schedule: Schedule, generator, width: int = 96):
        """Random weights, the last layer's zero: eps = sigma_t x_t to begin with."""
        sizes = [2 + 32 + CLASSES, width, width, width, 2]
        normal = [torch.randn(members, *io, generator=generator) for io in pairwise(sizes)]
        weight = [w / w.shape[1] ** 0.5 for w in normal]
        bias = [torch.zeros(members, 1, o) for o in sizes[1:]]
        return cls([*weight[:-1], 0 * weight[-1]], bias, schedule)

    def pick(self, members) -> "Ensemble":
        """A frozen copy of these members alone, in this order and as often as named."""
        weight, bias = ([p.detach()[list(members)] for p in ps] for ps in (self.weight, self.bias))
        return Ensemble(weight, bias, self.schedule, self.told).requires_grad_(False)

    def telling(self, of: str) -> "Ensemble":
        """A frozen copy that is told one more number, "s" or "K", and makes nothing of it yet."""
        first, *rest = (p.detach().clone() for p in self.weight)
        first = torch.cat([first, first.new_zeros(self.members, 32, first.shape[2])], 1)
        bias = [p.detach().clone() for p in self.bias]
        return Ensemble([first, *rest], bias, self.schedule, of).requires_grad_(False)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, *n: Tensor) -> Tensor:
        numbers = [timestep_embedding(each, 32) for each in n]
        h = torch.cat([x_t, timestep_embedding(t, 32), cond, *numbers], 1)  # (bm, 2 + 32 + 4 ..)
        h = rearrange(h, "(b m) i -> m b i", m=self.members)
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            h = torch.baddbmm(bias, nn.functional.silu(h) if i else h, weight)  # (m, b, width)
        sigma_t = self.schedule.at(t, 2)[1].float()
        return sigma_t * x_t + rearrange(h, "m b i -> (b m) i")  # (bm, 2)


def fit(
    network: Ensemble, loss_of_step, steps: int, lr: float, name: str,
    after=lambda: None, betas=(0.9, 0.999),
):  # fmt: skip
    """Adam with a cosine to zero on loss_of_step() -> (b*m,); the mean of each member's loss.

    Members share no weights, so the gradient is each member's own. Raises ValueError for a loss
    that is no number.
    """
    # Fused: 27 networks are few tensors, but Adam's dozen passes over each would still show.
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = trange(steps, desc=f"{name:8}", mininterval=0.5, dynamic_ncols=True)
    for step in bar:
        loss = loss_of_step().mean()
        optimizer.zero_grad()
        (loss * network.members).backward()
        optimizer.step()
        cosine.step()
        after()
        # Now and then only: looking at the loss waits for it.
        if step % 100 == 0 or step == steps - 1:
            if not loss.isfinite():
                raise ValueError(f"{name}: loss {loss} at step {step}; lower --lr or --guidance")
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return network.requires_grad_(False)
