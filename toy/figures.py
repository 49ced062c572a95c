"""The pictures of the 2-D experiment, named after the paper's figures that they mirror."""

from collections import Counter
from collections.abc import Iterable
from copy import copy
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from common import compare, files
from common.compare import COLOURS, GAMMAS, W_ADDED, W_HIGH, Case, colour_of, title_of
from common.plots import CLASS_COLOURS, FAINT, GREY, INK, Axes, Figure
from solvers import CLEAN
from tdd import guided, sample_step
from toy.evaluate import SWEEP_GAMMAS, SWEPT, Evaluation, more_steps
from toy.students import Group, Student

# The methods of the two sibling papers have pictures of their own, beside TCD and TDD.
FAMILY = ("tcd2", "tcds", "tdd2", "tdds", "tdm4", "tdm_unify")
LIMITS = (-2.6, 2.6)  # of both axes of a cloud of points
PICTURES = (
    "targets.png", "samples.png", "curves.png", "efficiency.png", "sweep.png", "family.png",
    "family_curves.png", "trajectories.png", "paths.gif", "guidance.png",
)  # fmt: skip


def draw_all(output: Path, ev: Evaluation, groups: list[Group]) -> None:
    """Every picture that this run has the methods for."""
    main = [method for method in ev.methods if method not in FAMILY]
    samples(output / "samples.png", ev, main)
    curves(output / "curves.png", ev, main)
    trained = {method for method, *_ in ev.efficiency}
    if not trained.isdisjoint(main):
        efficiency(output / "efficiency.png", ev, [m for m in main if m in trained])
    swept = [method for method in ev.methods if method in SWEPT]
    if swept:
        sweep(output / "sweep.png", ev, swept)
    if len(main) < len(ev.methods):
        family = [m for m in ev.methods if m in ("teacher", "tcd", "tdd", *FAMILY)]
        samples(output / "family.png", ev, family)
        curves(output / "family_curves.png", ev, family)
    # The first group that has any: the guidance study's students stand first in some.
    main_group = next(
        (g for g in groups if any(g.students[i].method in main for i in g.plain)), None
    )
    if main_group:
        exact, students = teacher_paths(ev), {}
        for i in main_group.plain:
            method = main_group.students[i].method
            students[method] = student_paths(ev, main_group.select([i]))
        trajectories(output / "trajectories.png", ev, exact, students)
        moving_paths(output / "paths.gif", ev, exact, students)
    if parts := _guidance_parts(ev):
        guidance(output / "guidance.png", ev, parts)


# Panels of samples are what samples.png and guidance.png are made of: rows of clouds, words below.
SIDE, LEFT = 168, 190  # of a panel of samples, and the width of the words before a row of them


def _panels(figure: Figure, top: float, headers, rows, label: Tensor) -> float:
    """Rows (name, note, method, cells) of panels (x (n, 2), words); returns where they end."""
    for column, header in enumerate(headers):
        figure.text(LEFT + column * (SIDE + 8) + SIDE / 2, top + 10, header, 18, INK, "mm")
    top += 28
    for name, note, method, cells in rows:
        figure.text(20, top + SIDE / 2 - 12, name, 20, COLOURS.get(method, GREY))
        figure.text(20, top + SIDE / 2 + 13, note, 15, GREY)
        for column, (x, words) in enumerate(cells):
            box = LEFT + column * (SIDE + 8), top, SIDE, SIDE
            Axes(figure, box, LIMITS, LIMITS).density(x.numpy(), label.numpy())
            figure.text(box[0] + SIDE / 2, top + SIDE + 11, words, 15, GREY, "mm")
        top += SIDE + 30
    return top


def _cells(ev: Evaluation, method: str, cases, variant="", metric="rmse"):
    """The samples of each case in seed 0, and their distance in words."""
    cells = []
    for case in cases:
        error = ev.find(method, case, metric, variant)["per_seed"][0]
        cells.append((ev.samples[method, variant, case][0], f"rmse {error:.2f}"))
    return cells


# ------------------------------------------------------------------- samples.png, after Fig. 4
#
# Every panel starts from the same noise, so a good one looks like the last column, point for point.


