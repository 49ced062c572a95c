"""train_sdxl.py resumed: by the content of what it was given, with settings that may change."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_sdxl
from tests.helpers import run
from training import checkpoint, distributed

PARTS = ["unet", "vae", "text_encoder", "text_encoder_2"]


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        (root / f"{i}.png").write_bytes(stream.getvalue())
        (root / f"{i}.txt").write_text(f"picture {i}")
    return root


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """train_sdxl.py from its command line in this process: (code, stdout, stderr)."""

    def call(model, data, *words, output="run"):
        flags = {"model": model, "data": data, "output": tmp_path / output, "resolution": 64,
                 "batch-size": 1, "grad-accum": 1, "steps": 2, "sample-every": 0, "workers": 1,
                 "device": "cpu", "dtype": "float32", "lr": 1e-3, "rank": 2}  # fmt: skip
        listed = [word for k, v in flags.items() for word in (f"--{k}", v)]
        return run(train_sdxl, monkeypatch, capsys, *listed, *words)

    return call


def test_the_same_content_elsewhere_goes_on(folder, images, train, tmp_path):
    """Model and data moved, and the old paths linked to them, end as an undisturbed run does."""
    model = shutil.copytree(folder, tmp_path / "model")
    assert train(model, images, "--steps", 4, output="whole")[0] == 0
    assert train(model, images)[0] == 0
    model.rename(tmp_path / "elsewhere")
    images.rename(tmp_path / "photos")
    code, _, err = train(tmp_path / "elsewhere", tmp_path / "photos", "--resume", "--steps", 3)
    assert code == 0 and f"model {model} -> {tmp_path / 'elsewhere'}" in err
    model.symlink_to(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "photos")
    assert train(model, images, "--resume", "--steps", 4)[0] == 0
    cut, whole = (load_file(tmp_path / k / "lora.safetensors") for k in ("run", "whole"))
    assert cut.keys() == whole.keys() and all(torch.equal(v, whole[k]) for k, v in cut.items())


@pytest.mark.parametrize("part", PARTS)
def test_another_content_under_the_same_path_is_refused(part, folder, images, train, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    assert train(model, images, "--steps", 1)[0] == 0
    (path,) = (model / part).glob("*.safetensors")
    tensors = {k: v * 1.01 for k, v in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    code, _, err = train(model, images, "--resume")
    assert code == 2 and f"was made with content of {part} " in err
    assert "resume it with the same, or name another --output" in err


def test_learning_rate_and_intervals_may_change_and_are_logged(folder, images, train, tmp_path):
    """Adam's first moments are the old run's; the step is the new rate's, an eighth of the old."""
    assert train(folder, images, "--steps", 2)[0] == 0
    for name, rate in (("a", "1e-3"), ("b", "1.25e-4")):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        words = ["--resume", "--steps", 3, "--lr", rate, "--save-every", 1]
        code, _, err = train(folder, images, *words, output=name)
        assert code == 0
    assert "lr 0.001 -> 0.000125, save-every 500 -> 1, steps 2 -> 3" in err
    states = []
    for name, step in (("run", 2), ("a", 3), ("b", 3)):
        states.append(load_file(tmp_path / name / f"checkpoint-{step}" / "state.safetensors"))
    start, a, b = states
    moved = 0
    for name, before in start.items():
        if name.startswith("student/"):
            step_a, step_b = a[name] - before, b[name] - before
            assert torch.allclose(step_a, 8 * step_b, rtol=1e-2, atol=1e-6)
            moved += step_a.abs().sum()
    assert moved > 0
    notes = [json.loads(x) for x in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [x["changes"]["lr"] for x in notes if "changes" in x] == ["0.001 -> 0.000125"]
    assert [x["step"] for x in notes if "loss" in x] == [1, 2, 3]
    code, _, err = train(folder, images, "--resume", "--rho", 0.1)
    assert code == 2 and "was made with rho 0.2, not 0.1" in err


def test_a_broken_checkpoint_is_passed_over(folder, images, train, tmp_path):
    """NaN in a weight, or a config.json of other kinds: the one before is gone on from."""
    assert train(folder, images, "--steps", 3, "--save-every", 1, "--keep", 3)[0] == 0
    path = tmp_path / "run" / "checkpoint-3" / "state.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("student/"))
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, path)
    config = tmp_path / "run" / "checkpoint-2" / "config.json"
    for key, value in (("step", True), ("positions", {}), ("settings", []), ("scaler", None)):
        content = json.loads(config.read_text())
        (tmp_path / "bad.json").write_text(json.dumps(content | {key: value}))
        shutil.copytree(tmp_path / "run", tmp_path / key)
        shutil.copy(tmp_path / "bad.json", tmp_path / key / "checkpoint-2" / "config.json")
        code, _, err = train(folder, images, "--resume", "--steps", 3, output=key)
        assert code == 0, err
        assert f"checkpoint-3/state.safetensors: its tensor {name} holds NaN" in err
        assert f"its config.json has no proper {key}" in err


def test_adversarial_training_has_the_papers_rate_and_batch():
    """Appendix: learning rate 2e-6 and batch 448, of 8 GPUs x 14 x 4; 1e-6 and 512 otherwise."""
    for words, rate, batch in (
        ([], 1e-6, 512),
        (["--adv"], 2e-6, 448),
        (["--lr", "3e-6", "--adv"], 3e-6, 448),
    ):
        args = train_sdxl.parser().parse_args(["--model", "x", "--data", "x", *words])
        train_sdxl.check_method(args)
        assert (args.lr, 8 * args.batch_size * args.grad_accum) == (rate, batch)


def test_a_second_run_in_the_same_folder_ends_the_first(tmp_path):
    """Whoever begins last writes; the first says so at its next checkpoint and leaves all alone."""
    states = [checkpoint.TrainState(tmp_path, {}, {}, None, None, {}, run_id=k) for k in "ab"]
    states[0].claim_output()
    states[0].check_alone()
    states[1].claim_output()
    states[1].check_alone()
    with pytest.raises(ValueError, match=r"another run \(b\) has begun in .*: this one stops"):
        states[0].check_alone()


def test_processes_with_different_content_are_refused(monkeypatch):
    """Another machine's model, or its newest checkpoint where no folder is shared."""
    mine, theirs = {"content of unet": "aa", "checkpoint": "none"}, {"content of unet": "aa"}
    for other in ({**theirs, "checkpoint": "checkpoint-500"}, {**mine, "content of unet": "bb"}):
        monkeypatch.setattr(distributed, "gather", lambda value, other=other: [other, value])
        with pytest.raises(ValueError, match=r"differs: process 0 has .*; give all the same"):
            distributed.check_same(mine)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, dict(value)])
    distributed.check_same(mine)
