"""explore.html: a page to play with the samplers of a run, in a current browser, without a network.

explorer.js holds the maths once more, explorer.html the page. This module hands them what only a
run knows: networks, noise, exact solutions and settings. TCF(2) and TDM are left out: the one jumps
by two evaluations, the other does not promise to send noise where the teacher would.
"""

import json
from base64 import b64encode
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import files
from common.compare import PATH, Case, colour_of, title_of
from common.plots import CLASS_COLOURS
from toy.config import ToyConfig
from toy.evaluate import Evaluation
from toy.figures import rows_inside, teacher_paths
from toy.model import BatchedMLP
from toy.students import Group, Student

TEMPLATE = Path(__file__).with_suffix(".html")
MATHS = Path(__file__).with_suffix(".js")
SAMPLES = 384  # samples of a method; a multiple of 8, like those of an evaluation
PREVIEW_SAMPLES = 48  # of them that follow while a control moves
PATHS = 12  # of these with their paths
BACKGROUND = 700  # points of data behind the samples
MAX_STEPS = 8  # the end of the slider, unless students are trained for more steps

# Questions, each with a view: the methods in the panels, the controls, what there is to see. What
# they say is true of the spirals and of 4 to 8 steps: other runs have a page without them.
QUESTIONS = (
    (
        "What does gamma do?", ("tdd", "tcd", "tdds"), "k=8&gamma=0.5",
        "In 8 steps without noise all jumps of TDD and TCD but the last fall short, and that adds "
        "up. At gamma = 0.5 they go on to half of the next stop's time, and fresh noise (dotted) "
        "leads back up to the stop. Move gamma to 0, and to 1, where every jump goes to time 0 and "
        "all are far off. TCF(S+) takes its target as an input and needs no noise.",
    ), (
        "Why is TDD worse in 8 steps than in 4?", ("tdd", "pcm4", "pcm8"), "k=8",
        "Compare the lower two axes. From a start TDD learns to reach each stop of 4 to 8 steps "
        "that lies up to a quarter of the time below, and lower ones by eta (the bars). 8 steps "
        "make one of these jumps; of the others more are longer than shorter. One network that "
        "does not know its target settles in between, so all jumps but the last fall short, and "
        "that adds up: move k. PCM-8 learns one jump a start, that of 8 steps.",
    ), (
        "What does telling K change?", ("tdd_eta0", "tdd_k4", "pcm4"), "k=8&shown=1",
        "The second network draws K from 4 to 8, learns to reach the next stop of K steps, on the "
        "teacher's own path, and takes K as an input: its error falls with k. To see what K alone "
        "does, tell it another K than k. In 8 steps told 4 its jumps fall short, as TDD's do; in "
        "4 steps told 8 they go too far.",
    ), (
        "Where does guidance go?", ("teacher", "tdd", "pcm4"), "k=4&w=2&shown=1",
        "w comes on top of the w' that students distil, and 1 + w multiplies 1 + w'. A ring is "
        "where exact jumps would end under the same w. Tick Eq. 13, and w is the guidance of the "
        "teacher that the student stands for: w = w' is the student as distilled, and a smaller w "
        "takes guidance back.",
    ),
)  # fmt: skip
FIRST = ("pcm4", "tdd", "tdd_k4", "tcd", "cm")  # in the panels at first, if the run has them


def write(path: Path, ev: Evaluation, groups: list[Group]) -> None:
    """The page with everything in it: 1.4 MB for the default run."""
    content = json.dumps(gather(ev, groups), separators=(",", ":"), allow_nan=False)
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{maths}}", MATHS.read_text(encoding="utf-8"))
    with files.atomic_write(path) as part:
        part.write_text(page.replace("{{run}}", content), encoding="utf-8")


