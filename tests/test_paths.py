"""train_sdxl.py --pairs teacher: walkers in checkpoints, killed and resumed, damaged, unshared."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_sdxl
from common import files
from common.walkers import BATCHES, stagger_steps
from sdxl.pipeline import null_condition
from tdd import targets_of
from tests import helpers
from tests.helpers import randn
from tests.oracles import tiny_tdd
from tests.runs import ENVIRONMENT, HERE, command, killed, run, same_end, stderr_of, steps_of
from training.checkpoint import walkers_file
from training.paths import PathLoader, prompts_place, start_steps

KS = (4, 6, 8)
PATHS = ["--pairs", "teacher", "--ks", *KS, "--solver-steps", 20]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red fox\na street at night\nsnow\nan old man\na glass of water")
    return path


@pytest.fixture
def train(monkeypatch, capsys, folder, prompts):
    """train_sdxl.py from its command line in this process: (code, stdout, stderr)."""

    def call(output, *words):
        words = command(folder, prompts, output, *words)[2:]
        return helpers.run(train_sdxl, monkeypatch, capsys, *words)

    return call


# --------------------------------------------------------------------------------------- the flags

DEFAULTS = {
    # Ks, those that are told, eta, kmin, kmax, pairs
    "": ((), (), 0.3, 4, 8, "data"),
    "--ks 4 4": ((4,), (), 0.0, 4, 4, "data"),
    "--ks 4 8 6": ((4, 8, 6), (4, 8, 6), 0.0, 4, 8, "data"),
    "--ks 4 8 6 --no-tell-k": ((4, 8, 6), (), 0.0, 4, 8, "data"),
    "--ks 1 2 --eta 0.2 --pairs teacher": ((1, 2), (1, 2), 0.2, 1, 2, "teacher"),
    "--method pcm --pairs teacher": ((), (), 0.0, 4, 8, "teacher"),
    "--method tdm": ((4,), (), None, None, None, None),
    "--method tdm --ks 1 2 4": ((1, 2, 4), (1, 2, 4), None, None, None, None),
    "--method tdm --ks 1 2 4 --no-tell-k": ((1, 2, 4), (), None, None, None, None),
}


@pytest.mark.parametrize("words", DEFAULTS)
def test_what_flags_of_k_and_pairs_mean(words):
    words = ["--model", "x", "--data", "x", *words.split()]
    args = train_sdxl.parser().parse_args(words)
    train_sdxl.check_method(args)
    config = train_sdxl.build_config(args)
    values = args.Ks, config.told_ks, args.eta, args.kmin, args.kmax, args.pairs
    assert values == DEFAULTS[" ".join(words[4:])] and config.Ks == args.Ks
    assert train_sdxl.needs_prompts(args) == ("tdm" in words or "teacher" in words)
    assert (args.k_lr, args.batch_size) == (1e-4, 8 if "tdm" in words else 16)
    steps = {"tdm": [*args.Ks], "tdd": [args.kmin, args.kmax], "pcm": [4, 8]}[args.method]
    assert train_sdxl.preview_steps(config) == sorted({*steps})


# -------------------------------------------------------------------------------------- the loader


class Numbers:
    """Stands for the Loader of prompts: conditions by their numbers."""

    bad, left_out = 3, {"broken": 3}

    def __init__(self, position=0):
        self.position = position

    def __call__(self, count):
        self.position += count
        return [(i, f"number {i}") for i in range(self.position - count, self.position)]


def encode(numbers):
    cond = {"prompt_embeds": torch.cat([randn(1, 77, 128, seed=i) for i in numbers]),
            "pooled": torch.cat([randn(1, 48, seed=i) for i in numbers])}  # fmt: skip
    cond = {name: tensor.float() for name, tensor in cond.items()}
    cond["time_ids"] = torch.tensor([[64, 64, 0, 0, 64, 64]]).repeat(len(numbers), 1)
    return cond, null_condition(cond)


def path_loader(folder, position=0, N=5, **more):
    """Two walkers a batch on paths of N steps of the tiny SDXL; with the generator."""
    settings = {"w": (2.0, 6.0), "rho": 0.3, "eta": 0.0, "told_ks": (2, 4)}
    targets = targets_of("tdd", N, Ks=(2, 4))
    step = tiny_tdd(folder, torch.float32, targets=targets, **settings)
    numbers, generator = Numbers(position), torch.Generator().manual_seed(0)
    is_number = lambda cond: isinstance(cond, int)  # noqa: E731
    loader = PathLoader(step, (4, 8, 8), 2, generator, "cpu", numbers, is_number, numbers, **more)
    return loader, generator


def take(loader, generator):
    """One batch: what was drawn for it, and the loss."""
    batch = next(loader)
    sample = loader.step.sample((2, 4, 8, 8), generator, "cpu", batch["walkers"])
    with torch.no_grad():
        loss = loader.step.losses(None, *encode(batch["conds"]), sample)["loss"]
    return batch, sample, loss


@pytest.mark.parametrize(("fewest", "W", "steps"), [(0, 8, 38), (12, 12, 58)])
def test_walkers_are_spread_by_tenths_of_the_path(folder, fewest, W, steps):
    """By hand: walker i is 40 i / W points of the grid down, and each step goes down up to 4."""
    loader, _ = path_loader(folder, N=40, fewest=fewest)
    used = []
    assert sum(math.ceil(40 * i // W / 4) for i in range(W)) == steps == start_steps(W, 40)
    assert loader.start(lambda conds: used.extend(conds) or encode(conds)) == steps == len(used)
    assert loader.walkers.n.tolist() == [39 - 40 * i // W for i in range(W)]


def test_position_and_tensors_are_all_that_a_loader_needs(folder):
    """Through JSON and a file into another loader: the same batches, draws and losses, bit by bit.

    Until new paths have begun, with new conditions.
    """
    loader, generator = path_loader(folder)
    assert loader.start(encode) == stagger_steps(2 * BATCHES, 5)
    for _ in range(3):
        take(loader, generator)
    position = json.loads(json.dumps(loader.position))
    tensors = {name: tensor.clone() for name, tensor in loader.tensors().items()}
    other, other_generator = path_loader(folder, prompts_place(position))
    other.restore(position, tensors)
    other_generator.set_state(generator.get_state())
    assert other.position == loader.position and other.bad == 3 and other.left_out == {"broken": 3}
    start = loader.prompts.position
    for _ in range(12):
        (batch, sample, loss), (again, same, equal) = (
            take(loader, generator),
            take(other, other_generator),
        )
        assert batch["conds"] == again["conds"] and batch["names"] == again["names"]
        assert batch["names"] == [f"number {i}" for i in batch["conds"]]
        assert torch.equal(batch["walkers"], again["walkers"]) and torch.equal(loss, equal)
        assert torch.equal(sample.w, same.w) and sample.walkers is batch["walkers"]
        for a, b in zip(vars(sample.step).values(), vars(same.step).values(), strict=True):
            assert a is b is None or torch.equal(a, b)
    assert loader.prompts.position == other.prompts.position > start + 3


def test_walkers_are_four_times_what_an_optimizer_step_takes(folder):
    loader, _ = path_loader(folder, grad_accum=3)
    assert len(loader.walkers.n) == len(loader.walkers.x) == 4 * 2 * 3
    assert len(loader.walkers.draw(loader.batch_size)) == 2


@pytest.fixture(scope="module")
def begun(folder):
    """A loader whose walkers have begun."""
    loader, _ = path_loader(folder)
    loader.walkers._begin(torch.arange(8))
    return loader


DAMAGES = {
    "conds": [None, [], [["a", "b"]], 8 * ["abc"], 8 * [3], 8 * [["a", "number 1"]]],
    "n": [None, 3, [1], 8 * [1.5], 8 * [-1], 8 * [5], 8 * ["x"]],
    "keep_prompt": [None, True, 8 * [1]],
    "w": [None, 3.5, 8 * [True]],
    "x": [None, (1, 4, 8, 8), (8, 4, 8, 9)],
}


@pytest.mark.parametrize("name, value", [(k, v) for k, vs in DAMAGES.items() for v in vs])
def test_damaged_walkers_are_refused_whole(name, value, begun):
    """One line, and nothing of them is taken over: no number is spread over all walkers."""
    before, x = begun.position, begun.walkers.x.clone()
    position, tensors = {**json.loads(json.dumps(before)), "n": [3] * 8}, {"x": x + 1}
    if name != "x":
        position[name] = value
    else:
        tensors = {} if value is None else {"x": torch.zeros(value)}
    with pytest.raises(ValueError, match=r"walkers are damaged: begin with another --output$"):
        begun.restore(position, tensors)
    assert begun.position == before and torch.equal(begun.walkers.x, x)


@pytest.mark.parametrize("position", [None, 5, [], {}, {"prompts": None}])
def test_prompts_without_a_place_are_refused(position):
    """They would begin anew."""
    with pytest.raises(ValueError, match="walkers are damaged"):
        prompts_place(position)


# ------------------------------------------------------------------------------- killed and resumed


def test_one_process_killed_and_resumed_ends_the_same(folder, prompts, train, tmp_path):
    """With a moving average; prompts alone, so no picture is read and no autoencoder needed."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = [*PATHS, "--ema", 0.5, "--grad-accum", 2]
    code, _, err = train(whole, *words)
    assert code == 0, err
    killed(command(folder, prompts, cut, *words), cut / "log.jsonl", 3)
    code, _, resumed = train(cut, *words, "--resume")
    assert code == 0, resumed
    # Staggered once.
    assert "teacher's paths" in err and "teacher's paths" not in resumed
    same_end(whole, cut)
    one, other = (load_file(walkers_file(whole / f"checkpoint-{i}", 0))["x"] for i in (6, 8))
    moved = (one != other).flatten(1).any(1)
    assert len(moved) == 2 * 2 * BATCHES and 2 < moved.sum() <= 8
    about = files.read_tensors(whole / "lora.safetensors")[1]
    assert about.items() >= {
        "tdd_method": "tdd", "tdd_pairs": "teacher", "tdd_K": "[4, 6, 8]", "tdd_eta": "0.0",
        "tdd_told_ks": "[4, 6, 8]", "tdd_gamma": "0.0", "tdd_rho": "0.2", "tdd_steps": "8",
    }.items()  # fmt: skip


