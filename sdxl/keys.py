"""The original (single-file) names of SDXL's tensors, and sizes read off their shapes.

Published folders name tensors as our modules do. Community checkpoints and many LoRAs use the names
of the original code instead; the same tables of modules serve both.
"""

import re

from torch import Tensor

from sdxl.clip import TextConfig
from sdxl.vae import VAEConfig
from unet import UNetConfig

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
IGNORED = re.compile(
    r"position_ids$|logit_scale$|^denoiser\.sigmas$|^betas$|alphas_cumprod"
    r"|^(first_stage_model\.)?model_ema\.|^first_stage_model\.loss\."
    r"|^conditioner\.embedders\.0\..*text_projection"
)

# ------------------------------------------------------------------------------------------- UNet
#
# The original UNet numbers its blocks from 0 to 8 each way; diffusers counts levels, and blocks in
# each level.

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """Module names here -> names in the original code; a prefix may stand for all below it."""
    table = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    # The middle is resnet, transformer, resnet.
    _add_block(table, "mid_block", 0, "middle_block")
    for ours, theirs in RESNET.items():
        table[f"mid_block.resnets.1.{ours}"] = f"middle_block.2.{theirs}"
    # Numbers a level has: on the way down the last one is its change of size.
    step = config.layers_per_block + 1
    for i, depth in enumerate(reversed(config.transformer_depth)):
        for j in range(config.layers_per_block):
            _add_block(table, f"down_blocks.{i}", j, f"input_blocks.{i * step + j + 1}")
        table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * step}.0.op"
        for j in range(step):
            _add_block(table, f"up_blocks.{i}", j, f"output_blocks.{i * step + j}")
        # Last in its block, after the transformer if there is one.
        last = f"output_blocks.{i * step + config.layers_per_block}"
        table[f"up_blocks.{i}.upsamplers.0.conv"] = f"{last}.{2 if depth else 1}.conv"
    return table


def _add_block(table: dict[str, str], level: str, j: int, block: str) -> None:
    """A level's j-th residual block and the transformer after it."""
    for ours, theirs in RESNET.items():
        table[f"{level}.resnets.{j}.{ours}"] = f"{block}.0.{theirs}"
    table[f"{level}.attentions.{j}"] = f"{block}.1"


# -------------------------------------------------------------------------------- autoencoder, text
#
# The first text encoder needs no table: single files keep transformers' names for it.


def vae_modules(config: VAEConfig) -> dict[str, str]:
    """The same table for the autoencoder, whose up blocks the original counts from the finest."""
    table = {}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
                 "to_out.0": "proj_out"}  # fmt: skip
    levels, blocks = len(config.channels), config.layers_per_block
    for half, path, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        for i in range(levels):
            level = f"{half}.{path}_blocks.{i}"
            theirs = f"{half}.{path}.{i if path == 'down' else levels - 1 - i}"
            for j in range(count):
                table[f"{level}.resnets.{j}"] = f"{theirs}.block.{j}"
                table[f"{level}.resnets.{j}.conv_shortcut"] = f"{theirs}.block.{j}.nin_shortcut"
            table[f"{level}.{path}samplers.0"] = f"{theirs}.{path}sample"
        for j in range(2):
            table[f"{half}.mid_block.resnets.{j}"] = f"{half}.mid.block_{j + 1}"
        for ours, theirs in attention.items():
            table[f"{half}.mid_block.attentions.0.{ours}"] = f"{half}.mid.attn_1.{theirs}"
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
    return table


def text_modules(config: TextConfig) -> dict[str, str]:
    """The same table for the second text encoder, which is OpenCLIP's."""
    table = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.encoder.layers": "transformer.resblocks",
        "text_model.final_layer_norm": "ln_final", "text_projection.weight": "text_projection",
    }  # fmt: skip
    layer = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
    }  # fmt: skip
    # OpenCLIP keeps q, k and v in one tensor.
    for part in ("q_proj", "k_proj", "v_proj"):
        layer[f"self_attn.{part}.weight"] = "attn.in_proj_weight"
        layer[f"self_attn.{part}.bias"] = "attn.in_proj_bias"
    for i in range(config.layers):
        for ours, theirs in layer.items():
            table[f"text_model.encoder.layers.{i}.{ours}"] = f"transformer.resblocks.{i}.{theirs}"
    return table


def to_original_key(name: str, modules: dict[str, str]) -> str:
    """A tensor's or module's original name: that of its longest known prefix, and the rest."""
    parts = name.split(".")
    # Longest first: a resnet's conv_shortcut has its own entry beside the resnet's.
    for n in range(len(parts), 0, -1):
        prefix = ".".join(parts[:n])
        if prefix in modules:
            return ".".join([modules[prefix], *parts[n:]])
    return name


# ------------------------------------------------------------------------------------ single files
#
# A single file has no config, but every width and depth shows in some tensor's shape. The rest (32
# groups, heads 64 wide, the scaling factor) is the same in all of SDXL.


