"""Terms of the pages, each with a sentence for who does not know them."""

import re
from collections.abc import Iterable
from html import escape

TERMS = (
    (
        "edge of stability",
        r"\bedge(?: of stability)?\b",
        "Where sharpness equals the largest value at which the optimizer is stable, 2 over the learning rate for"
        " gradient descent: the weights oscillate, and yet the loss falls.",
    ),
    (
        "spherical sharpness",
        r"\b[Ss]pherical sharpness\b",
        "Sharpness after the weights were scaled to norm one: the part that means something where a normalization layer"
        " makes the loss blind to their scale.",
    ),
    (
        "sharpness",
        r"\b[Ss]harpness\b|λ1\b",
        "The largest curvature of the loss, λ1: the largest eigenvalue of its Hessian. Large where the minimum is a"
        " narrow valley.",
    ),
    (
        "weight decay",
        r"\b[Ww]eight decay\b",
        "Shrinking all weights by a small factor at every step.",
    ),
    (
        "normalization",
        r"\b[Nn]ormalization(?: layers?)?\b|\b(?:BN|LN|GN|WN|RMSNorm)\b",
        "Layers that fix the scale of what passes through them (batch, layer, group, weight normalization: BN, LN, GN,"
        " WN), so that the loss does not change with the size of the weights before them.",
    ),
    (
        "τ",
        r"\bτ(?!\w)",
        "Time in which weight decay acts: steps times learning rate times weight decay. At τ = 1 weights without a"
        " gradient have shrunk by the factor e.",
    ),
    ("il", r"\bil\b", "Intrinsic learning rate: learning rate times weight decay, τ per step."),
    (
        "η̃",
        r"η̃",
        "Effective learning rate: the size of a step on the sphere of directions, learning rate over squared norm. At"
        " the edge η̃ times the spherical sharpness is 2.",
    ),
    ("φ", r"φ", "Position along a curve of minima: the angle on the sphere of directions."),
)
"""Name, where it occurs, and what it means; longer terms before those that they contain."""


def used(texts: Iterable[str]) -> list[tuple[str, str]]:
    """List the terms that occur in texts, with their explanations."""
    text = "\n".join(texts)
    return [(name, meaning) for name, pattern, meaning in TERMS if re.search(pattern, text)]


def explained(text: str) -> str:
    """Escape a text; its terms, each at its first place, explain themselves and lead to the glossary."""
    places: list[tuple[int, int, str]] = []
    for name, pattern, _ in TERMS:
        free = (m for m in re.finditer(pattern, text) if all(m.end() <= a or m.start() >= b for a, b, _ in places))
        if first := next(free, None):
            places.append((*first.span(), name))
    html, done = "", 0
    for start, end, name in sorted(places):
        link = f'<a class="term" href="#{anchor(name)}" data-tip="{escape(_meaning(name))}" aria-describedby="'
        html += f'{escape(text[done:start])}{link}{anchor(name)}">{escape(text[start:end])}</a>'
        done = end
    return html + escape(text[done:])


def glossary(texts: Iterable[str]) -> str:
    """Explain the terms that occur in texts, folded; empty where there are none."""
    items = "".join(
        f'<dt>{escape(name)}</dt><dd id="{anchor(name)}">{escape(meaning)}</dd>' for name, meaning in used(texts)
    )
    return f"<details><summary>What the words mean</summary><dl>{items}</dl></details>" if items else ""


def anchor(name: str) -> str:
    """Make the anchor of a term in the glossary."""
    return f"term-{[own for own, *_ in TERMS].index(name) + 1}"


def _meaning(name: str) -> str:
    return next(meaning for own, _, meaning in TERMS if own == name)
