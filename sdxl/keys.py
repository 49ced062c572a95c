"""The original (single-file) names of SDXL's tensors, and sizes read off their shapes.

Published folders name tensors as our modules do. Community checkpoints and many LoRAs use the names
of the original code instead; one table of modules serves both.
"""

import re
from collections.abc import Iterator
from itertools import product

from torch import Tensor

from sdxl.clip import TextConfig
from sdxl.vae import VAEConfig
from unet import UNetConfig

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
IGNORED = re.compile(
    r"position_ids$|logit_scale$|^denoiser\.sigmas$|^model_ema\.|^betas$|alphas_cumprod"
    r"|^conditioner\.embedders\.0\..*text_projection"
)

# ------------------------------------------------------------------------------------------- UNet
#
# The original UNet numbers its blocks through, 0 to 8 each way, where diffusers counts levels and
# blocks in them.

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def unet_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Pairs of a module's name here and in the original code; a prefix may stand for a module."""
    yield from {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
    }.items()  # fmt: skip
    # The middle is resnet, transformer, resnet.
    yield from _block("mid_block", 0, "middle_block")
    yield from ((f"mid_block.resnets.1.{a}", f"middle_block.2.{b}") for a, b in RESNET.items())
    step = config.blocks + 1  # numbers a level: downwards the last is its change of size
    for i, depth in enumerate(reversed(config.depths)):
        for j in range(config.blocks):
            yield from _block(f"down_blocks.{i}", j, f"input_blocks.{i * step + j + 1}")
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(i + 1) * step}.0.op"
        for j in range(step):
            yield from _block(f"up_blocks.{i}", j, f"output_blocks.{i * step + j}")
        # Last in its block, after the transformer if there is one.
        size = f"output_blocks.{i * step + config.blocks}.{2 if depth else 1}"
        yield f"up_blocks.{i}.upsamplers.0.conv", f"{size}.conv"


def _block(level: str, j: int, theirs: str) -> Iterator[tuple[str, str]]:
    for a, b in RESNET.items():
        yield f"{level}.resnets.{j}.{a}", f"{theirs}.0.{b}"
    yield f"{level}.attentions.{j}", f"{theirs}.1"


# -------------------------------------------------------------------------------- autoencoder, text
#
# The first text encoder needs no table: single files keep transformers' names for it.


def vae_modules(config: VAEConfig) -> Iterator[tuple[str, str]]:
    """The same pairs for the autoencoder, whose up blocks the original counts from the finest."""
    last, n = len(config.channels) - 1, config.blocks
    parts = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for half, path, blocks in (("encoder", "down", n), ("decoder", "up", n + 1)):
        for i in range(last + 1):
            ours = f"{half}.{path}_blocks.{i}"
            theirs = f"{half}.{path}.{i if path == 'down' else last - i}"
            for j in range(blocks):
                yield f"{ours}.resnets.{j}", f"{theirs}.block.{j}"
                yield f"{ours}.resnets.{j}.conv_shortcut", f"{theirs}.block.{j}.nin_shortcut"
            yield f"{ours}.{path}samplers.0", f"{theirs}.{path}sample"
        yield f"{half}.mid_block.resnets.0", f"{half}.mid.block_1"
        yield f"{half}.mid_block.resnets.1", f"{half}.mid.block_2"
        for a, b in parts.items():
            yield f"{half}.mid_block.attentions.0.{a}", f"{half}.mid.attn_1.{b}"
        yield f"{half}.conv_norm_out", f"{half}.norm_out"


def text_modules(config: TextConfig) -> Iterator[tuple[str, str]]:
    """The same pairs for the second text encoder, which is OpenCLIP's."""
    yield from {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.encoder.layers": "transformer.resblocks",
        "text_model.final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
    }.items()
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    # OpenCLIP keeps q, k and v in one tensor.
    for part, kind in product("qkv", ("weight", "bias")):
        parts[f"self_attn.{part}_proj.{kind}"] = f"attn.in_proj_{kind}"
    for i, (a, b) in product(range(config.layers), parts.items()):
        yield f"text_model.encoder.layers.{i}.{a}", f"transformer.resblocks.{i}.{b}"


