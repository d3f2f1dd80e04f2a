"""A model seen through another vocabulary: its tensors that have a row a token, with other rows."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from merganser.checkpoints.adapter import AdapterSource
from merganser.checkpoints.tied_head import Tied
from merganser.continual.roles import literal, matches
from merganser.errors import DtypeError, MissingTensorError, ShapeError
from merganser.merging.layers import place_of
from merganser.numerics import TORCH_DTYPES, narrowed
from merganser.types import FLOAT_DTYPES, Source, TensorInfo

#: Owners of a row that no single model brings.
ZERO, MEAN = -1, -2
#: Elements that are read at a time where no caller sets the pace.
BLOCK_ELEMENTS = 1 << 18

#: Modules that have a row a token whatever the model.
_TABLE = re.compile(
    r"(^|\.)(embed_tokens(?:_per_layer)?|wte|word_embeddings?|tok_embeddings|tokens_embed|token_embeddings?|embed_in|embed_out|lm_head)"
    r"\.(weight|bias)$"
)
#: Modules that have one in some models; their rows tell.
_PERHAPS = re.compile(
    r"(^|\.)(shared|embeddings?|emb|output|output_layer|head|decoder|predictions|vocab_projector|generator_lm_head|"
    r"lm_loss|proj_out)\.(weight|bias)$"
)


def vocabulary_tensors(source: Source, tokens: Sequence[str], keep: Sequence[str] = ()) -> tuple[tuple[str, ...], int]:
    """Stored tensors whose rows belong to tokens, and their number of rows.

    Args:
        source: the model.
        tokens: of its tokenizer, by id.
        keep: patterns of names that stay the base's, so that it does not matter what they are.

    Returns:
        Names, sorted, and rows, which may be more than there are tokens.

    Raises:
        ShapeError: If there is none, one has fewer rows than there are tokens, their rows differ, or a tensor cannot
            be told from one of them.
        DtypeError: If one is quantised.
    """
    tables = {name: info for name, info in source.infos.items() if _TABLE.search(name) and info.shape}
    perhaps = {
        name: info
        for name, info in source.infos.items()
        if _PERHAPS.search(name) and name not in tables and info.shape and place_of(name) is None
    }
    if not any(len(info.shape) == 2 for info in tables.values()):
        # Without a telling name the widest of the others is taken, such as "shared" of T5 or "embeddings" of Mamba.
        fitting = {n: i for n, i in perhaps.items() if len(i.shape) == 2 and i.rows >= len(tokens)}
        if not fitting:
            raise ShapeError(
                f"no tensor of {source.ref} looks like an embedding of its {len(tokens)} tokens",
                "leave the vocabulary as it is, or rename the embedding to embed_tokens.weight",
            )
        tables |= fitting
    for name, info in tables.items():
        if info.rows < len(tokens):
            raise ShapeError(
                f"{name} of {source.ref} has {info.rows} rows, and its tokenizer has {len(tokens)} tokens, from "
                f"{tokens[info.rows]!r} on without a row",
                "resize the embeddings, or take the tokens without a row out of the tokenizer's files",
            )
    counts = {info.rows: name for name, info in reversed(tables.items())}
    if len(counts) > 1:
        listed = "; ".join(f"{rows} in {name}" for rows, name in sorted(counts.items()))
        raise ShapeError(
            f"tensors of {source.ref} with a row a token have different numbers of rows: {listed}",
            "models with several vocabularies cannot be mapped; leave the vocabulary as it is",
        )
    rows = next(iter(counts))
    names = sorted([*tables, *(name for name, info in perhaps.items() if name not in tables and info.rows == rows)])
    _refuse_doubtful(source, names, rows, keep)
    for name in names:
        if source.infos[name].dtype not in FLOAT_DTYPES:
            raise DtypeError(
                f"{name} of {source.ref} is {source.infos[name].dtype}, whose rows cannot be mapped",
                "a quantised model must be dequantised first",
            )
    return tuple(names), rows


def _refuse_doubtful(source: Source, names: Collection[str], rows: int, keep: Sequence[str]) -> None:
    """Refuse tensors as long as the vocabulary on some axis of which nothing else tells what the axis is.

    Where a layer has such an axis it is a width of the model, and the names decide.
    """
    alike = [name for name, info in source.infos.items() if rows in info.shape and name not in names]
    if any(place_of(name) is not None and not _PERHAPS.search(name) for name in alike):
        return
    widths = {size for name in names for size in source.infos[name].shape[1:]}
    for name in alike:
        if rows not in widths and not matches(name, keep):
            raise ShapeError(
                f"{name} of {source.ref} has shape {source.infos[name].shape}: {rows} is also the number of rows of "
                f"{next(iter(names))}, and its name does not tell whether they are tokens",
                f"keep: ['{literal(name)}'] leaves it as it is, if they are none",
            )


@dataclass(frozen=True, eq=False)
class RowMap:
    """What the rows of one model are made of.

    Attributes:
        me: number of the model.
        owner: for every token of the output the number of the model that brings its row, or ZERO or MEAN.
        row: that model's row.
        mean: for tokens whose owner is MEAN the rows of their mean, by token and model.
        own: rows of the model that belong to a token of its own, ascending.
        rows: of the output, those behind the last token included.
    """

    me: int
    owner: Tensor = field(repr=False)
    row: Tensor = field(repr=False)
    mean: Mapping[int, Sequence[tuple[int, int]]] = field(repr=False)
    own: Tensor = field(repr=False)
    rows: int

    def changes(self, stored_rows: int) -> bool:
        """Whether the rows are other than the stored ones."""
        same = self.rows == stored_rows == len(self.row) and bool((self.owner == self.me).all())
        return not (same and torch.equal(self.row, torch.arange(len(self.row))))


class VocabularyView:
    """A Source whose vocabulary-indexed tensors have a row for each token of the output; all else is as it was.

    Rows behind the last token are the mean of the rows of the model's own tokens. Reading takes memory for the rows
    that are asked for and up to three times as much, and blocks of `BLOCK_ELEMENTS`.

    Args:
        source: the model.
        names: its tensors that have a row a token.
        rows: what becomes of them.
        models: all models by number.

    Raises:
        MissingTensorError: If a model lacks a tensor a row of which is needed.
        ShapeError: If its rows are of another length.
    """

    identity: str | None = None

    def __init__(self, source: Source, names: Collection[str], rows: RowMap, models: Sequence[Source]) -> None:
        self._source, self._rows, self._names = source, rows, frozenset(names)
        self.source, self.ref = source, source.ref
        self.aliases: Mapping[str, str] = source.aliases
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo((rows.rows, *info.shape[1:]), info.dtype) if name in self._names else info
            for name, info in source.infos.items()
        }
        owners = {*rows.owner.tolist(), *(k for pairs in rows.mean.values() for k, _ in pairs)}
        self._stored = {
            (k, name): (models[k], _found(source, name, models[k]))
            for k in sorted(owners - {ZERO, MEAN})
            for name in sorted(names)
        }
        self._lock = threading.Lock()
        self._means: dict[str, Tensor] = {}

    def companions(self) -> Sequence[Path]:
        """The files beside the source."""
        return self._source.companions()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor, or rows [start, stop) of it, as the output's vocabulary counts them.

        Raises:
            NonFiniteError: If another model's row does not fit the tensor's type.
        """
        if name not in self._names:
            return self._source.read(name, rows)
        info, tokens = self.infos[name], len(self._rows.row)
        start, stop = rows if rows is not None else (0, info.rows)
        owner, row = self._rows.owner[start:stop], self._rows.row[start:stop]
        if 0 < len(row) == stop - start and bool((owner == owner[0]).all()) and int(owner[0]) == self._rows.me:
            first = int(row[0])
            if torch.equal(row, torch.arange(first, first + len(row))):
                return self._source.read(name, (first, first + len(row)))
        out = torch.zeros((stop - start, *info.shape[1:]), dtype=TORCH_DTYPES[info.dtype])
        for k in sorted(set(owner.tolist())):
            at = (owner == k).nonzero()[:, 0]
            if k == MEAN:
                out[at] = narrowed(self._averaged(name, [start + i for i in at.tolist()]), info.dtype, name)
            elif k != ZERO:
                out[at] = narrowed(self._gathered(k, name, row[at]), info.dtype, name)
        if stop > tokens:
            out[max(tokens - start, 0) :] = self._mean_row(name)
        return out

    def _gathered(self, k: int, name: str, rows: Tensor) -> Tensor:
        """Rows of a model in the order asked for; neighbours are read together, at most twice as many as are needed."""
        model, stored = self._stored[k, name]
        order = rows.argsort()
        wanted = rows[order]
        gaps = (wanted.diff() > 2).nonzero()[:, 0] + 1
        ends = [0, *gaps.tolist(), len(wanted)]
        parts = []
        for begin, end in pairwise(ends):
            first = int(wanted[begin])
            part = model.read(stored, (first, int(wanted[end - 1]) + 1))
            parts.append(part[wanted[begin:end] - first] if end - begin > 1 else part)
        out = torch.empty((len(rows), *parts[0].shape[1:]), dtype=parts[0].dtype)
        out[order] = torch.cat(parts)
        return out

    def _averaged(self, name: str, tokens: Sequence[int]) -> Tensor:
        """For each token the mean of the rows of its owners, in float64."""
        total = torch.zeros((len(tokens), *self.infos[name].shape[1:]), dtype=torch.float64)
        count = torch.zeros(len(tokens), dtype=torch.float64)
        parts: dict[int, list[tuple[int, int]]] = {}
        for i, token in enumerate(tokens):
            for k, row in self._rows.mean[token]:
                parts.setdefault(k, []).append((i, row))
        for k, pairs in sorted(parts.items()):
            at = torch.tensor([i for i, _ in pairs])
            total[at] += self._gathered(k, name, torch.tensor([row for _, row in pairs])).double()
            count[at] += 1
        return total / count.reshape(-1, *[1] * (total.ndim - 1))

    def _mean_row(self, name: str) -> Tensor:
        """Mean of the rows of the model's own tokens, in float64 by blocks that no caller chooses; found once."""
        with self._lock:
            if name not in self._means:
                info, own = self._source.infos[name], self._rows.own
                total = torch.zeros(info.shape[1:], dtype=torch.float64)
                for first, stop in _blocks(info):
                    begin, end = torch.searchsorted(own, torch.tensor([first, stop])).tolist()
                    if begin < end:
                        block = self._source.read(name, (first, stop)).double()
                        total += block[own[begin:end] - first].sum(0)
                mean = total / max(len(own), 1)
                self._means[name] = narrowed(mean, info.dtype, name)
            return self._means[name]


