"""Pictures of a student in training: a grid of its samples beside its teacher's."""

from pathlib import Path

import numpy as np
import torch

from common import files
from common.files import read_lines
from common.pictures import to_images
from common.plots import GREY, INK, Figure
from sdxl.load import SDXL
from sdxl.pipeline import conditions, null_of
from solvers import ddim
from tdd import equidistant, gamma_sample, guided, noise_stream
from training.distill import Distillation, Matching

PROMPTS = [
    "a red fox in the snow, photograph", "an old fisherman mending a net, oil painting",
    "a glass of water on a wooden table, morning light", "a city street at night in the rain",
]  # fmt: skip
TEACHER_STEPS = 25  # of the picture grids' right column


# Prompts and seeds are fixed, so that grids of one run can be compared; the teacher's never change.


def ends_of(args) -> list[int]:
    """The numbers of steps to look at: K_min and K_max, or TDM's K."""
    return sorted(set(args.ks or [args.kmin, args.kmax]))


class Pictures:
    """Grids of the student's samples in few steps, as it was trained for, beside the teacher's."""

    def __init__(self, args, model: SDXL, nets: Distillation | Matching, device):
        self.args, self.vae, self.nets, self.device = args, model.vae, nets, device
        own = args.sample_prompts
        self.prompts = PROMPTS if own is None else read_lines("--sample-prompts", own)
        cond, _ = conditions(model, self.prompts, None, args.resolution, args.resolution)
        # With a full cache the text encoders never left the CPU.
        self.cond = {name: tensor.to(device) for name, tensor in cond.items()}
        self.w, self.ends = sum(args.guidance_range or [args.guidance] * 2) / 2, ends_of(args)
        self.teacher = None

    def __call__(self, step: int) -> None:
        """samples/step-STEP.png: a row a prompt, a column a number of steps."""
        many = [*self.ends, TEACHER_STEPS]
        # Frozen as it is, it draws the same every time: once is enough.
        if self.teacher is None:
            self.teacher = [self.column(k, self.w, self.nets.teacher) for k in many]
        columns = [self.column(k, 0.0, *self.nets.sampler(k)) for k in self.ends] + self.teacher
        headers = [f"{k} steps" for k in self.ends] + [f"teacher, {k} steps" for k in many]
        title = f"After {step} steps of training; the teacher at g = {1 + self.w:g}"
        folder = files.output_folder(self.args.output / "samples")
        picture_table(folder / f"step-{step:06}.png", title, headers, self.prompts, columns)

    @torch.no_grad()
    def column(self, k: int, w: float, network, jump=ddim) -> list:
        """A picture of each prompt in k steps at gamma = 0, prompt i from seed + i."""
        seeds = range(self.args.seed, self.args.seed + len(self.prompts))
        side, pictures = self.args.resolution // 8, []
        # N = 8 is enough to distil for 8 steps; the teacher's many have a grid of their own.
        timesteps = equidistant(k, self.args.solver_steps if k in self.ends else 250)
        vae = self.vae.to(self.device)
        # One at a time: a batch would need memory that the training has left none of.
        for i, x_T in enumerate(next(noise_stream(seeds, (4, side, side), self.device))):
            c = {name: tensor[i : i + 1] for name, tensor in self.cond.items()}
            eps = guided(network, c, null_of(c), w)
            x_0 = gamma_sample(eps, x_T[None], timesteps, self.nets.schedule, jump=jump)
            pictures += to_images(vae.decode(x_0))
        # From a cache nothing is encoded any more, and the training can use the room.
        if self.args.cache is not None:
            vae.to("cpu")
        return pictures


def picture_table(path: Path, title: str, headers, prompts, columns) -> None:
    """Columns of pictures under headers, a prompt below each row."""
    side, row = 256, 290
    figure = Figure(20 + len(columns) * (side + 8), 80 + len(prompts) * row)
    figure.text(20, 24, title, 20)
    for x, (header, column) in enumerate(zip(headers, columns, strict=True)):
        left = 20 + x * (side + 8)
        figure.text(left + side / 2, 56, header, 16, INK, "mm")
        for y, picture in enumerate(column):
            figure.paste(np.asarray(picture), left, 72 + y * row, side, side)
    for y, prompt in enumerate(prompts):
        figure.text(20, 72 + y * row + side + 14, prompt[:150], 14, GREY)
    figure.save(path)
