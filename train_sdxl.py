"""Target-Driven Distillation of SDXL (Algorithm 1): a LoRA for 4 to 8 steps, on 1 to 8+ GPUs.

    python train_sdxl.py --model models/sdxl --data images/ --output runs/tdd
    torchrun --nproc-per-node 8 train_sdxl.py --model models/sdxl --data shards/ --output runs/tdd
    torchrun --nproc-per-node 8 train_sdxl.py --model models/sdxl --method tdm --data prompts.txt
    python train_sdxl.py --model models/sdxl --data prompts.txt --pairs teacher --ks 4 5 6 7 8

The losses are in tdd.py and tdm.py, the training step in training/distill.py, the loop in
training/loop.py; this file holds the flags and puts the parts together.
"""

import argparse
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

from common import cli, files
from common.cli import below_1, count, non_negative, positive_int, share
from common.files import read_lines
from sdxl import num_steps
from sdxl.load import SDXL, ModelPaths, load_sdxl
from sdxl.lora import LoRA
from sdxl.lora_files import read_lora
from sdxl.pipeline import DTYPES, encode_batch, make_conditions, null_condition
from sdxl.recipe import read_recipe
from sdxl.weights import use_exact_float32
from solvers import SOLVERS
from tcd import TCF
from tdd import equidistant
from tdm import LOSSES, WEIGHTS
from training import build, cache, distributed, loop
from training.build import DISTANCES, DistillConfig
from training.checkpoint import TrainState, check_shared, resume_point
from training.data import DataConfig, open_data
from training.distill import TDDStep
from training.export import export
from training.paths import PathLoader, prompts_place
from training.preview import Pictures, PreviewConfig, read_prompts

# The papers' batches: 512 images a step on 8 GPUs for TDD, 448 with its adversary, 64 for TDM.
TDD_DEFAULTS = {"steps": 20_000, "batch_size": 16, "grad_accum": 4}
ADV_DEFAULTS = {**TDD_DEFAULTS, "batch_size": 14, "lr": 2e-6}
TDM_DEFAULTS = {"steps": 1000, "batch_size": 8, "grad_accum": 1}
# Fields of DistillConfig that only one of the two has a use for.
TDD_FIELDS = ("kmin", "kmax", "reach", "rho", "eta", "pairs")
TDM_FIELDS = ("fake_lr", "fake_weight")
# With alpha = 0 the file at the end would be as untrained as at the beginning.
positive = cli.number(float, 1e-6)

# -------------------------------------------------------------------------------------------- setup
#
# Bad input is refused before the first gigabyte is read, and on every process alike: flags first,
# then the output folder, then the model, then the data.


def check(args) -> None:
    """Fill in defaults, and raise ValueError in one line for flags that do not go together."""
    if args.guidance and args.guidance_range:
        raise ValueError("--guidance and --guidance-range exclude each other: give one of them")
    several = len({*(args.Ks or ())}) > 1
    cli.check_uses(args, parser(), {
        "tell_k": ("several --ks", several), "min_size": ("images", not needs_prompts(args)),
        "k_lr": ("a student that is told which of several --ks is meant", several and args.tell_k),
        "adv_weight": ("--adv", args.adv), "adv_lr": ("--adv", args.adv),
        "rank": ("a LoRA", not args.full), "alpha": ("a LoRA", not args.full),
    })  # fmt: skip
    check_method(args)
    if args.full and (args.init or args.compile or not args.model.is_dir()):
        raise ValueError("--full is for a model's folder, without --init and --compile")
    told_ks = build_config(args).told_ks
    num_steps.check_rank(told_ks, args.rank)
    if args.full and told_ks:
        raise ValueError("--full: K is told to a LoRA: add --no-tell-k")
    if args.full and args.sample_every and distributed.get_dist_info(args.device)[1] > 1:
        raise ValueError("--full: no process has all weights to draw with: --sample-every 0")
    if args.init is not None and not args.init.is_file():
        raise ValueError(f"--init {args.init} is no file")
    if args.resolution % 8:
        raise ValueError(f"--resolution {args.resolution} is not a multiple of 8")
    if args.guidance_range and args.guidance_range[0] > args.guidance_range[1]:
        raise ValueError(f"--guidance-range {args.guidance_range}: LO is above HI")
    if read_prompts(args.sample_prompts) and not args.sample_every:
        raise ValueError("--sample-prompts needs --sample-every")
    if args.sample_every or args.Ks:
        for k in preview_steps(build_config(args)):
            equidistant(k, args.solver_steps)
    if needs_prompts(args):
        if args.cache is not None:
            raise ValueError("--cache holds images' latents: these pairs come from prompts alone")
        if args.data.is_dir():
            raise ValueError(f"--data {args.data} is a folder: a file of prompts is needed")
        read_lines("--data", args.data)
    if args.method != "tdm":
        build.build_tdd_config(build_config(args), "cpu")


