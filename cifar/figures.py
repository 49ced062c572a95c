"""The pictures of the CIFAR-10 experiment, named after the paper's figures that they mirror."""

from pathlib import Path

import numpy as np

from cifar.data import CLASSES
from cifar.evaluate import GUIDED, HIGH, Evaluation, case
from common.compare import COLOURS as TOY_COLOURS
from common.compare import GAMMAS, Case, steps_of
from common.compare import NAMES as TOY_NAMES
from common.plots import GREY, INK, Axes, Figure

COLOURS = TOY_COLOURS | {"lcm": TOY_COLOURS["cm"], "tdd_adv": (225, 130, 170)}
NAMES = TOY_NAMES | {"lcm": "CM / LCM", "tdd_adv": "TDD (adv)", "tdd_high": f"TDD, w' = {HIGH:g}"}
SIDE = 46  # of a picture that is 32 pixels wide, and of the gap after it


def draw_all(output: Path, ev: Evaluation) -> None:
    samples(output / "samples.png", ev)
    curves(output / "curves.png", ev)
    # A picture that this run has nothing for must not stay from the run before.
    for name in ("guidance", "clipping", "schedules"):
        (output / f"{name}.png").unlink(missing_ok=True)
    if "tdd" in ev.methods:
        guidance(output / "guidance.png", ev)
        clipping(output / "clipping.png", ev)
        schedules(output / "schedules.png", ev)


# ------------------------------------------------------------------------------------------ sheets
#
# A sheet is rows of panels, a panel columns of pictures. Row i of every panel on a sheet is of one
# class and from one noise: what differs from panel to panel is the method alone.

Column = tuple[str, str, Case]  # its heading, method and case


