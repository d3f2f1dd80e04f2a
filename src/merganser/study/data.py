"""Examples of a task: images or texts with labels, from files, folders or a hub; always the same, in the same order."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from merganser.errors import MerganserError, ParameterError, RefError
from merganser.study.words import DigitsSource, FolderSource, HubSource, PackedSource, TableSource, Task

Split = Literal["train", "validation", "test"]
Items = npt.NDArray[np.uint8] | tuple[str, ...]
Read = tuple[Items, npt.NDArray[np.int64], tuple[str, ...]]

#: Every tenth training example is the validation split where a source has none of its own.
VALIDATION_STEP = 10


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    Attributes:
        items: uint8 images of shape (n, height, width, 3), or n texts.
        labels: class numbers, shape (n,).
        classes: name of every class.
    """

    items: Items
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """sha256 over items, labels and class names."""
        hashed = hashlib.sha256(json.dumps(self.classes).encode())
        hashed.update(self.labels.astype("<i8").tobytes())
        if isinstance(self.items, tuple):
            hashed.update(json.dumps(self.items).encode())
        else:
            hashed.update(f"{self.items.shape}".encode() + self.items.tobytes())
        return hashed.hexdigest()

    def take(self, places: Sequence[int] | npt.NDArray[np.int64]) -> Examples:
        """Some of them, in that order."""
        items = tuple(self.items[i] for i in places) if isinstance(self.items, tuple) else self.items[places]
        return Examples(items, self.labels[places], self.classes)

    def first(self, count: int) -> Examples:
        """The first of them."""
        return self.take(np.arange(min(count, len(self))))


def load_examples(name: str, task: Task, split: Split, data: Path | None) -> Examples:
    """Read one split of a task.

    Args:
        name: of the task, for errors.
        task: its node.
        split: "validation" is every tenth training example, which "train" leaves out.
        data: the folder of packed files.

    Raises:
        RefError: If a file, folder or data set is not there.
        ParameterError: If the split is empty, or class names and labels do not fit.
        MerganserError: If a library is missing.
    """
    part: Literal["train", "test"] = "test" if split == "test" else "train"
    items, labels, classes = READERS[type(task.data)](task.data, part, data)
    if task.classes is not None:
        classes = task.classes
    if len(labels) != len(items):
        raise ParameterError(f"{name}: {len(items)} items and {len(labels)} labels")
    places = np.arange(len(labels))
    if split != "test":
        held_out = places % VALIDATION_STEP == VALIDATION_STEP - 1
        places = places[held_out if split == "validation" else ~held_out]
    if not len(places):
        raise ParameterError(f"the {split} split of {name} is empty")
    if labels.min() < 0:
        raise ParameterError(f"{name} has a label {labels.min()}; labels are 0, 1, 2, ...")
    if labels.max() >= len(classes):
        raise ParameterError(f"{name} has labels up to {labels.max()}, and {len(classes)} class names")
    return Examples(items, labels, classes).take(places)


def _packed(source: PackedSource, split: str, data: Path | None) -> Read:
    if data is None:
        raise RefError(f"{source.file} is a packed data set, and no data folder is given", "--data DIR")
    folder, image = data / "text", data / f"{source.file}.npz"
    table = folder / f"{source.file}.parquet"
    if image.is_file():
        items, labels, classes = _npz(image, split)
        if source.domain is not None:
            own = _of_domain(image, split, source.domain)
            items, labels = np.asarray(items)[own], labels[own]
        return items, labels, classes
    if table.is_file():
        return _parquet(table, split)
    known = sorted({p.stem for p in (*data.glob("*.npz"), *folder.glob("*.parquet"))})
    near = get_close_matches(source.file, known, n=1)
    raise RefError(
        f"{data} holds neither {image.name} nor text/{table.name}",
        f"did you mean {near[0]}?" if near else f"--data DIR; it holds {', '.join(known) or 'no data set'}",
    )


