"""How near CIFAR-10 students come to their teacher and to the data: distances, tables, rows.

Every figure is of the same labels and starting noise for all methods. Its error is a jackknife's: a
tenth of the seeds left out at a time.
"""

import hashlib
import io
import json
from dataclasses import asdict, fields

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import cli
from cifar import CLASSES, Classifier, judge
from cifar_sample import load_student, load_teacher, pictures
from load import read_tensors
from tdd import equidistant, nonequidistant, tuned
from toy_eval import Case

GROUPS = 10  # of seeds, for the errors
GAMMAS = (0.0, 0.2)
HIGH = 5.0  # w' of the student that Eq. 13 tunes down

# --------------------------------------------------------------------------------------- distances


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of features (n, d)."""
    return features.mean(0), features.T.cov()


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Squared Fréchet distance of two Gaussians: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))."""
    (m, c), (m_, c_) = one, other
    # The square root of C C' has the trace of that of the symmetric C^(1/2) C' C^(1/2).
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_ @ root).clamp(min=0).sqrt().sum()
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


def jackknife(statistic, n: int) -> tuple[float, float]:
    """statistic(indices) of all n, and its standard error from leaving out groups of n / GROUPS."""
    every = torch.arange(n)
    left_out = torch.tensor([statistic(every[every % GROUPS != g]) for g in range(GROUPS)])
    spread = (left_out - left_out.mean()).square().mean() * (GROUPS - 1)
    return statistic(every), spread.sqrt().item()


# -------------------------------------------------------------------------------------------- cases
#
# x_0 is clipped in all steps, which pixels ask for, but where a case is about just that.


def case(k: int, clip_steps: int | None = None, **more) -> Case:
    return Case(k, clip_steps=k if clip_steps is None else clip_steps, **more)


def steps_of(args) -> list[int]:
    # 1 and 2 lie outside of what TDD trains for; they show what that costs.
    return sorted({1, 2, *range(args.kmin, args.kmax + 1)})