def gather(ev: Evaluation, groups: list[Group]) -> dict:
    """What the page needs of seed 0, as JSON with its arrays packed."""
    config, n = ev.config, min(SAMPLES, len(ev.label))
    max_steps = min(max(MAX_STEPS, config.kmax), config.N)
    background, _ = ev.data.sample(BACKGROUND, torch.Generator().manual_seed(0))
    paths = teacher_paths(ev)[:PREVIEW_SAMPLES]
    shown = rows_inside(paths, PATHS)
    methods = make_methods(ev, groups)
    keys = [method["key"] for method in methods]
    first = [key for key in dict.fromkeys((*FIRST, *keys[1:], keys[0])) if key in keys]
    is_asked = config.data == "spirals" and (config.kmin, config.kmax, config.reach) == (4, 8, None)
    caption = f"{config.data}, guidance g = {1 + config.w:g}, {config.steps} steps of training"
    return {
        "methods": methods,
        "T": ev.schedule.T, "N": config.N, "log_alpha": pack(ev.schedule.log_alpha, "<f8"),
        "fine": ev.fine,  # the timesteps of exact jumps
        "kmin": config.kmin, "kmax": config.kmax, "max_steps": max_steps,
        "w_distilled": config.w,
        "label": ev.label[:n].tolist(),
        "noise": pack(first_noise(ev, n, max_steps)),
        "endpoints": pack(ev.reference(Case(1), 0.0, config.w)[0, :n]),
        "preview_samples": PREVIEW_SAMPLES,
        "shown": shown, "paths": [pack(path) for path in paths[shown]],
        "background": pack(background), "bound": ev.data.bound, "class_colours": CLASS_COLOURS,
        "caption": caption,
        "view": view(first, f"k={config.kmin}"),
        "questions": [
            {"title": title, "view": view(shown_methods, controls), "look": look}
            for title, shown_methods, controls, look in QUESTIONS
            if is_asked and set(shown_methods) <= set(keys)
        ],
    }  # fmt: skip


def view(methods, controls: str) -> str:
    """The part of an address behind its #: up to three methods, and controls of the page's form."""
    keys = [*methods, "", ""][:3]
    return "&".join([*(f"m{i}={key}" for i, key in enumerate(keys)), controls])


def first_noise(ev: Evaluation, n: int, draws: int) -> Tensor:
    """The starting noise, then each step's, that every method is sampled from; (draws, n, 2)."""
    noise = ev.noise(1)
    return torch.stack([next(noise)[:: ev.config.seeds][:n] for _ in range(draws)])


def make_methods(ev: Evaluation, groups: list[Group]) -> list[dict]:
    """The teacher, then every student of tdd_loss at the main guidance that jumps by one pass."""
    methods = [describe("teacher", ev.teacher)]
    for group in groups:
        for i in group.plain:
            student = group.students[i]
            if isinstance(student, Student) and student.tcf != "2":
                methods.append(
                    describe(student.method, group.select([i]))
                    | {"targets": describe_targets(student, ev.config)}
                    | {"eta": student.eta, "Ks": student.Ks}
                )
    return methods


def describe(method: str, network: BatchedMLP) -> dict:
    """A method's name, colour and network, the layers' weights being (out, in)."""
    layers = zip(network.weight, network.bias, strict=True)
    return {
        "key": method, "name": title_of(method), "colour": colour_of(method),
        "scalar": network.scalar, "Ks": [],
        "layers": [{"weight": pack(w[0].T), "bias": pack(b[0, 0])} for w, b in layers],
    }  # fmt: skip


def describe_targets(student: Student, config: ToyConfig) -> dict:
    """The arguments of tdd.next_stops or tdd.target_set that the student's targets come from.

    The page derives the targets again, and a test compares.
    """
    if student.targets.K is not None:
        return {"Ks": student.targets.K.unique().tolist()}
    N, T = config.N, int(student.targets.grid[-1]) + 1
    method = student.method.removesuffix(PATH)
    if method == "cm":
        return {"kmin": 1, "kmax": 1, "e": T}
    if method.startswith("tcd"):
        return {"kmin": N, "kmax": N, "e": T}
    reach = T / config.kmin if config.reach is None else config.reach
    return {"kmin": config.kmin, "kmax": config.kmax, "e": reach}


def pack(x: Tensor, dtype: str = "<f4") -> str:
    """An array's numbers as base64, little-endian as in every browser."""
    return b64encode(np.ascontiguousarray(x.detach().numpy(), dtype)).decode("ascii")
