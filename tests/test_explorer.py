"""explore.html: what toy/explorer.py hands over, and the page's own maths in a real browser."""

import itertools
import json
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tdd
from common.compare import Case
from solvers import sdxl_schedule
from tcd import TCF
from tests.helpers import admitted, randn
from toy import explorer
from toy.config import ToyConfig
from toy.data import Data, rmse
from toy.evaluate import Evaluation
from toy.figures import LIMITS
from toy.model import BatchedMLP
from toy.students import Group, make_students
from toy.tdm import TDM_STUDENTS

ROOT = Path(__file__).parent.parent
METHODS = ("cm", "pcm4", "pcm8", "tcd", "tdd", "tdd_eta0", "tdd_rho0", "tdm4", "tdd_k4", "tdd_k",
           "pcm4_path", "tdd_k4_blind_data")  # fmt: skip
CONFIG = ToyConfig(
    data="spirals", methods=METHODS, tcf=("1", "2", "s"), steps=1, seeds=2, seed=3, batch_size=8,
    lr=1e-3, ema=0.95, kmin=4, kmax=8, reach=None, eta=0.3, rho=0.2, w=2.0, N=50, solver="ddim",
    samples=64, reference_steps=30,
)  # fmt: skip
KEYS = ["teacher", "cm", "pcm4", "pcm8", "tcd", "tdd", "tdd_eta0", "tcds", "tdds", "tdd_k4",
        "tdd_k", "pcm4_path", "tdd_k4_blind_data"]  # fmt: skip


def network(members, seed, scalar=""):
    """A network whose every weight matters, small enough that its samples stay near the data."""
    net = BatchedMLP.init(members, sdxl_schedule(), torch.Generator().manual_seed(seed))
    net = net.with_scalar(scalar) if scalar else net
    for i, p in enumerate(net.weight):
        size = 0.06 if i == 3 else 0.8 / p.shape[1] ** 0.5
        p.data = size * randn(*p.shape, seed=seed + i).float()
    for i, p in enumerate(net.bias):
        p.data = 0.1 * randn(*p.shape, seed=seed + 10 + i).float()
    return net.requires_grad_(False)


def evaluation(config=CONFIG):
    return Evaluation(config, network(config.seeds, seed=100), Data(config.data))


def random_groups(config=CONFIG):
    students, groups = make_students(config), []
    for kind in sorted({student.kind for student in students}):
        alike = [student for student in students if student.kind == kind]
        scalar = "num_steps" if kind[1] else "target_time" if kind[0] == "s" else ""
        net = network(config.seeds * len(alike), 200 + 50 * len(groups), scalar)
        groups.append(Group(alike, net, TCF[kind[0]]))
    if "tdm4" in config.methods:
        groups.append(Group([TDM_STUDENTS["tdm4"]], network(config.seeds, seed=900)))
    return groups


@pytest.fixture(scope="module")
def run():
    return evaluation(), random_groups()


@pytest.fixture(scope="module")
def gathered(run):
    return json.loads(json.dumps(explorer.gather(*run)))


def find(groups, key):
    """A group and the index in it of the plain student with this name."""
    return next((g, i) for g in groups for i in g.plain if g.students[i].method == key)


def unpack(text, *shape, dtype="<f4"):
    return torch.tensor(np.frombuffer(b64decode(text), dtype).reshape(shape).copy())


# -------------------------------------------------------------------------- what is handed over


def test_networks_are_those_of_seed_0_with_weights_out_by_in(run, gathered):
    ev, groups = run
    methods = {method["key"]: method for method in gathered["methods"]}
    assert next(iter(methods)) == "teacher" and set(methods) == set(KEYS)
    for key, method in methods.items():
        net = ev.teacher
        if key != "teacher":
            group, i = find(groups, key)
            net = group.select([i])
            assert method["eta"] == group.students[i].eta
            assert method["Ks"] == list(group.students[i].Ks)
        assert method["scalar"] == net.scalar
        for layer, weight, bias in zip(method["layers"], net.weight, net.bias, strict=True):
            w = unpack(layer["weight"], weight.shape[2], weight.shape[1])
            x = randn(5, weight.shape[1]).float()
            assert torch.equal(w.T, weight[0])
            assert torch.equal(unpack(layer["bias"], bias.shape[2]), bias[0, 0])
            assert torch.allclose(torch.nn.functional.linear(x, w), x @ weight[0], atol=1e-5)


