"""The 2-D toy: its network, data and distances against second derivations, and its script."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import toy
import train_toy
from test_tdd import SCHEDULE, SIGMA, randn

# -------------------------------------------------------------------------------------- the toy


def test_timestep_embedding_is_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 19, 500, 999])
    theirs = get_timestep_embedding(t, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(toy.timestep_embedding(t), theirs, atol=1e-6)


def test_ensemble_members_are_separate_mlps():
    ensemble = toy.Ensemble.fresh(3, SCHEDULE, torch.Generator().manual_seed(0), width=8)
    for p in ensemble.parameters():
        p.data = randn(*p.shape, seed=p.numel(), dtype=torch.float32)
    x_t, t, cond = randn(12, 2).float(), torch.arange(12) * 83, randn(12, 4, seed=2).float()
    together = ensemble(x_t, t, cond)
    for row in range(12):
        m, (time,) = row % 3, t[row : row + 1].tolist()
        h = torch.cat([x_t[row], toy.timestep_embedding(t[row : row + 1])[0], cond[row]])
        for i in range(4):
            h = (h if i == 0 else h * h.sigmoid()) @ ensemble.weight[i][m] + ensemble.bias[i][m, 0]
        expected = SIGMA[time + 1] * x_t[row] + h
        assert torch.allclose(together[row], expected, atol=1e-4)
    swapped = ensemble.pick([2, 0, 1, 1])(x_t, t, cond)
    assert torch.allclose(swapped[0], ensemble.pick([2])(x_t[:1], t[:1], cond[:1])[0], atol=1e-5)


@pytest.mark.parametrize("name", toy.DATA)
def test_data_is_standardised_and_classes_lie_where_they_should(name):
    data = toy.Data(name)
    x, label = data.draw(20_000, torch.Generator().manual_seed(1))
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
    assert toy.rmse(x, x + shift).item() == pytest.approx(5)
    # Every projection of a shift d is d cos, and the mean of cos^2 is 1/2.
    assert toy.sliced_wasserstein(x, x + shift, label).item() == pytest.approx(5 / 2**0.5)
    # N(0, 1) against N(0, 4): each projection is at W2 = 2 - 1.
    far = toy.sliced_wasserstein(
        randn(80_000, 2), 2 * randn(80_000, 2, seed=9), torch.arange(80_000) % 4
    )
    assert far.item() == pytest.approx(1, abs=0.03)
    mixed = toy.sliced_wasserstein(x, x[torch.arange(4000) ^ 1], label)
    assert mixed.item() > 0.02  # classes swapped in pairs: the same cloud, but not class by class


def run_script(monkeypatch, capsys, *words):
    """The exit code, and what was said on stderr."""
    monkeypatch.setattr("sys.argv", ["train_toy.py", *map(str, words)])
    code = 0
    try:
        cli.run(train_toy.main, train_toy.parser())
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kmin", 9, "--kmax", 4], "kmin 9, kmax 4"),
        (["--kmax", 51], "kmax 51"),
        (["--kmin", 0], "at least 1"),
        (["--eta", 1.5], "at most 1"),
        (["--eta", "nan"], "at least 0"),
        (["--rho", -0.1], "at least 0"),
        (["--steps", 0], "at least 1"),
        (["--steps", "ten"], "whole number"),
        (["--guidance", 0.5], "at least 1"),
        (["--solver-steps", 300], "must divide"),
        (["--data", "moons"], "moons"),
        (["--methods", "lcm2"], "lcm2"),
        (["--output", "FILE/below"], "cannot write"),
        (["--what"], "--what"),
    ],
)
def test_bad_flags_are_refused_in_one_line(words, said, monkeypatch, capsys, tmp_path):
    (tmp_path / "FILE").write_text("in the way")
    output = [] if "--output" in words else ["--output", tmp_path / "out"]
    words = [str(word).replace("FILE", str(tmp_path / "FILE")) for word in words]
    code, err = run_script(monkeypatch, capsys, "--quick", *words, *output)
    assert code == 2
    assert said in err
    assert err.startswith("train_toy.py: ")
    assert err.count("\n") == 1


def test_a_loss_that_explodes_stops_the_run(monkeypatch, capsys, tmp_path):
    code, err = run_script(monkeypatch, capsys, "--quick", "--lr", 1e30, "--output", tmp_path)
    assert code == 2
    assert "train_toy.py: the teacher's loss is" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_ctrl_c_keeps_what_is_finished(monkeypatch, capsys, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_toy, "train_students", interrupt)
    code, err = run_script(monkeypatch, capsys, "--quick", "--steps", 2, "--output", tmp_path)
    assert code == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["targets.png"]


def test_quick_run_end_to_end(monkeypatch, capsys, tmp_path):
    """The whole script; even 500 steps put TDD well below CM and one step."""
    code, err = run_script(monkeypatch, capsys, "--quick", "--output", tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / "metrics.json").read_text())
    fields = {"method", "variant", "k", "gamma", "schedule", "w", "tune", "clip_steps", "metric",
              "per_seed", "mean", "std"}  # fmt: skip
    assert all(set(row) == fields for row in result["rows"])
    assert {row["method"] for row in result["rows"]} == {"teacher", *train_toy.STUDENTS}

    def mean(method, ks):
        return np.mean([
            row["mean"] for row in result["rows"]
            if row["method"] == method and row["k"] in ks and row["metric"] == "rmse"
            and row["schedule"] == "equidistant" and not row["variant"] and not row["gamma"]
            and not row["clip_steps"] and not row["w"]
        ])  # fmt: skip

    assert mean("tdd", range(4, 9)) < 0.7 * mean("cm", range(4, 9))
    assert mean("tdd", [4]) < mean("tdd", [1]) / 2
    assert 0 < result["noise_floor"]["sw"]["mean"] < 0.2
    for name in ("samples", "curves", "targets", "trajectories", "guidance"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.getextrema() == ((0, 255),) * 3 or min(picture.getextrema())[0] < 60
    assert not list(tmp_path.glob("*.part*"))
