"""Speed and memory beside diffusers: same weights, same run, alternating; medians and ratios.

    python bench.py unet       one forward pass of the UNet
    python bench.py load       loading a full-size UNet from disk (writes 5 GB to --dir)
    python bench.py sample     prompt embeddings to pixels: four guided steps and the decoder
    python bench.py train      one training step, beside the published recipe (needs peft too)

On a CPU all but `load` run a mid-size UNet, on a GPU the full one. Needs diffusers.
"""

from dataclasses import fields
from pathlib import Path

import torch

from benchmarks.inference import bench_load, bench_sample, bench_unet
from benchmarks.measure import BenchConfig, profile
from benchmarks.train import bench_train
from common import cli

BENCHMARKS = {"unet": bench_unet, "load": bench_load, "sample": bench_sample, "train": bench_train}


def main(args) -> None:
    config = BenchConfig(**{field.name: getattr(args, field.name) for field in fields(BenchConfig)})
    ours = BENCHMARKS[args.what](config)
    if args.profile and ours is not None:
        profile(ours)


def parser() -> cli.Parser:
    p = cli.Parser("Measures this code beside diffusers; the number in brackets is the ratio.")
    add, gpu = p.add_argument, torch.cuda.is_available()
    add("what", choices=BENCHMARKS, help="benchmark to run")
    add("--rounds", type=cli.positive_int, default=5, help="turns each side takes")
    add("--compile", action="store_true", help="torch.compile for both UNets as well")
    add("--dir", type=Path, default=Path("runs/bench"), help="folder for load's 5 GB")
    add("--batch-size", type=cli.positive_int, default=2, help="images a step of train")
    add("--dtype", choices=["bf16", "float32"], default="bf16" if gpu else "float32",
        help="precision of our frozen base in train")  # fmt: skip
    add("--profile", action="store_true",
        help="table of the operators that ours spends its time in, not for load")  # fmt: skip
    add("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
