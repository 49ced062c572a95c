"""CLIP's byte-level BPE tokenizer: a text becomes token ids, as in transformers.

Tokens that were added to the vocabulary (textual inversions, say) are found first, wherever they
stand. The rest of a text is split into words, each ending in "</w>", and the bytes of a word are
merged into the vocabulary's symbols. One vocabulary serves both of SDXL's text encoders.
"""

import re
import reprlib
import unicodedata
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path

import torch
from torch import Tensor

from common.files import read_json
from sdxl.added_tokens import END, START, read_added_tokens, split_at, typed

MAX_ID = 2**20  # far beyond any text encoder's embeddings
CACHED_WORDS = 2**17
LONGEST_PART = 2**12  # bytes of a word that are merged at a time

# ------------------------------------------------------------------------------------------- words
#
# CLIP splits a prompt by Unicode's categories, which Python's re does not know. So every character
# is first replaced by a one-letter class, and the pattern runs over the classes. Only the
# apostrophe and the letters of contractions ('s, 're, ...) still stand for themselves.

LITERAL = "'stremvld"
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[stremvldL]+|N|['O]+")
# Not re's own, which counts the separators U+001C to U+001F as well.
SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# Half a character, as in a file that is not UTF-8 after all.
SURROGATE = re.compile("[\ud800-\udfff]")


def _character_class(character: str) -> str:
    """L for a letter, N for a number, a space for white space, O for all else, or itself."""
    if character in LITERAL:
        return character
    return {"L": "L", "N": "N", "Z": " "}.get(unicodedata.category(character)[0], "O")


def _normalise(text: str) -> str:
    """The text with composed characters, one space for white space, and lower case."""
    # One letter at a time: lower() on a whole word treats a sigma at its end differently.
    return SPACES.sub(" ", "".join(c.lower() for c in unicodedata.normalize("NFC", text)))


def _byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes, the way GPT-2 chose them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    symbols, substitutes = [], map(chr, count(256))
    for byte in range(256):
        symbols.append(chr(byte) if byte in printable else next(substitutes))
    return symbols


# -------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """CLIP's byte-level BPE: lower-case words, each ending in "</w>", merged into known symbols.

    vocab: symbol -> id; merges: pairs of symbols, the earliest first; added: as read_added_tokens
    has it, by default start and end, in upper and lower case. Raises ValueError if they are not
    CLIP's or not of one tokenizer. start and end are the ids of those two.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], added=None):
        if added is None:
            added = {s: (vocab[s], True) for s in (START, END) if s in vocab}
        self.vocab = vocab | {content: i for content, (i, _) in added.items()}
        self.byte_symbols = _byte_symbols()
        _check_vocab(self.vocab)
        _check_merges(self.vocab, merges, {*self.byte_symbols, *added})
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = self.vocab[START], self.vocab[END]
        self.symbols = {i: symbol for symbol, i in self.vocab.items()}
        self.added, self.raw, self.normalised = added, {}, {}
        for content, (i, is_normalised) in added.items():
            if is_normalised:
                # Of two that are the same in lower case the first counts.
                self.normalised.setdefault(_normalise(content), i)
            else:
                self.raw[content] = i
        self.cache = {}  # word -> ids

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer":
        """Reads vocab.json and merges.txt, or tokenizer.json, and what adds tokens to them.

        That is tokenizer_config.json, or special_tokens_map.json and added_tokens.json. Raises
        ValueError if files are missing or broken.
        """
        vocab_file, merges_file = path / "vocab.json", path / "merges.txt"
        single_file = path / "tokenizer.json"
        in_two_files = vocab_file.is_file() and merges_file.is_file()
        if not in_two_files and not single_file.is_file():
            raise ValueError(f"no tokenizer in {path}: put vocab.json and merges.txt there")
        try:
            if in_two_files:
                vocab = read_json(vocab_file)
                merges = merges_file.read_text(encoding="utf-8-sig").split("\n")
            else:
                model = typed("its model", read_json(single_file).get("model", {}), dict)
                vocab = typed("its vocab", model.get("vocab", {}), dict)
                merges = typed("its merges", model.get("merges", []), list)
            return cls(vocab, _parse_merges(merges), read_added_tokens(path, vocab))
        except ValueError as problem:
            files = f"{vocab_file} and {merges_file.name}" if in_two_files else single_file
            raise ValueError(f"cannot use {files}: {problem}; download them again") from problem

    def encode(self, text: str, pad: int | None = None) -> list[int]:
        """The ids of a text of any length, without start, end or padding.

        pad: the id whose symbol counts as padding in the text too, as "!" does for SDXL's second
        text encoder. Half a character, which no UTF-8 has, counts as U+FFFD.
        """
        return [i for _, ids in self._pieces(text, pad) for i in ids]

    def __call__(self, texts: list[str], pad: int, length: int = 77) -> Tensor:
        """start, ids, end, then pad, and no more than length ids: n texts -> (n, length)."""
        rows = [[self.start, *self.encode(text, pad)[: length - 2], self.end] for text in texts]
        return torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows])

    def tail(self, text: str, length: int = 77) -> str:
        """The end of a text that length ids have no room for, in lower case; "" if there is none.

        It begins with a word that does not fit as a whole, and is the longer one of those for both
        of SDXL's text encoders.
        """
        # Only padding's symbol is split off for the second.
        pads = (self.end, 0) if self.symbols.get(0, "!") in text else (self.end,)
        return max((self._tail(text, pad, length - 2) for pad in pads), key=len)

    def _tail(self, text: str, pad: int, room: int) -> str:
        tail = ""
        for piece, ids in self._pieces(text, pad):
            room -= len(ids)
            if room < 0:
                tail += piece
        return tail.strip()

    def _pieces(self, text: str, pad: int | None) -> Iterator[tuple[str, list[int]]]:
        """A text's words and added tokens in their order, with white space, and their ids."""
        symbol = self.symbols.get(pad, END)
        padding = {} if symbol in self.added else {symbol: pad}
        for part, i in split_at(padding | self.raw, SURROGATE.sub("\ufffd", text)):
            if i is not None:
                yield part, [i]
                continue
            for piece, i in split_at(self.normalised, _normalise(part)):
                if i is not None:
                    yield piece, [i]
                else:
                    yield from self._words(piece)

    def _words(self, text: str) -> Iterator[tuple[str, list[int]]]:
        done = 0
        for word in WORD.finditer("".join(map(_character_class, text))):
            # White space before it belongs to a piece, so that the pieces are the text.
            yield text[done : word.end()], self._word_ids(text[word.start() : word.end()])
            done = word.end()
        yield text[done:], []

    def _word_ids(self, word: str) -> list[int]:
        # Captions share most of their words, and merging takes most of the time.
        ids = self.cache.get(word)
        if ids is None:
            # Other threads may be at it too.
            if len(self.cache) >= CACHED_WORDS:
                self.cache.clear()
            symbols = [self.byte_symbols[byte] for byte in word.encode()]
            symbols[-1] += "</w>"
            merged = []
            # In parts: 75 tokens end long before, and the time grows with the square of a part.
            for start in range(0, len(symbols), LONGEST_PART):
                merged += self._merge(symbols[start : start + LONGEST_PART])
            # A symbol outside a cut-down vocabulary becomes the end token, as in transformers.
            ids = self.cache[word] = [self.vocab.get(s, self.end) for s in merged]
        return ids

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
    pairs = []
    for merge in merges:
        pair = merge.rstrip("\r").split(" ") if isinstance(merge, str) else merge
        if pair == [""] or (isinstance(merge, str) and merge.startswith("#version")):
            continue
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(symbol, str) for symbol in pair):
            raise ValueError(f"the merge {reprlib.repr(merge)} does not have two symbols")
        pairs.append(tuple(pair))
    return pairs


