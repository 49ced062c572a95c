"""clip.py against transformers and diffusers: ids, hidden states, pooled outputs, bad input."""

# Letters that look alike are what the tokenizer has to tell apart.
# ruff: noqa: RUF001
import json
import random
import time
import unicodedata

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl import keys
from sdxl.added_tokens import END, START
from sdxl.clip import TextConfig, TextEncoder, check_same_tokens, check_vocabulary, encode_prompts
from sdxl.load import load_sdxl
from sdxl.tokenizer import Tokenizer

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
            stem, _, suffix = name.rpartition("_")
            (tmp_path / f"{stem}.{suffix}").write_text(content, encoding="utf-8")
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
    for i in ("-1", '"7"', "7.0", "true", "null", "[7]", "1000000000000", "8"):
        changed = good.replace(": 7,", f": {i},")
        refused("not CLIP's vocabulary: .* number", vocab_json=changed, merges_txt=lines)
    refused("does not have two symbols", vocab_json=good, merges_txt=lines + "\nt h e")
    refused("'q' and 'x' is not in", vocab_json=good, merges_txt=lines + "\nq x")
    # Cut short, it would split words otherwise than in training.
    half = lines[: len(lines) // 2].rpartition("\n")[0]
    refused(r"symbols, such as .* are made by no merge", vocab_json=good, merges_txt=half)
    refused("are made by no merge", vocab_json=good, merges_txt="")
    refused("cannot use .*tokenizer.json", tokenizer_json="{")
    refused("cannot use .*tokenizer.json: added_tokens is None, no list", tokenizer_json="{}")
    refused("cannot use .*tokenizer.json", tokenizer_json="[]")
    for model in (None, 7, {"vocab": [], "merges": []}):
        refused("cannot use .*tokenizer.json", tokenizer_json=json.dumps({"model": model}))
    for wrong in (None, [5], [{"a": "b"}], [[5, 5]], "a b", [None], [["a", "b", "c"]]):
        broken = json.dumps({"model": {"vocab": vocab, "merges": wrong}})
        refused("cannot use .*tokenizer.json", tokenizer_json=broken)
    with pytest.raises(ValueError, match="no tokenizer in"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    for name, content in (
        ("added_tokens_json", '{"<sks>": 7}'), ("added_tokens_json", '{"<sks>": -1}'),
        ("added_tokens_json", '{"<sks>": 1e9}'), ("added_tokens_json", "[]"),
        ("special_tokens_map_json", '{"bos_token": 7}'),
        ("special_tokens_map_json", '{"eos_token": "<s>"}'),
        ("tokenizer_config_json", '{"added_tokens_decoder": []}'),
        ("tokenizer_config_json", '{"added_tokens_decoder": {"x": {"content": "<a>"}}}'),
        ("tokenizer_config_json", '{"added_tokens_decoder": {"9999": {"content": 7}}}'),
        ("tokenizer_config_json", '{"added_tokens_decoder": {"9": {"content": "!"}}}'),
        ("tokenizer_config_json", '{"bos_token": {"content": "<|startoftext|>", "lstrip": 1}}'),
        ("tokenizer_config_json", '{"bos_token": {"content": "<|startoftext|>", "lstrip": true}}'),
    ):  # fmt: skip
        refused("cannot use", vocab_json=good, merges_txt=lines, **{name: content})


# -------------------------------------------------------------------------------- added tokens

ADDED = ["<sks>", "sks", "cat", "<Cat>", "My Tok", "é", "<a b>", "!!", "'s", "ing", "ΑΣ"]
ADDED += ["\u0338x"]
ADDED += ["  y", "z ", "ca", "cats", "A\u030a", "<|x|>", "1", "名", "ǅ"]
PIECES = [*ADDED, *(t.upper() for t in ADDED), *(t.lower() for t in ADDED), "concat", "<A  b>"]
PIECES += [
    "my\n tok",
    "e\u0301",
    "<",
    "=",
    " ",
    "\t",
    "y",
    "z",
    "_",
    "ⓐ",
    "\u200d",
    END,
    START,
    ".",
]


def added_folder(draw, folder, source, vocab):
    """A tokenizer's folder with random tokens, added in one of the ways that were ever saved."""

    def settings(content):
        normalized, special = draw.random() < 0.4, draw.random() < 0.5
        return {"content": content, "normalized": normalized, "special": special}

    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    contents, ids = draw.sample(ADDED, draw.randint(1, 6)), {}
    for content in contents:
        ids[content] = vocab.get(content, len(vocab) + len(ids.keys() - vocab.keys()))
    names = {"bos_token": START, "eos_token": END, "unk_token": END}
    config = names | {"pad_token": draw.choice([END, "!"])}
    if draw.random() < 0.5:
        # As published: {"__type": "AddedToken", "content": ..}
        for name, content in names.items():
            config[name] = {"__type": "AddedToken", **added(content, normalized=True)}
    way = draw.choice(["added_tokens_decoder", "added_tokens.json", "special_tokens_map.json"])
    if way == "added_tokens_decoder":
        config[way] = {str(i): settings(content) for content, i in ids.items()}
        for s in (START, END):
            config[way][str(vocab[s])] = added(s, normalized=True)
        # Not read beside the other.
        (folder / "added_tokens.json").write_text('{"photo": 5000}')
    else:
        new = {content: i for content, i in ids.items() if content not in vocab}
        (folder / "added_tokens.json").write_text(json.dumps(new))
    if way == "special_tokens_map.json":
        special = {name: added(content, normalized=True) for name, content in names.items()}
        (folder / way).write_text(json.dumps(special))
    if draw.random() < 0.3:
        config["additional_special_tokens"] = contents[:1]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("seed", range(40))
def test_added_tokens_are_those_of_transformers(seed, folders, files, tmp_path):
    """In the middle of words, in other cases, with white space: every flag, in every file."""
    draw = random.Random(seed)
    added_folder(draw, tmp_path, folders[0], files[0])
    reference = CLIPTokenizer.from_pretrained(str(tmp_path))
    tokenizer = Tokenizer.from_folder(tmp_path)
    texts = []
    for _ in range(150):
        between = draw.choice(["", "", " "])
        texts.append(between.join(draw.choice(PIECES) for _ in range(draw.randint(1, 7))))
    expected = reference(texts, add_special_tokens=False).input_ids
    assert [tokenizer.encode(text) for text in texts] == expected
    assert any(tokenizer.vocab[token] in ids for token in tokenizer.added for ids in expected)


def test_added_tokens_of_a_tokenizer_json(references, files, tmp_path):
    reference = CLIPTokenizer.from_pretrained(references[0].name_or_path)
    reference.add_tokens(["<sks>", "Toy"])
    reference.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "a <SKS>photo of toys<sks>"
    ids = tokenizer.encode(text)
    assert ids == reference(text, add_special_tokens=False).input_ids
    assert ids.count(len(files[0])) == 2 and ids.count(len(files[0]) + 1) == 1


def test_ids_beyond_the_embeddings(files, folders, tmp_path):
    vocab, merges = files
    tokenizer = Tokenizer(vocab, [tuple(m) for m in merges])
    encoders = [TextEncoder(TextConfig(48, 80, 1, 4, vocab=len(vocab) + n)) for n in (0, 1)]
    check_vocabulary(tokenizer, *encoders)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folders[0] / name).read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<sks>": len(vocab)}))
    added = Tokenizer.from_folder(tmp_path)
    check_vocabulary(added, encoders[1])
    message = f"'<sks>' is number {len(vocab)}, but a text encoder has {len(vocab)} embeddings"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(added, *encoders)
    check_same_tokens(tokenizer, Tokenizer(dict(vocab), [tuple(m) for m in merges]))
    with pytest.raises(ValueError, match="tokenizer and tokenizer_2 differ in '<sks>'"):
        check_same_tokens(tokenizer, added)
    with pytest.raises(ValueError, match="tokenizer and tokenizer_2 differ in"):
        check_same_tokens(tokenizer, Tokenizer(vocab, [tuple(m) for m in reversed(merges)]))


# ------------------------------------------------------------------------------ long, strange texts


def test_the_tail_of_a_text(tokenizer, references):
    draw, cut, words = random.Random(3), 0, [word for word in WORDS if "!" not in word]
    for _ in range(200):
        # Whole words and punctuation, so that the cut is between two of them or within one.
        text = " ".join(draw.choice(words) for _ in range(draw.randint(1, 60)))
        ids = references[0](text, add_special_tokens=False).input_ids
        tail = tokenizer.tail(text)
        assert bool(tail) == (len(ids) > 75)
        if tail:
            normalised = unicodedata.normalize("NFC", text).lower()
            assert normalised.endswith(tail)
            kept = normalised[: -len(tail)]
            if kept.endswith(" "):
                cut += 1
                first = tail.split()[0]
                kept_ids, tail_ids, first_ids = references[0](
                    [kept, tail, first], add_special_tokens=False
                ).input_ids
                assert kept_ids + tail_ids == ids
                assert len(kept_ids) <= 75 < len(kept_ids) + len(first_ids)
    assert cut > 20
    assert tokenizer.tail("a " * 75) == "" and tokenizer.tail("a " * 76) == "a"
    assert tokenizer.tail("A" * 400) == "a" * 400
    # Padding in a text is a token of its own for the second encoder, and joins others for the
    # first.
    symbols = ["!", "!</w>", "!!</w>", START, END]
    joining = Tokenizer({s: i for i, s in enumerate(symbols)}, [("!", "!</w>")])
    assert len(joining.encode("!! " * 38)) == 38 and len(joining.encode("!! " * 38, 0)) == 76
    assert joining.tail("!! " * 38) == "!" and joining.tail("!! " * 37) == ""


def test_half_a_character_is_the_replacement_character(tokenizer):
    # Half a character, as in a wrongly decoded caption, is U+FFFD, and no error.
    assert tokenizer.encode("caf\udce9") == tokenizer.encode("caf\ufffd")
    assert tokenizer.encode("\ud83c\udfa8") == tokenizer.encode("\ufffd\ufffd")


@pytest.mark.parametrize(
    "text",
    ["x" * 100_000, "a\u0301\u0323" * 50_000, "猫" * 50_000,
     "!" * 100_000, " " * 100_000, "".join(random.Random(0).choices("abcdefgh", k=100_000))],
    ids=["x", "marks", "ideographs", "!", "spaces", "letters"],
)  # fmt: skip
def test_100_kilobytes_take_no_time(text, tokenizer, references):
    start = time.process_time()
    ids, _ = tokenizer.encode(text), tokenizer.tail(text)
    assert time.process_time() - start < 15
    # Words of more than 4,096 bytes are merged in parts, of which 75 tokens see the first.
    expected = references[0](text, add_special_tokens=False).input_ids
    assert ids[:1000] == expected[:1000]


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
    hidden, pooled = ours(prompts_of_ids(end), end)
    assert error(hidden, expected.hidden_states[-2]) <= 1e-5
    assert error(pooled, expected.text_embeds) <= 1e-5


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_encoder_without_projection(activation):
    theirs, ours = pair(CLIPTextModel, hidden_act=activation, num_hidden_layers=4)
    ids = prompts_of_ids(1199)
    expected = theirs(ids, output_hidden_states=True).hidden_states[-2]
    hidden, pooled = ours(ids, 1199)
    assert error(hidden, expected) <= 1e-5 and pooled is None
    # Fewer than 77 tokens are a prefix, in a causal model; and nobody waits for the last layer.
    assert error(ours(ids[:, :30], 1199)[0], expected[:, :30]) <= 1e-5
    ours.text_model.encoder.layers[-1].forward = None
    assert torch.equal(ours(ids, 1199)[0], hidden)


def test_activations_differ():
    """So that the tests above can tell which of the two was taken."""
    with torch.no_grad():
        hidden = [
            pair(CLIPTextModel, hidden_act=a)[1](prompts_of_ids(9), 9)[0]
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
        ({"model_type": "t5"}, "not a CLIP text encoder: model_type is 't5'"),
        ({"model_type": None}, "not a CLIP text encoder: model_type is None"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', not in 'gelu' .. 'quick_gelu'"),
        ({"hidden_act": ["gelu"]}, "hidden_act is \\['gelu'\\], not in"),
        ({"max_position_embeddings": 248}, "max_position_embeddings is 248, not 77"),
        ({"num_attention_heads": 19}, "1280 wide does not make 19 heads"),
        ({"architectures": 7}, "architectures is 7, not a list"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan, not a number from 1e-12"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not in 1 .. 128"),
        ({"projection_dim": True}, "projection_dim is True, not in 1 .. 16384"),
        ({"hidden_size": 1280.0}, "hidden_size is 1280.0, not in 1 .. 16384"),
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


def test_a_single_file_with_more_embeddings_than_symbols(single, folder, tmp_path):
    """The end token is the tokenizer's, not the last row: pooled would be that of the start."""
    tensors, names = load_file(single), (keys.TEXT_1 + "text_model.embeddings.", keys.TEXT_2)
    for name in names:
        rows = tensors[f"{name}token_embedding.weight"]
        tensors[f"{name}token_embedding.weight"] = torch.cat([rows, torch.randn(3, rows.shape[1])])
    save_file(tensors, tmp_path / "model.safetensors")
    expected, actual = (
        encode_prompts(["a cat", "a dog"], m.tokenizer, m.encoder_1, m.encoder_2)
        for m in (
            load_sdxl(path, folder / "tokenizer")
            for path in (single, tmp_path / "model.safetensors")
        )
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert error(actual["pooled"][:1], actual["pooled"][1:]) > 0.01


@pytest.mark.parametrize(
    "name, change, match",
    [
        (keys.TEXT_2 + "text_projection", lambda x: x[0], r"has the shape \(48,\), not 2 dim"),
        (keys.TEXT_2 + "token_embedding.weight", lambda x: x[:0], r"has the shape \(0, 64\), not"),
        (keys.TEXT_2 + "positional_embedding", lambda x: x[:9], "for 9 tokens, not for SDXL's 77"),
        (keys.TEXT_1 + "text_model.embeddings.token_embedding.weight", lambda x: x[:, :9],
         "a width of 9 does not make heads of 64"),
        (keys.UNET + "label_emb.0.0.weight", lambda x: x[:, :-1], "label_emb takes 95, not 48 and"),
        (keys.UNET + "input_blocks.0.0.weight", lambda x: x[:, :, 0, 0], "not 4 dimensions"),
        (keys.UNET + "input_blocks.3.0.op.weight", None, "does not fit|it has no"),
        (keys.TEXT_2 + "transformer.resblocks.0.attn.in_proj_weight", lambda x: x[:2],
         r"3 of another shape.*\(2, 64\) instead of \(64, 64\)"),
        (keys.VAE + "encoder.mid.attn_1.q.weight", lambda x: x.expand(-1, -1, 3, 3),
         r"\(64, 64, 3, 3\) instead of \(64, 64\)"),
    ],
)  # fmt: skip
def test_damaged_single_files_are_refused_in_one_line(
    single, folder, tmp_path, name, change, match
):
    tensors = load_file(single)
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=match) as error:
        load_sdxl(tmp_path / "model.safetensors", folder / "tokenizer")
    assert "\n" not in str(error.value)
