"""The benchmarks on tiny sizes: what they write, what they count and what follows from it."""

import importlib
import json
import math
import os
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import bench
import solvers
from benchmarks import data, gpu
from benchmarks.data import Rate
from benchmarks.measure import BenchConfig, Report, count_kernels, errors
from tests import helpers
from tests.gpu_checks import count_waits
from training.cache import Cached
from training.images import Images
from training.streams import Loader

# ------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A --dir with five photos of the real size, to be read at 64 pixels in batches of two."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PHOTOS": 5, "TARS": 2, "RESOLUTION": 64, "BATCH_SIZE": 2}.items():
            patch.setattr(data, name, value)
        folder = tmp_path_factory.mktemp("bench")
        data.write_data(folder / "data")
        yield folder


def test_the_data_is_of_real_size_and_written_once(folder):
    folder = folder / "data"
    photos = sorted((folder / "photos").glob("*.jpg"))
    contents = {p.name: p.read_bytes() for p in (folder / "photos").iterdir()}
    assert len(photos) == 5 and len(contents) == 10 and len(set(contents.values())) == 10
    for path in photos:
        assert Image.open(path).size == (1600, 1200) and 300e3 < path.stat().st_size < 600e3
    members = {}
    for path in (folder / "tars").iterdir():
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    assert members == contents
    row = next(Loader(Cached(folder / "cache", 5, 0), 1))
    shapes = {key: (row[key].shape[1:], row[key].dtype) for key in row if key != "names"}
    assert shapes == {
        "latents": ((4, 128, 128), torch.float32), "pooled": ((1280,), torch.float16),
        "prompt_embeds": ((77, 2048), torch.float16), "time_ids": ((6,), torch.int64),
    }  # fmt: skip
    assert sorted(row["names"]) == [path.name for path in photos]
    written = [p for p in folder.rglob("*") if p.suffix in (".jpg", ".tar", ".safetensors")]
    times = {path: path.stat().st_mtime_ns for path in written}
    photos[2].unlink()
    data.write_data(folder)
    # A photo follows from its number.
    assert photos[2].read_bytes() == contents[photos[2].name]
    changed = [path for path, before in times.items() if path.stat().st_mtime_ns != before]
    assert len(times) == 8 and changed == [photos[2]]


def test_every_call_counts_the_images_that_it_reads(folder, monkeypatch):
    decoded, example = [], Images.example

    def counted(dataset, entry):
        decoded.append(entry.source[0])
        return example(dataset, entry)

    monkeypatch.setattr(Images, "example", counted)
    calls = data.make_calls(folder / "data")
    loose = [f"{i:04}.jpg" for i in range(5)]
    shards = [f"{i % 2:04}.tar/{i:04}" for i in range(5)]
    names = {"tars": shards, "cache": [], "JPEG decoding alone": []}
    for name, call in calls.items():
        for workers in (1, 2):
            decoded.clear()
            # The cache is read in 300 batches of two.
            assert call(workers=workers) == (600 if name == "cache" else 5)
            assert sorted(decoded) == sorted(names.get(name, loose))


def test_the_table_agrees_with_itself(folder, capsys):
    data.bench_data(BenchConfig("data", "cpu", rounds=1, dir=folder))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("64 pixels, batch 2, ") and len(lines) == 3 + 2 * 6
    for line in lines[3:]:
        workers, images_s, per_worker, cpu_ms, one, eight = map(float, line[20:].split())
        assert math.isclose(workers * per_worker, images_s, abs_tol=0.2)
        # The table rounds to 0.1.
        assert math.ceil(7 / (per_worker + 0.1)) <= one <= math.ceil(7 / (per_worker - 0.1))
        assert eight == 8 * one and cpu_ms > 0


def test_rates_follow_from_the_clock_and_workers_from_the_rates():
    def nap(workers):
        time.sleep(0.1 / workers)
        return 10

    rates = data.measure_data({"nap": nap}, 3)
    for workers in (1, 2):
        rate = rates["nap", workers]
        # A sleeper is never early, and takes no CPU time.
        assert 25 < rate.per_worker <= 100 and rate.images == 10
        assert rate.cpu_seconds < 0.05
    for images, needed in ((6, 2), (7, 1), (8, 1), (1, 7), (0.5, 14), (40, 1)):
        assert Rate(1, images, 1.0, 0.0).needed == Rate(2, images, 0.5, 0.0).needed == needed


