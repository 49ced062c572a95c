"""Streams of examples, and a loader that makes batches of them which a resumed run continues."""

import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from common.files import first_difference, read_lines
from training.listing import BAD, CUT, NO_CAPTION, LeftOut, digest, printable

PREFETCHED_BATCHES = 2


# ------------------------------------------------------------------------------------------ streams
#
# A stream deals its examples out to the ranks, so that all together meet each once an epoch. Its
# place is an epoch and a number of entries into that epoch's order; the order follows from the
# seed, so the place is all a resumed run needs.


@dataclass(frozen=True)
class Entry:
    """One entry of a stream's order, and the place behind it.

    source: whatever the stream's example() needs; None marks the end of an epoch. problems: what
    was found broken on the way to this entry: (reason to count, message) by name. is_counted: in
    the first epoch, in which the ranks meet each example once.
    """

    epoch: int
    drawn: int
    source: object = None
    problems: dict[str, tuple[str, str]] = field(default_factory=dict)
    is_counted: bool = True


class BadExample(Exception):
    """(name, reason to count, message) of an example that the run leaves out, and goes on."""


class Stream:
    """The share of one rank in a data set; a Loader makes batches of it.

    walk(epoch, drawn) yields one Entry after another from that place on. example(entry) reads one,
    in many threads at once; BadExample skips it, any other error ends the run; an example may hold
    "notes", (reason to count, message) each. identity: all that its order depends on, which a
    resumed run compares. left_out: how many were from the start, by reason; missing: how many of
    those are broken examples. lines: what a user is told at the start.
    """

    def __init__(self, path, batch_size: int, seed: int, rank: int, world: int):
        self.path, self.batch_size = Path(path).resolve(), batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.identity = {"seed": seed, "rank": rank, "world": world}
        self.left_out, self.missing, self.lines = {}, 0, []


class ListStream(Stream):
    """A list's rows 0 .. self.rows - 1, in shuffled epochs without end; order(epoch) shuffles."""

    def walk(self, epoch: int, drawn: int) -> Iterator[Entry]:
        # The ranks share out one endless list of epochs, so each has examples even where there
        # are more ranks than rows. `drawn` counts through all of it, as if it were one epoch.
        order = lru_cache(1)(self.order)
        for i in count(drawn):
            list_epoch, place = divmod(self.rank + i * self.world, self.rows)
            row = order(list_epoch)[place]
            yield Entry(epoch, i + 1, row, is_counted=list_epoch == 0)


