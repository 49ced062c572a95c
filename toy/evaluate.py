"""How near few-step samples come to what the teacher's PF-ODE would give: rmse and Wasserstein."""

from dataclasses import asdict

import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from common.compare import GAMMAS, Case, steps_of, table_of, timesteps_of
from solvers import Schedule, dpmpp_2m, solve
from tcd import tcf_1
from tdd import bind, clip_x0, gamma_sample, guided, told, tuned
from toy.data import CLASSES, Data, one_hot, rmse, sliced_wasserstein
from toy.model import Ensemble
from toy.students import Group, Student


class Evaluation:
    """Samples students and teacher from the same noise, and holds them against the reference.

    The reference is the sampler of a perfect student: the same schedule, starting noise and step
    noise, but every jump the teacher's many-step solution, guided by the w' that the student
    distils; at gamma = 0 that is the ODE's endpoint. Where the student is itself guided (Eq. 12)
    so are the exact jumps: (1 + w) Phi(w') - w Phi(null).

    Rows are laid out "(n m s)": samples, methods, seeds.
    """

    def __init__(self, args, teacher: Ensemble, schedule: Schedule, data: Data):
        self.args, self.teacher, self.schedule, self.data = args, teacher, schedule, data
        # Both halves, every second sample, hold each class equally often.
        self.label = torch.arange(args.samples // 8 * 8) // 2 % CLASSES
        # Equal steps in lam, on whole timesteps: 75 evaluations come as close (rmse 0.007 to 1,000
        # steps) as 200 equal in t.
        ends = schedule.lam(torch.tensor([schedule.T - 1, 0]))
        lam = torch.linspace(*ends.tolist(), 80 if args.quick else 160, dtype=torch.float64)
        self.fine = schedule.t_of_lam(lam).round().int().unique().flip(0).tolist()
        self.rows, self.found, self.samples, self.references = [], {}, {}, {}

    def noise(self, members: int):
        """The starting noise, then the step noise: the same for every method and case."""
        # Not the seed of training, whose first draws were the teacher's weights.
        generator = torch.Generator().manual_seed(self.args.seed + 1)
        while True:
            z = torch.randn((len(self.label), self.args.seeds, 2), generator=generator)
            yield repeat(z, "n s d -> (n m s) d", m=members)

    def cond(self, members: int) -> Tensor:
        return repeat(one_hot(self.label), "n c -> (n r) c", r=members * self.args.seeds)

    # -------------------------------------------------------------------------------- sampling

    def sample(self, network, members: int, case: Case, w: float, **options):
        """The gamma-sampler's x_0 of an ensemble, (m, s, n, 2)."""
        network = told(network, case.k) if network.told == "K" else network
        # C clips to [-1, 1], where pixels live; this data reaches to `bound` instead.
        eps = guided(network, self.cond(members), torch.zeros(1, CLASSES), w)
        noise, clip = self.noise(members), lambda x: self.data.bound * clip_x0(x / self.data.bound)
        given = timesteps_of(self.args, case), self.schedule, case.gamma, noise, clip
        x = gamma_sample(eps, next(noise), *given, case.clip_steps, **options)
        return rearrange(x, "(n m s) d -> m s n d", m=members, s=self.args.seeds)

    def reference(self, case: Case, w: float, w_distilled: float) -> Tensor:
        """What the case would give were every jump exact; (s, n, 2)."""
        # Unguided and without noise exact jumps compose: whatever the stops, the ODE's endpoint.
        case = Case(1) if case.gamma == w == 0 else Case(case.k, case.gamma, case.schedule)
        key = case, round(w, 6), round(w_distilled, 6)
        if key not in self.references:
            null = torch.zeros_like(self.cond(1))
            conditional = guided(self.teacher, self.cond(1), null, w_distilled)
            unconditional = bind(self.teacher, null)

            def jump(model, x_t, t, s, schedule, past=None):
                x_s = self.follow(conditional, x_t, t, s)
                if w != 0:
                    x_s = (1 + w) * x_s - w * self.follow(unconditional, x_t, t, s)
                return x_s, past

            self.references[key] = self.sample(self.teacher, 1, case, 0.0, jump=jump)[0]
        return self.references[key]

    def follow(self, eps, x_t: Tensor, t: int, s: int, callback=None) -> Tensor:
        """The PF-ODE from t to s in small steps of second order."""
        stops = [t, *(u for u in self.fine if s < u < t), s]
        return solve(eps, x_t, stops, self.schedule, dpmpp_2m, callback)

    # ------------------------------------------------------------------------------------ rows

    def teacher_row(self, case: Case) -> None:
        """The teacher itself with k guided steps of DDIM."""
        w = self.args.guidance - 1
        x = self.sample(self.teacher, 1, case, w)[0]
        self._keep("teacher", "", case, x, self.reference(case, 0.0, w))

    def student_rows(self, group, members: list[int], case: Case) -> None:
        """The students numbered `members` of a train_toy.Group; all seeds of each."""
        seeds = self.args.seeds
        picked = group.network.pick([m * seeds + s for m in members for s in range(seeds)])
        w = case.w if case.tune is None else tuned(case.w, case.tune)
        samples = self.sample(picked, len(members), case, w, jump=group.jump)
        for student, x in zip([group.students[m] for m in members], samples, strict=True):
            reference = self.reference(case, w, student.w)
            # Eq. 22: guidance on top of distilled guidance multiplies, in terms of g = 1 + w.
            W = (1 + w) * (1 + student.w) - 1
            # How far is a guided student from the teacher it stands for? Eq. 13 is judged by this.
            endpoint = self.reference(Case(1), 0.0, W) if w != 0 else None
            self._keep(student.method, student.variant, case, x, reference, endpoint)

    def _keep(self, method: str, variant: str, case: Case, x, reference, endpoint=None) -> None:
        """Rows of a case: rmse, sw, and where w != 0 the rmse to the teacher guided as strongly."""
        values = {"rmse": rmse(x, reference), "sw": self._sw(x, reference)}
        if endpoint is not None:
            values["rmse_teacher"] = rmse(x, endpoint)
        # Kept for the pictures.
        self.samples[method, variant, case] = x
        w = self.args.guidance - 1 if method == "teacher" else case.w
        for metric, each in values.items():
            if not each.isfinite().all():
                raise ValueError(f"{method} {variant} sampled no numbers: {case}; lower --guidance")
            row = {"method": method, "variant": variant, **asdict(case), "w": w, "metric": metric}
            row |= {"per_seed": each.tolist(), "mean": each.mean().item()}
            row["std"] = each.std().item() if len(each) > 1 else 0.0
            self.rows.append(row)
            self.found[method, variant, case, metric] = row

    def _sw(self, x: Tensor, y: Tensor) -> Tensor:
        """Between independent halves: x and y may come from the same noise."""
        return sliced_wasserstein(x[:, ::2], y[:, 1::2], self.label[::2])

    def find(self, method: str, case: Case, metric="rmse", variant="") -> dict | None:
        """The row of a case; the teacher's needs no w, which is the one that students distil."""
        return self.found.get((method, variant, case, metric))

    @property
    def methods(self) -> list[str]:
        """The teacher, then every student at the main guidance."""
        return list(dict.fromkeys(row["method"] for row in self.rows if not row["variant"]))

    def table(self, metric: str, gamma: float) -> str:
        """A metric's mean for every method over k, with * on the non-equidistant schedule."""
        ks, rows = sorted({row["k"] for row in self.rows}), []
        for schedule, mark in (("equidistant", ""), ("nonequidistant", " *")):
            for method in self.methods:
                found = [self.find(method, Case(k, gamma, schedule), metric) for k in ks]
                if any(found):
                    cells = [f"{row['mean']:.3f}" if row else "" for row in found]
                    rows.append((method + mark, cells))
        return table_of(f"{metric} at gamma = {gamma:g}", ks, rows, 21, 9)

    def noise_floor(self) -> dict:
        """sw between independent halves of the main references: below it nothing can be told."""
        floors, w = {}, round(self.args.guidance - 1, 6)
        for gamma in GAMMAS:
            found = self.references.items()
            exact = [x for (case, *ws), x in found if [case.gamma, *ws] == [gamma, 0, w]]
            if exact:
                each = torch.stack([self._sw(x, x) for x in exact]).mean(0)
                floors[f"gamma {gamma:g}"] = {"per_seed": each.tolist(), "mean": each.mean().item()}
        return {"sw": floors}


# ------------------------------------------------------------------------------------ evaluation
#
# Main cases are Figs. 4 and 5; the others, Figs. 6 and 7, add guidance at inference.


def main_cases(args) -> list[Case]:
    """Every k and gamma on the equidistant schedule; between kmin and kmax on the other as well."""
    plans = [(k, "equidistant") for k in steps_of(args)]
    plans += [(k, "nonequidistant") for k in range(args.kmin + 1, args.kmax)]
    return [Case(k, gamma, schedule) for gamma in GAMMAS for k, schedule in plans]


def guidance_cases(args, students: list[Student]) -> list[tuple[list[int], Case]]:
    """Guided students: rho 0 against rho (Fig. 6a), Eq. 13 (Fig. 6b), x_0 clipping (Fig. 7)."""
    low, high = ([i for i, s in enumerate(students) if s.variant == v] for v in ("w'=1", "w'=5"))
    tdd = [i for i, s in enumerate(students) if (s.method, s.variant) == ("tdd", "")]
    ends, clips = sorted({args.kmin, args.kmax}), sorted({0, 1, args.kmin})
    jobs = [(low, Case(k, w=w)) for k in ends for w in (0.0, 1.0, 2.0, 3.0)]
    jobs += [(high, Case(k)) for k in ends]
    jobs += [(high, Case(k, w=w, tune=5.0)) for k in ends for w in (1.0, 2.0, 3.0)]
    jobs += [(tdd, Case(args.kmin, w=w, clip_steps=n)) for w in (1.0, 2.0) for n in clips]
    return [(members, case) for members, case in jobs if members]


def evaluate(args, groups: list[Group], ev: Evaluation) -> None:
    """Every row of metrics.json: the main cases for teacher and students, then guided students."""
    cases = main_cases(args)
    jobs = [(ev.teacher_row, case) for case in cases]
    for group in groups:
        plain = [i for i, student in enumerate(group.students) if not student.variant]
        # Between kmin and kmax the other schedule is TDD's own question.
        own = [
            (plain, case) for case in cases
            if plain and (group.jump is tcf_1 or case.schedule == "equidistant")
        ]  # fmt: skip
        if group.jump is tcf_1:
            own += guidance_cases(args, group.students)
        jobs += [(ev.student_rows, group, *job) for job in own]
    for rows, *about in tqdm(jobs, desc="evaluate", mininterval=0.5, dynamic_ncols=True):
        rows(*about)
