"""Every way in which data can be missing or wrong, and what is said then."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from small_data import bars, encoded, packed, task_of, write_encoded, write_npz

from merganser.errors import MerganserError, ParameterError, RefError
from merganser.study.data import load_examples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_npz(tmp_path / "mnist.npz", {"train": bars(20), "test": bars(10)}, ["left", "right"])
    return tmp_path


def write_table(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_packed_set_without_a_data_folder_is_refused_with_the_option_that_names_one() -> None:
    with pytest.raises(RefError, match="mnist is a packed data set, and no data folder is given") as caught:
        load_examples("digits", packed("mnist"), "test", None)
    assert caught.value.hint == "--data DIR"


def test_a_data_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RefError, match=r"nowhere holds neither mnist\.npz nor text/mnist\.parquet") as caught:
        load_examples("digits", packed("mnist"), "test", tmp_path / "nowhere")
    assert "--data DIR" in (caught.value.hint or "")


def test_a_misspelt_file_is_refused_with_the_nearest_name(folder: Path) -> None:
    write_table(folder / "text" / "ag_news.parquet", text=["x"])
    for wrong, right in (("mnits", "mnist"), ("agnews", "ag_news")):
        with pytest.raises(RefError, match=f"holds neither {wrong}.npz nor text/{wrong}.parquet") as caught:
            load_examples("t", packed(wrong), "test", folder)
        assert caught.value.hint == f"did you mean {right}?"


def test_a_file_unlike_any_other_is_refused_with_what_there_is(folder: Path) -> None:
    write_table(folder / "text" / "ag_news.parquet", text=["x"])
    with pytest.raises(RefError) as caught:
        load_examples("t", packed("zebra"), "test", folder)
    assert caught.value.hint == "--data DIR; it holds ag_news, mnist"


@pytest.mark.parametrize("lost", ["classes", "y_test", "x_test"])
def test_an_npz_that_lacks_a_part_is_refused_by_path_and_part(tmp_path: Path, lost: str) -> None:
    x, y = bars(4)
    arrays = {"x_test": x, "y_test": np.array(y), "classes": np.array(["left", "right"])}
    np.savez(tmp_path / "m.npz", **{name: array for name, array in arrays.items() if name != lost})
    with pytest.raises(RefError, match="is not a packed image set") as caught:
        load_examples("m", packed("m"), "test", tmp_path)
    assert str(tmp_path / "m.npz") in caught.value.message
    assert lost.removeprefix("x") in caught.value.message
    assert "layout" in (caught.value.hint or "")


@pytest.mark.parametrize("damage", ["empty", "words", "cut", "pickle"])
def test_a_damaged_npz_is_refused_by_path(folder: Path, damage: str) -> None:
    path = folder / "mnist.npz"
    if damage == "pickle":
        np.savez(path, classes=np.array(["a", 1], dtype=object), x_test=bars(2)[0], y_test=np.array([0, 0]))
    else:
        path.write_bytes({"empty": b"", "words": b"no such thing", "cut": path.read_bytes()[:-40]}[damage])
    with pytest.raises(RefError, match=r"mnist\.npz is not a packed image set"):
        load_examples("m", packed("mnist"), "test", folder)


def test_bytes_that_are_no_picture_are_refused_by_path(tmp_path: Path) -> None:
    write_encoded(tmp_path / "e.npz", {"test": ([b"no picture at all"], [0])}, ["a"])
    with pytest.raises(RefError, match=r"e\.npz"):
        load_examples("e", packed("e"), "test", tmp_path)


def test_pictures_of_two_sizes_in_one_packed_set_are_refused_by_path(tmp_path: Path) -> None:
    files = [encoded(np.zeros((size, size, 3), np.uint8), "PNG") for size in (4, 5)]
    write_encoded(tmp_path / "e.npz", {"test": (files, [0, 0])}, ["a"])
    with pytest.raises(MerganserError, match=r"e\.npz"):
        load_examples("e", packed("e"), "test", tmp_path)


def test_pictures_that_are_not_uint8_are_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "m.npz", {"test": (np.full((2, 4, 4), 0.5), [0, 1])}, ["a", "b"])
    with pytest.raises(MerganserError, match="uint8"):
        load_examples("m", packed("m"), "test", tmp_path)


def test_fewer_labels_than_pictures_are_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "m.npz", {"test": (bars(4)[0], [0, 1])}, ["a", "b"])
    with pytest.raises(ParameterError, match="shapes: 4 items and 2 labels"):
        load_examples("shapes", packed("m"), "test", tmp_path)


def test_a_label_without_a_class_name_is_refused(folder: Path) -> None:
    with pytest.raises(ParameterError, match="shapes has labels up to 1, and 1 class names"):
        load_examples("shapes", packed("mnist", classes=["left"]), "test", folder)


def test_a_negative_label_is_refused_by_its_value(tmp_path: Path) -> None:
    write_npz(tmp_path / "m.npz", {"test": (bars(3)[0], [0, -1, 1])}, ["a", "b"])
    with pytest.raises(ParameterError, match="-1"):
        load_examples("m", packed("m"), "test", tmp_path)


@pytest.mark.parametrize("form", ["raw", "encoded", "text", "folder"])
def test_an_empty_split_is_refused_by_name(tmp_path: Path, form: str) -> None:
    task = packed("m")
    if form == "raw":
        write_npz(tmp_path / "m.npz", {"test": (np.zeros((0, 4, 4), np.uint8), [])}, ["a"])
    elif form == "encoded":
        write_encoded(tmp_path / "m.npz", {"test": ([], [])}, ["a"])
    elif form == "text":
        columns = {"text": ["x"], "label": [0], "split": ["train"], "label_name": ["a"]}
        write_table(tmp_path / "text" / "m.parquet", **columns)
    else:
        (tmp_path / "test" / "a").mkdir(parents=True)
        task = task_of({"kind": "folder", "path": str(tmp_path)})
    with pytest.raises(ParameterError, match="the test split of things is empty"):
        load_examples("things", task, "test", tmp_path)


def test_nine_training_examples_have_no_validation_split(tmp_path: Path) -> None:
    write_npz(tmp_path / "m.npz", {"train": bars(9)}, ["left", "right"])
    assert len(load_examples("m", packed("m"), "train", tmp_path)) == 9
    with pytest.raises(ParameterError, match="the validation split of m is empty"):
        load_examples("m", packed("m"), "validation", tmp_path)


def test_a_packed_table_without_a_column_is_refused_with_those_it_has(tmp_path: Path) -> None:
    path = write_table(tmp_path / "text" / "m.parquet", text=["x"], label=[0], split=["test"])
    with pytest.raises(ParameterError, match="has no column 'label_name'") as caught:
        load_examples("m", packed("m"), "test", tmp_path)
    assert str(path) in caught.value.message
    assert caught.value.hint == "it has text, label, split"


def test_labels_of_a_packed_table_with_a_hole_are_refused(tmp_path: Path) -> None:
    columns = {"text": ["x", "y"], "label": [0, 2], "split": ["test"] * 2, "label_name": ["a", "c"]}
    write_table(tmp_path / "text" / "m.parquet", **columns)
    with pytest.raises(ParameterError, match=r"they must be 0, 1, 2"):
        load_examples("m", packed("m"), "test", tmp_path)


def test_a_label_with_two_names_is_refused(tmp_path: Path) -> None:
    columns = {"text": ["x", "y"], "label": [0, 0], "split": ["test"] * 2, "label_name": ["a", "b"]}
    write_table(tmp_path / "text" / "m.parquet", **columns)
    with pytest.raises(ParameterError, match="label"):
        load_examples("m", packed("m"), "test", tmp_path)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table_that_is_not_there_or_none_is_refused_by_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    task = task_of({"kind": "table", "train": str(path), "test": str(path)})
    with pytest.raises(RefError, match="cannot be read") as caught:
        load_examples("t", task, "test", None)
    assert str(path) in caught.value.message
    path.write_bytes(b"")
    with pytest.raises(RefError, match="cannot be read"):
        load_examples("t", task, "test", None)


def test_a_table_without_the_named_column_is_refused_with_those_it_has(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("body,mood\nhello,glad\n")
    task = task_of({"kind": "table", "train": str(path), "test": str(path), "text": "body", "label": "moood"})
    with pytest.raises(ParameterError, match=r"t\.csv has no column 'moood'") as caught:
        load_examples("t", task, "test", None)
    assert caught.value.hint == "it has body, mood"


def test_an_image_folder_that_is_not_there_is_refused_with_its_layout(tmp_path: Path) -> None:
    task = task_of({"kind": "folder", "path": str(tmp_path)})
    with pytest.raises(RefError, match="is no folder") as caught:
        load_examples("f", task, "test", None)
    assert str(tmp_path / "test") in caught.value.message
    assert "DIR/SPLIT/CLASS" in (caught.value.hint or "")


def test_a_file_that_is_no_picture_is_refused_by_path(tmp_path: Path) -> None:
    path = tmp_path / "test" / "cat" / "notes.txt"
    path.parent.mkdir(parents=True)
    path.write_text("no picture")
    with pytest.raises(RefError, match="is not a picture") as caught:
        load_examples("f", task_of({"kind": "folder", "path": str(tmp_path)}), "test", None)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("library", "source", "says"),
    [
        ("datasets", {"kind": "hub", "path": "org/birds"}, "org/birds is a hub data set and needs datasets"),
        ("sklearn", {"kind": "digits"}, "the digits need scikit-learn"),
        ("pyarrow", {"kind": "table", "train": "t.csv", "test": "t.csv"}, "tables need pyarrow"),
        ("PIL", {"kind": "folder", "path": "."}, "pictures need pillow"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, source: dict[str, str], says: str
) -> None:
    (tmp_path / "test").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not there
    for name in [n for n in sys.modules if n.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MerganserError, match=says) as caught:
        load_examples("t", task_of(source), "test", None)
    assert (caught.value.hint or "").startswith("pip install")