class Prompts(ListStream):
    """Examples: captions and names, of a file with a prompt a line; ValueError if it has none."""

    def __init__(self, path, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(path, batch_size, seed, rank, world)
        self.prompts = read_lines("--data", self.path)
        self.rows = len(self.prompts)
        self.identity["prompts"] = f"{self.rows} ({digest(self.prompts)})"
        self.lines = [f"{self.path}: {self.rows} prompts"]

    def order(self, epoch: int) -> list[int]:
        return random.Random(f"{self.seed}/{epoch}").sample(range(self.rows), self.rows)

    def example(self, entry: Entry) -> dict:
        return {"captions": self.prompts[entry.source], "names": f"prompt {entry.source + 1}"}


# ------------------------------------------------------------------------------------------ loaders
#
# Threads decode: pillow and numpy release the interpreter's lock, so two threads decode as fast as
# two processes do. Another thread walks the stream, collates and pins batches ahead of training.


def _check_position(position, identity: dict) -> None:
    """ValueError unless a value that was read from JSON is a place in the stream so identified."""
    advice = "begin with another --output and --cache"
    try:
        numbers = [position["epoch"], position["drawn"], *position["left_out"].values()]
        is_place = all(type(number) is int and number >= 0 for number in numbers)
    except (TypeError, KeyError, AttributeError):
        is_place = False
    if not is_place:
        damage = "the run's place in its data is damaged, or of an earlier version"
        raise ValueError(f"{damage}: {advice}")
    place = ("epoch", "drawn", "left_out")
    if differ := first_difference(position, identity, may_change=place):
        message = f"the run so far read its data with {differ}"
        raise ValueError(f"{message}: go on with the same, or {advice}")


class Loader(Iterator):
    """A stream's batches in the stream's order, whatever the number of decoding threads.

    tail: what of a caption the text encoders have no room for, which is counted as CUT.
    position: JSON-able, from where another Loader goes on behind the last batch. left_out: how many
    examples, shards and files were, by reason, in the run's first epoch and, on rank 0, before
    reading: a sum over the ranks counts each once. bad: the broken ones among them.
    ValueError if position is of another stream, or where more than max_bad that this rank met since
    it began are broken.
    """

    def __init__(
        self, dataset: Stream, workers: int, max_bad=1000, position: dict | None = None,
        tail: Callable[[str], str] = lambda caption: "",
    ):  # fmt: skip
        if position is None:
            left_out = {} if dataset.rank else dataset.left_out
            position = {**dataset.identity, "epoch": 0, "drawn": 0, "left_out": left_out}
        _check_position(position, dataset.identity)
        self.position = position
        self.dataset, self.workers, self.max_bad, self.tail = dataset, workers, max_bad, tail
        # The collating thread counts, a few batches ahead of self.position.
        self.counts = Counter(position["left_out"])
        # What this rank met since it began, and the broken ones by name.
        self.met, self.problems, self.first_problem = LeftOut(), {}, ""
        self.broken = dataset.missing
        self._check_broken(f"{dataset.missing} {NO_CAPTION}")
        self.batches = self._batches(dataset.walk(self.position["epoch"], self.position["drawn"]))
        self.prefetched = deque()
        use_gpu = None
        if torch.cuda.is_available():
            # A new thread begins on GPU 0, where pinning would open a second context.
            use_gpu = partial(torch.cuda.set_device, torch.cuda.current_device())
        # One thread, because a generator can be advanced by one at a time only.
        self.collator = ThreadPoolExecutor(1, initializer=use_gpu)
        self.decoders = ThreadPoolExecutor(workers)

    def __next__(self) -> dict:
        batch = {}
        # A single pass may end with bad examples alone.
        while "names" not in batch:
            while len(self.prefetched) <= PREFETCHED_BATCHES:
                self.prefetched.append(self.collator.submit(next, self.batches))
            batch = self.prefetched.popleft().result()
            self.position = {**self.position, **batch.pop("place")}
        return batch

    @property
    def left_out(self) -> Counter:
        return Counter(self.position["left_out"])

    @property
    def bad(self) -> int:
        return sum(number for reason, number in self.left_out.items() if reason in BAD)

    def _batches(self, entries: Iterator[Entry]) -> Iterator[dict]:
        """Collated examples, with "place" as it is behind the last of them."""
        examples, empty_epochs = [], 0
        for entry, future in self._decoded(entries):
            for name, problem in entry.problems.items():
                self._count(entry, name, *problem)
            try:
                if future is None:
                    empty_epochs += 1
                else:
                    example = future.result()
                    for note in example.pop("notes", []):
                        self._count(entry, example["names"], *note, verb="")
                    examples.append(example)
                    empty_epochs = -1  # 0 at the end of this epoch
            except BadExample as problem:
                self._count(entry, *problem.args)
            # In one of two such blocks this rank has met every example there is.
            if empty_epochs == 2 * self.dataset.world:
                first = f"; the first problem: {self.first_problem}" if self.first_problem else ""
                where = f"no usable example in {self.dataset.path}"
                raise ValueError(f"{where}; left out: {self.met}{first}")
            if len(examples) == self.dataset.batch_size:
                yield self._collate(examples, entry)
                examples = []
        yield self._collate(examples, entry)

    def _decoded(self, entries: Iterator[Entry]) -> Iterator[tuple[Entry, Future | None]]:
        """Each entry with its example to come, or with None at the end of an epoch."""
        pending = deque()
        while True:
            for entry in islice(entries, 2 * self.workers - len(pending)):
                is_end = entry.source is None
                example = None if is_end else self.decoders.submit(self._read, entry)
                pending.append((entry, example))
            if not pending:
                return
            yield pending.popleft()

    def _read(self, entry: Entry) -> dict:
        example = self.dataset.example(entry)
        if tail := self.tail(example.get("captions", "")):
            message = f"its caption is cut before {tail[:40]!r}"
            example.setdefault("notes", []).append((CUT, message))
        return example

    def _collate(self, examples: list[dict], entry: Entry) -> dict:
        batch = default_collate(examples) if examples else {}
        # Copies to a GPU overlap with its work only from pinned memory.
        if torch.cuda.is_available():
            for key, value in batch.items():
                batch[key] = value.pin_memory() if isinstance(value, Tensor) else value
        place = {"epoch": entry.epoch, "drawn": entry.drawn, "left_out": dict(self.counts)}
        return {**batch, "place": place}

    def _count(self, entry: Entry, name: str, reason: str, message: str, verb="skipped ") -> None:
        """Count what is left out once, name the first of each reason, and end if too many broke."""
        # --max-bad limits the broken ones, so their names fit in memory, unlike those of millions
        # that are too small, say: of these later epochs have no news.
        if name in self.problems or not (entry.is_counted or reason in BAD):
            return
        # In later epochs another rank has counted it.
        if entry.is_counted:
            self.counts[reason] += 1
        problem = f"{printable(name)}: {message}"
        if self.met.add(reason, name):
            tqdm.write(f"{verb}{problem}", file=sys.stderr)
        if reason in BAD:
            self.problems[name] = message
            self.first_problem = self.first_problem or problem
            self.broken += 1
            self._check_broken(self.first_problem)

    def _check_broken(self, first: str) -> None:
        if self.broken > self.max_bad:
            bad = f"{self.broken} broken examples or shards in {self.dataset.path}"
            raise ValueError(f"{bad}, more than --max-bad allows; the first: {first}")
