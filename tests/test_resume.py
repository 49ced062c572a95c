"""train_sdxl.py resumed: by the content of what it was given, with settings that may change."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_sdxl
from common import files
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
    rescale(model / part)
    code, _, err = train(model, images, "--resume")
    assert code == 2 and f"was made with content of {part} " in err
    assert "resume it with the same, or name another --output" in err


def rescale(folder, factor=1.01):
    (path,) = folder.glob("*.safetensors")
    save_file({k: v * factor for k, v in load_file(path).items()}, path, {"format": "pt"})


def test_a_cache_serves_any_unet_but_no_other_text_encoder(folder, images, train, tmp_path):
    model, words = shutil.copytree(folder, tmp_path / "model"), ["--cache", tmp_path / "cache"]
    assert train(model, images, *words)[0] == 0
    rescale(model / "unet")
    assert train(model, images, *words, output="other")[0] == 0
    rescale(model / "text_encoder_2")
    code, _, err = train(model, images, *words, output="third")
    assert code == 2 and "cache was made with content of text_encoder_2 " in err


def test_images_below_a_quarter_of_the_resolution_are_left_out(folder, images, train):
    for name, height in (("small", 15), ("enough", 16)):
        Image.new("RGB", (40, height)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text("x")
    code, _, err = train(folder, images, "--steps", 5)
    assert code == 0 and "skipped small.png: 40 x 15 is smaller than --min-size 16" in err
    assert "enough" not in err


def test_another_lora_to_go_on_from_is_refused(folder, images, train, tmp_path):
    assert train(folder, images, output="first")[0] == 0
    init = tmp_path / "init"
    init.mkdir()
    shutil.copy(tmp_path / "first" / "lora.safetensors", init)
    words = ["--init", init / "lora.safetensors"]
    assert train(folder, images, *words)[0] == 0
    assert train(folder, images, *words, "--resume", "--steps", 3)[0] == 0
    shutil.copy(tmp_path / "run" / "lora.safetensors", init)
    code, _, err = train(folder, images, *words, "--resume", "--steps", 4)
    assert code == 2 and "was made with content of init " in err


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
    # Killed before its checkpoint, the run of another rate leaves no trace in the log.
    shutil.rmtree(tmp_path / "b" / "checkpoint-3")
    assert train(folder, images, *words, output="b")[0] == 0
    words = ["--resume", "--steps", 4, "--lr", "1.25e-4", "--save-every", 1]
    assert train(folder, images, *words, output="b")[0] == 0
    notes = [json.loads(x) for x in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    changes = {"lr": "0.001 -> 0.000125", "save-every": "500 -> 1", "steps": "2 -> 3"}
    assert [x["changes"] for x in notes if "changes" in x] == [changes, {"steps": "3 -> 4"}]
    assert [x["step"] for x in notes if "loss" in x] == [1, 2, 3, 4]
    cache = tmp_path / "cache"
    for flag, differ in (
        (["--rho", 0.1], "rho 0.2, not 0.1"),
        (["--cache", cache], "examples from --data, not --cache"),
    ):
        code, _, err = train(folder, images, "--resume", *flag)
        assert code == 2 and f"was made with {differ}" in err
    # Refused before hours of encoding.
    assert not cache.exists()


# What no step depends on, learning rates, and paths, whose content is compared instead.
MAY_CHANGE = [
    "model",
    "tokenizer",
    "vae",
    "data",
    "cache",
    "init",
    "output",
    "sample_prompts",
    "lr",
    "k_lr",
    "adv_lr",
    "fake_lr",
    "warmup",
    "steps",
    "save_every",
    "keep",
    "resume",
    "sample_every",
    "device",
    "compile",
    "checkpointing",
    "workers",
    "max_bad",
]


def test_every_flag_may_change_or_is_refused(monkeypatch, tmp_path):
    flags = {action.dest for action in train_sdxl.parser()._actions} - {"help"}
    assert flags > {*MAY_CHANGE}
    config = {"settings": checkpoint.VERSION | dict.fromkeys(flags, "a"), "positions": [{}]}
    monkeypatch.setattr(checkpoint, "_newest_intact", lambda *_: (tmp_path, config))
    for flag in flags:
        settings = dict.fromkeys(flags, "a") | {flag: "b"}
        if flag in MAY_CHANGE:
            assert checkpoint.resume_point(tmp_path, True, settings) == (tmp_path, config)
        else:
            with pytest.raises(ValueError, match=f"made with {flag.replace('_', '-')} a, not b"):
                checkpoint.resume_point(tmp_path, True, settings)


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


def test_a_second_run_in_the_same_folder_ends_the_first(tmp_path, monkeypatch):
    """Whoever begins last writes; the first says so at its next checkpoint and leaves all alone."""
    states = [checkpoint.TrainState(tmp_path, {}, {}, None, None, {}) for _ in range(2)]
    for state, node in zip(states, ("here", "there")):
        # Two containers may begin in the same second, each as its process 1.
        monkeypatch.setattr("platform.node", lambda node=node: node)
        state.claim_output()
        state.check_alone()
    with pytest.raises(ValueError, match=r"another run \(.* on there, .*\) has .*: this one stops"):
        states[0].save(keep=1)


def test_where_a_file_ends_is_part_of_the_content(tmp_path):
    """A tokenizer's two files, of which one has lost a line to the other."""
    prints = set()
    for i, contents in enumerate([("ab", "c"), ("a", "bc"), ("abc", "")]):
        paths = [tmp_path / f"{i}{k}" for k in range(2)]
        for path, content in zip(paths, contents):
            path.write_text(content)
        prints.add(files.fingerprint(*paths))
    assert len(prints) == 3


