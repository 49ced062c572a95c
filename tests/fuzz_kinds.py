"""The kinds of damaged inputs of tests/fuzz.py: how each is made, loaded, and what is right.

A kind is a function of a random generator, the undamaged inputs and a folder for the damaged one;
it returns a function that loads that. WrongLoadError says that what was loaded is not what the
input says: not the undamaged one's, nor what an independent reader takes the damaged one for.
"""

import io
import json
import math
import random
import re
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from benchmarks import models
from common import files
from sdxl import load, png
from sdxl.clip import check_vocabulary
from sdxl.recipe import read_recipe
from sdxl.tokenizer import Tokenizer
from tests.fuzz import FOREIGN, WrongLoadError, any_json, damage_bytes, damage_json, write_json
from tests.fuzz_base import (
    FORMATS,
    SETTINGS,
    TINY,
    Base,
    make_state,
    picture,
    read_cache,
    read_deltas,
    read_images,
    weights_of,
)
from training import cache, checkpoint
from training.streams import Loader


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise WrongLoadError(message)


def check_weights(base: Base, model: load.SDXL, tolerance: float = 0.0) -> None:
    weights = weights_of(model)
    expect(weights.keys() == base.weights.keys(), "other tensors")
    for name, tensor in weights.items():
        error = (tensor.float() - base.weights[name]).abs().max()
        expect(
            error <= tolerance * (1 + base.weights[name].abs().max()), f"{name} is off by {error}"
        )


def link_all(source: Path, target: Path, but: str) -> Path:
    """A copy of a folder by links, except for one file below it; that file's path."""
    target.mkdir(parents=True, exist_ok=True)
    first, _, rest = but.partition("/")
    for entry in source.iterdir():
        if entry.name != first:
            (target / entry.name).symlink_to(entry)
    return link_all(source / first, target / first, rest) if rest else target / first


# ------------------------------------------------------------------------------------------ configs

CONFIGS = (
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "controlnet",
    "scheduler",
    "model_index",
)
# Entries that are read, and the fields that have their values.
UNET_FIELDS = {
    "in_channels": "in_channels", "out_channels": "out_channels",
    "block_out_channels": "channels", "layers_per_block": "layers_per_block",
    "attention_head_dim": "heads", "norm_num_groups": "groups",
    "cross_attention_dim": "cross_attention_dim", "addition_time_embed_dim": "time_ids_width",
    "projection_class_embeddings_input_dim": "add_embedding_dim", "scalar": "scalar",
}  # fmt: skip
TEXT_FIELDS = {
    "hidden_size": "hidden", "intermediate_size": "intermediate", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "vocab_size": "vocab", "hidden_act": "activation",
    "projection_dim": "projection", "layer_norm_eps": "eps", "max_position_embeddings": "positions",
}  # fmt: skip
FIELDS = {
    "unet": UNET_FIELDS, "text_encoder_2": TEXT_FIELDS,
    "text_encoder": {k: v for k, v in TEXT_FIELDS.items() if k != "projection_dim"},
    "controlnet": {"conditioning_embedding_out_channels": "embedding"}
    | {k: v for k, v in UNET_FIELDS.items() if k != "out_channels"},
    "vae": {
        "block_out_channels": "channels", "layers_per_block": "layers_per_block",
        "norm_num_groups": "groups", "latent_channels": "latent_channels",
        "scaling_factor": "scaling_factor",
    },
}  # fmt: skip
# Entries without an effect here, or whose effect would show in the weights' names and shapes.
INERT = re.compile(
    r"^_(?!class_name$)|sample_size|dropout|upcast|num_heads$|encoder_hid_dim|class_embeddings"
    r"|kernel$|dual_cross|only_cross|cross_attention_norm|num_class_embeds|time_embedding_dim|gated"
    r"|attention_type|_token_id$|initializer|transformers_version|output_|return_dict|dtype"
    r"|chunk_size"
    r"|is_encoder|label|problem_type|force_upcast|architectures|layers_mid|_class_name"
    r"|transformer_layers_per_block|steps_offset|timestep_spacing"
)


