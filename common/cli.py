"""Command lines: errors in one clear line, flags with checked numbers, a usable device."""

import argparse
import contextlib
import math
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

# A user sees one line, in the words of the flag or file that is at fault, and exit code 2.


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default that says something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, and shows every flag's default in --help."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str):
        # argparse would print the whole usage first.
        sys.exit(_print_error(f"{message} (see --help)"))


def run(main, parser: Parser) -> None:
    """main(args); an error that a user can mend becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A prompt in a terminal that lacks its letters is no reason to stop.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main(parser.parse_args())
    # This project raises ValueError for input that cannot be used.
    except (ValueError, OSError, SafetensorError) as problem:
        sys.exit(_print_error(problem))
    except (RuntimeError, MemoryError) as problem:
        if "Connection closed by peer" in str(problem):
            sys.exit(_print_error("another process of this run has ended, and says why"))
        if not is_out_of_memory(problem):
            raise
        sys.exit(_print_error(f"out of memory: {memory_advice(parser)} ({problem})"))
    except KeyboardInterrupt:
        _print_error("interrupted; what was finished is kept")
        sys.exit(130)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether a GPU's memory or the machine's is exhausted, in any of torch's ways to say so."""
    signs = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")
    is_memory_error = isinstance(problem, (MemoryError, torch.OutOfMemoryError))
    return is_memory_error or any(sign in str(problem) for sign in signs)


# What takes less memory, as far as a program has the flag.
LESS_MEMORY = {
    "--batch-size": "lower", "--resolution": "lower", "--height": "lower", "--width": "lower",
    "--low-memory": "add", "--checkpointing": "keep", "--cache": "add", "--rank": "lower",
}  # fmt: skip


def check_uses(args, parser: Parser, uses: dict[str, tuple[str, bool]]) -> None:
    """ValueError for a flag without use; uses: what each is for, and whether there is that."""
    flags = {a.dest: a.option_strings[0] for a in parser._actions if a.option_strings}
    for name, (what, is_there) in uses.items():
        if not is_there and getattr(args, name) != parser.get_default(name):
            raise ValueError(f"{flags[name]} is for {what}: leave it away")


def memory_advice(parser: Parser) -> str:
    """The flags of a program that make it take less memory."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    advice = [f"{verb} {flag}" for flag, verb in LESS_MEMORY.items() if flag in flags]
    return ", ".join(advice) or "close other programs, or use a machine with more"


def _print_error(problem) -> int:
    """Prints the problem in one line, and returns the exit code."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(problem).split())}", file=sys.stderr)
    return 2


def number(kind=float, low=-math.inf, high=math.inf):
    """An argparse type: a finite int or float, no less than low and no more than high."""

    def parse(text: str):
        # "nan" compares as false, so the same line refuses it and what is out of range.
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if low <= value <= high and math.isfinite(value):
                return value
        name = "a whole number" if kind is int else "a number"
        limits = [f" of at least {low:g}"] if low > -math.inf else []
        limits += [f" of at most {high:g}"] if high < math.inf else []
        raise argparse.ArgumentTypeError(f"{name}{' and'.join(limits)} is needed, not {text!r}")

    return parse


positive_int, count = number(int, 1), number(int, 0)
share, non_negative = number(float, 0, 1), number(float, 0)
below_1 = number(float, 0, 0.999999)  # of a moving average, which at 1 would stay where it began


def check_device(device: str) -> None:
    """ValueError if nothing can be computed on the device of --device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is visible here; use --device cpu")
    # A device that cannot hold a number and give it back ("meta", say) is unusable.
    try:
        torch.empty(1, device=device).cpu()
    # Some kinds of device belong to packages that are not there.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(f"--device {device} cannot be used here; use cpu or cuda") from None
