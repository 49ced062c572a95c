"""CIFAR-10's students beyond the papers: K told through the crop, pairs from the teacher's path."""

import json
import os
import shutil
import signal
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from cifar import evaluate, figures
from cifar import sample as cifar_sample
from cifar import train as cifar_train
from cifar.config import METHODS, PATHS, REPEATED
from cifar.evaluate import Evaluation, make_case, method_cases, told_steps, told_wrong
from cifar.sample import LoadedModel
from common.compare import NAMES, path_steps
from common.plots import Figure
from sdxl import num_steps
from tests.helpers import randn, run
from tests.test_cifar import build_config, ddim_by_hand, flags, rewrite, slice_of_cifar, trained
from training.paths import start_steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return slice_of_cifar(tmp_path_factory.mktemp("told") / "cifar-10-batches-bin")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Students of several K, two trainings of one, and nothing sampled."""
    output = tmp_path_factory.mktemp("runs") / "cifar10"
    words = flags(output, data, repeats=2)
    words += ["--methods", "tdd_k4", "tdd_k", "tdm_unify", "tdd_k4_blind_data"]
    config = cifar_train.build_config(cifar_train.parser().parse_args(words))
    train = cifar_train.read_split(data, True)
    cifar_train.train_all(config, train)
    return output


def test_names_are_what_is_trained(data, tmp_path):
    config = build_config(tmp_path, data, kmax=8, rank=8)
    student = {name: cifar_train.student_config(config, name) for name in (*METHODS, *PATHS)}
    four_to_eight, path = (4, 5, 6, 7, 8), ("tdd_k4", "tdd_k4_blind", "tdd_k", *PATHS)
    for name in ("tdd_k4", "tdd_k4_data", "tdd_k4_blind", "tdd_k4_blind_data"):
        assert student[name].Ks == four_to_eight and student[name].eta == 0
        assert student[name].told_ks == (() if "blind" in name else four_to_eight)
    assert student["tdd_k"].told_ks == tuple(range(1, 9))
    assert student["tdm_unify"].told_ks == (1, 2, 4) and student["tdm4"].told_ks == ()
    for name, each in student.items():
        assert each.pairs == ("teacher" if name in path else "data")
    # Nothing else of a method is another with pairs from the path.
    for name in PATHS:
        plain = cifar_train.student_config(config, name.removesuffix("_path"))
        assert replace(student[name], pairs="data") == plain
    assert {"cm_path", "tcd_path", "tdd_path", "tdd_adv_path", "tcds_path"} <= set(PATHS)
    names = cifar_train.with_repeats(["tdd", "pcm4", "tdd"], 3)
    assert names == ("tdd", "pcm4", "pcm4-seed1", "pcm4-seed2") and "pcm4" in REPEATED
    assert cifar_train.student_config(config, "pcm4-seed2").seed == config.seed + 2


def test_walkers_count_to_the_budget(runs, data):
    """As many passes as with data: guided teacher 2, target 1, student 3 for each example."""
    b, N, steps = 4, 10, 40
    by_hand = sum(Fraction(i * N, 16) // 1 for i in range(16))
    assert start_steps(16, N) == by_hand
    assert path_steps(steps, b, by_hand) == steps - round(2 * by_hand / (6 * b)) == 34
    for name in ("tdd_k4", "tdd_k"):
        log = (runs / name / "log.jsonl").read_text().splitlines()
        assert len(log) == path_steps(3, b, by_hand)
    assert len((runs / "tdd_k4_blind_data/log.jsonl").read_text().splitlines()) == 3


def test_an_interrupted_path_goes_on_bit_by_bit(runs, data, tmp_path, monkeypatch, capsys):
    for output in ("straight", "cut"):
        shutil.copytree(runs / "teacher", tmp_path / output / "teacher")
    more = {"steps": 14, "walkers": 20}
    _, straight = trained(tmp_path / "straight", data, "tdd_k", **more)
    calls, condition = [], cifar_train.condition

    def interrupted(*inputs):
        calls.append(len(inputs[0]))
        if sum(calls) == 90 + 3 * 4:  # all walkers are spread, and the third step is under way
            os.kill(os.getpid(), signal.SIGTERM)
        return condition(*inputs)

    monkeypatch.setattr(cifar_train, "condition", interrupted)
    with pytest.raises(SystemExit):
        trained(tmp_path / "cut", data, "tdd_k", **more)
    assert "stopped after step 3" in capsys.readouterr().err
    log, resumed = trained(tmp_path / "cut", data, "tdd_k", **more)
    assert len(log) == 6 and sum(calls) == 90 + 6 * 4  # nobody was spread again
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.parametrize(("name", "K", "tell"), [("tdd_k4", 4, None), ("tdm_unify", 2, 2),
                                                 ("tdd_k", 3, None), ("tdd_k", 5, 5)])  # fmt: skip
def test_told_students_are_sampled_as_diffusers_with_a_crop(
    runs, tmp_path, monkeypatch, capsys, name, K, tell
):
    """The file in diffusers, crop_top = 8 K, the vectors of K made large."""
    for folder in ("teacher", name):
        shutil.copytree(runs / folder, tmp_path / folder)
    path, up = tmp_path / name / "lora.safetensors", f"unet.{num_steps.LINEAR_1}.lora.up.weight"
    rewrite(path, lambda w: w | {up: w[up] + 0.5 * randn(*w[up].shape, seed=3).float()})
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "teacher")
    unet.load_lora_adapter(load_file(path), prefix="unet")
    times, words = [999, 699, 399], [] if tell is None else ["--tell-k", tell]
    words += ["--sample", name, "--runs", tmp_path, "--labels", "cat", "ship", "--num-images", 1]
    words += ["--gamma", 0, "--solver-steps", 10, "--seed", 5, "--steps", 3]
    code, _, err = run(cifar_sample, monkeypatch, capsys, *words, "--output", tmp_path / "x.png")
    nearest = "3 steps: told K = 4, the nearest of [4, 5, 6]\n" if name == "tdd_k4" else ""
    assert (code, err) == (0, nearest)
    grid = np.asarray(Image.open(tmp_path / "x.png")).astype(float)
    unet = unet.double()
    for crop_top, near in ((8 * K, True), (0, False), (8 * K + 8, False)):
        want = ddim_by_hand(unet, [3, 8], [5, 6], times, 0.0, 3, crop_top=crop_top)
        error = np.abs(np.stack([grid[:, :32], grid[:, 32:]]) - want).max()
        assert error < 0.6 if near else error > 5


def test_what_a_file_says_of_k(runs):
    headers = {}
    for name in ("tdd_k4", "tdd_k", "tdm_unify", "tdd_k4_blind_data"):
        with safe_open(runs / name / "lora.safetensors", "pt") as file:
            headers[name] = file.metadata()
    assert json.loads(headers["tdd_k4"]["told_ks"]) == [4, 5, 6]
    assert json.loads(headers["tdd_k"]["told_ks"]) == [1, 2, 3, 4, 5, 6]
    assert "told_ks" not in headers["tdd_k4_blind_data"]
    assert (
        headers["tdd_k4"]["pairs"] == "teacher" and headers["tdd_k4_blind_data"]["pairs"] == "data"
    )


@pytest.mark.parametrize(
    ("name", "K", "message"),
    [("tdd_k4", 7, "--tell-k 7: tdd_k4 knows [4, 5, 6]"), ("tdd_k4_blind_data", 4, "knows no K")],
)
def test_an_unknown_k_is_refused(runs, tmp_path, monkeypatch, capsys, name, K, message):
    words = ["--sample", name, "--runs", runs, "--tell-k", K, "--output", tmp_path / "x.png"]
    code, _, err = run(cifar_sample, monkeypatch, capsys, *words)
    assert code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("more", "message"),
    [({"rank": 4}, "a rank of 4 is too low to tell 6 K: give --rank 6"),
     ({"kmax": 12, "solver-steps": 20, "rank": 16},
      "--methods tdd_k: 32 sinusoids of the crop do not tell K of"),
     ({"methods": "tdd_k4_blind", "kmin": 6}, "tdd_k4_blind: K is drawn from several: --kmax must"),
     ({"methods": "cm tdd", "repeats": 2}, "--repeats is for pcm4, tdd_eta0, tdd_k4_data")],
)  # fmt: skip
def test_students_that_cannot_be_are_refused_before_the_first_training(
    data, tmp_path, monkeypatch, capsys, more, message
):
    words = flags(tmp_path / "x", data, **{"methods": "cm tdd_k"} | more)
    code, _, err = run(cifar_train, monkeypatch, capsys, *words)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("program", [cifar_sample, cifar_train])
def test_float32_is_exact_on_a_gpu(program, monkeypatch, tmp_path):
    """Convolutions too, which torch would compute in TF32; no weights or data are read."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    more = ["--sample", "teacher", "--runs"] if program is cifar_sample else ["--data-dir"]
    args = program.parser().parse_args([*more, str(tmp_path / "nowhere"), "--device", "cpu"])
    with pytest.raises((ValueError, OSError)):
        program.main(args)
    assert not torch.backends.cudnn.allow_tf32


