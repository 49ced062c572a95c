"""train_sdxl.py as its users run it: two processes, kills, caches, bad data, files for others."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import TCDScheduler
from PIL import Image
from safetensors.torch import safe_open, save_file

import train_sdxl
from common import cli, files
from sdxl import load
from sdxl.lora_files import read_lora
from sdxl.pipeline import null_condition
from tdd import StepSample
from tests.helpers import ALPHA, SIGMA, equation_22
from tests.oracles import (
    Reference,
    Theirs,
    drawn,
    euler_pipeline,
    example,
    full_student,
    ours,
    tiny_tdd,
    tiny_tdm,
)
from tests.runs import ENVIRONMENT, HERE, command, killed, run, same_end, stderr_of, steps_of
from training import preview
from training.checkpoint import checkpoint_step, checkpoints
from training.distill import FullNetwork, TDDStepSample
from training.streams import Loader, Prompts


def picture(i, kind="PNG"):
    width, height = [(80, 100), (64, 64), (200, 90), (70, 64), (96, 128)][i % 5]
    pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three tars of five examples: a corrupt image, an empty caption, and the last one cut off."""
    root = tmp_path_factory.mktemp("shards")
    for s in range(3):
        with tarfile.open(root / f"{s:03}.tar", "w") as tar:
            for i in range(5):
                parts = {"jpg": picture(5 * s + i, "JPEG"), "txt": f"picture {i} of {s}".encode()}
                if (s, i) == (0, 2):
                    parts["jpg"] = parts["jpg"][:150]
                if (s, i) == (1, 1):
                    parts["txt"] = b" \n"
                for kind, content in parts.items():
                    info = tarfile.TarInfo(f"{s:03}{i:03}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    whole = (root / "002.tar").read_bytes()
    (root / "002.tar").write_bytes(whole[: len(whole) * 2 // 5])
    return root


# ------------------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def two(folder, shards, tmp_path_factory):
    """A run of two processes on the tars, never stopped; its folder and what it said."""
    output = tmp_path_factory.mktemp("two")
    done = run(command(folder, shards, output, "--ema", 0.5, "--adv", processes=2))
    assert done.returncode == 0, stderr_of(done)
    return output, done.stderr


def test_torchrun_passes_over_bad_data(two):
    """The run ends, counts each bad example once, and names it with the reason."""
    output, said = two
    log = steps_of(output / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 9))
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and not line["skipped"] for line in log)
    for name, reason in (("000002", "Truncated"), ("001001", "caption"), ("002.tar", "tar")):
        assert any(name in line and reason in line for line in said.splitlines()), said
    # Both processes' counts, of the first epoch, each example once.
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["counts"] for line in lines if "counts" in line][-1] == {
        "images that cannot be read": 1, "captions that cannot be read": 1,
        ".tar files that are broken or hold no image": 1,
        "images without a caption": 1,  # which the cut tar does not reach any more
    }  # fmt: skip
    assert Image.open(output / "loss.png").size == (900, 500)


def test_a_process_that_waits_for_one_that_ended_says_so(folder, tmp_path):
    """Of two that encode an image each, one meets a broken file that --max-bad does not allow."""
    for name, content in (("a", picture(0)), ("b", b"no")):
        (tmp_path / f"{name}.png").write_bytes(content)
        (tmp_path / f"{name}.txt").write_text("x")
    words = ["--cache", tmp_path / "cache", "--max-bad", 0]
    done = run(command(folder, tmp_path, tmp_path / "out", *words, processes=2))
    assert done.returncode == 1 and "more than --max-bad allows; the first: b.png" in done.stderr
    assert "another process of this run has ended, and says why" in done.stderr
    assert "RuntimeError" not in done.stderr


def test_two_processes_killed_and_resumed_end_the_same(two, folder, shards, tmp_path):
    words = ["--ema", 0.5, "--adv"]
    call = command(folder, shards, tmp_path, *words, processes=2)
    killed(call, tmp_path / "log.jsonl", 3)
    # A grid of samples in between must not move the random numbers either.
    done = run([*call, "--resume", "--sample-every", "7"])
    assert done.returncode == 0, stderr_of(done)
    assert (tmp_path / "samples" / "step-000007.png").stat().st_size > 10_000
    same_end(two[0], tmp_path)


