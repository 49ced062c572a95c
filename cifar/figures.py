"""The pictures of the CIFAR-10 experiment, named after the paper's figures that they mirror."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cifar.data import CLASSES
from cifar.evaluate import Evaluation, make_case
from common.compare import (
    COLOURS,
    GAMMAS,
    NAMES,
    W_ADDED,
    W_HIGH,
    Case,
    compared_steps,
    curve_panel,
    legend,
    log_limits,
)
from common.plots import GREY, INK, Figure

SIDE = 46  # of a picture that is 32 pixels wide, and of the gap after it


def draw_all(output: Path, evaluation: Evaluation) -> None:
    samples(output / "samples.png", evaluation)
    curves(output / "curves.png", evaluation)
    # A picture of an earlier run must not stay where this run has nothing for it.
    for name in ("guidance", "clipping", "schedules"):
        (output / f"{name}.png").unlink(missing_ok=True)
    if "tdd" in evaluation.methods:
        guidance(output / "guidance.png", evaluation)
        clipping(output / "clipping.png", evaluation)
        schedules(output / "schedules.png", evaluation)


# ------------------------------------------------------------------------------------------ sheets
#
# A sheet is rows of panels, a panel columns of pictures. Row i of every panel on a sheet is of one
# class and from one noise: panels differ in the method alone.


class Column(NamedTuple):
    """Pictures of one case below each other, one of each class."""

    heading: str
    method: str
    case: Case


Panel = tuple[str, list[Column]]  # a title and columns


def sheet(
    path: Path, title: str, panels: list[Panel], panels_a_row: int, evaluation: Evaluation
) -> None:
    """Panels of ten classes, with classifier accuracy and distance to the data over each column.

    Columns without samples in this run are left out, and so are panels without columns.
    """
    note = "over each column: classifier accuracy; Frechet distance to the data"
    available = []
    for name, columns in panels:
        columns = [c for c in columns if (c.method, c.case) in evaluation.samples]
        if columns:
            available.append((name, columns))
    panel_width = max(len(columns) for _, columns in available) * SIDE + 30
    panel_height = len(CLASSES) * SIDE + 110
    panels_a_row = min(panels_a_row, len(available))
    width = max(24 + panels_a_row * panel_width, 30 + 10 * max(len(title), len(note)))
    figure = Figure(width, 90 + panel_height * math.ceil(len(available) / panels_a_row))
    figure.text(24, 28, title, 20)
    figure.text(24, 54, note, 15, GREY)
    for i, (name, columns) in enumerate(available):
        left = 24 + i % panels_a_row * panel_width
        top = 90 + i // panels_a_row * panel_height
        figure.text(left, top, name, 17, COLOURS.get(columns[0].method, INK))
        for j, column in enumerate(columns):
            _draw_column(figure, left + j * SIDE, top, column, evaluation)
    figure.save(path)


def _draw_column(figure: Figure, x: float, top: float, column: Column, evaluation) -> None:
    row = evaluation.find(column.method, column.case)
    accuracy, distance = row["accuracy"]["value"], row["frechet_data"]["value"]
    for line, text in enumerate((column.heading, f"{accuracy:.0%}", f"{distance:.3g}")):
        figure.text(x + SIDE / 2, top + 24 + 16 * line, text, 13, GREY, "mm")
    pictures = evaluation.samples[column.method, column.case].permute(0, 2, 3, 1).numpy()
    for y, picture in enumerate(pictures):
        figure.paste(picture, x, top + 66 + y * SIDE, SIDE - 2, SIDE - 2)


def _teacher_column(k: int, w: float) -> Column:
    return Column(f"k={k}", "teacher", make_case(k, w=w))


def samples(path: Path, evaluation: Evaluation) -> None:
    """Every method over k at gamma = 0, all from the same noise: after Fig. 4."""
    config = evaluation.config
    ks = compared_steps(config.kmin, config.kmax)
    many = (config.solver_steps // 2, config.solver_steps)
    panels = [("teacher, guided DDIM", [_teacher_column(k, config.w) for k in ks])]
    for method in evaluation.methods[1:]:
        panels.append((NAMES[method], [Column(f"k={k}", method, make_case(k)) for k in ks]))
    panels.append(("teacher, many steps", [_teacher_column(k, config.w) for k in many]))
    title = f"CIFAR-10 from the same noise: gamma = 0, guidance g = {config.guidance:g}"
    sheet(path, title, panels, 4, evaluation)


def guidance(path: Path, evaluation: Evaluation) -> None:
    """Guidance on top of what was distilled, and Eq. 13's way back: after Fig. 6."""
    config = evaluation.config
    k = config.kmin
    panels = []
    for method in ("tdd_rho0", "tdd"):
        columns = [Column(f"g={1 + w:g}", method, make_case(k, w=w)) for w in (0.0, *W_ADDED)]
        panels.append((f"{NAMES[method]}, guided", columns))
    tuned = [Column("as it is", "tdd_high", make_case(k))]
    for w in W_ADDED:
        tuned.append(Column(f"as g={1 + w:g}", "tdd_high", make_case(k, w=w, tune=W_HIGH)))
    panels.append((f"{NAMES['tdd_high']}, tuned", tuned))
    panels.append(("teacher", [_teacher_column(config.solver_steps, config.w)]))
    title = (
        f"Guidance at inference, distilled at w' = {config.w:g} or {W_HIGH:g}: {k} steps, gamma = 0"
    )
    sheet(path, title, panels, 4, evaluation)