def test_guidance_of_a_teacher_cannot_be_tuned(runs, tmp_path, monkeypatch, capsys):
    words = ["--sample", "teacher", "--runs", runs, "--cfg", 2, "--tune-guidance", 3]
    code, _, err = run(cifar_sample, monkeypatch, capsys, *words, "--output", tmp_path / "x.png")
    assert code == 2 and err.count("\n") == 1 and "--tune-guidance is for a student" in err


def test_a_missing_student_is_looked_for_where_the_user_trained(runs, monkeypatch, capsys):
    """Not among the weights that come with the code, unless it is there."""
    monkeypatch.chdir(runs.parent.parent)
    (runs.parent / "runs").symlink_to(runs.parent)
    monkeypatch.chdir(runs.parent)
    code, out, err = run(cifar_sample, monkeypatch, capsys, "--sample", "nonsense")
    assert code == 2 and out == ""
    assert "runs/cifar10 holds no finished student 'nonsense'; there: tdd_k tdd_k4" in err


# ------------------------------------------------------------------------- tables and pictures


def test_a_student_is_told_only_what_it_knows(data, tmp_path):
    """k and K, each with each; of a repeat the two ends."""
    config = build_config(tmp_path, data, kmax=8, rank=8)
    assert told_steps(config, "tdd_k") == [1, 2, 4, 6, 8] and told_steps(config, "tdd") == []
    assert told_wrong(config, "tdd_k4-seed1") == [(4, 8), (8, 4)]
    pairs = [(4, 6), (4, 8), (6, 4), (6, 8), (8, 4), (8, 6)]
    assert told_wrong(config, "tdd_k4") == pairs
    cases = method_cases(config, "tdd_k4")
    assert [(case.k, case.tell_k) for case in cases if case.tell_k is not None] == pairs
    config = build_config(tmp_path, data, kmin=5, kmax=8, rank=8)
    assert told_steps(config, "tdd_k4") == [6, 8] and told_steps(config, "tdm_unify") == [1, 2]
    for method in ("tdd_k4", "tdd_k", "tdm_unify"):
        known = cifar_train.student_config(config, method).told_ks
        for case in method_cases(config, method):
            assert case.tell_k is None or case.tell_k in known


