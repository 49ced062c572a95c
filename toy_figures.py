"""The five pictures of the 2-D experiment, named after the paper's figures that they mirror."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from plots import FAINT, GREY, INK, Axes, Figure
from solvers import CLEAN
from tdd import draw, guided
from toy_eval import GAMMAS, Case, Evaluation

# A method keeps its colour and its name through all of the pictures.

COLOURS = {
    "teacher": (130, 134, 144), "cm": (216, 120, 40), "pcm4": (60, 150, 95), "pcm8": (130, 180, 60),
    "tcd": (150, 90, 180), "tdd": (205, 45, 60), "tdd_eta0": (50, 110, 190),
    "tdd_rho0": (90, 90, 90),
}  # fmt: skip
NAMES = {
    "teacher": "teacher", "cm": "CM / LCM", "pcm4": "PCM-4", "pcm8": "PCM-8", "tcd": "TCD / CTM",
    "tdd": "TDD", "tdd_eta0": "TDD, eta 0", "tdd_rho0": "TDD, rho 0",
}  # fmt: skip


def draw_all(output: Path, ev: Evaluation, students, network) -> None:
    samples(output / "samples.png", ev)
    curves(output / "curves.png", ev)
    # A picture that this run has nothing for must not stay from the run before.
    for name in ("trajectories", "guidance"):
        (output / f"{name}.png").unlink(missing_ok=True)
    if len(ev.methods) > 1:
        trajectories(output / "trajectories.png", ev, students, network)
    if any(row["variant"] or row["clip_steps"] for row in ev.rows):
        guidance(output / "guidance.png", ev)


# Panels of samples are what samples.png and guidance.png are made of: rows of clouds, words below.

SIDE, LEFT = 168, 190  # of a panel of samples, and the width of the words before a row of them


def _panels(figure: Figure, top: float, headers, rows, label: Tensor) -> float:
    """Rows (name, note, colour, cells) of panels (x (n, 2), words); returns where they end."""
    for column, header in enumerate(headers):
        x = LEFT + column * (SIDE + 8) + SIDE / 2
        figure.text(x, top + 10, header, 18, INK, "mm")
    top += 28
    for name, note, colour, cells in rows:
        figure.text(20, top + SIDE / 2 - 12, name, 20, colour)
        figure.text(20, top + SIDE / 2 + 13, note, 15, GREY)
        for column, (x, words) in enumerate(cells):
            box = LEFT + column * (SIDE + 8), top, SIDE, SIDE
            Axes(figure, box, (-2.6, 2.6), (-2.6, 2.6)).density(x.numpy(), label.numpy())
            figure.text(box[0] + SIDE / 2, top + SIDE + 11, words, 15, GREY, "mm")
        top += SIDE + 30
    return top


def _cell(ev: Evaluation, method: str, case: Case, variant="", metric="rmse"):
    """The samples of a case in seed 0, and their distance in words."""
    error = ev.find(method, case, metric, variant)["per_seed"][0]
    if method == "teacher":
        case = replace(case, w=ev.args.guidance - 1)
    return ev.samples[method, variant, case][0], f"rmse {error:.2f}"


# ------------------------------------------------------------------- samples.png, after Fig. 4
#
# Every panel starts from the same noise, so a good one looks like the last column, point for point.


def samples(path: Path, ev: Evaluation) -> None:
    """Methods by number of steps at gamma = 0, all from the same noise, seed 0."""
    kmin, kmax, w = ev.args.kmin, ev.args.kmax, ev.args.guidance - 1
    ks = sorted({1, 2, kmin, (kmin + kmax) // 2, kmax})
    figure = Figure(LEFT + (SIDE + 8) * (len(ks) + 1) + 12, 100 + (SIDE + 30) * len(ev.methods))
    figure.text(
        20, 28, f"From the same noise: {ev.args.data}, gamma = 0, guidance g = {1 + w:g}", 24
    )
    headers = [f"{k} step" + "s" * (k > 1) for k in ks] + ["teacher's ODE"]
    exact = ev.reference(Case(1), 0.0, w)[0], "many steps"
    rows = []
    # The teacher's row is DDIM with guidance, two passes a step; students need one.
    for method in ev.methods:
        note = "guided DDIM" if method == "teacher" else ""
        cells = [_cell(ev, method, Case(k)) for k in ks]
        rows.append((NAMES[method], note, COLOURS[method], [*cells, exact]))
    _panels(figure, 60, headers, rows, ev.label)
    figure.save(path)


# -------------------------------------------------------------------- curves.png, after Fig. 5
#
# Single-target methods dip at their own k; what TDD claims is a curve that stays low over 4..8.


def curves(path: Path, ev: Evaluation) -> None:
    """Distance to the reference over the number of steps, for each gamma; bands are seeds."""
    figure = Figure(1240, 640)
    figure.text(30, 30, "Distance to the teacher's exact sampler over the number of steps", 24)
    means = [row["mean"] for row in ev.rows if row["metric"] == "rmse" and not row["variant"]]
    ylim = min(means) * 0.8, max(means) * 1.2
    for i, gamma in enumerate(GAMMAS):
        _curve_panel(figure, (100 + i * 500, 100, 440, 440), ev, gamma, ylim)
    entries = [(NAMES[method], COLOURS[method]) for method in ev.methods]
    for i, (name, colour) in enumerate(entries):
        figure.line([(1075, 130 + 34 * i), (1105, 130 + 34 * i)], colour, 3, None if i else 7)
        figure.text(1115, 130 + 34 * i, name, 17, colour)
    if any(row["schedule"] == "nonequidistant" and row["method"] == "tdd" for row in ev.rows):
        figure.dot(1090, 130 + 34 * len(entries), COLOURS["tdd"], 5, hollow=True)
        figure.text(1115, 130 + 34 * len(entries), "TDD, non-eq.", 17, COLOURS["tdd"])
    note = f"{ev.args.data}; mean and deviation over {ev.args.seeds} teachers; same noise for all"
    figure.text(30, 615, note, 15, GREY)
    figure.save(path)


# The first panel alone names the y axis; both share it.


def _curve_panel(figure: Figure, box, ev: Evaluation, gamma: float, ylim) -> None:
    ks = sorted({1, 2, *range(ev.args.kmin, ev.args.kmax + 1)})
    axes = Axes(figure, box, (ks[0] - 0.3, ks[-1] + 0.3), ylim, log_y=True)
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if ylim[0] < t < ylim[1]]
    ylabel = "rmse (log scale)" if gamma == GAMMAS[0] else ""
    axes.frame(f"gamma = {gamma:g}", "steps k", ylabel, ks, ticks, 16)
    for method in ev.methods:
        rows = [ev.find(method, Case(k, gamma)) for k in ks]
        mean, std = (np.array([row[name] for row in rows]) for name in ("mean", "std"))
        axes.band(ks, mean - std, mean + std, COLOURS[method])
        axes.line(ks, mean, COLOURS[method], 2.5, 7 if method == "teacher" else None, dots=4)
    for k in ks:
        if row := ev.find("tdd", Case(k, gamma, "nonequidistant")):
            figure.dot(*axes.place(k, row["mean"]), COLOURS["tdd"], 5, hollow=True)


# ------------------------------------------------------------------- targets.png, after Fig. 2
#
# Drawn by `draw`, the very function that training calls, and not from a picture of the idea.


def targets(path: Path, students) -> None:
    """Which targets tau~ (up) each method trains from each start t (right): 20,000 real draws."""
    # Reversed, so that of a method's variants the main one, which comes first, is kept.
    chosen = {student.method: student for student in reversed(students)}
    names = [name for name in NAMES if name in chosen and name != "tdd_rho0"]
    side, columns, ticks = 300, min(3, len(names)), [0, 250, 500, 750, 1000]
    figure = Figure(
        max(800, 20 + columns * (side + 100)), 80 + (side + 95) * -(-len(names) // columns)
    )
    figure.text(30, 30, "Targets tau that each method trains from each start t (Eqs. 4, 7, 8)", 24)
    for i, name in enumerate(names):
        box = 90 + (i % columns) * (side + 100), 100 + (i // columns) * (side + 95), side, side
        axes = Axes(figure, box, (0, 1000), (0, 1000))
        axes.frame(NAMES[name], "start t", "target tau", ticks, ticks, 15)
        axes.line([0, 1000], [0, 1000], FAINT, 2)
        generator = torch.Generator().manual_seed(0)
        draws = draw(chosen[name].targets, (20_000, 1), chosen[name].eta, 0.0, generator)
        counts = Counter(zip(draws.t_next.tolist(), draws.tau.tolist(), strict=True))
        for (start, tau), count in counts.items():
            shade = 60 + 195 * count / max(counts.values())  # the likelier, the darker
            figure.dot(*axes.place(start, tau), (*COLOURS[name], round(shade)), 2.2)
    figure.save(path)


# --------------------------------------------------------------------------- trajectories.png
#
# A jump is exact when its dot lies on the grey path; the last dots are the samples.


def trajectories(path: Path, ev: Evaluation, students, network) -> None:
    """Twelve samples of seed 0 on their way from noise to data, over the teacher's own paths."""
    plain = [i for i, student in enumerate(students) if not student.variant]
    side, columns, args = 380, 3, ev.args
    figure = Figure(40 + columns * (side + 20), 80 + (side + 60) * -(-len(plain) // columns))
    title = f"From noise (hollow) to data in {args.kmin} steps, over the teacher's paths (grey)"
    figure.text(30, 30, title, 24)
    fine = _teacher_paths(ev)
    inside = [j for j in range(len(fine)) if fine[j].abs().max() < 2.5][:12]
    for i, m in enumerate(plain):
        box = 30 + (i % columns) * (side + 20), 100 + (i // columns) * (side + 60), side, side
        axes, colour = Axes(figure, box, (-2.6, 2.6), (-2.6, 2.6)), COLOURS[students[m].method]
        axes.frame(NAMES[students[m].method])
        own = network.pick(range(m * args.seeds, (m + 1) * args.seeds))
        few = _student_paths(ev, own)
        for j in inside:
            axes.line(*fine[j].T.tolist(), GREY, 1.2)
            axes.line(*few[j].T.tolist(), colour, 2, dots=3)
            figure.dot(*axes.place(*few[j, 0].tolist()), GREY, 4, hollow=True)
    figure.save(path)


def _student_paths(ev: Evaluation, student) -> Tensor:
    """Every stop of one method's samples at k = kmin, gamma = 0; (n, stops, 2), seed 0."""
    stops = [next(ev.noise(1))]
    ev.sample(student, 1, Case(ev.args.kmin), 0.0, callback=lambda p, x: stops.append(x))
    return rearrange(stops, "stop (n s) d -> s n stop d", s=ev.args.seeds)[0]


@torch.no_grad()
def _teacher_paths(ev: Evaluation) -> Tensor:
    """The same for the teacher's guided PF-ODE in small steps."""
    stops = [next(ev.noise(1))]
    eps = guided(ev.teacher, ev.cond(1), torch.zeros_like(ev.cond(1)), ev.args.guidance - 1)
    ev.follow(eps, stops[0], ev.schedule.T - 1, CLEAN, callback=lambda s, x: stops.append(x))
    return rearrange(stops, "stop (n s) d -> s n stop d", s=ev.args.seeds)[0]


# ----------------------------------------------------------- guidance.png, after Figs. 6 and 7
#
# The first part is measured against exact jumps (is the student's null branch right?), the second
# against the teacher's own ODE at the wanted w (does Eq. 13 bring the student back to it?).


def guidance(path: Path, ev: Evaluation) -> None:
    """Guiding students at inference: with and without null conditions, tuned down, and clipped."""
    parts = []
    if ev.find("tdd_rho0", Case(ev.args.kmin), variant="w'=1"):
        parts += [_null_conditions(ev), _tuning(ev)]
    if "tdd" in ev.methods:
        parts.append(_clipping(ev))
    height = sum(90 + (SIDE + 30) * len(rows) for _, _, rows in parts)
    figure, top = Figure(LEFT + (SIDE + 8) * 4 + 12, 60 + height), 60
    figure.text(
        20, 28, f"Guidance at inference: {ev.args.data}, {ev.args.kmin} steps, gamma = 0", 24
    )
    for title, headers, rows in parts:
        figure.text(20, top + 16, title, 19)
        top = _panels(figure, top + 34, headers, rows, ev.label) + 26
    figure.save(path)


def _null_conditions(ev: Evaluation):
    scales = 0.0, 1.0, 2.0, 3.0
    cases = [Case(ev.args.kmin, w=w) for w in scales]
    with_null = [_cell(ev, "tdd", case, "w'=1") for case in cases]
    without = [_cell(ev, "tdd_rho0", case, "w'=1") for case in cases]
    exact = [(ev.reference(case, case.w, 1.0)[0], "") for case in cases]
    rows = [
        (f"rho {ev.args.rho:g}", "null conditions", COLOURS["tdd"], with_null),
        ("rho 0", "none", COLOURS["tdd_rho0"], without),
        ("exact jumps", "perfect student", GREY, exact),
    ]
    title = "Students distilled at w' = 1, sampled with w (Eq. 12; Fig. 6a)"
    return title, [f"w = {w:g}" for w in scales], rows


def _tuning(ev: Evaluation):
    scales, k = (1.0, 2.0, 3.0), ev.args.kmin
    student = [_cell(ev, "tdd", Case(k), "w'=5")]
    student += [_cell(ev, "tdd", Case(k, w=w, tune=5.0), "w'=5", "rmse_teacher") for w in scales]
    teacher = [(ev.reference(Case(1), 0.0, w)[0], "") for w in (5.0, *scales)]
    rows = [
        ("TDD, w' = 5", "Eq. 13", COLOURS["tdd"], student),
        ("teacher's ODE", "at that w", GREY, teacher),
    ]
    title = "A student distilled at w' = 5, tuned to the teacher's w (Eq. 13; Fig. 6b)"
    return title, ["as distilled"] + [f"to w = {w:g}" for w in scales], rows


# C cuts at the box that holds the data; guided samples that overshoot are what it is for.


def _clipping(ev: Evaluation):
    clips = {0: "none", 1: "first step", ev.args.kmin: "every step"}
    rows = []
    for w in (1.0, 2.0):
        cells = [_cell(ev, "tdd", Case(ev.args.kmin, w=w, clip_steps=n)) for n in clips]
        rows.append((f"w = {w:g}", "", COLOURS["tdd"], cells))
    title = f"x_0 clipping, TDD distilled at w' = {ev.args.guidance - 1:g} (Eq. 17; Fig. 7)"
    return title, list(clips.values()), rows