def sheet(path: Path, title: str, panels: list[tuple[str, list[Column]]], across: int, ev) -> None:
    """Panels of ten classes, the class agreement and distance to the data over each column.

    Columns that this run has no samples for are left out, and so are panels without columns.
    """
    note = "over each column: class agreement; Frechet distance to the data"
    panels = [(name, [c for c in columns if c[1:] in ev.samples]) for name, columns in panels]
    panels = [(name, columns) for name, columns in panels if columns]
    wide = max(len(columns) for _, columns in panels) * SIDE + 30
    high, across = len(CLASSES) * SIDE + 110, min(across, len(panels))
    width = max(24 + across * wide, 30 + 10 * max(len(title), len(note)))
    figure = Figure(width, 90 + high * -(-len(panels) // across))
    figure.text(24, 28, title, 20)
    figure.text(24, 54, note, 15, GREY)
    for i, (name, columns) in enumerate(panels):
        left, top = 24 + i % across * wide, 90 + i // across * high
        figure.text(left, top, name, 17, COLOURS.get(columns[0][1], INK))
        for j, (heading, *key) in enumerate(columns):
            x, row = left + j * SIDE, ev.find(*key)
            agreement, distance = row["agreement"]["value"], row["frechet_data"]["value"]
            for line, word in enumerate((heading, f"{agreement:.0%}", f"{distance:.3g}")):
                figure.text(x + SIDE / 2, top + 24 + 16 * line, word, 13, GREY, "mm")
            for y, picture in enumerate(ev.samples[tuple(key)].permute(0, 2, 3, 1).numpy()):
                figure.paste(picture, x, top + 66 + y * SIDE, SIDE - 2, SIDE - 2)
    figure.save(path)


def samples(path: Path, ev: Evaluation) -> None:
    """Every method over k at gamma = 0, all from the same noise: after Fig. 4."""
    args, ks = ev.args, steps_of(ev.args)
    many = [args.solver_steps // 2, args.solver_steps]
    w = args.guidance - 1
    panels = [("teacher, guided DDIM", [(f"k={k}", "teacher", case(k, w=w)) for k in ks])]
    panels += [(NAMES[m], [(f"k={k}", m, case(k)) for k in ks]) for m in ev.methods[1:]]
    panels += [("teacher, many steps", [(f"k={k}", "teacher", case(k, w=w)) for k in many])]
    title = f"CIFAR-10 from the same noise: gamma = 0, guidance g = {args.guidance:g}"
    sheet(path, title, panels, 4, ev)


def guidance(path: Path, ev: Evaluation) -> None:
    """Guidance on top of what was distilled, and Eq. 13's way back: after Fig. 6."""
    k, w = ev.args.kmin, ev.args.guidance - 1
    added = (0.0, *GUIDED)
    panels = [
        (f"{NAMES[m]}, guided", [(f"g={1 + w:g}", m, case(k, w=w)) for w in added])
        for m in ("tdd_rho0", "tdd")
    ]
    tuned = [(f"as g={1 + w:g}", "tdd_high", case(k, w=w, tune=HIGH)) for w in added[1:]]
    panels += [(NAMES["tdd_high"] + ", tuned", [("as it is", "tdd_high", case(k)), *tuned])]
    last = ev.args.solver_steps
    panels += [("teacher", [(f"k={last}", "teacher", case(last, w=w))])]
    title = f"Guidance at inference, distilled at w' = {w:g} or {HIGH:g}: {k} steps, gamma = 0"
    sheet(path, title, panels, 4, ev)


def clipping(path: Path, ev: Evaluation) -> None:
    """C of Eq. 17 in no step, in the first and in all, at rising guidance: after Fig. 7."""
    k, steps = ev.args.kmin, {"no C": 0, "first": 1, "all": ev.args.kmin}
    panels = [
        (f"TDD at g = {1 + w:g}", [(name, "tdd", case(k, n, w=w)) for name, n in steps.items()])
        for w in (0.0, *GUIDED[:2])
    ]
    sheet(path, f"x_0 clipped in no step, the first, all: {k} steps, gamma = 0", panels, 3, ev)


def schedules(path: Path, ev: Evaluation) -> None:
    """Equidistant beside non-equidistant timesteps: the paper's Ours and Ours*."""
    between = range(ev.args.kmin + 1, ev.args.kmax)
    kinds = {"TDD, equidistant": "equidistant", "TDD, non-equid.": "nonequidistant"}
    panels = [
        (name, [(f"k={k}", "tdd", case(k, schedule=kind)) for k in between])
        for name, kind in kinds.items()
    ]
    last, w = ev.args.solver_steps, ev.args.guidance - 1
    panels += [("teacher", [(f"k={last}", "teacher", case(last, w=w))])]
    sheet(path, "Which timesteps, from the same noise: gamma = 0", panels, 3, ev)


# ------------------------------------------------------------------------------ after Fig. 5
#
# The paper's claim is a curve that stays low over 4..8; single-target methods dip at their own k.


def curves(path: Path, ev: Evaluation) -> None:
    """Distance to the teacher's many-step samples over k: rmse, then Fréchet for each gamma."""
    figure = Figure(1560, 640)
    last = ev.args.solver_steps
    title = f"Distance to the teacher's {last}-step samples over the number of steps"
    figure.text(30, 30, title, 24)
    plots = [("rmse", 0.0), *(("frechet_teacher", gamma) for gamma in GAMMAS)]
    for i, (metric, gamma) in enumerate(plots):
        name = "rmse" if metric == "rmse" else "Frechet"
        _curve(figure, 90 + i * 450, f"{name}, gamma = {gamma:g}", metric, gamma, ev)
    for i, method in enumerate(ev.methods):
        y = 130 + 34 * i
        figure.line([(1425, y), (1450, y)], COLOURS[method], 3, None if i else 7)
        figure.text(1458, y, NAMES[method], 15, COLOURS[method])
    note = f"{ev.n} pictures from the same noise; bands are standard errors; logarithmic scales"
    figure.text(30, 615, note, 15, GREY)
    figure.save(path)


def _curve(figure: Figure, left: float, title: str, metric: str, gamma: float, ev) -> None:
    ks = steps_of(ev.args)
    rows = {(m, k): ev.find(m, case(k, gamma=gamma)) for m in ev.methods for k in ks}
    # Of zero, which only the teacher's own samples have, there is no logarithm.
    found = {key: row[metric] for key, row in rows.items() if row and row[metric]["value"] > 0}
    if not found:
        return
    low = min(f["value"] for f in found.values()) * 0.8
    high = max(f["value"] for f in found.values()) * 1.2
    ticks = [m * 10.0**d for d in range(-3, 3) for m in (1, 2, 5) if low < m * 10.0**d < high]
    axes = Axes(figure, (left, 100, 370, 440), (0.7, ks[-1] + 0.3), (low, high), log_y=True)
    axes.frame(title, "steps k", "", ks, ticks, 15)
    for method in ev.methods:
        own = [(k, *found[method, k].values()) for k in ks if (method, k) in found]
        if own:
            k, value, error = np.array(own).T
            axes.band(k, np.maximum(value - error, low), value + error, COLOURS[method])
            axes.line(k, value, COLOURS[method], 2.5, None if method != "teacher" else 7, dots=4)