def cases_of(args, method: str) -> list[Case]:
    """All ways to sample a method that the tables and pictures need."""
    ks, k, w = steps_of(args), args.kmin, args.guidance - 1
    if method == "teacher":
        return [case(k, w=w) for k in (args.solver_steps, args.solver_steps // 2, *ks)]
    if method == "tdd_high":
        # Fig. 6 (b): its own strength, and Eq. 13's tuning to weaker ones.
        return [case(k), *(case(k, w=w, tune=HIGH) for w in (1.0, 2.0, 3.0))]
    # Fig. 6 (a): guided at inference, with null conditions in the training and without.
    study = [case(k, w=w) for w in (1.0, 2.0, 3.0)]
    if method == "tdd_rho0":
        return [case(k), *study]
    noisy = [
        case(k, gamma=0.2) for k in sorted({args.kmin, (args.kmin + args.kmax) // 2, args.kmax})
    ]
    cases = [*map(case, ks), *noisy]
    if method == "tdd":
        between = range(args.kmin + 1, args.kmax)
        cases += [case(k, schedule="nonequidistant") for k in between]
        # Fig. 7: guided further, with no clipping and with clipping in the first step alone.
        cases += study + [case(k, n, w=w) for w in (0.0, 1.0, 2.0) for n in (0, 1)]
    return cases


def timesteps(args, case: Case) -> list[int]:
    if case.schedule == "nonequidistant":
        return nonequidistant(case.k, args.solver_steps, args.kmin, args.kmax)
    return equidistant(case.k, args.solver_steps)


# -------------------------------------------------------------------------------------- evaluation


class Evaluation:
    """Samples of all methods, kept as files, and the rows of metrics.json."""

    def __init__(self, args, classifier: Classifier, made_of: dict[str, str], train, test):
        self.args, self.classifier, self.made_of = args, classifier, made_of
        self.n = args.samples
        self.label = torch.arange(self.n) % len(CLASSES)
        self.samples, self.rows = {}, []
        # How large a classifier's features are means nothing: distances are in per cent of their
        # total variance over the training pictures.
        self.scale = 1.0
        mean, covariance = moments(self._judge(train[0])[0])
        self.scale = (covariance.trace() / 100).sqrt()
        self.data = mean / self.scale, covariance / self.scale**2
        self._floor(train, test)

    def _judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, answers = judge(self.classifier, images, self.args.device)
        return features / self.scale, answers

    def _floor(self, train, test) -> None:
        """What real pictures score: below the distances between them nothing can be told."""
        images, label = test[0][: self.n], test[1][: self.n]
        features, answers = self._judge(images)
        # The teacher's samples are as few as the student's: so are these.
        others = self._judge(train[0][: self.n])[0]
        self.reference = images, others
        self._keep("real", case(0), images, features, answers == label, paired=False)
        whole = self._judge(test[0])[1] == test[1]
        self.accuracy = whole.double().mean().item()

    def run(self, methods: list[str]) -> None:
        """The rows of the teacher and of these students."""
        jobs = [(m, c) for m in ("teacher", *methods) for c in cases_of(self.args, m)]
        teacher = load_teacher(self.args.output, self.args.dtype, self.args.device)
        network, of = teacher, "teacher"
        for method, c in tqdm(jobs, desc="evaluate", mininterval=0.5, dynamic_ncols=True):
            if method != of:
                network, of = load_student(self.args.output, method, teacher), method
            images = self.draw(method, network, c)
            features, answers = self._judge(images)
            if method == "teacher" and c.k == self.args.solver_steps:
                self.reference = images, features
            self._keep(method, c, images, features, answers == self.label)

    def draw(self, method: str, network, c: Case) -> Tensor:
        """The pictures of a case (n, 3, 32, 32), from their file where they lie there."""
        w = c.w if c.tune is None else tuned(c.w, c.tune)
        about = {"of": self.made_of[method], "n": self.n, "seed": self.args.seed, "w": w,
                 "timesteps": timesteps(self.args, c), **asdict(c)}  # fmt: skip
        # By the weights and all settings: another model's or setting's samples have another name.
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        path = cli.output_folder(self.args.output / "samples") / f"{method}-{key}.safetensors"
        if path.exists():
            images = read_tensors(path)[0]["images"]
        else:
            # Not the seeds of training, whose noise came from small numbers too.
            seeds = range(self.args.seed + 1_000_000, self.args.seed + 1_000_000 + self.n)
            parts = pictures(
                network, self.label, seeds, about["timesteps"], w, c.gamma, c.clip_steps
            )
            images = torch.cat(list(parts))
            with cli.whole(path) as part:
                save_file({"images": images}, part, {"about": json.dumps(about)})
        self.samples[method, c] = images
        return images

    def _keep(self, method: str, c: Case, images, features, right, paired=True) -> None:
        """A row: each figure with its standard error."""
        reference, known = self.reference
        bits = png_bits(images)
        statistics = {
            "frechet_data": lambda i: frechet(moments(features[i]), self.data),
            "frechet_teacher": lambda i: frechet(moments(features[i]), moments(known[i])),
            "agreement": lambda i: right[i].double().mean().item(),
            "png_bits": lambda i: bits[i].mean().item(),
        }
        # With noise between the steps a sample is another one, however good.
        if paired and c.gamma == 0:
            statistics["rmse"] = lambda i: rmse(images[i], reference[i])
        row = {"method": method, **asdict(c), "n": len(images)}
        for name, statistic in statistics.items():
            value, error = jackknife(statistic, len(images))
            row[name] = {"value": value, "error": error}
        self.rows.append(row)

    def find(self, method: str, c: Case) -> dict | None:
        """The row of a case; the teacher's is guided by the w that students distil."""
        wanted = {"method": method, **asdict(c)}
        if method == "teacher":
            wanted["w"] = self.args.guidance - 1
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    @staticmethod
    def _case(row: dict) -> Case:
        return Case(**{field.name: row[field.name] for field in fields(Case)})

    @property
    def methods(self) -> list[str]:
        """The teacher, then every student of the main comparison."""
        aside = ("real", "tdd_rho0", "tdd_high")
        return list(dict.fromkeys(r["method"] for r in self.rows if r["method"] not in aside))

    def tables(self) -> list[str]:
        """Every table that is worth printing."""
        plain = ("frechet_teacher", "rmse", "frechet_data", "agreement", "png_bits")
        return [*map(self.table, plain), self.table("frechet_teacher", 0.2), self.study()]

    def study(self) -> str:
        """The guidance study and the non-equidistant schedules, a row a case."""
        lines = [f"{'also':10}" + " k   w  as w'  C in  timesteps      agreement  frechet_data"]
        plain = [
            ("real", case(0)),
            *((m, case(k)) for m in self.methods for k in steps_of(self.args)),
        ]
        for row in self.rows:
            method, c = row["method"], self._case(row)
            if method == "teacher" or c.gamma or (method, c) in plain:
                continue
            lines.append(
                f"{method:10}{c.k:2}{c.w:4g}{c.tune or 0:7g}{c.clip_steps:6}  {c.schedule:14}"
                + _cell(row, "agreement") + _cell(row, "frechet_data")
            )  # fmt: skip
        return "\n".join(lines)

    def table(self, metric: str, gamma: float = 0.0) -> str:
        """A figure of every method over k, with its standard error in brackets."""
        ks = (
            steps_of(self.args) if gamma == 0 else sorted({r["k"] for r in self.rows if r["gamma"]})
        )
        head = f"{metric + (f', gamma {gamma:g}' if gamma else ''):28}"
        lines = [head + "".join(f"{'k = ' + str(k):>14}" for k in ks)]
        for method in self.methods:
            found = [self.find(method, case(k, gamma=gamma)) for k in ks]
            lines += [f"{method:28}" + "".join(map(_cell, found, [metric] * len(ks)))] * any(found)
        for k in (self.args.solver_steps // 2, self.args.solver_steps) if gamma == 0 else ():
            row = self.find("teacher", case(k))
            lines.append(f"{f'teacher, {k} steps':28}" + _cell(row, metric))
        if metric != "rmse":
            lines.append(f"{'test pictures':28}" + _cell(self.rows[0], metric))
        return "\n".join(lines)


def _cell(row: dict | None, metric: str) -> str:
    if row is None or metric not in row:
        return " " * 14
    found = row[metric]
    return f"{found['value']:.3f} ({found['error']:.3f})".rjust(14)