def _blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_ELEMENTS // max(1, prod(info.shape[1:])))
    for first in range(0, info.rows, step):
        yield first, min(first + step, info.rows)


def _found(source: Source, name: str, model: Source) -> str:
    """Name under which a model stores what `source` calls `name`, if its rows fit."""
    stored = name if name in model.infos else model.aliases.get(name)
    if stored is None:
        raise MissingTensorError(
            f"{name} is in {source.ref} and not in {model.ref}, whose rows it needs for tokens that {source.ref} lacks",
            "take vocabulary: intersection, or leave a model out",
        )
    own, other = source.infos[name], model.infos[stored]
    if own.shape[1:] != other.shape[1:]:
        raise ShapeError(f"{name} has 2 shapes: {own.shape} in {source.ref}; {other.shape} in {model.ref}")
    return stored


def unwrapped(source: Source) -> Source:
    """What a model is without the views of its vocabulary and of its ties."""
    while isinstance(source, VocabularyView | Tied):
        source = source.source
    return source


def adapters_on(source: Source) -> list[AdapterSource]:
    """Adapters on another recipe's output, the last one first; those of files are part of their source."""
    found: list[AdapterSource] = []
    while isinstance(source := unwrapped(source), AdapterSource):
        found.append(source)
        source = source.base
    return found


def beneath(source: Source) -> Source:
    """What a model is without its views and without adapters on another recipe's output."""
    adapters = adapters_on(source)
    return unwrapped(adapters[-1].base if adapters else source)