def clipping(path: Path, evaluation: Evaluation) -> None:
    """C of Eq. 17 in no step, in the first and in all, at rising guidance: after Fig. 7."""
    k = evaluation.config.kmin
    panels = []
    for w in (0.0, *W_ADDED[:2]):
        columns = []
        for heading, clip_steps in (("no C", 0), ("first", 1), ("all", k)):
            columns.append(Column(heading, "tdd", make_case(k, clip_steps, w=w)))
        panels.append((f"TDD at g = {1 + w:g}", columns))
    title = f"x_0 clipped in no step, the first, all: {k} steps, gamma = 0"
    sheet(path, title, panels, 3, evaluation)


def schedules(path: Path, evaluation: Evaluation) -> None:
    """Equidistant beside non-equidistant timesteps: the paper's Ours and Ours*."""
    config = evaluation.config
    ks = range(config.kmin + 1, config.kmax)
    equidistant = [Column(f"k={k}", "tdd", make_case(k)) for k in ks]
    others = [Column(f"k={k}", "tdd", make_case(k, schedule="nonequidistant")) for k in ks]
    panels = [("TDD, equidistant", equidistant), ("TDD, non-equid.", others)]
    panels.append(("teacher", [_teacher_column(config.solver_steps, config.w)]))
    sheet(path, "Which timesteps, from the same noise: gamma = 0", panels, 3, evaluation)


# ------------------------------------------------------------------------------------ after Fig. 5
#
# The paper's claim is a curve that stays low over 4..8; single-target methods dip at their own k.


def curves(path: Path, evaluation: Evaluation) -> None:
    """Distance to the teacher's many-step samples over k: rmse, then Fréchet for each gamma."""
    config = evaluation.config
    figure = Figure(1560, 640)
    title = f"Distance to the teacher's {config.solver_steps}-step samples over the number of steps"
    figure.text(30, 30, title, 24)
    _curves(figure, 90, "rmse, gamma = 0", "rmse", 0.0, evaluation)
    for i, gamma in enumerate(GAMMAS):
        title = f"Frechet, gamma = {gamma:g}"
        _curves(figure, 540 + i * 450, title, "frechet_teacher", gamma, evaluation)
    legend(figure, evaluation.methods, (1425, 1450), 1458, 15)
    note = (
        f"{config.samples} pictures from the same noise; bands are standard errors; "
        "logarithmic scales"
    )
    figure.text(30, 615, note, 15, GREY)
    figure.save(path)


def _curves(figure: Figure, left: float, title: str, metric: str, gamma: float, evaluation) -> None:
    """A panel with every method's curve."""
    config = evaluation.config
    ks = compared_steps(config.kmin, config.kmax)
    curves = {}
    for method in evaluation.methods:
        points = []
        for k in ks:
            row = evaluation.find(method, make_case(k, gamma=gamma))
            # Only the teacher's own samples have a distance of zero, which has no logarithm.
            if row and row[metric]["value"] > 0:
                points.append((k, row[metric]["value"], row[metric]["error"]))
        if points:
            curves[method] = np.array(points).T
    if curves:
        limits = log_limits(np.concatenate([value for _, value, _ in curves.values()]))
        curve_panel(figure, (left, 100, 370, 440), title, "", ks, curves, limits, 15)
