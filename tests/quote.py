"""Write the code quotations of README.md and docs/*.md: `python tests/quote.py`, or with --check.

A marker is an HTML comment right above the python block that it fills. It names a file, a function,
method, class or constant, and what to take of it. With --check nothing is written: the first stale
block is named in one line, and the exit status is 1.

    code: tdd.py offset
    code: tdd.py tdd_loss no docstring
    code: tdd.py target_set lines "reach ="
    code: tdd.py tdd_loss lines "# Line 10" to "x_next ="
"""

import ast
import re
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r'<!-- (code: (\S+) (\w+)( no docstring)?(?: lines "([^"\n]+)"(?: to "([^"\n]+)")?)?) -->\n'
    r"```python\n.*?^```$",
    re.DOTALL | re.MULTILINE,
)


def quotation(file: str, name: str, bare: str, first: str, last: str) -> str:
    """The source that a marker asks for; first and last are words of the lines it ends on."""
    source = (ROOT / file).read_text(encoding="utf-8")
    node = find(ast.parse(source), name)
    lines = source.splitlines()[: node.end_lineno]
    if bare:
        docstring = node.body[0]
        del lines[docstring.lineno - 1 : docstring.end_lineno]
    decorators = getattr(node, "decorator_list", [])
    lines = lines[min(part.lineno for part in [node, *decorators]) - 1 :]
    if first:
        lines = lines[index(lines, first) :]
        lines = lines[: index(lines, last or first) + 1]
    return dedent("\n".join(lines))


def find(tree: ast.Module, name: str) -> ast.stmt:
    """The statement that defines a name; those of a module come before those of its classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node
    raise ValueError(f"there is no {name}")


def index(lines: list[str], words: str) -> int:
    """The index of the first line that holds these words."""
    for i, line in enumerate(lines):
        if words in line:
            return i
    raise ValueError(f"there is no line {words!r}")


def fill(match: re.Match) -> str:
    """A marker and its block, as the source has it now."""
    marker, *what = match.groups()
    try:
        return f"<!-- {marker} -->\n```python\n{quotation(*what)}\n```"
    except (ValueError, OSError) as problem:
        raise SystemExit(f"{marker}: {problem}") from None


def main(check: bool) -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text, page = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        blocks = list(BLOCK.finditer(text))
        if len(blocks) != text.count("<!-- code:"):
            raise SystemExit(f"{page}: a marker is misspelt, or no python block stands below it")
        for block in blocks:
            if check and fill(block) != block[0]:
                raise SystemExit(f"{page}: {block[1]}: stale; run python tests/quote.py")
        if not check:
            path.write_text(BLOCK.sub(fill, text), encoding="utf-8")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
