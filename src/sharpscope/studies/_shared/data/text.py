"""Text as numbers of its characters, cut into pieces of equal length."""

import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ....errors import Unusable
from .split import Examples

LENGTH = 64
"""Characters of a piece."""

VOCABULARY = 96
"""Characters that have a number of their own; the last one stands for all others."""

MODULES = 60
"""Modules of the standard library that are read: half of them to train, half to test on."""


def standard_library(argument: str = "") -> Examples:
    """Python's own standard library as a corpus: its modules, those to train on other than those to test on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))[: 2 * MODULES]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return pieces("text", "".join(texts[::2]), "".join(texts[1::2]))


def own_text(argument: str) -> Examples:
    """A text file of the user; its first nine tenths are to train on."""
    text = Path(argument).read_text(encoding="utf-8", errors="replace")
    cut = len(text) * 9 // 10
    return pieces(f"text:{argument}", text[:cut], text[cut:])


def pieces(source: str, text: str, test: str) -> Examples:
    """Pieces of two texts as inputs ``(n, t)``, and the characters that come next as labels ``(n, t)``.

    Characters are numbered by how often they come in the first text.
    """
    common = [c for c, _ in Counter(text).most_common(VOCABULARY - 1)]
    number = {c: i for i, c in enumerate(common)}
    first, second = (_cut(np.array([number.get(c, len(common)) for c in t], np.int64)) for t in (text, test))
    if not len(first) or not len(second):
        raise Unusable(f"{source} is too short: it has no two pieces of {LENGTH} characters")
    both = np.concatenate([first, second])
    return Examples(source, both[:, :-1], both[:, 1:], len(common) + 1, len(first))


def _cut(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of t + 1 numbers, of which each begins with the last of the one before."""
    if len(numbers) <= LENGTH:
        return numbers[:0].reshape(0, LENGTH + 1)
    return np.lib.stride_tricks.sliding_window_view(numbers, LENGTH + 1)[::LENGTH]
