"""What the site takes from the code: docstrings, tutorials as they run, equations, and links into the repository.

An extension of Sphinx, loaded by docs/conf.py.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

from sharpscope.report.glossary import TERMS

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs/tutorials"
CACHE = ROOT / "build/tutorials"
INCLUDED = {
    **{"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"},
    **{f"benchmarks/{name.lower()}": f"benchmarks/{name}.md" for name in ("RESULTS", "OVERHEAD", "SWEEPS")},
}
"""Pages of the site that are files beside docs/."""
CODE = re.compile(r"(``.+?``|`[^`]+`)")
SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")


# Docstrings are plain text with `names`, ``code``, formulas and examples; Sphinx reads them as reStructuredText.


def escaped(line: str) -> str:
    """The line with what would be markup outside of code escaped, and rows of the notation as links."""
    parts = CODE.split(line)
    for i in range(0, len(parts), 2):
        plain = re.sub(r"([\\*_|])", r"\\\1", parts[i])
        parts[i] = re.sub(r"\[(N\d+)\]", lambda m: rf"`[{m[1]}] <../notation.html#{m[1].lower()}>`__", plain)
    return "".join(parts)


def indent(line: str) -> int:
    """Spaces at the beginning."""
    return len(line) - len(line.lstrip())


def as_rst(lines: list[str]) -> Iterator[str]:
    """The docstring with formulas (blocks that are set in) as literal blocks and all other text escaped."""
    i = 0
    while i < len(lines):
        line = lines[i]
        end = i + 1
        if line.lstrip().startswith(">>>"):
            while end < len(lines) and lines[end].strip():
                end += 1
            yield from ["", *lines[i:end], ""]
        elif SECTION.match(line):
            while end < len(lines) and (indent(lines[end]) or not lines[end].strip()):
                end += 1
            yield from ["", *map(escaped, lines[i:end])]
        elif line.strip() and indent(line):
            while end < len(lines) and (indent(lines[end]) or not lines[end].strip()):
                end += 1
            yield from ["", ".. code-block:: text", "", *("   " + text for text in lines[i:end]), ""]
        elif line.startswith("- "):
            while end < len(lines) and (indent(lines[end]) or lines[end].startswith("- ")):
                end += 1
            yield from ["", *map(escaped, lines[i:end]), ""]
        else:
            yield escaped(line)
        i = end


def docstring(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrite a docstring in place, before napoleon reads its sections."""
    lines[:] = list(as_rst(lines))


# Pages: links that leave docs/, the rows of the notation as targets, and the lists made from the code.


def page(app: Any, name: str, source: list[str]) -> None:
    """Rewrite the Markdown of a page as it is read."""
    text = source[0]
    if name in INCLUDED:
        text = text.replace("<!-- file -->", (ROOT / INCLUDED[name]).read_text(encoding="utf-8"))
    text = re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", lambda m: link(m[1], m[2], name), text)
    text = re.sub(r"^\| (N\d+) \|", lambda m: f"| [{m[1]}]{{#{m[1].lower()}}} |", text, flags=re.MULTILINE)
    text = text.replace("<!-- glossary -->", "\n\n".join(f"{term}\n: {meaning}" for term, _, meaning in TERMS))
    if "<!-- api -->" in text:
        text = text.replace("<!-- api -->", api(name.rsplit("/", 1)[1]))
    source[0] = text


def link(words: str, target: str, name: str) -> str:
    """A link as the site has it: to the page of a file, or no link where the file is not part of the site."""
    if "://" in target or target.startswith("#"):
        return f"[{words}]({target})"
    path, _, anchor = target.partition("#")
    origin = (ROOT / INCLUDED[name]).parent if name in INCLUDED else (ROOT / "docs" / name).parent
    file = Path(os.path.normpath(origin / path))
    inside = {ROOT / source: ROOT / f"docs/{page}.md" for page, source in INCLUDED.items()}.get(file, file)
    if inside.parent == TUTORIALS:
        inside = inside.with_suffix(".md")
    if not inside.is_relative_to(ROOT / "docs") or inside.is_dir():
        return words
    relative = os.path.relpath(inside, (ROOT / "docs" / name).parent)
    return f"[{words}]({relative}{'#' + anchor if anchor else ''})"


def api(wing: str) -> str:
    """A table of the public names of a wing, then each with its docstring."""
    module = import_module(f"sharpscope.{wing}")
    public = getattr(module, "__all__", [n for n, kind in vars(module).items() if isinstance(kind, type)])
    rows = [
        *("```{eval-rst}", f".. currentmodule:: sharpscope.{wing}", "", ".. autosummary::", "   :nosignatures:", ""),
        *(f"   {name}" for name in public),
        "",
    ]
    for name in public:
        thing = getattr(module, name)
        kind = "class" if isinstance(thing, type) else "function" if callable(thing) and thing.__doc__ else "data"
        elsewhere = not str(getattr(thing, "__module__", "")).startswith(f"sharpscope.{wing}")
        options = ["   :members:"] * (kind == "class") + ["   :no-index:"] * elsewhere
        rows += [f".. auto{kind}:: {name}", *options, ""]
    rows.append("```")
    return "\n".join(["## Names", "", *rows])


# Tutorials: run in an empty folder, once for every state of the code, and shown with what they print and draw.


