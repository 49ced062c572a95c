"""Sections of `bench.py gpu` that run this project's scripts as users start them."""

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import models
from benchmarks.measure import TINY, BenchConfig, Report, relative_error
from cifar.data import RECORD
from common import files
from tests.gpu_checks import ROOT, compare_logs
from training.checkpoint import checkpoint_step, checkpoints


def start_script(name: str, flags: dict, *switches: str) -> subprocess.Popen:
    """Start a script of this project; a flag's value may be several words."""
    command = [sys.executable, name, *switches]
    for flag, value in flags.items():
        command += [f"--{flag}", *str(value).split()]
    return subprocess.Popen(command, cwd=ROOT)


def read_log(output: Path) -> list[dict]:
    """The whole lines of a run's log so far that are a step's."""
    path, lines = output / "log.jsonl", []
    if path.exists():
        for text in path.read_text().splitlines(keepends=True):
            if text.endswith("\n"):
                lines.append(json.loads(text))
    return [line for line in lines if "loss" in line]


# ---------------------------------------------------------------------------- resume: after SIGKILL


def resume(config: BenchConfig, report: Report) -> None:
    """train_sdxl.py on a tiny model, killed and resumed, against two runs without a stop."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_sdxl(folder / "model")
        write_photos(folder / "photos")
        straight, again, killed = (folder / run for run in ("straight", "again", "killed"))
        children = {output: start_training(config, folder, output) for output in (straight, again)}
        child = start_training(config, folder, killed)
        while child.poll() is None and len(read_log(killed)) < 5:
            time.sleep(0.02)
        child.kill()
        if child.wait() != -signal.SIGKILL:
            raise ValueError(f"train_sdxl.py ended with {child.returncode} before it was killed")
        report.save(killed_after=len(read_log(killed)))
        report.save(resumed_from=checkpoint_step(checkpoints(killed)[-1]))
        children[killed] = start_training(config, folder, killed, "--resume")
        for output, each in children.items():
            if each.wait():
                raise ValueError(f"{output.name}: train_sdxl.py ended with {each.returncode}")
        log = read_log(straight)
        report.save(
            losses=[line["loss"] for line in log],
            resumed_against_straight=compare_runs(killed, straight),
            straight_against_itself=compare_runs(again, straight),
        )


def start_training(config: BenchConfig, folder: Path, output: Path, *switches: str):
    """train_sdxl.py for ten steps, with a checkpoint every second step."""
    flags = {
        "model": folder / "model", "data": folder / "photos", "output": output,
        "device": config.device, "dtype": "fp16" if config.on_gpu else "float32",
        "resolution": 64, "batch-size": 2, "grad-accum": 1, "workers": 2, "rank": 4, "lr": 1e-4,
        "solver-steps": 50, "steps": 10, "save-every": 2, "sample-every": 0,
    }  # fmt: skip
    return start_script("train_sdxl.py", flags, *switches)


def write_tiny_sdxl(folder: Path) -> None:
    """A tiny model in the layout of published folders, in float32."""
    model = models.random_sdxl(TINY, torch.float32, "cpu")
    text_1, text_2 = model.encoder_1, model.encoder_2
    parts = {
        "unet": (model.unet, models.unet_json(TINY)),
        "vae": (model.vae, models.vae_json(model.vae.config)),
        "text_encoder": (text_1, models.text_json(text_1.config)),
        "text_encoder_2": (text_2, models.text_json(text_2.config)),
    }
    models.write_tokenizer(folder / "tokenizer")
    files.write_json(folder / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"})
    for name, (module, config) in parts.items():
        (folder / name).mkdir()
        files.write_tensors(folder / name / "model.safetensors", module.state_dict(), format="pt")
        files.write_json(folder / name / "config.json", config)


def write_photos(folder: Path) -> None:
    """Eight JPEGs of noise with captions."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(8):
        pixels = random.integers(0, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"noise number {i}")


def compare_runs(output: Path, expected: Path) -> dict:
    """The relative differences of two runs: largest of any step, and of the LoRAs at the end."""
    figures = compare_logs(read_log(output), read_log(expected))
    loras = []
    for run in (output, expected):
        tensors, _ = files.read_tensors(run / "lora.safetensors")
        loras.append(torch.cat([tensors[name].flatten() for name in sorted(tensors)]))
    return {**figures, "lora": relative_error(*loras)}


# ----------------------------------------------------------------------- cifar: the preset for GPUs

CIFAR_SECONDS = 30  # until the run is asked to stop


def cifar(config: BenchConfig, report: Report) -> None:
    """CIFAR-10's gpu preset for a few steps of each stage, uncompiled."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = ROOT / "data/cifar-10-batches-bin"
        if not data.exists():
            data = folder / "data"
            write_cifar(data, 300 if config.tiny else 10_000)
        flags = {
            "data": "cifar10", "preset": "gpu", "data-dir": data, "output": folder / "run",
            "methods": "tdd", "device": config.device, "classifier-steps": 100,
            "teacher-steps": 100, "steps": 50, "samples": 500,
        }  # fmt: skip
        if config.tiny:
            flags |= {"channels": "32 64", "teacher-batch": 4, "batch-size": 4, "samples": 16}
            flags |= {"classifier-steps": 4, "teacher-steps": 4, "steps": 4, "dtype": "float32"}
        start = time.perf_counter()
        child = start_script("train_toy.py", flags, "--no-compile")
        exit_code = wait_at_most(child, 600 if config.tiny else CIFAR_SECONDS)
        report.save(
            run_seconds=time.perf_counter() - start, exit_code=exit_code,
            is_data_random=data.parent == folder,
        )  # fmt: skip
        for log in sorted((folder / "run").glob("*/log.jsonl")):
            with report.part(log.parent.name) as figures:
                lines = read_log(log.parent)
                # The first steps choose kernels.
                speeds = [line["images_per_s"] for line in lines[len(lines) // 3 :]]
                figures |= {
                    "steps": len(lines), "images_per_s": statistics.median(speeds),
                    "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"],
                    "peak_gib": lines[-1]["memory_gib"],
                }  # fmt: skip
    # Asked to stop it ends by itself in training, and by the signal in evaluation.
    if exit_code not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
        raise ValueError(f"train_toy.py ended with {exit_code}, see log.txt")


def wait_at_most(child: subprocess.Popen, seconds: float) -> int:
    """The exit code of a process, which is asked to stop after so many seconds, then made to."""
    for end in (child.terminate, child.kill):
        with suppress(subprocess.TimeoutExpired):
            return child.wait(seconds)
        end()
        seconds = 5
    return child.wait()


def write_cifar(folder: Path, count: int) -> None:
    """Files of random pictures in the official binary layout, so many in each."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = random.integers(0, 256, (count, RECORD), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 10
        records.tofile(folder / name)