# -------------------------------------------------------------------------------------------- gpu


def good(config, report):
    report.save(answer=1 / 3, nothing=math.nan, device=config.device)


def broken(config, report):
    with report.part("part") as figures:
        figures["before"] = 1
        raise RuntimeError("in a part")
    with report.part("next"):
        pass
    raise ValueError("outside of one")


def endless(config, report):
    report.save(child=subprocess.Popen(["sleep", "1000"]).pid)
    time.sleep(1000)


def dying(config, report):
    report.save(before=1)
    os._exit(3)


def is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_section_that_fails_or_hangs_leaves_its_figures_and_ends_no_other(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "CPU_FACTOR", 1)
    earlier = {"sections": {"good": {"stale": 1}, "other": {"x": 1}}}
    (tmp_path / "gpu.json").write_text(json.dumps(earlier))
    limits = {"endless": 12, "broken": 60, "dying": 60, "good": 60}
    sections = {name: (f"tests.test_bench:{name}", limit) for name, limit in limits.items()}
    failed = gpu.run_sections(BenchConfig("gpu", "cpu", out=tmp_path), sections)
    assert failed == ["endless", "broken", "dying"]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["machine"] == f"CPU, torch {torch.__version__}"
    content = report["sections"]
    seconds = {name: content[name].pop("seconds") for name in sections}
    assert 12 <= seconds["endless"] < 20 and all(0 < value < 60 for value in seconds.values())
    child = content["endless"].pop("child")
    assert not is_running(child)
    where = content["broken"].pop("error"), content["broken"]["part"].pop("error")
    assert where[0].startswith("ValueError: outside of one (test_bench.py:")
    assert where[1].startswith("RuntimeError: in a part (test_bench.py:")
    assert content == {
        "endless": {"error": "stopped after 12 s, its limit"},
        "broken": {"part": {"before": 1}, "next": {}},
        "dying": {"before": 1, "error": "ended with exit code 3"},
        "good": {"answer": 0.333333, "nothing": "NaN", "device": "cpu"}, "other": {"x": 1},
    }  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(sections)
    assert lines[3].endswith(" s  done") and "outside of one" in lines[1] and "a part" in lines[1]
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_figures_of_another_machine_are_not_written_over(tmp_path, monkeypatch, capsys):
    """Nor of other sizes, nor a file that is no report."""
    words = ["gpu", "--device", "cpu", "--tiny", "--only", "unet", "--out", tmp_path]
    path = tmp_path / "gpu.json"
    contents = {
        json.dumps({"machine": "NVIDIA H200, torch 2.13", "sections": {"unet": {"x": 1}}}):
            f"holds figures of NVIDIA H200, torch 2.13, not CPU, torch {torch.__version__}, tiny",
        json.dumps({"machine": f"CPU, torch {torch.__version__}", "sections": {}}): ", tiny: name",
        '{"a": 1}': "is no report of bench.py: name another --out",
        '{"sections": []}': "is no report of bench.py",
    }  # fmt: skip
    for content, said in contents.items():
        path.write_text(content)
        code, _, err = helpers.run(bench, monkeypatch, capsys, *words)
        assert (code, err.count("\n"), said in err) == (2, 1, True), err
        assert path.read_text() == content


@pytest.mark.slow
def test_a_cpu_agrees_with_itself_and_half_precision_nearly(tmp_path):
    config = BenchConfig("gpu", "cpu", out=tmp_path, tiny=True)
    assert not gpu.run_sections(config, {"correct": gpu.SECTIONS["correct"]})
    section = json.loads((tmp_path / "gpu.json").read_text())["sections"]["correct"]
    latents = [figures for name, figures in section.items() if name.startswith("latents")]
    steps = [figures for name, figures in section.items() if name.startswith("step: ")]
    assert len(latents) == 2 and len(steps) == 9
    for figures in latents:
        assert figures["float32"] == 0
        assert 2e-4 < figures["fp16"] < 4e-3 < figures["bf16"] < 0.05
    for figures in steps:
        exact, fp16, bf16 = (figures[dtype] for dtype in ("float32", "fp16", "bf16"))
        assert exact["loss_error"] == exact["gradient_error"] == 0 and exact["norm_ratio"] == 1
        assert 1e-3 < fp16["gradient_error"] < 0.05
        assert fp16["gradient_error"] < bf16["gradient_error"] < 0.5
        assert fp16["cosine"] > 0.999 and bf16["cosine"] > 0.9
        assert 2**8 <= fp16["loss_scale"] <= 2**16 and figures["loss"] > 0


