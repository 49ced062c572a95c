"""The pictures of the 2-D experiment, named after the paper's figures that they mirror."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from common.compare import COLOURS, GAMMAS, NAMES, Case, steps_of
from common.plots import FAINT, GREY, INK, Axes, Figure
from solvers import CLEAN
from tdd import draw, guided
from toy.evaluate import Evaluation

# Of the other papers: they have pictures of their own, beside the two that they are compared with.
FAMILY = ("tcd2", "tcds", "tdd2", "tdds", "tdm4", "tdm_unify")


def draw_all(output: Path, ev: Evaluation, groups) -> None:
    main = [method for method in ev.methods if method not in FAMILY]
    samples(output / "samples.png", ev, main)
    curves(output / "curves.png", ev, main)
    # A picture that this run has nothing for must not stay from the run before.
    for name in ("trajectories", "guidance", "family", "family_curves"):
        (output / f"{name}.png").unlink(missing_ok=True)
    if len(main) < len(ev.methods):
        family = [m for m in ev.methods if m in ("teacher", "tcd", "tdd", *FAMILY)]
        samples(output / "family.png", ev, family)
        curves(output / "family_curves.png", ev, family)
    if plain := [group for group in groups if group.students[0].method in main]:
        trajectories(output / "trajectories.png", ev, plain[0].students, plain[0].network)
    if any(row["variant"] or row["clip_steps"] for row in ev.rows):
        guidance(output / "guidance.png", ev)


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
            Axes(figure, box, (-2.6, 2.6), (-2.6, 2.6)).density(x.numpy(), label.numpy())
            figure.text(box[0] + SIDE / 2, top + SIDE + 11, words, 15, GREY, "mm")
        top += SIDE + 30
    return top


def _cells(ev: Evaluation, method: str, cases, variant="", metric="rmse"):
    """The samples of each case in seed 0, and their distance in words."""
    for case in cases:
        error = ev.find(method, case, metric, variant)["per_seed"][0]
        yield ev.samples[method, variant, case][0], f"rmse {error:.2f}"


# ------------------------------------------------------------------- samples.png, after Fig. 4
#
# Every panel starts from the same noise, so a good one looks like the last column, point for point.


def samples(path: Path, ev: Evaluation, methods: list[str]) -> None:
    """Methods by number of steps at gamma = 0, all from the same noise, seed 0."""
    kmin, kmax, g = ev.args.kmin, ev.args.kmax, ev.args.guidance
    ks = sorted({1, 2, kmin, (kmin + kmax) // 2, kmax})
    figure = Figure(LEFT + (SIDE + 8) * (len(ks) + 1) + 12, 100 + (SIDE + 30) * len(methods))
    title = f"From the same noise: {ev.args.data}, gamma = 0, guidance g = {g:g}"
    figure.text(20, 28, title, 24)
    headers = [f"{k} step" + "s" * (k > 1) for k in ks] + ["teacher's ODE"]
    exact = ev.reference(Case(1), 0.0, g - 1)[0], "many steps"
    # The teacher's row is DDIM with guidance, two passes a step; students need one.
    notes, cases = {"teacher": "guided DDIM"}, [Case(k) for k in ks]
    notes |= dict.fromkeys(("tcd2", "tdd2"), "two passes a step")
    rows = [(NAMES[m], notes.get(m, ""), m, [*_cells(ev, m, cases), exact]) for m in methods]
    _panels(figure, 60, headers, rows, ev.label)
    figure.save(path)


# -------------------------------------------------------------------- curves.png, after Fig. 5
#
# Single-target methods dip at their own k; what TDD claims is a curve that stays low over 4..8.


def curves(path: Path, ev: Evaluation, methods: list[str]) -> None:
    """Distance to the reference over the number of steps, for each gamma; bands are seeds."""
    figure, ks = Figure(1240, 640), steps_of(ev.args)
    figure.text(30, 30, "Distance to the teacher's exact sampler over the number of steps", 24)
    means = [
        row["mean"] for row in ev.rows
        if row["metric"] == "rmse" and not row["variant"] and row["method"] in methods
    ]  # fmt: skip
    xlim, ylim = (ks[0] - 0.3, ks[-1] + 0.3), (min(means) * 0.8, max(means) * 1.2)
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if ylim[0] < t < ylim[1]]
    for i, gamma in enumerate(GAMMAS):
        axes = Axes(figure, (100 + i * 500, 100, 440, 440), xlim, ylim, log_y=True)
        # The first panel alone names the y axis; both share it.
        axes.frame(f"gamma = {gamma:g}", "steps k", "" if i else "rmse (log scale)", ks, ticks, 16)
        for method in methods:
            rows = [ev.find(method, Case(k, gamma)) for k in ks]
            mean, std = (np.array([row[name] for row in rows]) for name in ("mean", "std"))
            axes.band(ks, mean - std, mean + std, COLOURS[method])
            axes.line(ks, mean, COLOURS[method], 2.5, 7 if method == "teacher" else None, dots=4)
        for k in ks:
            if row := ev.find("tdd", Case(k, gamma, "nonequidistant")):
                figure.dot(*axes.place(k, row["mean"]), COLOURS["tdd"], 5, hollow=True)
    for i, method in enumerate(methods):
        y = 130 + 34 * i
        figure.line([(1075, y), (1105, y)], COLOURS[method], 3, None if i else 7)
        figure.text(1115, y, NAMES[method], 17, COLOURS[method])
    if any(row["schedule"] == "nonequidistant" and row["method"] == "tdd" for row in ev.rows):
        y = 130 + 34 * len(methods)
        figure.dot(1090, y, COLOURS["tdd"], 5, hollow=True)
        figure.text(1115, y, "TDD, non-eq.", 17, COLOURS["tdd"])
    note = f"{ev.args.data}; mean and deviation over {ev.args.seeds} teachers; same noise for all"
    figure.text(30, 615, note, 15, GREY)
    figure.save(path)


# ------------------------------------------------------------------- targets.png, after Fig. 2
#
# Drawn by `draw`, the very function that training calls, and not from a picture of the idea.


def targets(path: Path, students) -> None:
    """Which targets tau~ (up) each method trains from each start t (right): 20,000 real draws."""
    # Reversed, so that of a method's variants the main one, which comes first, is kept.
    chosen = {student.method: student for student in reversed(students)}
    names = [name for name in NAMES if name in chosen and name not in ("tdd_rho0", *FAMILY)]
    if not names:
        return
    side, columns, ticks = 300, min(3, len(names)), [0, 250, 500, 750, 1000]
    width, height = 20 + columns * (side + 100), 80 + (side + 95) * -(-len(names) // columns)
    figure = Figure(max(800, width), height)
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
    eps = guided(ev.teacher, ev.cond(1), torch.zeros_like(ev.cond(1)), args.guidance - 1)
    fine = _paths(ev, ev.follow, eps, next(ev.noise(1)), ev.schedule.T - 1, CLEAN)
    inside = [j for j in range(len(fine)) if fine[j].abs().max() < 2.5][:12]
    for i, m in enumerate(plain):
        box = 30 + (i % columns) * (side + 20), 100 + (i // columns) * (side + 60), side, side
        axes, colour = Axes(figure, box, (-2.6, 2.6), (-2.6, 2.6)), COLOURS[students[m].method]
        axes.frame(NAMES[students[m].method])
        own = network.pick(range(m * args.seeds, (m + 1) * args.seeds))
        few = _paths(ev, ev.sample, own, 1, Case(args.kmin), 0.0)
        for j in inside:
            axes.line(*fine[j].T.tolist(), GREY, 1.2)
            axes.line(*few[j].T.tolist(), colour, 2, dots=3)
            figure.dot(*axes.place(*few[j, 0].tolist()), GREY, 4, hollow=True)
    figure.save(path)


@torch.no_grad()
def _paths(ev: Evaluation, follow, *where) -> Tensor:
    """Every stop of follow(*where) from the noise on; (n, stops, 2), seed 0."""
    stops = [next(ev.noise(1))]
    follow(*where, callback=lambda s, x: stops.append(x))
    return rearrange(stops, "stop (n s) d -> s n stop d", s=ev.args.seeds)[0]


# ----------------------------------------------------------- guidance.png, after Figs. 6 and 7
#
# The first part is measured against exact jumps (is the student's null branch right?), the second
# against the teacher's own ODE at the wanted w (does Eq. 13 bring the student back to it?).


def guidance(path: Path, ev: Evaluation) -> None:
    """Guiding students at inference: with and without null conditions, tuned down, and clipped."""
    parts, k = list(_guidance_parts(ev, ev.args.kmin)), ev.args.kmin
    height = sum(90 + (SIDE + 30) * len(rows) for _, _, rows in parts)
    figure, top = Figure(LEFT + (SIDE + 8) * 4 + 12, 60 + height), 60
    figure.text(20, 28, f"Guidance at inference: {ev.args.data}, {k} steps, gamma = 0", 24)
    for title, headers, rows in parts:
        figure.text(20, top + 16, title, 19)
        top = _panels(figure, top + 34, headers, rows, ev.label) + 26
    figure.save(path)


def _guidance_parts(ev: Evaluation, k: int):
    """Title, headers and rows of each part that has its students, for k steps."""
    scales = 1.0, 2.0, 3.0
    if ev.find("tdd_rho0", Case(k), variant="w'=1"):
        title = "Students distilled at w' = 1, sampled with w (Eq. 12; Fig. 6a)"
        cases = [Case(k, w=w) for w in (0.0, *scales)]
        exact = [(ev.reference(case, case.w, 1.0)[0], "") for case in cases]
        rows = [
            (f"rho {ev.args.rho:g}", "null conditions", "tdd", _cells(ev, "tdd", cases, "w'=1")),
            ("rho 0", "none", "tdd_rho0", _cells(ev, "tdd_rho0", cases, "w'=1")),
            ("exact jumps", "perfect student", "", exact),
        ]
        yield title, [f"w = {case.w:g}" for case in cases], rows
        title = "A student distilled at w' = 5, tuned to the teacher's w (Eq. 13; Fig. 6b)"
        cases = [Case(k, w=w, tune=5.0) for w in scales]
        cells = [*_cells(ev, "tdd", [Case(k)], "w'=5")]
        cells += _cells(ev, "tdd", cases, "w'=5", "rmse_teacher")
        exact = [(ev.reference(Case(1), 0.0, w)[0], "") for w in (5.0, *scales)]
        rows = [("TDD, w' = 5", "Eq. 13", "tdd", cells), ("teacher's ODE", "at that w", "", exact)]
        yield title, ["as distilled"] + [f"to w = {w:g}" for w in scales], rows
    if "tdd" in ev.methods:
        # C cuts at the box that holds the data; guided samples that overshoot are what it is for.
        title = f"x_0 clipping, TDD distilled at w' = {ev.args.guidance - 1:g} (Eq. 17; Fig. 7)"
        clips, rows = {0: "none", 1: "first step", k: "every step"}, []
        for w in (1.0, 2.0):
            cases = [Case(k, w=w, clip_steps=n) for n in clips]
            rows.append((f"w = {w:g}", "", "tdd", _cells(ev, "tdd", cases)))
        yield title, list(clips.values()), rows