def convert_tensor(tensors: dict[str, Tensor], name: str, source: str) -> Tensor:
    """Our tensor `name` out of the original tensor `source`, whose layout may differ.

    A tensor of a wrong shape is left as it is, for `load_strict` to name it.
    """
    tensor = tensors[source]
    if ".attn.in_proj_" in source and tensor.ndim and len(tensor) % 3 == 0:
        part = ["q_proj", "k_proj", "v_proj"].index(name.split(".")[-2])
        return tensor[part * len(tensor) // 3 : (part + 1) * len(tensor) // 3]
    if source == TEXT_2 + "text_projection" and tensor.ndim == 2:
        return tensor.T.contiguous()
    # The original autoencoder's attention is made of 1x1 convolutions.
    if ".attn_1." in source and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def infer_configs(tensors: dict[str, Tensor]) -> tuple:
    """The UNet's and both text encoders' sizes; KeyError or ValueError names a tensor at fault."""
    text_1 = _text_config(tensors, TEXT_1, {}, "quick_gelu", None)
    projection = _shape(tensors, TEXT_2 + "text_projection", 2)[1]
    text_2 = _text_config(tensors, TEXT_2, text_modules(TextConfig()), "gelu", projection)
    return _unet_config(tensors, projection), text_1, text_2


def _text_config(tensors, prefix: str, table: dict, activation: str, projection) -> TextConfig:
    def shape(name: str, rank: int = 2) -> tuple[int, ...]:
        return _shape(tensors, prefix + to_original_key(f"text_model.{name}", table), rank)

    vocab, hidden = shape("embeddings.token_embedding.weight")
    layers = prefix + to_original_key("text_model.encoder.layers", table)
    return TextConfig(
        hidden=hidden, intermediate=shape("encoder.layers.0.mlp.fc1.weight")[0],
        layers=_count(tensors, layers), heads=_heads(hidden), vocab=vocab,
        positions=shape("embeddings.position_embedding.weight")[0],
        activation=activation, projection=projection,
    )  # fmt: skip


def _unet_config(tensors: dict[str, Tensor], pooled: int) -> UNetConfig:
    # Down the numbered blocks: number 0 is `conv_in`, and one with "op" in it ends a level.
    total, step = _count(tensors, UNET + "input_blocks"), 1
    while step < total and f"{UNET}input_blocks.{step}.0.op.weight" not in tensors:
        step += 1
    channels, depth = [], []
    for n in range(step - 1, total, step):
        block = f"{UNET}input_blocks.{n}"
        channels.append(_shape(tensors, f"{block}.0.in_layers.2.weight", 4)[0])
        depth.append(_count(tensors, f"{block}.1.transformer_blocks"))
    middle = UNET + "middle_block.1.transformer_blocks"
    # The embedding that is added to the time's takes the pooled prompt and six sizes as sinusoids.
    add_embedding_dim = _shape(tensors, UNET + "label_emb.0.0.weight", 2)[1]
    width, rest = divmod(add_embedding_dim - pooled, 6)
    if rest or width < 2 or width % 2:
        raise ValueError(f"label_emb takes {add_embedding_dim}, not {pooled} and six sizes")
    return UNetConfig(
        in_channels=_shape(tensors, UNET + "input_blocks.0.0.weight", 4)[1],
        out_channels=_shape(tensors, UNET + "out.2.weight", 4)[0],
        channels=tuple(channels), heads=tuple(map(_heads, channels)),
        transformer_depth=tuple(depth), mid_transformer_depth=_count(tensors, middle),
        layers_per_block=step - 1, time_ids_width=width, add_embedding_dim=add_embedding_dim,
        cross_attention_dim=_shape(tensors, f"{middle}.0.attn2.to_k.weight", 2)[1],
    )  # fmt: skip


def infer_vae_config(tensors: dict[str, Tensor]) -> VAEConfig:
    """The autoencoder's sizes; KeyError or ValueError names a tensor at fault."""
    channels = []
    for i in range(_count(tensors, VAE + "encoder.down")):
        name = f"{VAE}encoder.down.{i}.block.0.conv1.weight"
        channels.append(_shape(tensors, name, 4)[0])
    return VAEConfig(
        channels=tuple(channels),
        layers_per_block=_count(tensors, VAE + "encoder.down.0.block"),
        latent_channels=_shape(tensors, VAE + "post_quant_conv.weight", 4)[0],
    )


def _shape(tensors: dict[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    """A tensor's shape; KeyError if there is none, ValueError if it has another rank or no rows."""
    shape = tuple(tensors[name].shape)
    if len(shape) != rank or not all(shape):
        raise ValueError(f"{name} has the shape {shape}, not {rank} dimensions")
    return shape


def _heads(width: int) -> int:
    """The number of heads, which are 64 wide."""
    if width % 64:
        raise ValueError(f"a width of {width} does not make heads of 64")
    return width // 64


def _count(names, prefix: str) -> int:
    """The number of numbered modules below a prefix; ValueError for more than any model has."""
    matches = map(re.compile(re.escape(prefix) + r"\.(\d+)\.").match, names)
    if (number := len({match[1] for match in matches if match})) > 128:
        raise ValueError(f"{prefix} has {number} modules")
    return number