def test_waits_are_counted_by_the_lines_that_cause_them(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def model(x_t, t):
        # What torch says in that mode, and what anything else may say.
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        return x_t

    def call():
        solvers.solve(model, torch.ones(1, 2), [999, 499, 0], solvers.sdxl_schedule())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = count_waits(BenchConfig("gpu", "cuda"), call)
    (lines,) = figures["lines"]
    assert figures == {"waits": 2, "lines": {lines: 2}} and modes == ["warn", "default"]
    # The model's own line, then what called it.
    here, *callers = lines.split(" < ")
    assert here.startswith("tests/test_bench.py:") and len(callers) == 2
    assert all(caller.startswith("solvers.py:") for caller in callers)


def test_every_section_is_a_function_that_its_process_can_import():
    for function, limit in gpu.SECTIONS.values():
        module, name = function.split(":")
        assert callable(getattr(importlib.import_module(module), name)) and limit > 0
    # Under seven minutes in all.
    assert sum(limit for _, limit in gpu.SECTIONS.values()) < 420


def test_the_command_line_imports_no_section_and_nothing_of_cifar():
    call = [sys.executable, "-X", "importtime", "bench.py", "--help"]
    done = subprocess.run(call, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "benchmarks" in modules
    assert not modules & {"cifar", "tests", "toy", "diffusers", "peft", "transformers"}


def test_a_report_without_a_file_prints_and_goes_on_after_an_error(capsys):
    report = Report()
    with report.part("first") as figures:
        figures["seconds"] = 1 / 3
        raise RuntimeError("in a part")
    with report.part("second") as figures:
        figures["seconds"] = 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("first: {'seconds': 0.333333, 'error': 'RuntimeError: in a part (")
    assert lines[1:] == ["second: {'seconds': 2}"]
    assert len(errors(report.figures)) == 1


def test_the_profiler_counts_and_a_full_size_run_on_a_cpu_is_refused(tmp_path):
    config = BenchConfig("gpu", "cpu", out=tmp_path)
    x = torch.ones(3)
    assert count_kernels(config, lambda: [x + x for _ in range(5)]) == {"operators": 5}
    with pytest.raises(ValueError, match="no kernels"):
        count_kernels(config, lambda: None)
    with pytest.raises(ValueError, match="a rehearsal: add --tiny"):
        gpu.bench_gpu(config, ["correct"])


# ----------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu", "--dtype", "bf16"], "--dtype is for unet, sample, train"),
        (["load", "--dtype", "bf16"], "--dtype is for unet, sample, train"),
        (["gpu", "--rounds", 2], "--rounds is for unet, sample, train, load, data"),
        (["data", "--profile"], "--profile is for"), (["gpu", "--profile"], "--profile is for"),
        (["unet", "--only", "correct"], "--only is for gpu"),
        (["train", "--out", "x"], "--out is for gpu"),
        (["unet", "--dir", "x"], "--dir is for load, data"),
        (["unet", "--batch-size", 7], "--batch-size is for train, gpu"),
        (["gpu", "--tiny", "--batch-size", 7], "--batch-size is for gpu without --tiny"),
        (["load", "--compile"], "--compile is for"), (["data", "--tiny"], "--tiny is for"),
        (["unet", "--device", "meta"], "--device meta cannot be used here"),
        (["gpu"], "a rehearsal: add --tiny"),
    ],
)  # fmt: skip
def test_flags_without_use_are_refused_in_one_line(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = words if "--device" in words else [*words, "--device", "cpu"]
    code, _, err = helpers.run(bench, monkeypatch, capsys, *words)
    assert (code, err.count("\n"), said in err) == (2, 1, True), err
    assert not list(tmp_path.iterdir())


def test_a_gpu_or_a_package_that_is_not_there_is_named(monkeypatch, capsys):
    for name in ("diffusers", "peft"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            code, _, err = helpers.run(bench, patch, capsys, "train", "--device", "cpu")
        assert (code, err) == (
            2, f"bench.py: train needs {name}: pip install -r requirements-test.txt\n"
        )  # fmt: skip
    if not torch.cuda.is_available():
        for what in bench.BENCHMARKS:
            code, _, err = helpers.run(bench, monkeypatch, capsys, what, "--device", "cuda")
            assert (code, err.count("\n"), "no GPU is visible" in err) == (2, 1, True)
