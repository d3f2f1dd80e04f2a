"""Examples: every source gives the items, labels and names that were put in, always in the same order."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image
from small_data import encoded, packed, task_of, write_encoded, write_npz

from merganser.errors import RefError
from merganser.study.data import Examples, Split, load_examples


def numbered(count: int) -> np.ndarray:
    """Grey pictures of 2 x 2 pixels; picture i has the value i everywhere."""
    return np.repeat(np.arange(count, dtype=np.uint8), 4).reshape(count, 2, 2)


def numbers(examples: Examples) -> list[int]:
    assert isinstance(examples.items, np.ndarray)
    return [int(picture[0, 0, 0]) for picture in examples.items]


def write_texts(folder: Path, rows: list[tuple[Any, ...]], name: str = "news") -> None:
    """A packed table: rows of text, label, split, label_name."""
    (folder / "text").mkdir()
    columns = zip(*rows, strict=True)
    table = dict(zip(("text", "label", "split", "label_name"), map(list, columns), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "text" / f"{name}.parquet")


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """25 training pictures and 12 test pictures, numbered; labels are the number modulo 3."""
    splits = {"train": (numbered(25), np.arange(25) % 3), "test": (numbered(12), np.arange(12) % 3)}
    write_npz(tmp_path / "counted.npz", splits, ["zero", "one", "two"])
    return tmp_path


def test_validation_is_every_tenth_training_example(counted: Path) -> None:
    examples = load_examples("counted", packed("counted"), "validation", counted)
    assert numbers(examples) == [9, 19]
    assert examples.labels.tolist() == [0, 1]


def test_training_leaves_out_validation_alone_and_keeps_the_order(counted: Path) -> None:
    examples = load_examples("counted", packed("counted"), "train", counted)
    kept = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24]
    assert numbers(examples) == kept
    assert examples.labels.tolist() == [i % 3 for i in kept]


def test_the_test_split_is_whole(counted: Path) -> None:
    examples = load_examples("counted", packed("counted"), "test", counted)
    assert numbers(examples) == list(range(12))
    assert examples.classes == ("zero", "one", "two")


def test_grey_pictures_get_three_equal_channels(counted: Path) -> None:
    items = load_examples("counted", packed("counted"), "test", counted).items
    assert isinstance(items, np.ndarray)
    assert (items.dtype, items.shape) == (np.uint8, (12, 2, 2, 3))
    assert np.array_equal(items, np.stack([numbered(12)] * 3, axis=-1))


def test_raw_colours_are_taken_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 3), dtype=np.uint8)
    write_npz(tmp_path / "c.npz", {"test": (x, [0, 1, 0])}, ["a", "b"])
    assert np.array_equal(load_examples("c", packed("c"), "test", tmp_path).items, x)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_encoded_pictures_are_decoded_as_pillow_does(tmp_path: Path, kind: str) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    files = [encoded(picture, kind) for picture in pictures]
    write_encoded(tmp_path / "e.npz", {"test": (files, [0, 1, 1, 0])}, ["a", "b"])
    examples = load_examples("e", packed("e"), "test", tmp_path)
    assert np.array_equal(examples.items, np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]))
    assert np.array_equal(examples.items, pictures) == (kind == "PNG")
    assert examples.labels.tolist() == [0, 1, 1, 0]


def test_encoded_grey_pictures_get_three_equal_channels(tmp_path: Path) -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    write_encoded(tmp_path / "g.npz", {"test": ([encoded(grey, "PNG")], [0])}, ["a"])
    examples = load_examples("g", packed("g"), "test", tmp_path)
    assert np.array_equal(examples.items, np.stack([grey] * 3, axis=-1)[None])


def test_packed_texts_are_chosen_by_split_and_named_by_all_splits(tmp_path: Path) -> None:
    rows = [
        ("x", 1, "test", "sport"),
        ("y", 0, "train", "world"),
        ("z", 2, "train", "money"),
        ("w", 1, "test", "sport"),
    ]
    write_texts(tmp_path, rows)
    examples = load_examples("news", packed("news"), "test", tmp_path)
    assert examples.items == ("x", "w")
    assert examples.labels.tolist() == [1, 1]
    assert examples.classes == ("world", "sport", "money")


def draw(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.astype(np.uint8)).save(path)


def shade(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value)


def test_an_image_folder_is_read_by_sorted_class_and_file(tmp_path: Path) -> None:
    for place, value in (("b/2", 20), ("b/1", 10), ("a/9", 90), ("c/1", 30)):
        draw(tmp_path / "test" / f"{place}.png", shade(value))
    task = task_of({"kind": "folder", "path": str(tmp_path), "size": 2})
    examples = load_examples("f", task, "test", None)
    assert numbers(examples) == [90, 10, 20, 30]
    assert examples.labels.tolist() == [0, 1, 1, 2]
    assert examples.classes == ("a", "b", "c")


@pytest.mark.parametrize("upright", [False, True])
def test_the_middle_square_of_a_picture_is_taken(tmp_path: Path, upright: bool) -> None:
    picture = np.zeros((4, 8, 3), dtype=np.uint8)
    picture[:, :2, 0] = picture[:, 2:6, 1] = picture[:, 6:, 2] = 200  # red, green, green, blue
    draw(tmp_path / "test" / "x" / "1.png", picture.swapaxes(0, 1) if upright else picture)
    task = task_of({"kind": "folder", "path": str(tmp_path), "size": 2})
    examples = load_examples("f", task, "test", None)
    assert np.array_equal(examples.items, np.broadcast_to(np.array([0, 200, 0]), (1, 2, 2, 3)))


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[0] = 200  # a bright upper edge
    (tmp_path / "test/x").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: the upper edge goes to the right
    Image.fromarray(picture).save(tmp_path / "test/x/1.png", exif=exif)
    found = load_examples("t", task_of({"kind": "folder", "path": str(tmp_path), "size": 4}), "test", None)
    assert np.array_equal(found.items[0], np.rot90(picture, -1))


def test_grey_pictures_of_16_bits_keep_their_upper_8(tmp_path: Path) -> None:
    (tmp_path / "test/x").mkdir(parents=True)
    deep = np.array([[0, 255], [256, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "test/x/1.png")
    found = load_examples("t", task_of({"kind": "folder", "path": str(tmp_path), "size": 2}), "test", None)
    assert found.items[0, :, :, 0].tolist() == [[0, 0], [1, 255]]


def test_pictures_of_numbers_without_a_range_are_refused_by_path(tmp_path: Path) -> None:
    (tmp_path / "test/x").mkdir(parents=True)
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "test/x/1.tiff")
    with pytest.raises(RefError, match=r"1\.tiff is not a picture: .* mode F"):
        load_examples("t", task_of({"kind": "folder", "path": str(tmp_path), "size": 2}), "test", None)


def test_a_folders_splits_may_have_other_names(tmp_path: Path) -> None:
    draw(tmp_path / "val" / "x" / "1.png", shade(7))
    task = task_of({"kind": "folder", "path": str(tmp_path), "size": 2, "test": "val"})
    assert numbers(load_examples("f", task, "test", None)) == [7]


def test_both_splits_of_an_image_folder_number_the_classes_alike(tmp_path: Path) -> None:
    for place in ("train/cat/1", "train/dog/1", "train/eel/1", "test/cat/1", "test/eel/1"):
        draw(tmp_path / f"{place}.png", shade(1))
    task = task_of({"kind": "folder", "path": str(tmp_path), "size": 2})
    train, test = (load_examples("f", task, split, None) for split in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog", "eel")
    assert test.labels.tolist() == [0, 2]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_tables_of_text_have_the_sorted_labels_of_both_splits(tmp_path: Path, form: str) -> None:
    train = pyarrow.table({"body": ["one, two", 'say "no"'], "mood": ["sad", "glad"], "more": [1, 2]})
    test = pyarrow.table({"body": ["line\nbreak", "é"], "mood": ["sad", "angry"], "more": [3, 4]})
    for name, table in (("train", train), ("test", test)):
        path = tmp_path / f"{name}.{form}"
        _ = pyarrow.csv.write_csv(table, path) if form == "csv" else pyarrow.parquet.write_table(table, path)
    paths = {name: str(tmp_path / f"{name}.{form}") for name in ("train", "test")}
    task = task_of({"kind": "table", "text": "body", "label": "mood", **paths})
    read = {split: load_examples("t", task, split, None) for split in ("train", "test")}
    assert read["train"].items == ("one, two", 'say "no"')
    assert read["test"].items == ("line\nbreak", "é")
    assert read["train"].classes == read["test"].classes == ("angry", "glad", "sad")
    assert (read["train"].labels.tolist(), read["test"].labels.tolist()) == ([2, 1], [2, 0])


def test_a_large_csv_with_line_breaks_in_its_texts_is_read_whole(tmp_path: Path) -> None:
    texts = [f"{i}\n{'word ' * 400}" for i in range(2000)]
    table = pyarrow.table({"text": texts, "label": [i % 2 for i in range(2000)]})
    pyarrow.csv.write_csv(table, tmp_path / "big.csv")
    task = task_of({"kind": "table", "train": str(tmp_path / "big.csv"), "test": str(tmp_path / "big.csv")})
    assert load_examples("big", task, "test", None).items == tuple(texts)


def test_digits_are_those_of_scikit_learn_and_every_third_is_a_test_image() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    examples = load_examples("d", task_of({"kind": "digits"}), "test", None)
    assert len(examples) == 599
    assert examples.labels.tolist() == digits.target[2::3].tolist()
    assert np.array_equal(examples.items, np.stack([15 * digits.images[2::3]] * 3, axis=-1))
    both = [len(load_examples("d", task_of({"kind": "digits"}), s, None)) for s in ("train", "validation")]
    assert both == [1198 - 119, 119]


def test_shuffled_digits_have_their_patches_of_2_x_2_in_another_fixed_order() -> None:
    plain, mixed, again = (
        load_examples("d", task_of({"kind": "digits", "shuffle": seed}), "test", None).items for seed in (0, 3, 3)
    )
    assert np.array_equal(mixed, again)
    order = np.random.default_rng(3).permutation(16)
    for place in range(16):
        (r, c), (from_r, from_c) = divmod(place, 4), divmod(int(order[place]), 4)
        patch = mixed[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
        assert np.array_equal(patch, plain[:, 2 * from_r : 2 * from_r + 2, 2 * from_c : 2 * from_c + 2])


def test_class_names_of_the_task_win(counted: Path) -> None:
    task = packed("counted", classes=["nought", "ace", "deuce"])
    assert load_examples("counted", task, "test", counted).classes == ("nought", "ace", "deuce")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_reading_twice_gives_the_same_digest(counted: Path, split: Split) -> None:
    one, two = (load_examples("counted", packed("counted"), split, counted) for _ in range(2))
    assert one.digest == two.digest
    assert len(one.digest) == 64


def test_a_digest_tells_every_difference_apart() -> None:
    x = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    plain = Examples(x, np.array([0, 1]), ("a", "b"))
    others = [
        dataclasses.replace(plain, items=x + 1),
        dataclasses.replace(plain, items=x.reshape(2, 1, 4, 3)),
        dataclasses.replace(plain, labels=np.array([1, 0])),
        dataclasses.replace(plain, classes=("a", "c")),
        dataclasses.replace(plain, items=("one", "two")),
        dataclasses.replace(plain, items=("onet", "wo")),
        plain.take([1, 0]),
        plain.first(1),
    ]
    assert len({e.digest for e in (plain, *others)}) == 9


def test_the_first_of_them_are_no_more_than_all() -> None:
    texts = Examples(("a", "b", "c"), np.array([2, 1, 0]), ("x", "y", "z"))
    assert texts.first(2).items == ("a", "b")
    assert texts.first(9).labels.tolist() == [2, 1, 0]
    assert texts.take([2, 0]).items == ("c", "a")


def test_files_that_desktops_leave_in_an_image_folder_are_no_pictures(tmp_path: Path) -> None:
    draw(tmp_path / "test/cat/1.png", shade(7))
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / "test/cat" / name).write_bytes(b"no picture")
    task = task_of({"kind": "folder", "path": str(tmp_path), "size": 2})
    assert numbers(load_examples("f", task, "test", None)) == [7]