JOINED = """
import sys, torch
sys.path.insert(0, {here!r})
from pathlib import Path
from sdxl.pipeline import null_condition
from tests.oracles import drawn, example, tiny_tdm, full_student, tiny_tdd
from training import distributed
rank, world, _ = distributed.init_distributed("cpu")
nets = tiny_tdd(Path({folder!r}), torch.float64)
nets.distribute(distributed.wrap_ddp)
x_0, cond = example(4)
half = slice(2 * rank, 2 * rank + 2)
c = {{k: v[half] for k, v in cond.items()}}
optimizer = torch.optim.AdamW(nets.student.parameters(), 1e-2)
for step in range(3):
    draws = drawn(nets, x_0[half], 10 * step + rank)
    nets.losses(x_0[half], c, null_condition(c), draws)["total"].backward()
    if step == 0:
        torch.save([p.grad for p in nets.student.parameters()], f"{out}/grads-{{rank}}")
    optimizer.step()
    optimizer.zero_grad()
torch.save(list(nets.student.parameters()), f"{out}/weights-{{rank}}")
# The whole UNet, sharded: FSDP in the place of DDP.
nets = full_student(Path({folder!r}))
nets.distribute(distributed.wrap_ddp)
optimizer = torch.optim.SGD(nets.student.parameters(), 1.0)
for step in range(2):
    nets.losses(x_0[half], c, null_condition(c), drawn(nets, x_0[half], rank))["total"].backward()
    optimizer.step()
    nets.after_step()
    optimizer.zero_grad()
networks = nets.student, nets.target_net
found = [[distributed.gather_full(p) for p in m.parameters()] for m in networks]
torch.save(found, f"{out}/whole-{{rank}}")
nets = tiny_tdm(Path({folder!r}), Ks=(2, 4), told_ks=(2, 4))
nets.distribute(distributed.wrap_ddp)
nets.losses(None, c, null_condition(c), drawn(nets, x_0[half], rank))["total"].backward()
torch.save([p.grad for m in nets.modules.values() for p in m.parameters()], f"{out}/tdm-{{rank}}")
distributed.close(nets.ddp_modules)
"""


def test_two_processes_are_one_on_the_joined_batch(folder, tmp_path):
    """Gradients of two gloo processes and of one with both batches and draws; they stay in step."""
    script = tmp_path / "joined.py"
    script.write_text(JOINED.format(here=str(HERE), folder=str(folder), out=tmp_path))
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = run([*start, "--master-port", str(29500 + os.getpid() % 2000), script])
    assert done.returncode == 0, stderr_of(done)
    nets, (x_0, cond) = tiny_tdd(folder, torch.float64), example(4)
    parts = [vars(drawn(nets, x_0[:2], rank).step) for rank in range(2)]
    names = ("t_next", "t_n", "tau", "keep_prompt", "noise")
    whole = {k: torch.cat([part[k] for part in parts]) for k in names}
    draws = StepSample(**whole, guided_rows=whole["keep_prompt"].nonzero()[:, 0])
    nets.losses(x_0, cond, null_condition(cond), TDDStepSample(draws, 3.5))["total"].backward()
    loaded = [torch.load(tmp_path / f"grads-{rank}", weights_only=True) for rank in range(2)]
    for one, other, p in zip(*loaded, nets.student.parameters()):
        assert torch.equal(one, other)
        assert (one - p.grad).abs().max() <= 1e-6 * p.grad.abs().max()
    loaded = [torch.load(tmp_path / f"weights-{rank}", weights_only=True) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*loaded))
    # The whole UNet: student and moving average after two steps on the mean gradient.
    nets = full_student(folder)
    optimizer = torch.optim.SGD(nets.student.parameters(), 1.0)
    halves = [(half, {k: v[half] for k, v in cond.items()}) for half in (slice(2), slice(2, 4))]
    for _ in range(2):
        for rank, (half, c) in enumerate(halves):
            sample = drawn(nets, x_0[half], rank)
            loss = nets.losses(x_0[half], c, null_condition(c), sample)["total"]
            (loss / 2).backward()
        optimizer.step()
        nets.after_step()
        optimizer.zero_grad()
    found = torch.load(tmp_path / "whole-0", weights_only=True)
    before = list(FullNetwork(full_student(folder).full).parameters())
    for mine, network in zip(found, (nets.student, nets.target_net), strict=True):
        moved = [(q - start).abs().max() for q, start in zip(network.parameters(), before)]
        for p, q, change in zip(mine, network.parameters(), moved, strict=True):
            assert (p - q).abs().max() <= 1e-3 * change + 1e-7
        assert max(moved) > 1e-3
    # TDM: each process has steps of its own; student and fake score have the mean gradient of both.
    nets = tiny_tdm(folder, Ks=(2, 4), told_ks=(2, 4))
    for rank, half in enumerate((slice(2), slice(2, 4))):
        c = {k: v[half] for k, v in cond.items()}
        nets.losses(None, c, null_condition(c), drawn(nets, x_0[half], rank))["total"].backward()
    loaded = [torch.load(tmp_path / f"tdm-{rank}", weights_only=True) for rank in range(2)]
    params = [p for module in nets.modules.values() for p in module.parameters()]
    for one, other, p in zip(*loaded, params, strict=True):
        assert torch.equal(one, other)
        assert (one - p.grad / 2).abs().max() <= 1e-6 * p.grad.abs().max()


