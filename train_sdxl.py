"""Target-Driven Distillation of SDXL (Algorithm 1): a LoRA for 4 to 8 steps, on 1 to 8+ GPUs.

    python train_sdxl.py --model sdxl/ --data images/ --output runs/tdd
    torchrun --nproc-per-node 8 train_sdxl.py --model sdxl/ --data shards/ --output runs/tdd
    torchrun --nproc-per-node 8 train_sdxl.py --model sdxl/ --method tdm --data prompts.txt

The losses are tdd.py's and tdm.py's, the networks are distill.py's, the loop is trainer.py's.
"""

import argparse
import zlib
from functools import partial
from pathlib import Path

import torch

from common import cli, files
from common.files import read_json, read_lines
from sdxl.clip import encode_prompts
from sdxl.load import SDXL, load_sdxl
from sdxl.lora import LoRA
from sdxl.lora_files import read_lora, write_kohya, write_peft
from sdxl.pipeline import DTYPES, conditions, null_of
from solvers import SOLVERS
from tcd import TCF
from tdd import equidistant
from tdm import LOSSES, WEIGHTS
from training import cache, distributed, loop
from training.build import algorithm_of, distillation_of, optimizers_of
from training.distill import Distillation, Matching
from training.images import Images, Loader, Prompts
from training.preview import Pictures, ends_of

# What is not given is the papers' own: 512 images a step on 8 GPUs for TDD, 64 for TDM.
TDD = {"steps": 20_000, "batch_size": 16, "grad_accum": 4, "guidance": 3.5, "loss": "l2",
       "kmin": 4, "kmax": 8, "rho": 0.2}  # fmt: skip
TDM = {"steps": 1000, "batch_size": 8, "grad_accum": 1, "guidance": 7.0, "loss": "huber",
       "ks": [4], "fake_lr": 5e-6, "fake_weight": "exact"}  # fmt: skip


# --------------------------------------------------------------------------------------------- data
#
# Images and captions become x_0 and a condition here, on the fly or once for --cache. The
# autoencoder and the text encoders are the base model's own and never trained.


