"""Speed and memory beside diffusers: same weights, same run, alternating; medians and ratios.

    python bench.py unet       one forward pass of the UNet
    python bench.py load       loading a full-size UNet from disk (writes 5 GB to --dir)
    python bench.py sample     prompt embeddings to pixels: four guided steps and the decoder
    python bench.py train      one training step, beside the published recipe (needs peft too)

On a CPU all but `load` run a mid-size UNet, on a GPU the full one. Needs diffusers.
"""

from pathlib import Path

import torch

from benchmarks.inference import MID, bench_load, bench_sample, bench_unet, load_child
from benchmarks.measure import profile
from benchmarks.train import bench_train
from common import cli
from unet import UNetConfig


def main(args) -> None:
    if args.child and args.what == "load":
        return load_child(args.child, args.dir / "unet")
    gpu = args.device.startswith("cuda")
    config, side = (UNetConfig(), 128) if gpu else (MID, 64 if args.what == "unet" else 32)
    benches = {"unet": bench_unet, "load": bench_load, "sample": bench_sample, "train": bench_train}
    ours = benches[args.what](args, config, side)
    if args.profile and ours is not None:
        profile(ours)


def parser() -> cli.Parser:
    p = cli.Parser("Measures this code beside diffusers; the number in brackets is the ratio.")
    gpu = torch.cuda.is_available()
    p.add_argument("what", choices=["unet", "load", "sample", "train"], help="what to measure")
    p.add_argument("--rounds", type=cli.number(int, 1), default=5, help="turns each side takes")
    p.add_argument("--compile", action="store_true", help="torch.compile both UNets as well")
    p.add_argument("--dir", type=Path, default=Path("runs/bench"), help="where load writes 5 GB")
    p.add_argument("--child", metavar="SIDE", help="one side alone, for the parent run")
    p.add_argument("--batch-size", type=cli.number(int, 1), default=2, help="of train")
    p.add_argument("--dtype", choices=["bf16", "float32"], default="bf16" if gpu else "float32",
        help="of our frozen base in train")  # fmt: skip
    p.add_argument("--profile", action="store_true",
        help="where ours spends its time, but for load")  # fmt: skip
    p.add_argument("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