CLOSED = f"""
import sys, torch
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from training import distributed
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
modules = [distributed.wrap_ddp(torch.nn.Linear(2, 3)) for _ in range(2)]
modules[1](modules[0](torch.ones(4, 2)).mean(1, keepdim=True).expand(4, 2)).sum().backward()
def gloo_threads():
    return [x for x in Path("/proc/self/task").glob("*/comm") if "gloo" in x.read_text()]
before = len(gloo_threads())
distributed.close(modules)
print(before, len(gloo_threads()))
"""


def test_threads_of_the_group_end_with_close_though_ddp_modules_live_on():
    """Freed by a DDP module instead, the group now and then waits for ever at the run's end."""
    done = subprocess.run(
        [sys.executable, "-c", CLOSED], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 0 and after == 0


# ------------------------------------------------------------------------------------ one process


def test_one_process_from_a_cache_killed_and_resumed(folder, shards, tmp_path):
    """The cache is filled once and used again; the run ends bit by bit as if never stopped."""
    whole, cut, cache = tmp_path / "whole", tmp_path / "cut", tmp_path / "cache"
    words = ["--cache", cache, "--guidance-range", 3, 15, "--method", "tcd", "--solver-steps", 50]
    done = run(command(folder, shards, whole, *words))
    assert done.returncode == 0, stderr_of(done)
    assert "guidance to distil: g = 3 to 15, the paper's w' = g - 1 = 2 to 14" in done.stdout
    stamps = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    call = command(folder, shards, cut, *words)
    killed(call, cut / "log.jsonl", 5)
    done = run([*call, "--resume"])
    assert done.returncode == 0, stderr_of(done)
    same_end(whole, cut)
    assert stamps == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    with safe_open(whole / "lora.safetensors", "pt") as file:
        about = file.metadata()
    assert about["tdd_method"] == "tcd" and about["tdd_w"] == "[2.0, 14.0]"
    assert about["tdd_solver_steps"] == "50"
    assert about["tdd_steps"] == "8" and about["tdd_base"] == folder.name
    done = run([*call[:-2], "--method", "tdd", "--resume"])
    assert done.returncode == 2 and "was made with method tcd, not tdd" in done.stderr


def test_pictures_with_a_full_cache_lie_on_the_unets_device(folder):
    """The text encoders stay on the CPU then; the UNet here is on another device, "meta"."""
    model = load.load_sdxl(folder)
    model.unet.to("meta")
    config = preview.PreviewConfig(Path("x"), resolution=64, steps=[4, 8], w=0.0)
    pictures = preview.Pictures(config, model, None, "meta")
    assert {tensor.device.type for tensor in pictures.cond.values()} == {"meta"}


def test_sigterm_leaves_a_checkpoint(folder, shards, tmp_path):
    call = command(folder, shards, tmp_path, "--save-every", 1000, "--steps", 1000)
    child = subprocess.Popen(call, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "log.jsonl"
    while not (log.exists() and len(steps_of(log)) >= 2):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    (checkpoint,) = checkpoints(tmp_path)
    assert child.returncode == 128 + signal.SIGTERM and "--resume" in said
    assert steps_of(log)[-1]["step"] == checkpoint_step(checkpoint)


# ------------------------------------------------------------------------- TCD's functions, and TDM


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of five prompts, one of them twice, blank lines in between."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red fox\n\na street at night\na red fox\n  \nsnow\nan old man")
    return path


UNIFY = ["--method", "tdm", "--ks", 1, 2, 4, "--loss", "fisher"]


@pytest.fixture(scope="module")
def unified(folder, prompts, tmp_path_factory):
    """A run of TDM-unify in two processes, without a single picture to learn from."""
    output = tmp_path_factory.mktemp("unified")
    words = [*UNIFY, "--sample-every", 8]
    done = run(command(folder, prompts, output, *words, processes=2))
    assert done.returncode == 0, stderr_of(done)
    return output


def test_tdm_trains_from_prompts_alone(unified):
    log = steps_of(unified / "log.jsonl")
    assert len(log) == 8 and all(line["fake"] > 0 and not line["skipped"] for line in log)
    assert (unified / "samples" / "step-000008.png").stat().st_size > 10_000
    state, _ = files.read_tensors(unified / "checkpoint-8" / "state.safetensors")
    ups = {k: v for k, v in state.items() if k.endswith("conv1.up")}
    moved = {k.split("/")[0] for k, v in ups.items() if v.abs().max() > 0}
    assert moved == {"student", "fake"}
    # What both are told goes through layers that any program reads.
    for name in ("lora.safetensors", "lora_kohya.safetensors"):
        tensors, about = files.read_tensors(unified / name)
        assert not [k for k in tensors if "told" in k] and about["tdd_told_ks"] == "[1, 2, 4]"


@pytest.fixture(scope="module")
def four(folder, prompts, tmp_path_factory):
    """A run of TDM-4 in one process."""
    output = tmp_path_factory.mktemp("four")
    done = run(command(folder, prompts, output, "--method", "tdm"))
    assert done.returncode == 0, stderr_of(done)
    return output


def test_tdm_killed_and_resumed_ends_the_same(unified, folder, prompts, tmp_path):
    """TDM-unify in two processes."""
    call = command(folder, prompts, tmp_path / "cut", *UNIFY, processes=2)
    killed(call, tmp_path / "cut" / "log.jsonl", 3)
    done = run([*call, "--resume"])
    assert done.returncode == 0, stderr_of(done)
    same_end(unified, tmp_path / "cut")


def test_tdm_goes_on_with_the_same_prompts_alone(four, folder, prompts, tmp_path):
    words = ["--method", "tdm", "--steps", 9, "--resume"]
    shutil.copytree(four, tmp_path / "run")
    other = prompts.with_name("other.txt")
    other.write_text("another prompt")
    done = run(command(folder, other, tmp_path / "run", *words))
    assert done.returncode == 2 and "read its data with prompts 5 (" in done.stderr
    # The same prompts under another name.
    other.write_text(prompts.read_text())
    done = run(command(folder, other, tmp_path / "run", *words))
    assert done.returncode == 0, stderr_of(done)


def test_prompts_come_once_an_epoch_and_go_on_where_they_were(tmp_path):
    path, lines = tmp_path / "prompts.txt", [f"prompt {i}" for i in range(5)]
    path.write_text("\n".join(lines))
    ranks = [Loader(Prompts(path, 3, 7, rank, 2), 1) for rank in range(2)]
    batches = [[next(r) for r in ranks] for _ in range(10)]
    seen = [b["captions"][i] for pair in batches for i in range(3) for b in pair]
    assert all(sorted(seen[i : i + 5]) == lines for i in range(0, 60, 5))
    assert len({tuple(seen[i : i + 5]) for i in range(0, 60, 5)}) > 6
    position = ranks[1].position
    again = Loader(Prompts(path, 3, 7, 1, 2), 2, position=position)
    assert next(again) == next(ranks[1])
    moved = path.rename(tmp_path / "moved.txt")
    assert Loader(Prompts(moved, 3, 7, 1, 2), 1, position=position).position == position
    path.write_text("\n".join([*lines[:4], "new"]))
    with pytest.raises(ValueError, match=r"read its data with prompts 5 \(\w+\), not 5 \("):
        Loader(Prompts(path, 3, 7, 1, 2), 1, position=position)


@pytest.mark.parametrize("tcf", ["2", "s"])
def test_tcd_trains_and_samples_with_each_function(
    tcf, folder, shards, tmp_path, monkeypatch, capsys
):
    """`--method tcd --tcf 2` and `s`; then sample.py's latents over diffusers' UNet and peft."""
    words = ["--method", "tcd", "--tcf", tcf, "--guidance-range", 3, 15, "--sample-every", 4]
    done = run(command(folder, shards, tmp_path / "run", *words, "--steps", 4))
    assert done.returncode == 0, stderr_of(done)
    lora = tmp_path / "run" / "lora.safetensors"
    assert (tmp_path / "run" / "lora_kohya.safetensors").exists() == (tcf == "2")
    got = ours(monkeypatch, capsys, folder, tmp_path, "--lora", lora, "--tcf", tcf,
               "--prompt", "a red fox", "--gamma", 0, "--cfg", 2, "--steps", 2)  # fmt: skip
    eps, x = their_network(folder, lora), torch.randn((1, 4, 8, 9), generator=seeded(0))
    for t, s in ((999, 499), (499, -1)):
        if tcf == "2":
            x_s, x_0 = equation_22(lambda x, t: eps(x.float(), float(t)), x.double(), t, max(s, 0))
            x = x_s if s >= 0 else x_0
        else:
            e = eps(x, t, max(s, 0))
            x_0 = (x - SIGMA[t + 1] * e) / ALPHA[t + 1]
            x = ALPHA[s + 1] * x_0 + SIGMA[s + 1] * e
    assert (x - got).abs().max() <= 2e-4 * got.abs().max()


@pytest.mark.slow
def test_the_whole_unet_is_trained_in_parts_resumed_and_sampled(
    folder, shards, tmp_path, monkeypatch, capsys
):
    """TCF(S+) as TCD had it: two processes with a half of all weights each; sample.py --unet."""
    words = ["--full", "--method", "tcd", "--tcf", "s", "--ema", 0.5, "--steps", 4]
    whole, cut, file = tmp_path / "whole", tmp_path / "cut", "diffusion_pytorch_model.safetensors"
    done = run(command(folder, shards, whole, *words, processes=2))
    assert done.returncode == 0, stderr_of(done)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-4")
    done = run([*command(folder, shards, cut, *words, processes=2), "--resume"])
    assert done.returncode == 0, stderr_of(done)
    same_end(whole, cut, [f"unet/{file}"], steps=4)
    weights, _ = files.read_tensors(whole / "unet" / file)
    before, _ = files.read_tensors(folder / "unet" / file)
    assert {k for k in weights if not k.startswith("scalar_embedding.")} == before.keys()
    moved = [k for k, v in before.items() if not torch.equal(v, weights[k])]
    assert len(moved) > 0.9 * len(before)
    assert weights["scalar_embedding.linear_2.weight"].abs().max() > 0
    words = ["--unet", whole / "unet", "--prompt", "a red fox", "--gamma", 0, "--steps", 2]
    got = ours(monkeypatch, capsys, folder, tmp_path, *words, "--tcf", "s", "--cfg", 1)
    theirs, reference = Theirs(folder, {}, 4, 4.0, torch.float32), Reference(folder)
    theirs.unet.load_state_dict({k: v for k, v in weights.items() if k in before})
    embedding = {k: v for k, v in weights.items() if k not in before}
    embedding = {k.removeprefix("scalar_embedding."): v for k, v in embedding.items()}
    theirs.scalar_weights[None] = embedding
    tokens, pooled = reference.encode("a red fox")
    c = {
        "prompt_embeds": tokens,
        "pooled": pooled,
        "time_ids": torch.tensor([[64, 72, 0, 0, 64, 72]]),
    }
    theirs.unet.disable_adapters = lambda: None
    x = torch.randn((1, 4, 8, 9), generator=seeded(0))
    with torch.no_grad():
        for t, s in ((999, 499), (499, -1)):
            e = theirs.eps(None, x, t, c, max(s, 0))
            x = ALPHA[s + 1] * (x - SIGMA[t + 1] * e) / ALPHA[t + 1] + SIGMA[s + 1] * e
    assert (x - got).abs().max() <= 2e-4 * got.abs().max()
    for f in "12":
        with pytest.raises(AssertionError, match="was trained with --tcf s: sample it with that"):
            ours(monkeypatch, capsys, folder, tmp_path, *words, "--tcf", f)
    with_other_unet(folder, whole / "unet", tmp_path / "sdxl")
    with pytest.raises(AssertionError, match="its UNet takes a target time: give --tcf s"):
        ours(monkeypatch, capsys, tmp_path / "sdxl", tmp_path, *words[2:])
    refused = run(command(tmp_path / "sdxl", shards, tmp_path / "again"))
    assert refused.returncode == 2
    assert "takes a target time: it cannot be a teacher" in refused.stderr


def test_tdm_unify_samples_as_diffusers_with_a_crop(unified, folder, tmp_path, monkeypatch, capsys):
    lora = unified / "lora.safetensors"
    eps, found = their_network(folder, lora), {}
    for k, times in {1: [999], 2: [999, 499], 4: [999, 751, 499, 251]}.items():
        words = ["--lora", lora, "--prompt", "a red fox", "--gamma", 0, "--steps", k]
        got = ours(monkeypatch, capsys, folder, tmp_path, *words, "--cfg", 1)
        x = torch.randn((1, 4, 8, 9), generator=seeded(0))
        for t, s in itertools.pairwise([*times, -1]):
            e = eps(x, t, K=k, g=1.0)
            x = ALPHA[s + 1] * (x - SIGMA[t + 1] * e) / ALPHA[t + 1] + SIGMA[s + 1] * e
        assert (x - got).abs().max() <= 2e-4 * got.abs().max()
        found[k] = got
    words = ["--prompt", "a red fox", "--gamma", 0, "--steps", 2, "--cfg", 1]
    labelled = labelled_tcf_s(lora, tmp_path)
    with pytest.raises(AssertionError, match="neither a --lora nor a --unet was trained with it"):
        ours(monkeypatch, capsys, folder, tmp_path, "--lora", labelled, *words, "--tcf", "s")
    with pytest.raises(AssertionError, match="was trained with --tcf 1"):
        ours(monkeypatch, capsys, folder, tmp_path, "--lora", lora, *words, "--tcf", "2")


def with_other_unet(folder, unet, whole):
    """The model's folder with such a UNet in it, whose header --model does not read."""
    shutil.copytree(folder, whole)
    shutil.rmtree(whole / "unet")
    shutil.copytree(unet, whole / "unet")


def labelled_tcf_s(lora, tmp_path):
    """The LoRA, made to say that it was trained with --tcf s."""
    tensors, about = files.read_tensors(lora)
    save_file(tensors, tmp_path / "s.safetensors", {**about, "tdd_tcf": "s"})
    return tmp_path / "s.safetensors"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def their_network(folder, lora_file, scale=1.0):
    """eps(x, t, n) of diffusers' UNet under the LoRA by peft, guided to g; n, K as for Theirs."""
    model = load.load_sdxl(folder)
    lora, *_ = read_lora(lora_file, model.unet, model.encoder_1, model.encoder_2)
    for adapter in lora.adapters.values():
        adapter.up.data *= scale
    if lora.scalar_embedding is not None:
        for p in lora.scalar_embedding.linear_2.parameters():
            p.data *= scale
    theirs, reference = Theirs(folder, {"student": lora}, 4, 4.0, torch.float32), Reference(folder)
    tokens, pooled = reference.encode("a red fox")
    sizes = torch.tensor([[64, 72, 0, 0, 64, 72]])

    @torch.no_grad()
    def eps(x, t, n=None, g=2.0, K=0):
        t = t.item() if torch.is_tensor(t) else t
        c, u = (
            theirs.eps("student", x, t, {"prompt_embeds": on * tokens, "pooled": on * pooled,
                                         "time_ids": sizes}, n, K) for on in (1, 0)
        )  # fmt: skip
        return g * c + (1 - g) * u

    return eps


def test_init_goes_on_from_a_lora(two, folder, prompts, tmp_path):
    """Another method's student as a start: without a learning rate it ends as it began.

    alpha / rank is that of the flags, not the file's 1: with it goes what a learning rate means.
    What it is told of K begins without an effect.
    """
    start = two[0] / "lora.safetensors"
    words = ["--method", "tdm", "--ks", 2, 4, "--init", start, "--lr", 0, "--k-lr", 0, "--steps", 2]
    done = run(command(folder, prompts, tmp_path, *words, "--lora-alpha", 1))
    assert done.returncode == 0, stderr_of(done)
    state, _ = files.read_tensors(tmp_path / "checkpoint-2" / "state.safetensors")
    name = "down_blocks.0.resnets.0.conv1"
    up = state[f"student/lora.{name.replace('.', '/')}.up"]
    assert torch.allclose(up, 4 * files.read_tensors(start)[0][f"unet.{name}.lora.up.weight"])
    (one, _), (other, about) = (
        files.read_tensors(p) for p in (start, tmp_path / "lora.safetensors")
    )
    assert all(torch.allclose(tensor, other[k]) for k, tensor in one.items())
    assert about["tdd_told_ks"] == "[2, 4]" and {k for k in other if k not in one} == {
        f"unet.add_embedding.linear_{i}.lora.{part}.weight"
        for i in (1, 2)
        for part in ("up", "down")
    }
    x, before = example(1, torch.float32)[0], their_network(folder, start)
    after = their_network(folder, tmp_path / "lora.safetensors")
    for K in (2, 4):
        assert torch.allclose(after(x, 500, K=K), before(x, 500), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- files for others


@pytest.mark.parametrize("name", ["lora.safetensors", "lora_kohya.safetensors"])
@pytest.mark.parametrize("method", ["tdd", "tdm"])
def test_loras_sample_the_same_in_diffusers(
    name, method, two, four, folder, tmp_path, monkeypatch, capsys, caplog
):
    """Our sample.py against diffusers' pipeline with stock schedulers, as docs/sdxl.md has it.

    gamma = 0: Euler at our timesteps, to rounding. gamma = 0.2: TCD's scheduler, which leaves
    sigma_0 = 0.029 of noise in its last step and is the same up to there.
    """
    path, reference = (two[0] if method == "tdd" else four) / name, Reference(folder)
    pipeline = euler_pipeline(folder)
    pipeline.load_lora_weights(path)
    said = "\n".join(r.getMessage() for r in caplog.records if "No LoRA keys" not in r.getMessage())
    assert "unexpected" not in said.lower() and "missing" not in said.lower()
    tokens, pooled = reference.encode("a red fox")

    def theirs(**more):
        return pipeline(
            prompt_embeds=tokens, pooled_prompt_embeds=pooled, guidance_scale=2.0,
            negative_prompt_embeds=0 * tokens, negative_pooled_prompt_embeds=0 * pooled,
            height=64, width=72, generator=[torch.Generator().manual_seed(0)],
            output_type="latent", **more,
        ).images  # fmt: skip

    def here(gamma):
        words = ["--lora", path, "--prompt", "a red fox", "--cfg", 2, "--gamma", gamma]
        return ours(monkeypatch, capsys, folder, tmp_path, *words)

    plain = ours(monkeypatch, capsys, folder, tmp_path, "--prompt", "a red fox", "--gamma", 0)
    deterministic = here(0)
    assert (plain - deterministic).abs().max() > 0.1
    found = theirs(timesteps=[999, 751, 499, 251])
    assert (found - deterministic).abs().max() <= 1e-3 * deterministic.abs().max()
    pipeline.scheduler = TCDScheduler(1000, 0.00085, 0.012, "scaled_linear",
                                      original_inference_steps=250)  # fmt: skip
    found, expected = theirs(num_inference_steps=4, eta=0.2), here(0.2)
    assert (found - expected).norm() <= 0.005 * expected.norm()


@torch.no_grad()
def test_comfyui_euler_sgm_uniform_is_near(folder, monkeypatch, capsys, tmp_path):
    """k-diffusion's Euler as ComfyUI's KSampler runs it, at most 2 timesteps off: within 1 %.

    sgm_uniform spaces timesteps evenly from 999 to 0 and interpolates log sigma; the network is
    given the nearest whole timestep, and x / sqrt(1 + sigma^2).
    """
    expected = ours(
        monkeypatch, capsys, folder, tmp_path, "--prompt", "a red fox", "--cfg", 2, "--gamma", 0
    )
    reference, table = Reference(folder), np.log(SIGMA[1:] / ALPHA[1:])
    times = np.linspace(999, 0, 5)[:-1]
    sigmas = [*np.exp(np.interp(times, np.arange(1000), table)), 0.0]
    tokens, pooled = reference.encode("a red fox")
    added = torch.tensor([[64, 72, 0, 0, 64, 72]])
    x = torch.randn((1, 4, 8, 9), generator=torch.Generator().manual_seed(0))
    x = x * (1 + sigmas[0] ** 2) ** 0.5
    for sigma, lower in itertools.pairwise(sigmas):
        t = int(np.abs(table - np.log(sigma)).argmin())
        eps = [
            reference.unet(
                x / (1 + sigma**2) ** 0.5, torch.tensor([t]), k * tokens,
                added_cond_kwargs={"text_embeds": k * pooled, "time_ids": added},
            ).sample
            for k in (1, 0)
        ]  # fmt: skip
        x = x + (2 * eps[0] - eps[1]) * (lower - sigma)
    assert (x - expected).norm() <= 0.01 * expected.norm()


# ------------------------------------------------------------------------------------------ errors


MISTAKES = [
    (["--resolution", "100"], "multiple of 8"),
    (["--solver-steps", "33"], "must divide"),
    (["--kmin", "9"], "kmin 9"),
    (["--guidance-range", "5", "2"], "LO is above HI"),
    (["--guidance-range", "3", "15", "--guidance", "4.5"], "--guidance-range exclude each other"),
    (["--workers", "0"], "--workers"),
    (["--sample-prompts", "none.txt"], "none.txt cannot be read"),
    (["--sample-prompts", HERE / "requirements.txt"], "--sample-prompts needs --sample-every"),
    (["--sample-prompts", __file__, "--sample-every", "2", "--data", "nowhere"], "at most 32"),
    (["--sample-every", "2", "--solver-steps", "5", "--method", "cm"], "8 steps: from 1 to 5"),
    (["--data", "nowhere"], "nowhere"),
    (["--model", "nowhere"], "nowhere"),
    (["--max-bad", "0"], "--max-bad"),
    (["--device", "cuda"], "no GPU"),
    (["--method", "tdm", "--adv"], "--method tdm has no use for --adv"),
    (["--method", "tdm", "--tcf", "s"], "--method tdm has no use for --tcf"),
    (["--method", "tdm", "--ks", "300", "--data", __file__], "300 steps"),
    (["--method", "tdm"], "is a folder: a file of prompts is needed"),
    (["--method", "tdm", "--kmin", "4"], "--method tdm has no use for --kmin"),
    (["--method", "pcm", "--reach", "100"], "--method pcm has no use for --reach"),
    (["--method", "pcm", "--kmax", "6"], "--method pcm has no use for --kmax"),
    (["--method", "cm", "--kmin", "2"], "--method cm has no use for --kmin"),
    (["--method", "tcd", "--kmax", "8", "--adv"], "--method tcd has no use for --kmax"),
    (["--reach", "1"], "no target lies within e = 1"),
    (["--fake-lr", "1"], "--method tdd has no use for --fake-lr"),
    (["--full", "--compile"], "--full is for"),
    (["--full", "--method", "tdm", "--data", __file__], "no use for --full"),
    (["--method", "cm", "--ks", "4"], "--method cm has no use for --ks"),
    (["--ks", "4", "8", "--kmin", "4"], "--ks says what the targets are: leave --kmin away"),
    (["--ks", "4", "8", "--kmax", "8"], "--ks says what the targets are: leave --kmax away"),
    (["--ks", "4", "8", "--reach", "250"], "--ks says what the targets are: leave --reach away"),
    (["--ks", "4", "--no-tell-k"], "--no-tell-k is for several --ks"),
    (["--ks", "4", "4", "--no-tell-k"], "--no-tell-k is for several --ks"),
    (["--no-tell-k"], "--no-tell-k is for several --ks"),
    (["--method", "tdm", "--no-tell-k"], "--no-tell-k is for several --ks"),
    (["--k-lr", "1e-3"], "--k-lr is for a student that is told which of several --ks is meant"),
    (["--ks", "4", "--k-lr", "1e-3"], "--k-lr is for a student that is told"),
    (["--ks", "4", "8", "--no-tell-k", "--k-lr", "1"], "--k-lr is for a student that is told"),
    (["--method", "tdm", "--k-lr", "1e-3", "--data", __file__], "--k-lr is for a student that is"),
    (["--ks", "4", "8", "--full"], "--full: K is told to a LoRA: add --no-tell-k"),
    (["--ks", "4", "251"], "251 steps: from 1 to 250"),
    (["--ks", "4", "60", "--solver-steps", "50"], "60 steps: from 1 to 50"),
    (["--ks", "3", "4", "5", "6", "8"], "a rank of 4 is too low to tell 5 K"),
    (["--ks", "0"], "--ks"),
    (["--pairs", "teacher"], "is a folder: a file of prompts is needed"),
    (["--pairs", "teacher", "--data", __file__, "--cache", "x"], "--cache holds images' latents: "),
    (["--method", "tdm", "--pairs", "teacher"], "--method tdm has no use for --pairs"),
    (["--method", "tdm", "--pairs", "data"], "--method tdm has no use for --pairs"),
    (["--pairs", "walkers"], "--pairs"),
    (["--loss", "fisher"], "has no use for --loss"),
    (["--solver", "dpm2m"], "--solver dpm2m remembers the step before"),
    (["--solver", "dpm++2m", "--method", "pcm"], "--solver dpm++2m remembers the step before"),
    (["--adv-weight", "0.2"], "--adv-weight is for --adv: leave it away"),
    (["--adv-lr", "1e-4"], "--adv-lr is for --adv: leave it away"),
    (["--full", "--rank", "8"], "--rank is for a LoRA: leave it away"),
    (["--full", "--lora-alpha", "1"], "--lora-alpha is for a LoRA: leave it away"),
    (["--lora-alpha", "0"], "--lora-alpha: a number of at least 1e-06 is needed, not '0'"),
    (["--ema", "1"], "--ema: a number of at least 0 and of at most 0.999999 is needed, not '1'"),
    (["--method", "tdm", "--data", __file__, "--min-size", "9"], "--min-size is for images"),
    (["--pairs", "teacher", "--data", __file__, "--min-size", "9"], "--min-size is for images"),
    (["--init", "nowhere.safetensors"], "nowhere.safetensors is no file"),
]


@pytest.mark.parametrize("words, message", MISTAKES)
def test_mistakes_are_one_line(words, message, folder, shards, tmp_path, monkeypatch, capsys):
    call = command(folder, shards, tmp_path / "out", *words)
    monkeypatch.setattr("sys.argv", call[1:])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cli.run(train_sdxl.main, train_sdxl.parser())
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("train_sdxl.py: ")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
