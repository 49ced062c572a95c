"""clip.py against transformers and diffusers: ids, hidden states, pooled outputs, bad input."""

# Letters that look alike are what the tokenizer has to tell apart.
# ruff: noqa: RUF001
import json
import random
import unicodedata

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl.clip import END, START, TextConfig, TextEncoder, Tokenizer, encode_prompts

SAMPLE = """
a photo of an astronaut riding a horse on mars, highly detailed, 8k!! it's the cat's hat, we're
they've i'll he'd don't i'm ... the ''quoted'' "words" -- (masterpiece:1.2), [red|blue] hair, 1990s
ein großes haus über der straße, çà et là, señor, łódź, ångström naïve café déjà vu coöperate
красивая картина маслом, ελληνικά γράμματα, תמונה יפה, صورة جميلة, सुंदर चित्र, ภาพสวย, 아름다운 그림
美しい絵画 美しい山 水彩画 水墨画 🎨🎨 👩‍🚀 👩‍🚀 🏳️‍🌈 ❤️ ½ ¾ ² ³ ٣٤ Ⅳ
"""


def added(content: str, normalized: bool) -> dict:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, "normalized": normalized, **flags}


@pytest.fixture(scope="session")
def files():
    """A small CLIP-like vocabulary, its merges learned by the tokenizers library."""
    trained = Backend(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        [SAMPLE] * 3,
        trainers.BpeTrainer(
            vocab_size=900,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = json.loads(trained.to_str())["model"]["merges"]
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    assert len(merges) > 200 and len(set(symbols)) == len(symbols) and symbols[0] == "!"
    return {symbol: i for i, symbol in enumerate([*symbols, START, END])}, merges


@pytest.fixture(scope="session")
def folders(files, tmp_path_factory):
    """tokenizer/ and tokenizer_2/ with the four files that SDXL's are published with."""
    vocab, merges = files
    special = {str(vocab[s]): added(s, True) for s in (START, END)}
    paths = []
    for name, pad, extra in (
        ("tokenizer", END, {}),
        ("tokenizer_2", "!", {"0": added("!", False)}),
    ):
        path = tmp_path_factory.mktemp(name)
        (path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
        (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        config = {"added_tokens_decoder": special | extra, "model_max_length": 77, **names}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def tokenizer(folders):
    return Tokenizer.from_folder(folders[0])


@pytest.fixture(scope="session")
def references(folders):
    return [CLIPTokenizer.from_pretrained(str(path)) for path in folders]


# -------------------------------------------------------------------------------------- tokenizer

WORDS = SAMPLE.split()
LETTERS = "aZéßÇåÅİıſǅŁΣςσΩΆжЖЁіאבمлहिंकाกำ한글ㄱ漢字々ʰªºᵃ𝔸𝒜𐐀ⅷªﬁﬀ"
MARKS = "".join(map(chr, (0x301, 0x308, 0x327, 0x338, 0x345, 0x5B0, 0x64B, 0x94D, 0x20D7)))
EMOJI = ["👩‍🚀", "🏳️‍🌈", "👨‍👩‍👧", "❤️", "🎨", "1️⃣", "👍🏽", "🇩🇪", "‍"]
NUMBERS = "0123456789٣४໗½¾²³①Ⅳⅻ〇零十㉑𝟘"
PUNCTUATION = "!!!!\"#$%&'''()*+,-./:;<=>?@[\\]^_`{|}~«»…—–、。！？¿€№™©"
SPACES = [chr(c) for c in (*range(9, 14), 0x1C, 0x1F, 32, 0x85, 0xA0, 0x1680, 0x2003)]
SPACES += [chr(c) for c in (0x2028, 0x2029, 0x202F, 0x205F, 0x3000, 0x180E, 0x200B, 0xFEFF)]
CONTROLS = [chr(c) for c in (0, 1, 7, 8, 0x1B, 0x1D, 0x7F, 0x80, 0xAD, 0x200E, 0xFFFD, 0xE000)]
CONTRACTIONS = ["'s", "'S", "'t", "'T", "'re", "'Re", "'rE", "'VE", "'m", "'Ll", "'d", "'x", "’s"]
SPECIALS = [START, END, END.upper(), "<|StartOfText|>", "<|endoftext|", "|endoftext|>", END * 2]
KINDS = [
    *(WORDS, LETTERS, MARKS, EMOJI, NUMBERS, PUNCTUATION),
    *(SPACES, CONTROLS, CONTRACTIONS, SPECIALS),
]


def random_strings(count: int, seed: int) -> list[str]:
    """Strings of one to 120 pieces, of all kinds or of two, with or without space between."""
    draw, strings = random.Random(seed), ["", " ", "\t\n", END, "word " * 200, "x" * 300, "!" * 99]
    while len(strings) < count:
        kinds = KINDS if draw.random() < 0.5 else draw.sample(KINDS, 2)
        between = draw.choice(["", " ", draw.choice(SPACES)])
        size = draw.choice([1, 2, 5, 10, 20, 120])
        pieces = [draw.choice(draw.choice(kinds)) for _ in range(size)]
        pieces = [p.upper() if draw.random() < 0.1 else p for p in pieces]
        strings.append(between.join(pieces))
    return strings


STRINGS = random_strings(4000, seed=0)


def test_ids_are_those_of_transformers(tokenizer, references):
    expected = references[0](STRINGS, add_special_tokens=False).input_ids
    for text, ids in zip(STRINGS, expected, strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


def test_every_character_of_this_pythons_unicode(tokenizer, references):
    """Categories, white space, case and composition, character by character.

    Ideographs, syllables and private use are left to a sample: there are too many of a kind.
    """
    text = []
    for c in map(chr, range(0x110000)):
        category, name = unicodedata.category(c), unicodedata.name(c, "")
        many = category == "Co" or name.startswith(("CJK", "HANGUL SYLL", "TANGUT", "EGYPTIAN"))
        if category not in ("Cn", "Cs") and not (many and ord(c) % 97):
            text.append(f"a{c}b {c}{c}1{c}.")
    assert len(text) > 40_000
    texts = ["\n".join(text[i : i + 10]) for i in range(0, len(text), 10)]
    expected = references[0](texts, add_special_tokens=False).input_ids
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids, ascii(text)


def test_padding_and_truncation(tokenizer, references):
    """The second tokenizer takes every "!" of a prompt for its padding symbol."""
    for reference, pad in zip(references, (tokenizer.end, 0), strict=True):
        settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        expected = reference(STRINGS, max_length=77, **settings).input_ids
        assert reference.pad_token_id == pad and torch.equal(tokenizer(STRINGS, pad), expected)
        expected = reference(STRINGS, max_length=16, **settings).input_ids
        assert torch.equal(tokenizer(STRINGS, pad, 16), expected)
    assert (expected[:, -1] == tokenizer.end).sum() > 1000
    assert (tokenizer.start, tokenizer.end) == (reference.bos_token_id, reference.eos_token_id)


@pytest.mark.parametrize("joined", [True, False])
def test_tokenizer_json(joined, references, tokenizer, tmp_path):
    references[0].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
    content["model"]["merges"] = [" ".join(m) for m in merges] if joined else merges
    path.write_text(json.dumps(content), encoding="utf-8")
    assert not (tmp_path / "vocab.json").exists()
    loaded = Tokenizer.from_folder(tmp_path)
    texts = STRINGS[:500]
    expected = CLIPTokenizer.from_pretrained(str(tmp_path))(texts, add_special_tokens=False)
    assert [loaded.encode(text) for text in texts] == expected.input_ids
    assert (loaded.vocab, loaded.rank) == (tokenizer.vocab, tokenizer.rank)


def test_vocabulary_without_some_bytes(files, tmp_path):
    vocab, merges = files
    # As in the cut-down vocabularies that libraries test with; no merge may need what is missing.
    smaller = {s: i for s, i in vocab.items() if s not in ("z", "z</w>", "q</w>")}
    merges = [m for m in merges if not {"z", "z</w>", "q</w>"} & {*m}]
    merges = [m for m in merges if "z" not in "".join(m)]
    reference = CLIPTokenizer(vocab=smaller, merges=[tuple(m) for m in merges])
    text = "a puzzle zq for z and q, jazz z"
    ids = Tokenizer(smaller, [tuple(m) for m in merges]).encode(text)
    assert ids == reference(text, add_special_tokens=False).input_ids and smaller[END] in ids


def test_unusable_tokenizers(files, tmp_path):
    vocab, merges = files

    def refused(match: str, **contents: str):
        for file in tmp_path.iterdir():
            file.unlink()
        for name, content in contents.items():
            (tmp_path / name.replace("_", ".")).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=match) as error:
            Tokenizer.from_folder(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

    good, lines = json.dumps(vocab), "\n".join(" ".join(m) for m in merges)
    plain = json.dumps({s: i for s, i in vocab.items() if s != END})
    refused("no tokenizer in .*put vocab.json and merges.txt")
    refused("no tokenizer in", vocab_json=good)
    refused("no tokenizer in", merges_txt=lines)
    refused("cannot use .*vocab.json.*download", vocab_json=good[:-9], merges_txt=lines)
    refused("cannot use .*vocab.json.*not CLIP", vocab_json=plain, merges_txt=lines)
    refused("cannot use .*vocab.json", vocab_json="[1, 2]", merges_txt=lines)
    refused("not CLIP", vocab_json=good.replace(": 7,", ': "7",'), merges_txt=lines)
    refused("not have two symbols", vocab_json=good, merges_txt=lines + "\nt h e")
    refused("'q' and 'x' is not in", vocab_json=good, merges_txt=lines + "\nq x")
    refused("cannot use .*tokenizer.json", tokenizer_json="{")
    refused("cannot use .*tokenizer.json.*not CLIP", tokenizer_json="{}")
    refused("cannot use .*tokenizer.json", tokenizer_json="[]")
    for merges in (None, [5], [{"a": "b"}], [[5, 5]]):
        broken = json.dumps({"model": {"vocab": vocab, "merges": merges}})
        refused("cannot use .*tokenizer.json", tokenizer_json=broken)
    with pytest.raises(ValueError, match="no tokenizer in"):
        Tokenizer.from_folder(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------- text encoders


def sizes(**changes) -> dict:
    config = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "vocab_size": 1200,
    }
    config |= {"num_attention_heads": 4, "projection_dim": 40, "hidden_act": "quick_gelu"}
    config |= {"layer_norm_eps": 1e-3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return config | changes


def pair(kind, seed: int = 0, **changes):
    """A transformers model with nothing left at its default, and ours with the same weights."""
    theirs = kind(CLIPTextConfig(**sizes(**changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    ours = TextEncoder(TextConfig.from_json(config_of(theirs)))
    ours.load_state_dict(published_names(theirs))
    return theirs, ours


def config_of(model) -> dict:
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return json.loads(json.dumps(config))


def published_names(model) -> dict:
    """The state dict, with the prefix that newer versions of transformers drop put back."""
    bare = isinstance(model, CLIPTextModel) and "embeddings.token_embedding.weight" in dict(
        model.named_parameters()
    )
    return {"text_model." * bare + name: p for name, p in model.state_dict().items()}


def prompts_of_ids(end: int) -> torch.Tensor:
    """Random ids with the end token early, late, at the very end, and padded with itself or 0."""
    ids = torch.randint(3, 1150, (5, 77), generator=torch.Generator().manual_seed(1))
    ids[ids == end] = 3
    for row, (place, pad) in enumerate([(1, 0), (20, end), (60, 0), (75, end), (76, 0)]):
        ids[row, place] = end
        ids[row, place + 1 :] = pad
    return ids


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# A config's 2 is a known mistake and stands for a prompt's highest id; 700 is not the highest.
@pytest.mark.parametrize("eos, end", [(2, 1199), (1199, 1199), (700, 700)])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_encoder_with_projection(activation, eos, end):
    changes = {"hidden_act": activation, "eos_token_id": eos}
    theirs, ours = pair(CLIPTextModelWithProjection, **changes)
    expected = theirs(prompts_of_ids(end), output_hidden_states=True)
    hidden, pooled = ours(prompts_of_ids(end))
    assert error(hidden, expected.hidden_states[-2]) <= 1e-5
    assert error(pooled, expected.text_embeds) <= 1e-5


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_encoder_without_projection(activation):
    theirs, ours = pair(CLIPTextModel, hidden_act=activation, num_hidden_layers=4)
    ids = prompts_of_ids(1199)
    expected = theirs(ids, output_hidden_states=True).hidden_states[-2]
    hidden, pooled = ours(ids)
    assert error(hidden, expected) <= 1e-5 and pooled is None
    # Fewer than 77 tokens are a prefix, in a causal model; and nobody waits for the last layer.
    assert error(ours(ids[:, :30])[0], expected[:, :30]) <= 1e-5
    ours.text_model.encoder.layers[-1].forward = None
    assert torch.equal(ours(ids)[0], hidden)


def test_activations_differ():
    """So that the tests above can tell which of the two was taken."""
    with torch.no_grad():
        hidden = [
            pair(CLIPTextModel, hidden_act=a)[1](prompts_of_ids(9))[0]
            for a in ("gelu", "quick_gelu")
        ]
    assert error(*hidden) > 1e-4


SDXL_1 = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
SDXL_2 = SDXL_1 | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}


@pytest.mark.parametrize(
    "config, kind", [(SDXL_1, CLIPTextModel), (SDXL_2, CLIPTextModelWithProjection)]
)
def test_full_size_names_and_shapes(config, kind):
    with torch.device("meta"):
        ours = TextEncoder(TextConfig.from_json(config)).state_dict()
        theirs = published_names(kind(CLIPTextConfig(**config)))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert "text_model.encoder.layers.11.self_attn.out_proj.bias" in ours
    assert ("text_projection.weight" in ours) == (config is SDXL_2)


def test_full_size_configs():
    assert TextConfig.from_json(SDXL_1) == TextConfig()
    second = TextConfig(1280, 5120, 32, 20, activation="gelu", projection=1280)
    assert TextConfig.from_json(SDXL_2) == second


@pytest.mark.parametrize(
    "change, match",
    [
        ({"model_type": "t5"}, "model_type 't5'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "relu"}, "act 'relu'"),
    ],
)
def test_configs_of_other_models(change, match):
    with pytest.raises(ValueError, match=match):
        TextConfig.from_json(SDXL_2 | change)
    with pytest.raises(ValueError, match="not a CLIP text encoder"):
        TextConfig.from_json({"_class_name": "UNet2DConditionModel", "act_fn": "silu"})


# ----------------------------------------------------------------------------- prompts to condition


def test_encode_prompts_is_that_of_diffusers(tokenizer, references):
    theirs_1, ours_1 = pair(CLIPTextModel, seed=1)
    changes = {"hidden_size": 64, "hidden_act": "gelu"}
    theirs_2, ours_2 = pair(CLIPTextModelWithProjection, seed=2, **changes)
    pipe = StableDiffusionXLPipeline(None, theirs_1, theirs_2, *references, None, None)
    prompts = ["", "a photo of a cat", "wow!! it's RED, 8k"]
    prompts += ["x " * 100, "a <|ENDOFTEXT|> b", "猫 🎨"]
    with torch.no_grad():
        expected, _, expected_pooled, _ = pipe.encode_prompt(
            prompts, device="cpu", do_classifier_free_guidance=False
        )
    cond = encode_prompts(prompts, tokenizer, ours_1, ours_2)
    assert cond.keys() == {"prompt_embeds", "pooled"}
    assert cond["prompt_embeds"].shape == (6, 77, 48 + 64)
    assert error(cond["prompt_embeds"], expected) <= 1e-5
    assert error(cond["pooled"], expected_pooled) <= 1e-5
    assert not cond["prompt_embeds"].requires_grad and not cond["pooled"].requires_grad


def test_encode_prompts_on_the_encoders_device(tokenizer):
    with torch.device("meta"):
        encoders = [TextEncoder(TextConfig.from_json(config)) for config in (SDXL_1, SDXL_2)]
    devices = []
    for encoder in encoders:
        encoder.register_forward_pre_hook(lambda _, ids: devices.append(ids[0].device.type))
    cond = encode_prompts(["a cat", "a dog"], tokenizer, *encoders)
    assert devices == ["meta", "meta"] and cond["prompt_embeds"].is_meta and cond["pooled"].is_meta
    assert (cond["prompt_embeds"].shape, cond["pooled"].shape) == ((2, 77, 2048), (2, 1280))
