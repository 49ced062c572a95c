"""The trained weights in cifar/weights: whole, of one run, and sampled as that run sampled them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar import sample as cifar_sample
from cifar.classifier import Classifier, classify
from cifar.stage import read_stage
from common import files
from sdxl.weights import load_strict
from tests.helpers import run

WEIGHTS = Path(__file__).parent.parent / "cifar" / "weights"
# A row each of samples.png, the first picture of each class that the run drew: steps, guidance.
ROWS = {"teacher": (4, 3), "tdd": (4, 1), "tdd_k": (4, 1), "tdm_unify": (2, 1)}


def pictures_of_the_run():
    """(4, 10, 32, 32, 3): by row and class."""
    grid = np.array(Image.open(WEIGHTS / "samples.png"))
    assert grid.shape == (4 * 32, 10 * 32, 3)
    return grid.reshape(4, 32, 10, 32, 3).transpose(0, 2, 1, 3, 4)


def test_they_are_small_and_whole():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*")) < 20 * 2**20
    stages = {path.parent.name for path in WEIGHTS.glob("*/stage.json")}
    assert stages == {*ROWS, "classifier"}
    assert all(read_stage(WEIGHTS / name) for name in stages)


@pytest.mark.parametrize("name", ROWS)
def test_samples_are_those_of_the_run(name, tmp_path, monkeypatch, capsys):
    """Without the data set or a run of one's own. Other CPUs may round another way."""
    monkeypatch.chdir(tmp_path)
    steps, guidance = ROWS[name]
    words = ["--sample", name, "--steps", steps, "--cfg", guidance, "--gamma", 0]
    words += ["--seed", 1_000_000, "--num-images", 1, "--device", "cpu"]
    code, out, err = run(cifar_sample, monkeypatch, capsys, *words)
    assert code == 0, err
    assert f"the weights are {WEIGHTS}'s" in out
    found = np.array(Image.open("cifar.png"), dtype=int).reshape(32, 10, 32, 3).swapaxes(0, 1)
    difference = np.abs(found - pictures_of_the_run()[list(ROWS).index(name)])
    assert difference.max() <= 2 and difference.mean() < 0.05


def test_the_judge_knows_what_they_show():
    path = WEIGHTS / "classifier" / "model.safetensors"
    judge = load_strict(Classifier(), files.read_tensors(path)[0], path).float()
    pictures = torch.tensor(pictures_of_the_run()).flatten(0, 1).permute(0, 3, 1, 2)
    _, predictions = classify(judge, pictures, "cpu")
    right = predictions.view(4, 10) == torch.arange(10)
    assert abs(right.sum().item() - 31) <= 1  # of 40; by chance 4