def configs(draw: random.Random, base: Base, work: Path) -> Callable:
    """config.json of any part: its entries are those that the module has, or were not read."""
    part = draw.choice(CONFIGS)
    folder, name = base.root / "sdxl", f"{part}/config.json"
    if part in ("scheduler", "model_index"):
        name = "scheduler/scheduler_config.json" if part == "scheduler" else "model_index.json"
    if part == "controlnet":
        folder, name = base.root / "controlnet", "config.json"
    original = json.loads((folder / name).read_text())
    path = link_all(folder, work / "model", name)
    write_json(draw, path, damage_json(draw, original))

    def attempt():
        if part == "controlnet":
            like = base.model.unet.config
            controlnet = load.load_controlnet(work / "model", like)
            controlnet.config.check_fits(like)
            x_t, cond = models.random_batch(TINY, 1, 8)
            controlnet(x_t, torch.tensor([9]), cond, torch.zeros(1, 3, 64, 64))
            config, expected = controlnet.config, base.controlnet.config
        else:
            model = load.load_sdxl(work / "model")
            check_weights(base, model)
            name = {"text_encoder": "encoder_1", "text_encoder_2": "encoder_2"}.get(part, part)
            config = getattr(getattr(model, name, None), "config", None)
            expected = getattr(getattr(base.model, name, None), "config", None)
        check_entries(part, config, expected, original, json.loads(path.read_bytes()))

    return attempt


def check_entries(part: str, config, expected, original: dict, damaged: dict) -> None:
    """That each entry which was changed is the module's, as the file has it, or has no effect."""
    if original.keys() - damaged.keys():
        # What is left out has the value that diffusers gives it, if that was there before.
        expect(config == expected, f"without {original.keys() - damaged.keys()}: {config}")
    for name, value in damaged.items():
        same = original.get(name) == value and not isinstance(value, bool)
        if same or json.dumps(original.get(name)) == json.dumps(value) or INERT.search(name):
            continue
        # The first text encoder has no projection.
        if (part, name) == ("text_encoder", "projection_dim"):
            continue
        if field := FIELDS.get(part, {}).get(name):
            size, levels = getattr(config, field), len(getattr(config, "channels", ()))
            same = size in (value, tuple(value) if isinstance(value, list) else (value,) * levels)
            expect(same and not isinstance(value, bool), f"{name} is {value!r}, read as {size}")
        elif name in original and part != "model_index":
            # Null for false.
            expect(not value and not original[name], f"{name} {value!r} passed")


# --------------------------------------------------------------------------------------- tokenizers

TEXTS = ["a cat, and a dog 12!", "<SKS>cats<|endoftext|>", "zebra!!", "x" * 90, "it's ...", ""]