@torch.no_grad()
def encode(model: SDXL, batch: dict, generator: torch.Generator, device) -> tuple:
    """Latents x_0 (b, 4, h/8, w/8), drawn from the autoencoder's Gaussian, and the condition."""
    images = batch["images"].to(device, non_blocking=True)
    b, _, h, w = images.shape
    noise = torch.randn((b, 4, h // model.vae.factor, w // model.vae.factor), generator=generator)
    x_0 = model.vae.encode(images, noise.to(device))
    prompts = encode_prompts(batch["captions"], model.tokenizer, model.encoder_1, model.encoder_2)
    return x_0, {**prompts, "time_ids": batch["time_ids"].to(device)}


def fill_cache(args, model: SDXL, rank: int, world: int, device, settings: dict) -> None:
    """--cache: every image and caption through the autoencoder and the text encoders, once."""
    images = Images(args.data, args.resolution, args.batch_size, args.seed, rank, world, once=True)

    def encoded(batch: dict) -> dict:
        # By the names: a cache that was cut short and continued has the same noise in it.
        seed = args.seed + zlib.crc32("\n".join(batch["names"]).encode())
        generator = torch.Generator().manual_seed(seed)
        x_0, cond = encode(model, batch, generator, device)
        return {name: tensor.cpu() for name, tensor in {"latents": x_0, **cond}.items()}

    loader = Loader(images, args.workers, args.max_bad)
    cache.fill(args.cache, loader, encoded, settings, rank, world, distributed.barrier)


# -------------------------------------------------------------------------------------------- setup
#
# What is refused is refused before the first gigabyte is read, and on every process alike: flags
# are looked at first, then the output folder, then the model, then the data.


def check(args) -> None:
    """Fill in what was not given, and refuse what cannot be; ValueError in one line."""
    check_method(args)
    if args.full and (args.init or args.compile or not args.model.is_dir()):
        raise ValueError("--full is for a model's folder, without --init and --compile")
    if args.full and args.sample_every and distributed.identity(args.device)[1] > 1:
        raise ValueError("--full: no process has all weights to draw with: --sample-every 0")
    if args.init is not None and not args.init.is_file():
        raise ValueError(f"--init {args.init} is no file")
    if args.resolution % 8:
        raise ValueError(f"--resolution {args.resolution} is not a multiple of 8")
    if args.guidance_range and args.guidance_range[0] > args.guidance_range[1]:
        raise ValueError(f"--guidance-range {args.guidance_range}: LO is above HI")
    if args.sample_prompts is not None:
        read_lines("--sample-prompts", args.sample_prompts)
        if not args.sample_every:
            raise ValueError("--sample-prompts needs --sample-every")
    for k in ends_of(args) if args.sample_every or args.ks else ():
        equidistant(k, args.solver_steps)
    # Under whatever name it is given: a cache and a checkpoint know what they were made of.
    for name in ("model", "data", "cache", "init"):
        path = getattr(args, name)
        setattr(args, name, path and path.resolve())
    if args.method != "tdm":
        algorithm_of(args, "cpu")


def check_method(args) -> None:
    """The method's own defaults; ValueError for flags that it has no use for."""
    tdm = args.method == "tdm"
    for name, value in (TDM if tdm else TDD).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if tdm:
        names = "kmin", "kmax", "rho", "eta", "cache", "guidance_range"
        strange = {"adv": args.adv, "ema": args.ema, "tcf": args.tcf != "1", "full": args.full}
    else:
        # The offset is TDD's own; the other methods' targets are where their samplers stop.
        args.eta = args.eta or (0.3 if (args.method, args.eta) == ("tdd", None) else 0.0)
        names, strange = TDM.keys() - TDD.keys(), {"loss": args.loss not in ("l2", "huber")}
        strange["solver"] = args.solver not in ("ddim", "dpm++2s")
    given = [name for name, value in strange.items() if value]
    given += [name for name in names if getattr(args, name) is not None]
    if given:
        name = min(given).replace("_", "-")
        raise ValueError(f"--method {args.method} has no use for --{name} as it is given")


def init_of(args, model: SDXL) -> LoRA | None:
    """--init; ValueError where it is not of the UNet alone."""
    if args.init is None:
        return None
    init, *others = read_lora(args.init, model.unet, model.encoder_1, model.encoder_2)
    if any(map(len, others)):
        raise ValueError(f"--init {args.init} changes the text encoders, which stay as they are")
    return init


def write(args, nets: Distillation | Matching, folder: Path, step: int, weights: dict) -> None:
    """lora.safetensors and lora_kohya.safetensors, or unet/; how they came about, in the header."""
    told = {
        "method": args.method, "w": args.guidance_range or args.guidance, "eta": args.eta,
        "tcf": args.tcf, "K": args.ks or f"{args.kmin}-{args.kmax}", "rho": args.rho,
        "solver_steps": args.solver_steps, "steps": step, "base": args.model.name,
        "adversarial": args.adv, "ema": args.ema,
    }  # fmt: skip
    # Prefixed, for other programs write into this header too.
    told = {f"tdd_{name}": str(value) for name, value in told.items() if value is not None}
    if args.full:
        unet, name = files.output_folder(folder / "unet"), "target" if args.ema else "student"
        own = {k.partition("/base.")[2]: v for k, v in weights.items() if k.startswith(f"{name}/")}
        config = read_json(args.model / "unet" / "config.json") | {"told": nets.own.config.told}
        files.write_tensors(unet / "diffusion_pytorch_model.safetensors", own, format="pt", **told)
        files.write_json(unet / "config.json", config)
        return
    write_peft(folder / "lora.safetensors", nets.result.lora, **told)
    # Kohya's naming has no place for an embedding, without which the LoRA would be another model.
    if nets.result.lora.told is None:
        write_kohya(folder / "lora_kohya.safetensors", nets.result.lora, **told)


# --------------------------------------------------------------------------------------------- main
#
# The step itself is distill.py's `losses`, the loop around it loop.fit; here the parts are
# chosen.


def batches_of(args, model: SDXL, rank: int, world: int, device, position) -> Loader | Prompts:
    """Prompts, images with captions, or --cache's latents, from where the run stands."""
    kept = ("model", "data", "resolution", "dtype", "seed")
    settings = {k: str(getattr(args, k)) for k in kept}
    full = args.cache is not None and cache.is_full(args.cache, settings)
    if not full:
        model.to(device)
    if args.method == "tdm":
        prompts = read_lines("--data", args.data)
        return Prompts(prompts, args.batch_size, args.seed, rank, world, position)
    if args.cache is None:
        images = Images(args.data, args.resolution, args.batch_size, args.seed, rank, world)
        return Loader(images, args.workers, args.max_bad, position)
    if not full:
        fill_cache(args, model, rank, world, device, settings)
    cached = cache.Cached(args.cache, args.batch_size, args.seed, rank, world)
    return Loader(cached, args.workers, args.max_bad, position)


def main(args) -> None:
    check(args)
    if args.method == "tdm":
        # Its folder is not looked at before the model is; a file can be.
        read_lines("--data", args.data)
    rank, world, device = distributed.start(args.device)
    output, settings = files.output_folder(args.output), {k: str(v) for k, v in vars(args).items()}
    folder, config = loop.resume_point(output, args.resume, settings)
    model = load_sdxl(args.model, args.tokenizer, DTYPES[args.dtype])
    nets = distillation_of(args, model.unet, device, init_of(args, model))
    position = config["positions"][rank] if folder else None
    loader = batches_of(args, model, rank, world, device, position)
    draws_pictures = args.sample_every and distributed.is_main()
    pictures = Pictures(args, model, nets, device) if draws_pictures else None
    if args.cache is not None:
        # From here on everything needed of them lies in the cache.
        model.encoder_1 = model.encoder_2 = None
        model.vae.to("cpu")
    # Each process has draws of its own.
    generator = torch.Generator().manual_seed(args.seed * 10_000 + rank)
    optimizers, export = optimizers_of(args, nets), partial(write, args, nets)
    run = loop.Run(output, nets.modules, optimizers, generator, loader, settings, export)
    if folder is not None:
        run.restore(folder, config)
    nets.distribute(distributed.parallel)

    def losses(batch: dict) -> dict:
        # TDM has no x_0: of what it is to draw, only the size is given.
        data, side = [], args.resolution // model.vae.factor
        if args.method == "tdm":
            cond, _ = conditions(model, batch["captions"], None, *[args.resolution] * 2)
        elif args.cache is None:
            *data, cond = encode(model, batch, generator, device)
        else:
            cond = {k: batch[k].to(device, non_blocking=True) for k in cache.TENSORS}
            data = [cond.pop("latents")]
        shape = len(batch["names"]), model.unet.config.in_channels, side, side
        draws = nets.draw(shape, generator, device)
        batch["timesteps"] = draws.timesteps
        return nets.losses(*data, cond, null_of(cond), draws)

    plan = loop.Plan(
        args.steps, lambda step: min(1.0, (step + 1) / (args.warmup + 1)), args.grad_accum,
        args.clip_grad, args.save_every, args.keep, args.sample_every,
    )  # fmt: skip
    loop.fit(run, plan, losses, nets.after_step, nets.parallel, pictures)
    weights = run.weights()
    if distributed.is_main():
        export(output, run.step, weights)
        print(f"{run.step} steps; {'unet' if args.full else 'lora.safetensors'} is in {output}/")
    distributed.close()


def method_flags(add) -> None:
    """What is distilled: the papers' own choices, by their symbols."""
    whole, share, positive = cli.number(int, 1), cli.number(float, 0, 1), cli.number(float, 0)
    add("--method", choices=["tdd", "cm", "pcm", "tcd", "tdm"], default="tdd",
        help="which targets T; or tdm, distribution matching")  # fmt: skip
    add("--tcf", choices=TCF, default="1",
        help="f: of order 1, order 2, or told of its end s: TCF(1), (2), (S+)")  # fmt: skip
    add("--kmin", type=whole, help="K_min, fewest steps to distil for; PCM's segments: 4")
    add("--kmax", type=whole, help="K_max, most steps to distil for (tdd): 8")
    add("--eta", type=share, help="eta of Eq. 8; 0.3 for tdd, else 0, unless given")
    add("--rho", type=share, help="rho, share of null conditions: 0.2")
    add("--guidance", type=positive,
        help="w' to distil, without a range; g = 1 + w': 3.5, for tdm 7")  # fmt: skip
    add("--guidance-range", type=positive, nargs=2, metavar=("LO", "HI"),
        help="w' ~ U[LO, HI], as TCD does (2 14)")  # fmt: skip
    add("--solver-steps", type=whole, default=250, help="N, steps of the teacher's solver")
    add("--solver", choices=SOLVERS, default="ddim", help="Phi; of tdm, the student's steps")
    add("--ema", type=share, default=0.0, help="mu of theta-; 0: the student, stop-gradient")
    add("--loss", choices=LOSSES, help="d of Eq. 10: l2, or huber; of TDM: Eq. 11 (huber), 6, ..")
    add("--ks", type=whole, nargs="+", metavar="K", help="tdm: K, 4; several make TDM-unify")
    add("--fake-lr", type=positive, help="tdm: the fake score's learning rate, 5e-6")
    add("--fake-weight", choices=WEIGHTS, help="tdm: of the fake score's loss, exact; see tdm.py")


def parser() -> cli.Parser:
    p = cli.Parser("Distils SDXL into a LoRA for few steps: TDD and its relatives, and TDM.")
    add, gpu = p.add_argument, torch.cuda.is_available()
    whole, count, positive = cli.number(int, 1), cli.number(int, 0), cli.number(float, 0)
    add("--model", type=Path, required=True, help="SDXL: a folder or one .safetensors (phi)")
    add("--tokenizer", type=Path, help="its folder, where the model is a single file")
    add("--data", type=Path, required=True,
        help="D: a folder of images, or of .tar shards; for tdm a prompt a line")  # fmt: skip
    add("--init", type=Path, metavar="LORA", help="a LoRA to go on from, with its rank")
    add("--output", type=Path, default=Path("runs/sdxl"), help="LoRAs, checkpoints, log, pictures")
    add("--resolution", type=cli.number(int, 64), default=1024, help="side of the square crops")
    add("--batch-size", type=whole, help="images a step and process: 16, for tdm 8")
    add("--grad-accum", type=whole, help="batches a step: 4, for tdm 1; 8 x 16 x 4 are TDD's 512")
    add("--steps", type=whole, help="optimizer steps: 20000, for tdm 1000")
    add("--lr", type=positive, default=1e-6, help="delta, the learning rate (2e-6 with --adv)")
    add("--warmup", type=count, default=0, help="steps over which delta rises from 0")
    add("--rank", type=whole, default=64, help="r of a fresh LoRA")
    add("--full", action="store_true",
        help="train all of the UNet, sharded over the processes, as TCD did TCF(S+)")  # fmt: skip
    add("--lora-alpha", type=positive, default=8.0, help="alpha of the LoRA, scaled by alpha / r")
    method_flags(add)
    add("--adv", action="store_true", help="adversarial TDD, the paper's Ours (adv)")
    add("--adv-weight", type=positive, default=0.1, help="of the adversarial loss, with --adv")
    add("--adv-lr", type=positive, default=1e-5, help="the discriminator's delta, with --adv")
    add("--clip-grad", type=positive, default=1.0, help="largest norm of a gradient; 0: any")
    add("--weight-decay", type=positive, default=0.0, help="AdamW's")
    add("--seed", type=cli.number(int, 0, 2**31), default=0, help="of all random numbers")
    add("--dtype", choices=["bf16", "float32"], default="bf16" if gpu else "float32",
        help="of the frozen base; what is trained is float32")  # fmt: skip
    add("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    add("--compile", action="store_true", help="torch.compile the UNet's blocks")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="work activations out twice instead of keeping them")  # fmt: skip
    add("--cache", type=Path, metavar="DIR", help="encode once, into DIR, and train from there")
    add("--workers", type=count, default=4, help="that read, for each GPU; the same on --resume")
    add("--max-bad", type=count, default=1000, help="broken examples that a process passes over")
    add("--save-every", type=count, default=500, help="steps between checkpoints; 0: the last only")
    add("--keep", type=whole, default=2, help="checkpoints to keep, the newest")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint, if any")
    add("--sample-every", type=count, default=1000, help="steps between picture grids; 0: none")
    add("--sample-prompts", type=Path, metavar="FILE", help="a prompt a line for these grids")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
