"""SDXL with random weights, ours and diffusers' with the same ones: full-size, mid-size or tiny.

Speed does not depend on the weights. Ours runs in channels_last, as sample.py and train_sdxl.py run
it; diffusers runs as its users run it.
"""

import math
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import TINY
from common import files
from sdxl.clip import TextConfig, TextEncoder, Tokenizer
from sdxl.load import SDXL
from sdxl.lora import LoRA
from sdxl.vae import VAE, VAEConfig
from sdxl.weights import cast
from unet import UNet, UNetConfig


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Every weight, norm and bias off its default, and outputs still of order one."""
    for name, p in module.named_parameters():
        # By their names, diffusers' modules get the same as ours. Transformers 5 omits a prefix.
        seed = zlib.crc32(name.removeprefix("text_model.").encode())
        generator = torch.Generator(p.device).manual_seed(seed)
        noise = torch.randn(p.shape, generator=generator, device=p.device)
        if p.ndim > 1:
            p.copy_(noise / math.prod(p.shape[1:]) ** 0.5)
        else:
            p.copy_(0.1 * noise + float("norm" in name and name.endswith("weight")))
    return module.eval().requires_grad_(False)


def random_lora(base: UNet) -> LoRA:
    """A LoRA of rank 64 that changes weights by about a hundredth, on the base's device."""
    generator = torch.Generator().manual_seed(0)
    lora = LoRA.init(base, 64, 64, generator)
    for adapter in lora.adapters.values():
        nn.init.normal_(adapter.up, std=0.002, generator=generator)
    return lora.to(base.conv_in.weight.device)


def random_batch(
    config: UNetConfig, b: int, side: int, device="cpu", dtype=torch.float32
) -> tuple[Tensor, dict]:
    """Latents x_0 (b, 4, side, side) in float32 and a condition in dtype, drawn on the CPU."""
    generator = torch.Generator().manual_seed(0)
    pooled = config.add_embedding_dim - 6 * config.time_ids_width
    prompt_embeds = torch.randn(b, 77, config.cross_attention_dim, generator=generator)
    cond = {
        "prompt_embeds": prompt_embeds.to(device, dtype),
        "pooled": torch.randn(b, pooled, generator=generator).to(device, dtype),
        "time_ids": torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * b).to(device),
    }
    return torch.randn(b, 4, side, side, generator=generator).to(device), cond


# ---------------------------------------------------------------------------------------- the UNets


def random_unet(config: UNetConfig, dtype: torch.dtype, device) -> UNet:
    """Our UNet."""
    with torch.device(device):
        unet = randomise(UNet(config))
    cast(unet, dtype)
    return unet.to(memory_format=torch.channels_last)


def diffusers_unet(config: UNetConfig, dtype: torch.dtype, device):
    """Diffusers' UNet."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        return randomise(UNet2DConditionModel(**unet_json(config))).to(dtype)


def call_diffusers(unet, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
    """Diffusers' UNet, called with our condition."""
    prompt_embeds = cond["prompt_embeds"]
    text_and_sizes = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    x_t = x_t.to(prompt_embeds.dtype)
    return unet(x_t, t, prompt_embeds, added_cond_kwargs=text_and_sizes, return_dict=False)[0]


def unet_json(config: UNetConfig) -> dict:
    """A UNet's config.json, in diffusers' words."""
    attends = [depth > 0 for depth in config.transformer_depth]
    return {
        "in_channels": 4, "out_channels": 4, "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block, "norm_num_groups": config.groups,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "transformer_layers_per_block": [max(1, d) for d in config.transformer_depth],
        "attention_head_dim": config.heads, "cross_attention_dim": config.cross_attention_dim,
        "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.add_embedding_dim,
    }  # fmt: skip


# ----------------------------------------------------------------------------------- a whole model
#
# The tokenizer knows letters alone: a prompt has as many tokens as it has letters, and the encoders
# always take 77.

LETTERS = "!abcdefghijklmnopqrstuvwxyz,.0123456789"
SYMBOLS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
VOCABULARY = {symbol: i for i, symbol in enumerate(SYMBOLS)}


