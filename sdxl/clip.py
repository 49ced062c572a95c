"""SDXL's text side: both text encoders, and prompts to condition.

A prompt becomes 77 token ids, and those become the text part of the UNet's condition:

    prompt_embeds (b, 77, 2048)  both encoders' second-to-last hidden states, 768 + 1280 wide
    pooled (b, 1280)             the second encoder's end token after its last layer, projected

Encoder 1 is CLIP ViT-L's, encoder 2 OpenCLIP ViT-bigG's; one vocabulary serves both.
"""

import reprlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdxl.tokenizer import Tokenizer
from sdxl.vae import real_number
from solvers import to_device
from unet import check_config, entry

# ----------------------------------------------------------------------------------- text encoders
#
# One class is both, with the module names of the published checkpoints. The first encoder does not
# use its last layer and norm; they are there so that its checkpoint loads strictly.

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a text encoder; the defaults are those of SDXL's first.

    projection: the pooled output's width, None for none.
    """

    hidden: int = 768
    intermediate: int = 3072
    layers: int = 12
    heads: int = 12
    vocab: int = 49408
    positions: int = 77
    activation: str = "quick_gelu"
    projection: int | None = None
    eps: float = 1e-5

    def __post_init__(self):
        if min(self.hidden, self.heads) < 1 or self.hidden % self.heads:
            raise ValueError(f"a text encoder {self.hidden} wide does not make {self.heads} heads")
        # Another length, as Long-CLIP's, would need another padding.
        if self.positions != 77:
            raise ValueError(f"a text encoder for {self.positions} tokens, not for SDXL's 77")

    @classmethod
    def from_json(cls, config: dict) -> "TextConfig":
        """From a transformers config.json; ValueError if it is broken or of another family.

        Its eos_token_id is not read: the end token is the tokenizer's, at its first place in a
        prompt. transformers takes the highest id of a prompt where a config says 2, as published
        ones do, and that is another token in a prompt with tokens that were added behind it.
        """
        required = {"model_type": "clip_text_model"}
        check_config(config, "a CLIP text encoder", required, {"max_position_embeddings": 77})
        kinds = config.get("architectures") or []
        if not isinstance(kinds, list):
            raise ValueError(f"architectures is {reprlib.repr(kinds)}, not a list")
        # The first encoder's config has a projection_dim too, but the encoder has no projection.
        projected = "CLIPTextModelWithProjection" in kinds
        return cls(
            hidden=entry(config, "hidden_size"), intermediate=entry(config, "intermediate_size"),
            layers=entry(config, "num_hidden_layers", range(1, 129)),
            heads=entry(config, "num_attention_heads"),
            vocab=entry(config, "vocab_size", range(1, 2**20)),
            activation=entry(config, "hidden_act", tuple(ACTIVATIONS)),
            projection=entry(config, "projection_dim") if projected else None,
            eps=real_number({"layer_norm_eps": 1e-5, **config}, "layer_norm_eps", 1e-12, 0.1),
        )  # fmt: skip


class SelfAttention(nn.Module):
    """Multi-head attention of every token of x (b, n, c) to itself and those before it."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c, c) for _ in range(3))
        self.out_proj = nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=self.heads) for a in (q, k, v))
        # No mask over the padding: in training the encoder, and the UNet too, attended to it.
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (b, h, n, d)
        return self.out_proj(rearrange(h, "b h n d -> b n (h d)"))


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each added to x (b, n, c)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        c, width = config.hidden, config.intermediate
        self.activation = ACTIVATIONS[config.activation]
        self.self_attn = SelfAttention(c, config.heads)
        self.layer_norm1 = nn.LayerNorm(c, config.eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c, width), "fc2": nn.Linear(width, c)})
        self.layer_norm2 = nn.LayerNorm(c, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class TextEncoder(nn.Module):
    """Either text encoder: ids (b, 77) -> hidden states (b, 77, c) and pooled (b, p) or None."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        # Bare modules give the published names: text_model.encoder.layers.0 ..
        model = self.text_model = nn.Module()
        model.embeddings, model.encoder = nn.Module(), nn.Module()
        model.embeddings.token_embedding = nn.Embedding(config.vocab, config.hidden)
        model.embeddings.position_embedding = nn.Embedding(config.positions, config.hidden)
        model.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        model.final_layer_norm = nn.LayerNorm(config.hidden, config.eps)
        if config.projection:
            self.text_projection = nn.Linear(config.hidden, config.projection, bias=False)

    def forward(self, ids: Tensor, end: int) -> tuple[Tensor, Tensor | None]:
        """end: the id of the token that pooled is taken from, at its first place."""
        embeddings = self.text_model.embeddings
        *layers, last_layer = self.text_model.encoder.layers
        h = embeddings.token_embedding(ids) + embeddings.position_embedding.weight[: ids.shape[1]]
        # The UNet sees the input of the last layer; only the pooled output goes through that layer.
        for layer in layers:
            h = layer(h)  # (b, 77, c)
        if not self.config.projection:
            return h, None
        # argmax finds the first: padding may be end tokens too.
        place = (ids == end).int().argmax(1)
        pooled = last_layer(h)[torch.arange(len(ids), device=ids.device), place]  # (b, c)
        return h, self.text_projection(self.text_model.final_layer_norm(pooled))


# ---------------------------------------------------------------------------- prompts to condition


@torch.no_grad()
def encode_prompts(
    prompts: list[str], tokenizer: Tokenizer, encoder_1: TextEncoder, encoder_2: TextEncoder
) -> dict[str, Tensor]:
    """The UNet's condition except time_ids: prompt_embeds (b, 77, 2048) and pooled (b, 1280)."""
    device, end = encoder_1.text_model.final_layer_norm.weight.device, tokenizer.end
    hidden_1, _ = encoder_1(to_device(tokenizer(prompts, end), device), end)
    # SDXL was trained with id 0 ("!") as the second encoder's padding.
    hidden_2, pooled = encoder_2(to_device(tokenizer(prompts, 0), device), end)
    return {"prompt_embeds": torch.cat([hidden_1, hidden_2], -1), "pooled": pooled}


def check_vocabulary(tokenizer: Tokenizer, *encoders: TextEncoder) -> None:
    """ValueError if the tokenizer has an id that a text encoder has no embedding for."""
    i = max(tokenizer.symbols)
    rows = min(encoder.config.vocab for encoder in encoders)
    if i >= rows:
        symbol = reprlib.repr(tokenizer.symbols[i])
        raise ValueError(f"the tokenizer's {symbol} is number {i}, but a text encoder has {rows} "
                         "embeddings: they are not of one model")  # fmt: skip


def check_same_tokens(tokenizer: Tokenizer, second: Tokenizer) -> None:
    """ValueError unless the second tokenizer of a folder splits texts as the first does."""
    for ours, theirs in ((tokenizer.vocab, second.vocab), (tokenizer.rank, second.rank)):
        for symbol in ours.keys() | theirs.keys():
            if ours.get(symbol) != theirs.get(symbol):
                raise ValueError(f"tokenizer and tokenizer_2 differ in {symbol!r}")