def needs_prompts(args) -> bool:
    """Whether --data is a file of prompts: the method looks at no images."""
    return args.method == "tdm" or args.pairs == "teacher"


def check_method(args) -> None:
    """Fill in the method's defaults; ValueError for flags that it has no use for."""
    config = DistillConfig.of_method(args.method)
    args.Ks = config.Ks if args.Ks is None else tuple(dict.fromkeys(args.Ks))
    if args.method == "tdm":
        defaults, names, others = TDM_DEFAULTS, TDM_FIELDS, (*TDD_FIELDS, "cache", "guidance_range")
        useless = {"adv": args.adv, "ema": args.mu, "full": args.full, "tcf": args.tcf != "1"}
    else:
        defaults, names, others = TDD_DEFAULTS, TDD_FIELDS, TDM_FIELDS
        if args.adv:
            defaults = ADV_DEFAULTS
        useless = {"loss": args.loss not in (None, *DISTANCES),
                   "kmin": args.kmin and args.method in ("cm", "tcd") and not args.adv,
                   "kmax": args.kmax and args.method != "tdd",
                   "ks": args.Ks and args.method != "tdd",
                   "reach": args.reach is not None and args.method != "tdd"}  # fmt: skip
    useless |= {name.replace("_", "-"): getattr(args, name) is not None for name in others}
    for flag, was_given in useless.items():
        if was_given:
            raise ValueError(f"--method {args.method} has no use for --{flag} with this value")
    if args.method == "tdd" and args.Ks:
        for name in ("kmin", "kmax", "reach"):
            if getattr(args, name) is not None:
                raise ValueError(f"--ks says what the targets are: leave --{name} away")
        # At gamma = 0 samplers of these K land on their stops, and nowhere else.
        config = replace(config, kmin=min(args.Ks), kmax=max(args.Ks), eta=0.0)
    defaults = {"lr": config.lr, "k_lr": config.k_lr, **defaults, "guidance": 1 + config.w[0]}
    defaults |= {name: getattr(config, name) for name in (*names, "loss")}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def model_paths(args) -> ModelPaths:
    """Where the model's parts are."""
    return ModelPaths(args.model, args.tokenizer, vae=args.vae)


def build_settings(args) -> dict[str, str]:
    """All that a resumed run is compared by: flags, and the content of what paths lead to."""
    contents = model_paths(args).fingerprints(DTYPES[args.dtype])
    if args.init is not None:
        contents["init"] = files.fingerprint(args.init)
    settings = {name: str(value) for name, value in vars(args).items()}
    settings["examples from"] = "--data" if args.cache is None else "--cache"
    return settings | {f"content of {name}": content for name, content in contents.items()}


def build_config(args) -> DistillConfig:
    """The flags as a DistillConfig, with guidance as the paper's w = g - 1."""
    low, high = args.guidance_range or (args.guidance, args.guidance)
    values = {field.name: getattr(args, field.name, None) for field in fields(DistillConfig)}
    values = {name: value for name, value in values.items() if value is not None}
    # What the method has no use for keeps its default.
    return DistillConfig(**values, w=(low - 1, high - 1))


def preview_steps(config: DistillConfig) -> list[int]:
    """The numbers of steps that picture grids show: K_min and K_max, or TDM's K."""
    return sorted(set(config.Ks if config.method == "tdm" else [config.kmin, config.kmax]))


def build_preview(args, config: DistillConfig) -> PreviewConfig:
    """The flags for the picture grids; the teacher's guidance is the middle of w's range."""
    return PreviewConfig(
        output=args.output, resolution=args.resolution, steps=preview_steps(config),
        w=sum(config.w) / 2, solver_steps=args.solver_steps, seed=args.seed,
        prompts=read_prompts(args.sample_prompts),
        offload_vae=args.cache is not None or needs_prompts(args),
    )  # fmt: skip


