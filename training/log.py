"""The log of a run: a line of JSON a step, a progress bar, and a picture of the loss."""

import contextlib
import json
import math
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import files
from common.plots import GREY, INK, Axes, Figure
from training import distributed

try:
    import resource
except ImportError:  # on Windows
    resource = None


def read_log(output: Path, step: int) -> list[dict]:
    """The steps' lines up to a step; what a killed run wrote after its checkpoint is cut off."""
    path = output / "log.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        # A kill may have cut off the last line in the middle.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            # Changes right after the checkpoint are of a run that came to no other.
            if line["step"] <= (step - 1 if "changes" in line else step):
                lines.append(line)
    if distributed.is_main():
        with files.atomic_write(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [line for line in lines if "loss" in line]


def write_line(output: Path, line: dict) -> None:
    """A line of the log: a step's, or what changed after it, or was left out up to it."""
    with open(output / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def draw_loss(path: Path, log: list[dict]) -> None:
    """The loss of every step, pale, and its running mean, on a logarithmic scale."""
    points = [(line["step"], line["loss"]) for line in log if line["loss"] and line["loss"] > 0]
    if len(points) < 2:
        return
    step, loss = np.array(points).T
    # A step's loss is noisy, and its scale spans decades: a running mean on a logarithmic axis.
    # Exponentially weighted over a fiftieth of the run.
    width = max(1, len(loss) // 50)
    smooth = list(accumulate(loss, lambda mean, value: mean + (value - mean) / width))
    figure = Figure(900, 500)
    low, high = loss.min() * 0.9, loss.max() * 1.1
    axes = Axes(figure, (90, 60, 770, 360), (step[0], step[-1]), (low, high), log_y=True)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    yticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low < m * 10.0**d < high]
    axes.frame("training loss", "step", "", np.linspace(step[0], step[-1], 6).round(), yticks)
    axes.line(step, loss, (*GREY, 90), 1)
    axes.line(step, smooth, INK, 2.5)
    figure.save(path)


def show_line(line: dict, bar: tqdm) -> None:
    """The step's line on the progress bar."""
    shown = {"loss": "loss", "norm": "grad_norm", "img/s": "images_per_s", "GiB": "memory_gib"}
    if line["bad"]:
        shown["bad"] = "bad"
    values = {name: math.nan if line[key] is None else line[key] for name, key in shown.items()}
    bar.update()
    bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})


def peak_memory_gib(device: torch.device | str) -> float:
    """The highest memory use so far in GiB: of this GPU, or of the process for other devices."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    # In bytes on a Mac, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
