"""The five pictures of the 2-D experiment, named after the paper's figures that they mirror."""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from plots import FAINT, GREY, INK, Axes, Figure
from tdd import draw
from toy_eval import GAMMAS, Case, Evaluation

COLOURS = {
    "teacher": (130, 134, 144), "cm": (216, 120, 40), "pcm4": (60, 150, 95), "pcm8": (130, 180, 60),
    "tcd": (150, 90, 180), "tdd": (205, 45, 60), "tdd_eta0": (50, 110, 190), "tdd_rho0": (90, 90, 90),
}  # fmt: skip
NAMES = {
    "teacher": "teacher", "cm": "CM / LCM", "pcm4": "PCM-4", "pcm8": "PCM-8", "tcd": "TCD / CTM",
    "tdd": "TDD", "tdd_eta0": "TDD, eta 0", "tdd_rho0": "TDD, rho 0",
}  # fmt: skip


def draw_all(output: Path, ev: Evaluation, students, network, args) -> None:
    samples(output / "samples.png", ev, args)
    curves(output / "curves.png", ev, args)
    trajectories(output / "trajectories.png", ev, students, network, args)
    if any(student.variant for student in students):
        guidance(output / "guidance.png", ev, args)


SIDE, LEFT = 168, 250  # of a panel of samples, and the width of the words before a row of them


def _panels(figure: Figure, top: float, headers, rows, label: Tensor) -> float:
    """Rows (name, what it is, colour, cells) of panels (x (n, 2), words); returns where they end."""
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
    error = _found(ev, method, case, metric, variant)["per_seed"][0]
    return ev.samples[method, variant, case][0], f"rmse {error:.2f}"


def _found(ev: Evaluation, method: str, case: Case, metric="rmse", variant=""):
    """The row of metrics.json for a case, or None."""
    wanted = {"method": method, "variant": variant, "metric": metric, **vars(case)}
    return next((row for row in ev.rows if wanted.items() <= row.items()), None)


def _methods(ev: Evaluation) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in ev.rows if not row["variant"]))


def _teacher_case(method: str, case: Case, args) -> Case:
    w = args.guidance - 1 if method == "teacher" else case.w
    return Case(case.k, case.gamma, case.schedule, w)


# ------------------------------------------------------------------- samples.png, after Fig. 4