def read_init(path: Path | None, model: SDXL, told_ks: tuple[int, ...]) -> LoRA | None:
    """--init; ValueError if it changes the text encoders too, or is told other K."""
    if path is None:
        return None
    known = read_recipe(path, files.read_tensors(path)[1]).get("told_ks")
    if known and known != told_ks:
        raise ValueError(
            f"--init {path} is told K of {[*known]}: give --ks {' '.join(map(str, known))}"
        )
    init, *others = read_lora(path, model.unet, model.encoder_1, model.encoder_2)
    if any(lora.adapters for lora in others):
        raise ValueError(f"--init {path} changes the text encoders, which stay as they are")
    return init


# --------------------------------------------------------------------------------------------- data
#
# The autoencoder and the text encoders are the base model's and never trained.


def build_data(args) -> DataConfig:
    """The flags for the data."""
    min_size = args.resolution // 4 if args.min_size is None else args.min_size
    settings = {"resolution": str(args.resolution), "min_size": str(min_size),
                "dtype": args.dtype, "seed": str(args.seed)}  # fmt: skip
    if args.cache is not None:
        parts = model_paths(args).fingerprints(DTYPES[args.dtype])
        # Nothing of the UNet is in a cache.
        parts.pop("unet", None)
        settings |= {f"content of {name}": content for name, content in parts.items()}
    return DataConfig(
        data=args.data, is_prompts=needs_prompts(args), cache=args.cache, settings=settings,
        resolution=args.resolution, min_size=min_size, seed=args.seed,
        # A walker takes one prompt at a time.
        batch_size=1 if args.pairs == "teacher" else args.batch_size,
        workers=args.workers, max_bad=args.max_bad,
    )  # fmt: skip


def open_paths(
    args, model: SDXL, step: TDDStep, shape, generator: torch.Generator, device, position
) -> PathLoader:
    """Walkers on the teacher's path to the prompts of --data, staggered unless the run goes on."""
    rank, world, _ = distributed.get_dist_info(args.device)
    check_shared(args.output)
    place = None if position is None else prompts_place(position)
    prompts = open_data(build_data(args), model, rank, world, device, place)

    def draw_conds(count: int) -> list:
        batches = [next(prompts) for _ in range(count)]
        return [(*batch["captions"], *batch["names"]) for batch in batches]

    def encode(captions: list[str]) -> tuple:
        cond, _ = make_conditions(model, captions, None, args.resolution, args.resolution)
        return cond, null_condition(cond)

    loader = PathLoader(
        step, shape, args.batch_size, generator, device, draw_conds,
        lambda caption: isinstance(caption, str), prompts, args.grad_accum,
    )  # fmt: skip
    if position is None:
        loader.start(encode)
    return loader


def encode_examples(args, model: SDXL, batch: dict, generator, device) -> tuple:
    """x_0, None where the method needs none, and the condition of a batch."""
    if needs_prompts(args):
        # TDM starts from noise, and walkers are where they are.
        captions = batch["captions"] if args.method == "tdm" else batch["conds"]
        return None, make_conditions(model, captions, None, args.resolution, args.resolution)[0]
    if args.cache is None:
        return encode_batch(model, batch, generator, device)
    cond = {name: batch[name].to(device, non_blocking=True) for name in cache.TENSORS}
    return cond.pop("latents"), cond


# --------------------------------------------------------------------------------------------- main


