"""The pictures of the CIFAR-10 experiment, named after the paper's figures that they mirror."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cifar.data import CLASSES
from cifar.evaluate import TOLD_WRONG, Evaluation, make_case, told_steps
from common import compare
from common.compare import BEYOND, GAMMAS, PATH, W_ADDED, W_HIGH, colour_of, title_of
from common.plots import GREY, INK, Figure

# What stands beside those of BEYOND in their picture.
BESIDE = ("teacher", "cm", "pcm4", "tdd_eta0", "tdd")
SIDE = 46  # of a picture that is 32 pixels wide, and of the gap after it


def draw_all(output: Path, evaluation: Evaluation) -> None:
    """Every picture that this run has the methods for; none of an earlier run stays without."""
    is_beyond = {name: name in BEYOND or name.endswith(PATH) for name in evaluation.methods}
    main = [name for name in evaluation.methods if not is_beyond[name]]
    curves(output / "curves.png", evaluation, main, "the methods of the papers")
    beyond = [name for name in evaluation.methods if is_beyond[name] or name in BESIDE]
    path = output / "beyond_curves.png"
    path.unlink(missing_ok=True)
    if any(is_beyond.values()):
        curves(path, evaluation, beyond, "beyond the papers")
    path = output / "told.png"
    path.unlink(missing_ok=True)
    told = {name: told_steps(evaluation.config, name) for name in TOLD_WRONG}
    if told := {name: Ks for name, Ks in told.items() if Ks and name in evaluation.methods}:
        told_k(path, evaluation, told)
    for name, title, panels in sheets(evaluation):
        path = output / f"{name}.png"
        path.unlink(missing_ok=True)
        if name == "samples" or "tdd" in evaluation.methods:
            draw_sheet(path, title, panels, evaluation)


# ------------------------------------------------------------------------------------------ sheets
#
# A sheet is rows of panels, a panel columns of pictures. Row i of every panel on a sheet is of one
# class and from one noise: panels differ in the method alone.


class Column(NamedTuple):
    """Pictures of one case below each other, one of each class."""

    heading: str
    method: str
    case: compare.Case


Panel = tuple[str, list[Column]]  # a title and columns


def draw_sheet(path: Path, title: str, panels: list[Panel], evaluation: Evaluation) -> None:
    """Panels of ten classes, with classifier accuracy and distance to the data over each column."""
    note = "over each column: classifier accuracy; Frechet distance to the data"
    # Columns without samples in this run are left out, and so are panels without columns.
    available = []
    for name, columns in panels:
        columns = [c for c in columns if (c.method, c.case) in evaluation.samples]
        if columns:
            available.append((name, columns))
    panel_width = max(len(columns) for _, columns in available) * SIDE + 30
    panel_height = len(CLASSES) * SIDE + 110
    panels_a_row = min(4, len(available))
    width = max(24 + panels_a_row * panel_width, 30 + 10 * max(len(title), len(note)))
    figure = Figure(width, 90 + panel_height * math.ceil(len(available) / panels_a_row))
    figure.text(24, 28, title, 20)
    figure.text(24, 54, note, 15, GREY)
    for i, (name, columns) in enumerate(available):
        row, place = divmod(i, panels_a_row)
        left, top = 24 + place * panel_width, 90 + row * panel_height
        figure.text(left, top, name, 17, colour_of(columns[0].method))
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


def _over_k(method: str, ks, w=0.0, schedule="equidistant") -> list[Column]:
    """A column for each number of steps."""
    return [Column(f"k={k}", method, make_case(k, w=w, schedule=schedule)) for k in ks]


def sheets(evaluation: Evaluation) -> list[tuple[str, str, list[Panel]]]:
    """Name, title and panels of every sheet."""
    config, k, w_distilled = evaluation.config, evaluation.config.kmin, evaluation.config.w
    ks, many = evaluation.ks, [config.solver_steps // 2, config.solver_steps]
    teacher = ("teacher", _over_k("teacher", many[1:], w_distilled))
    # After Fig. 4: every method over k, between the teacher in as few steps and in many.
    samples = [("teacher, guided DDIM", _over_k("teacher", ks, w_distilled))]
    samples += [(title_of(method), _over_k(method, ks)) for method in evaluation.methods[1:]]
    samples.append(("teacher, many steps", _over_k("teacher", many, w_distilled)))
    # After Fig. 6: guidance on top of what was distilled, and Eq. 13's way back.
    guidance = []
    for method in ("tdd_rho0", "tdd"):
        columns = [Column(f"g={1 + w:g}", method, make_case(k, w=w)) for w in (0.0, *W_ADDED)]
        guidance.append((f"{title_of(method)}, guided", columns))
    tuned = [Column("as it is", "tdd_high", make_case(k))]
    for w in W_ADDED:
        tuned.append(Column(f"as g={1 + w:g}", "tdd_high", make_case(k, w=w, tune=W_HIGH)))
    guidance += [(f"{title_of('tdd_high')}, tuned", tuned), teacher]
    # After Fig. 7: C of Eq. 17 in no step, in the first and in all, at rising guidance.
    clipping, clip_steps = [], {"no C": 0, "first": 1, "all": k}
    for w in (0.0, *W_ADDED[:2]):
        columns = [Column(name, "tdd", make_case(k, n, w=w)) for name, n in clip_steps.items()]
        clipping.append((f"TDD at g = {1 + w:g}", columns))
    # The paper's Ours and Ours*.
    between = range(k + 1, config.kmax)
    others = ("TDD, non-equid.", _over_k("tdd", between, schedule="nonequidistant"))
    schedules = [("TDD, equidistant", _over_k("tdd", between)), others, teacher]
    distilled = f"distilled at w' = {w_distilled:g} or {W_HIGH:g}"
    return [
        ("samples", f"CIFAR-10 from the same noise: gamma = 0, guidance g = {config.guidance:g}",
         samples),
        ("guidance", f"Guidance at inference, {distilled}: {k} steps, gamma = 0", guidance),
        ("clipping", f"x_0 clipped in no step, the first, all: {k} steps, gamma = 0", clipping),
        ("schedules", "Which timesteps, from the same noise: gamma = 0", schedules),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ after Fig. 5
#
# The paper's claim is a curve that stays low over 4..8; single-target methods dip at their own k.


def curves(path: Path, evaluation: Evaluation, methods: list[str], title: str) -> None:
    """Distance to the teacher's many-step samples over k: rmse, then Fréchet for each gamma."""
    config, figure = evaluation.config, Figure(1620, 640)
    distance = f"distance to the teacher's {config.solver_steps}-step samples"
    figure.text(30, 30, f"CIFAR-10, {title}: {distance} over the number of steps", 24)
    panels = [("rmse", "rmse", 0.0), *(("Frechet", "frechet_teacher", gamma) for gamma in GAMMAS)]
    for i, (name, metric, gamma) in enumerate(panels):
        box, panel_title = (90 + i * 450, 100, 370, 440), f"{name}, gamma = {gamma:g}"
        _curves(figure, box, panel_title, metric, gamma, evaluation, methods)
    compare.legend(figure, methods, (1425, 1450), 1458, 15)
    note = "pictures from the same noise; logarithmic scales; bands are standard errors"
    if several := [title_of(name) for name in methods if len(evaluation.trainings(name)) > 1]:
        note += f", of {' and '.join(several)} deviations over trainings at gamma = 0"
    figure.text(30, 615, f"{config.samples} {note}", 15, GREY)
    figure.save(path)


