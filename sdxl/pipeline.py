"""One frozen base as all networks of a method, and a training step of TDD or TDM on it.

The teacher is the base with no LoRA on, the student the base with its LoRA; the target network has
that LoRA's moving average, TDM's fake score a LoRA of its own. One copy of the weights in memory,
whatever the method.
"""

import torch
from torch import Tensor, nn

from sdxl.clip import encode_prompts
from sdxl.load import SDXL
from sdxl.lora import LoRA
from tdd import equidistant, nonequidistant, told
from unet import Block, UNet

# ----------------------------------------------------------------------------------------- networks
#
# Three callables, as tdd.py wants them, over one set of weights. Switching a LoRA on and off costs
# nothing; merging it in for a pass costs more than it saves, and in bf16 rounds it away.


def tell(unet: nn.Module, lora: LoRA | None = None, k: int | None = None):
    """The UNet as a network that takes what it, or the LoRA, embeds: eps(x_t, t, cond, n).

    k: the number of steps it is to be sampled in; told of that, it takes no more than the UNet.
    """
    embedding = getattr(unet, "told", None) if lora is None else lora.told
    if embedding is None:
        return unet

    def network(x_t: Tensor, t: Tensor, cond: dict, n: Tensor, *control) -> Tensor:
        return unet(x_t, t, {**cond, "told": embedding(n)}, *control)

    return network if k is None or embedding.of != "K" else told(network, k)


SCHEDULES = {"equidistant": equidistant, "nonequidistant": nonequidistant}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ----------------------------------------------------------------------------------------- sampling
#
# The loop itself is tdd.gamma_sample (or solvers.solve for the plain model); here SDXL is brought
# into its terms: a condition, a null condition and a network eps(x_t, t, cond).


def conditions(model: SDXL, prompts: list[str], negative: str | None, height: int, width: int):
    """The condition of each prompt and the null condition: zeros, or the negative prompt's."""
    device = model.unet.conv_in.weight.device
    cond = encode_prompts(prompts, model.tokenizer, model.encoder_1, model.encoder_2)
    # As if the picture had been that large from the start, and nothing cut off.
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=device)
    cond = {**cond, "time_ids": sizes.expand(len(prompts), 6)}
    if negative is None:
        return cond, null_of(cond)
    null = encode_prompts([negative], model.tokenizer, model.encoder_1, model.encoder_2)
    return cond, {**null, "time_ids": sizes}


def null_of(cond: dict) -> dict:
    """The null condition that goes with a condition: no prompt, and the same sizes."""
    return {k: v if k == "time_ids" else torch.zeros_like(v[:1]) for k, v in cond.items()}


def controlled(unet, controlnet, image: Tensor, scale: float):
    """The UNet with a ControlNet's residuals of an image (1, 3, H, W) in [0, 1]."""

    def model(x_t: Tensor, t: Tensor, cond: dict, *told: Tensor) -> Tensor:
        images = image.expand(len(x_t), -1, -1, -1)
        return unet(x_t, t, cond, *told, controlnet(x_t, t, cond, images, scale))

    return model


def timesteps_of(args) -> list[int]:
    """The k timesteps of the chosen schedule; ValueError if there is none."""
    return SCHEDULES[args.schedule](args.steps, args.solver_steps)


def compile_blocks(unet: UNet, **how) -> None:
    """torch.compile each block of the UNet, for any batch."""
    # Blocks, not the network: a dozen shapes instead of one huge graph, and the switches stay
    # outside. Only the batch may vary, for that of the teacher does from step to step.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 256
    for module in unet.modules():
        if isinstance(module, Block):
            module.compile(**how)
