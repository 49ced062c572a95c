"""Pictures of a student in training: a grid of its samples beside its teacher's."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import files
from common.pictures import to_images
from common.plots import GREY, INK, Figure
from sdxl.load import SDXL
from sdxl.pipeline import make_conditions, null_condition
from solvers import SOLVERS, noise_stream
from tdd import equidistant, gamma_sample, guided
from training.distill import TDDStep, TDMStep

PROMPTS = [
    "a red fox in the snow, photograph", "an old fisherman mending a net, oil painting",
    "a glass of water on a wooden table, morning light", "a city street at night in the rain",
]  # fmt: skip
TEACHER_STEPS = 25  # of the grid's last column, at the quality that the teacher is used for
MAX_PROMPTS = 32  # a row each, sampled one at a time while training waits


def read_prompts(path: Path | None) -> list[str] | None:
    """The lines of --sample-prompts, if it is given; ValueError for none or too many of them."""
    if path is None:
        return None
    prompts = files.read_lines("--sample-prompts", path)
    if len(prompts) > MAX_PROMPTS:
        count = f"{len(prompts)} prompts, and a grid has a row for each"
        raise ValueError(f"--sample-prompts {path} holds {count}: keep at most {MAX_PROMPTS}")
    return prompts


@dataclass(frozen=True)
class PreviewConfig:
    """What a grid shows, and where it goes: output/samples.

    steps: numbers of steps, a column each. w: the teacher's guidance. solver_steps: N, of which the
    student's timesteps are multiples. offload_vae: keep the VAE on the CPU between grids, for
    runs that encode nothing.
    """

    output: Path
    resolution: int
    steps: list[int]
    w: float
    solver_steps: int = 250
    seed: int = 0
    prompts: list[str] | None = None
    offload_vae: bool = False


class Pictures:
    """Grids of the student's samples in few steps, as it is trained for, beside the teacher's.

    Prompts and seeds are fixed, so the grids of a run can be compared.
    """

    def __init__(self, config: PreviewConfig, model: SDXL, training_step, device):
        self.config, self.vae, self.device = config, model.vae, device
        self.training_step: TDDStep | TDMStep = training_step
        self.prompts = config.prompts or PROMPTS
        cond, _ = make_conditions(model, self.prompts, None, config.resolution, config.resolution)
        # With a full cache the text encoders never left the CPU.
        self.cond = {name: tensor.to(device) for name, tensor in cond.items()}
        self.teacher_columns = None

    def __call__(self, step: int) -> None:
        """samples/step-STEP.png: a row for each prompt, a column for each number of steps."""
        teacher_steps = [*self.config.steps, TEACHER_STEPS]
        # The teacher is frozen and draws the same every time: once is enough.
        if self.teacher_columns is None:
            teacher, w = self.training_step.teacher, self.config.w
            self.teacher_columns = [self.column(k, w, teacher) for k in teacher_steps]
        columns = [self.column(k, 0.0, *self.training_step.sampler(k)) for k in self.config.steps]
        columns += self.teacher_columns
        headers = [f"{k} steps" for k in self.config.steps]
        headers += [f"teacher, {k} steps" for k in teacher_steps]
        title = f"After {step} steps of training; the teacher at g = {1 + self.config.w:g}"
        folder = files.output_folder(self.config.output / "samples")
        picture_table(folder / f"step-{step:06}.png", title, headers, self.prompts, columns)

    @torch.no_grad()
    def column(self, k: int, w: float, network, make_jump=SOLVERS["ddim"]) -> list:
        """A picture of each prompt in k steps at gamma = 0, prompt i from seed + i.

        make_jump() returns what `gamma_sample` takes as jump, anew for each picture: a multistep
        solver remembers the step before.
        """
        config, side = self.config, self.config.resolution // 8
        seeds = range(config.seed, config.seed + len(self.prompts))
        # N may be as small as 8, for 8 steps; the teacher's 25 need a finer grid.
        timesteps = equidistant(k, config.solver_steps if k in config.steps else 250)
        vae = self.vae.to(self.device)
        pictures = []
        # One at a time: the training has left no memory for a batch.
        for i, x_T in enumerate(next(noise_stream(seeds, (4, side, side), self.device))):
            cond = {name: tensor[i : i + 1] for name, tensor in self.cond.items()}
            eps = guided(network, cond, null_condition(cond), w)
            schedule, jump = self.training_step.schedule, make_jump()
            x_0 = gamma_sample(eps, x_T[None], timesteps, schedule, jump=jump)
            pictures += to_images(vae.decode(x_0))
        if config.offload_vae:
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
