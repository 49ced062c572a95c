"""How the benchmarks measure: alternating turns, peak memory, one side in a process of its own."""

import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from unet import UNetConfig

# SDXL in small: the same levels and kinds of blocks, for machines that would need a minute a pass.
MID = UNetConfig(
    channels=(128, 256, 512), transformer_depth=(0, 2, 4), heads=(2, 4, 8), mid_transformer_depth=4
)


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, on which device; a CPU gets a mid-size UNet and smaller pictures."""

    what: str
    device: str
    dtype: str = "float32"
    rounds: int = 5
    batch_size: int = 2
    compile: bool = False
    dir: Path = Path("runs/bench")

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def unet(self) -> UNetConfig:
        return UNetConfig() if self.on_gpu else MID

    @property
    def side(self) -> int:
        """Height and width of the latents."""
        if self.on_gpu:
            return 128
        return 64 if self.what == "unet" else 32


def alternate(sides: dict, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each side's call, over rounds in which every side takes a turn.

    The machine is never quiet: what slows one side slows the other, and their ratio holds.
    """
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            # The first round warms caches and compiles, and does not count.
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def peak_gpu(call) -> float:
    """GiB that a call needs beyond what is allocated already: its activations, not the weights."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def peak_rss() -> int:
    """The process's peak memory so far in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_alone(function, *args):
    """function(*args) in a new process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def profile(call) -> None:
    """Print the dozen operators in which a call spends most of its time."""
    with torch.profiler.profile() as profiler:
        call()
    key = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40))


def report(title: str, seconds: dict[str, float], **more: str) -> None:
    """Print a line: each side's seconds with its ratio to diffusers, then further figures."""
    theirs = seconds["diffusers"]
    times = [f"{name} {value:.3f} s ({value / theirs:.2f})" for name, value in seconds.items()]
    figures = [f"{name} {value}" for name, value in more.items()]
    print(f"{title}: {', '.join(times)}", *figures, sep="; ")