def samples(path: Path, ev: Evaluation, args) -> None:
    """Methods by number of steps at gamma = 0, all from the same noise, seed 0."""
    ks = sorted({1, 2, args.kmin, (args.kmin + args.kmax) // 2, args.kmax})
    methods, w = _methods(ev), args.guidance - 1
    figure = Figure(LEFT + (SIDE + 8) * (len(ks) + 1) + 12, 100 + (SIDE + 30) * len(methods))
    figure.text(20, 28, f"From the same noise: {args.data}, gamma = 0, guidance g = {1 + w:g}", 24)
    headers = [f"{k} step" + "s" * (k > 1) for k in ks] + ["teacher's ODE"]
    exact = ev.reference(Case(1), 0.0, w)[0], "many steps"
    rows = [
        (NAMES[m], "guided DDIM" if m == "teacher" else "", COLOURS[m],
         [_cell(ev, m, _teacher_case(m, Case(k), args)) for k in ks] + [exact])
        for m in methods
    ]  # fmt: skip
    _panels(figure, 60, headers, rows, ev.label)
    figure.save(path)


# -------------------------------------------------------------------- curves.png, after Fig. 5


def curves(path: Path, ev: Evaluation, args) -> None:
    """Distance to the reference over the number of steps, for each gamma; bands are seeds."""
    figure = Figure(1240, 640)
    figure.text(30, 30, "Distance to the teacher's exact sampler over the number of steps", 24)
    ks = sorted({1, 2, *range(args.kmin, args.kmax + 1)})
    shown = [row["mean"] for row in ev.rows if row["metric"] == "rmse" and not row["variant"]]
    ticks = [
        t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if min(shown) / 1.5 < t < 2 * max(shown)
    ]
    for i, gamma in enumerate(GAMMAS):
        box = 100 + i * 500, 100, 440, 440
        axes = Axes(
            figure, box, (ks[0] - 0.3, ks[-1] + 0.3), (min(shown) * 0.8, max(shown) * 1.2), True
        )
        axes.frame(
            f"gamma = {gamma:g}", "steps k", "rmse (log scale)" if i == 0 else "", ks, ticks, 16
        )
        for method in _methods(ev):
            rows = [_found(ev, method, _teacher_case(method, Case(k, gamma), args)) for k in ks]
            mean, std = ([row[name] for row in rows] for name in ("mean", "std"))
            low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
            colour = COLOURS[method]
            axes.band(ks, low, high, colour)
            axes.line(ks, mean, colour, 2.5, 7 if method == "teacher" else None, dots=4)
        other = [(k, _found(ev, "tdd", Case(k, gamma, "nonequidistant"))) for k in ks]
        for k, row in other:
            if row is not None:
                figure.dot(*axes.place(k, row["mean"]), COLOURS["tdd"], 5, hollow=True)
    for i, method in enumerate(_methods(ev)):
        y = 130 + 34 * i
        figure.line([(1075, y), (1105, y)], COLOURS[method], 3, 7 if method == "teacher" else None)
        figure.text(1115, y, NAMES[method], 17, COLOURS[method])
    figure.dot(1090, 130 + 34 * len(_methods(ev)), COLOURS["tdd"], 5, hollow=True)
    figure.text(1115, 130 + 34 * len(_methods(ev)), "TDD, non-eq.", 17, COLOURS["tdd"])
    figure.text(30, 615, f"{args.data}; mean of {args.seeds} seeds, bands one deviation; same starting "
                "noise and step noise as the reference", 15, GREY)  # fmt: skip
    figure.save(path)


# ------------------------------------------------------------------- targets.png, after Fig. 2


def targets(path: Path, students, args) -> None:
    """Which targets tau~ (up) each method trains from each start t (right): 20,000 real draws."""
    chosen = {student.method: student for student in students if not student.variant}
    side, columns = 300, 3
    height = 80 + (side + 95) * -(-len(chosen) // columns)
    figure = Figure(110 + columns * (side + 100), height)
    figure.text(
        30, 30, "Which targets each method trains from each start: draws of Eqs. 7 and 8", 24
    )
    ticks = [0, 250, 500, 750, 1000]
    for i, (method, student) in enumerate(chosen.items()):
        box = 90 + (i % columns) * (side + 100), 100 + (i // columns) * (side + 95), side, side
        axes = Axes(figure, box, (0, 1000), (0, 1000))
        axes.frame(NAMES[method], "start t", "target tau", ticks, ticks, 15)
        axes.line([0, 1000], [0, 1000], FAINT, 2)
        draws = draw(
            student.targets, (20_000, 1), student.eta, 0.0, torch.Generator().manual_seed(0)
        )
        for start, tau in set(zip(draws.t_next.tolist(), draws.tau.tolist(), strict=True)):
            figure.dot(*axes.place(start, tau), (*COLOURS[method], 90), 1.6)
    figure.save(path)


# --------------------------------------------------------------------------- trajectories.png


def trajectories(path: Path, ev: Evaluation, students, network, args) -> None:
    """Twelve samples of seed 0 on their way from noise to data, over the teacher's own paths."""
    plain = [i for i, student in enumerate(students) if not student.variant]
    side, columns, w = 380, 3, args.guidance - 1
    figure = Figure(40 + columns * (side + 20), 80 + (side + 60) * -(-len(plain) // columns))
    figure.text(30, 30, f"{args.kmin} steps (a dot a stop) over the teacher's paths (grey)", 24)
    picked = network.pick([m * args.seeds + s for m in plain for s in range(args.seeds)])
    fine = _path(ev, ev.teacher, 1, Case(args.solver_steps), w)
    few = _path(ev, picked, len(plain), Case(args.kmin), 0.0)
    for i, m in enumerate(plain):
        box = 30 + (i % columns) * (side + 20), 100 + (i // columns) * (side + 60), side, side
        axes = Axes(figure, box, (-2.6, 2.6), (-2.6, 2.6))
        axes.frame(NAMES[students[m].method])
        for j in range(12):
            axes.line(*fine[0, j].T.tolist(), GREY, 1.2)
            axes.line(*few[i, j].T.tolist(), COLOURS[students[m].method], 2, dots=3)
    figure.save(path)


def _path(ev: Evaluation, network, members: int, case: Case, w: float) -> Tensor:
    """Every stop of the first samples' way, (m, n, stops, 2), seed 0."""
    stops = [next(ev.noise(members))]
    ev.sample(network, members, case, w, callback=lambda p, x: stops.append(x))
    x = rearrange(stops, "stop (n m s) d -> m s n stop d", m=members, s=ev.args.seeds)
    return x[:, 0, ::2]  # every other one: both classes of neighbours


# ----------------------------------------------------------- guidance.png, after Figs. 6 and 7


def guidance(path: Path, ev: Evaluation, args) -> None:
    """Guiding students at inference: with and without null conditions, tuned down, and clipped."""
    k, scales = args.kmin, (0.0, 1.0, 2.0, 3.0)
    figure = Figure(LEFT + (SIDE + 8) * 4 + 12, 7 * (SIDE + 30) + 300)
    figure.text(20, 28, f"Guidance at inference: {args.data}, {k} steps, gamma = 0", 24)

    def row(name, note, method, variant, cases):
        cells = [_cell(ev, method, case, variant) for case in cases]
        return name, note, COLOURS[method], cells

    figure.text(20, 72, "Students distilled at w' = 1, sampled with w (Eq. 12; Fig. 6a)", 19)
    cases = [Case(k, w=w) for w in scales]
    exact = [(ev.reference(case, case.w, 1.0)[0], "") for case in cases]
    rows = [
        row(f"rho {args.rho:g}", "with null conditions", "tdd", "w'=1", cases),
        row("rho 0", "without", "tdd_rho0", "w'=1", cases),
        ("exact", "perfect student", GREY, exact),
    ]
    top = _panels(figure, 90, [f"w = {w:g}" for w in scales], rows, ev.label)

    figure.text(
        20,
        top + 16,
        "A student distilled at w' = 5, tuned to the teacher's w (Eq. 13; Fig. 6b)",
        19,
    )
    cases = [Case(k)] + [Case(k, w=w, tune=5.0) for w in scales[1:]]
    student = [_cell(ev, "tdd", cases[0], "w'=5")]
    student += [_cell(ev, "tdd", case, "w'=5", "rmse_teacher") for case in cases[1:]]
    wanted = [(ev.reference(Case(1), 0.0, w)[0], "") for w in (5.0, *scales[1:])]
    rows = [
        ("TDD, w' = 5", "tuned", COLOURS["tdd"], student),
        ("teacher's ODE", "at that w", GREY, wanted),
    ]
    headers = ["not tuned"] + [f"to w = {w:g}" for w in scales[1:]]
    top = _panels(figure, top + 34, headers, rows, ev.label)

    if _found(ev, "tdd", Case(k)):
        title = f"x_0 clipping of TDD, w' = {args.guidance - 1:g}, sampled with w (Eq. 17; Fig. 7)"
        figure.text(20, top + 16, title, 19)
        clips = {0: "none", 1: "first step", k: "every step"}
        rows = [
            row(f"w = {w:g}", "", "tdd", "", [Case(k, w=w, clip_steps=n) for n in clips])
            for w in (1.0, 2.0)
        ]
        _panels(figure, top + 34, clips.values(), rows, ev.label)
    figure.save(path)