def samples(path: Path, ev: Evaluation, methods: list[str]) -> None:
    """Methods by number of steps at gamma = 0, all from the same noise, seed 0."""
    config = ev.config
    ks = sorted({1, 2, config.kmin, (config.kmin + config.kmax) // 2, config.kmax})
    figure = Figure(LEFT + (SIDE + 8) * (len(ks) + 1) + 12, 100 + (SIDE + 30) * len(methods))
    setting = f"{config.data}, gamma = 0, guidance g = {1 + config.w:g}"
    figure.text(20, 28, f"From the same noise: {setting}", 24)
    headers = [f"{k} step" if k == 1 else f"{k} steps" for k in ks] + ["teacher's ODE"]
    exact = ev.reference(Case(1), 0.0, config.w)[0], "many steps"
    # Guided, the teacher needs two passes a step; students need one.
    notes = {"teacher": "guided DDIM"} | dict.fromkeys(("tcd2", "tdd2"), "two passes a step")
    rows = []
    for method in methods:
        cells = [*_cells(ev, method, map(Case, ks)), exact]
        rows.append((title_of(method), notes.get(method, ""), method, cells))
    _panels(figure, 60, headers, rows, ev.label)
    figure.save(path)


# -------------------------------------------------------------------- curves.png, after Fig. 5
#
# Single-target methods dip at their own k; what TDD claims is a curve that stays low over 4..8.


def curves(path: Path, ev: Evaluation, methods: list[str]) -> None:
    """Distance to the reference over the number of steps, for each gamma; bands are seeds."""
    ks = compare.compared_steps(ev.config.kmin, ev.config.kmax)
    figure = Figure(1240, 640)
    figure.text(30, 30, "Distance to the teacher's exact sampler over the number of steps", 24)
    rows = [row for row in ev.rows.values() if row["method"] in methods and not row["variant"]]
    limits = compare.log_limits([row["mean"] for row in rows if row["metric"] == "rmse"])
    for i, gamma in enumerate(GAMMAS):
        panel = {}
        for method in methods:
            panel[method] = ks, *_mean_and_std([ev.find(method, Case(k, gamma)) for k in ks])
        # The first panel alone names the y axis; both share it.
        box, ylabel = (100 + i * 500, 100, 440, 440), "" if i else "rmse (log scale)"
        title = f"gamma = {gamma:g}"
        axes = compare.curve_panel(figure, box, title, ylabel, ks, panel, limits, 16)
        rows = [ev.find("tdd", Case(k, gamma, "nonequidistant")) for k in ks]
        between = [row for row in rows if row]  # TDD on the other schedule
        for row in between:
            figure.dot(*axes.place(row["k"], row["mean"]), COLOURS["tdd"], 5, hollow=True)
    compare.legend(figure, methods, (1075, 1105), 1115, 17)
    if between:
        y = 130 + 34 * len(methods)
        figure.dot(1090, y, COLOURS["tdd"], 5, hollow=True)
        figure.text(1115, y, "TDD, non-eq.", 17, COLOURS["tdd"])
    note = f"mean and deviation over {ev.config.seeds} teachers; same noise for all"
    figure.text(30, 615, f"{ev.config.data}; {note}", 15, GREY)
    figure.save(path)


# --------------------------------------------------------------------------- efficiency.png


def efficiency(path: Path, ev: Evaluation, methods: list[str]) -> None:
    """Distance over the steps of one training, which the abstract's first claim is about."""
    figure, ks = Figure(1240, 640), ev.config.ends
    figure.text(30, 30, "Distance over the training: rmse at gamma = 0 after so many steps", 24)
    steps = sorted({steps for method, _, steps in ev.efficiency if method in methods})
    limits = compare.log_limits([row["mean"] for row in ev.efficiency.values()])
    for i, k in enumerate(ks):
        panel = {}
        for method in methods:
            # What walkers cost may leave a short training without an early snapshot.
            rows = {n: row for n in steps if (row := ev.efficiency.get((method, k, n)))}
            panel[method] = [*rows], *_mean_and_std(rows.values())
        box, ylabel = (100 + i * 500, 100, 440, 440), "" if i else "rmse (log scale)"
        title, xlabel = f"{k} steps of sampling", "steps of training (log scale)"
        compare.curve_panel(
            figure, box, title, ylabel, steps, panel, limits, 16, xlabel, log_x=True
        )
    compare.legend(figure, methods, (1075, 1105), 1115, 17)
    figure.save(path)


def _mean_and_std(rows: Iterable[dict]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([row[field] for row in rows]) for field in ("mean", "std"))


# ------------------------------------------------------------ sweep.png, after TCD's Figs. 3 to 8


def sweep(path: Path, ev: Evaluation, methods: list[str]) -> None:
    """More steps than students are trained for, and gamma from 0 to 1."""
    config, figure = ev.config, Figure(1740, 640)
    figure.text(30, 30, "Beyond training: more steps at gamma = 0, and gamma from 0 to 1", 24)
    ks = [*range(config.kmin, config.kmax + 1), *more_steps(config)]
    gammas = [*GAMMAS, *SWEEP_GAMMAS]
    panels = [("gamma = 0", ks, "steps k", [Case(k) for k in ks])]
    for k in config.ends:
        panels.append((f"k = {k}", gammas, "gamma", [Case(k, gamma) for gamma in gammas]))
    curves = []
    for _, x, _, cases in panels:
        panel = {m: (x, *_mean_and_std([ev.find(m, case) for case in cases])) for m in methods}
        curves.append(panel)
    limits = compare.log_limits(
        [v for panel in curves for _, mean, _ in panel.values() for v in mean]
    )
    for i, ((title, x, xlabel, _), panel) in enumerate(zip(panels, curves, strict=True)):
        box, ylabel = (100 + i * 500, 100, 440, 440), "" if i else "rmse (log scale)"
        compare.curve_panel(figure, box, title, ylabel, x, panel, limits, 16, xlabel)
    compare.legend(figure, methods, (1575, 1605), 1615, 17)
    figure.save(path)


# ------------------------------------------------------------------- targets.png, after Fig. 2
#
# Drawn by `sample_step`, the very function that training calls, and not from a picture of the idea.


def targets(path: Path, students: list[Student]) -> None:
    """Which targets tau~ (up) each method trains from each start t (right): 20,000 samples."""
    # A method's variants all have its targets and its eta.
    main = {s.method: s for s in students if s.method not in ("tdd_rho0", *FAMILY)}
    if not main:
        return
    side, columns = 300, min(3, len(main))
    width, height = 20 + columns * (side + 100), 80 + (side + 95) * -(-len(main) // columns)
    figure = Figure(max(800, width), height)
    figure.text(30, 30, "Targets tau that each method trains from each start t (Eqs. 4, 7, 8)", 24)
    ticks = range(0, 1001, 250)
    for i, (name, student) in enumerate(main.items()):
        box = 90 + (i % columns) * (side + 100), 100 + (i // columns) * (side + 95), side, side
        axes = Axes(figure, box, (0, 1000), (0, 1000))
        axes.frame(title_of(name), "start t", "target tau", ticks, ticks, 15)
        axes.line([0, 1000], [0, 1000], FAINT, 2)
        generator = torch.Generator().manual_seed(0)
        sample = sample_step(student.targets, (20_000, 1), student.eta, 0.0, generator)
        counts = Counter(zip(sample.t_next.tolist(), sample.tau.tolist(), strict=True))
        for (start, tau), count in counts.items():
            shade = 60 + 195 * count / max(counts.values())  # the likelier, the darker
            figure.dot(*axes.place(start, tau), (*colour_of(name), round(shade)), 2.2)
    figure.save(path)


# --------------------------------------------------------------------------- trajectories.png
#
# A jump is exact when its dot lies on the grey path; the last dots are the samples.

SHOWN = 300  # samples whose paths are shown


def teacher_paths(ev: Evaluation) -> Tensor:
    """The teacher's guided PF-ODE from noise to data in many stops; (SHOWN, stops, 2), seed 0."""
    rows = SHOWN * ev.config.seeds
    cond, stops = ev.cond(1)[:rows], [next(ev.noise(1))[:rows]]
    eps = guided(ev.teacher, cond, torch.zeros_like(cond), ev.config.w)
    with torch.no_grad():
        ev.follow(eps, stops[0], ev.schedule.T - 1, CLEAN, callback=lambda s, x: stops.append(x))
    return rearrange(stops, "stop (n s) d -> s n stop d", s=ev.config.seeds)[0]


def student_paths(ev: Evaluation, network, w: float = 0.0) -> Tensor:
    """kmin deterministic steps of a network from the same noise; (n, kmin + 1, 2), seed 0."""
    stops = [next(ev.noise(1))]
    ev.sample(network, Case(ev.config.kmin), w, callback=lambda s, x: stops.append(x))
    return rearrange(stops, "stop (n s) d -> s n stop d", s=ev.config.seeds)[0]


def rows_inside(exact: Tensor, n: int, bound: float = 2.5) -> list[int]:
    """The first n samples whose path lies in the square [-bound, bound]."""
    return [j for j in range(len(exact)) if exact[j].abs().max() < bound][:n]


def trajectories(path: Path, ev: Evaluation, exact: Tensor, students: dict[str, Tensor]) -> None:
    """Twelve samples of seed 0 on their way from noise to data, over the teacher's own paths."""
    side, columns = 380, 3
    figure = Figure(40 + columns * (side + 20), 80 + (side + 60) * -(-len(students) // columns))
    title = "From noise (hollow) to data in {} steps, over the teacher's paths (grey)"
    figure.text(30, 30, title.format(ev.config.kmin), 24)
    inside = rows_inside(exact, 12)
    for i, (method, paths) in enumerate(students.items()):
        box = 30 + (i % columns) * (side + 20), 100 + (i // columns) * (side + 60), side, side
        axes = Axes(figure, box, LIMITS, LIMITS)
        axes.frame(title_of(method))
        for j in inside:
            axes.line(*exact[j].T.tolist(), GREY, 1.2)
            axes.line(*paths[j].T.tolist(), colour_of(method), 2, dots=3)
            figure.dot(*axes.place(*paths[j, 0].tolist()), GREY, 4, hollow=True)
    figure.save(path)


# ----------------------------------------------------------------------------------- paths.gif
#
# All methods start from the same noise and move at the same pace, from stop to stop in straight
# lines. Grey lines are paths of the teacher in many steps, grey dots its samples.

MOVES = 12  # frames from stop to stop
MOVE_MS, STOP_MS, NOISE_MS, DATA_MS = 50, 400, 800, 2500  # how long a frame is shown
PALE = (196, 200, 208)


def moving_paths(path: Path, ev: Evaluation, exact: Tensor, students: dict[str, Tensor]) -> None:
    """Samples of teacher and students on their way from noise to data, as an animated GIF."""
    paths = {"teacher": student_paths(ev, ev.teacher, ev.config.w)}
    paths |= {m: students[m] for m in ("cm", "pcm4", "tcd", "tdd") if m in students}
    if len(paths) == 1:
        return
    # Everything that stands still is drawn once.
    side = 190
    background, panels = Figure(10 + len(paths) * (side + 8), 274), {}
    for i, method in enumerate(paths):
        left = 9 + i * (side + 8)
        name = "teacher, DDIM" if method == "teacher" else title_of(method)
        background.text(left + side / 2, 22, name, 20, colour_of(method), "mm")
        axes = Axes(background, (left, 42, side, side), (-2.9, 2.9), (-2.9, 2.9))
        for j in rows_inside(exact, 40, axes.xlim[1]):
            axes.line(*exact[j].T.tolist(), PALE, 1)
        _dots(background, axes, exact[:, -1], [PALE] * len(exact))
        panels[method] = axes
    background.text(left + side, 254, "grey: the teacher in many steps", 16, GREY, "rm")
    colours = [CLASS_COLOURS[c] for c in ev.label[:SHOWN].tolist()]
    steps, frames = ev.config.kmin, []
    for i in range(steps * MOVES + 1):
        step, move = divmod(i, MOVES)
        share = (move / MOVES) ** 2 * (3 - 2 * move / MOVES)  # slow at both ends
        frame = copy(background)
        frame.image = background.image.copy()
        frame.pen = ImageDraw.Draw(frame.image)
        later = -(-i // MOVES)  # the stop that this frame moves to, or stands at
        frame.text(9, 254, f"step {later} of {steps}" if i else "noise", 20)
        for method, axes in panels.items():
            x = torch.lerp(paths[method][:SHOWN, step], paths[method][:SHOWN, later], share)
            _dots(frame, axes, x, colours)
        frames.append(frame.image.reduce(frame.SCALE))
    durations = ([STOP_MS] + [MOVE_MS] * (MOVES - 1)) * steps + [DATA_MS]
    durations[0] = NOISE_MS
    # One palette for all: frames then differ only where something moves. The last frame has every
    # colour, and MAXCOVERAGE keeps its white white.
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with files.atomic_write(path) as part:
        first.save(part, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def _dots(figure: Figure, axes: Axes, x: Tensor, colours: list) -> None:
    """Points (n, 2); a point outside of the axes is left out."""
    for point, colour in zip(x.tolist(), colours, strict=True):
        if max(map(abs, point)) < axes.xlim[1]:
            figure.dot(*axes.place(*point), colour, 2.3)


# ----------------------------------------------------------- guidance.png, after Figs. 6 and 7
#
# The first part is measured against exact jumps (is the student's null branch right?), the second
# against the teacher's own ODE at the wanted w (does Eq. 13 bring the student back to it?).


def guidance(path: Path, ev: Evaluation, parts: list[tuple]) -> None:
    """Guiding students at inference: with and without null conditions, tuned down, and clipped."""
    k = ev.config.kmin
    height = sum(90 + (SIDE + 30) * len(rows) for _, _, rows in parts)
    figure, top = Figure(LEFT + (SIDE + 8) * 4 + 12, 60 + height), 60
    figure.text(20, 28, f"Guidance at inference: {ev.config.data}, {k} steps, gamma = 0", 24)
    for title, headers, rows in parts:
        figure.text(20, top + 16, title, 19)
        top = _panels(figure, top + 34, headers, rows, ev.label) + 26
    figure.save(path)


def _guidance_parts(ev: Evaluation) -> list[tuple]:
    """The title, headers and rows of each part that this run has the students for."""
    config, k, parts = ev.config, ev.config.kmin, []
    if ev.find("tdd_rho0", Case(k), variant="w'=1"):
        title = "Students distilled at w' = 1, sampled with w (Eq. 12; Fig. 6a)"
        cases = [Case(k, w=w) for w in (0.0, *W_ADDED)]
        exact = [(ev.reference(case, case.w, 1.0)[0], "") for case in cases]
        rows = [
            (f"rho {config.rho:g}", "null conditions", "tdd", _cells(ev, "tdd", cases, "w'=1")),
            ("rho 0", "none", "tdd_rho0", _cells(ev, "tdd_rho0", cases, "w'=1")),
            ("exact jumps", "perfect student", "", exact),
        ]
        parts.append((title, [f"w = {case.w:g}" for case in cases], rows))
        title = "Students distilled at w' = 5, tuned to the teacher's w (Eqs. 13, 14; Fig. 6b)"
        cases, rows = [Case(k, w=w, tune=W_HIGH) for w in W_ADDED], []
        for method, variant in dict.fromkeys((m, v) for m, v, case, _ in ev.rows if case.tune):
            cells = _cells(ev, method, [Case(k)], variant)
            cells += _cells(ev, method, cases, variant, "rmse_teacher")
            rows.append((title_of(method), variant, method, cells))
        exact = [(ev.reference(Case(1), 0.0, w)[0], "") for w in (W_HIGH, *W_ADDED)]
        rows.append(("teacher's ODE", "at that w", "", exact))
        parts.append((title, ["as distilled", *(f"to w = {w:g}" for w in W_ADDED)], rows))
    if "tdd" in ev.methods:
        # C cuts at the box that holds the data; guided samples that overshoot are what it is for.
        title = f"x_0 clipping, TDD distilled at w' = {config.w:g} (Eq. 17; Fig. 7)"
        headers, rows = {0: "none", 1: "first step", k: "every step"}, []
        for w in W_ADDED[:2]:
            cases = [Case(k, w=w, clip_steps=n) for n in headers]
            rows.append((f"w = {w:g}", "", "tdd", _cells(ev, "tdd", cases)))
        parts.append((title, headers.values(), rows))
    return parts