def main(args) -> None:
    check(args)
    rank, world, device = distributed.init_distributed(args.device)
    output = files.output_folder(args.output)
    settings = build_settings(args)
    folder, saved = resume_point(output, args.resume, settings)
    config = build_config(args)
    if rank == 0:
        print(build.describe_guidance(config))
    use_exact_float32(DTYPES[args.dtype])
    model = load_sdxl(model_paths(args), dtype=DTYPES[args.dtype])
    step = build.build_step(config, model.unet, device, read_init(args.init, model, config.told_ks))
    # Each process draws its own random numbers.
    generator = torch.Generator().manual_seed(args.seed * 10_000 + rank)
    position = saved["positions"][rank] if folder else None
    side = args.resolution // model.vae.factor
    shape = model.unet.config.in_channels, side, side
    if config.pairs == "teacher":
        loader = open_paths(args, model, step, shape, generator, device, position)
    else:
        loader = open_data(build_data(args), model, rank, world, device, position)
    pictures = None
    if args.sample_every and distributed.is_main():
        pictures = Pictures(build_preview(args, config), model, step, device)
    if args.cache is not None:
        # The cache holds everything that training needs of these.
        model.encoder_1 = model.encoder_2 = None
    if args.cache is not None or needs_prompts(args):
        model.vae.to("cpu")
    state = TrainState(
        output, step.modules, build.build_optimizers(config, step), generator, loader, settings,
        partial(export, config, args.model, args.resolution, step),
        build.loss_scaler(device, args.dtype == "fp16"), lambda: loader.left_out)  # fmt: skip
    if folder is not None:
        state.restore(folder, saved)
    step.distribute(distributed.wrap_ddp)

    def losses(batch: dict) -> dict:
        x_0, cond = encode_examples(args, model, batch, generator, device)
        walkers = {"walkers": batch["walkers"]} if "walkers" in batch else {}
        sample = step.sample((len(batch["names"]), *shape), generator, device, **walkers)
        batch["timesteps"] = sample.timesteps
        return step.losses(x_0, cond, null_condition(cond), sample)

    train_config = loop.TrainConfig(
        steps=args.steps, lr_lambda=lambda i: min(1.0, (i + 1) / (args.warmup + 1)),
        grad_accum=args.grad_accum, clip_grad=args.clip_grad, save_every=args.save_every,
        keep=args.keep, sample_every=args.sample_every,
    )  # fmt: skip
    loop.fit(state, train_config, losses, step.after_step, step.ddp_modules, pictures)
    weights = state.weights()
    if distributed.is_main():
        export(config, args.model, args.resolution, step, output, state.step, weights)
        written = "unet" if args.full else "lora.safetensors"
        print(f"{state.step} steps; {written} is in {output}/")
    distributed.close(step.ddp_modules)


def method_flags(add) -> None:
    """What is distilled: the papers' choices, with their symbols."""
    guidance = cli.number(float, 1)
    add("--method", choices=["tdd", "cm", "pcm", "tcd", "tdm"], default="tdd",
        help="the rule for targets; or tdm, distribution matching")  # fmt: skip
    add("--tcf", choices=TCF, default="1",
        help="f, the jump: TCF(1), TCF(2), or TCF(S+), a network of its target time")  # fmt: skip
    add("--kmin", type=positive_int, help="K_min of tdd and --adv, number of pcm's segments: 4")
    add("--kmax", type=positive_int, help="K_max, most steps to distil for (tdd): 8")
    add("--reach", type=non_negative, metavar="E",
        help="e of Eq. 7 in timesteps, for tdd: T / K_min")  # fmt: skip
    add("--eta", type=share, help="eta of Eq. 8: 0.3 for tdd, 0 for the others")
    add("--rho", type=share, help="rho, share of null conditions: 0.2")
    add("--guidance", type=guidance,
        help="guidance to distil, g = 1 + w' of the paper, 1 is off: 4.5, for tdm 8")  # fmt: skip
    add("--guidance-range", type=guidance, nargs=2, metavar=("LO", "HI"),
        help="range that g is drawn from for each example; TCD's is 3 15")  # fmt: skip
    add("--solver-steps", type=positive_int, default=250, help="N, steps of the teacher's solver")
    add("--solver", choices=SOLVERS, default="ddim", help="Phi; for tdm, the student's steps")
    add("--ema", type=below_1, default=0.0, dest="mu", help="mu of theta-; 0: the student itself")
    add("--loss", choices=list(dict.fromkeys([*DISTANCES, *LOSSES])),
        help="l2 or huber, the distance of Eq. 10 (l2); for tdm huber (Eq. 11), l2 (Eq. 6), dmd or "
        "fisher (huber)")  # fmt: skip
    add("--ks", type=positive_int, nargs="+", dest="Ks", metavar="K",
        help="K of tdm (4; several make TDM-unify); for tdd, the K whose next stops are the "
        "targets, instead of Eqs. 5 and 7, with eta 0 unless given")  # fmt: skip
    add("--no-tell-k", action="store_false", dest="tell_k",
        help="do not tell the student which of several K is meant")  # fmt: skip
    add("--k-lr", type=non_negative, help="learning rate of what is told of each K: 1e-4")
    add("--pairs", choices=["data", "teacher"],
        help="source of x_{t_{n+1}}: noised data, or the teacher's own path, for which --data is a "
        "file of prompts (data)")  # fmt: skip
    add("--fake-lr", type=non_negative, help="learning rate of TDM's fake score: 5e-6")
    add("--fake-weight", choices=WEIGHTS, help="weight in the fake score's loss (tdm.py): exact")