@pytest.mark.slow
def test_every_consistency_method_takes_the_teachers_pairs(train, tmp_path):
    """The walkers are the teacher's business: by the same random numbers they end the same."""
    flags = ["--pairs", "teacher", "--rho", 0, "--solver-steps", 20, "--steps", 1]
    first = None
    for words in ("--tcf 1", "--tcf 2", "--tcf s", "--method cm", "--method pcm", "--method tcd"):
        output = tmp_path / words.replace(" ", "")
        code, _, err = train(output, *flags, *words.split())
        assert code == 0, err
        about = files.read_tensors(output / "lora.safetensors")[1]
        assert about["tdd_pairs"] == "teacher" and about["tdd_rho"] == "0.0"
        assert words.split()[-1] in (about["tdd_tcf"], about["tdd_method"])
        (line,) = steps_of(output / "log.jsonl")
        assert line["loss"] > 0 and line["grad_norm"] > 0 and not line["skipped"]
        x = load_file(walkers_file(output / "checkpoint-1", 0))["x"]
        first = x if first is None else first
        assert torch.equal(x, first), words


@pytest.mark.slow
def test_two_processes_with_an_adversary_killed_and_resumed_end_the_same(folder, prompts, tmp_path):
    whole, cut, words = tmp_path / "whole", tmp_path / "cut", [*PATHS, "--adv"]
    done = run(command(folder, prompts, whole, *words, processes=2))
    assert done.returncode == 0, stderr_of(done)
    log = steps_of(whole / "log.jsonl")
    assert all(line["adv_heads"] > 0 and line["loss"] > 0 and not line["skipped"] for line in log)
    # Each process has walkers of its own.
    one, other = (load_file(walkers_file(whole / "checkpoint-8", i))["x"] for i in (0, 1))
    assert one.shape == other.shape == (2 * BATCHES, 4, 8, 8)
    assert (one != other).flatten(1).any(1).all()
    call = command(folder, prompts, cut, *words, processes=2)
    killed(call, cut / "log.jsonl", 3)
    done = run([*call, "--resume"])
    assert done.returncode == 0, stderr_of(done)
    same_end(whole, cut)


