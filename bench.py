"""Speed and memory beside diffusers: same weights, same run, alternating; medians and ratios.

    python bench.py unet       one forward pass of the UNet
    python bench.py load       loading a full-size UNet from disk (writes 5 GB to --dir)
    python bench.py sample     a prompt to a picture: encoders, four guided steps and the decoder
    python bench.py train      one training step, beside the published recipe
    python bench.py data       images a second from folders, tars and the cache, on this CPU
    python bench.py gpu        all that only a GPU can show, in 7 minutes, to --out

On a CPU all but `load` and `data` run a mid-size UNet, on a GPU the full one. All but `data`
need diffusers and peft (requirements-test.txt).
"""

import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.data import bench_data
from benchmarks.gpu import SECTIONS, bench_gpu
from benchmarks.inference import bench_load, bench_sample, bench_unet
from benchmarks.measure import BenchConfig, Report, errors
from benchmarks.train import bench_train
from common import cli
from sdxl.pipeline import DTYPES

BENCHMARKS = {
    "unet": bench_unet, "load": bench_load, "sample": bench_sample, "train": bench_train,
}  # fmt: skip
NETWORKS = ("unet", "sample", "train")
# The benchmarks that a flag is for; gpu is fp16 in three rounds, load float16 on the CPU.
USES = {
    "rounds": (*NETWORKS, "load", "data"), "compile": (*NETWORKS, "gpu"), "dir": ("load", "data"),
    "batch_sizes": ("train", "gpu"), "dtype": NETWORKS, "profile": NETWORKS, "out": ("gpu",),
    "tiny": (*NETWORKS, "gpu"), "only": ("gpu",),
}  # fmt: skip


def check(args) -> None:
    """Raise ValueError in one line for flags without use, and for what is not installed."""
    cli.check_device(args.device)
    cli.check_uses(args, parser(), {
        name: (", ".join(whats), args.what in whats) for name, whats in USES.items()
    })  # fmt: skip
    if args.what == "gpu" and args.tiny:
        cli.check_uses(args, parser(), {"batch_sizes": ("gpu without --tiny", False)})
    missing = [name for name in ("diffusers", "transformers", "peft") if find_spec(name) is None]
    if args.what in BENCHMARKS and missing:
        packages = " and ".join(missing)
        raise ValueError(f"{args.what} needs {packages}: pip install -r requirements-test.txt")


def main(args) -> None:
    check(args)
    config = BenchConfig(**{field.name: getattr(args, field.name) for field in fields(BenchConfig)})
    if args.what == "gpu":
        bench_gpu(config, [name for name in SECTIONS if name in args.only])
    elif args.what == "data":
        bench_data(config)
    else:
        report = Report()
        ours = BENCHMARKS[args.what](config, report)
        if args.profile and ours is not None:
            profile(ours)
        if errors(report.figures):
            sys.exit(1)


def profile(call) -> None:
    """Print the dozen operators in which a call spends most of its time."""
    with torch.profiler.profile() as profiler:
        call()
    key = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40))


def parser() -> cli.Parser:
    p = cli.Parser("Measures this code beside diffusers; figures named A_to_B are ratios.")
    add, gpu = p.add_argument, torch.cuda.is_available()
    add("what", choices=[*BENCHMARKS, "data", "gpu"], help="benchmark to run")
    add("--rounds", type=cli.positive_int, default=5, help="turns each side takes, except in gpu")
    add("--compile", action="store_true", help="torch.compile for the UNets as well")
    add("--dir", type=Path, default=Path("runs/bench"),
        help="folder for load's 5 GB and data's 90 MB")  # fmt: skip
    add("--batch-size", type=cli.positive_int, nargs="+", dest="batch_sizes",
        default=[1, 4, 16] if gpu else [2],
        help="images a step of train, one number or several")  # fmt: skip
    add("--dtype", choices=DTYPES, default="fp16" if gpu else "float32",
        help="precision of the networks; in train of our frozen base")  # fmt: skip
    add("--profile", action="store_true",
        help="table of operators that ours spends its time in: unet, sample, train")  # fmt: skip
    add("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu's figures, gpu.json")
    add("--tiny", action="store_true", help="tiny networks: for gpu, a rehearsal on a CPU")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME",
        help="sections of gpu to run")  # fmt: skip
    add("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
