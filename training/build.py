"""Target-Driven Distillation of SDXL (Algorithm 1): a LoRA for 4 to 8 steps, on 1 to 8+ GPUs.

    python train_sdxl.py --model sdxl/ --data images/ --output runs/tdd
    torchrun --nproc-per-node 8 train_sdxl.py --model sdxl/ --data shards/ --output runs/tdd
    torchrun --nproc-per-node 8 train_sdxl.py --model sdxl/ --method tdm --data prompts.txt

The losses are tdd.py's and tdm.py's, the networks are distill.py's, the loop is trainer.py's.
"""

import copy
from dataclasses import replace

import torch

from sdxl.lora import LoRA, fresh_told
from sdxl.pipeline import compile_blocks
from solvers import SOLVERS, sdxl_schedule
from tcd import TCF
from tdd import pseudo_huber, squared_l2, targets_of
from training import loop
from training.adversarial import Adversary
from training.distill import Algorithm, Distillation, Matching
from unet import UNet


def algorithm_of(args, device) -> Algorithm:
    """Algorithm 1 as the flags have it."""
    targets = targets_of(args.method, args.solver_steps, args.kmin, args.kmax)
    w = tuple(args.guidance_range or (args.guidance, args.guidance))
    distance = {"l2": squared_l2, "huber": pseudo_huber}[args.loss]
    return Algorithm(
        targets, sdxl_schedule().to(device), args.eta, args.rho, w, args.ema, SOLVERS[args.solver],
        TCF[args.tcf], distance, args.adv_weight,
    )  # fmt: skip


def distillation_of(args, unet, device, init: LoRA | None = None) -> Distillation | Matching:
    """The UNet on its device, frozen, and all that is trained on it; init: a LoRA to go on from."""
    if unet.config.told:
        raise ValueError(f"{args.model}: its UNet is told of {unet.config.told}: it is no teacher")
    unet.to(device, memory_format=torch.channels_last)
    unet.checkpoint_blocks(args.checkpointing)
    # From the seed alone: every process starts from the same LoRA.
    generator, tdm = torch.Generator().manual_seed(args.seed), args.method == "tdm"
    told = "s" if args.tcf == "s" else "K" * (tdm and len(args.ks) > 1)
    own = copy_of(unet, told, generator) if args.full else None
    lora = None if args.full else lora_of(args, unet, told, generator, init).to(device)
    if tdm:
        fake = LoRA.fresh(unet, args.rank, args.lora_alpha, generator, told).to(device)
        nets = Matching(
            unet, lora, fake, sdxl_schedule().to(device), tuple(args.ks), args.solver_steps,
            args.guidance, args.fake_weight, args.loss, SOLVERS[args.solver],
        )  # fmt: skip
    else:
        adversary = Adversary.fresh(unet, 1000 // args.kmin, args.seed) if args.adv else None
        nets = Distillation(unet, lora, algorithm_of(args, device), adversary, own)
    if args.compile:
        compile_blocks(unet)
    return nets


def lora_of(args, unet: UNet, told: str, generator, init: LoRA | None) -> LoRA:
    """The student's LoRA, fresh or from init; ValueError if init is told of something else."""
    fresh = LoRA.fresh(unet, args.rank, args.lora_alpha, generator, told)
    if init is None:
        return fresh
    if init.told is not None and init.told.of != told:
        other = f"of {told}" if told else "nothing"
        raise ValueError(f"--init {args.init} is told of {init.told.of}, this student {other}")
    # What a file holds is at its full strength: it is to be so under this run's alpha too.
    updates = {name: u.scaled(args.lora_alpha / args.rank) for name, u in init.items()}
    return LoRA.of(updates, init.told or fresh.told).requires_grad_()


def copy_of(unet: UNet, told: str, generator: torch.Generator) -> UNet:
    """--full: a float32 UNet to train as a whole, with an embedding of what it is told."""
    # Not channels_last: what is to be sharded must lie in memory as it is indexed.
    own = copy.deepcopy(unet).float().to(memory_format=torch.contiguous_format)
    own.config = replace(unet.config, told=told)
    if told:
        own.told = fresh_told(unet, told, generator).to(unet.conv_in.weight.device)
    return own.requires_grad_()


def optimizers_of(args, nets: Distillation | Matching) -> dict[str, torch.optim.Optimizer]:
    student = nets.student.parameters()
    if args.method == "tdm":
        rates = {"adam": (student, args.lr), "adam_fake": (nets.fake.parameters(), args.fake_lr)}
        # Each of the two is what the other aims at: momentum would lead where it no longer is.
        betas = args.weight_decay, (0.0, 0.999)
        return {name: loop.adamw(*given, *betas) for name, given in rates.items()}
    made = {"adam": loop.adamw(student, args.lr, args.weight_decay)}
    if nets.adversary is not None:
        heads = nets.adversary.heads.parameters()
        made["adam_heads"] = loop.adamw(heads, args.adv_lr, args.weight_decay, (0.0, 0.999))
    return made