def _curves(
    figure: Figure, box, title: str, metric: str, gamma: float, evaluation, methods: list[str]
) -> None:
    """A panel with every method's curve: the mean of its trainings, if it has several."""
    curves = {}
    for method in methods:
        points = []
        for k in evaluation.ks:
            mean, error = evaluation.figure(method, metric, make_case(k, gamma=gamma))
            # Only the teacher's own samples have a distance of zero, which has no logarithm.
            if mean > 0:
                points.append((k, mean, error))
        if points:
            curves[method] = np.array(points).T
    if curves:
        limits = compare.log_limits(np.concatenate([value for _, value, _ in curves.values()]))
        compare.curve_panel(figure, box, title, "", evaluation.ks, curves, limits, 15)


# ------------------------------------------------------------------------- after TDM's Fig. 10


def told_k(path: Path, evaluation: Evaluation, told: dict[str, list[int]]) -> None:
    """rmse of students in k steps (down) that are told K (across); told: their K by name.

    Of several trainings the first: the others have not all of these cases.
    """
    cell, left = 84, 40
    width = sum(100 + cell * len(Ks) for Ks in told.values())
    figure = Figure(max(width + 40, 900), 190 + cell * max(map(len, told.values())))
    many = evaluation.config.solver_steps
    figure.text(30, 30, f"rmse to the teacher's {many}-step samples: k steps, told K", 24)
    for name, Ks in told.items():
        figure.text(left + 40, 76, title_of(name), 18, colour_of(name))
        for x, K in enumerate(Ks):
            figure.text(left + 40 + cell * (x + 0.5), 106, f"K = {K}", 15, GREY, "mm")
        for y, k in enumerate(Ks):
            top = 124 + cell * y
            figure.text(left - 12, top + cell / 2, f"k = {k}", 15, GREY, "lm")
            values = [evaluation.find(name, _told_case(k, K))["rmse"]["value"] for K in Ks]
            for x, value in enumerate(values):
                # White is this row's best, and the darkest half as much again.
                share = 0.5 * min(2 * (value / min(values) - 1), 1)
                shade = tuple(round(255 + share * (c - 255)) for c in colour_of(name))
                x_0, y_0 = left + 40 + cell * x, top
                x_1, y_1 = x_0 + cell - 4, top + cell - 4
                figure.polygon([(x_0, y_0), (x_1, y_0), (x_1, y_1), (x_0, y_1)], shade)
                figure.text((x_0 + x_1) / 2, (y_0 + y_1) / 2, f"{value:.3f}", 16, INK, "mm")
        left += 100 + cell * len(Ks)
    note = "white: the best of a row; the darkest: half as much again, or more"
    figure.text(30, figure.size[1] - 24, note, 15, GREY)
    figure.save(path)


def _told_case(k: int, K: int) -> compare.Case:
    return make_case(k, tell_k=None if k == K else K)
