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

from cifar import sample as cifar_sample
from cifar import train as cifar_train
from cifar.config import METHODS, PATHS, REPEATED
from common.compare import path_steps
from sdxl import num_steps
from tests.helpers import randn, run
from tests.test_cifar import build_config, ddim_by_hand, flags, rewrite, slice_of_cifar, trained


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
    by_hand = sum(9 - (9 - Fraction(i * N, 4 * b) // 1) for i in range(4 * b))
    assert path_steps(steps, b, N) == steps - round(2 * by_hand / (6 * b)) == 34
    for name in ("tdd_k4", "tdd_k"):
        assert len((runs / name / "log.jsonl").read_text().splitlines()) == path_steps(3, b, N)
    assert len((runs / "tdd_k4_blind_data/log.jsonl").read_text().splitlines()) == 3


def test_an_interrupted_path_goes_on_bit_by_bit(runs, data, tmp_path, monkeypatch, capsys):
    for output in ("straight", "cut"):
        shutil.copytree(runs / "teacher", tmp_path / output / "teacher")
    _, straight = trained(tmp_path / "straight", data, "tdd_k", steps=12)
    calls, condition = [], cifar_train.condition

    def interrupted(*inputs):
        calls.append(len(inputs[0]))
        if sum(calls) == 68 + 3 * 4:  # all walkers are spread, and the third step is under way
            os.kill(os.getpid(), signal.SIGTERM)
        return condition(*inputs)

    monkeypatch.setattr(cifar_train, "condition", interrupted)
    with pytest.raises(SystemExit):
        trained(tmp_path / "cut", data, "tdd_k", steps=12)
    assert "stopped after step 3" in capsys.readouterr().err
    log, resumed = trained(tmp_path / "cut", data, "tdd_k", steps=12)
    assert len(log) == 6 and sum(calls) == 68 + 6 * 4  # nobody was spread again
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