# ----------------------------------------------------------------------------- broken or not shared


@pytest.fixture(scope="module")
def three(folder, prompts, tmp_path_factory):
    """A run of three steps with a checkpoint after each."""
    output = tmp_path_factory.mktemp("three")
    words = [*PATHS, "--steps", 3, "--save-every", 1, "--keep", 3]
    done = run(command(folder, prompts, output, *words))
    assert done.returncode == 0, stderr_of(done)
    return output


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-9])


def spoil(path):
    tensors = load_file(path)
    tensors["x"][1, 2, 3, 4] = torch.nan
    save_file(tensors, path)


def empty(path):
    path.write_bytes(b"")


BREAKS = {
    "missing": (Path.unlink, "walkers-0.safetensors is missing"),
    "cut short": (cut_short, "walkers-0.safetensors is no whole safetensors file"),
    "empty": (empty, "walkers-0.safetensors is no whole safetensors file"),
    "NaN": (spoil, "walkers-0.safetensors: its tensor x holds NaN or infinity"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_checkpoint_with_broken_walkers_is_passed_over(name, three, train, tmp_path):
    """In one line; the run goes on from the one before, and ends as it did."""
    damage, message = BREAKS[name]
    output = shutil.copytree(three, tmp_path / "run")
    damage(walkers_file(output / "checkpoint-3", 0))
    code, _, err = train(output, *PATHS, "--steps", 3, "--save-every", 1, "--keep", 3, "--resume")
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "passing over" in line]
    assert line.startswith(f"passing over {output / 'checkpoint-3'}: ") and message in line
    for one, other in (
        (path, output / path.relative_to(three)) for path in three.glob("checkpoint-3/*tensors")
    ):
        one, other = load_file(one), load_file(other)
        assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_walkers_that_do_not_fit_are_refused_in_one_line(three, train, tmp_path):
    """A whole file of another shape, positions without a list or without a place."""
    words = [*PATHS, "--steps", 4, "--resume"]

    def without(name):
        content["positions"][0].pop(name)

    changes = {
        "x": lambda: save_file({"x": torch.zeros(1, 4, 8, 8)}, walkers),
        "n": partial(without, "n"), "conds": partial(without, "conds"),
        "prompts": partial(without, "prompts"), "place": lambda: content.update(positions=[[]]),
    }  # fmt: skip
    for name, change in changes.items():
        output = shutil.copytree(three, tmp_path / name)
        walkers = walkers_file(output / "checkpoint-3", 0)
        content = files.read_json(output / "checkpoint-3" / "config.json")
        change()
        files.write_json(output / "checkpoint-3" / "config.json", content)
        code, _, err = train(output, *words)
        lines = [line for line in err.splitlines() if line.startswith("train_sdxl.py: ")]
        assert code == 2 and len(lines) == 1, (name, err)
        assert "the checkpoint's walkers are damaged: begin with another --output" in lines[0]


def test_other_pairs_or_k_are_refused(three, prompts, train, tmp_path):
    """What a checkpoint's steps depend on; the rate of K's vectors may change."""
    output, words = shutil.copytree(three, tmp_path / "run"), ["--steps", 4, "--resume"]
    for changed, differ in (
        (["--ks", 4, 5, 8], "Ks (4, 6, 8), not (4, 5, 8)"),
        (["--no-tell-k"], "tell-k True, not False"),
        (["--pairs", "data", "--data", prompts.parent], "pairs teacher, not data"),
    ):
        code, _, err = train(output, *PATHS, *words, *changed)
        assert code == 2 and f"was made with {differ}: resume it" in err, err
    before = load_file(output / "checkpoint-3" / "state.safetensors")
    code, _, err = train(output, *PATHS, *words, "--k-lr", 0, "--lr", 0)
    assert code == 0 and "k-lr 0.0001 -> 0.0" in err and "lr 0.001 -> 0.0" in err, err
    after = load_file(output / "checkpoint-4" / "state.safetensors")
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith("student/"))


