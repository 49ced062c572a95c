"""How near few-step samples come to what the teacher's PF-ODE would give: rmse and Wasserstein."""

from dataclasses import asdict
from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from common import compare
from common.compare import GAMMAS, W_ADDED, W_HIGH, Case
from solvers import CLEAN, SOLVERS, ddim, dpmpp_2m, solve
from tcd import tcf_2
from tdd import clip_x0, conditioned, equidistant, gamma_sample, guided
from tdm import nearest
from toy.config import ToyConfig
from toy.data import CLASSES, Data, one_hot, rmse, sliced_wasserstein
from toy.model import BatchedMLP
from toy.students import PLAIN, Group, Student

# ------------------------------------------------------------------------------------ evaluation
#
# Against the teacher's ODE samples a sampler with noise would always look wrong, however exact: its
# samples are other ones. The reference therefore gets the same step noise.


class Evaluation:
    """Samples students and teacher from the same noise, and measures how far each is off.

    The reference is the sampler of a perfect student: the same schedule, starting noise and step
    noise, but every jump the teacher's many-step solution, guided by the w' that the student
    distils; at gamma = 0 that is the ODE's endpoint. Where the student is itself guided (Eq. 12)
    so are the exact jumps: (1 + w) Phi(w') - w Phi(null).

    Rows of a batch are laid out "(n m s)": samples, methods, seeds.
    """

    def __init__(self, config: ToyConfig, teacher: BatchedMLP, data: Data):
        self.config, self.teacher, self.data = config, teacher, data
        self.schedule = schedule = teacher.schedule
        # Both halves, every second sample, hold each class equally often.
        self.label = torch.arange(config.samples // 8 * 8) // 2 % CLASSES
        # Equal steps in lam, on whole timesteps: 75 evaluations come as close (rmse 0.007 to 1,000
        # steps) as 200 equal in t.
        ends = schedule.lam(torch.tensor([schedule.T - 1, 0]))
        lam = torch.linspace(*ends.tolist(), config.reference_steps, dtype=torch.float64)
        self.fine = schedule.t_of_lam(lam).round().int().unique().flip(0).tolist()
        self.rows = {}  # (method, variant, case, metric) -> row of metrics.json
        self.efficiency = {}  # (method, k, steps of training) -> row of metrics.json
        self.samples = {}  # (method, variant, case) -> (s, n, 2), for the pictures
        self.references = {}  # (case, w, w_distilled) -> (s, n, 2)

    def noise(self, members: int):
        """The starting noise, then the step noise: the same for every method and case."""
        # Not the seed of training, whose first numbers were the teacher's weights.
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        while True:
            z = torch.randn((len(self.label), self.config.seeds, 2), generator=generator)
            yield repeat(z, "n s d -> (n m s) d", m=members)

    def cond(self, members: int) -> Tensor:
        return repeat(one_hot(self.label), "n c -> (n r) c", r=members * self.config.seeds)

    # -------------------------------------------------------------------------------- sampling

    def sample(
        self, network: BatchedMLP, case: Case, w: float, jump=ddim, callback=None, Ks=None
    ) -> Tensor:
        """The gamma-sampler's x_0 of networks "(m s)", guided by w at inference; (m, s, n, 2).

        Ks: of each of m networks that are told K, those that it knows; told k unless given.
        """
        config, members = self.config, network.members // self.config.seeds
        noise = self.noise(members)
        if network.scalar == "num_steps":
            Ks = Ks or [(case.k,)] * members
            network = self.told(network, [nearest(case.k, known) for known in Ks])
        eps = guided(network, self.cond(members), torch.zeros(1, CLASSES), w)
        x = gamma_sample(
            eps, next(noise), compare.case_timesteps(case, config.N, config.kmin, config.kmax),
            self.schedule, case.gamma, noise, self.clip, case.clip_steps, jump, callback,
        )  # fmt: skip
        return rearrange(x, "(n m s) d -> m s n d", m=members, s=config.seeds)

    def told(self, network: BatchedMLP, K: list[int]):
        """The networks "(m s)", each told its K."""
        values = repeat(torch.tensor(K), "m -> (m s)", s=self.config.seeds)

        def model(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return network(x_t, t, cond, values.repeat(len(t) // len(values)))

        return model

    def solution(self, network: BatchedMLP, k: int, w: float, solver: str) -> Tensor:
        """x_0 of networks "(m s)" by k steps of one of SOLVERS, guided by w; (m, s, n, 2)."""
        stops = [*equidistant(k, self.config.N), CLEAN]

        # The gamma-sampler is for one-step solvers: another's whole solution is one jump to it.
        def jump(model, x_t, t, s, schedule):
            return solve(model, x_t, stops, schedule, SOLVERS[solver]())

        return self.sample(network, Case(1), w, jump=jump)

    def clip(self, x_0: Tensor) -> Tensor:
        """C of Eq. 17, to the square that holds the data; pixels lie in [-1, 1] instead."""
        return self.data.bound * clip_x0(x_0 / self.data.bound)

    def reference(self, case: Case, w: float, w_distilled: float) -> Tensor:
        """What the case would give were every jump exact; (s, n, 2)."""
        # Unguided and without noise exact jumps compose: whatever the stops, the ODE's endpoint.
        case = Case(1) if case.gamma == w == 0 else Case(case.k, case.gamma, case.schedule)
        key = case, round(w, 6), round(w_distilled, 6)
        if key not in self.references:
            null = torch.zeros_like(self.cond(1))
            conditional = guided(self.teacher, self.cond(1), null, w_distilled)
            unconditional = conditioned(self.teacher, null)

            def exact_jump(model, x_t, t, s, schedule):
                x_s = self.follow(conditional, x_t, t, s)
                return x_s if w == 0 else (1 + w) * x_s - w * self.follow(unconditional, x_t, t, s)

            self.references[key] = self.sample(self.teacher, case, 0.0, jump=exact_jump)[0]
        return self.references[key]

    def follow(self, eps, x_t: Tensor, t: int, s: int, callback=None) -> Tensor:
        """The PF-ODE from t to s in small steps of second order."""
        stops = [t, *(u for u in self.fine if s < u < t), s]
        return solve(eps, x_t, stops, self.schedule, dpmpp_2m(), callback)

    # ------------------------------------------------------------------------------------ rows

    def teacher_row(self, case: Case, solver: str = "") -> None:
        """The teacher itself with k guided steps of DDIM, or of another of SOLVERS."""
        w = self.config.w
        if solver:
            x = self.solution(self.teacher, case.k, w, solver)[0]
        else:
            x = self.sample(self.teacher, case, w)[0]
        # Guided, an evaluation is two passes. The step to CLEAN is Eq. 16 in any solver.
        evaluations = 2 * case.k - 1 if solver in TWO_EVALUATIONS else case.k
        passes = evaluations * (1 if w == 0 else 2)
        self._add_rows("teacher", solver, case, w, x, self.reference(case, 0.0, w), passes)

    def student_rows(self, group: Group, indices: list[int], case: Case) -> None:
        """The group's students of these indices, all seeds of each."""
        w = case.w_inference
        passes = case.k * (1 if w == 0 else 2) * (2 if group.jump is tcf_2 else 1)
        Ks = [group.students[i].Ks for i in indices]
        samples = self.sample(group.select(indices), case, w, jump=group.jump, Ks=Ks)
        for i, x in zip(indices, samples, strict=True):
            student = group.students[i]
            reference = self.reference(case, w, student.w)
            # How far is a guided student from the teacher it stands for? Eq. 13 is judged by this.
            # Eq. 22: guidance on distilled guidance multiplies, in terms of g = 1 + w.
            w_teacher = (1 + w) * (1 + student.w) - 1
            endpoint = None if w == 0 else self.reference(Case(1), 0.0, w_teacher)
            self._add_rows(
                student.method, student.variant, case, case.w, x, reference, passes, endpoint
            )

    def efficiency_rows(self, group: Group, indices: list[int], share: float, k: int) -> None:
        """How near these students were after a share of their training, unguided, at gamma = 0."""
        Ks = [group.students[i].Ks for i in indices]
        samples = self.sample(group.select(indices, share), Case(k), 0.0, jump=group.jump, Ks=Ks)
        for i, x in zip(indices, samples, strict=True):
            student = group.students[i]
            per_seed = rmse(x, self.reference(Case(k), 0.0, student.w))
            # In steps of the main comparison: those of others take more passes, and are fewer.
            steps = round(share * self.config.steps)
            row = {"method": student.method, "k": k, "steps": steps, "metric": "rmse"}
            self.efficiency[student.method, k, steps] = row | seed_statistics(per_seed)

    def _add_rows(
        self, method, variant, case, w: float, x, reference, passes: int, endpoint=None
    ) -> None:
        """Rows of a case: rmse, sw, and with an endpoint the rmse to the teacher's guided ODE.

        passes: of a network, for one sample.
        """
        values = {"rmse": rmse(x, reference), "sw": self.sw(x, reference)}
        if endpoint is not None:
            values["rmse_teacher"] = rmse(x, endpoint)
        self.samples[method, variant, case] = x
        for metric, per_seed in values.items():
            if not per_seed.isfinite().all():
                raise ValueError(f"{method} {variant} sampled no numbers: {case}; lower --guidance")
            row = {"method": method, "variant": variant, **asdict(case), "w": w, "passes": passes,
                   "metric": metric}  # fmt: skip
            self.rows[method, variant, case, metric] = row | seed_statistics(per_seed)

    def sw(self, x: Tensor, y: Tensor) -> Tensor:
        """sliced_wasserstein of independent halves: x and y may come from the same noise; (s,)."""
        return sliced_wasserstein(x[:, ::2], y[:, 1::2], self.label[::2])

    # ---------------------------------------------------------------------------------- tables

    def find(self, method: str, case: Case, metric="rmse", variant="") -> dict | None:
        """The row of a case; the teacher's needs no w, which is the one that students distil."""
        return self.rows.get((method, variant, case, metric))

    @property
    def methods(self) -> list[str]:
        """The teacher, then every student at the main guidance."""
        return list(dict.fromkeys(method for method, variant, *_ in self.rows if not variant))

    def table(self, metric: str, gamma: float) -> str:
        """A metric's mean for every method over k, with * on the non-equidistant schedule."""
        ks, lines = compare.compared_steps(self.config.kmin, self.config.kmax), []
        entries = [("teacher", solver, "equidistant", f" {solver}") for solver in TEACHER_SOLVERS]
        for schedule, mark in (("equidistant", ""), ("nonequidistant", " *")):
            entries += [(method, "", schedule, mark) for method in self.methods]
        for method, variant, schedule, mark in entries:
            rows = [self.find(method, Case(k, gamma, schedule), metric, variant) for k in ks]
            if any(rows):
                cells = [f"{row['mean']:.3f}" if row else "" for row in rows]
                lines.append((method + mark, cells))
        return compare.format_table(f"{metric} at gamma = {gamma:g}", ks, lines, 21, 9)

    def efficiency_table(self, k: int) -> str:
        """rmse at gamma = 0 in k steps for every method over the steps that it was trained for."""
        steps = sorted({steps for _, _, steps in self.efficiency})
        lines = []
        for method in dict.fromkeys(method for method, *_ in self.efficiency):
            rows = [self.efficiency.get((method, k, n)) for n in steps]
            lines.append((method, [f"{row['mean']:.3f}" if row else "" for row in rows]))
        return compare.format_table(f"rmse, k = {k}, after", steps, lines, 21, 13, "{} steps")

    def noise_floor(self) -> dict:
        """sw between independent halves of the main references: no method can come below it."""
        floors = {}
        for gamma in GAMMAS:
            distances = []
            for (case, w, w_distilled), x in self.references.items():
                if case.gamma == gamma and w == 0 and w_distilled == round(self.config.w, 6):
                    distances.append(self.sw(x, x))
            if distances:
                per_seed = torch.stack(distances).mean(0)
                floor = {"per_seed": per_seed.tolist(), "mean": per_seed.mean().item()}
                floors[f"gamma {gamma:g}"] = floor
        return {"sw": floors}


def seed_statistics(per_seed: Tensor) -> dict:
    """The last fields of a row: a value for each seed (s,), their mean and deviation."""
    std = per_seed.std().item() if len(per_seed) > 1 else 0.0
    return {"per_seed": per_seed.tolist(), "mean": per_seed.mean().item(), "std": std}


# ----------------------------------------------------------------------------------------- cases
#
# Main cases are Figs. 4 and 5; the others, Figs. 6 and 7, add guidance at inference. The teacher
# has better solvers beside DDIM (TCD's Table 1), and students are sampled with more noise and in
# more steps than they are trained for (TCD's Figs. 3, 5, 6 and 8).

TEACHER_SOLVERS = ("dpm++2m", "dpm++2s")
TWO_EVALUATIONS = ("dpm++2s",)  # a step
SWEPT = ("tcd", "tdd", "tcds", "tdds")
MORE_STEPS = (12, 16, 20)
SWEEP_GAMMAS = (0.5, 1.0)


def main_cases(config: ToyConfig) -> list[Case]:
    """Every k and gamma on the equidistant schedule; between kmin and kmax on the other as well."""
    cases = []
    for gamma in GAMMAS:
        cases += [Case(k, gamma) for k in compare.compared_steps(config.kmin, config.kmax)]
        between = range(config.kmin + 1, config.kmax)
        cases += [Case(k, gamma, "nonequidistant") for k in between]
    return cases


def more_steps(config: ToyConfig) -> list[int]:
    """Those of MORE_STEPS that are more than students are trained for and that the grid has."""
    return [k for k in MORE_STEPS if config.kmax < k <= config.N]


def group_cases(config: ToyConfig, group: Group) -> list[tuple[list[int], Case]]:
    """All cases of a group, each with the indices of its students."""
    plain, ends = group.plain, config.ends
    low = [i for i, student in enumerate(group.students) if student.variant == "w'=1"]
    high = [i for i, student in enumerate(group.students) if i not in (*plain, *low)]
    jobs = [(plain, case) for case in main_cases(config)]
    if isinstance(group.students[0], Student) and group.students[0].kind == PLAIN:
        clips = sorted({0, 1, config.kmin})
        # Fig. 6a compares rho 0 with rho, Fig. 6b is about Eq. 13, Fig. 7 about x_0 clipping.
        for k in ends:
            jobs += [(low, Case(k, w=w)) for w in (0.0, *W_ADDED)]
        jobs += [(high, Case(k)) for k in ends]
        for k in ends:
            jobs += [(high, Case(k, w=w, tune=W_HIGH)) for w in W_ADDED]
        tdd = [i for i in plain if group.students[i].method == "tdd"]
        for w in W_ADDED[:2]:
            jobs += [(tdd, Case(config.kmin, w=w, clip_steps=n)) for n in clips]
    else:
        # Between kmin and kmax the other schedule is TDD's own question.
        jobs = [job for job in jobs if job[1].schedule == "equidistant"]
    swept = [i for i in plain if group.students[i].method in SWEPT]
    jobs += [(swept, Case(k)) for k in more_steps(config)]
    jobs += [(swept, Case(k, gamma)) for gamma in SWEEP_GAMMAS for k in ends]
    return [job for job in jobs if job[0]]  # of students that this run has


def evaluate(groups: list[Group], ev: Evaluation) -> None:
    """Every row of metrics.json: the main cases for teacher and students, then guided students."""
    config = ev.config
    jobs = [partial(ev.teacher_row, case) for case in main_cases(config)]
    for solver in TEACHER_SOLVERS:
        ks = compare.compared_steps(config.kmin, config.kmax)
        jobs += [partial(ev.teacher_row, Case(k), solver) for k in ks]
    for group in groups:
        jobs += [partial(ev.student_rows, group, *job) for job in group_cases(config, group)]
        # A training of a few steps has no snapshot of some shares.
        for share in (*group.snapshots, 1.0) if group.plain else ():
            for k in config.ends:
                jobs.append(partial(ev.efficiency_rows, group, group.plain, share, k))
    for job in tqdm(jobs, desc="evaluate", mininterval=0.5, dynamic_ncols=True):
        job()
