"""docs/walkthrough.md and the other pages: their quotations, test names, equations and links."""

import ast
import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WALKTHROUGH = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^##+ ", WALKTHROUGH, flags=re.M)


def quote(root, *words):
    """tests/quote.py below this folder: exit code and the lines on stderr."""
    call = [sys.executable, root / "tests/quote.py", *words]
    done = subprocess.run(call, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def test_every_quotation_is_the_source():
    assert quote(ROOT, "--check") == (0, [])
    assert WALKTHROUGH.count("<!-- code:") > 30


@pytest.mark.parametrize(
    "marker, code",
    [
        ("code: a.py f", '@cache\ndef f(x):\n    """One."""\n    y = 1\n\n    return x + y'),
        ("code: a.py f no docstring", "@cache\ndef f(x):\n    y = 1\n\n    return x + y"),
        ('code: a.py f lines "y = 1"', "y = 1"),
        ('code: a.py f lines "y = 1" to "return"', "y = 1\n\nreturn x + y"),
        ("code: a.py B", "B = {\n    1: 2,\n}"),
        ("code: a.py g", "def g(self):\n    pass"),
    ],
)
def test_a_stale_quotation_is_named_and_written_anew(marker, code, tmp_path):
    source = '''@cache
def f(x):
    """One."""
    y = 1

    return x + y


B = {
    1: 2,
}


class C:
    def g(self):
        pass
'''
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/quote.py", tmp_path / "tests")
    (tmp_path / "a.py").write_text(source)
    page = tmp_path / "README.md"
    page.write_text(f"Text.\n<!-- {marker} -->\n```python\nold\n```\nMore.\n")
    stale = [f"README.md: {marker}: stale; run python tests/quote.py"]
    assert quote(tmp_path, "--check") == (1, stale)
    assert quote(tmp_path) == (0, [])
    assert page.read_text() == f"Text.\n<!-- {marker} -->\n```python\n{code}\n```\nMore.\n"
    assert quote(tmp_path, "--check") == (0, [])


@pytest.mark.parametrize(
    "marker, message",
    [
        ("code: a.py h", "there is no h"),
        ('code: a.py f lines "z ="', "there is no line 'z ='"),
        ("code: b.py f", "No such file"),
        ("code: a.py f with docstring", "misspelt"),
    ],
)
def test_a_marker_of_nothing_is_one_line(marker, message, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/quote.py", tmp_path / "tests")
    (tmp_path / "a.py").write_text("def f():\n    pass\n")
    (tmp_path / "README.md").write_text(f"<!-- {marker} -->\n```python\n```\n")
    code, lines = quote(tmp_path)
    assert code == 1 and len(lines) == 1 and message in lines[0]


def defined_in(path):
    """The names of the tests in a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_checked_by_names_existing_tests():
    """A file in brackets is that of the names before it, as far back as an "and" or a file."""
    items = re.findall(r"^- \*\*Checked by\*\*.*\n(?:  .*\n)*", WALKTHROUGH, flags=re.M)
    assert len(items) == WALKTHROUGH.count("**Checked by**") - 1 >= 25
    named = 0
    for item in items:
        for names, end in re.findall(
            r"(.+?)(\band\b|\(\.\./tests/\w+\.py\)|$)", " ".join(item.split())
        ):
            path = end[4:-1] if end.startswith("(") else "test_tdd.py"
            tests = re.findall(r"`(test_\w+)`", names)
            assert set(tests) <= defined_in(path), (tests, path)
            named += len(tests)
    assert named == len(re.findall(r"`test_\w+`", WALKTHROUGH))


def test_every_equation_and_every_line_of_algorithm_1_appears():
    numbers = []
    for section in SECTIONS:
        if match := re.match(r"Eq\. (\d+): ", section):
            numbers.append(int(match[1]))
            for part in ("```math", "<!-- code: ", "- **Checked by**"):
                assert part in section, (match[0], part)
    assert numbers == list(range(3, 19))
    tdd = next(section for section in SECTIONS if section.startswith("Algorithm 1\n"))
    tdm = next(section for section in SECTIONS if section.startswith("TDM, Algorithm 1\n"))
    assert re.findall(r"\*\*Line (\d+)\*\*", tdd) == [str(n) for n in range(1, 20)]
    assert re.findall(r"\*\*Line (\d+)\*\*", tdm) == [str(n) for n in range(1, 15)]
    assert len(WALKTHROUGH.splitlines()) <= 600


@pytest.mark.parametrize(
    "paper, expected", [("TCD", [21, 22, 24, 27, 29, 33]), ("TDM", [5, 6, 7, 8, 11])]
)
def test_equations_of_the_sibling_papers_appear(paper, expected):
    numbers = []
    for eqs in re.findall(rf"^{paper}, Eqs?\. ([\d and]+)", "\n".join(SECTIONS), flags=re.M):
        numbers += [int(n) for n in re.findall(r"\d+", eqs)]
    assert sorted(numbers) == expected


def test_examples_give_what_they_show():
    blocks = re.findall(r"^```python\n(>>> .*?)^```", WALKTHROUGH, flags=re.DOTALL | re.M)
    assert blocks
    for block in blocks:
        example = doctest.DocTestParser().get_doctest(block, {}, "walkthrough", None, 0)
        assert doctest.DocTestRunner().run(example).failed == 0


def anchors(path):
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists() and path.is_relative_to(ROOT.resolve()), link
        assert not anchor or anchor in anchors(path), link