def ran(script: Path, state: str) -> Path:
    """The folder with what a script printed (``printed.txt``) and wrote when it ran, from the cache if it is there."""
    key = hashlib.sha256(script.read_bytes() + state.encode()).hexdigest()[:16]
    place = CACHE / script.stem / key
    if place.exists():
        return place
    shutil.rmtree(place.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory() as empty:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg",
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(
            [sys.executable, str(script)], cwd=empty, env=environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"{script.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        (Path(empty) / "printed.txt").write_text(done.stdout.rstrip() + "\n", encoding="utf-8")
        kept = [f for f in sorted(Path(empty).iterdir()) if f.suffix in (".txt", ".svg", ".png", ".html")]
        place.mkdir(parents=True)
        for file in kept:
            shutil.copy(file, place / file.name)
    return place


def narrated(script: Path) -> str:
    """A script as a page: comments at the margin are its text, code between them its blocks."""
    code = script.read_text(encoding="utf-8")
    found = re.match(r'"""(.*?)"""\n', code, re.DOTALL)
    assert found, f"{script} has no docstring"
    title, _, rest = found[1].partition("\n")
    parts = [f"# {title.rstrip('.')}", re.sub(r"^    (.*)$", r"```\n\1\n```", rest.strip(), flags=re.MULTILINE)]
    for kind, lines in pieces(code[found.end() :].splitlines()):
        text = "\n".join(lines).strip("\n")
        parts.append(text if kind == "text" or not text else f"```python\n{text}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def pieces(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Runs of comment lines after an empty line ("text"), and what lies between ("code")."""
    kind, run, empty = "code", list[str](), True
    for line in lines:
        comment = line.startswith("# ") or line == "#"
        if comment and (empty or kind == "text"):
            if kind == "code":
                yield kind, run
                kind, run = "text", []
            run.append(line[2:])
        else:
            if kind == "text":
                yield kind, run
                kind, run = "code", []
            run.append(line)
        empty = not line.strip()
    yield kind, run


def tutorials(app: Any) -> None:
    """Write a page for every script of docs/tutorials."""
    scripts = sorted(TUTORIALS.glob("*.py"))
    files = sorted((ROOT / "src").rglob("*.py"))
    state = torch.__version__ + hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    folders: dict[Path, Path] = {}
    if app.config.run_tutorials:
        with ThreadPoolExecutor(2) as pool:
            folders = dict(zip(scripts, pool.map(lambda s: ran(s, state), scripts), strict=True))
    for script in scripts:
        text = narrated(script)
        if script in folders:
            text += "\n" + shown(script, folders[script], Path(app.outdir))
        text += f"\nThis page is `docs/tutorials/{script.name}`, run as it stands.\n"
        target = script.with_suffix(".md")
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def shown(script: Path, folder: Path, out: Path) -> str:
    """What a script printed and drew; pages that it wrote are put beside its own."""
    parts = ["## What it prints", "```text\n" + (folder / "printed.txt").read_text(encoding="utf-8") + "```"]
    (out / "tutorials").mkdir(parents=True, exist_ok=True)
    several = len([file for file in folder.iterdir() if file.suffix in (".svg", ".png")]) > 1
    for file in sorted(folder.iterdir()):
        name = f"{script.stem}-{file.name.replace(' ', '-')}"
        if file.suffix in (".svg", ".png", ".html"):
            shutil.copy(file, out / "tutorials" / name)
        if file.suffix in (".svg", ".png"):
            parts.append(f"{file.stem.replace('_', ' ')}:" if several else "")
            parts.append(f'<img src="{name}" alt="Curves of the run: {file.stem}" style="max-width: 100%">')
        elif file.suffix == ".html":
            parts.append(f'<p><a href="{name}">The page that it writes</a> ({file.name})</p>')
    return "\n\n".join(parts) + "\n"


# Equations as MathML, which browsers draw by themselves.


def inline_math(writer: Any, node: Any) -> None:
    """An equation in a line."""
    writer.body.append(tex2mathml(node.astext(), as_block=False))
    raise SkipNode


def block_math(writer: Any, node: Any) -> None:
    """An equation of its own."""
    writer.body.append('<div class="math">' + tex2mathml(node.astext(), as_block=True) + "</div>\n")
    raise SkipNode


ACCESS = (
    ('role="heading">', 'role="heading" aria-level="2">'),
    ("<pre>", '<pre tabindex="0">'),
    ('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),
    ('<aside class="sidebar-drawer">', '<aside class="sidebar-drawer" aria-label="Pages">'),
)
"""What the theme leaves out for who uses a keyboard or a screen reader: levels, names, and what scrolls has a focus."""


def accessible(app: Any, failed: Exception | None) -> None:
    """Add to the pages what `ACCESS` says."""
    for path in Path(app.outdir).rglob("*.html") if not failed else ():
        text = before = path.read_text(encoding="utf-8")
        for old, new in ACCESS:
            text = text.replace(old, new)
        if text != before and "sidebar-drawer" in text:
            path.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Connect all of this to Sphinx."""
    app.add_config_value("run_tutorials", True, "env")
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("builder-inited", tutorials)
    app.connect("source-read", page)
    app.connect("build-finished", accessible)
    app.connect("autodoc-process-docstring", docstring, priority=100)
    return {"parallel_read_safe": True}
