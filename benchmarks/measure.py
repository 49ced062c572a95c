"""What all benchmarks share: settings, a report of figures, time in turns, memory, FLOP."""

import json
import resource
import statistics
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from common import files
from sdxl.pipeline import DTYPES
from unet import UNetConfig

# SDXL in small: the same levels and kinds of blocks, for machines that would need a minute a pass;
# and in tiny, for rehearsals and for tests on both devices.
MID = UNetConfig(
    channels=(128, 256, 512), transformer_depth=(0, 2, 4), heads=(2, 4, 8), mid_transformer_depth=4
)
TINY = UNetConfig(
    channels=(64, 128, 128), transformer_depth=(0, 1, 2), heads=(1, 2, 2), mid_transformer_depth=2,
    layers_per_block=1, cross_attention_dim=128, add_embedding_dim=48 + 6 * 256,
)  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, on which device; a CPU gets a mid-size UNet and smaller pictures.

    dtype: of our networks, by its name in sdxl.pipeline.DTYPES. rounds: turns of each side.
    batch_sizes: images a training step. dir: folder of load and data, out: of gpu's figures.
    """

    what: str
    device: str
    dtype: str = "float32"
    rounds: int = 5
    batch_sizes: Sequence[int] = (2,)
    compile: bool = False
    tiny: bool = False
    dir: Path = Path("runs/bench")
    out: Path = Path("runs/gpu")

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def unet(self) -> UNetConfig:
        if self.tiny:
            return TINY
        return UNetConfig() if self.on_gpu else MID

    @property
    def side(self) -> int:
        """Height and width of the latents."""
        if self.tiny:
            return 16 if self.on_gpu else 8
        if self.on_gpu:
            return 128
        return 64 if self.what == "unet" else 32


# ------------------------------------------------------------------------------------------- report
#
# A benchmark may be stopped at any moment: the parts that it has measured are in the file by then.


class Report:
    """A section's .figures: printed, and with a path written to {"sections": {name: figures}}."""

    def __init__(self, path: Path | None = None, section: str = ""):
        self.path, self.section, self.figures = path, section, {}

    def save(self, **figures) -> None:
        """Add figures, floats with six digits, and write all of the section's to the file."""
        # NaN and infinity, which JSON does not have, become words.
        figures = json.loads(
            json.dumps(figures), parse_float=lambda x: float(f"{float(x):.6g}"), parse_constant=str
        )
        self.figures |= figures
        for name, value in figures.items():
            print(f"{name}: {value}", flush=True)
        if self.path is not None:
            content = read_report(self.path)
            content["sections"][self.section] = self.figures
            files.write_json(self.path, content)

    @contextmanager
    def part(self, name: str):
        """Save the figures in the dict that this yields under a name; an error becomes "error"."""
        figures = {}
        try:
            yield figures
        except Exception as problem:
            figures["error"] = describe_error(problem)
        self.save(**{name: figures})


def read_report(path: Path) -> dict:
    """The file's content, or what a new file begins with; ValueError for another kind of file."""
    if not path.exists():
        return {"sections": {}}
    content = files.read_json(path)
    if not isinstance(content.get("sections"), dict):
        raise ValueError(f"{path} is no report of bench.py: name another --out")
    return content


def describe_error(problem: Exception) -> str:
    """An error in a line, with where it came from; all of it goes to stderr."""
    traceback.print_exception(problem)
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    message = " ".join(str(problem).split())[:400]
    return f"{type(problem).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"


def errors(figures: dict) -> list[str]:
    """The errors of a section and of its parts."""
    parts = [part for part in figures.values() if isinstance(part, dict)]
    return [part["error"] for part in (figures, *parts) if "error" in part]


# ------------------------------------------------------------------------------------------ figures


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


def compare(config: BenchConfig, sides: dict) -> dict:
    """Median seconds of each side's call, and their ratios to the first side's."""
    seconds = alternate(sides, config.rounds, config.device)
    figures = {f"{name}_s": value for name, value in seconds.items()}
    first, *others = seconds
    for name in others:
        figures[f"{name}_to_{first}"] = seconds[name] / seconds[first]
    return figures


def matmul_rate(config: BenchConfig) -> float:
    """TFLOP/s of a large square product in --dtype, the best that the machine can do."""
    # Large enough that memory's speed does not count, small enough to take little time.
    n = 8192 if config.on_gpu else 2048
    if config.tiny:
        n = 256
    a, b = (torch.randn(n, n, device=config.device, dtype=DTYPES[config.dtype]) for _ in range(2))
    return 2e-12 * n**3 / alternate({"matmul": lambda: a @ b}, 10, config.device)["matmul"]


def relative_error(a: Tensor, b: Tensor) -> float:
    """The norm of a - b in units of the norm of b."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


def count_kernels(config: BenchConfig, call) -> dict:
    """How many kernels a call launches and the sum of their milliseconds; on a CPU its operators.

    Raises ValueError if the profiler sees none.
    """
    activity, device = ProfilerActivity.CPU, DeviceType.CPU
    if config.on_gpu:
        activity, device = ProfilerActivity.CUDA, DeviceType.CUDA
    with torch.profiler.profile(activities=[activity]) as profiler:
        call()
        if config.on_gpu:
            torch.cuda.synchronize()
    microseconds = []
    for event in profiler.events():
        # Copies and fills of memory are no kernels; annotations span the kernels of others.
        is_kernel = event.device_type == device and not event.name.startswith(("Memcpy", "Memset"))
        if is_kernel and not getattr(event, "is_user_annotation", False):
            microseconds.append(event.time_range.elapsed_us())
    if not microseconds:
        raise ValueError("the profiler saw no kernels: it may lack the right to")
    if config.on_gpu:
        return {"kernels": len(microseconds), "kernels_ms": sum(microseconds) / 1000}
    # Operators call each other, and the sum of their times means nothing.
    return {"operators": len(microseconds)}


# ------------------------------------------------------------------------------------------- memory
#
# A GPU counts what is allocated. A CPU knows the peak of a whole process, so there a side of a
# comparison has a process of its own.


def allocated_gib(config: BenchConfig) -> float:
    """What tensors on the GPU take now; 0 on a CPU."""
    return torch.cuda.memory_allocated() / 2**30 if config.on_gpu else 0.0


def memory_gib(config: BenchConfig, call, others: float = 0.0) -> dict:
    """GiB on the GPU before a call and at most during it, beyond `others`; nothing on a CPU."""
    if not config.on_gpu:
        return {}
    torch.cuda.reset_peak_memory_stats()
    before = allocated_gib(config)
    call()
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"held_gib": before - others, "peak_gib": peak - others}


def peak_rss() -> int:
    """The process's peak memory so far in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_alone(function, *args):
    """function(*args) in a new process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
