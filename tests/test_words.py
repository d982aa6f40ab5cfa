"""How the package speaks: docstrings that begin with a plain sentence, and one word for one thing."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/sharpscope"
FRAGMENT = re.compile(
    r"(What|Of|Those|Its|As long|Where|How|Which|That|The same|Told|Asked|And|But|If|In the|Whether)\b"
)
RIDDLES = {
    *("apart", "asked", "asking", "clock", "dear", "dearest", "doctor", "foretold", "held", "looks", "obstacle"),
    *("obstacles", "odd", "pace", "reading", "readings", "said", "share", "shares", "surgery", "told", "way", "ways"),
}
"""Words in names that have a plainer one: distance, candidates, expensive, tuning, predicted, fraction, backend, ..."""
PARTS = sorted(
    {path.relative_to(SOURCE).parts[0] for path in SOURCE.rglob("*.py")} - {"studies", "__init__.py", "errors.py"}
) + sorted({f"studies/{path.relative_to(SOURCE / 'studies').parts[0]}" for path in (SOURCE / "studies").rglob("*.py")})


def files(part: str) -> list[Path]:
    place = SOURCE / part
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and first line of every docstring, those after a constant and of nested functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for child in getattr(node, "body", []) if isinstance(getattr(node, "body", []), list) else []:
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield child.lineno, child.value.value.splitlines()[0]


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file gives a name to."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


@pytest.mark.parametrize("part", PARTS)
def test_docstrings_begin_with_a_plain_sentence(part: str) -> None:
    """It fits on the first line, and is no formula and no fragment."""
    wrong = []
    for path in files(part):
        for line, first in docstrings(path):
            plain = re.match(r"[A-Z]", first) and first.endswith(".") and len(re.findall(r"[A-Za-z]{2,}", first)) >= 3
            if not plain or FRAGMENT.match(first):
                wrong.append(f"{path.relative_to(SOURCE)}:{line}: {first}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("part", PARTS)
def test_names_are_plain_words(part: str) -> None:
    wrong = {
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for path in files(part)
        for line, name in names(path)
        if set(re.findall(r"[a-z]+", name.lower())) & RIDDLES
    }
    assert not wrong, "\n" + "\n".join(sorted(wrong))


def test_no_function_is_longer_than_a_page() -> None:
    """Sixty lines: what one reads at a glance."""
    long = [
        f"{path.relative_to(SOURCE)}:{node.lineno}: {node.name}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not long


def test_a_type_has_a_name_of_its_own() -> None:
    """Two classes of one name are met in one stack trace; callbacks of two frameworks are not."""
    where: dict[str, list[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(SOURCE)))
    twice = {name: places for name, places in where.items() if len(places) > 1}
    assert twice.keys() <= {"Config", "SharpnessCallback"}, twice
