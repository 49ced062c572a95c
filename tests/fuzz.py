"""Damaged inputs of every kind, seeded, each tried in a process of its own: what comes of them.

    python -m tests.fuzz --cases 2000
    python -m tests.fuzz --kinds configs --only 17     # one case, with its traceback

A damaged input is refused in one line (an error that common/cli.run prints) or is used rightly: as
if undamaged, or as an independent reader takes it; tests/fuzz_kinds.py says for each kind what that
is. A traceback, a wrong load, a GiB more memory or a minute is a fault; then the exit code is 1.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

MEMORY = 2**30  # bytes above what the process begins with
SECONDS = 60
OUTCOMES = ("refused", "right", "traceback", "wrong", "memory", "time")


class WrongLoadError(AssertionError):
    """A damaged input was accepted, and its meaning is another."""


# ------------------------------------------------------------------------------------------- damage

NUMBERS = [0, -1, 1, 2, 3, 7, 64, 10**4, 10**9, 10**12, 10**40, 2.0, 0.5, -0.0, 1e-300, 1e308]
NUMBERS += [float("nan"), float("inf"), -float("inf"), True, False]
STRINGS = [
    "",
    "2",
    "x",
    "gelu",
    "epsilon",
    "None",
    "é\n",
    "\ud800",
    "x" * 10**5,
    "../../etc",
    "[1]",
]


def any_json(draw: random.Random, depth: int = 0):
    """A value of any JSON type and size."""
    kind = draw.randrange(6 if depth < 3 else 3)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind == 2:
        return draw.choice([*STRINGS, None])
    size = draw.choice([0, 1, 2, 3, 4, 99])
    if kind == 3:
        return [any_json(draw, depth + 1) for _ in range(size)]
    if kind == 4:
        return [any_json(draw, 3)] * size
    return {draw.choice(STRINGS): any_json(draw, depth + 1) for _ in range(size)}


def damage_json(draw: random.Random, content):
    """A copy of a JSON value with one entry changed, removed, added, doubled or wrapped."""
    content = json.loads(json.dumps(content))
    whole = {"": content}
    parent, key = whole, ""
    while isinstance(value := parent[key], dict | list) and value:
        if parent is not whole and draw.random() < 0.6:
            break
        parent, key = (
            value,
            draw.choice([*(value if isinstance(value, dict) else range(len(value)))]),
        )
    action = draw.choice(["change"] * 6 + ["remove", "wrap", "add", "number"])
    if action == "remove" and parent is not whole:
        del parent[key]
    elif action == "wrap":
        parent[key] = draw.choice([[value], {"a": value}, [value, value], str(value)])
    elif action == "add" and isinstance(content, dict):
        content[draw.choice(STRINGS)] = any_json(draw)
    elif action == "number" and type(value) in (int, float):
        parent[key] = draw.choice(
            [value + 1, value - 1, 2 * value, -value, float(value), str(value)]
        )
    else:
        parent[key] = any_json(draw)
    return whole[""]


def write_json(draw: random.Random, path: Path, content) -> None:
    """JSON as programs write it, or broken as text."""
    text = json.dumps(content, ensure_ascii=draw.random() < 0.9)
    data = text.encode("utf-8", "surrogatepass")
    action = draw.random()
    if action < 0.06:
        data = damage_bytes(draw, data)
    elif action < 0.1:
        data = draw.choice([text.encode("utf-16", "surrogatepass"), b"\xef\xbb\xbf" + data])
    path.write_bytes(data)


FOREIGN = [
    b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", b"<!DOCTYPE html>",
    b"PK\x03\x04" + bytes(99), b"\x80\x02}q\x00.", b"[" * 10**5, b"null", b"[]", b"7", bytes(4096),
    b'{"a": ' * 10**4, b"\xff" * 99, b"GGUF" + bytes(99), b'"x"', b"{}",
]  # fmt: skip


def damage_bytes(
    draw: random.Random, data: bytes, first: int = 0, last: int | None = None
) -> bytes:
    """Bytes cut off, changed, inserted, left out, or something else; between first and last."""
    last = len(data) if last is None else min(last, len(data))
    at = draw.randrange(first, max(last, first + 1))
    size = min(draw.choice([1, 1, 2, 8, 100]), max(last - at, 1))
    noise = draw.choice([draw.randbytes(size), bytes(size), b"\xff" * size, b"9" * size])
    action = draw.randrange(8)
    if action == 0:
        return data[:at]
    if action == 1:
        return draw.choice(FOREIGN)
    if action == 2:
        return data[:at] + noise + data[at:]
    if action == 3:
        return data[:at] + data[at + size :]
    if action == 4:
        return data + data[at:last]
    if action == 5 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    return data[:at] + noise + data[at + size :]


# ------------------------------------------------------------------------------------------- a case
#
# In a fork of this process, with torch imported and the undamaged files read: so a case costs
# hundredths of a second, and whatever it does ends with it.


def run_case(kind: str, attempt_of, seed: int, number: int, base) -> tuple[str, str]:
    """One case's outcome and message."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        message = _run_in_child(kind, attempt_of, seed, number, base)
        os.write(write_end, json.dumps(message).encode()[:60_000])
        os._exit(0)
    os.close(write_end)
    answer, end = b"", time.monotonic() + SECONDS
    while select.select([read_end], [], [], max(end - time.monotonic(), 0))[0]:
        if not (part := os.read(read_end, 2**16)):
            break
        answer += part
    os.close(read_end)
    if not answer and time.monotonic() >= end:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "time", f"longer than {SECONDS} s"
    _, status = os.waitpid(child, 0)
    if not answer:
        return "memory", f"the process ended with status {status}"
    return tuple(json.loads(answer))


