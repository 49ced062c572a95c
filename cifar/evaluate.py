"""How near CIFAR-10 students come to their teacher and to the data: distances, tables, rows.

Every figure is of the same labels and starting noise for all methods. Its error is a jackknife's: a
tenth of the seeds left out at a time.
"""

import hashlib
import io
import json
from dataclasses import asdict, replace

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cifar.classifier import Classifier, judge
from cifar.data import CLASSES
from cifar.sample import Sampled, digest, load_student, load_teacher, pictures
from common import files
from common.compare import GAMMAS, Case, steps_of, table_of, timesteps_of
from common.files import read_tensors
from tdd import tuned

GROUPS = 10  # of seeds, for the errors
HIGH = 5.0  # w' of the student that Eq. 13 tunes down
GUIDED = (1.0, 2.0, 3.0)  # w of the guidance study
ASIDE = ("real", "tdd_rho0", "tdd_high")  # rows beside the main comparison


# --------------------------------------------------------------------------------------- distances
#
# Fréchet's asks whether the cloud of samples is right (Heusel et al. 2017, here with our own
# classifier's features), rmse whether each sample is where the teacher would have put it.


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of features (n, d)."""
    return features.mean(0), features.T.cov()


def reference(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments to measure distances from, with the root of the covariance, which costs the most."""
    mean, covariance = moments(features)
    values, vectors = torch.linalg.eigh(covariance)
    return mean, covariance, vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> float:
    """Squared Fréchet distance of two Gaussians: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))."""
    (m, c), (m_, c_, root) = one, other
    # The square root of C C' has the trace of that of the symmetric C'^(1/2) C C'^(1/2).
    cross = torch.linalg.eigvalsh(root @ c @ root).clamp(min=0).sqrt().sum()
    return ((m - m_).square().sum() + c.trace() + c_.trace() - 2 * cross).item()


def rmse(one: Tensor, other: Tensor) -> float:
    """Root mean squared difference of pictures in uint8, on the scale of x_0, [-1, 1]."""
    return ((one.float() - other.float()) / 127.5).square().mean().sqrt().item()


def png_bits(images: Tensor) -> Tensor:
    """Bits a pixel that each picture takes as a PNG (n,): the less there is in it, the fewer."""
    sizes = []
    for x in images:
        file = io.BytesIO()
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(file, "PNG")
        sizes.append(8 * len(file.getvalue()) / (32 * 32))
    return torch.tensor(sizes)


def subsets(n: int) -> list[Tensor]:
    """The indices of all n, then of all but one group, for each group."""
    # Neighbours in a group, so that each holds as many of every class.
    every = torch.arange(n)
    group = every * GROUPS // n
    return [every, *(every[group != g] for g in range(GROUPS))]


def jackknife(values: list[float]) -> dict[str, float]:
    """A figure of all, and its standard error, from its values on `subsets`."""
    value, *others = values
    spread = torch.tensor(others, dtype=torch.float64).var(correction=0) * (GROUPS - 1)
    return {"value": value, "error": spread.sqrt().item()}


# -------------------------------------------------------------------------------------------- cases
#
# x_0 is clipped in all steps, which pixels ask for, but where a case is about just that.


def case(k: int, clip_steps: int | None = None, **more) -> Case:
    return Case(k, clip_steps=k if clip_steps is None else clip_steps, **more)


