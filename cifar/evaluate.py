"""How near CIFAR-10 students come to their teacher and to the data: distances, rows, tables.

All methods are sampled with the same labels and starting noise. A jackknife over the seeds, a tenth
left out at a time, gives each figure's standard error.
"""

import hashlib
import io
import json
from dataclasses import asdict, replace

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cifar.classifier import Classifier, classify
from cifar.config import GUIDANCE_STUDY, SEED, CifarConfig, student_config
from cifar.data import CLASSES
from cifar.sample import LoadedModel, load_student, load_teacher, sample_pictures
from cifar.stage import weights_digest
from common import compare, files
from common.compare import GAMMAS, W_ADDED, W_HIGH, Case
from solvers import ddim, solve
from tdd import equidistant

GROUPS = 10  # of pictures, for the errors
METRICS = ("frechet_teacher", "frechet_unpaired", "rmse", "frechet_data", "accuracy", "png_bits")
# Rows beside the main comparison; "other_seeds" is the teacher's samples from other noise.
NOT_COMPARED = ("real", "other_seeds", *GUIDANCE_STUDY)
TOLD_WRONG = ("tdm_unify", "tdd_k4", "tdd_k")  # students that are told other K than k too


# --------------------------------------------------------------------------------------- distances
#
# The Fréchet distance asks whether the distribution of samples is right (Heusel et al. 2017, with
# our classifier's features), rmse whether each sample is where the teacher would have put it. From
# the same noise as the teacher's samples, a sampler's Fréchet distance is the smaller the more its
# samples are those very ones; from other noise it says how alike the distributions are, above a
# floor that the teacher's own samples from other seeds show.


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of features (n, d)."""
    return features.mean(0), features.T.cov()


def reference(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of features (n, d) and the root of their covariance, which is costly to compute."""
    mean, covariance = moments(features)
    values, vectors = torch.linalg.eigh(covariance)
    return mean, covariance, vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> float:
    """Squared Fréchet distance |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two Gaussians."""
    (mean_a, cov_a), (mean_b, cov_b, root_b) = a, b  # from `moments`, from `reference`
    # The square root of C C' has the trace of that of the symmetric C'^(1/2) C C'^(1/2).
    cross = torch.linalg.eigvalsh(root_b @ cov_a @ root_b).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def rmse(a: Tensor, b: Tensor) -> float:
    """Root mean squared difference of pictures in uint8, on the scale of x_0, [-1, 1]."""
    return ((a.float() - b.float()) / 127.5).square().mean().sqrt().item()


def png_bits(images: Tensor) -> Tensor:
    """Bits a pixel of each picture as a PNG (n,): a measure of how much there is to see in it."""
    bits = []
    for x in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(x).save(file, "PNG")
        bits.append(8 * len(file.getvalue()) / (32 * 32))
    return torch.tensor(bits)


def subsets(n: int) -> list[Tensor]:
    """The indices of all n pictures, then of all but one of GROUPS groups, for each group."""
    # Groups of neighbours hold as many pictures of every class.
    group = torch.arange(n) * GROUPS // n
    return [torch.arange(n), *(torch.where(group != g)[0] for g in range(GROUPS))]


def jackknife(values: list[float]) -> dict[str, float]:
    """A figure and its standard error, from the figure's values on `subsets`."""
    value, *without_group = values
    variance = torch.tensor(without_group, dtype=torch.float64).var(correction=0) * (GROUPS - 1)
    return {"value": value, "error": variance.sqrt().item()}


# -------------------------------------------------------------------------------------------- cases
#
# x_0 is clipped in all steps, as pixels need it, except in the cases of Fig. 7.


def make_case(
    k, clip_steps=None, gamma=0.0, schedule="equidistant", w=0.0, tune=None, tell_k=None
) -> Case:
    """A case of k steps, all of them clipped unless clip_steps is given."""
    return Case(k, gamma, schedule, w, tune, k if clip_steps is None else clip_steps, tell_k)