def test_noise_labels_and_solutions_are_the_evaluations(run, gathered):
    ev, _ = run
    noise, seen = unpack(gathered["noise"], 8, 64, 2), []

    def jump(model, x_t, t, s, schedule):
        seen.append(x_t.view(64, 2, 2)[:, 0])
        return x_t

    ev.sample(ev.teacher, Case(8, gamma=1.0), 0.0, jump=jump)
    assert torch.equal(noise[0], seen[0])
    for i in range(1, 8):
        t = tdd.equidistant(8, 50)[i]
        x_0 = tdd.renoise(noise[0] if i == 1 else seen[i - 1], 0, t, noise[i], ev.schedule)
        assert torch.equal(seen[i], x_0)
    assert gathered["label"] == ev.label.tolist()
    endpoints = ev.reference(Case(1), 0.0, 2.0)[0]
    assert torch.equal(unpack(gathered["endpoints"], 64, 2), endpoints)
    assert gathered["shown"] and set(gathered["shown"]) <= set(range(gathered["preview_samples"]))
    for row, path in zip(gathered["shown"], gathered["paths"], strict=True):
        path = unpack(path, -1, 2)
        assert torch.equal(path[0], noise[0, row])
        assert torch.allclose(path[-1], endpoints[row], atol=1e-4)
    log_alpha = unpack(gathered["log_alpha"], -1, dtype="<f8")
    assert torch.equal(log_alpha, ev.schedule.log_alpha)