def cases_of(args, method: str) -> list[Case]:
    """All ways to sample a method that the tables and pictures need; no case twice."""
    ks, k, w = steps_of(args), args.kmin, args.guidance - 1
    noisy = sorted({k, (k + args.kmax) // 2, args.kmax})
    # Fig. 6 (a): guided at inference, with null conditions in the training and without.
    study = [case(k, w=w) for w in GUIDED]
    cases = [case(k), *study]
    if method == "teacher":
        cases = [case(k, w=w) for k in (args.solver_steps, args.solver_steps // 2, *ks)]
        cases += [case(k, w=w, gamma=GAMMAS[1]) for k in noisy]
    elif method == "tdd_high":
        # Fig. 6 (b): its own strength, and Eq. 13's tuning to weaker ones.
        cases = [case(k), *(case(k, w=w, tune=HIGH) for w in GUIDED)]
    elif method != "tdd_rho0":
        cases = [*map(case, ks), *(case(k, gamma=GAMMAS[1]) for k in noisy)]
    if method == "tdd":
        between = range(args.kmin + 1, args.kmax)
        cases += [*study, *(case(k, schedule="nonequidistant") for k in between)]
        # Fig. 7: clipped in no step and in the first alone, guided or not.
        cases += [case(k, n, w=w) for w in (0.0, *GUIDED[:2]) for n in (0, 1)]
    return list(dict.fromkeys(cases))


# -------------------------------------------------------------------------------------- evaluation
#
# Sampling is nearly all of the time that this takes, so samples are files, named by what they are
# made of: an evaluation that was interrupted goes on, and one with other settings finds none.


class Evaluation:
    """Samples of all methods, kept as files, and the rows of metrics.json."""

    def __init__(self, args, classifier: Classifier, train, test):
        self.args, self.classifier, self.n = args, classifier, args.samples
        self.label = torch.arange(self.n) % len(CLASSES)
        # Not the seeds of training, whose noise came from small numbers too.
        self.seeds = range(args.seed + 1_000_000, args.seed + 1_000_000 + self.n)
        self.samples, self.found, self.subsets = {}, {}, subsets(self.n)
        # How large a classifier's features are means nothing: distances are in per cent of their
        # total variance over the training pictures.
        self.scale = 1.0
        features = self._judge(train[0])[0]
        self.scale = (moments(features)[1].trace() / 100).sqrt()
        self.data = reference(features / self.scale)
        self._floor(train, test)

    def _judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, answers = judge(self.classifier, images, self.args.device)
        return features / self.scale, answers

    def _floor(self, train, test) -> None:
        """What real pictures score: below the distances between them nothing can be told."""
        features, answers = self._judge(test[0])
        right = answers == test[1]
        self.accuracy = right.double().mean().item()
        few = slice(self.n)
        # The teacher's samples are as few as a student's: so are the training pictures here.
        self._refer_to(None, self._judge(train[0][few])[0])
        self._keep("real", case(0), test[0][few], features[few], right[few], w=None)

    def _refer_to(self, images: Tensor | None, features: Tensor) -> None:
        """What "teacher" figures are distances to."""
        self.exact, self.known = images, [reference(features[i]) for i in self.subsets]

    def run(self, methods: list[str]) -> None:
        """The rows of the teacher and of these students."""
        teacher = load_teacher(self.args.output, self.args.device)
        jobs = [(m, c) for m in ("teacher", *methods) for c in cases_of(self.args, m)]
        model, of = Sampled(teacher), "teacher"
        for method, c in tqdm(jobs, desc="evaluate", mininterval=0.5, dynamic_ncols=True):
            if method != of:
                model, of = load_student(self.args.output, method, teacher), method
            w = c.w if c.tune is None else tuned(c.w, c.tune)
            images = self.draw(method, model, c, w)
            features, answers = self._judge(images)
            if method == "teacher" and c.k == self.args.solver_steps and not c.gamma:
                self._refer_to(images, features)
            # Eq. 22: guidance on top of what was distilled multiplies, in terms of g = 1 + w.
            own = {"teacher": 0.0, "tdd_high": HIGH}.get(method, self.args.guidance - 1)
            g = (1 + w) * (1 + own)
            self._keep(method, c, images, features, answers == self.label, g - 1)

    def draw(self, method: str, model: Sampled, c: Case, w: float) -> Tensor:
        """The pictures of a case (n, 3, 32, 32), from their file where they lie there."""
        timesteps = timesteps_of(self.args, c)
        about = {"of": digest(self.args.output / method), "n": self.n, "seed": self.args.seed,
                 "timesteps": timesteps, "device": self.args.device, **asdict(c)}  # fmt: skip
        # By the weights and all settings: another model's or setting's samples have another name.
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        path = files.output_folder(self.args.output / "samples") / f"{method}-{key}.safetensors"
        if path.exists():
            return read_tensors(path)[0]["images"]
        parts = pictures(model, self.label, self.seeds, timesteps, w, c.gamma, c.clip_steps)
        images = torch.cat(list(parts))
        files.write_tensors(path, {"images": images}, about=json.dumps(about))
        return images

    def _keep(self, method: str, c: Case, images, features, right, w: float | None) -> None:
        """A row: each figure with its standard error; w is the guidance that it all comes to."""
        bits, own = png_bits(images), [moments(features[i]) for i in self.subsets]
        figures = {
            "frechet_data": [frechet(each, self.data) for each in own],
            "agreement": [right[i].double().mean().item() for i in self.subsets],
            "png_bits": [bits[i].mean().item() for i in self.subsets],
        }
        # Otherwise guided samples are other samples than the teacher's, and should be.
        if w is None or abs(w - self.args.guidance + 1) < 1e-9:
            pairs = zip(own, self.known, strict=True)
            figures["frechet_teacher"] = [frechet(*pair) for pair in pairs]
            # And so they are with noise between the steps, however good.
            if self.exact is not None and c.gamma == 0:
                figures["rmse"] = [rmse(images[i], self.exact[i]) for i in self.subsets]
        row = {"method": method, **asdict(c), "n": len(images)}
        row |= {name: jackknife(values) for name, values in figures.items()}
        # What the pictures show: a sample of each class.
        self.found[method, c], self.samples[method, c] = row, images[: len(CLASSES)]

    # ---------------------------------------------------------------------------------- tables

    @property
    def rows(self) -> list[dict]:
        """The rows of metrics.json, in the order in which they were made."""
        return list(self.found.values())

    def find(self, method: str, c: Case) -> dict | None:
        """The row of a case; the teacher's is guided by the w that students distil."""
        return self.found.get((method, self.case_of(method, c)))

    def case_of(self, method: str, c: Case) -> Case:
        return replace(c, w=self.args.guidance - 1) if method == "teacher" else c

    @property
    def methods(self) -> list[str]:
        """The teacher, then every student of the main comparison."""
        return list(dict.fromkeys(method for method, _ in self.found if method not in ASIDE))

    def tables(self) -> list[str]:
        """Every table that is worth printing."""
        plain = ("frechet_teacher", "rmse", "frechet_data", "agreement", "png_bits")
        return [*map(self.table, plain), self.table("frechet_teacher", GAMMAS[1]), self.study()]

    def table(self, metric: str, gamma: float = 0.0) -> str:
        """A figure of every method over k, with its standard error in brackets."""
        ks, rows = steps_of(self.args), []
        for method in self.methods:
            found = [self.find(method, case(k, gamma=gamma)) for k in ks]
            if any(found):
                rows.append((method, [_cell(row, metric) for row in found]))
        # The teacher's many steps are sampled without noise alone.
        for k in () if gamma else (self.args.solver_steps // 2, self.args.solver_steps):
            rows.append((f"teacher, {k} steps", [_cell(self.find("teacher", case(k)), metric)]))
        rows.append(("test pictures", [_cell(self.find("real", case(0)), metric)]))
        return table_of(f"{metric} at gamma = {gamma:g}", ks, rows, 30, 16)

    def study(self) -> str:
        """Guidance at inference, Eq. 13, clipping and non-equidistant timesteps: a row a case."""
        main = {(m, self.case_of(m, case(k))) for m in self.methods for k in steps_of(self.args)}
        names = "agreement", "frechet_data", "frechet_teacher", "rmse"
        lines = ["method    k  w  w'  C in  timesteps     " + "".join(f"{n:>16}" for n in names)]
        for (method, c), row in self.found.items():
            if method in ("teacher", "real") or c.gamma or (method, c) in main:
                continue
            tune = "-" if c.tune is None else f"{c.tune:g}"
            lines.append(
                f"{method:9}{c.k:2}{c.w:3g}{tune:>4}{c.clip_steps:6}  {c.schedule:14}"
                + "".join(_cell(row, name) for name in names)
            )
        return "\n".join(lines)


def _cell(row: dict | None, metric: str) -> str:
    found = (row or {}).get(metric)
    return f"{found['value']:.3f} ({found['error']:.3f})".rjust(16) if found else " " * 16
