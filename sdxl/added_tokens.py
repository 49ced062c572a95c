"""Tokens that were added to CLIP's vocabulary, as transformers reads and finds them.

Those that are not normalised are found in a text as it is written, and first; the others in the
normalised rest, so in upper and lower case.
"""

import re
import reprlib
from collections.abc import Iterator
from pathlib import Path

from common.files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def split_at(tokens: dict[str, int], text: str) -> Iterator[tuple[str, int | None]]:
    """The parts of a text in their order, each with its id if it is a token, else None."""
    # Of the tokens that begin at one place the longest counts.
    contents = sorted(tokens, key=len, reverse=True)
    pattern = "|".join(map(re.escape, contents)) or "(?!)"
    for part in re.split(f"({pattern})", text):
        if part:
            yield part, tokens.get(part)


# ------------------------------------------------------------------------------------- from files


def read_added_tokens(folder: Path, vocab: dict[str, int]) -> dict[str, tuple[int, bool]]:
    """The tokens that a folder's files add to its vocabulary, with id and if it is normalised.

    Raises ValueError if a file is broken.
    """

    def read(name: str, missing: dict | None = None) -> dict:
        return read_json(folder / name) if (folder / name).exists() else missing or {}

    # Transformers has saved them in several ways; the newest hides the others.
    config, tokens = read("tokenizer_config.json"), {}
    if "added_tokens_decoder" in config:
        named = _named_tokens(config)
        for i, value in typed("added_tokens_decoder", config["added_tokens_decoder"], dict).items():
            settings = _settings(value)
            tokens[settings["content"]] = settings | {"id": int(i) if i.isdecimal() else i}
    else:
        named = _named_tokens(config | read("special_tokens_map.json"))
        for content, i in read("added_tokens.json").items():
            tokens[content] = {"content": content, "special": content in named, "id": i}
        content = read("tokenizer.json", {"added_tokens": []})
        for settings in typed("added_tokens", content.get("added_tokens"), list):
            tokens[_settings(settings)["content"]] = settings
    # As SDXL's own files have these two, which not every folder holds.
    default = {s: {"content": s, "normalized": True} for s in (START, END) if s in vocab}
    ids, added = dict(vocab), {}
    for content, settings in (default | named | tokens).items():
        i = settings.get("id", ids.get(content, len(ids)))
        if ids.setdefault(content, i) != i:
            raise ValueError(f"{content!r} is token {ids[content]} and {reprlib.repr(i)}")
        flags = {"normalized": not settings.get("special")} | settings
        for name in ("lstrip", "rstrip", "single_word", "special", "normalized"):
            flag = typed(f"{name} of {content!r}", flags.get(name, False), bool)
            if flag and name in ("lstrip", "rstrip", "single_word"):
                raise ValueError(f"{content!r} has {name}, which CLIP's tokens do not")
        if content:
            added[content] = i, flags["normalized"]
    return added


def _named_tokens(config: dict) -> dict[str, dict]:
    """By content, the tokens that a config names as the start, the padding or so."""
    for name, expected in (("bos_token", START), ("eos_token", END)):
        content = _settings(_named(config.get(name) or expected))["content"]
        if content != expected:
            raise ValueError(f"its {name} is {reprlib.repr(content)}, not {expected}: not CLIP's")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else typed("special tokens", extra, list)
    values = [config[name] for name in NAMED if config.get(name)]
    settings = [{"special": True, **_settings(_named(value))} for value in (*values, *extra)]
    return {each["content"]: each for each in settings}


def _named(value):
    """A token that is named by its content alone has no other settings."""
    return {"content": value} if isinstance(value, str) else value


def _settings(value) -> dict:
    """A token's settings; ValueError if they are not those of a token."""
    typed("the content of a token", typed("a token", value, dict).get("content"), str)
    return value


def typed(name: str, value, kind: type):
    """The value; ValueError unless it is of a kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {reprlib.repr(value)}, no {kind.__name__}")
    return value
