"""What the scripts share: errors in one clear line, checked flags, files that are never half."""

import argparse
import contextlib
import math
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

# A user sees one line, in the words of the flag or file that is at fault, and exit code 2.


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line; every flag's default stands in --help."""

    def __init__(self, description: str):
        shown = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=shown, allow_abbrev=False)

    def error(self, message: str):
        # argparse would print the whole usage first.
        sys.exit(_one_line(f"{message} (see --help)"))


def run(main, parser: Parser) -> None:
    """main(args), with what a user can mend said in one line on stderr, and exit code 2."""
    try:
        main(parser.parse_args())
    # ValueError is what this project raises for input that cannot be used.
    except (ValueError, OSError, SafetensorError) as problem:
        sys.exit(_one_line(problem))
    except KeyboardInterrupt:
        _one_line("interrupted; what was finished is kept")
        sys.exit(130)


def _one_line(problem) -> int:
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(problem).split())}", file=sys.stderr)
    return 2


def number(kind=float, low=-math.inf, high=math.inf):
    """An argparse type: a finite number of this kind, no less than low and no more than high."""

    def parse(words: str):
        # "nan" compares as false and is refused by the same line as what is out of range.
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(words)
            if low <= value <= high and math.isfinite(value):
                return value
        name = "a whole number" if kind is int else "a number"
        at_least = f" of at least {low:g}" if low > -math.inf else ""
        at_most = f" of at most {high:g}" if high < math.inf else ""
        limits = " and".join(filter(None, (at_least, at_most)))
        raise argparse.ArgumentTypeError(f"{name}{limits} is needed, not {words!r}")

    return parse


def check_device(device: str) -> None:
    """ValueError if nothing can be computed on the device of --device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is visible here; use --device cpu")
    # Whatever the name, a device that cannot hold a number is none.
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {device} cannot be used here; use cpu or cuda") from None
