"""Everything that only a GPU can show, in one command for one that is there for minutes.

    python bench.py gpu --out DIR

Sections run in the order of their worth, each in a process of its own and with a time limit, and
leave their figures in DIR/gpu.json as they go; what they print goes to DIR/log.txt. A rehearsal on
a CPU takes tiny networks: `--device cpu --tiny`.
"""

import importlib
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context

import torch

from benchmarks.measure import BenchConfig, Report, describe_error, errors, read_report
from common import files

# A function(config, report) of a module, which the section's process imports, and a time limit in
# seconds on an H100; together 415 s. What a section leaves of its time, those after it may use.
SECTIONS = {
    "correct": ("tests.gpu_checks:correct", 50),
    "waits": ("tests.gpu_checks:waits", 30),
    "train": ("benchmarks.train:bench_train", 120),
    "picture": ("benchmarks.inference:bench_sample", 45),
    "unet": ("benchmarks.inference:bench_unet", 30),
    "effect": ("tests.gpu_checks:effect", 30),
    "resume": ("tests.gpu_programs:resume", 30),
    "nccl": ("tests.gpu_checks:nccl", 20),
    "cifar": ("tests.gpu_programs:cifar", 40),
    "compiled_picture": ("benchmarks.inference:compiled_picture", 10),
    "compiled_step": ("benchmarks.train:compiled_step", 10),
}
CPU_FACTOR = 10  # on the limits


def bench_gpu(config: BenchConfig, names: list[str]) -> None:
    """Run the named sections, in order; SystemExit if one of them failed."""
    if not config.on_gpu and not config.tiny:
        raise ValueError(f"gpu on --device {config.device} is a rehearsal: add --tiny")
    files.output_folder(config.out)
    start = time.perf_counter()
    # fp16 on a CPU as well: a rehearsal is to find what mixes precisions.
    config = replace(config, dtype="fp16", rounds=3)
    if config.tiny:
        config = replace(config, rounds=1, batch_sizes=(1, 2))
    failed = run_sections(config, {name: SECTIONS[name] for name in names})
    print(f"{time.perf_counter() - start:.0f} s; figures are in {config.out / 'gpu.json'}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run_sections(config: BenchConfig, sections: dict[str, tuple]) -> list[str]:
    """Run sections and print a line for each; returns the names of those with an error."""
    path, failed = config.out / "gpu.json", []
    device = torch.cuda.get_device_name() if config.on_gpu else "CPU"
    machine = f"{device}, torch {torch.__version__}" + (", tiny" if config.tiny else "")
    report = read_report(path)
    if (other := report.setdefault("machine", machine)) != machine:
        raise ValueError(f"{path} holds figures of {other}, not {machine}: name another --out")
    files.write_json(path, report)
    end = time.perf_counter()
    for name, (function, limit) in sections.items():
        start = time.perf_counter()
        end += limit * (1 if config.on_gpu else CPU_FACTOR)
        # Figures of an earlier run into the same folder must not look like this one's.
        Report(path, name).save()
        error = run_section(config, name, function, end - start)
        content = read_report(path)
        figures = content["sections"][name]
        figures["seconds"] = round(time.perf_counter() - start, 1)
        if error:
            figures["error"] = error
        files.write_json(path, content)
        problems = errors(figures)
        print(f"{name:16}{figures['seconds']:6.1f} s  {'; '.join(problems) or 'done'}", flush=True)
        if problems:
            failed.append(name)
    return failed


def run_section(config: BenchConfig, name: str, function: str, limit: float) -> str:
    """Run a section in a new process, for so many seconds at most; returns what went wrong."""
    process = get_context("spawn").Process(target=_measure, args=(config, name, function))
    process.start()
    try:
        process.join(limit)
        if process.is_alive():
            return f"stopped after {limit:.0f} s, its limit"
        return f"ended with exit code {process.exitcode}" if process.exitcode else ""
    finally:
        # With everything that it has started: the process leads a group of its own.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _measure(config: BenchConfig, name: str, function: str) -> None:
    """The section's process: figures go to the report, all output to the log."""
    os.setsid()
    with open(config.out / "log.txt", "a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    print(f"\n===== {name}", flush=True)
    # No library is to look anything up: such machines may have no network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    report = Report(config.out / "gpu.json", name)
    try:
        module, function = function.split(":")
        getattr(importlib.import_module(module), function)(config, report)
    except Exception as problem:
        report.save(error=describe_error(problem))