def test_what_is_left_out_is_logged_when_it_is_news(tmp_path, capsys):
    counts = {"cut": 1}
    state = checkpoint.TrainState(tmp_path, {}, {}, None, None, {}, counts=counts.copy)
    for state.step, more in ((1, {}), (2, {}), (3, {"bad": 2})):
        counts.update(more)
        state.log_counts()
    notes = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert notes == [{"step": 1, "counts": {"cut": 1}}, {"step": 3, "counts": {"cut": 1, "bad": 2}}]
    assert capsys.readouterr().err.splitlines() == ["by step 1: 1 cut", "by step 3: 1 cut; 2 bad"]


def test_processes_with_different_content_are_refused(monkeypatch):
    """Another machine's model, or its newest checkpoint where no folder is shared."""
    mine = {"content of unet": "aa", "checkpoint": "none"}
    for other, differ in (
        ({**mine, "checkpoint": "checkpoint-500"}, "checkpoint checkpoint-500, not none"),
        ({**mine, "content of unet": "bb"}, "content of unet bb, not aa"),
        ({**mine, "content of scheduler": "cc"}, "content of scheduler cc, not None"),
    ):
        monkeypatch.setattr(distributed, "gather", lambda value, other=other: [other, value])
        with pytest.raises(ValueError, match=f"process 0 has {differ} as process 0: give the same"):
            distributed.check_same(mine)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, dict(value)])
    distributed.check_same(mine)


def test_processes_with_different_flags_are_refused(monkeypatch, tmp_path):
    """On another machine paths may differ, and what they lead to is compared; so may the device."""
    flags = {action.dest for action in train_sdxl.parser()._actions} - {"help"}
    settings = dict.fromkeys([*flags, "content of unet", "examples from"], "a")
    paths = {action.dest for action in train_sdxl.parser()._actions if action.type is Path}
    for name in settings:
        monkeypatch.setattr(
            distributed,
            "gather",
            lambda value, name=name: [
                {**value, **dict.fromkeys(value.keys() & {name}, "b")},
                value,
            ],
        )
        if name in paths | {"device"}:
            assert checkpoint.resume_point(tmp_path, True, settings) == (None, {})
        else:
            shown = name if " " in name else name.replace("_", "-")
            with pytest.raises(ValueError, match=f"process 0 has {shown} b, not a as process 0"):
                checkpoint.resume_point(tmp_path, True, settings)
