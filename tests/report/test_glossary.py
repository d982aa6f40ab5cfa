"""The glossary: terms explain themselves once, longest first, and nothing of a text is lost."""

import re
from html import unescape

from pages import HOSTILE

from sharpscope.report.glossary import TERMS, anchor, explained, glossary, used


def plain(html: str) -> str:
    return unescape(re.sub("<[^>]*>", "", html))


def test_a_term_explains_itself_at_its_first_place_only() -> None:
    html = explained("Sharpness, at the edge of stability; sharpness again, at the edge")
    assert re.findall("<a [^>]*>(.*?)</a>", html) == ["Sharpness", "edge of stability"]
    assert plain(html) == "Sharpness, at the edge of stability; sharpness again, at the edge"


def test_a_longer_term_is_not_taken_to_pieces() -> None:
    html = explained("spherical sharpness λ1, η̃λ1 and sharpness")
    assert re.findall("<a [^>]*>(.*?)</a>", html) == ["spherical sharpness", "λ1", "η̃"]


def test_words_that_contain_a_term_are_none() -> None:
    text = "knowledge of oil, the sharpnesses, τx and BNS"
    assert explained(text) == text


def test_text_stays_text() -> None:
    html = explained(f"{HOSTILE} τ {HOSTILE}")
    assert plain(html) == f"{HOSTILE} τ {HOSTILE}" and "<script" not in html and "<img" not in html


def test_the_glossary_has_what_is_linked() -> None:
    text = "Spherical sharpness at equal τ"
    linked = set(re.findall('href="#([^"]*)"', explained(text)))
    there = set(re.findall('<dd id="([^"]*)"', glossary([text])))
    assert linked <= there and [name for name, _ in used([text])] == ["spherical sharpness", "sharpness", "τ"]
    assert glossary(["nothing"]) == ""
    assert len({anchor(name) for name, *_ in TERMS}) == len(TERMS)