def stub_evaluation(config, values):
    """An Evaluation with rows of these figures, by name and case; all metrics are alike."""
    evaluation = object.__new__(Evaluation)
    evaluation.config, evaluation.ks, evaluation.rows = config, [1, 2, 4, 5, 6], {}
    metrics = ("rmse", "frechet_teacher", "frechet_unpaired")
    for (method, case), value in values.items():
        figure = {"value": value, "error": 0.01}
        evaluation.rows[method, case] = dict.fromkeys(metrics, figure)
    return evaluation


def test_several_trainings_are_their_mean_and_deviation(data, tmp_path):
    config, names = build_config(tmp_path, data), ("tdd_k4", "tdd_k4-seed1", "tdd_k4-seed2")
    values = {}
    for i, name in enumerate(names):
        for k in (1, 2, 4, 5, 6):
            values[name, make_case(k)] = k + i**2
        values[name, make_case(6, tell_k=4)] = 10 + i**2
        values[name, make_case(4, tell_k=6)] = 20 + i**2
    values |= {("pcm4", make_case(k)): 0.5 * k for k in (1, 2, 4, 5, 6)}
    evaluation = stub_evaluation(config, values)
    mean, deviation = np.mean([0, 1, 4]), np.std([0, 1, 4], ddof=1)
    found = evaluation.figure("tdd_k4", "rmse", make_case(5))
    assert found == pytest.approx((5 + mean, deviation))
    assert evaluation.figure("pcm4", "rmse", make_case(4)) == (2.0, 0.01)
    assert evaluation.figure("pcm4", "rmse", make_case(4, gamma=0.2)) == (0.0, 0.0)
    _, plain, *wrong = evaluation.repeats_table("rmse").splitlines()
    assert plain.split()[3:] == [
        word for k in (1, 2, 4, 5, 6) for word in (f"{k + mean:.4f}", f"({deviation:.4f})")
    ]
    assert [line.split() for line in wrong] == [
        ["tdd_k4,", "told", "6", f"{20 + mean:.4f}", f"({deviation:.4f})"],
        ["tdd_k4,", "told", "4", f"{10 + mean:.4f}", f"({deviation:.4f})"],
    ]
    # Under the k that they are of.
    assert wrong[0].index("21.6667") == plain.index(f"{4 + mean:.4f}") - 1
    assert evaluation.methods == ["tdd_k4", "pcm4"] and "pcm4" not in "".join(wrong)


