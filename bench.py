"""Speed and memory beside diffusers: same weights, same run, alternating; medians and ratios.

    python bench.py unet       one forward pass of the UNet
    python bench.py load       loading a full-size UNet from disk (writes 5 GB to --dir)
    python bench.py sample     prompt embeddings to pixels: four guided steps and the decoder
    python bench.py train      one training step, beside the published recipe (needs peft too)

On a CPU all but `load` run a mid-size UNet, on a GPU the full one. Needs diffusers.
"""

import json
from pathlib import Path

import torch

from benchmarks.inference import bench_load, bench_sample, bench_unet, measure_load
from benchmarks.measure import BenchConfig, profile
from benchmarks.train import bench_train, measure_peak
from common import cli

BENCHMARKS = {
    "unet": bench_unet, "load": bench_load, "sample": bench_sample, "train": bench_train,
}  # fmt: skip


def main(args) -> None:
    config = BenchConfig(
        what=args.what, device=args.device, dtype=args.dtype, rounds=args.rounds,
        batch_size=args.batch_size, compile=args.compile, folder=args.dir,
    )  # fmt: skip
    if args.child is not None:
        measure = measure_load if args.what == "load" else measure_peak
        print(json.dumps(measure(config, args.child)))
        return
    ours = BENCHMARKS[args.what](config)
    if args.profile and ours is not None:
        profile(ours)


def parser() -> cli.Parser:
    p = cli.Parser("Measures this code beside diffusers; the number in brackets is the ratio.")
    gpu = torch.cuda.is_available()
    p.add_argument("what", choices=BENCHMARKS, help="benchmark to run")
    p.add_argument("--rounds", type=cli.number(int, 1), default=5, help="turns each side takes")
    p.add_argument("--compile", action="store_true", help="torch.compile for both UNets as well")
    p.add_argument("--dir", type=Path, default=Path("runs/bench"), help="folder for load's 5 GB")
    p.add_argument("--child", metavar="SIDE", help="one side alone, for the parent run")
    p.add_argument(
        "--batch-size", type=cli.number(int, 1), default=2, help="images a step of train"
    )
    p.add_argument("--dtype", choices=["bf16", "float32"], default="bf16" if gpu else "float32",
        help="precision of our frozen base in train")  # fmt: skip
    p.add_argument("--profile", action="store_true",
        help="table of the operators that ours spends its time in, not for load")  # fmt: skip
    p.add_argument("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
