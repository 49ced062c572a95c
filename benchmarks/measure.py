"""Speed and memory beside diffusers: same weights, same run, alternating; medians and ratios.

    python bench.py unet       one forward pass of the UNet
    python bench.py load       loading a full-size UNet from disk (writes 5 GB to --dir)
    python bench.py sample     prompt embeddings to pixels: four guided steps and the decoder
    python bench.py train      one training step, beside the published recipe (needs peft too)

On a CPU all but `load` run a mid-size UNet, on a GPU the full one. Needs diffusers.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

BENCH = Path(__file__).parent.parent / "bench.py"

# --------------------------------------------------------------------------------------- measuring
#
# The machine is never quiet. Both sides take turns in one process, so that what slows one slows the
# other, and the ratio of medians is what is reported.


def alternate(sides: dict, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each side's call, over rounds in which all of them take a turn."""
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            # The first round warms caches and compiles; it is not counted.
            seconds[name] += [time.perf_counter() - start] * (i > 0)
    return {name: statistics.median(each) for name, each in seconds.items()}


def peak_gpu(call) -> float:
    """GiB that a call needs beyond what is there already: its activations, not the weights."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def child(args, name: str):
    """What one side prints when it runs alone, in a process of its own."""
    flags = ["--dir", args.dir, "--device", args.device, "--dtype", args.dtype]
    flags += ["--batch-size", str(args.batch_size)] + ["--compile"] * args.compile
    call = [sys.executable, BENCH, args.what, *flags, "--child", name]
    return json.loads(subprocess.run(call, stdout=subprocess.PIPE, check=True).stdout)


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def profile(call) -> None:
    """The dozen operators in which a call spends most of its time."""
    with torch.profiler.profile() as found:
        call()
    key = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40))


def report(title: str, seconds: dict[str, float], **more) -> None:
    ratios = {name: value / seconds["diffusers"] for name, value in seconds.items()}
    words = [f"{name} {value:.3f} s ({ratios[name]:.2f})" for name, value in seconds.items()]
    print(f"{title}: {', '.join(words)}", *(f"{k} {v}" for k, v in more.items()), sep="; ")
