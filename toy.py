"""The 2-D playground: data, and many small eps-networks trained together as one.

Rows of a batch are laid out "(b m)", members last: row b*M + m belongs to member m of M.
"""

import math
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import trange

from solvers import Schedule
from unet import timestep_embedding

CLASSES = 4

# ---------------------------------------------------------------------------------------- data
#
# Each set maps a label, two uniforms and two normals to a point, so that drawing is a single call.
# The spirals are the default: an arm bends, so a jump that aims wrong leaves the arm and is seen.


def spirals(label: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """Four arms of a spiral, almost half a turn each, a class an arm."""
    radius = 0.25 + 1.75 * u[:, 0].sqrt()
    angle = math.pi * (0.5 * label + 0.5 * radius)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1) + 0.07 * z


def gaussians(label: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """Twelve Gaussians on a ring, every fourth of the same class."""
    angle = math.pi / 6 * (label + CLASSES * (3 * u[:, 0]).floor())
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.12 * z


def checkerboard(label: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """The eight dark fields of a 4 x 4 board, a class a column."""
    row = 2 * (2 * u[:, 0]).floor() + label % 2
    return torch.stack([label + u[:, 1], row + (2 * u[:, 0]) % 1], 1) - 2


DATA = {"spirals": spirals, "gaussians": gaussians, "checkerboard": checkerboard}


class Data:
    """One of DATA with each coordinate standardised to mean 0 and deviation 1."""

    def __init__(self, name: str):
        self.points, self.mean, self.std = DATA[name], 0.0, 1.0
        # A sample is as good as the closed form here: 200,000 points fix both to 0.2 %.
        x, _ = self.draw(200_000, torch.Generator().manual_seed(0))
        self.mean, self.std = x.mean(0), x.std(0)
        self.bound = ((x - self.mean) / self.std).abs().max().item()

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n points (n, 2) and their labels (n,)."""
        label = torch.randint(CLASSES, (n,), generator=generator)
        u, z = torch.rand((n, 2), generator=generator), torch.randn((n, 2), generator=generator)
        return (self.points(label, u, z) - self.mean) / self.std, label


def one_hot(label: Tensor) -> Tensor:
    """The condition of a label, (n, CLASSES); the null condition is all zeros."""
    return nn.functional.one_hot(label, CLASSES).float()


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


# ------------------------------------------------------------------------------------ training
#
# A method's budget is counted in network passes: its steps are those of the main comparison times
# PASSES["1"] / PASSES[method].

# Forward passes of the network that a training step takes, a backward pass counted as two. All but
# TDM: guided teacher 2, target network 1 an evaluation, student 3 an evaluation. TDM: guided
# teacher 2, student 3, fake score 3 + 1, and 1.5 (K = 4) or 0.67 (K of 1, 2, 4) before the step.
PASSES = {"1": 6, "2": 10, "s": 6, "tdm4": 10.5, "tdm_unify": 9.67}


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


# ------------------------------------------------------------------------------------ distance
#
# rmse asks whether each sample is where the teacher would have put it, sliced Wasserstein only
# whether the cloud is right. The second has a floor: two finite clouds never agree.


def rmse(x: Tensor, reference: Tensor) -> Tensor:
    """Root mean squared distance between samples (.., n, 2) and their references; (..)."""
    return (x - reference).square().sum(-1).mean(-1).sqrt()


def sliced_wasserstein(x: Tensor, y: Tensor, label: Tensor, directions: int = 32) -> Tensor:
    """Mean over classes of the sliced 2-Wasserstein distance; x, y (.., n, 2), label (n,) -> (..).

    The directions are equally spaced over the half circle, so that the distance is repeatable.
    """
    angle = torch.arange(directions) * (math.pi / directions)
    sides = torch.stack([angle.cos(), angle.sin()]).to(x)  # (2, d)
    distances = []
    for c in range(CLASSES):
        one, other = ((z[..., label == c, :] @ sides).sort(-2).values for z in (x, y))
        distances.append((one - other).square().mean((-2, -1)).sqrt())
    return torch.stack(distances).mean(0)
