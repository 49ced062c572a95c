"""Short runs of train_sdxl.py on a tiny SDXL: started, killed, and compared bit by bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from common import files

HERE = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
               "PYTHONFAULTHANDLER": "1"}  # fmt: skip


def command(folder, shards, output, *words, processes=1):
    """The command line of a short run on the tiny SDXL."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        start += ["--master-port", str(29500 + os.getpid() % 2000)]
    flags = {"model": folder, "data": shards, "output": output, "resolution": 64, "batch-size": 2,
             "grad-accum": 1, "steps": 8, "save-every": 2, "sample-every": 0, "workers": 1,
             "device": "cpu", "dtype": "float32", "lr": 1e-3}  # fmt: skip
    if "--full" not in words:
        flags |= {"rank": 4, "lora-alpha": 4}
    listed = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    return [*start, str(HERE / "train_sdxl.py"), *listed, *map(str, words)]


def stderr_of(done):
    """Our own line on stderr, or the end of it."""
    own = [line for line in done.stderr.splitlines() if "train_sdxl.py: " in line]
    return own or done.stderr[-2000:]


SECONDS = 300  # that a run may take


def run(call):
    """The ended process; one that does not end fails with the stacks of all its threads."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(call, env=ENVIRONMENT, **pipes)
    try:
        said, errors = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        signal_all(call, signal.SIGABRT)
        said, errors = child.communicate()
        raise AssertionError(f"not ended after {SECONDS} s\n{said}\n{errors}") from None
    return subprocess.CompletedProcess(call, child.returncode, said, errors)


def signal_all(call, number):
    """Send a signal to a run and its processes, which torchrun makes sessions of their own."""
    script = next(i for i, word in enumerate(call) if str(word).endswith(".py"))
    words = "\0".join(map(str, call[script:])).encode()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words in entry.read_bytes():
                os.kill(int(entry.parent.name), number)


def steps_of(log):
    """The lines of a log that are a step's, as dicts; notes stand between them."""
    lines = [json.loads(line) for line in log.read_text().splitlines(True) if line.endswith("\n")]
    return [line for line in lines if "loss" in line]


def killed(call, log, lines):
    """Start a run, kill it and all its children once it has logged so many steps."""
    child = subprocess.Popen(
        call, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1200):
            if log.exists() and len(steps_of(log)) >= lines:
                break
            assert child.poll() is None
            time.sleep(0.05)
    finally:
        signal_all(call, signal.SIGKILL)
        child.wait()
    assert len(steps_of(log)) < 8


def same_end(a, b, names=("lora.safetensors", "lora_kohya.safetensors"), steps=8):
    """Bit by bit the same weights, moments, generators, positions, walkers and exported files."""
    last = f"checkpoint-{steps}"
    walkers, others = (sorted(x.glob(f"{last}/walkers-*")) for x in (a, b))
    walkers = [str(path.relative_to(a)) for path in walkers]
    assert walkers == [str(path.relative_to(b)) for path in others]
    for name in (*names, f"{last}/state.safetensors", *walkers):
        (one, about), (other, too) = (files.read_tensors(x / name) for x in (a, b))
        assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
        assert about == too
    one, other = (json.loads((x / last / "config.json").read_text()) for x in (a, b))
    assert one["positions"] == other["positions"]
    one, other = (steps_of(x / "log.jsonl") for x in (a, b))
    assert [x["loss"] for x in one] == [x["loss"] for x in other]
