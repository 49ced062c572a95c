"""The 2-D toy: its network, data and distances against second derivations, and its script."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn

import solvers
import tdd
import tdm
import train_toy
from common import compare
from common.compare import Case
from common.plots import CLASS_COLOURS, Axes
from tdd import targets_of
from tests import helpers
from tests.helpers import SCHEDULE, SIGMA, load_rows, randn
from toy import ablations, figures, model, students
from toy import data as toy_data
from toy import evaluate as toy_eval
from toy import tdm as toy_tdm
from unet import timestep_embedding

# -------------------------------------------------------------------------------------- the toy


def test_members_of_a_batched_mlp_are_separate_mlps():
    batched = model.BatchedMLP.init(3, SCHEDULE, torch.Generator().manual_seed(0), width=8)
    for p in batched.parameters():
        p.data = randn(*p.shape, seed=p.numel(), dtype=torch.float32)
    x_t, t, cond = randn(12, 2).float(), torch.arange(12) * 83, randn(12, 4, seed=2).float()
    together = batched(x_t, t, cond)
    for row in range(12):
        m, (time,) = row % 3, t[row : row + 1].tolist()
        h = torch.cat([x_t[row], timestep_embedding(t[row : row + 1], 32)[0], cond[row]])
        for i in range(4):
            h = (h if i == 0 else h * h.sigmoid()) @ batched.weight[i][m] + batched.bias[i][m, 0]
        expected = SIGMA[time + 1] * x_t[row] + h
        assert torch.allclose(together[row], expected, atol=1e-4)
    swapped = batched.select([2, 0, 1, 1])(x_t, t, cond)
    assert torch.allclose(swapped[0], batched.select([2])(x_t[:1], t[:1], cond[:1])[0], atol=1e-5)


def test_a_scalar_input_has_no_effect_at_first_and_weights_of_its_own():
    plain = model.BatchedMLP.init(2, SCHEDULE, torch.Generator().manual_seed(0), width=8)
    for p in plain.parameters():
        p.data = randn(*p.shape, seed=p.numel(), dtype=torch.float32)
    x_t, t, cond = randn(6, 2).float(), torch.arange(6) * 160, randn(6, 4, seed=2).float()
    network, s = plain.with_scalar("target_time"), torch.arange(6) * 70
    assert network.scalar == "target_time" and network.select([0]).scalar == "target_time"
    assert torch.allclose(network(x_t, t, cond, s), plain(x_t, t, cond), atol=1e-5)
    network.weight[0].data[:, -32:] = randn(2, 32, 8, seed=9).float()
    s_embedding = timestep_embedding(s, 32)
    for row in range(6):
        m = row % 2
        t_embedding = timestep_embedding(t[row : row + 1], 32)[0]
        h = torch.cat([x_t[row], t_embedding, cond[row], s_embedding[row]])
        for i in range(4):
            h = (h if i == 0 else h * h.sigmoid()) @ network.weight[i][m] + network.bias[i][m, 0]
        expected = SIGMA[int(t[row]) + 1] * x_t[row] + h
        assert torch.allclose(network(x_t, t, cond, s)[row], expected, atol=1e-4)


@pytest.mark.parametrize("name", toy_data.DATA)
def test_data_is_standardised_and_classes_lie_where_they_should(name):
    data = toy_data.Data(name)
    x, label = data.sample(20_000, torch.Generator().manual_seed(1))
    assert torch.allclose(x.mean(0), torch.zeros(2), atol=0.03)
    assert torch.allclose(x.std(0), torch.ones(2), atol=0.02)
    assert torch.bincount(label).float().std() < 200
    a, b = (x * data.std + data.mean).T.double().numpy()
    radius, angle = np.hypot(a, b), np.arctan2(b, a)
    if name == "spirals":
        arm = np.round((angle - 0.5 * np.pi * radius) / (np.pi / 2)) % 4
        assert (arm == label.numpy()).mean() > 0.99
    elif name == "gaussians":
        centre = np.round(angle / (np.pi / 6)) % 12
        assert (centre % 4 == label.numpy()).mean() > 0.99
        assert radius.mean() == pytest.approx(2, abs=0.02)
    else:
        column, row = np.floor(a + 2), np.floor(b + 2)
        assert (column == label.numpy()).all()
        assert ((column + row) % 2 == 0).all()
        assert set(row) == {0, 1, 2, 3}


def test_distances():
    label = torch.arange(4000) % 4
    x = randn(4000, 2)
    shift = torch.tensor([3.0, -4.0])
    assert toy_data.rmse(x, x + shift).item() == pytest.approx(5)
    # Every projection of a shift d is d cos, and the mean of cos^2 is 1/2.
    assert toy_data.sliced_wasserstein(x, x + shift, label).item() == pytest.approx(5 / 2**0.5)
    # N(0, 1) against N(0, 4): each projection is at W2 = 2 - 1.
    far = toy_data.sliced_wasserstein(
        randn(80_000, 2), 2 * randn(80_000, 2, seed=9), torch.arange(80_000) % 4
    )
    assert far.item() == pytest.approx(1, abs=0.03)
    mixed = toy_data.sliced_wasserstein(x, x[torch.arange(4000) ^ 1], label)
    assert mixed.item() > 0.02  # classes swapped in pairs: the same cloud, but not class by class


run_script = partial(helpers.run, train_toy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kmin", 9, "--kmax", 4], "kmin 9 to kmax 4"),
        (["--kmax", 51], "to kmax 51"),
        (["--methods", "cm", "--kmin", 9, "--kmax", 4], "kmin 9 to kmax 4"),
        (["--kmin", 0], "at least 1"),
        (["--eta", 1.5], "at most 1"),
        (["--eta", "nan"], "at least 0"),
        (["--ema", 1], "at most 0.999999"),
        (["--rho", -0.1], "at least 0"),
        (["--steps", 0], "at least 1"),
        (["--steps", "ten"], "whole number"),
        (["--guidance", 0.5], "at least 1"),
        (["--solver-steps", 300], "must divide"),
        (["--data", "moons"], "moons"),
        (["--methods", "lcm2"], "lcm2"),
        (["--tcf", "3"], "'3'"),
        (["--guidance", "inf"], "at most 100"),
        (["--solver-steps", 4], "do not fit N = 4"),
        (["--seed", 2**64], "at most"),
        (["--output", "FILE/below"], "cannot write"),
        (["--what"], "--what"),
        (["--methods", "pcm4", "--tcf", "s"], "--tcf is for --methods tcd and tdd"),
        (["--methods", "tdd_k4", "pcm4", "--reach", 3], "--reach is for --methods tdd"),
        (["--methods", "tdd_eta0", "--eta", 0.5], "--eta is for --methods tdd"),
        (["--methods", "tdm4", "--rho", 0.5], "--rho is for consistency methods"),
        (["--methods", "tdm4", "--ema", 0.5], "--ema is for consistency methods"),
        (["--methods", "tdm4", "--solver", "dpm++2s"], "--solver is for consistency methods"),
        (["--methods", "tdm4", "--kmin", 1, "--kmax", 2, "--solver-steps", 2],
         "4 steps: from 1 to 2"),
        (["--methods", "cm", "--ablations", "--kmin", 1, "--kmax", 2, "--solver-steps", 2],
         "4 steps: from 1 to 2"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused_in_one_line(words, message, monkeypatch, capsys, tmp_path):
    (tmp_path / "FILE").write_text("in the way")
    output = [] if "--output" in words else ["--output", tmp_path / "out"]
    words = [str(word).replace("FILE", str(tmp_path / "FILE")) for word in words]
    code, _, err = run_script(monkeypatch, capsys, "--quick", *words, *output)
    assert code == 2
    assert message in err
    assert err.startswith("train_toy.py: ")
    assert err.count("\n") == 1


def test_a_loss_that_explodes_stops_the_run(monkeypatch, capsys, tmp_path):
    code, _, err = run_script(monkeypatch, capsys, "--quick", "--lr", 1e30, "--output", tmp_path)
    assert code == 2
    assert "train_toy.py: teacher: loss" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_ctrl_c_keeps_what_is_finished(monkeypatch, capsys, tmp_path):
    evaluated = []

    def interrupt(self, *args, student_rows=toy_eval.Evaluation.student_rows):
        evaluated.append(student_rows(self, *args))
        if len(evaluated) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(toy_eval.Evaluation, "student_rows", interrupt)
    code, _, err = run_script(
        monkeypatch, capsys, "--quick", "--steps", 2, "--methods", "tdd", "--output", tmp_path
    )
    assert code == 130
    assert err.splitlines()[-1] == "train_toy.py: interrupted; what was finished is kept"
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert [row["k"] for row in rows if row["method"] == "tdd"] == [1, 1, 2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "targets.png"]


@pytest.mark.parametrize(
    "words",
    [
        ["--methods", "tdd_rho0", "tdd_rho0", "--guidance", 1],
        ["--methods", "tdd", "--kmin", 2, "--kmax", 4, "--solver-steps", 4],
        ["--methods", "cm", "--kmin", 1, "--kmax", 1, "--solver-steps", 2],
        ["--methods", "pcm8", "tcd", "--kmin", 3, "--kmax", 3, "--solver", "dpm++2s"],
        ["--methods", "tdm4", "tdm_unify"],
        ["--methods", "tcd", "tdd", "--tcf", "s", "2", "s"],
        ["--methods", "tdd", "--tcf", "2"],
    ],
)
def test_unusual_flags_run(words, monkeypatch, capsys, tmp_path):
    (tmp_path / "guidance.png").write_text("from a run before")
    code, _, err = run_script(
        monkeypatch, capsys, "--quick", "--steps", 2, *words, "--output", tmp_path
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    keys = [
        tuple(v for k, v in row.items() if k not in ("per_seed", "mean", "std")) for row in rows
    ]
    assert len(set(keys)) == len(keys)
    for name in tmp_path.glob("*.png"):
        Image.open(name).verify()


def test_a_folder_of_another_runs_results_is_refused(monkeypatch, capsys, tmp_path):
    """But for a first look's, of which nothing stays, and the same run's without ablations."""
    base = ["--seeds", 1, "--samples", 64, "--steps", 2, "--output", tmp_path]
    stale = {"targets.png", "paths.gif"}
    for name in stale:
        (tmp_path / name).write_text("of a first look")
    (tmp_path / "metrics.json").write_text('{"settings": {"quick": true}}')
    code, _, err = run_script(monkeypatch, capsys, *base, "--methods", "tdm4")
    assert code == 0, err
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert not stale & before.keys() and {"metrics.json", "curves.png"} < before.keys()
    for words, said in (
        (["--methods", "tdm4", "--data", "gaussians"], "data spirals, not gaussians"),
        (["--methods", "cm"], "methods ['tdm4'], not ['cm']"),
        (["--quick", "--methods", "tdm4"], "samples 64, not 512"),
    ):
        code, _, err = run_script(monkeypatch, capsys, *base, *words)
        line = f"train_toy.py: {tmp_path} holds results of {said}: name another --output"
        assert code == 2 and err.splitlines() == [line]
    settings = vars(train_toy.parser().parse_args([*map(str, base), "--methods", "tdm4"]))
    train_toy.claim(tmp_path, {**settings, "ablations": True})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("steps, warned", [(2, True), (30, True), (40, False)])
def test_walkers_leave_a_short_training_few_steps_or_one(
    steps, warned, monkeypatch, capsys, tmp_path
):
    """Then with a line, and with the snapshots that there are; 33 of N = 50's steps are theirs."""
    words = ["--seeds", 1, "--samples", 64, "--steps", steps, "--methods", "tdd", "tdd_k4"]
    words += ["--batch-size", 8, "--tcf", 1, "--output", tmp_path]
    code, out, err = run_script(monkeypatch, capsys, *words)
    assert code == 0, err
    assert ("one step is left after the walkers: give more --steps" in err) == warned
    result, _ = load_rows(tmp_path / "metrics.json")
    rows = {(row["method"], row["k"], row["steps"]) for row in result["efficiency"]}
    shares = [s for s in model.SNAPSHOTS if round(s * steps)]
    assert {n for method, _, n in rows if method == "tdd"} == {
        *(round(s * steps) for s in shares), steps,
    }  # fmt: skip
    kept = {n for method, _, n in rows if method == "tdd_k4"}
    assert steps in kept and (len(kept) == 1) == warned
    assert (tmp_path / "efficiency.png").exists() and "tdd_k4" in out


