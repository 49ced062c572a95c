"""CIFAR-10: the whole path at a tiny size, its parts against diffusers, closed forms and numpy."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cifar import classifier as cifar_classifier
from cifar import data as cifar_data
from cifar import evaluate as cifar_eval
from cifar import sample as cifar_sample
from cifar import train as cifar_train
from cifar.config import METHODS, WALKERS
from cifar.stage import weights_digest
from common import files, plots
from solvers import sdxl_schedule
from tests.helpers import ALPHA, SIGMA, randn, run
from training.checkpoint import checkpoints

HERE = Path(__file__).parent.parent
# Of each kind of student one; tests/test_cifar_told.py trains others.
REST = ("tdd_k4_data", "tdd_k4_blind", "tdd_k4_blind_data", "tdd_eta0_path")
TRAINED = [name for name in METHODS if name not in REST]
# 32 channels alone would be groups of one each, from which GroupNorm takes all that temb has added.
TINY = {
    "channels": "64 32", "classifier-steps": 12, "teacher-steps": 30, "teacher-batch": 8,
    "steps": 3, "batch-size": 4, "walkers": 16, "samples": 20, "solver-steps": 10, "kmax": 6,
    "rank": 8, "methods": " ".join(TRAINED),
}  # fmt: skip
W = 2.0


def flags(output, data, **more):
    values = {"data": "cifar10", "data-dir": data, "output": output, **TINY, **more}
    if "_path" not in values["methods"] and "tdd_k" not in values["methods"]:
        # Without the teacher's pairs there are none.
        values |= {"walkers": more.get("walkers", WALKERS)}
    words = []
    for name, value in values.items():
        words += [f"--{name}", *str(value).split()]
    return words


def slice_of_cifar(folder, seed=0):
    """Six files of 30 records: a colour for each class, and noise."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = b""
        for label in range(30):
            colour = np.array([label % 3, label % 5 / 2, label % 7 / 3])[:, None, None] * 80
            pixels = colour + rng.integers(0, 90, (3, 32, 32))
            records += bytes([label % 10]) + pixels.astype(np.uint8).tobytes()
        (folder / name).write_bytes(records)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return slice_of_cifar(tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """The whole experiment, from the command line: where it lies, and what was printed."""
    output = tmp_path_factory.mktemp("runs") / "cifar10"
    command = [sys.executable, HERE / "train_toy.py", *flags(output, data)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return output, done.stdout


def build_config(output, data, **more):
    args = cifar_train.parser().parse_args(flags(output, data, **more))
    return cifar_train.build_config(args)


# ------------------------------------------------------------------------------------------ data


def test_records_are_read_as_they_lie_in_the_file(data):
    images, labels = cifar_data.read_split(data, train=False)
    content = (data / "test_batch.bin").read_bytes()
    # Record 17, green, row 5, column 9, straight from the format's description.
    assert images[17, 1, 5, 9].item() == content[17 * 3073 + 1 + 1024 + 5 * 32 + 9]
    assert labels.tolist() == [content[i * 3073] for i in range(30)]
    assert len(cifar_data.read_split(data, train=True)[0]) == 150


def test_x0_is_the_unshuffled_picture_and_loses_nothing(data):
    images, _ = cifar_data.read_split(data, train=False)
    x_0 = cifar_data.to_x0(images)
    want = nn.PixelUnshuffle(2)(images.double() / 255 * 2 - 1)
    torch.testing.assert_close(x_0.double(), want, rtol=0, atol=1e-6)
    assert torch.equal(cifar_data.to_bytes(x_0), images)
    # Beyond [-1, 1] there is no colour.
    assert cifar_data.to_bytes(3 * torch.ones(1, 12, 16, 16)).eq(255).all()


def test_a_batch_depends_on_seed_and_position_alone(data):
    split = cifar_data.read_split(data, train=True)
    straight = cifar_data.Batches(*split, 16, seed=3)
    first, second = next(straight), next(straight)
    resumed = next(cifar_data.Batches(*split, 16, seed=3, position=1))
    assert torch.equal(second["images"], resumed["images"])
    assert not torch.equal(first["images"], second["images"])
    flipped = 0
    for i, name in enumerate(second["names"]):
        source = split[0][int(name.split()[1])]
        assert second["labels"][i] == split[1][int(name.split()[1])]
        flipped += torch.equal(second["images"][i], source.flip(2))
        assert torch.equal(second["images"][i], source) ^ torch.equal(
            second["images"][i], source.flip(2)
        )
    assert 0 < flipped < 16


def test_random_crops_are_cut_one_by_one(data):
    images, _ = cifar_data.read_split(data, train=False)
    corners = torch.randint(0, 9, (30, 2), generator=torch.Generator().manual_seed(0))
    crops = cifar_classifier.random_crop(images, corners)
    for x, (top, left), crop in zip(images, corners.tolist(), crops, strict=True):
        padded = np.pad(x.numpy(), ((0, 0), (4, 4), (4, 4)))
        assert np.array_equal(crop.numpy(), padded[:, top : top + 32, left : left + 32])


@pytest.mark.parametrize("content", [None, b"1" * 5000, b"", b"\x0b" * 3073])
def test_data_that_is_not_there_says_where_to_get_it(content, tmp_path, monkeypatch, capsys):
    folder = slice_of_cifar(tmp_path / "data")
    (folder / "test_batch.bin").unlink()
    if content is not None:
        (folder / "test_batch.bin").write_bytes(content)
    code, _, err = run(cifar_train, monkeypatch, capsys, *flags(tmp_path / "out", folder))
    assert code == 2 and err.count("\n") == 1
    assert ("test_batch.bin is missing" if content is None else "no complete CIFAR-10") in err
    assert "cifar-10-binary.tar.gz" in err and "--data-dir" in err


# --------------------------------------------------------------------------------------- teacher


def test_teachers_loss_is_min_snr_weighted():
    """Against its formula in numpy, at timesteps on both sides of SNR = 5."""
    x_0, eps = randn(4, 12, 16, 16), randn(4, 12, 16, 16, seed=1)
    t = torch.tensor([3, 150, 400, 999])
    seen = []

    def network(x_t, t, cond):
        seen.append(x_t)
        return 0.5 * x_t

    loss = cifar_data.teacher_loss(network, x_0, {}, t, eps, sdxl_schedule())
    total = 0.0
    for i, time in enumerate(t.tolist()):
        alpha, sigma = ALPHA[time + 1], SIGMA[time + 1]
        x_t = alpha * x_0[i].numpy() + sigma * eps[i].numpy()
        np.testing.assert_allclose(seen[0][i].numpy(), x_t, atol=1e-6)
        snr = alpha**2 / sigma**2
        total += min(snr, 5) / snr * np.mean((0.5 * x_t - eps[i].numpy()) ** 2)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)


def test_labels_give_way_to_the_null_condition():
    cond = cifar_data.condition(torch.tensor([3, 9]), torch.tensor([True, False]))
    assert cond["prompt_embeds"].shape == (2, 1, 10) and cond["prompt_embeds"][0, 0].argmax() == 3
    assert cond["pooled"][0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert not cond["prompt_embeds"][1].any() and not cond["pooled"][1].any()
    assert cond["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


def test_saved_teacher_is_a_diffusers_unet(runs):
    theirs = UNet2DConditionModel.from_pretrained(runs[0] / "teacher").double()
    ours = cifar_sample.load_teacher(runs[0], "cpu").double()
    x_t, t = randn(3, 12, 16, 16), torch.tensor([0, 500, 999])
    cond = cifar_data.condition(torch.tensor([1, 5, 9]), torch.tensor([True, True, False]))
    cond = {key: value.double() for key, value in cond.items()}
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    want = theirs(x_t, t, cond["prompt_embeds"], added_cond_kwargs=added).sample
    torch.testing.assert_close(ours(x_t, t, cond), want, rtol=1e-6, atol=1e-6)


def stage_of(config, data, name):
    """A stage and what trains it."""
    stage = cifar_train.build_stage(config, name, cifar_data.read_split(data, train=True))
    train = {"classifier": cifar_train.train_classifier, "teacher": cifar_train.train_teacher}
    return stage, train.get(name, cifar_train.train_student)


def trained(output, data, name, **more):
    """The log and the weights of a stage, which is not finished yet."""
    config = build_config(output, data, **more)
    stage, train = stage_of(config, data, name)
    assert not stage.finished()
    train(config, stage)
    log = [json.loads(line) for line in (stage.folder / "log.jsonl").read_text().splitlines()]
    (weights,) = stage.folder.glob("*.safetensors")
    return log, load_file(weights)


@pytest.mark.parametrize(
    ("name", "called", "cut", "steps"),
    [
        ("classifier", "random_crop", 5, 12), ("teacher", "teacher_loss", 12, 30),
        ("tdd_adv", "to_x0", 4, 6), ("tdds", "to_x0", 2, 6), ("tdm_unify", "to_x0", 3, 4),
    ],
)  # fmt: skip
def test_an_interrupted_stage_goes_on_bit_by_bit(
    name, called, cut, steps, runs, data, tmp_path, monkeypatch, capsys
):
    if name not in ("classifier", "teacher"):
        for output in ("straight", "cut"):
            shutil.copytree(runs[0] / "teacher", tmp_path / output / "teacher")
    _, straight = trained(tmp_path / "straight", data, name, steps=6)
    count, function = iter(range(1000)), getattr(cifar_train, called)

    def interrupted(*inputs):
        if next(count) == cut - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*inputs)

    monkeypatch.setattr(cifar_train, called, interrupted)
    with pytest.raises(SystemExit) as stop:
        trained(tmp_path / "cut", data, name, steps=6)
    assert stop.value.code == 128 + signal.SIGTERM
    assert f"stopped after step {cut}; the same command goes on" in capsys.readouterr().err
    assert checkpoints(tmp_path / "cut" / name)[0].name == f"checkpoint-{cut}"
    # Not even half of it is used under other settings.
    with pytest.raises(ValueError, match="was made with seed 0, not 1"):
        trained(tmp_path / "cut", data, name, steps=6, seed=1)
    log, resumed = trained(tmp_path / "cut", data, name, steps=6)
    # The steps before were not done again.
    assert next(count) == steps == len(log)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.parametrize(
    ("name", "loss"),
    # The student's loss in TDM is what guidance makes of eps: with so raw a teacher hardly more
    # than bfloat16's rounding.
    [("teacher", "loss"), ("tdd_adv", "loss"), ("tdm4", "fake")],
)
def test_bf16_follows_float32(name, loss, runs, data, tmp_path):
    """The gpu preset's precision: the losses of a few steps, and what is saved."""
    logs = []
    for dtype in ("float32", "bf16"):
        if name != "teacher":
            shutil.copytree(runs[0] / "teacher", tmp_path / dtype / "teacher")
        more = {"dtype": dtype, "teacher-steps": 4, "steps": 4}
        log, weights = trained(tmp_path / dtype, data, name, **more)
        assert {w.dtype for w in weights.values()} == {torch.float16}
        logs.append([line[loss] for line in log])
    assert logs[1] == pytest.approx(logs[0], rel=0.1) and logs[0] != logs[1]


# ----------------------------------------------------------------------------------- whole path


def test_second_run_uses_what_is_there(runs, data, tmp_path, monkeypatch, capsys):
    output, printed = tmp_path / "cifar10", runs[1]
    shutil.copytree(runs[0], output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    pasted, paste = [], plots.Figure.paste
    monkeypatch.setattr(
        plots.Figure, "paste", lambda self, x, *box: pasted.append(x.copy()) or paste(self, x, *box)
    )
    words = flags(output, data, methods="tdd tdd_rho0 tdd_high")
    code, out, _ = run(cifar_train, monkeypatch, capsys, *words)
    assert code == 0
    # The pictures in the sheets are the samples themselves: the first of TDD, non-equidistant.
    first = samples_of(output, "tdd", k=5, schedule="nonequidistant")[0].permute(1, 2, 0).numpy()
    assert any(np.array_equal(x, first) for x in pasted)
    assert out.count("finished before, used again") == 2 + 3
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    for name in ("samples", "curves", "guidance", "clipping", "schedules"):
        assert Image.open(output / f"{name}.png").size[0] > 300
    # The tables are the same figures again.
    start, end = out.index("frechet_teacher"), out.rindex("\n", 0, -1)
    lines = out[start:end].splitlines()
    assert len(lines) > 50 and set(lines) <= set(printed.splitlines())
    # With noise between the steps the teacher has no samples of its many steps.
    noisy = out[out.index("frechet_teacher at gamma = 0.2") :]
    assert out.count("teacher, 10 steps") == 6 and "teacher, 10 steps" not in noisy


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher-lr": 2e-3}, "teacher was made with teacher-lr 0.001, not 0.002"),
        ({"steps": 4}, "cm was made with steps 3, not 4"),
        ({"guidance": 4, "methods": "tdd"}, "tdd was made with guidance 3.0, not 4.0"),
        ({"classifier-steps": 13}, "classifier was made with steps 12, not 13"),
        ({"samples": 31}, "--samples 31: there are 30 real ones to compare with"),
        ({"channels": "32 48"}, "--channels 32 48: up to 4 levels, of a multiple of 32 each"),
        ({"kmax": 11, "methods": "cm"}, "kmax 11 steps do not fit N = 10 solver steps"),
    ],
)
def test_changed_settings_never_reuse_anothers_weights(
    runs, data, monkeypatch, capsys, changed, message
):
    words = flags(runs[0], data, **changed)
    code, _, err = run(cifar_train, monkeypatch, capsys, *words)
    assert code == 2 and err.count("\n") == 1 and message in err


CHANGED = {
    "channels": "64 64", "classifier-steps": 13, "teacher-steps": 31, "teacher-batch": 9,
    "teacher-lr": 2e-3, "teacher-ema": 0.5, "drop": 0.3, "steps": 4, "batch-size": 5, "lr": 1e-3,
    "ema": 0.5, "rank": 9, "kmin": 3, "kmax": 7, "rho": 0.5, "guidance": 4, "solver-steps": 20,
    "seed": 1, "dtype": "bf16", "walkers": 17,
}  # fmt: skip
# What the evaluation alone depends on, or no result at all.
MAY_CHANGE = {"repeats": 2, "methods": "tdd pcm4_path", "samples": 16, "compile": ""}


def test_every_flag_is_among_the_settings_or_makes_no_difference(runs, data):
    names = {action.dest.replace("_", "-") for action in cifar_train.parser()._actions}
    # Where things lie and are done, and what is but other defaults.
    rest = {"help", "data", "data-dir", "output", "device", "preset"}
    assert names == {*CHANGED, *MAY_CHANGE, *rest}
    stages = ("classifier", "teacher", "cm", "pcm4", "tdd", "tdd_adv", "tdm4", "pcm4_path")

    def settings(**more):
        config = build_config(runs[0], data, **more)
        return [stage_of(config, data, name)[0].settings for name in stages]

    plain = settings()
    for name, value in CHANGED.items():
        assert settings(**{name: value}) != plain, name
    for name, value in MAY_CHANGE.items():
        assert settings(**{name: value}) == plain, name
    # Four batches of 4 there are in any case, and without pairs from the path no walkers.
    assert settings(walkers=1) == plain
    assert settings(walkers=17)[:-1] == plain[:-1]


def rewrite(path, change, retrained=True):
    """Writes change(weights) over a stage's weights; retrained: as if its training had done so."""
    weights, metadata = files.read_tensors(path)
    save_file(change(weights), path, metadata)
    stage = path.with_name("stage.json")
    if retrained:
        digest = weights_digest(path.parent)
        stage.write_text(json.dumps(json.loads(stage.read_text()) | {"weights": digest}))


def scaled(factor):
    return lambda weights: {name: factor * value for name, value in weights.items()}


@pytest.mark.parametrize("name", ["classifier", "teacher", "tdd"])
def test_weights_of_elsewhere_are_no_finished_stage(
    name, runs, data, tmp_path, monkeypatch, capsys
):
    """A judge, teacher or student that was exchanged under its path; config.json counts as well."""
    output = tmp_path / "cifar10"
    shutil.copytree(runs[0], output)
    (path,) = (output / name).glob("*.safetensors")
    rewrite(path, scaled(2), retrained=False)
    code, _, err = run(cifar_train, monkeypatch, capsys, *flags(output, data, methods="tdd"))
    assert code == 2 and f"{name}: its weights are not those that its training wrote" in err
    shutil.copy(runs[0] / name / path.name, path)
    assert run(cifar_train, monkeypatch, capsys, *flags(output, data, methods="tdd"))[0] == 0


@pytest.mark.parametrize("name", ["classifier", "teacher", "tdd"])
def test_weights_without_their_settings_are_not_trained_over(
    name, runs, data, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "cifar10"
    shutil.copytree(runs[0], output)
    (output / name / "stage.json").unlink()
    (path,) = (output / name).glob("*.safetensors")
    before = path.read_bytes()
    code, _, err = run(cifar_train, monkeypatch, capsys, *flags(output, data, methods="tdd"))
    assert code == 2 and err.count("\n") == 1 and str(output / name) in err
    assert path.read_bytes() == before


def test_flags_without_use_are_refused(runs, data, tmp_path, monkeypatch, capsys):
    for methods, flag, value in (("tdd", "walkers", 1), ("tdm4", "rho", 1), ("tdm4", "ema", 0)):
        words = flags(tmp_path / "new", data, methods=methods, **{flag: value})
        code, _, err = run(cifar_train, monkeypatch, capsys, *words)
        assert code == 2 and f"--{flag} is for " in err and err.count("\n") == 1
    # A moving average that stays where it began.
    for flag in ("ema", "teacher-ema"):
        words = flags(tmp_path / "new", data, methods="tdd", **{flag: 1})
        code, _, err = run(cifar_train, monkeypatch, capsys, *words)
        assert code == 2 and f"argument --{flag}: a number" in err
    assert not (tmp_path / "new").exists()


def test_samples_of_other_weights_are_not_used_again(runs, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "cifar10"
    shutil.copytree(runs[0], output)
    rewrite(output / "tdd/lora.safetensors", scaled(3))
    before = set((output / "samples").iterdir())
    words = flags(output, data, methods="cm tdd")
    assert run(cifar_train, monkeypatch, capsys, *words)[0] == 0
    assert {p.name[:4] for p in set((output / "samples").iterdir()) - before} == {"tdd-"}
    old, new = (
        {
            (r["method"], r["k"], r["w"], r["schedule"], r["clip_steps"]): r["rmse"]["value"]
            for r in json.loads((folder / "metrics.json").read_text())["rows"] if "rmse" in r
        }
        for folder in (runs[0], output)
    )  # fmt: skip
    assert all((new[key] == old[key]) == (key[0] != "tdd") for key in new)
    assert {key[0] for key in new} == {"teacher", "cm", "tdd"}


def test_changed_data_never_reuse_anothers_weights(runs, tmp_path, monkeypatch, capsys):
    other = slice_of_cifar(tmp_path / "other", seed=1)
    code, _, err = run(cifar_train, monkeypatch, capsys, *flags(runs[0], other))
    assert code == 2 and "classifier was made with data" in err


def test_a_stage_of_another_version_is_refused(runs, data, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs[0] / "teacher", tmp_path / "teacher")
    path = tmp_path / "teacher/stage.json"
    stage = json.loads(path.read_text())
    assert stage["settings"].pop("version") == "5"
    path.write_text(json.dumps(stage))
    for script, words in (
        (cifar_train, flags(tmp_path, data)),
        (cifar_sample, ["--sample", "teacher", "--runs", tmp_path]),
    ):
        code, _, err = run(script, monkeypatch, capsys, *words)
        assert code == 2 and err.count("\n") == 1
        assert "teacher was made with version 1, not 5" in err


def test_students_of_another_teacher_are_refused(runs, data, tmp_path):
    config = build_config(tmp_path, data)
    (tmp_path / "teacher").symlink_to(runs[0] / "teacher")
    (tmp_path / "tdd").mkdir()
    stage = json.loads((runs[0] / "tdd/stage.json").read_text())
    stage["settings"]["teacher"] = "0123456789ab"
    (tmp_path / "tdd/stage.json").write_text(json.dumps(stage))
    stage = cifar_train.build_stage(config, "tdd", cifar_data.read_split(data, train=True))
    with pytest.raises(ValueError, match="tdd was made with teacher 0123456789ab, not"):
        stage.finished()


def test_a_student_is_not_sampled_on_another_teacher(runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs[0] / "tdd", tmp_path / "tdd")
    shutil.copytree(runs[0] / "teacher", tmp_path / "teacher")
    rewrite(tmp_path / "teacher/diffusion_pytorch_model.safetensors", scaled(1.01))
    code, _, err = run(cifar_sample, monkeypatch, capsys, "--sample", "tdd", "--runs", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "is the student of another teacher than" in err


# --------------------------------------------------------------------------------------- figures


def frechet_by_definition(a, b):
    """The textbook's formula with the square root of the product itself."""
    (m, c), (m_, c_) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
    root = np.sqrt(np.linalg.eigvals(c @ c_).astype(complex)).real.sum()
    return ((m - m_) ** 2).sum() + np.trace(c) + np.trace(c_) - 2 * root


def test_frechet_distance_is_the_textbooks():
    a, b = randn(200, 6) @ randn(6, 6, seed=2), randn(150, 6, seed=1) + 0.3
    got = cifar_eval.frechet(cifar_eval.moments(a), cifar_eval.reference(b))
    assert got == pytest.approx(frechet_by_definition(a.numpy(), b.numpy()), rel=1e-8)
    # Diagonal Gaussians, in closed form.
    one = torch.tensor([1.0, 2.0]), torch.diag(torch.tensor([4.0, 9.0]))
    other = torch.tensor([0.0, 0.0]), torch.eye(2), torch.eye(2)
    assert cifar_eval.frechet(one, other) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2)


def test_jackknife_of_a_mean_is_the_standard_error():
    """With groups of one picture each it is the sample's deviation over the root of n."""
    x = randn(cifar_eval.GROUPS)
    mean = cifar_eval.jackknife([x[i].mean().item() for i in cifar_eval.subsets(len(x))])
    assert mean["value"] == pytest.approx(x.mean().item())
    assert mean["error"] == pytest.approx(x.std().item() / len(x) ** 0.5)
    # What depends on the class alone has no error: every group holds each class as often.
    of_class = (torch.arange(200) % 10 < 3).double()
    shares = [of_class[i].mean().item() for i in cifar_eval.subsets(200)]
    assert cifar_eval.jackknife(shares)["error"] == pytest.approx(0, abs=1e-9)


def test_png_bits_tell_flat_pictures_from_noise():
    flat = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    noise = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    low, high = cifar_eval.png_bits(torch.cat([flat, noise]))
    # Noise cannot be compressed below its 24 bits a pixel.
    assert low < 2 and 24 < high < 27


def samples_of(output, method, **case):
    """The saved samples of the one case with these settings."""
    matching = []
    for path in (output / "samples").glob(f"{method}-*.safetensors"):
        with safe_open(path, "pt") as file:
            settings = json.loads(file.metadata()["settings"])
            if case.items() <= settings.items():
                matching.append(file.get_tensor("images"))
    (images,) = matching
    return images


def test_rows_are_what_the_samples_give(runs, data):
    output, printed = runs
    metrics = json.loads((output / "metrics.json").read_text())
    classifier = cifar_classifier.Classifier().eval()
    classifier.load_state_dict(load_file(output / "classifier/model.safetensors"))
    with torch.no_grad():
        read = lambda images: [  # noqa: E731
            x.double().numpy() for x in classifier(nn.PixelUnshuffle(2)(images / 127.5 - 1))
        ]
        images, _ = cifar_data.read_split(data, train=True)
        train, _ = read(images)
        few = samples_of(output, "tdd", k=4, gamma=0.0, w=0.0, clip_steps=4)
        many = samples_of(output, "teacher", k=10, seed=1_000_000)
        others = samples_of(output, "teacher", k=10, seed=1_000_020)
        (features, logits), (reference, _), (unpaired, _) = read(few), read(many), read(others)
    scale = (np.trace(np.cov(train.T)) / 100) ** 0.5
    case = {"method": "tdd", "k": 4, "gamma": 0.0, "w": 0.0, "clip_steps": 4}
    (row,) = [row for row in metrics["rows"] if case.items() <= row.items()]
    labels = np.arange(20) % 10
    want = {
        "frechet_data": frechet_by_definition(features / scale, train / scale),
        "frechet_teacher": frechet_by_definition(features / scale, reference / scale),
        "frechet_unpaired": frechet_by_definition(features / scale, unpaired / scale),
        "accuracy": np.mean(logits.argmax(1) == labels),
        "rmse": np.sqrt(np.mean(((few.double() - many.double()) / 127.5).numpy() ** 2)),
    }
    for name, value in want.items():
        # 20 pictures leave a covariance of 256 features singular: square roots of rounding errors.
        assert row[name]["value"] == pytest.approx(value, rel=2e-3, abs=2e-3), name
    # The floor of unpaired distances is the teacher's own, from the other noise.
    (floor,) = [row for row in metrics["rows"] if row["method"] == "other_seeds"]
    expected = frechet_by_definition(unpaired / scale, reference / scale)
    assert floor["frechet_teacher"]["value"] == pytest.approx(expected, rel=2e-3, abs=2e-3)
    # With noise a student is compared with exact jumps between the same noise.
    (noisy,) = [r for r in metrics["rows"] if (case | {"gamma": 0.2}).items() <= r.items()]
    noisy_samples = samples_of(output, "tdd", k=4, gamma=0.2, w=0.0, clip_steps=4)
    exact = samples_of(output, "teacher", k=4, gamma=0.2, exact=True)
    error = np.sqrt(np.mean(((noisy_samples.double() - exact.double()) / 127.5).numpy() ** 2))
    assert noisy["rmse"]["value"] == pytest.approx(error)
    # The table is the rows in print.
    line = next(line for line in printed.splitlines() if line.startswith("tdd "))
    assert f"{row['frechet_teacher']['value']:.3f}" in line
    images, labels = cifar_data.read_split(data, train=False)
    with torch.no_grad():
        right = read(images)[1].argmax(1) == labels.numpy()
    assert metrics["classifier_accuracy"] == pytest.approx(right.mean())


def test_every_case_of_the_issue_is_there(runs):
    rows = json.loads((runs[0] / "metrics.json").read_text())["rows"]
    seen = {(r["method"], r["k"], r["gamma"], r["schedule"], r["w"], r["tune"]) for r in rows}
    plain = [m for m in TRAINED if m not in ("tdd_rho0", "tdd_high")]
    for method in plain:
        assert {(method, k, 0.0, "equidistant", 0.0, None) for k in (1, 2, 4, 5, 6)} <= seen
        assert {(method, k, 0.2, "equidistant", 0.0, None) for k in (4, 5, 6)} <= seen
    assert {("teacher", k, 0.0, "equidistant", W, None) for k in (1, 2, 4, 5, 6, 10)} <= seen
    assert {("teacher", k, 0.2, "equidistant", W, None) for k in (4, 5, 6)} <= seen
    assert ("tdd", 5, 0.0, "nonequidistant", 0.0, None) in seen and len(seen) < len(rows)
    clipped = {(r["w"], r["clip_steps"]) for r in rows if r["method"] == "tdd" and r["k"] == 4}
    assert {(w, n) for w in (0.0, 1.0, 2.0) for n in (0, 1, 4)} <= clipped
    for method in ("tdd", "tdd_rho0"):
        assert {(method, 4, 0.0, "equidistant", w, None) for w in (0.0, 1.0, 2.0, 3.0)} <= seen
    assert {("tdd_high", 4, 0.0, "equidistant", w, 5.0) for w in (1.0, 2.0, 3.0)} <= seen


# -------------------------------------------------------------------------------------- sampling


def diffusers_student(output, name):
    unet = UNet2DConditionModel.from_pretrained(output / "teacher")
    if name != "teacher":
        unet.load_lora_adapter(load_file(output / name / "lora.safetensors"), prefix="unet")
    return unet.double()


@torch.no_grad()
def ddim_by_hand(
    unet, labels, seeds, timesteps, w, clip_steps, before_step=lambda s: None, crop_top=0
):
    """Guided DDIM on diffusers' UNet, x_0 clipped, as bytes (n, 32, 32, 3).

    before_step(s): called before each step with where it ends.
    """
    code = torch.eye(10, dtype=torch.float64)[labels]
    size = torch.tensor([[32, 32, crop_top, 0, 32, 32]]).repeat(len(labels), 1)

    def eps(x, t, code):
        added = {"text_embeds": code, "time_ids": size}
        return unet(x, t, code[:, None], added_cond_kwargs=added).sample

    draws = [
        torch.randn((1, 12, 16, 16), generator=torch.Generator().manual_seed(s)) for s in seeds
    ]
    x = torch.cat(draws).double()
    for i, t in enumerate(timesteps):
        before_step(timesteps[i + 1] if i + 1 < len(timesteps) else 0)
        e = (1 + w) * eps(x, t, code) - w * eps(x, t, 0 * code)
        x_0 = (x - SIGMA[t + 1] * e) / ALPHA[t + 1]
        if i < clip_steps:
            x_0 = x_0.clamp(-1, 1)
            e = (x - ALPHA[t + 1] * x_0) / SIGMA[t + 1]
        if i + 1 == len(timesteps):
            break
        s = timesteps[i + 1]
        x = ALPHA[s + 1] * x_0 + SIGMA[s + 1] * e
    pixels = nn.PixelShuffle(2)(x_0).clamp(-1, 1)
    return ((pixels + 1) * 127.5).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("name", "w", "more", "timesteps", "clip"),
    [
        ("tdd", 0.0, [], [999, 799, 499, 299], 4),
        ("teacher", 2.0, ["--cfg", 3, "--clip-steps", 1], [999, 799, 499, 299], 1),
        ("tdd_high", -0.5, ["--cfg", 3, "--tune-guidance", 6], [999, 799, 499, 299], 4),
    ],
)
def test_saved_networks_are_sampled_as_diffusers_would(
    runs, tmp_path, monkeypatch, capsys, name, w, more, timesteps, clip
):
    path = tmp_path / "new/grid.png"
    words = ["--sample", name, "--runs", runs[0], "--labels", "cat", "ship", "--num-images", 2]
    words += ["--gamma", 0, "--solver-steps", 10, "--seed", 5, "--output", path, *more]
    code, out, err = run(cifar_sample, monkeypatch, capsys, *words)
    assert (code, err) == (0, "") and str(path) in out
    unet = diffusers_student(runs[0], name)
    want = ddim_by_hand(unet, [3, 8, 3, 8], [5, 6, 7, 8], timesteps, w, clip)
    grid = np.asarray(Image.open(path)).astype(float)
    got = [grid[y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    assert np.abs(np.stack(got) - want).max() < 0.6


def test_gamma_that_is_not_given_is_the_methods(runs, tmp_path, monkeypatch, capsys):
    for name, gamma in (("cm", "1"), ("pcm4", "0"), ("tcd", "0.2"), ("tdd", "0.2"), ("tdm4", "0")):
        words = ["--sample", name, "--runs", runs[0], "--steps", 1, "--output", tmp_path / "x.png"]
        assert f"gamma = {gamma}\n" in run(cifar_sample, monkeypatch, capsys, *words)[1]


@pytest.mark.parametrize("name", ["tcds", "tdds"])
def test_students_with_a_scalar_are_sampled_as_diffusers_with_a_hook(
    runs, tmp_path, monkeypatch, capsys, name
):
    """The target time reaches the network, in an embedding made large."""
    for folder in ("teacher", name):
        shutil.copytree(runs[0] / folder, tmp_path / folder)
    path, last = tmp_path / name / "lora.safetensors", "unet.told.linear_2.weight"
    rewrite(path, lambda w: w | {last: 0.3 * randn(*w[last].shape, seed=3).float()})
    weights = load_file(path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "teacher")
    lora = {k: v for k, v in weights.items() if ".told." not in k}
    unet.load_lora_adapter(lora, prefix="unet")
    prefix = "unet.told."
    embedding = {k.removeprefix(prefix): v.double() for k, v in weights.items() if prefix in k}
    vector = []

    def embed(s):
        waves = get_timestep_embedding(torch.tensor([s]), 64, True, 0).double()
        h = waves @ embedding["linear_1.weight"].T + embedding["linear_1.bias"]
        h = h * h.sigmoid() @ embedding["linear_2.weight"].T + embedding["linear_2.bias"]
        vector[:] = [h]

    unet.double().time_embedding.register_forward_hook(lambda m, i, out: out + vector[0])
    times = [999, 699, 399]
    want = ddim_by_hand(unet, [3, 8], [5, 6], times, 0.0, 3, embed)
    words = ["--sample", name, "--runs", tmp_path, "--labels", "cat", "ship", "--num-images", 1]
    words += ["--gamma", 0, "--solver-steps", 10, "--seed", 5, "--steps", 3]
    code, _, err = run(cifar_sample, monkeypatch, capsys, *words, "--output", tmp_path / "x.png")
    assert (code, err) == (0, "")
    grid = np.asarray(Image.open(tmp_path / "x.png")).astype(float)
    assert np.abs(np.stack([grid[:, :32], grid[:, 32:]]) - want).max() < 0.6
    plain = ddim_by_hand(unet, [3, 8], [5, 6], times, 0.0, 3, lambda s: vector.__setitem__(0, 0.0))
    assert np.abs(plain - want).max() > 5


def test_a_student_is_sampled_on_its_own_grid(runs, tmp_path, monkeypatch, capsys):
    drawn = {}
    for name, N in {"default": None, "same": 10, "other": 8}.items():
        path = tmp_path / f"{name}.png"
        words = [] if N is None else ["--solver-steps", N]
        words += ["--sample", "tdd", "--runs", runs[0], "--num-images", 1, "--output", path]
        assert run(cifar_sample, monkeypatch, capsys, *words)[0] == 0
        drawn[name] = np.asarray(Image.open(path))
    assert np.array_equal(drawn["default"], drawn["same"])
    assert not np.array_equal(drawn["default"], drawn["other"])


def test_sampling_from_the_command_line_of_the_toy(runs, tmp_path):
    command = [sys.executable, HERE / "train_toy.py", "--data=cifar10", "--sample", "tdd"]
    command += ["--runs", runs[0], "--num-images", "1", "--steps", "5", "--schedule"]
    command += ["nonequidistant", "--solver-steps", "40", "--output", tmp_path / "x.png"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "x.png").size == (320, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sample", "tddd"], "no finished student 'tddd'; there: cm pcm4 pcm4_path tcd"),
        (["--sample", "tdd", "--steps", 11], "11 steps: from 1 to 10"),
        (["--sample", "tdd", "--device", "nowhere"], "--device nowhere cannot be used here"),
        (["--sample", "tdd", "--labels", "unicorn"], "invalid choice: 'unicorn'"),
        (["--sample", "tdd", "--runs", "none"], "holds no finished teacher: python train_toy.py "),
        (["--sample", "tdd", "--cfg", 1e39], "samples are not finite"),
        (["--sample", "tdd", "--output", "x.jpg"], "--output x.jpg: pictures are PNG files"),
        (["--sample", "tdd", "--output", "."], "--output .: the grid is one PNG file: name it"),
    ],
)
def test_sampling_says_what_is_wrong(runs, tmp_path, monkeypatch, capsys, words, message):
    words = ["--runs", runs[0], "--solver-steps", 10, "--output", tmp_path / "x.png", *words]
    code, _, err = run(cifar_sample, monkeypatch, capsys, *words)
    assert code == 2 and err.count("\n") == 1 and message in err


def test_presets_fill_the_flags():
    cpu, gpu = (cifar_train.parser(name).parse_args([]) for name in ("cpu", "gpu"))
    assert (cpu.dtype, gpu.dtype, gpu.device, gpu.compile) == ("float32", "bf16", "cuda", True)
    config = cifar_data.unet_json(gpu.channels)
    with torch.device("meta"):
        size = sum(p.numel() for p in UNet2DConditionModel.from_config(config).parameters())
    # "About 35 million", as asked for.
    assert 30e6 < size < 40e6