def test_a_page_is_one_small_file_that_asks_for_nothing(run, gathered, tmp_path):
    explorer.write(tmp_path / "explore.html", *run)
    page = (tmp_path / "explore.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 2_000_000 and "{{" not in page
    for word in ("http", "src=", "href", "@import", "url(", "import(", "fetch(", "<link"):
        assert word not in page.replace(json.dumps(gathered), ""), word
    assert not list(tmp_path.glob("*.part"))


def test_the_page_in_docs_is_this_template_with_a_runs_content():
    page = (ROOT / "docs/explore.html").read_text(encoding="utf-8")
    content = re.search(r'id="run">(.*?)</script>', page, re.DOTALL)[1]
    template = (ROOT / "toy/explorer.html").read_text(encoding="utf-8")
    maths = (ROOT / "toy/explorer.js").read_text(encoding="utf-8")
    assert page == template.replace("{{maths}}", maths).replace("{{run}}", content)
    keys = [method["key"] for method in json.loads(content)["methods"]]
    assert {"teacher", "cm", "pcm4", "pcm8", "tcd", "tdd", "tdd_eta0", "tdds", "tdd_k4"} <= set(
        keys
    )
    assert len(page.encode()) < 2_000_000


def test_the_template_is_short_enough_to_read():
    for name in ("explorer.html", "explorer.js"):
        lines = (ROOT / "toy" / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 300
        assert max(map(len, lines)) <= 100
    low, high = LIMITS
    box = f'viewBox="{low:g} {low:g} {high - low:g} {high - low:g}"'
    assert box in (ROOT / "toy/explorer.html").read_text(encoding="utf-8")


def test_views_name_methods_and_controls_that_there_are(gathered):
    template = (ROOT / "toy/explorer.html").read_text(encoding="utf-8")
    controls = {"m0", "m1", "m2", *re.findall(r' name="(\w+)"', template)}
    assert len(gathered["questions"]) == len(explorer.QUESTIONS)
    for view in (gathered["view"], *(question["view"] for question in gathered["questions"])):
        values = dict(pair.split("=") for pair in view.split("&"))
        assert set(values) <= controls
        assert {values["m0"], values["m1"], values["m2"]} <= {*KEYS, ""}


@pytest.mark.parametrize("settings", [{"kmin": 2, "kmax": 4}, {"kmin": 6}, {"reach": 125.0},
                                      {"data": "gaussians"}], ids=str)  # fmt: skip
def test_runs_of_which_the_answers_are_not_true_have_no_questions(settings):
    config = replace(CONFIG, methods=("tdd", "pcm4", "pcm8"), tcf=("1",), seeds=1)
    assert len(explorer.gather(evaluation(config), random_groups(config))["questions"]) == 2
    config = replace(config, **settings)
    assert explorer.gather(evaluation(config), random_groups(config))["questions"] == []


def test_of_the_jumps_that_tdd_learns_more_are_longer_than_those_of_8_steps():
    """As a question says: counted over the targets of all starts of those 8 jumps but the last."""
    targets = next(s for s in make_students(CONFIG) if s.method == "tdd").targets
    longer = shorter = 0
    stops = [*tdd.equidistant(8, 50), 0]
    for t, stop in itertools.pairwise(stops[:-1]):
        taus = admitted(targets, targets.grid.tolist().index(t) - 1)
        assert stop in taus and len(taus) >= 5
        longer += sum(tau < stop for tau in taus)
        shorter += sum(tau > stop for tau in taus)
    assert longer > shorter > 0


@pytest.mark.parametrize("methods", [(), ("tdm4",), ("cm",), ("tdd_rho0",), ("tdd", "pcm4")])
def test_runs_with_fewer_methods_have_a_page(methods):
    config = replace(CONFIG, methods=methods, tcf=("1",), seeds=1)
    gathered = explorer.gather(evaluation(config), random_groups(config))
    keys = [method["key"] for method in gathered["methods"]]
    students = [method for method in ("pcm4", "tdd", "cm") if method in methods]
    assert keys[0] == "teacher" and sorted(keys[1:]) == sorted(students)
    assert [question["title"] for question in gathered["questions"]] == (
        ["Where does guidance go?"] if len(students) == 2 else []
    )
    shown = [*students, "teacher", "", ""][:3]
    assert gathered["view"] == "&".join(f"m{i}={key}" for i, key in enumerate(shown)) + "&k=4"


# ------------------------------------------------------------------------------- in a real browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def in_browser(test):
    """A slow test that is skipped, with a line, where there is no chromium."""
    skip = pytest.mark.skipif(not BROWSER, reason="no chromium: install it to test explore.html")
    return pytest.mark.slow(skip(test))


# Frames are timers: since Chromium 156 virtual time runs out while a page waits for a real one.
RECORD = """<script>const problems = [];
requestAnimationFrame = (draw) => setTimeout(() => draw(performance.now()), 16);
cancelAnimationFrame = clearTimeout;
addEventListener("error", ({ message, lineno }) => problems.push(`${lineno}: ${message}`));
addEventListener("unhandledrejection", ({ reason }) => problems.push(String(reason.stack)));
</script>"""
REPORT = """<script>(async () => { "use strict"; const results = {};
try { %s } catch (error) { problems.push(error.stack); }
document.body.append(Object.assign(document.createElement("pre"),
  { id: "results", textContent: JSON.stringify({ problems, results }) }));
})();</script>"""


def browse(page, script, tmp_path, address="", milliseconds=600_000):
    """What a script that runs at the page's end leaves in `results`; fails on any error there."""
    page = page.replace("<style>", RECORD + "<style>", 1) + REPORT % script
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    # Virtual time: timers fire without a wait, and only work takes time.
    call = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            f"--virtual-time-budget={milliseconds}", f"--user-data-dir={tmp_path / 'profile'}",
            f"file://{tmp_path}/page.html{address}"]  # fmt: skip
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, check=True)
    found = re.search(r'<pre id="results">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    report = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert report["problems"] == [], report["problems"]
    return report["results"]


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explore.html"
    explorer.write(path, *run)
    return path.read_text(encoding="utf-8")


@in_browser
def test_targets_of_every_start_are_tdds(run, page, tmp_path):
    script = """for (const { key, targets: made_of } of run.methods.slice(1))
      results[key] = grid.slice(1).map((_, n) => targets(made_of, n));"""
    results, groups = browse(page, script, tmp_path), run[1]
    assert set(results) == set(KEYS) - {"teacher"}
    for key, of_start in results.items():
        group, i = find(groups, key)
        targets = group.students[i].targets
        assert len(of_start) == 50
        for n, found in enumerate(of_start):
            assert [tau for tau, *_ in found] == admitted(targets, n), (key, n)
            if targets.K is not None:
                first, count = int(targets.first[n]), int(targets.count[n])
                assert [K for _, K in found] == targets.K[first : first + count].tolist()


@in_browser
@pytest.mark.parametrize(
    ("N", "kmin", "kmax", "reach", "w"),
    [(50, 4, 8, 137.5, 2.0), (10, 3, 7, None, 0.0), (1000, 6, 8, None, 2.0), (4, 2, 4, None, 1.0),
     (2, 1, 1, None, 0.0), (20, 4, 12, None, 5.0)],
)  # fmt: skip
def test_targets_of_other_settings_are_tdds(N, kmin, kmax, reach, w, tmp_path):
    methods = ("tdd", "tcd", "tdd_k4", "cm_path", "tcd_path")
    config = replace(
        CONFIG, methods=methods, N=N, kmin=kmin, kmax=kmax, reach=reach, w=w, seeds=1, tcf=("1",),
    )  # fmt: skip
    ev, groups = evaluation(config), random_groups(config)
    explorer.write(tmp_path / "explore.html", ev, groups)
    script = """for (const { key, targets: made_of } of run.methods.slice(1))
      results[key] = grid.slice(1).map((_, n) => targets(made_of, n).map(([tau]) => tau));
    results.grid = grid;
    results.landings = Array.from({ length: 21 }, (_, i) => grid.map((p) => landing(p, i / 20)));"""
    results = browse((tmp_path / "explore.html").read_text(), script, tmp_path)
    grid = results.pop("grid")
    assert grid == groups[0].students[0].targets.grid.tolist()
    # s = floor((1 - gamma) p) of every gamma that the slider has, in whole numbers.
    assert results.pop("landings") == [[(20 - i) * p // 20 for p in grid] for i in range(21)]
    assert results.keys() == {*methods}
    for key, of_start in results.items():
        group, i = find(groups, key)
        assert of_start == [admitted(group.students[i].targets, n) for n in range(N)]


CASES = [Case(k, gamma, w=w) for k in (1, 4, 8) for gamma in (0.0, 0.2) for w in (0.0, 1.0)]
CASES += [
    Case(6, schedule="nonequidistant"), Case(7, 0.5, "nonequidistant"), Case(5, gamma=1.0),
    Case(4, w=1.0, clip_steps=1), Case(4, 0.2, w=2.0, clip_steps=4), Case(4, w=1.0, tune=2.0),
    Case(5, 0.2, w=0.0, tune=2.0), Case(4, w=2.0, tune=2.0),
    Case(4, tell_k=8), Case(8, 0.2, tell_k=5), Case(8, tell_k=2), Case(2),
]  # fmt: skip


def as_page(case):
    return {"k": case.k, "gamma": case.gamma, "w": case.w, "tune": case.tune is not None,
            "clip_steps": case.clip_steps, "uneven": case.schedule != "equidistant",
            "K": case.tell_k or 0}  # fmt: skip


def expected(ev, groups, key, case, rows=64):
    """Python's samples of seed 0, the first of them (rows, 2), and their rmse."""
    if key == "teacher":
        x, reference = ev.sample(ev.teacher, case, 2.0), ev.reference(case, 0.0, 2.0)
    else:
        group, i = find(groups, key)
        # A case's k, to Python, is what students of K are told: it is K here, and the steps k.
        Ks = group.students[i].Ks
        told = [(min(Ks, key=lambda K: (abs(K - (case.tell_k or case.k)), K)),)] if Ks else None
        w = case.w_inference
        x = ev.sample(group.select([i]), case, w, jump=group.jump, Ks=told)
        reference = ev.reference(case, w, 2.0)
    x = x[0, 0, :rows]
    return x, rmse(x, reference[0, :rows]).item()


@in_browser
def test_samples_and_errors_of_every_method_and_case_are_pythons(run, page, tmp_path):
    script = f"""const cases = {json.dumps([as_page(case) for case in CASES])};
    results.few = cases.map((c) => drain(rmse(run.methods[1], c, 32)));
    for (const method of run.methods)
      results[method.key] = cases.map((c) => ({{
        x: [...drain(sample(method, c, samples)).at(-1)], rmse: drain(rmse(method, c, samples)),
      }}));"""
    results = browse(page, script, tmp_path)
    key = explorer.make_methods(*run)[1]["key"]
    for case, found in zip(CASES, results.pop("few"), strict=True):
        assert found == pytest.approx(expected(*run, key, case, 32)[1], abs=1e-3), case
    assert set(results) == set(KEYS)
    distances = {}
    for key, of_case in results.items():
        for case, found in zip(CASES, of_case, strict=True):
            x, error = expected(*run, key, case)
            distance = (torch.tensor(found["x"]).view(-1, 2) - x).abs().max().item()
            distances[key, case] = distance, abs(found["rmse"] - error), error
    for (key, case), (distance, difference, error) in distances.items():
        assert distance < 1e-4, (key, case, distance)
        assert difference < 1e-3, (key, case, difference, error)
        assert error > 0.05 or case.gamma == 1, (key, case, error)  # a test that could fail


# Controls change, as by a user, and the page is asked what it shows at once and at rest.
VISIT = r"""
const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));
const pathsOf = (id) => [...document.querySelectorAll(`#${id} path`)];
const shows = () => ({
  address: location.hash, words: panels.map(({ words }) => words.textContent),
  notes: panels.map(({ note }) => note.textContent), progress: Number(el.progress.value),
  points: panels.map(({ stops }) => (stops ? stops.at(-1).length / 2 : 0)),
  start: el.start.labels[0].querySelector("b").textContent,
  rings: document.querySelectorAll(".panels circle[r='0.07']").length,
  marks: pathsOf("chart").map((path) => path.getAttribute("d").split("h").length - 1)
    .filter(Number),
  disabled: [el.K, el.uneven].map((control) => control.disabled),
  broken: [...document.querySelectorAll("svg")].some((svg) =>
    /NaN|undefined|rgb\(\)/.test(svg.innerHTML)),
  methods: panels.map(({ method }) => (method ? method.key : "")), boxes: el.tune.checked,
});
const frame = () => new Promise((resume) => requestAnimationFrame(() => setTimeout(resume, 20)));
async function rest() {
  await pause(300);
  const done = ({ method, words }) => words.textContent.startsWith("rmse 0") &&
    ks.every((k) => knownError(method, { ...state(), k }));
  for (let i = 0; i < 1000 && !active().every(done); i++) await pause(20);
  await pause(20);
}
function set(name, value) {
  const control = name === "shown" ? el.shown[value] : el[name];
  if (typeof value === "boolean" || name === "shown") control.checked = Boolean(value);
  else control.value = value;
  control.dispatchEvent(new Event("input", { bubbles: true }));
}
async function visit(name, controls) {
  for (const [name, value] of Object.entries(controls)) set(name, value);
  results[name] = { at_once: shows() };
  await rest();
  results[name].rested = shows();
}
"""
TDD_K4_AT_799 = "799, tau 759 (K = 4), 599 (K = 5), 679 (K = 6), 719 (K = 7), 759 (K = 8)"
VISITS = {
    "more steps": ({"m0": "tdd", "m1": "tdd_k4", "m2": "tcds", "k": 8}, Case(8)),
    "noise": ({"gamma": 0.2, "w": 1}, Case(8, 0.2, w=1.0)),
    "tuned": ({"gamma": 0, "tune": True, "k": 4, "shown": 1, "start": 10}, Case(4, w=1.0, tune=2)),
    "told 7": ({"w": 2, "K": 7}, Case(4, w=2.0, tune=2.0, tell_k=7)),
    "uneven": ({"uneven": True, "k": 6, "K": 0}, Case(6, 0.0, "nonequidistant", 2.0, 2.0)),
    "clipped": (
        {"w": 1, "tune": False, "clip_steps": 2}, Case(6, 0.0, "nonequidistant", 1.0, None, 2)
    ),
}  # fmt: skip


@in_browser
def test_controls_lead_to_pythons_errors(run, page, tmp_path):
    script = VISIT + "await rest(); results.first = { rested: shows() };"
    for name, (controls, _) in VISITS.items():
        script += f"await visit({json.dumps(name)}, {json.dumps(controls)});"
    # A change ends the work for what was asked for before it.
    script += """const before = job;
    set("gamma", 0.35);
    const found = await finish(sample(teacher, state(), 64), () => before === job);
    results.ended = found === undefined;"""
    results = browse(page, script, tmp_path)
    assert results.pop("ended")
    shown = ["pcm4", "tdd", "tdd_k4"]
    for name, case in {
        "first": Case(4),
        **{name: case for name, (_, case) in VISITS.items()},
    }.items():
        rested, at_once = results[name]["rested"], results[name].get("at_once")
        errors = [expected(*run, key, case)[1] for key in shown]
        for words, error in zip(rested["words"], errors, strict=True):
            assert float(words.removeprefix("rmse ")) == pytest.approx(error, abs=1.5e-3), name
        passes = case.k * (1 if case.w_inference == 0 else 2)
        assert all(note.startswith(f"passes: {passes}") for note in rested["notes"])
        told = [note.rpartition("told K = ")[2] for note in rested["notes"] if "told" in note]
        assert told == [str(case.tell_k or case.k)]
        assert rested["points"] == [64] * 3 and rested["progress"] == case.k
        # Of 12 paths a panel; of 3 where there is noise. And a point of three curves for each k.
        assert rested["rings"] == 3 * (12 if case.gamma == 0 else 3)
        assert rested["marks"] == [8, 8, 8]
        assert not rested["broken"]
        if at_once:
            # A few samples without an error, before the address changes.
            assert at_once["points"] == [48] * 3 and at_once["words"] == ["rmse ..."] * 3
            assert at_once["notes"] == rested["notes"] and at_once["rings"] == 0
            assert at_once["address"] != rested["address"] and not at_once["broken"]
        shown = ["tdd", "tdd_k4", "tcds"]
    first, last = results["first"]["rested"], results["clipped"]["rested"]
    assert first["start"] == "999, tau 759" and last["start"] == TDD_K4_AT_799
    assert set(last["address"][1:].split("&")) == {
        "m0=tdd", "m1=tdd_k4", "m2=tcds", "k=6", "gamma=0", "w=1", "K=0", "clip_steps=2", "shown=1",
        "start=10", "uneven=on",
    }  # fmt: skip


@in_browser
def test_an_address_opens_its_view_and_a_wrong_one_opens_some(run, page, tmp_path):
    script = VISIT + "await rest(); results.shown = shows();"
    address = "#m0=tcds&m1=teacher&m2=&k=5&gamma=0.2&w=1&shown=1&start=3"
    found = browse(page, script, tmp_path, address)["shown"]
    for i, key in enumerate(("tcds", "teacher")):
        error = expected(*run, key, Case(5, 0.2, w=1.0))[1]
        assert float(found["words"][i].removeprefix("rmse ")) == pytest.approx(error, abs=1.5e-3)
    assert found["words"][2] == found["notes"][2] == "" and found["points"] == [64, 64, 0]
    assert found["start"] == "939, tau none" and found["disabled"] == [True, False]
    script = (
        VISIT
        + """for (const address of ["k=99&gamma=x&w=-1&start=77", "m0=nobody&m1=&shown=9",
      "shown=2&m2=", "length=2&item=1&__proto__=3&k", "%", "", "tune=off&play=2",
      "k=2&uneven=on&K=3"]) {
      location.hash = address;
      await pause(300);
      await rest();
      results[address] = { ...state(), ...shows() };
    }"""
    )
    results = browse(page, script, tmp_path, "#what=&k=4&k=3")
    assert len(results) == 8 and results["k=2&uneven=on&K=3"]["k"] == 2
    first = ["pcm4", "tdd", "tdd_k4"]
    methods = {"m0=nobody&m1=&shown=9": ["teacher", "", first[2]], "shown=2&m2=": [*first[:2], ""]}
    for address, found in results.items():
        assert not found["broken"] and not found["boxes"], address
        assert found["methods"] == methods.get(address, first), address
        assert found["disabled"][1] == (found["k"] < 4)
        assert 1 <= found["k"] <= 8 and 0 <= found["gamma"] <= 1 and 0 <= found["w"] <= 4


@in_browser
def test_questions_the_strip_and_playing(run, gathered, page, tmp_path):
    script = (
        VISIT
        + """await rest();
    for (const button of document.querySelectorAll("#questions button")) {
      button.click();
      await rest();
      const look = document.querySelector("#look").textContent;
      results[button.textContent] = { look, ...shows() };
    }
    const strip = document.querySelector("#strip"), { left, width } = strip.getBoundingClientRect();
    for (const share of [0, 0.5, 1]) {
      const clientX = left + 6 + share * (width - 12);
      strip.dispatchEvent(new PointerEvent("pointermove", { clientX, bubbles: true }));
      const place = pathsOf("strip").at(-1).getAttribute("d").slice(1).split(",")[0] / width;
      results[share] = { place, ...shows() };
    }
    await rest();
    results.pointed = location.hash;
    el.play.click();
    results.playing = { button: el.play.textContent, ...shows() };
    for (let i = 0; i < 1000 && el.play.textContent === "Stop"; i++) await frame();
    results.played = { button: el.play.textContent, ...shows() };
    el.play.click();
    el.play.click();
    results.stopped = { button: el.play.textContent, progress: Number(el.progress.value) };
    set("progress", 1.5);
    results.between = shows();"""
    )
    results = browse(page, script, tmp_path)
    for question in gathered["questions"]:
        found = results[question["title"]]
        assert found["look"] == question["look"] and not found["broken"]
        for control in question["view"].split("&"):
            assert control in found["address"][1:].split("&"), control
    assert [results[share]["start"].split(",")[0] for share in ("0", "0.5", "1")] == [
        "999", "499", "19",
    ]  # fmt: skip
    assert "start=49" in results["pointed"].split("&")
    # The dot of the start follows the pointer, from noise at the left to data.
    assert all(results[share]["place"] == pytest.approx(float(share), abs=0.04)
               for share in ("0", "0.5", "1"))  # fmt: skip
    assert results["playing"]["button"] == "Stop" and results["playing"]["progress"] < 1
    assert results["played"]["button"] == "Play the steps" and results["played"]["progress"] == 4
    assert results["stopped"]["button"] == "Play the steps" and results["stopped"]["progress"] < 1
    assert results["between"]["progress"] == 1.5 and not results["between"]["broken"]
    assert results["between"]["rings"] == 0 < results["played"]["rings"]