def tokenizers(draw: random.Random, base: Base, work: Path) -> Callable:
    """Any file of a tokenizer: the ids are those of transformers, or of the undamaged tokenizer."""
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("!", "!</w>")]
    symbols = [s for s in models.SYMBOLS if not s.startswith("<|")]
    symbols += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    token = {"content": "<sks>", "lstrip": False, "rstrip": False, "single_word": False}
    token |= {"normalized": True, "special": False}
    contents = {
        "vocab.json": vocab,
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]).encode(),
        "added_tokens.json": {"<sks>": len(vocab)},
        "special_tokens_map.json": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"},
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(len(vocab)): token}, "pad_token": "<|endoftext|>",
            "model_max_length": 77,
            "bos_token": {**token, "__type": "AddedToken", "content": "<|startoftext|>"},
        },
    }  # fmt: skip
    way = draw.randrange(3)
    if way == 0:
        del contents["tokenizer_config.json"]
    if way == 1:
        content = {"version": "1.0", "added_tokens": [{"id": len(vocab), **token}]}
        content["model"] = {"type": "BPE", "vocab": vocab, "merges": [" ".join(m) for m in merges]}
        contents = {"tokenizer.json": content}
    for name, content in contents.items():
        if isinstance(content, bytes):
            (work / name).write_bytes(content)
        else:
            (work / name).write_text(json.dumps(content))
    undamaged = Tokenizer.from_folder(work)
    expected = [undamaged.encode(text) for text in TEXTS]
    name = draw.choice(list(contents))
    if isinstance(contents[name], bytes):
        (work / name).write_bytes(damage_bytes(draw, contents[name]))
    else:
        write_json(draw, work / name, damage_json(draw, contents[name]))
    rows = len(vocab) + draw.choice([1, 2, 50])

    def attempt():
        tokenizer = Tokenizer.from_folder(work)
        check_vocabulary(tokenizer, SimpleNamespace(config=SimpleNamespace(vocab=rows)))
        ids = [tokenizer.encode(text) for text in TEXTS]
        expect(max(map(max, filter(None, ids))) < rows, "an id without an embedding")
        for text in TEXTS:
            tokenizer.tail(text)
        if ids == expected:
            return
        try:
            reference = CLIPTokenizer.from_pretrained(str(work))
            theirs = reference(TEXTS, add_special_tokens=False).input_ids
        except Exception as problem:
            raise WrongLoadError(f"transformers refuses it: {problem!r}") from problem
        # Where the vocabulary has a gap, transformers gives added tokens other ids than the file.
        same_ids = reference.get_vocab() == tokenizer.vocab
        expect(ids == theirs or not same_ids, f"{ids}, not {theirs}; undamaged {expected}")

    return attempt


# ------------------------------------------------------------------------- weights and their files