def test_ablations_are_of_the_networks_that_the_tables_are_of(monkeypatch, capsys, tmp_path):
    words = ["--quick", "--steps", 2, "--ablations", "--methods", "cm", "tdm4", "tdm_unify"]
    code, out, err = run_script(monkeypatch, capsys, *words, "--output", tmp_path)
    assert code == 0, err
    result, per_seed = load_rows(tmp_path / "metrics.json")
    ablations = {(row["name"], row["k"]): row["per_seed"] for row in result["ablations"]}
    assert (
        len(ablations) == len(result["ablations"]) and np.isfinite(list(ablations.values())).all()
    )
    for name, method in (("not unified: TDM-4", "tdm4"), ("LCM", "cm"), ("TDM-unify", "tdm_unify")):
        assert ablations[name, 4] == pytest.approx(per_seed(method, [4], "sw"), rel=1e-5)
        assert f"{ablations[name, 4][0]:.3f}" in next(x for x in out.splitlines() if name in x)
    # 100 steps of TDM on an LCM that has hardly been trained lead elsewhere.
    assert ablations["LCM and 100 steps of TDM", 4] != pytest.approx(ablations["LCM", 4], rel=0.05)


@pytest.mark.parametrize("together", [False, True])
def test_tdm_takes_the_fake_scores_step_first(together):
    """Its Algorithm 1, lines 3-13, with Adam's first step by hand: no momentum, a rate for each."""
    words = ["--seeds", "1", "--batch-size", "64", "--lr", "0.05"]
    config = train_toy.build_config(train_toy.parser().parse_args(words))
    teacher = model.BatchedMLP.init(1, SCHEDULE, torch.Generator().manual_seed(5), width=8)
    for p in teacher.parameters():
        p.data = 0.3 * randn(*p.shape, seed=p.numel(), dtype=torch.float32)
    m = replace(toy_tdm.TDM_STUDENTS["tdm4"], together=together, w=2.0)
    result = toy_tdm.train_tdm(config, m, teacher, steps=1)
    student, fake = teacher.select([0]), teacher.select([0])
    generator = torch.Generator().manual_seed(config.seed + 2)
    cond = toy_data.one_hot(torch.randint(toy_data.CLASSES, (64,), generator=generator))
    sample = tdm.sample_step((4,), (64, 2), 50, generator)

    def eps(network):
        return lambda x, t: network(x, t, cond)

    def step(network, loss, lr):
        parameters = list(network.parameters())
        moved = network.select([0])
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        for new, p, g in zip(moved.parameters(), parameters, grads, strict=True):
            new.data = p.data - lr * g / (g.abs() + 1e-8)
        return moved

    p = tdm.generate(eps(student.requires_grad_()), sample, SCHEDULE)
    fake_loss = tdm.fake_loss(eps(fake.requires_grad_()), p.detach(), SCHEDULE, "exact").mean()
    moved = step(fake, fake_loss, 2.0 * 0.05)
    real = lambda x, t: 3 * teacher(x, t, cond) - 2 * teacher(x, t, 0 * cond)  # noqa: E731

    def student_after(fake):
        loss = tdm.student_loss(real, eps(fake), p, SCHEDULE).mean()
        return nn.utils.parameters_to_vector(step(student, loss, 0.2 * 0.05).parameters())

    expected, wrong = student_after(moved), student_after(fake)
    if together:
        expected, wrong = wrong, expected
    weights = nn.utils.parameters_to_vector(result.parameters())
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(weights, wrong, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------- evaluation


def small_evaluation(words=(), **changes):
    """An Evaluation of 240 samples, its teacher random, and the students that the flags ask for."""
    flags = ["--quick", "--steps", "2", "--seeds", "2", "--samples", "240", *map(str, words)]
    config = replace(train_toy.build_config(train_toy.parser().parse_args(flags)), **changes)
    teacher = model.BatchedMLP.init(2, SCHEDULE, torch.Generator().manual_seed(5), width=8)
    for p in teacher.parameters():
        p.data = 0.3 * randn(*p.shape, seed=p.numel(), dtype=torch.float32)
    data = toy_data.Data(config.data)
    groups = students.train_groups(config, teacher, data, torch.Generator().manual_seed(1))
    return groups, toy_eval.Evaluation(config, teacher, data), data


@pytest.mark.parametrize("guidance, passes", [(3, 2), (1, 1)])
def test_rows_say_how_many_passes_a_sample_takes(guidance, passes, monkeypatch):
    """Against a count of the rows that the networks were given."""
    groups, ev, _ = small_evaluation(["--guidance", guidance])
    jobs = [partial(ev.teacher_row, Case(3))]
    jobs += [partial(ev.teacher_row, Case(3), solver) for solver in toy_eval.TEACHER_SOLVERS]
    for group in groups:
        jobs += [partial(ev.student_rows, group, [0], Case(3, gamma)) for gamma in (0.0, 0.2)]
        if group.jump is students.ddim and group.students[0].method != "tdm_unify":
            jobs.append(partial(ev.student_rows, group, [0], Case(3, w=1.0)))
    network_rows, forward = [], model.BatchedMLP.forward

    def count(self, x_t, *inputs):
        network_rows.append(len(x_t))
        return forward(self, x_t, *inputs)

    seen = set()
    for job in jobs:
        job()  # and all references, that the count must not contain
        before = set(ev.rows)
        ev.rows.clear()
        monkeypatch.setattr(model.BatchedMLP, "forward", count)
        network_rows.clear()
        job()
        monkeypatch.undo()
        assert before  # the same row again
        for row in ev.rows.values():
            assert row["passes"] == sum(network_rows) / (240 // 8 * 8 * 2)
            seen.add((row["method"], row["variant"], row["passes"]))
    teacher = {("teacher", "", 3 * passes), ("teacher", "dpm++2s", 5 * passes)}
    assert teacher | {("tcd2", "", 6), ("cm", "", 3)} <= seen


def test_the_teachers_rows_with_better_solvers():
    """Guidance and solver by hand; two steps in closed form on a teacher that is linear in x_t."""
    _, ev, _ = small_evaluation(["--methods", "cm"])
    z, cond, null = next(ev.noise(1)), ev.cond(1), torch.zeros_like(ev.cond(1))

    def guided(x_t, t):
        return 3 * ev.teacher(x_t, t, cond) - 2 * ev.teacher(x_t, t, null)

    for solver, step in (("dpm++2m", solvers.dpmpp_2m()), ("dpm++2s", solvers.dpmpp_2s)):
        ev.teacher_row(Case(5), solver)
        x = solvers.solve(guided, z, [999, 799, 599, 399, 199, -1], SCHEDULE, step)
        samples = rearrange(ev.samples["teacher", solver, Case(5)], "s n d -> (n s) d")
        torch.testing.assert_close(samples, x, rtol=1e-3, atol=1e-3)
    for p in ev.teacher.parameters():
        p.data.zero_()  # eps = sigma_t x_t: x_0 = alpha_t x_t, whatever the condition
    z = next(ev.noise(1)).double()
    (a, s, lam), (a_m, s_m, lam_m) = helpers.at(999), helpers.at(499)

    def first_order(x, x_0, start, end):  # Eq. 16
        (_, s_t, l_t), (a_s, s_s, l_s) = start, end
        return s_s / s_t * x - a_s * math.expm1(l_t - l_s) * x_0

    # In two steps by way of 499, the last of them to CLEAN, where both solvers give x_0.
    x_m = {"dpm++2m": first_order(z, a * z, (a, s, lam), (a_m, s_m, lam_m))}
    half = (lam + lam_m) / 2
    a_u, s_u = (1 / math.sqrt(1 + math.exp(sign * 2 * half)) for sign in (-1, 1))
    x_u = first_order(z, a * z, (a, s, lam), (a_u, s_u, half))
    u = SCHEDULE.t_of_lam(torch.tensor(half).double())
    s_net = SCHEDULE.at(u)[1]
    x_m["dpm++2s"] = first_order(z, (x_u - s_u * s_net * x_u) / a_u, (a, s, lam), (a_m, s_m, lam_m))
    for solver, x in x_m.items():
        ev.teacher_row(Case(2), solver)
        samples = ev.samples["teacher", solver, Case(2)]
        expected = rearrange(a_m * x, "(n s) d -> s n d", s=2)
        torch.testing.assert_close(samples.double(), expected, rtol=2e-4, atol=2e-4)
        table = ev.table("rmse", 0.0).splitlines()
        (line,) = [line for line in table if line.startswith(f"teacher {solver}")]
        rows = [ev.find("teacher", Case(k), variant=solver) for k in (2, 5)]
        assert line.split()[2:] == [f"{row['mean']:.3f}" for row in rows]


def test_walkers_of_each_seed_follow_its_teacher():
    """DDIM by hand from where a walker is, guided by w' = 2 or with its label dropped."""
    _, ev, _ = small_evaluation(["--methods", "cm"])
    config, teacher = replace(ev.config, methods=("pcm4_path",), batch_size=16), ev.teacher
    pcm4, generator = students.make_students(config), torch.Generator().manual_seed(2)
    draw, checked = students.path_pairs(config, pcm4, teacher, generator), set()
    for _ in range(20):
        x_0, label, sample, move_on = draw()
        assert x_0 is None and torch.equal(
            sample.t_n, sample.t_n.view(16, 2)[:, :1].repeat(1, 2).flatten()
        )
        x, cond = sample.x_next, toy_data.one_hot(label)
        eps = []
        for seed in range(2):
            of_seed = slice(seed, None, 2)
            network, t = teacher.select([seed]), sample.t_next[of_seed]
            with_label = network(x[of_seed], t, cond[of_seed])
            without = network(x[of_seed], t, 0 * cond[of_seed])
            guided_eps = torch.where(
                sample.keep_prompt[of_seed, None], 3 * with_label - 2 * without, without
            )
            eps.append(guided_eps)
        eps = rearrange(torch.stack(eps), "s b d -> (b s) d")
        alpha, sigma = torch.tensor(helpers.ALPHA), torch.tensor(helpers.SIGMA)
        a_t, a_n = (alpha[t + 1, None] for t in (sample.t_next, sample.t_n))
        s_t, s_n = (sigma[t + 1, None] for t in (sample.t_next, sample.t_n))
        x_n = (a_n * (x - s_t * eps) / a_t + s_n * eps).float()
        cond = torch.where(sample.keep_prompt[:, None], cond, 0.0)
        found = students.tdd_loss(
            teacher, teacher, teacher, None, cond, torch.zeros(1, 4), sample, 2.0, SCHEDULE
        ).x_n
        torch.testing.assert_close(found, x_n, rtol=1e-4, atol=1e-4)
        move_on(found)
        checked |= set(sample.keep_prompt.tolist())
    assert checked == {True, False}


def test_students_are_told_the_nearest_k_that_they_know():
    """Two of different K in one network: each as it is alone, told by hand."""
    words = ["--methods", "tdd_k4", "tdd_k", "--steps", 40, "--tcf", 1]
    (group,), ev, _ = small_evaluation(words)
    assert [student.Ks for student in group.students] == [(4, 5, 6, 7, 8), tuple(range(1, 9))]
    for p in group.network.parameters():  # so that what is told matters
        p.data += 0.1 * randn(*p.shape, seed=p.numel(), dtype=torch.float32)
    for k, told in ((2, (4, 2)), (6, (6, 6)), (12, (8, 8))):
        both = ev.sample(group.network, Case(k), 0.0, Ks=[x.Ks for x in group.students])
        for i, K in enumerate(told):
            network = group.select([i])
            noise = ev.noise(1)

            def eps(x_t, t, network=network, K=K):
                return network(x_t, t, ev.cond(1), torch.full_like(t, K))

            alone = tdd.gamma_sample(eps, next(noise), tdd.equidistant(k, 50), SCHEDULE)
            expected = rearrange(alone, "(n s) d -> s n d", s=2)
            torch.testing.assert_close(both[i], expected, rtol=1e-4, atol=1e-4)
            other = rearrange(
                tdd.gamma_sample(
                    lambda x_t, t, f=eps, K=K: f(x_t, t, K=9 - K), next(ev.noise(1)),
                    tdd.equidistant(k, 50), SCHEDULE),
                "(n s) d -> s n d", s=2,
            )  # fmt: skip
            assert (both[i] - other).abs().max() > 1e-2


def test_snapshots_are_the_network_after_so_many_steps():
    network = model.BatchedMLP.init(2, SCHEDULE, torch.Generator().manual_seed(5), width=8)
    target, snapshots, after = randn(60, 2).float(), {}, []
    x, t, cond = randn(60, 2, seed=1).float(), torch.arange(60), randn(60, 4, seed=2).float()

    def vector(net):
        return nn.utils.parameters_to_vector(net.parameters()).detach().clone()

    model.train(
        network, lambda: (network(x, t, cond) - target).square().mean(1), 30, 1e-2, "test",
        on_step_end=lambda: after.append(vector(network)), snapshots=snapshots,
    )  # fmt: skip
    assert sorted(snapshots) == sorted(model.SNAPSHOTS)
    for share, steps in zip(model.SNAPSHOTS, (1, 3, 10), strict=True):
        assert torch.equal(vector(snapshots[share]), after[steps - 1])
    group = students.Group([None, None], network, snapshots=snapshots)
    for share in (1.0, 0.1):
        selected = group.select([1], share).state_dict().values()
        both = snapshots.get(share, network).state_dict().values()
        assert all(torch.equal(p, q[1:]) for p, q in zip(selected, both, strict=True))


def test_the_w_of_a_student_of_a_range_is_uniform(monkeypatch):
    """Of each example in each step; who has one w' keeps it."""
    drawn, loss = [], students.tdd_loss

    def capture(*args, **kwargs):
        drawn.append(args[7])
        return loss(*args, **kwargs)

    monkeypatch.setattr(students, "tdd_loss", capture)
    small_evaluation(["--methods", "tdd_rho0", "--steps", 40, "--batch-size", 64])
    w = rearrange(torch.stack(drawn), "step (b m s) -> m (step b s)", m=5, s=2)
    assert (w[:3] == torch.tensor([1.0, 1.0, 5.0])[:, None]).all() and (w[3] == 5).all()
    assert w.shape[1] == 40 * 64 * 2
    uniform = torch.linspace(2, 8, w.shape[1])
    assert (w[4].sort().values - uniform).abs().max() < 0.1


@pytest.mark.parametrize(
    "words, pictures",
    [
        ("--methods cm", {"efficiency"}),
        ("--methods tdd_rho0", {"guidance"}),
        ("--methods tdm4", {"family"}),
        ("--methods tdd --tcf 1 --kmin 20 --kmax 20", {"efficiency", "guidance", "sweep"}),
        ("--methods tcd --tcf 1 --kmin 11 --kmax 13", {"efficiency", "sweep"}),
        ("--methods tdd_rho0 pcm4", {"efficiency", "guidance"}),
        ("--methods tdd_k4", {"efficiency"}),
    ],
)
def test_runs_of_few_methods_and_other_steps(words, pictures, tmp_path):
    """Rows for the snapshots that there are, and no picture without content."""
    groups, ev, _ = small_evaluation(words.split())
    toy_eval.evaluate(groups, ev)
    # Of two steps the network after one is kept; TDM-4 takes but one, which is the last.
    assert {n for *_, n in ev.efficiency} <= {1, 2}
    figures.draw_all(tmp_path, ev, groups)
    some = {"efficiency", "guidance", "family", "sweep"}
    assert {path.stem for path in tmp_path.glob("*.png")} & some == pictures
    # Whoever has a student of the main comparison sees its paths; the film is of four of them.
    names = {"trajectories.png", "paths.gif"} if "efficiency" in pictures else set()
    names -= {"paths.gif"} if "tdd_k4" in words else set()
    found = {path.name for path in tmp_path.iterdir()}
    assert found & {"trajectories.png", "paths.gif"} == names
    assert ev.config.ends.count(ev.config.kmin) == 1  # or a panel would be drawn twice
    more = toy_eval.more_steps(ev.config)
    assert more == [k for k in (12, 16, 20) if k > ev.config.kmax]


@pytest.mark.parametrize("kmin", [4, 2])
def test_guidance_students_have_their_methods_targets(kmin):
    """PCM-4 has four segments whatever TDD is trained for."""
    words = ["--methods", "tdd_rho0", "--kmin", str(kmin)]
    config = train_toy.build_config(train_toy.parser().parse_args(words))
    for student in students.make_students(config):
        method = {"pcm4": "pcm", "tcd": "tcd"}.get(student.method, "tdd")
        expected = targets_of(method, 50, kmin if method == "tdd" else 4)
        for n in range(50):
            assert helpers.admitted(student.targets, n) == helpers.admitted(expected, n)


def test_reach_is_the_targets_e():
    """`--reach`, and the ablation's rows: each network what it would be trained by itself."""
    words = ["--methods", "tdd", "pcm4", "--tcf", 1]
    for flags, e in (([], 250), (["--reach", 125], 125), (["--reach", 1000], 1000)):
        config = train_toy.build_config(train_toy.parser().parse_args([*map(str, words + flags)]))
        tdd, *_, pcm = students.make_students(config)
        # By definition: targets from t_n - e to t_n.
        targets = sorted({Fraction(1000 * m, k) for k in range(4, 9) for m in range(k)})
        expected = [sum(20 * n - e <= tau <= 20 * n for tau in targets) for n in range(50)]
        assert tdd.targets.count.tolist() == expected and (pcm.targets.count == 1).all()
    _, ev, data = small_evaluation(["--methods", "cm"])
    rows = []
    ablations.ablate_reach(ev, data, rows)
    assert [row["name"] for row in rows[:4]] == [f"TDD, e = {e}" for e in (125, 250, 500, 1000)]
    assert [row["k"] for row in rows[::4]] == [4, 5, 6, 7, 8]
    config = replace(ev.config, reach=500.0, methods=("tdd",), tcf=("1",))
    generator = torch.Generator().manual_seed(config.seed + 4)
    (group,) = students.train_groups(config, ev.teacher, data, generator)
    ev.student_rows(group, [0], Case(8))
    assert rows[18]["name"] == "TDD, e = 500" and rows[18]["k"] == 8
    expected = ev.find("tdd", Case(8))["per_seed"]
    assert rows[18]["per_seed"] == pytest.approx(expected, rel=1e-4)


def test_quick_run_end_to_end(monkeypatch, capsys, tmp_path):
    """The whole script; even 500 steps put TDD well below CM, and below the 4-step teacher."""
    code, out, err = run_script(monkeypatch, capsys, "--quick", "--output", tmp_path)
    assert code == 0, err
    assert "g = 3, the paper's w' = g - 1 = 2" in out
    result, rmse = load_rows(tmp_path / "metrics.json")
    with_tcf = {"tcd2", "tcds", "tdd2", "tdds"}
    assert {row["method"] for row in result["rows"]} == {"teacher", *students.STUDENTS, *with_tcf}
    assert rmse("tdd") < 0.7 * rmse("cm")
    assert rmse("tdd", [4]) < rmse("teacher", [4])
    # Even these few steps teach TDM-unify to sample in one, and TDD with s as input beats TDD.
    assert rmse("tdm_unify", [1], "sw") < 0.5 * rmse("teacher", [1], "sw")
    assert rmse("tdds", [8]) < 0.8 * rmse("tdd", [8])
    for floor in result["noise_floor"]["sw"].values():
        assert 0 < floor["mean"] < 0.2
    assert not list(tmp_path.glob("*.part*"))
    main, swept = ("cm", "pcm4", "tcd", "tdd", "tdd_eta0"), ("tcd", "tdd", "tcds", "tdds")
    pictures = (("curves", 2, main), ("efficiency", 2, main), ("sweep", 3, swept))
    for name, panels, methods in pictures:
        picture = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)[100:540]
        for method, i in product(methods, range(panels)):
            panel = picture[:, 100 + 500 * i : 540 + 500 * i]
            off = np.abs(panel - compare.COLOURS[method]).max(2)
            assert (off < 12).sum() > 200, f"{method} has no line in {name}.png"
    check_efficiency(result, rmse, out)
    for name in ("samples", "targets", "trajectories", "guidance"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
        coloured = (picture.max(2) - picture.min(2) > 60).mean()
        assert 0.01 < coloured < 0.5, name
    movie = Image.open(tmp_path / "paths.gif")
    assert movie.size[0] == 1000 and (tmp_path / "paths.gif").stat().st_size < 2e6
    seconds = 0
    for i in range(movie.n_frames):
        movie.seek(i)
        seconds += movie.info["duration"] / 1000
    assert 4 < seconds < 10
    last = np.asarray(movie.convert("RGB")).astype(int)
    for colour in CLASS_COLOURS:
        # Every panel ends with samples of every class.
        close = np.abs(last - colour).max(2) < 12
        assert all(part.sum() > 100 for part in np.array_split(close, 5, axis=1))


def test_logarithmic_axes():
    axes = Axes(None, (0, 0, 100, 200), (10, 1000), (1, 100), log_y=True, log_x=True)
    assert axes.place(100, 10) == pytest.approx((50, 100))


def check_efficiency(result, rmse, out):
    """500 steps: rows after 17, 50, 167 and all; the last are the main table's."""
    rows = {(r["method"], r["k"], r["steps"]): r["mean"] for r in result["efficiency"]}
    methods = {method for method, *_ in rows}
    assert methods == {row["method"] for row in result["rows"]} - {"teacher", "tdd_rho0"}
    assert len(rows) == len(result["efficiency"]) == len(methods) * 2 * 4
    for method, k in product(methods, (4, 8)):
        assert rows[method, k, 500] == pytest.approx(rmse(method, [k]).item(), rel=1e-5)
    for method in ("cm", "pcm4", "tcd", "tdd"):
        assert rows[method, 4, 17] > rows[method, 4, 50] > rows[method, 4, 500]
    table = out[out.index("rmse, k = 4, after") :].splitlines()
    line = next(x for x in table if x.startswith("tdd "))
    values = [f"{rows['tdd', 4, steps]:.3f}" for steps in (17, 50, 167, 500)]
    assert line.split() == ["tdd", *values]