def other_configs(unet: UNetConfig) -> tuple[TextConfig, TextConfig, VAEConfig]:
    """The sizes of the text encoders and of the autoencoder beside a UNet."""
    vocab = len(VOCABULARY)
    if unet == TINY:
        sizes = {"hidden": 64, "intermediate": 128, "layers": 3, "heads": 1, "vocab": vocab}
        text_2 = TextConfig(**sizes, activation="gelu", projection=48)
        return TextConfig(**sizes), text_2, VAEConfig(channels=(32, 32, 64, 64))
    # Beside a mid-size UNet they are as wide as SDXL's, and hardly take time.
    layers = (12, 32) if unet == UNetConfig() else (2, 2)
    text_2 = TextConfig(1280, 5120, layers[1], 20, vocab, activation="gelu", projection=1280)
    return TextConfig(layers=layers[0], vocab=vocab), text_2, VAEConfig()


def text_json(config: TextConfig) -> dict:
    """A text encoder's config.json, in transformers' words."""
    kind = "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    return {
        "model_type": "clip_text_model", "architectures": [kind], "vocab_size": config.vocab,
        "hidden_size": config.hidden, "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "max_position_embeddings": config.positions, "hidden_act": config.activation,
        "projection_dim": config.projection or config.hidden,
        "bos_token_id": config.vocab - 2, "eos_token_id": config.vocab - 1,
    }  # fmt: skip


def vae_json(config: VAEConfig) -> dict:
    """An autoencoder's config.json, in diffusers' words; it asks for float32, as SDXL's does."""
    levels = len(config.channels)
    return {
        "block_out_channels": config.channels, "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels, "norm_num_groups": config.groups,
        "scaling_factor": config.scaling_factor, "force_upcast": True,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip


def random_sdxl(unet: UNetConfig, dtype: torch.dtype, device) -> SDXL:
    """Our model, with the autoencoder in float32, as sample.py holds it."""
    text_1, text_2, vae_config = other_configs(unet)
    with torch.device(device):
        vae = randomise(VAE(vae_config))
        encoders = [randomise(TextEncoder(config)) for config in (text_1, text_2)]
    for encoder in encoders:
        cast(encoder, dtype)
    return SDXL(random_unet(unet, dtype, device), vae, *encoders, Tokenizer(VOCABULARY, []))


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt."""
    folder.mkdir(parents=True)
    files.write_json(folder / "vocab.json", VOCABULARY)
    (folder / "merges.txt").write_text("#version: 0.2\n")


def random_pipeline(unet: UNetConfig, dtype: torch.dtype, device, tokenizer: Path):
    """Diffusers' pipeline with TCD's scheduler and the weights of `random_sdxl`.

    tokenizer: folder of `write_tokenizer`. The autoencoder is in this precision too, and the
    pipeline puts it into float32 to decode, as with the published SDXL.
    """
    import transformers
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, TCDScheduler

    *texts, vae = other_configs(unet)
    text_1, text_2 = (transformers.CLIPTextConfig(**text_json(config)) for config in texts)
    with torch.device(device):
        modules = {
            "vae": AutoencoderKL(**vae_json(vae)),
            "text_encoder": transformers.CLIPTextModel(text_1),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(text_2),
        }
    modules = {name: randomise(module).to(dtype) for name, module in modules.items()}
    for suffix, pad in {"": "<|endoftext|>", "_2": "!"}.items():
        modules[f"tokenizer{suffix}"] = transformers.CLIPTokenizer.from_pretrained(
            tokenizer, pad_token=pad, model_max_length=77
        )
    scheduler = TCDScheduler(1000, 0.00085, 0.012, "scaled_linear", original_inference_steps=250)
    # It ends at timestep 0, which still has noise: without this latents would differ by 0.001.
    scheduler.alphas_cumprod[0] = 1.0
    pipeline = StableDiffusionXLPipeline(
        unet=diffusers_unet(unet, dtype, device), scheduler=scheduler, **modules
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