def _run_in_child(kind: str, attempt_of, seed: int, number: int, base) -> tuple[str, str]:
    from safetensors import SafetensorError

    warnings.simplefilter("ignore")
    draw = random.Random(f"{seed}/{kind}/{number}")
    with tempfile.TemporaryDirectory(dir=base.root) as work:
        try:
            attempt = attempt_of(draw, base, Path(work))
        except Exception:
            return "traceback", f"while the damage is made: {traceback.format_exc()}"
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 3 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome, message = "right", ""
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                attempt()
        except WrongLoadError as problem:
            outcome, message = "wrong", str(problem)
        except (ValueError, OSError, SafetensorError) as problem:
            outcome, message = "refused", str(problem)
        except BaseException as problem:
            out_of_memory = isinstance(problem, MemoryError) or "allocate memory" in str(problem)
            outcome = "memory" if out_of_memory else "traceback"
            message = traceback.format_exc()
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > MEMORY / 1024:
            outcome, message = "memory", f"more than a GiB, then {outcome}: {message}"
    return outcome, message[-20_000:]


def run(kinds: dict, cases: int, seed: int, base, only: int | None = None) -> dict:
    """kind -> outcome -> [(case, message)], of so many cases of each kind."""
    results = {kind: defaultdict(list) for kind in kinds}
    for kind, attempt_of in kinds.items():
        for number in range(cases) if only is None else [only]:
            outcome, message = run_case(kind, attempt_of, seed, number, base)
            results[kind][outcome].append((number, message))
    return results


def faults(results: dict) -> list[str]:
    """A line for each case that is a fault."""
    lines = []
    for kind, outcomes in results.items():
        for outcome in OUTCOMES[2:]:
            for number, message in outcomes[outcome]:
                lines.append(f"{kind} {number}: {outcome}: {message.strip()}")
    return lines


# --------------------------------------------------------------------------------------------- main


def print_report(results: dict, whole: bool) -> None:
    """A row for each kind, then each different fault once."""
    print(f"{'kind':22}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    total = Counter()
    for kind, outcomes in results.items():
        counts = Counter({outcome: len(outcomes[outcome]) for outcome in OUTCOMES})
        total += counts
        print(f"{kind:22}" + "".join(f"{counts[outcome]:>11}" for outcome in OUTCOMES))
    print(f"{'all':22}" + "".join(f"{total[outcome]:>11}" for outcome in OUTCOMES))
    seen = Counter()
    for line in faults(results):
        # The same place in the code counts as the same fault.
        last_place = re.findall(r'File "[^"]*/([^"/]*)", line (\d+)', line)[-1:]
        key = str(last_place) + line.splitlines()[-1][:60]
        seen[key] += 1
        if seen[key] == 1:
            rows = line.splitlines() if whole else [line.splitlines()[0], *line.splitlines()[-4:]]
            print("\n" + "\n".join(row[: 10_000 if whole else 250] for row in dict.fromkeys(rows)))


def main() -> None:
    from tests import fuzz_base, fuzz_kinds

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="number of cases of all kinds")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--kinds", nargs="+", choices=fuzz_kinds.KINDS, help="kinds to try: all")
    parser.add_argument("--only", type=int, metavar="N", help="case of a kind to try alone")
    args = parser.parse_args()
    kinds = {name: fuzz_kinds.KINDS[name] for name in args.kinds or fuzz_kinds.KINDS}
    with tempfile.TemporaryDirectory() as root:
        base = fuzz_base.build(Path(root))
        results = run(kinds, -(-args.cases // len(kinds)), args.seed, base, args.only)
    print_report(results, whole=args.only is not None)
    sys.exit(bool(faults(results)))


if __name__ == "__main__":
    # As the kinds know it: WrongLoadError of this file run as a program would be another class.
    from tests.fuzz import main

    main()
