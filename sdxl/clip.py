"""SDXL's text side: CLIP's byte-level BPE tokenizer, both text encoders, and prompts to condition.

A prompt becomes 77 token ids, and those become the text part of the UNet's condition:

    prompt_embeds (b, 77, 2048)  both encoders' second-to-last hidden states, 768 + 1280 wide
    pooled (b, 1280)             the second encoder's end token after its last layer, projected

Encoder 1 is CLIP ViT-L's, encoder 2 OpenCLIP ViT-bigG's; one vocabulary serves both.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from solvers import to_device

# -------------------------------------------------------------------------------------- tokenizer
#
# CLIP splits a prompt by Unicode's categories, which Python's re does not know. So every character
# is first replaced by a one-letter class, and the pattern runs over the classes. Only the
# apostrophe and the letters of contractions ('s, 're, ...) still stand for themselves.

START, END = "<|startoftext|>", "<|endoftext|>"
LITERAL = "'stremvld"
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[stremvldL]+|N|['O]+")


def _character_class(character: str) -> str:
    """L for a letter, N for a number, a space for white space, O for all else, or itself."""
    if character in LITERAL:
        return character
    # Not isspace(), which counts the separators U+001C to U+001F as well.
    if character in "\t\n\v\f\r\x85":
        return " "
    return {"L": "L", "N": "N", "Z": " "}.get(unicodedata.category(character)[0], "O")


def _byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes, the way GPT-2 chose them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    symbols, substitutes = [], map(chr, count(256))
    for byte in range(256):
        symbols.append(chr(byte) if byte in printable else next(substitutes))
    return symbols


class Tokenizer:
    """CLIP's byte-level BPE: lower-case words, each ending in "</w>", merged into known symbols.

    vocab: symbol -> id; merges: pairs of symbols, the earliest first. start and end are the ids of
    the two special tokens. Raises ValueError if the two are not CLIP's or not of one tokenizer.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]):
        if not all(isinstance(i, int) for i in vocab.values()) or not {START, END} <= vocab.keys():
            raise ValueError(f"not CLIP's vocabulary, which numbers symbols, {START} among them")
        for a, b in merges:
            if a + b not in vocab:
                raise ValueError(f"the merge of {a!r} and {b!r} is not in the vocabulary")
        self.vocab = vocab
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = vocab[START], vocab[END]
        self.symbols = {i: symbol for symbol, i in vocab.items()}
        self.byte_symbols = _byte_symbols()
        self.cache = {}  # word -> ids

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer":
        """Reads vocab.json and merges.txt, or tokenizer.json; ValueError if missing or broken."""
        vocab_file, merges_file = path / "vocab.json", path / "merges.txt"
        single_file = path / "tokenizer.json"
        in_two_files = vocab_file.is_file() and merges_file.is_file()
        if not in_two_files and not single_file.is_file():
            raise ValueError(f"no tokenizer in {path}: put vocab.json and merges.txt there")
        try:
            if in_two_files:
                vocab = json.loads(vocab_file.read_bytes())
                merges = merges_file.read_text(encoding="utf-8").splitlines()
            else:
                model = json.loads(single_file.read_bytes()).get("model", {})
                vocab, merges = model.get("vocab", {}), model.get("merges", [])
            return cls(vocab, _parse_merges(merges))
        except (ValueError, TypeError, AttributeError) as problem:
            files = f"{vocab_file} and {merges_file.name}" if in_two_files else single_file
            raise ValueError(f"cannot use {files}: {problem}; download them again") from problem

    def encode(self, text: str, pad: int | None = None) -> list[int]:
        """The ids of a text of any length, without start, end or padding.

        The special tokens count as such when spelled out in the text, in upper or lower case; so
        does the symbol of pad.
        """
        # In transformers the folder's tokenizer_config.json decides this, for both file formats.
        # SDXL's configs say: case does not matter, and "!" is padding anywhere for encoder 2.
        special = {START: self.start, END: self.end}
        if pad in self.symbols:
            special[self.symbols[pad]] = pad
        # One letter at a time: lower() on a whole word treats a sigma at its end differently.
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
            if part in special:
                ids.append(special[part])
            else:
                for word in WORD.finditer("".join(map(_character_class, part))):
                    ids += self._word_ids(part[word.start() : word.end()])
        return ids

    def __call__(self, texts: list[str], pad: int, length: int = 77) -> Tensor:
        """start, ids, end, then pad, and no more than length ids: n texts -> (n, length)."""
        rows = [[self.start, *self.encode(text, pad)[: length - 2], self.end] for text in texts]
        return torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows])

    def _word_ids(self, word: str) -> list[int]:
        # Captions share most of their words, and merging takes most of the time.
        if word not in self.cache:
            symbols = [self.byte_symbols[byte] for byte in word.encode()]
            symbols[-1] += "</w>"
            # A symbol outside a cut-down vocabulary becomes the end token, as in transformers.
            self.cache[word] = [self.vocab.get(s, self.end) for s in self._merge(symbols)]
        return self.cache[word]

    def _merge(self, symbols: list[str]) -> list[str]:
        """Joins the neighbours that come first among the merges, until no merge applies."""
        # Not left to right: the earliest learned merge anywhere in the word comes first.
        while pairs := self.rank.keys() & pairwise(symbols):
            best = min(pairs, key=self.rank.get)
            merged = []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            symbols = merged
        return symbols


