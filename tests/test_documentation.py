"""The pages: every block of code runs, every public name has an example, and the site builds without a warning."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sharpscope

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"),
    *(page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "tutorials"),  # those are made from scripts
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(block[1], id=f"{page.relative_to(ROOT)}, example {i}")
    for page in PAGES
    for i, block in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")), 1)
]
WINGS = [page.stem for page in sorted((DOCS / "reference").glob("*.md")) if page.stem not in ("index", "errors")]


@pytest.mark.parametrize("code", EXAMPLES)
def test_blocks_of_the_pages_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "an example", "exec"), {"__name__": "__main__"})


def test_every_wing_has_a_page() -> None:
    """Studies, too; integrations and the command line have tutorials and pages of their own."""
    package = ROOT / "src/sharpscope"
    wings = {path.parent.name for path in package.glob("*/__init__.py")} - {"integrations", "cli"}
    assert set(WINGS) == wings


@pytest.mark.parametrize("wing", WINGS)
def test_every_public_name_has_an_example(wing: str) -> None:
    tour = "".join(BLOCK.findall((DOCS / f"reference/{wing}.md").read_text(encoding="utf-8")))
    missing = set(import_module(f"sharpscope.{wing}").__all__) - set(re.findall(r"\w+", tour))
    assert not missing


def test_names_at_the_top_are_those_of_the_wings() -> None:
    """So that their examples are there, too."""
    public = {name for wing in WINGS for name in import_module(f"sharpscope.{wing}").__all__}
    assert set(sharpscope.__all__) <= public | {"SharpscopeError"}


def test_names_on_the_pages_exist() -> None:
    """Every ``ss.wing.name`` in the documentation is there."""
    for page in PAGES:
        for dotted in re.findall(r"\bss((?:\.[A-Za-z_]\w*)+)", page.read_text(encoding="utf-8")):
            thing: object = sharpscope
            for name in dotted[1:].split("."):
                if page.stem == "CHANGELOG" and not hasattr(thing, name):
                    break  # a name of before
                thing = getattr(thing, name)


def test_the_site_builds_without_a_warning_and_stays_at_home(tmp_path: Path) -> None:
    """Without running the tutorials, which have a test of their own."""
    build = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-D", "run_tutorials=0"]
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, *build, "-d", str(tmp_path / "trees"), str(DOCS), str(site)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert checked(site) == []
    assert len(list(site.rglob("*.html"))) > len(PAGES)
    (site / "bad.html").write_text(
        '<a href="nowhere.html">a</a><a href="#no">b</a><img src="https://example.org/x.png">'
    )
    (site / "bad.css").write_text("@import url('//example.org/font.css');")
    assert len(checked(site)) == 4


def checked(site: Path) -> list[str]:
    """Faults that the checker finds."""
    done = subprocess.run([sys.executable, ROOT / "tools/check_site.py", site], capture_output=True, text=True)
    return done.stdout.splitlines()[:-1]