UNSHARED = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from training import checkpoint, distributed
rank, *_ = distributed.init_distributed("cpu")
output = Path({out!r}) / f"of-{{rank}}"
output.mkdir(exist_ok=True)
checkpoint.check_shared(output.parent)
try:
    checkpoint.check_shared(output)
except ValueError as problem:
    print(f"refused: {{problem}}")
distributed.close()
"""


def test_processes_that_share_no_folder_are_refused(tmp_path):
    """Both of them, in one line, and nothing is left behind; one folder for both is none."""
    script, children = tmp_path / "unshared.py", []
    script.write_text(UNSHARED.format(here=str(HERE), out=str(tmp_path)))
    port = str(29500 + os.getpid() % 2000)
    two = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(2):
        environment = {**ENVIRONMENT, **two, "RANK": str(rank)}
        call = [sys.executable, script]
        children.append(subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True))
    for rank, child in enumerate(children):
        said, _ = child.communicate(timeout=120)
        reason = f"{tmp_path / f'of-{rank}'} is another folder on other machines: share one"
        assert child.returncode == 0 and said == f"refused: {reason}\n"
    assert not list(tmp_path.rglob(".walkers*"))


# --------------------------------------------------------------------------------- going on from it


def adapter(seed, layer, rank=4):
    """A LoRA's tensors for one layer of a tiny SDXL's added embedding."""
    sizes = {"add_embedding.linear_1": 96, "add_embedding.linear_2": 256}
    down = randn(rank, sizes[layer], seed=seed).float() / 10
    up = randn(256, rank, seed=seed + 1).float() / 10
    return {f"unet.{layer}.lora.down.weight": down, f"unet.{layer}.lora.up.weight": up}


def test_a_lora_that_reads_the_sizes_in_another_way_is_refused(folder, train, tmp_path):
    """What it makes of the crop is not K; what it does behind that is kept."""
    words = ["--pairs", "teacher", "--solver-steps", 20, "--steps", 1, "--lr", 0, "--k-lr", 0]
    for rank in (2, 4):
        save_file(adapter(0, "add_embedding.linear_1", rank), tmp_path / "1.safetensors")
        init = ["--init", tmp_path / "1.safetensors"]
        code, _, err = train(tmp_path / "1", *words, "--ks", *KS, *init)
        lines = [line for line in err.splitlines() if line.startswith("train_sdxl.py: ")]
        message = "--init changes add_embedding.linear_1, but not to be told these K"
        assert code == 2 and len(lines) == 1 and message in lines[0]
    second = adapter(4, "add_embedding.linear_2")
    save_file(second, tmp_path / "2.safetensors")
    init = ["--init", tmp_path / "2.safetensors"]
    code, _, err = train(tmp_path / "2", *words, "--ks", *KS, *init)
    assert code == 0, err
    tensors = load_file(tmp_path / "2" / "lora.safetensors")
    assert len(tensors) == 4
    assert all(torch.allclose(tensor, tensors[name]) for name, tensor in second.items())


def test_a_told_student_is_gone_on_from_with_the_same_k(three, train, tmp_path):
    """--init: without learning rates it ends as it began; another K, or none, is refused."""
    start = three / "lora.safetensors"
    words = ["--pairs", "teacher", "--solver-steps", 20, "--steps", 1, "--init", start]
    words += ["--lr", 0, "--lora-alpha", 2]
    code, _, err = train(tmp_path / "same", *words, "--ks", *KS, "--k-lr", 0)
    assert code == 0, err
    one, other = load_file(start), load_file(tmp_path / "same" / "lora.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.allclose(tensor, other[k], rtol=1e-6) for k, tensor in one.items())
    for told in (["--ks", 4, 8], ["--ks", 4, 6, 8, "--no-tell-k"], ["--ks", 4]):
        code, _, err = train(tmp_path / "other", *words, *told)
        assert code == 2 and f"--init {start} is told K of [4, 6, 8]: give --ks 4 6 8" in err, err