def _npz(path: Path, split: str) -> Read:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            labels = file[f"y_{split}"].astype(np.int64)
            classes = tuple(map(str, file["classes"]))
            if f"x_{split}" in file.files:
                return _pictures(file[f"x_{split}"]), labels, classes
            data, offsets = file[f"bytes_{split}"].tobytes(), file[f"offsets_{split}"]
        decode = picture_decoder()
        items = [decode(data[a:b]) for a, b in pairwise(offsets)]
        return (np.stack(items) if items else np.empty((0, 1, 1, 3), np.uint8)), labels, classes
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise RefError(
            f"{path} is not a packed image set: {error}", "see docs/guides/studies.md for the layout"
        ) from error


def _of_domain(path: Path, split: str, domain: str) -> npt.NDArray[np.bool_]:
    """Which pictures are of a domain."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        if "domains" not in file.files:
            raise RefError(f"{path} has no domains", "leave domain out")
        names = [str(name) for name in file["domains"]]
        if domain not in names:
            raise RefError(f"{path} has no domain {domain}", f"it has {', '.join(names)}")
        own: npt.NDArray[np.bool_] = file[f"domain_{split}"] == names.index(domain)
        return own


def _pictures(x: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Grey pictures get three equal channels."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise ValueError(f"pictures are {x.dtype} of shape {x.shape}; they must be uint8, (n, height, width[, 3])")
    return np.repeat(x[..., None], 3, axis=-1) if x.ndim == 3 else x


def picture_decoder(size: int | None = None) -> Callable[[bytes], npt.NDArray[np.uint8]]:
    """What makes pixels of a file's bytes; a size crops to a square and resizes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MerganserError("pictures need pillow", 'pip install "merganser[study]"') from error

    def decode(data: bytes) -> npt.NDArray[np.uint8]:
        return _square(Image.open(io.BytesIO(data)), size)

    return decode


def _square(image: Any, size: int | None) -> npt.NDArray[np.uint8]:
    """RGB, turned as its EXIF data say; where a size is given, the middle square of it, resized.

    Raises:
        OSError: If pixels are 32-bit numbers, whose range no file tells.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise OSError(f"its pixels are of mode {image.mode}, whose range is unknown; save it with 8 or 16 bits")
    image = image.convert("RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size))
    return np.asarray(image, dtype=np.uint8)


def _parquet(path: Path, split: str) -> Read:
    columns = _table(path, ("text", "label", "split", "label_name"))
    chosen = [i for i, s in enumerate(columns["split"]) if s == split]
    names = dict(zip(columns["label"], columns["label_name"], strict=True))
    if twice := {label for label, n in zip(columns["label"], columns["label_name"], strict=True) if names[label] != n}:
        raise ParameterError(f"{path}: label {min(twice)} has two names")
    if sorted(names) != list(range(len(names))):
        raise ParameterError(f"{path}: labels are {sorted(names)[:5]}...; they must be 0, 1, 2, ...")
    labels = np.array([columns["label"][i] for i in chosen], dtype=np.int64)
    return tuple(columns["text"][i] for i in chosen), labels, tuple(names[i] for i in range(len(names)))


def _table(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise MerganserError("tables need pyarrow", 'pip install "merganser[study]"') from error
    try:
        breaks = pyarrow.csv.ParseOptions(newlines_in_values=True)
        table = (
            pyarrow.csv.read_csv(path, parse_options=breaks)
            if path.suffix == ".csv"
            else pyarrow.parquet.read_table(path)
        )
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise RefError(f"{path} cannot be read: {error}") from error
    for name in names:
        if name not in table.column_names:
            raise ParameterError(f"{path} has no column {name!r}", f"it has {', '.join(table.column_names)}")
    return {name: table.column(name).to_pylist() for name in names}


def _digits(source: DigitsSource, split: str, data: Path | None) -> Read:
    """1,797 images of 8 x 8; every third is a test image. Pixels 0..16 become 0..240, three equal channels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MerganserError("the digits need scikit-learn", 'pip install "merganser[study]"') from error
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 3 == 2) == (split == "test")
    x = (digits.images[chosen] * 15).astype(np.uint8)
    if source.shuffle:
        order = np.random.default_rng(source.shuffle).permutation(16)
        patches = x.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 2, 2)[:, order]
        x = patches.reshape(-1, 4, 4, 2, 2).swapaxes(2, 3).reshape(-1, 8, 8)
    return np.repeat(x[..., None], 3, axis=-1), digits.target[chosen].astype(np.int64), tuple("0123456789")