def damage_tensors(draw: random.Random, tensors: dict[str, Tensor], protected=()) -> str:
    """Change one tensor's name, shape or type, leave it out, or add one; what was done."""
    name = draw.choice([key for key in tensors if key not in protected])
    tensor = tensors[name]
    actions = {
        "missing": lambda: None,
        "renamed": lambda: tensors.update({name + draw.choice([".x", "0", " "]): tensor}),
        "doubled": lambda: tensors.update({name: tensor, f"{name}.copy": tensor.clone()}),
        "flat": lambda: tensors.update({name: tensor.flatten()}),
        "scalar": lambda: tensors.update({name: tensor.flatten()[0]}),
        "more dimensions": lambda: tensors.update({name: tensor[None]}),
        "transposed": lambda: tensors.update({name: tensor.transpose(0, -1)}),
        "no rows": lambda: tensors.update({name: tensor[:0] if tensor.ndim else tensor}),
        "a row more": lambda: tensors.update({name: torch.cat([tensor, tensor[:1]])}),
        "half the rows": lambda: tensors.update({name: tensor[: len(tensor) // 2]}),
        "half the columns": lambda: tensors.update({name: tensor[..., : tensor.shape[-1] // 2]}),
        "NaN": lambda: tensors.update({name: torch.full_like(tensor, math.nan)}),
        "infinity": lambda: tensors.update({name: torch.full_like(tensor, math.inf)}),
        "of another type": lambda: tensors.update({name: tensor.to(draw.choice(TYPES))}),
        "another tensor": lambda: tensors.update(
            {name: draw.choice(list(tensors.values())).clone()}
        ),
    }
    kinds = [k for k in actions if tensor.is_floating_point() or k not in ("NaN", "infinity")]
    kinds = [k for k in kinds if tensor.ndim or k not in ("a row more", "half the rows")]
    kinds = [k for k in kinds if tensor.ndim or ("columns" not in k and k not in ("transposed",))]
    kind = draw.choice(kinds)
    # The same values under the same name are no damage.
    if kind not in ("doubled", "a row more"):
        del tensors[name]
    actions[kind]()
    if name in tensors:
        tensors[name] = tensors[name].contiguous().clone()
    return f"{name}: {kind}"


def tolerance_of(done: str) -> float:
    """How far values may be from the undamaged ones': another precision, or any of one shape."""
    if "another tensor" in done or "transposed" in done:
        return math.inf
    return 0.1 if "another type" in done else 0.0


TYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.bool]
TYPES += [torch.uint8, torch.float8_e4m3fn]


def single_files(draw: random.Random, base: Base, work: Path) -> Callable:
    """A single file with changed tensors: all weights are the undamaged ones', to 8 bits."""
    tensors = load_file(base.root / "single.safetensors")
    done = " ".join(damage_tensors(draw, tensors) for _ in range(draw.choice([1, 1, 1, 2, 5])))
    save_file(tensors, work / "model.safetensors", {"format": "pt"})

    def attempt():
        model = load.load_sdxl(work / "model.safetensors", base.root / "sdxl" / "tokenizer")
        check_weights(base, model, tolerance_of(done))

    return attempt


def damage_file(draw: random.Random, source: Path, target: Path) -> None:
    """A safetensors file with damage in its header, mostly, or behind it cut off."""
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    action = draw.randrange(6)
    if action == 0:
        target.write_bytes(data[: draw.randrange(len(data))])
    elif action == 1:
        size = draw.choice([0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1, 10**8])
        target.write_bytes(struct.pack("<Q", size) + data[8:])
    elif action == 2:
        target.write_bytes(draw.choice(FOREIGN))
    elif action == 3:
        header = json.dumps(damage_json(draw, json.loads(data[8 : 8 + length]))).encode()
        target.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    else:
        header = damage_bytes(draw, data[8 : 8 + length])
        size = len(header) if draw.random() < 0.5 else length
        target.write_bytes(struct.pack("<Q", size) + header + data[8 + length :])


def headers(draw: random.Random, base: Base, work: Path) -> Callable:
    """The safetensors file of any part: its weights are the undamaged ones'."""
    part = draw.choice(["unet", "vae", "text_encoder", "text_encoder_2", "single"])
    if part == "single":
        damage_file(draw, base.root / "single.safetensors", work / "model.safetensors")
    else:
        name = next((base.root / "sdxl" / part).glob("*.safetensors")).name
        target = link_all(base.root / "sdxl", work / "model", f"{part}/{name}")
        damage_file(draw, base.root / "sdxl" / part / name, target)

    def attempt():
        if part == "single":
            path, tokenizer = work / "model.safetensors", base.root / "sdxl" / "tokenizer"
            check_weights(base, load.load_sdxl(path, tokenizer))
        else:
            check_weights(base, load.load_sdxl(work / "model"))

    return attempt


# -------------------------------------------------------------------------------------------- LoRAs


def check_deltas(deltas: dict, expected: dict, scale_of=lambda name: 1.0, tolerance=1e-5) -> None:
    expect(deltas.keys() == expected.keys(), "other layers have adapters")
    for name, delta in deltas.items():
        wanted = scale_of(name) * expected[name]
        error = (delta - wanted).abs().max() / wanted.abs().max()
        expect(bool(error <= tolerance), f"{name} is off by {error:.3g}")


def lora_tensors(draw: random.Random, base: Base, work: Path) -> Callable:
    """A LoRA with changed tensors adds what the undamaged one adds, to 8 bits."""
    kind = draw.choice(["peft", "kohya"])
    path = work / "lora.safetensors"
    tensors = load_file(base.root / f"{kind}.safetensors")
    with safe_open(base.root / f"{kind}.safetensors", "pt") as file:
        metadata = file.metadata()
    done = damage_tensors(draw, tensors)
    save_file(tensors, path, metadata)

    def attempt():
        deltas = read_deltas(path, base.model)
        check_deltas(deltas, base.deltas[kind], tolerance=1e-5 + 2 * tolerance_of(done))

    return attempt


def lora_headers(draw: random.Random, base: Base, work: Path) -> Callable:
    """A LoRA with a changed header: its scale is PEFT's, and its recipe has possible numbers."""
    kind = draw.choice(["peft", "peft", "kohya"])
    path = work / "lora.safetensors"
    tensors = load_file(base.root / f"{kind}.safetensors")
    with safe_open(base.root / f"{kind}.safetensors", "pt") as file:
        metadata = file.metadata()
    entry = draw.choice(list(metadata))
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if kind == "peft" and draw.random() < 0.7:
        layers = list(base.deltas["peft"])
        settings |= draw.choice([{}, {"unet.alpha_pattern": {draw.choice(layers): 8}}])
        settings = damage_json(draw, settings)
        metadata["lora_adapter_metadata"] = json.dumps(settings)
        if draw.random() < 0.1:
            metadata["lora_adapter_metadata"] = draw.choice(["", "[", "7", "[" * 10**5])
    else:
        metadata[entry] = draw.choice([str(any_json(draw)), "7", "", "[]"])
    metadata = {k: v.encode("utf-8", "replace").decode() for k, v in metadata.items()}
    save_file(tensors, path, metadata)

    def attempt():
        recipe = read_recipe(path, metadata)
        for name, value in recipe.items():
            number = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            expect(number or name in ("tcf", "told_ks"), f"{name} is {value!r}")
        if "told_ks" in recipe:
            numbers = re.fullmatch(r"\s*\[\s*\d+(\s*,\s*\d+)*\s*\]\s*", metadata["tdd_told_ks"])
            expect(bool(numbers), f"told_ks {metadata['tdd_told_ks'][:60]!r} passed")
        deltas = read_deltas(path, base.model)
        whole = isinstance(settings, dict) and "lora_adapter_metadata" in metadata
        expected = (
            settings if whole and metadata["lora_adapter_metadata"] == json.dumps(settings) else {}
        )
        check_deltas(deltas, base.deltas[kind], partial(peft_scale, expected))

    return attempt


def peft_scale(settings: dict, name: str) -> float:
    """alpha / rank by PEFT's rules, of a LoRA of rank 4."""
    if not settings or ("unet.r" not in settings and "unet.lora_alpha" not in settings):
        return 1.0 if not any(k.startswith("unet.") for k in settings) else 2.0
    alpha = settings.get("unet.lora_alpha", 8)
    for pattern, value in (settings.get("unet.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return alpha / (2 if settings.get("unet.use_rslora") else 4)


# --------------------------------------------------------------------------------------------- data


def check_images(base: Base, work: Path, damaged: str) -> dict[str, dict]:
    """The examples of a folder in which one file is damaged: the others are as they were."""
    examples, left_out = read_images(work)
    for name, example in base.images.items():
        if name not in examples:
            expect(name.startswith(damaged) and left_out, f"{name} is gone without a word")
        elif not name.startswith(damaged):
            same = torch.equal(example["images"], examples[name]["images"])
            expect(
                same and example["captions"] == examples[name]["captions"], f"{name} has changed"
            )
    for name, example in examples.items():
        expect(name in base.images or damaged in name, f"{name} was never there")
        expect(bool(example["images"].abs().max() <= 1), f"{name} has strange pixels")
        expect(bool(example["captions"].strip()), f"{name} has no caption")
    return examples


def images(draw: random.Random, base: Base, work: Path) -> Callable:
    """A picture: left out and counted, or pixels, beside others that are as they were."""
    name = draw.choice(list(FORMATS))
    data = damage_bytes(draw, (base.root / "data" / name).read_bytes())
    if draw.random() < 0.25:
        data = huge_picture(
            draw, *draw.choice([(30_000, 30_000), (2**31 - 1, 1), (1, 10**6), (0, 9)])
        )
    link_all(base.root / "data", work / "data", name).write_bytes(data)
    return lambda: check_images(base, work / "data", name)


def huge_picture(draw: random.Random, width: int, height: int) -> bytes:
    """The beginning of a picture that says that it is this large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body += chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    bmp = struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, width, min(height, 2**31 - 1), 1, 24)
    gif = struct.pack("<HHBBB", width % 2**16, height % 2**16, 0x80, 0, 0) + bytes(6)
    gif += (
        b","
        + struct.pack("<HHHHB", 0, 0, width % 2**16, height % 2**16, 0)
        + b"\x02\x02\x44\x01\x00;"
    )
    return draw.choice([
        b"\x89PNG\r\n\x1a\n" + body, b"BM" + bmp + bytes(24 + 300), b"GIF89a" + gif,
        b"P6 %d %d 255 " % (width, height) + bytes(999), b"P5 %d %d 65535 " % (width, height),
    ])  # fmt: skip


def captions(draw: random.Random, base: Base, work: Path) -> Callable:
    """A caption: left out and counted, or the file's text, or a string of its JSON."""
    name = draw.choice(["a.txt", "b.json", "c.txt", "d.json"])
    path = link_all(base.root / "data", work / "data", name)
    if name.endswith(".json"):
        content = {"caption": "a", "text": "b", "prompt": "c", "size": 7}
        write_json(draw, path, damage_json(draw, draw.choice([content, {"text": "b"}, [content]])))
    else:
        path.write_bytes(damage_bytes(draw, f"number {draw.randrange(9)} é\n".encode()))
    if draw.random() < 0.1:
        text = draw.choice(
            ["x" * 2**21, "é" * 10**5, "\u0301" * 10**5, "\x00", " \n", "猫" * 10**6]
        )
        path.write_text(text if name.endswith("txt") else json.dumps({"text": text}))

    def attempt():
        stem = name.partition(".")[0]
        for example, content in check_images(base, work / "data", f"{stem}.").items():
            if example.startswith(f"{stem}."):
                text = path.read_bytes().decode("utf-8-sig")
                if name.endswith(".json"):
                    fields = json.loads(text)
                    texts = [fields.get(key) for key in ("caption", "text", "prompt")]
                    text = next(t for t in texts if isinstance(t, str) and t.strip())
                expect(content["captions"] == text.strip(), f"{content['captions'][:50]!r}")
                base.model.tokenizer(content["captions"], 0)
                base.model.tokenizer.tail(content["captions"])

    return attempt


def tars(draw: random.Random, base: Base, work: Path) -> Callable:
    """A tar: its examples are the undamaged one's, or are missed with a word."""
    data = (base.root / "data" / "z.tar").read_bytes()
    if draw.random() < 0.6:
        # A member's header with a right checksum.
        start = draw.choice(
            [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
        )
        header = damage_bytes(draw, data[start : start + 512], 100, 345)
        header = bytearray((header + bytes(512))[:512])
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        data = data[:start] + header + data[start + 512 :]
    else:
        data = damage_bytes(draw, data)
    link_all(base.root / "data", work / "data", "z.tar").write_bytes(data)

    def attempt():
        for name, example in check_images(base, work / "data", "z.tar").items():
            if name in base.images and name.startswith("z.tar"):
                same = torch.equal(example["images"], base.images[name]["images"])
                texts = {each["captions"] for each in base.images.values()}
                expect(example["captions"] in texts or not same, f"{name} has another caption")

    return attempt


# ------------------------------------------------------------------------ what this program writes


def caches(draw: random.Random, base: Base, work: Path) -> Callable:
    """A cache: every row is the one of its name, or it is made again."""
    name = draw.choice(["index.json", "rank00000-00000.safetensors"])
    target = link_all(base.root / "cache", work / "cache", name)
    source, done = base.root / "cache" / name, ""
    if name == "index.json":
        write_json(draw, target, damage_json(draw, json.loads(source.read_text())))
    elif draw.random() < 0.5:
        damage_file(draw, source, target)
    else:
        tensors = load_file(source)
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
        if draw.random() < 0.5:
            done = damage_tensors(draw, tensors)
        else:
            key = draw.choice(list(metadata))
            metadata[key] = json.dumps(damage_json(draw, json.loads(metadata[key])))
        save_file(tensors, target, metadata)

    def attempt():
        if not cache.is_full(work / "cache", {"resolution": 16}):
            return
        for row, example in enumerate(read_cache(work / "cache")):
            expected = base.rows[row]
            expect(isinstance(example.pop("names"), str), "a name is no string")
            expect(example.keys() == expected.keys() - {"names"}, f"{sorted(example)}")
            for key, tensor in example.items():
                same = tensor.shape == expected[key].shape
                error = (tensor.float() - expected[key].float()).abs().max() if same else math.inf
                expect(bool(error <= tolerance_of(done)), f"{key} of row {row}; {done}")
        expect(row == len(base.rows) - 1, f"{row + 1} rows")

    return attempt


def checkpoints(draw: random.Random, base: Base, work: Path) -> Callable:
    """A checkpoint: gone on from as it was, or the one before."""
    name = draw.choice(["config.json", "config.json", "state.safetensors"])
    target, done = link_all(base.root / "run", work / "run", f"checkpoint-4/{name}"), ""
    source = base.root / "run" / "checkpoint-4" / name
    original = json.loads((source.parent / "config.json").read_text())
    if name == "config.json":
        write_json(draw, target, damage_json(draw, original))
    elif draw.random() < 0.5:
        damage_file(draw, source, target)
    else:
        tensors = load_file(source)
        done = damage_tensors(draw, tensors)
        save_file(tensors, target)

    def attempt():
        state = make_state(work / "run", 1)
        folder, config = checkpoint.resume_point(work / "run", True, state.settings)
        if folder is None:
            return
        state.restore(folder, config)
        step = checkpoint.checkpoint_step(folder)
        expect(state.step == step, f"step {state.step} of {folder.name}")
        tensors = state.weights() | state.moments()
        expect(tensors.keys() == base.states[step].keys(), "other tensors")
        for key, tensor in tensors.items():
            same = tensor.shape == base.states[step][key].shape
            close = same and (tensor - base.states[step][key]).abs().max() <= tolerance_of(done)
            expect(bool(close), f"{key} {tuple(tensor.shape)}; {done}")
        position = {**original["positions"][0], "drawn": step}
        identity = {name: position[name] for name in ("seed", "rank", "world")}
        stream = SimpleNamespace(
            rank=0, left_out={}, missing=0, identity=identity, walk=lambda *place: iter(())
        )
        loader = Loader(stream, 1, position=config["positions"][0])
        expect(loader.position == position, f"goes on at {loader.position}")

    return attempt


def finished_pictures(draw: random.Random, base: Base, work: Path) -> Callable:
    """A finished picture: counts as made only if its pixels are the undamaged one's."""
    path = work / "picture.png"
    data = (base.root / "picture.png").read_bytes()
    if draw.random() < 0.4:
        settings = json.loads(json.dumps(damage_json(draw, SETTINGS)).replace("\\ud800", "?"))
        png.save_png(picture(), path, settings if isinstance(settings, dict) else SETTINGS)
    elif draw.random() < 0.1:
        path.write_bytes(huge_picture(draw, 30_000, 30_000))
    else:
        path.write_bytes(damage_bytes(draw, data))

    def attempt():
        if png.is_finished(path, SETTINGS):
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                same = np.array_equal(np.asarray(image), np.asarray(picture()))
                saved = json.loads(image.text["settings"])
            expect(same, "its pixels are others")
            expect(saved == SETTINGS, f"its settings are {saved}")

    return attempt


def prompt_files(draw: random.Random, base: Base, work: Path) -> Callable:
    """A file of prompts: its lines that are not blank, as Python's own reader splits them."""
    text = "a cat\nécole\r\n\n  two words \nlast"
    data = damage_bytes(draw, text.encode())
    (work / "prompts.txt").write_bytes(data)

    def attempt():
        lines = files.read_lines("--prompts", work / "prompts.txt")
        # A line ends with LF, CR LF or, as on the oldest Macs, CR.
        expected = re.split("\r\n|\r|\n", data.decode("utf-8-sig"))
        expected = [line for line in expected if line.strip()]
        expect(lines == expected, f"{lines}")
        base.model.tokenizer(lines, 0)

    return attempt


KINDS = {
    "configs": configs, "tokenizers": tokenizers, "single files": single_files,
    "safetensors headers": headers, "LoRA tensors": lora_tensors, "LoRA headers": lora_headers,
    "images": images, "captions": captions, "tars": tars, "cache shards": caches,
    "checkpoints": checkpoints, "finished pictures": finished_pictures,
    "prompt files": prompt_files,
}  # fmt: skip