def test_the_picture_of_what_is_told_is_of_one_training(data, tmp_path, monkeypatch):
    """The first: repeats have only some of its cases."""
    config, values = build_config(tmp_path, data), {}
    for k, K in ((4, 4), (4, 6), (6, 4), (6, 6)):
        case = make_case(k, tell_k=None if k == K else K)
        values["tdd_k4", case], values["tdd_k4-seed1", case] = 0.1 * k + 0.01 * K, 9.0
    drawn = []
    monkeypatch.setattr(Figure, "text", lambda self, x, y, text, *_: drawn.append(text))
    figures.told_k(tmp_path / "told.png", stub_evaluation(config, values), {"tdd_k4": [4, 6]})
    assert [text for text in drawn if text[:2] == "0."] == ["0.440", "0.460", "0.640", "0.660"]


@pytest.mark.parametrize("name", PATHS)
def test_every_student_that_may_be_trained_has_a_name_in_the_pictures(data, tmp_path, name):
    evaluation = stub_evaluation(build_config(tmp_path, data), {("tdd", make_case(4)): 1.0})
    evaluation.rows["teacher", make_case(4)] = evaluation.rows["tdd", make_case(4)]
    evaluation.rows[name, make_case(4)] = evaluation.rows["tdd", make_case(4)]
    (title,) = [title for title, columns in figures.sheets(evaluation)[0][2]
                if columns[0].method == name]  # fmt: skip
    assert title == f"{NAMES[name.removesuffix('_path')]}, path"


def test_samples_in_many_small_steps_are_of_their_grid(data, tmp_path, monkeypatch):
    """Of N = 10 and 20, whose 5 steps are at the same times: not one file for both."""
    monkeypatch.setattr(evaluate, "weights_digest", lambda folder: "weights")
    monkeypatch.setattr(evaluate, "sample_pictures", lambda *_: torch.zeros(2, 3, 32, 32).byte())
    for N in (10, 20):
        evaluation = object.__new__(Evaluation)
        evaluation.config = build_config(tmp_path, data, **{"solver-steps": N})
        evaluation.label, evaluation.seeds, evaluation.exact = torch.zeros(2), range(2), {}
        evaluation.sample("teacher", None, make_case(5))
        evaluation._add_exact(LoadedModel(None), make_case(5, gamma=0.2))
    settings = []
    for path in (tmp_path / "samples").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            settings.append(json.loads(file.metadata()["settings"]))
    grids = sorted((each["exact"], each.get("solver_steps", 0)) for each in settings)
    assert grids == [(False, 0), (True, 10), (True, 20)]


def test_no_student_that_is_told_is_no_picture_of_it(runs, data, tmp_path, monkeypatch, capsys):
    """And one that an earlier run left is taken away."""
    output = tmp_path / "cifar10"
    for name in ("classifier", "teacher"):
        shutil.copytree(runs / name, output / name)
    (output / "told.png").write_text("old")
    words = flags(output, data, methods="pcm4_path cm_path")
    code, out, err = run(cifar_train, monkeypatch, capsys, *words)
    assert code == 0, err
    names = {path.stem for path in output.glob("*.png")}
    assert names == {"curves", "beyond_curves", "samples"}
    assert "68 steps of the teacher to spread the walkers" in out
    assert "one step is left: give fewer --walkers or more --steps" in err
    assert "several trainings" not in out