def method_cases(config: CifarConfig, method: str) -> list[Case]:
    """All ways to sample a method that the tables and pictures need, each once."""
    k, kmax = config.kmin, config.kmax
    # Fig. 6 (a): guidance at inference, for students trained with null conditions and without.
    added_guidance = [make_case(k, w=w) for w in W_ADDED]
    if method == "tdd_rho0":
        return [make_case(k), *added_guidance]
    if method == "tdd_high":
        # Fig. 6 (b): as distilled, and tuned to weaker guidance by Eq. 13.
        return [make_case(k), *(make_case(k, w=w, tune=W_HIGH) for w in W_ADDED)]
    # Figs. 4 and 5: over the number of steps, without noise and with a little.
    w, ks = 0.0, compare.compared_steps(k, kmax)
    if method == "teacher":
        # Its many steps come first: their samples are what all others are compared with.
        w, ks = config.w, [config.solver_steps, config.solver_steps // 2, *ks]
    cases = [make_case(n, w=w) for n in ks]
    cases += [make_case(n, tell_k=K) for n, K in told_wrong(config, method)]
    if SEED in method:
        return cases
    cases += [make_case(n, w=w, gamma=GAMMAS[1]) for n in sorted({k, (k + kmax) // 2, kmax})]
    if method == "tdd":
        cases += added_guidance
        cases += [make_case(n, schedule="nonequidistant") for n in range(k + 1, kmax)]
        # Fig. 7: clipped in no step and in the first alone, guided or not.
        for w in (0.0, *W_ADDED[:2]):
            cases += [make_case(k, clip_steps=0, w=w), make_case(k, clip_steps=1, w=w)]
    return list(dict.fromkeys(cases))


def told_steps(config: CifarConfig, method: str) -> list[int]:
    """The steps k, and the K to tell in them, each with each (TDM's Fig. 10): 1, 2, 4, 6, 8."""
    if method.partition(SEED)[0] not in TOLD_WRONG:
        return []
    compared = compare.compared_steps(config.kmin, config.kmax)
    told_ks = student_config(config, method).told_ks
    return [K for K in told_ks if K in compared and (K == 1 or K % 2 == 0)]


def told_wrong(config: CifarConfig, method: str) -> list[tuple[int, int]]:
    """Pairs of k and another K to tell: of a repeat the two ends alone."""
    Ks = told_steps(config, method)
    if SEED in method:
        Ks = list(dict.fromkeys([*Ks[:1], *Ks[-1:]]))
    return [(k, K) for k in Ks for K in Ks if k != K]


# -------------------------------------------------------------------------------------- evaluation
#
# Sampling takes nearly all of the time, so samples are kept in files that are named by what they
# depend on: an interrupted evaluation reuses them; other settings give other names.


class Evaluation:
    """Samples of all methods, kept as files, and the rows of metrics.json.

    rows, samples: by method and case; of the samples ten, one of each class. test_accuracy: the
    classifier's, on the test pictures.
    """

    def __init__(self, config: CifarConfig, classifier: Classifier, train, test):
        self.config, self.classifier = config, classifier
        self.label = torch.arange(config.samples) % len(CLASSES)
        # Not the seeds of training, which are small numbers.
        first_seed = config.seed + 1_000_000
        self.seeds = range(first_seed, first_seed + config.samples)
        self.other_seeds = range(self.seeds.stop, self.seeds.stop + config.samples)
        self.subsets = subsets(config.samples)
        self.ks = compare.compared_steps(config.kmin, config.kmax)
        self.rows: dict[tuple[str, Case], dict] = {}
        self.samples: dict[tuple[str, Case], Tensor] = {}
        # A classifier's features have no unit: distances are in per cent of their total variance
        # over the training pictures.
        features, _ = classify(classifier, train[0], config.device)
        self.scale = (moments(features)[1].trace() / 100).sqrt()
        self.data_reference = reference(features / self.scale)
        # (k, gamma, schedule) -> samples from this noise as if every jump were exact.
        self.exact: dict[tuple, Tensor] = {}
        # The row of the test pictures: smaller distances than theirs mean nothing. As few training
        # pictures stand for the teacher as there will be samples of it.
        n = config.samples
        images, label = test
        self._set_teacher_reference(None, self._classify(train[0][:n])[0])
        features, predictions = self._classify(images)
        correct = predictions == label
        self.test_accuracy = correct.double().mean().item()
        self._add_row("real", make_case(0), images[:n], features[:n], correct[:n], None)

    def _classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, predictions = classify(self.classifier, images, self.config.device)
        return features / self.scale, predictions

    def _set_teacher_reference(self, images: Tensor | None, features: Tensor) -> None:
        """The samples that frechet_teacher and rmse are distances to."""
        self.teacher_images = images
        self.teacher_references = [reference(features[i]) for i in self.subsets]
        self.unpaired_reference: tuple | None = None

    def run(self, methods: tuple[str, ...]) -> None:
        """The rows of the teacher and of these students."""
        config, jobs = self.config, []
        for method in ("teacher", *methods):
            jobs += [(method, case) for case in method_cases(config, method)]
        teacher = load_teacher(config.output, config.device)
        model, loaded, w_distilled = LoadedModel(teacher), "teacher", 0.0
        for method, case in tqdm(jobs, desc="evaluate", mininterval=0.5, dynamic_ncols=True):
            if method != loaded:
                model, loaded = load_student(config.output, method, teacher), method
                w_distilled = student_config(config, method).w[0]
            images = self.sample(method, model, case)
            features, predictions = self._classify(images)
            if method == "teacher" and case.k == config.solver_steps and case.gamma == 0:
                self._set_teacher_reference(images, features)
                self._add_other_seeds(model, case)
            if case.gamma > 0:
                self._add_exact(LoadedModel(teacher), case)
            # Eq. 22: guidance on top of distilled guidance multiplies, in terms of g = 1 + w.
            w = (1 + case.w_inference) * (1 + w_distilled) - 1
            self._add_row(method, case, images, features, predictions == self.label, w)

    def _add_other_seeds(self, teacher: LoadedModel, case: Case) -> None:
        """The teacher's row from other noise, and what unpaired distances are measured to."""
        images = self.sample("teacher", teacher, case, self.other_seeds)
        features, predictions = self._classify(images)
        self._add_row("other_seeds", case, images, features, predictions == self.label, case.w)
        self.unpaired_reference = reference(features)

    def _add_exact(self, teacher: LoadedModel, case: Case) -> None:
        """What a case with noise would give were every jump the teacher's in many small steps."""
        key = case.k, case.gamma, case.schedule
        if key not in self.exact:
            case = replace(case, w=self.config.w, tune=None)
            model = replace(teacher, jump=self.exact_jump)
            self.exact[key] = self.sample("teacher", model, case, self.seeds, exact=True)

    def exact_jump(self, eps, x_t: Tensor, t: int, s: int, schedule) -> Tensor:
        """DDIM from t to s by way of all of the teacher's own timesteps between."""
        N = self.config.solver_steps
        between = [u for u in equidistant(N, N) if s < u < t]
        return solve(eps, x_t, [t, *between, s], schedule, ddim)

    def sample(
        self, method: str, model: LoadedModel, case: Case, seeds=None, exact: bool = False
    ) -> Tensor:
        """The pictures of a case (n, 3, 32, 32) in uint8, from their file if there is one."""
        config, seeds = self.config, seeds or self.seeds
        timesteps = compare.case_timesteps(case, config.solver_steps, config.kmin, config.kmax)
        settings = {
            "weights": weights_digest(config.output / method), "n": config.samples,
            "seed": seeds.start, "timesteps": timesteps, "device": config.device, "exact": exact,
            **asdict(case),
        }  # fmt: skip
        if exact:
            settings["solver_steps"] = config.solver_steps
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        path = files.output_folder(config.output / "samples") / f"{method}-{key}.safetensors"
        if path.exists():
            return files.read_tensors(path)[0]["images"]
        images = sample_pictures(model, self.label, seeds, timesteps, case)
        files.write_tensors(path, {"images": images}, settings=json.dumps(settings))
        return images

    def _add_row(self, method: str, case: Case, images, features, correct, w: float | None) -> None:
        """A row: each figure with its standard error.

        correct: (n,) where the classifier is right. w: total guidance, None for real pictures.
        """
        bits = png_bits(images)
        sample_moments = [moments(features[i]) for i in self.subsets]
        figures = {
            "frechet_data": [frechet(m, self.data_reference) for m in sample_moments],
            "accuracy": [correct[i].double().mean().item() for i in self.subsets],
            "png_bits": [bits[i].mean().item() for i in self.subsets],
        }
        # Samples of other guidance are other samples than the teacher's, and should be.
        if w is None or abs(w - self.config.w) < 1e-9:
            pairs = zip(sample_moments, self.teacher_references, strict=True)
            figures["frechet_teacher"] = [frechet(m, teacher) for m, teacher in pairs]
            if (other := self.unpaired_reference) is not None:
                figures["frechet_unpaired"] = [frechet(m, other) for m in sample_moments]
            # With noise between the steps samples are others than the ODE's, however exact.
            exact = self.exact.get((case.k, case.gamma, case.schedule), self.teacher_images)
            if exact is not None and method != "other_seeds":
                figures["rmse"] = [rmse(images[i], exact[i]) for i in self.subsets]
        row = {"method": method, **asdict(case), "n": len(images)}
        self.rows[method, case] = row | {name: jackknife(v) for name, v in figures.items()}
        self.samples[method, case] = images[: len(CLASSES)]

    # ---------------------------------------------------------------------------------- tables

    def find(self, method: str, case: Case) -> dict | None:
        """The row of a case, if any; the teacher's is guided by the w that students distil."""
        if method == "teacher":
            case = replace(case, w=self.config.w)
        return self.rows.get((method, case))

    @property
    def methods(self) -> list[str]:
        """The teacher, then every student of the main comparison."""
        names = dict.fromkeys(name for name, _ in self.rows if name not in NOT_COMPARED)
        return [name for name in names if SEED not in name]

    def trainings(self, method: str) -> list[str]:
        """The method and its repeats."""
        names = dict.fromkeys(name for name, _ in self.rows)
        return [name for name in names if name.partition(SEED)[0] == method]

    def figure(self, method: str, metric: str, case: Case) -> tuple[float, float]:
        """A figure and its error; of several trainings that have the case, mean and deviation.

        (0, 0) without a row.
        """
        rows = [self.find(name, case) for name in self.trainings(method)]
        figures = [row[metric] for row in rows if row and metric in row]
        if not figures:
            return 0.0, 0.0
        if len(figures) == 1:
            return figures[0]["value"], figures[0]["error"]
        values = torch.tensor([figure["value"] for figure in figures], dtype=torch.float64)
        return values.mean().item(), values.std().item()

    def tables(self) -> list[str]:
        """Every table that is worth printing."""
        tables = [self.table(metric) for metric in METRICS]
        noisy = [self.table(metric, GAMMAS[1]) for metric in ("frechet_teacher", "rmse")]
        repeats = []
        if any(len(self.trainings(method)) > 1 for method in self.methods):
            repeats = [self.repeats_table(metric) for metric in ("rmse", "frechet_unpaired")]
        return [*tables, *noisy, *repeats, self.study_table()]

    def table(self, metric: str, gamma: float = 0.0) -> str:
        """A figure of every method over k, with its standard error in brackets."""
        lines = []
        for method in self.methods:
            rows = [self.find(method, make_case(k, gamma=gamma)) for k in self.ks]
            lines.append((method, [_cell(row, metric) for row in rows]))
        # In its many steps the teacher is sampled without noise only.
        if gamma == 0:
            for k in (self.config.solver_steps // 2, self.config.solver_steps):
                cell = _cell(self.find("teacher", make_case(k)), metric)
                lines.append((f"teacher, {k} steps", [cell]))
            floor = self.find("other_seeds", make_case(self.config.solver_steps, w=self.config.w))
            lines.append(("teacher, other seeds", [_cell(floor, metric)]))
        lines.append(("test pictures", [_cell(self.find("real", make_case(0)), metric)]))
        return compare.format_table(f"{metric} at gamma = {gamma:g}", self.ks, lines, 30, 16)

    def repeats_table(self, metric: str) -> str:
        """A figure over k of methods of several trainings, with their deviation in brackets."""

        def cell(method: str, case: Case) -> str:
            mean, deviation = self.figure(method, metric, case)
            return f"{mean:.4f} ({deviation:.4f})"

        lines = []
        for method in self.methods:
            if len(names := self.trainings(method)) > 1:
                cells = [cell(method, make_case(k)) for k in self.ks]
                lines.append((f"{method}, {len(names)} trainings", cells))
                for steps, K in told_wrong(self.config, names[-1]):
                    case = make_case(steps, tell_k=K)
                    cells = [cell(method, case) if k == steps else "" for k in self.ks]
                    lines.append((f"{method}, told {K}", cells))
        return compare.format_table(f"{metric}, several trainings", self.ks, lines, 30, 18)

    def study_table(self) -> str:
        """Guidance, Eq. 13, clipping, other timesteps, K told: a line a case."""
        compared = [make_case(k) for k in self.ks]
        metrics = ("accuracy", "frechet_data", "frechet_teacher", "rmse")
        titles = "".join(f"{metric:>16}" for metric in metrics)
        lines = [f"method    k  told  w  w'  C in  timesteps     {titles}"]
        for (method, case), row in self.rows.items():
            in_tables = (case in compared and method not in NOT_COMPARED) or SEED in method
            if method in ("teacher", "other_seeds", "real") or case.gamma > 0 or in_tables:
                continue
            tune = "-" if case.tune is None else f"{case.tune:g}"
            settings = f"{method:9}{case.k:2}{case.tell_k or '-':>6}{case.w:3g}{tune:>4}"
            settings += f"{case.clip_steps:6}"
            cells = "".join(_cell(row, metric) for metric in metrics)
            lines.append(f"{settings}  {case.schedule:14}{cells}")
        return "\n".join(lines)


def _cell(row: dict | None, metric: str) -> str:
    if row is None or metric not in row:
        return " " * 16
    figure = row[metric]
    return f"{figure['value']:.3f} ({figure['error']:.3f})".rjust(16)
