"""SDXL in tdd.py's terms: conditions, networks eps(x_t, t, cond), data and samples."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import tdd
from sdxl.clip import encode_prompts
from sdxl.load import SDXL
from sdxl.lora import merge
from sdxl.lora_files import read_lora
from solvers import CLEAN, SOLVERS, noise_stream, sdxl_schedule, solve, to_device
from tcd import TCF
from unet import Block, Encoder, ScalarEmbedding

SCHEDULES = ("equidistant", "nonequidistant")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# -------------------------------------------------------------------------------------- conditions


def make_conditions(model: SDXL, prompts: list[str], negative: str | None, height: int, width: int):
    """The condition of each prompt, and the negative prompt's (None without one)."""
    cond = encode_prompts(prompts, model.tokenizer, model.encoder_1, model.encoder_2)
    # As if the picture had that size from the start and nothing was cropped.
    sizes = torch.tensor([[height, width, 0, 0, height, width]])
    sizes = to_device(sizes, cond["pooled"].device)
    cond = {**cond, "time_ids": sizes.expand(len(prompts), 6)}
    if negative is None:
        return cond, None
    encoded = encode_prompts([negative], model.tokenizer, model.encoder_1, model.encoder_2)
    return cond, {**encoded, "time_ids": sizes}


def null_condition(cond: dict) -> dict:
    """The null condition beside a condition: zeros for the prompt, the same sizes."""
    null = {name: torch.zeros_like(tensor[:1]) for name, tensor in cond.items()}
    return {**null, "time_ids": cond["time_ids"]}


