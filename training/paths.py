"""Batches of walkers on the teacher's path, for the training loop of SDXL and CIFAR-10."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.walkers import BATCHES, Walkers, stagger_steps
from training import distributed
from training.distill import TDDStep

FIELDS = ("n", "keep_prompt", "w")  # of Walkers, beside x and conds
DAMAGED = "the checkpoint's walkers are damaged: begin with another --output"


def count_walkers(batch_size: int, fewest: int = 0) -> int:
    """How many walkers batches of that size are drawn from."""
    return max(BATCHES * batch_size, fewest)


def stride(N: int) -> int:
    """Points of the grid that walkers go down by at once while they are spread.

    A tenth of the path. Many are then spread at little cost, and begin a little off their path.
    """
    return max(1, N // 10)


def start_steps(W: int, N: int) -> int:
    """How many steps of the teacher PathLoader.start takes."""
    return stagger_steps(W, N, stride(N))


class PathLoader(Iterator):
    """Endless batches of walkers, each on its way to a condition of its own.

    shape: of an example. draw_conds(count) lists new conditions: pairs [condition, name], of words
    and numbers; is_cond tells a condition from anything else. prompts: the loader that they come
    from, if any. grad_accum: batches an optimizer step. generator: the run's. fewest: number of
    walkers if four batches are less.

    A batch has "walkers" (b,), "conds" and "names". position and tensors() are all that a resumed
    run needs. Nobody walks before `start` or `restore`.
    """

    def __init__(
        self, step: TDDStep, shape, batch_size: int, generator: torch.Generator, device,
        draw_conds: Callable[[int], list], is_cond: Callable[[object], bool], prompts=None,
        grad_accum: int = 1, fewest: int = 0,
    ):  # fmt: skip
        config = step.config
        self.step, self.batch_size, self.prompts, self.is_cond = step, batch_size, prompts, is_cond
        shape = (count_walkers(batch_size * grad_accum, fewest), *shape)
        self.walkers = step.walkers = Walkers(
            shape, config.targets.grid, config.rho, config.w, draw_conds, generator, device
        )

    def start(self, encode) -> int:
        """Stagger the walkers; encode(conds) as for Walkers. Returns the steps that it took."""
        config = self.step.config
        return self.walkers.stagger(
            self.step.teacher, lambda pairs: encode([cond for cond, _ in pairs]), config.schedule,
            config.solver, self.batch_size, stride(len(config.targets.grid) - 1),
            quiet=not distributed.is_main(),
        )  # fmt: skip

    def __next__(self) -> dict:
        rows = self.walkers.draw(self.batch_size)
        conds, names = zip(*(self.walkers.conds[row] for row in rows.tolist()), strict=True)
        return {"walkers": rows, "conds": list(conds), "names": list(names)}

    @property
    def position(self) -> dict:
        """What JSON can hold of the walkers, and the prompts' place."""
        values = {name: getattr(self.walkers, name).tolist() for name in FIELDS}
        prompts = None if self.prompts is None else self.prompts.position
        return {**values, "conds": self.walkers.conds, "prompts": prompts}

    def tensors(self) -> dict[str, Tensor]:
        """The rest: a checkpoint keeps it in a file for each process."""
        return {"x": self.walkers.x}

    def restore(self, position: dict, tensors: dict[str, Tensor]) -> None:
        """Go on from a checkpoint; ValueError if it does not fit."""
        walkers = self.walkers
        try:
            values = {"x": tensors["x"]}
            for name in FIELDS:
                values[name] = torch.tensor(position[name])
            conds = [(cond, name) for cond, name in position["conds"]]
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(DAMAGED) from None
        fits = len(conds) == len(walkers.n) and all(self.is_cond(cond) for cond, _ in conds)
        for name, value in values.items():
            like = getattr(walkers, name)
            fits = fits and value.shape == like.shape and value.dtype == like.dtype
        n = values["n"]
        if not fits or n.min() < 0 or n.max() > len(walkers.grid) - 2:
            raise ValueError(DAMAGED)
        for name, value in values.items():
            getattr(walkers, name).copy_(value)
        walkers.conds = conds

    @property
    def bad(self) -> int:
        return 0 if self.prompts is None else self.prompts.bad

    @property
    def left_out(self) -> dict[str, int]:
        return {} if self.prompts is None else self.prompts.left_out


def prompts_place(position: dict) -> dict:
    """The prompts' place in a PathLoader's position; ValueError if it has none."""
    place = position.get("prompts") if isinstance(position, dict) else None
    if place is None:
        raise ValueError(DAMAGED)
    return place
