"""Pictures of a folder as batches of inputs of a network, so that nobody has to write code for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from merganser.align.activations import Batch
    from merganser.cli.subject import Subject

    Pixels = npt.NDArray[np.uint8]

#: Names of pictures, and of arrays of pictures.
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
ARRAYS = (".npy", ".npz")
#: At most so many pictures a batch.
BATCH = 100


@dataclass(frozen=True)
class Scale:
    """What becomes of a pixel of 0 to 1: (x - mean) / deviation.

    Attributes:
        mean: of red, green and blue.
        deviation: likewise.
    """

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


def scale_of(text: str) -> Scale:
    """A scale written as MEAN/DEVIATION, each one number or three with commas.

    Raises:
        ParameterError: If it is none.

    >>> scale_of("0.5/0.25")
    Scale(mean=(0.5, 0.5, 0.5), deviation=(0.25, 0.25, 0.25))
    """
    from merganser.errors import ParameterError

    try:
        mean, deviation = (_three([float(x) for x in part.split(",")]) for part in text.split("/"))
    except ValueError as error:
        raise ParameterError(
            f"--scale is {text!r}; it is MEAN/DEVIATION, as 0.5/0.5 or 0.485,0.456,0.406/0.229,0.224,0.225"
        ) from error
    if not min(deviation) > 0:
        raise ParameterError(f"--scale is {text!r}; deviations are above 0")
    return Scale(mean, deviation)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = [*values] * 3 if len(values) == 1 else values
    return red, green, blue


def picture_batches(
    places: Sequence[Path], it: Subject, model: str, *, count: int, scale: Scale | None = None
) -> list[Batch]:
    """Batches from folders of pictures, of each as many, for a network of square pictures.

    Args:
        places: folders, all of whose pictures count however deep they lie, or files of arrays.
        it: the network with inputs; its first input of pictures is replaced.
        model: its name; a folder may tell how pixels are scaled.
        count: pictures of all places together, spread evenly over each.
        scale: how pixels are scaled, where neither the network nor its folder tells.

    Raises:
        RefError: If there are no pictures, or one cannot be read.
        ParameterError: If the network takes no pictures, or others, or their scale is not known.
        MerganserError: If pillow is not installed.
    """
    import numpy as np
    import torch

    from merganser.errors import ParameterError
    from merganser.study.networks import PixelEncoder

    if isinstance(it.network, PixelEncoder):
        side, axis, scale = it.network.image, 3, Scale((0.5,) * 3, (0.5,) * 3)
        where: int | str = 0
    else:
        where, shape, axis = _input(it)
        scale, side = scale or _scale_of_folder(Path(model)), shape[2]
        if side != shape[3 if axis == 1 else 1]:
            raise ParameterError(f"the network's input is {shape}; pictures of a folder are cut to squares")
    if scale is None:
        raise ParameterError(
            "how pixels are scaled for this network is not known", "--scale MEAN/DEVIATION, as 0.5/0.5 for -1 to 1"
        )
    shares = [len(range(i, count, len(places))) for i in range(len(places))]
    read = [_pictures(place, side, share) for place, share in zip(places, shares, strict=True)]
    mixed = [x for x in chain.from_iterable(zip_longest(*read)) if x is not None]
    mean, deviation = torch.tensor(scale.mean), torch.tensor(scale.deviation)
    x = (torch.from_numpy(np.stack(mixed)) / 255 - mean) / deviation
    x = x if axis == 3 else x.movedim(-1, 1).contiguous()
    parts = -(-len(x) // BATCH)
    return [_replaced(it, where, part) for part in x[: len(x) // parts * parts].chunk(parts)]  # all of one size


def _input(it: Subject) -> tuple[int | str, tuple[int, ...], int]:
    """Where a network takes pictures, of which shape, and along which axis their channels lie."""
    import torch

    from merganser.errors import ParameterError

    inputs: list[tuple[int | str, Any]] = [*enumerate(it.args), *it.kwargs.items()]
    for where, x in inputs:
        if isinstance(x, torch.Tensor) and x.ndim == 4 and x.is_floating_point():
            for axis in (1, 3):
                if x.shape[axis] == 3:
                    return where, tuple(x.shape), axis
    seen = ", ".join(str(tuple(x.shape)) for _, x in inputs if isinstance(x, torch.Tensor))
    raise ParameterError(
        f"--data gives pictures of three colours, and the network takes {seen or 'no tensor'}", "give --batches"
    )


def _scale_of_folder(folder: Path) -> Scale | None:
    """As the picture processor of a folder of transformers says."""
    try:
        content = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        return Scale(_three(content["image_mean"]), _three(content["image_std"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _replaced(it: Subject, where: int | str, x: Any) -> Batch:
    if isinstance(where, str):
        return it.args, {**it.kwargs, where: x}
    return (*it.args[:where], x, *it.args[where + 1 :]), it.kwargs


def _pictures(place: Path, side: int, count: int) -> list[Pixels]:
    """At most so many pictures, evenly over all in the order of their names."""
    from merganser.errors import RefError
    from merganser.study.data import picture_decoder

    if not place.exists():
        raise RefError(f"{place} does not exist")
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    found: list[Path | Pixels] = []
    for path in files:
        if path.suffix.lower() in PICTURES and not path.name.startswith("."):
            found.append(path)
        elif path.suffix.lower() in ARRAYS:
            found += [x for array in _arrays(path, side) for x in array]
    if not found:
        raise RefError(f"{place} holds no pictures", f"{', '.join(PICTURES)}, or arrays of uint8 in .npy or .npz")
    decode = picture_decoder(side)
    pictures = []
    for i in range(min(count, len(found))):
        item = found[i * len(found) // min(count, len(found))]
        try:
            pictures.append(decode(item.read_bytes()) if isinstance(item, Path) else item)
        except (OSError, ValueError) as error:
            raise RefError(f"{item} is not a picture: {error}") from error
    return pictures


def _arrays(path: Path, side: int) -> Iterator[Pixels]:
    """Pictures of a file, shape (n, side, side, 3); of a packed data set those to train with."""
    from zipfile import BadZipFile

    import numpy as np

    from merganser.errors import ParameterError, RefError

    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            names = [] if isinstance(file, np.ndarray) else file.files
            named = ["x_train"] if "x_train" in names else names
            arrays = [file] if isinstance(file, np.ndarray) else [file[name] for name in named]
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise RefError(f"{path} cannot be read: {error}") from error
    for array in arrays:
        if array.dtype != np.uint8 or array.ndim not in (3, 4):
            continue
        x = np.repeat(array[..., None], 3, axis=-1) if array.ndim == 3 else array
        if x.shape[1:] != (side, side, 3):
            raise ParameterError(f"{path} holds pictures of {x.shape[1:]}, and the network takes {(side, side, 3)}")
        yield x