@torch.no_grad()
def encode_batch(model: SDXL, batch: dict, generator: torch.Generator, device) -> tuple:
    """Latents x_0 (b, 4, h/8, w/8), drawn from the autoencoder's Gaussian, and the condition."""
    images = batch["images"].to(device, non_blocking=True)
    b, _, h, w = images.shape
    noise = torch.randn((b, 4, h // model.vae.factor, w // model.vae.factor), generator=generator)
    x_0 = model.vae.encode(images, to_device(noise, device))
    prompts = encode_prompts(batch["captions"], model.tokenizer, model.encoder_1, model.encoder_2)
    return x_0, {**prompts, "time_ids": to_device(batch["time_ids"], device)}


# ---------------------------------------------------------------------------------------- networks


def scalar_network(unet: nn.Module, embedding: ScalarEmbedding | None):
    """The UNet as eps(x_t, t, cond, value), if there is an embedding for value (b,)."""
    if embedding is None:
        return unet

    def network(x_t: Tensor, t: Tensor, cond: dict, value: Tensor, *control) -> Tensor:
        return unet(x_t, t, {**cond, "scalar": embedding(value)}, *control)

    return network


def merge_loras(model: SDXL, loras: list[tuple[Path, float]], tcf: str):
    """The network eps(x_t, t, cond) of the model with (file, scale) LoRAs merged in.

    Merged, a LoRA costs nothing when sampling. Raises ValueError if files and --tcf do not agree.
    """
    network = scalar_network(model.unet, getattr(model.unet, "scalar_embedding", None))
    bases = model.unet, model.encoder_1, model.encoder_2
    parts = [(read_lora(path, *bases), scale) for path, scale in loras]
    for i, base in enumerate(bases):
        merge(base, [(each[i], scale) for each, scale in parts])
    for (path, scale), ((unet_lora, *_), _) in zip(loras, parts, strict=True):
        embedding = unet_lora.scalar_embedding
        if embedding is None:
            continue
        if network is not model.unet or tcf != "s":
            message = "takes the target time as an input: give --tcf s"
            raise ValueError(f"--lora {path} {message}, and no second LoRA of its kind")
        # A part of the UNet from here on, so that it moves where that moves.
        model.unet.scalar_embedding = embedding.to(model.unet.conv_in.weight.device)
        # The last layer is linear: scaling it scales the whole embedding.
        for parameter in embedding.linear_2.parameters():
            parameter.mul_(scale)
        network = scalar_network(model.unet, embedding)
    if tcf == "s" and network is model.unet:
        raise ValueError("--tcf s: neither a --lora nor a --unet was trained with it")
    return network


def with_controlnets(network, controls: list[tuple]):
    """The network with the sum of ControlNets' residuals.

    controls: (ControlNet, image (1, 3, H, W) in [0, 1], scale) of each.
    """

    def model(x_t: Tensor, t: Tensor, cond: dict, *scalar: Tensor) -> Tensor:
        outputs = []
        for controlnet, image, scale in controls:
            outputs.append(controlnet(x_t, t, cond, image.expand(len(x_t), -1, -1, -1), scale))
        return network(x_t, t, cond, *scalar, [sum(each) for each in zip(*outputs, strict=True)])

    return model


@contextmanager
def on_device(device, *modules: nn.Module):
    """These modules on a device; their weights stay where they were, and are back there after."""
    homes = [(p, p.data) for module in modules for p in module.parameters()]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for p, data in homes:
            p.data = data


def compile_blocks(unet: Encoder, **options) -> None:
    """torch.compile each block of a UNet or ControlNet, for any batch size."""
    # Blocks, not the network: a dozen shapes instead of one huge graph, and the LoRA switches stay
    # outside. Only the batch may vary, as the teacher's does from step to step.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 256
    for module in unet.modules():
        if isinstance(module, Block):
            module.compile(**options)


# ----------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class SamplerConfig:
    """One way to sample: w of Eq. 12, gamma of Eq. 18, C of Eq. 17 in the first clip_steps steps.

    w_distilled: w' of the student, for Eq. 13's tuning, or None. sampler: "tdd", the gamma-sampler,
    or one of solvers.SOLVERS for the plain model and for a TDM student of that solver, where gamma,
    C and tcf have no part. solver_steps: N. kmin, kmax: of the non-equidistant schedule. tcf: one
    of tcd.TCF.
    """

    steps: int = 4
    solver_steps: int = 250
    schedule: str = "equidistant"
    kmin: int = 4
    kmax: int = 8
    sampler: str = "tdd"
    w: float = 1.0
    w_distilled: float | None = None
    gamma: float = 0.2
    tcf: str = "1"
    clip_steps: int = 0
    clip_percentile: float = 0.995
    clip_max: float = 1.0

    @property
    def timesteps(self) -> list[int]:
        """The k timesteps of the schedule; ValueError if it has none for this k."""
        if self.schedule == "nonequidistant":
            return tdd.nonequidistant(self.steps, self.solver_steps, self.kmin, self.kmax)
        return tdd.equidistant(self.steps, self.solver_steps)

    @property
    def w_tuned(self) -> float:
        """w, or Eq. 13's if the student's w' is known."""
        return self.w if self.w_distilled is None else tdd.tuned(self.w, self.w_distilled)


def sample_latents(
    config: SamplerConfig, network, cond, null, shape, seeds, device, negative=None
) -> Tensor:
    """Final latents (b, *shape), float32; each depends on its own prompt and seed alone.

    null: the condition that training dropped prompts to. negative: what guidance leads away from in
    its place, if anything.
    """
    if negative is None or config.w_distilled is None:
        eps = tdd.guided(network, cond, null if negative is None else negative, config.w_tuned)
    else:
        eps = tdd.tuned_with_negative(network, cond, null, negative, config.w, config.w_distilled)
    # Image i has its own CPU generator, so it is the same alone, in a batch or on a GPU.
    noise = noise_stream(seeds, shape, device)
    x_T = next(noise)
    if config.sampler != "tdd":
        stops = [*config.timesteps, CLEAN]
        return solve(eps, x_T, stops, sdxl_schedule(), SOLVERS[config.sampler]())
    clip = partial(tdd.clip_x0, percentile=config.clip_percentile, max_value=config.clip_max)
    return tdd.gamma_sample(eps, x_T, config.timesteps, sdxl_schedule(), config.gamma, noise,
                            clip, config.clip_steps, TCF[config.tcf])  # fmt: skip
