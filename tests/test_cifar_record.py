"""docs/cifar.json against what the docs say: tables, and claims in bold."""

import json
from pathlib import Path

import numpy as np
import pytest

from cifar import train as cifar_train
from common.compare import W_ADDED
from tests.helpers import read_table

HERE = Path(__file__).parent.parent
W = 2.0

NAMES = {
    "teacher, guided DDIM": "teacher", "CM / LCM": "cm", "PCM-4": "pcm4", "TCD / CTM": "tcd",
    "TDD": "tdd", "TDD, eta = 0": "tdd_eta0", "TDD, adversarial": "tdd_adv",
    "TCD, TCF(2)": "tcd2", "TCD, TCF(S+)": "tcds", "TDD, TCF(S+)": "tdds",
    "TDM-4": "tdm4", "TDM-unify (1, 2, 4)": "tdm_unify",
}  # fmt: skip

PAPERS = ["cm", "pcm4", "tcd", "tdd_eta0", "tdd", "tdd_adv"]  # the comparison of its Table 1


@pytest.fixture(scope="module")
def figure():
    """The figures of docs/cifar.json by method, number of steps and metric.

    All of that run's settings are the parser's defaults but for one.
    """
    result = json.loads((HERE / "docs" / "cifar.json").read_text())
    settings = vars(cifar_train.parser().parse_args([])) | {"dtype": "bf16"}
    # The record is of before the students beyond the papers, and their repeats.
    settings = {
        k: str(v) for k, v in settings.items() if k not in ("methods", "repeats", "walkers")
    }
    assert {
        k: v for k, v in result["settings"].items() if k not in ("torch", "methods")
    } == settings
    assert {row["n"] for row in result["rows"]} == {2000}

    def figure(method, k, metric, part="value", **more):
        case = {"method": method, "k": k, "gamma": 0.0, "schedule": "equidistant", "tune": None,
                "w": W if method == "teacher" else 0.0, "clip_steps": k, **more}  # fmt: skip
        (row,) = [row for row in result["rows"] if case.items() <= row.items()]
        return row[metric][part]

    return figure


def over_k(figure, metric):
    """Each method's figures from 4 to 8 steps at gamma = 0."""
    return {m: np.array([figure(m, k, metric) for k in range(4, 9)]) for m in NAMES.values()}


@pytest.mark.parametrize("metric", ["rmse", "frechet_teacher"])
def test_distances_are_what_the_docs_say(figure, metric):
    """What holds, and what does not; one training each, so without more slack than sampling has."""
    by = over_k(figure, metric)
    tdd, tdds = by["tdd"], by["tdds"]
    assert tdd[0] < 0.8 * by["teacher"][0] and tdd[4] > by["teacher"][4]
    assert (tdd < by["tcd"]).all() and (tdd < by["cm"]).all()
    assert (np.diff(tdd) > 0).all() and (by["pcm4"] < tdd).all()
    rivals = by.keys() - {"teacher", "tdd_eta0"}
    assert all((by["tdd_eta0"] < by[m]).all() for m in rivals)
    assert (np.diff(tdds) < np.diff(tdd)).all() and tdds[4] < 0.85 * tdd[4]
    clipped = [figure("tdd", 4, metric, clip_steps=n) for n in (4, 1, 0)]
    assert clipped == sorted(clipped)


def test_noise_between_the_steps_is_what_the_docs_say(figure):
    for k in (4, 6, 8):
        tdd, *others = (
            figure(m, k, "frechet_teacher", gamma=0.2) for m in ("tdd", "teacher", "tcd", "cm")
        )
        assert tdd < min(others)


def test_schedules_and_guidance_are_what_the_docs_say(figure):
    for k in (5, 6, 7):
        other = figure("tdd", k, "frechet_teacher", schedule="nonequidistant")
        assert other < 0.8 * figure("tdd", k, "frechet_teacher")
    for w in (0.0, *W_ADDED):
        with_null, without = (figure(m, 4, "accuracy", w=w) for m in ("tdd", "tdd_rho0"))
        assert abs(with_null - without) < 0.01


def test_accuracy_and_distance_to_the_data_are_what_the_docs_say(figure):
    data, accuracy = over_k(figure, "frechet_data"), over_k(figure, "accuracy")
    for rival in ("tcd", "cm"):
        assert (data["tdd"] < data[rival]).all() and (accuracy["tdd"] > accuracy[rival]).all()
    assert figure("teacher", 50, "accuracy") > 0.70
    assert figure("teacher", 50, "frechet_data") < 31 * figure("real", 0, "frechet_data")
    assert data["tdd"][0] < data["teacher"][4]
    assert all(accuracy["teacher"][0] > accuracy[m].max() for m in PAPERS)
    many = figure("teacher", 50, "accuracy") - figure("teacher", 50, "accuracy", "error")
    assert accuracy["tdm4"][0] > many and figure("tdm_unify", 2, "accuracy") > many


def test_the_tables_are_the_measured_run(figure):
    def same(cells, columns, method):
        """Every cell to its last digit, and the error behind it where there is one."""
        for cell, (metric, k, gamma) in zip(cells, columns, strict=True):
            for shown, part in zip(cell.split(" ± "), ("value", "error"), strict=False):
                value = figure(method, k, metric, part, gamma=gamma)
                digit = 10.0 ** -len(shown.split(".")[1])
                assert float(shown) == pytest.approx(value, abs=0.51 * digit)

    ks = (1, 2, 4, 5, 6, 7, 8)
    data = "Fréchet distance to the training pictures"
    metrics = ("frechet_data", "accuracy", "png_bits")
    tables = {
        "Distance (rmse, x_0 in": [("rmse", k, 0.0) for k in ks],
        "Fréchet distance to the same samples": [("frechet_teacher", k, 0.0) for k in ks],
        data: [(metric, k, 0.0) for metric in metrics for k in (4, 8)],
        "With gamma = 0.2, Fréchet": [
            (metric, k, 0.2)
            for metric in ("frechet_teacher", "frechet_data", "accuracy") for k in (4, 6, 8)
        ],
    }  # fmt: skip
    # Of the third, these have a figure for their own number of steps alone.
    others = {f"teacher, {k} steps": ("teacher", k) for k in (25, 50)}
    others["test pictures"] = "real", 0
    for after, columns in tables.items():
        found = read_table("docs/results-cifar10.md", after)
        for row, method in NAMES.items():
            same(found.pop(row), columns, method)
        for row, (method, k) in others.items() if after == data else ():
            same(filter(None, found.pop(row)), [(metric, k, 0.0) for metric in metrics], method)
        assert not found