def parser() -> cli.Parser:
    p = cli.Parser("Distils SDXL into a LoRA for few steps: TDD and its relatives, and TDM.")
    add, gpu = p.add_argument, torch.cuda.is_available()
    add("--model", type=Path, required=True, help="SDXL: a folder or one .safetensors (phi)")
    add("--tokenizer", type=Path, help="tokenizer's folder, where the model is a single file")
    add("--vae", type=Path, metavar="PATH", help="VAE instead of the model's: a folder or file")
    add("--data", type=Path, required=True,
        help="D: folder of images or .tar shards; for tdm and --pairs teacher a file, a prompt a "
             "line")  # fmt: skip
    add("--init", type=Path, metavar="LORA", help="LoRA to go on from, with its rank")
    add("--output", type=Path, default=Path("runs/sdxl"), help="folder of all that is written")
    add("--resolution", type=cli.number(int, 64), default=1024, help="side of crops in pixels")
    add("--batch-size", type=positive_int,
        help="images a batch and process: 16, with --adv 14, for tdm 8")  # fmt: skip
    add("--grad-accum", type=positive_int, help="batches a step: 4 (of 8 x 16, TDD's 512), tdm 1")
    add("--steps", type=positive_int, help="optimizer steps: 20000, for tdm 1000")
    add("--lr", type=non_negative, help="learning rate delta: 1e-6, with --adv 2e-6")
    add("--warmup", type=count, default=0, help="steps over which delta rises from 0")
    add("--rank", type=positive_int, default=64, help="r of a new LoRA")
    add("--full", action="store_true", help="whole UNet, sharded, instead of a LoRA: TCD's TCF(S+)")
    add("--lora-alpha", type=positive, default=8.0, dest="alpha", help="alpha, for alpha / r")
    method_flags(add)
    add("--adv", action="store_true", help="adversarial TDD, the paper's Ours (adv)")
    add("--adv-weight", type=non_negative, default=0.1, help="weight of the adversarial loss")
    add("--adv-lr", type=non_negative, default=1e-5, help="learning rate of the discriminator")
    add("--clip-grad", type=non_negative, default=1.0, help="largest norm of a gradient; 0: any")
    add("--weight-decay", type=non_negative, default=0.0, help="weight decay of AdamW")
    add("--seed", type=cli.number(int, 0, 2**31), default=0, help="seed of all random numbers")
    add("--dtype", choices=DTYPES, default="fp16" if gpu else "float32",
        help="precision of the frozen base; fp16 scales the loss")  # fmt: skip
    add("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    add("--compile", action="store_true", help="torch.compile for the UNet's blocks")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="activations recomputed in the backward pass instead of kept")  # fmt: skip
    add("--cache", type=Path, metavar="DIR",
        help="folder of encoded latents and prompts: filled once, then read")  # fmt: skip
    add("--workers", type=positive_int, default=4, help="decoding threads a process")
    add("--min-size", type=count, metavar="PIXELS",
        help="short side below which images are left out: a quarter of --resolution")  # fmt: skip
    add("--max-bad", type=count, default=1000, help="broken examples that a process passes over")
    add("--save-every", type=count, default=500, help="steps between checkpoints; 0: the last only")
    add("--keep", type=positive_int, default=2, help="number of checkpoints to keep")
    add("--resume", action="store_true", help="continue from the newest complete checkpoint")
    add("--sample-every", type=count, default=1000, help="steps between picture grids; 0: none")
    add("--sample-prompts", type=Path, metavar="FILE", help="up to 32 prompts, one a line")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