def _check_vocab(vocab: dict[str, int]) -> None:
    """ValueError unless a vocabulary numbers CLIP's symbols, each with a number of its own."""
    if not {START, END} <= vocab.keys():
        raise ValueError(f"not CLIP's vocabulary: it has no {START} or {END}")
    numbers = {}
    for symbol, i in vocab.items():
        # JSON's true is an int to Python.
        if type(i) is not int or not 0 <= i < MAX_ID:
            raise ValueError(f"not CLIP's vocabulary: {symbol!r} is number {reprlib.repr(i)}")
        if numbers.setdefault(i, symbol) != symbol:
            raise ValueError(f"not CLIP's vocabulary: {numbers[i]!r} and {symbol!r} are number {i}")


def _check_merges(vocab: dict[str, int], merges: list[tuple[str, str]], letters: set[str]) -> None:
    """ValueError unless merges make symbols of the vocabulary, and all but single letters."""
    made = set()
    for a, b in merges:
        if not (a and b and {a, b, a + b} <= vocab.keys()):
            raise ValueError(f"the merge of {a!r} and {b!r} is not in the vocabulary")
        made.add(a + b)
    # A download of merges.txt that was cut short would split words otherwise than in training.
    missing = [s for s in vocab if s not in made and s.removesuffix("</w>") not in letters]
    if missing:
        raise ValueError(f"{len(missing)} symbols, such as {missing[0]!r}, are made by no merge")
