"""Tokens that were added to CLIP's vocabulary, as transformers reads and finds them.

Those that are not normalised are found in a text as it is written, and first; the others in the
normalised rest, so in upper and lower case.
"""

import re
import reprlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
# Not isspace(), which counts the separators U+001C to U+001F as well.
SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B)))
SPACES += "\u2028\u2029\u202f\u205f\u3000"
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
# Of word characters, those that their category does not show.
WORD_SYMBOL = re.compile("[\u200c\u200dⒶ-ⓩ🄰-🅉🅐-🅩🅰-🆉]")


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for itself in a text; the fields are those of transformers.

    lstrip, rstrip: white space before or after it belongs to it. single_word: not inside a word.
    """

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Splitter:
    """Splits texts at some tokens, by content."""

    def __init__(self, tokens: dict[str, AddedToken]):
        self.tokens = tokens
        # Of the tokens that begin at one place the longest counts.
        contents = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, contents)) or "(?!)")

    def __call__(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        """The parts of a text in their order, each with its token or None."""
        done = 0
        for match in self.pattern.finditer(text):
            token, (start, end) = self.tokens[match[0]], match.span()
            neighbours = text[max(start - 1, 0) : start] + text[end : end + 1]
            if token.single_word and any(map(_in_word, neighbours)):
                continue
            while token.lstrip and start > done and text[start - 1] in SPACES:
                start -= 1
            while token.rstrip and end < len(text) and text[end] in SPACES:
                end += 1
            if start > done:
                yield text[done:start], None
            yield text[start:end], token
            done = end
        if done < len(text):
            yield text[done:], None


def _in_word(character: str) -> bool:
    """Whether a character is one of Unicode's word characters."""
    kind = unicodedata.category(character)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or bool(WORD_SYMBOL.match(character))


# ------------------------------------------------------------------------------------- from files


def read_added_tokens(folder: Path, vocab: dict[str, int]) -> list[AddedToken]:
    """The tokens that a folder's files add to its vocabulary; ValueError if a file is broken."""

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
    ids, added = dict(vocab), []
    for content, settings in (default | named | tokens).items():
        i = settings.get("id", ids.get(content, len(ids)))
        if ids.setdefault(content, i) != i:
            raise ValueError(f"{content!r} is token {ids[content]} and {reprlib.repr(i)}")
        default = {"special": False, "normalized": not settings.get("special", False)}
        flags = []
        for name in ("lstrip", "rstrip", "single_word", "normalized", "special"):
            flag = (default | settings).get(name, False)
            flags.append(typed(f"{name} of {content!r}", flag, bool))
        if content:
            added.append(AddedToken(content, i, *flags[:4]))
    return added


def _named_tokens(config: dict) -> dict[str, dict]:
    """By content, the tokens that a config names as the start, the padding or so."""
    for name, expected in (("bos_token", START), ("eos_token", END)):
        if (value := config.get(name)) and (
            content := _settings(_named(value))["content"]
        ) != expected:
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
