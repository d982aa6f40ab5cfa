"""The gallery: what the tool makes of a run of all studies, and that the one in docs is whole."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import sharpscope.studies
from sharpscope.cli import main
from sharpscope.studies._framework import batch
from sharpscope.studies._framework.study import discover

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "tools/gallery.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seeds", [[], ["--seeds", "2"]])
def test_the_tool_writes_a_page_with_a_figure_of_each_study(
    seeds: list[str], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "known", lambda: ["small", "tiny"])
    run, docs = tmp_path / "run", tmp_path / "docs"
    assert main(["run", "all", "--quick", "--workers", "1", "--out", str(run), *seeds]) == 0
    page = tool().gallery(run, docs).read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", page, re.MULTILINE) == [
        r"Smaller things happen \<b\>more\</b\> quickly",
        "Small things happen quickly",
    ]
    assert page.count("2 of 2 deciding claims hold, 1 of them negative controls") == 2
    assert ("over 2 seeds" in page) == bool(seeds)
    assert "- Not supported here: All walks lead to Rome: 3 (at most 2" in page
    for name in ("small", "tiny"):
        assert f"](images/gallery/{name}.png)" in page and f"`sharpscope run {name}`" in page
        picture = (docs / f"images/gallery/{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 60_000
    assert tool().text("a_b ``c_d`` <e>") == r"a\_b `c_d` \<e\>"


def test_the_gallery_shows_every_study() -> None:
    """After a new study: `sharpscope run all`, then `make gallery`."""
    assert str(ROOT / "tests/tiny_studies") not in sharpscope.studies.__path__
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    shown = re.findall(r"`sharpscope run (\w+)`", page)
    assert sorted(shown) == [*discover()]
    for name in shown:
        assert f"](images/gallery/{name}.png)" in page
        assert (DOCS / f"images/gallery/{name}.png").stat().st_size <= 60_000
    assert len(list((DOCS / "images/gallery").iterdir())) == len(shown)