def _folder(source: FolderSource, split: str, data: Path | None) -> Read:
    folder = Path(source.path).expanduser()
    root = folder / getattr(source, split)
    if not root.is_dir():
        raise RefError(f"{root} is no folder", "an image set is DIR/SPLIT/CLASS/*.png or other pictures")
    places = [place for place in (folder / source.train, folder / source.test) if place.is_dir()]
    classes = tuple(sorted({p.name for place in places for p in place.iterdir() if p.is_dir()}))
    files = [(i, p) for i, name in enumerate(classes) for p in _visible(root / name)]
    decode = picture_decoder(source.size)
    pictures = []
    for _, path in files:
        try:
            pictures.append(decode(path.read_bytes()))
        except OSError as error:
            raise RefError(f"{path} is not a picture: {error}") from error
    items = np.stack(pictures) if pictures else np.empty((0, source.size, source.size, 3), np.uint8)
    return items, np.array([i for i, _ in files], dtype=np.int64), classes


def _visible(folder: Path) -> list[Path]:
    """Files of a folder but those that desktops leave there."""
    return [p for p in sorted(folder.glob("*")) if p.is_file() and p.name[0] != "." and p.name != "Thumbs.db"]


def _tables(source: TableSource, split: str, data: Path | None) -> Read:
    columns = _table(Path(getattr(source, split)).expanduser(), (source.text, source.label))
    both = {str(x) for s in ("train", "test") for x in _labels_of(source, s)}
    classes = tuple(sorted(both))
    labels = np.array([classes.index(str(x)) for x in columns[source.label]], dtype=np.int64)
    return tuple(map(str, columns[source.text])), labels, classes


def _labels_of(source: TableSource, split: str) -> list[Any]:
    return _table(Path(getattr(source, split)).expanduser(), (source.label,))[source.label]


def _hub(source: HubSource, split: str, data: Path | None) -> Read:
    try:
        import datasets
    except ImportError as error:
        raise MerganserError(f"{source.path} is a hub data set and needs datasets", "pip install datasets") from error
    try:
        table = datasets.load_dataset(source.path, source.config, split=getattr(source, split))
    except Exception as error:  # the library raises errors of many kinds for a hub that it cannot reach
        raise RefError(
            f"data set {source.path} cannot be loaded: {error}", "it needs the hub, or a cached copy"
        ) from error
    for column in (source.item, source.label):
        if column not in table.features:
            raise ParameterError(f"{source.path} has no column {column!r}", f"it has {', '.join(table.features)}")
    label = table.features[source.label]
    labels = np.array(table[source.label], dtype=np.int64)
    classes = tuple(getattr(label, "names", None) or map(str, range(int(labels.max()) + 1)))
    items = table[source.item]
    if len(labels) and isinstance(items[0], str):
        return tuple(items), labels, classes
    pictures = np.empty((len(labels), source.size, source.size, 3), np.uint8)  # filled in place: they may be large
    for i, picture in enumerate(items):
        pictures[i] = _square(picture, source.size)
    return pictures, labels, classes


READERS: dict[type, Callable[[Any, str, Path | None], Read]] = {
    PackedSource: _packed,
    DigitsSource: _digits,
    FolderSource: _folder,
    TableSource: _tables,
    HubSource: _hub,
}