def original(name: str, modules: dict[str, str]) -> str:
    """A tensor's or module's original name: that of its longest known prefix, and the rest."""
    parts = name.split(".")
    # Longest first: a resnet's conv_shortcut has a name of its own beside the resnet's.
    for n in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:n])) in modules:
            return ".".join([modules[prefix], *parts[n:]])
    return name


# ------------------------------------------------------------------------------------ single files
#
# A single file has no config, but every width and depth shows in some tensor's shape. What does not
# (32 groups, heads 64 wide, the scaling factor) is the same in all of SDXL.


def take(tensors: dict[str, Tensor], name: str, source: str) -> Tensor:
    """Our tensor `name` out of the original tensor `source`, whose layout may differ."""
    tensor = tensors[source]
    if ".attn.in_proj_" in source:
        return tensor.chunk(3)[["q_proj", "k_proj", "v_proj"].index(name.split(".")[-2])]
    if source == TEXT_2 + "text_projection":
        return tensor.T.contiguous()
    # The original autoencoder's attention is made of 1x1 convolutions.
    return tensor[:, :, 0, 0] if ".attn_1." in source and tensor.ndim == 4 else tensor


def configs(tensors: dict[str, Tensor]) -> tuple[UNetConfig, VAEConfig, TextConfig, TextConfig]:
    """The sizes of a single file's four networks; KeyError names the tensor that is not there."""
    text_1 = _text(tensors, TEXT_1, {}, "quick_gelu", None)
    projection = tensors[TEXT_2 + "text_projection"].shape[1]
    text_2 = _text(tensors, TEXT_2, dict(text_modules(TextConfig())), "gelu", projection)
    return _unet(tensors, projection), _vae(tensors), text_1, text_2


def _text(tensors, prefix: str, table: dict[str, str], activation: str, projection) -> TextConfig:
    parts = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
             "encoder.layers.0.mlp.fc1.weight", "encoder.layers")  # fmt: skip
    tokens, places, fc1, layers = (prefix + original(f"text_model.{p}", table) for p in parts)
    vocab, hidden = tensors[tokens].shape
    return TextConfig(
        hidden, len(tensors[fc1]), _count(tensors, layers), hidden // 64, vocab,
        len(tensors[places]), activation, projection, end=vocab - 1,
    )  # fmt: skip


def _unet(tensors: dict[str, Tensor], pooled: int) -> UNetConfig:
    shape = {k[len(UNET) :]: tuple(v.shape) for k, v in tensors.items() if k.startswith(UNET)}
    in_channels = shape["input_blocks.0.0.weight"][1]
    # Down the numbered blocks: number 0 is `conv_in`, and one with "op" in it ends a level.
    total = _count(shape, "input_blocks")
    step = next((n for n in range(1, total) if f"input_blocks.{n}.0.op.weight" in shape), total)
    ends = [f"input_blocks.{n}" for n in range(step - 1, total, step)]
    channels = tuple(shape[f"{end}.0.in_layers.2.weight"][0] for end in ends)
    # What is added to the time embedding is the pooled prompt and six sizes as sinusoids.
    added, middle = shape["label_emb.0.0.weight"][1], "middle_block.1.transformer_blocks"
    return UNetConfig(
        in_channels, shape["out.2.weight"][0], channels,
        tuple(_count(shape, f"{end}.1.transformer_blocks") for end in ends),
        tuple(c // 64 for c in channels), _count(shape, middle), step - 1,
        tokens=shape[f"{middle}.0.attn2.to_k.weight"][1],
        time_ids_width=(added - pooled) // 6, added=added,
    )  # fmt: skip


def _vae(tensors: dict[str, Tensor]) -> VAEConfig:
    shape = {k[len(VAE) :]: v.shape for k, v in tensors.items() if k.startswith(VAE)}
    levels, blocks = _count(shape, "encoder.down"), _count(shape, "encoder.down.0.block")
    channels = [shape[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return VAEConfig(tuple(channels), blocks, latent_channels=shape["post_quant_conv.weight"][0])


def _count(names, prefix: str) -> int:
    """How many numbered modules there are below a prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({found[1] for name in names if (found := pattern.match(name))})
