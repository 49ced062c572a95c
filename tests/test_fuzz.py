"""Some cases of tests/fuzz.py: damaged inputs are refused in one line, or used rightly."""

import mmap
import os
import random
import signal

import pytest

from tests import fuzz, fuzz_base, fuzz_kinds

CASES = 20  # of each kind


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return fuzz_base.build(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", fuzz_kinds.KINDS)
def test_damaged_inputs(kind, base):
    results = fuzz.run({kind: fuzz_kinds.KINDS[kind]}, CASES, seed=1, base=base)
    assert not fuzz.faults(results), "\n".join(fuzz.faults(results))
    assert sum(map(len, results[kind].values())) == CASES


def test_faults_are_seen(base, monkeypatch):
    """A wrong load, a traceback, too much memory and a killed process do not pass."""
    monkeypatch.setattr(fuzz, "MEMORY", 2**26)

    def faulty(draw: random.Random, base, work):
        def attempt():
            action = draw.randrange(5)
            if action == 0:
                raise ValueError("refused")
            if action == 1:
                raise KeyError("a traceback")
            if action == 2:
                fuzz_kinds.expect(False, "a wrong load")
            if action == 3:
                # Not from the heap, which may have as much to spare from the tests before.
                pages = mmap.mmap(-1, 2**27)
                for start in range(0, 2**27, mmap.PAGESIZE):
                    pages[start] = 1
            if action == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        return attempt

    outcomes = fuzz.run({"faulty": faulty}, 30, seed=0, base=base)["faulty"]
    assert set(outcomes) == {"refused", "traceback", "wrong", "memory"}
    assert len(fuzz.faults({"faulty": outcomes})) == 30 - len(outcomes["refused"])


def test_damage_is_of_every_kind():
    draw = random.Random(0)
    content = {"a": [1, 2, {"b": "x"}], "c": 2.5, "d": None}
    damaged = [fuzz.damage_json(draw, content) for _ in range(500)]
    assert content == {"a": [1, 2, {"b": "x"}], "c": 2.5, "d": None}
    assert {type(each.get("c")) for each in damaged if isinstance(each, dict)} >= {
        int, float, str, bool, list, dict, type(None)
    }  # fmt: skip
    assert any(isinstance(each, dict) and "c" not in each for each in damaged)
    assert any(isinstance(each, dict) and len(each) > 3 for each in damaged)
    data = bytes(range(200))
    sizes = {len(fuzz.damage_bytes(draw, data)) - len(data) for _ in range(500)}
    assert min(sizes) < -100 and {-1, 0, 1} <= sizes