def _parse_merges(merges: list) -> list[tuple[str, str]]:
    """Merges as pairs from lines "a b" or lists [a, b]; ValueError for anything else."""
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges if m]
    pairs = [pair for pair in pairs if not pair[0].startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("a merge does not have two symbols")
    return pairs


# ----------------------------------------------------------------------------------- text encoders
#
# One class is both, with the module names of the published checkpoints. The first encoder does not
# use its last layer and norm; they are there so that its checkpoint loads strictly.

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a text encoder; the defaults are those of SDXL's first.

    projection: the pooled output's width, None for none; end: the end token's id, None for the
    highest in a prompt.
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
    end: int | None = None

    @classmethod
    def from_json(cls, config: dict) -> "TextConfig":
        """From a transformers config.json; ValueError if it describes another family of models."""
        family, activation = config.get("model_type"), config.get("hidden_act")
        if family != "clip_text_model" or activation not in ACTIVATIONS:
            raise ValueError(f"not a CLIP text encoder: model_type {family!r}, act {activation!r}")
        # The first encoder's config has a projection_dim too, but the encoder has no projection.
        projected = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
        # Published configs say 2 by mistake, and rely on the end token having the highest id.
        end = config.get("eos_token_id", 2)
        return cls(
            hidden=config["hidden_size"], intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
            vocab=config["vocab_size"], positions=config["max_position_embeddings"],
            activation=activation, projection=config["projection_dim"] if projected else None,
            eps=config.get("layer_norm_eps", 1e-5), end=None if end == 2 else end,
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

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        embeddings = self.text_model.embeddings
        *layers, last_layer = self.text_model.encoder.layers
        h = embeddings.token_embedding(ids) + embeddings.position_embedding.weight[: ids.shape[1]]
        # The UNet sees the input of the last layer; only the pooled output goes through that layer.
        for layer in layers:
            h = layer(h)  # (b, 77, c)
        if not self.config.projection:
            return h, None
        # argmax finds the first: padding may be end tokens too.
        is_end = ids if self.config.end is None else (ids == self.config.end).int()
        rows = torch.arange(len(ids), device=ids.device)
        pooled = last_layer(h)[rows, is_end.argmax(1)]  # (b, c)
        return h, self.text_projection(self.text_model.final_layer_norm(pooled))


@torch.no_grad()
def encode_prompts(
    prompts: list[str], tokenizer: Tokenizer, encoder_1: TextEncoder, encoder_2: TextEncoder
) -> dict[str, Tensor]:
    """The UNet's condition except time_ids: prompt_embeds (b, 77, 2048) and pooled (b, 1280)."""
    device = encoder_1.text_model.final_layer_norm.weight.device
    hidden_1, _ = encoder_1(to_device(tokenizer(prompts, tokenizer.end), device))
    # SDXL was trained with id 0 ("!") as the second encoder's padding.
    hidden_2, pooled = encoder_2(to_device(tokenizer(prompts, 0), device))
    return {"prompt_embeds": torch.cat([hidden_1, hidden_2], -1), "pooled": pooled}
