"""A planned merge seen as a checkpoint: reading a tensor computes it. So a merge can be written, or feed another one.

What a method asks for beyond the chunk at hand (inner products, ranks, norms, noise) is measured here once a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.continual.kinds import kind_of
from merganser.continual.passing import NORMED
from merganser.continual.roles import is_matrix
from merganser.errors import NonFiniteError
from merganser.merging.ahead import Readers
from merganser.merging.folding import factor_of, folded, has_factor
from merganser.merging.held import HELD_BYTES, SCORES_OVER_STORED, Held, Rows
from merganser.merging.lines import in_lines, is_long, read_part, reads_lines
from merganser.merging.parts import (
    Measured,
    copied,
    kept_of,
    mean_of,
    noise_of,
    packed,
    refuse_nonfinite,
    restored,
    score_bytes,
    seen,
    spans_of,
    unpacked,
    widened,
)
from merganser.merging.plan import Piece, Plan, TensorPlan
from merganser.merging.post import finished
from merganser.merging.ranking import SAMPLE_ELEMENTS, Ranked, ranked
from merganser.merging.survey import cell_rows, chunk_rows, inner_products, norm_ratios, spread_rows, sums
from merganser.merging.vocabulary_rows import beneath
from merganser.methods.joint import Joint, Locality, kept, names_of
from merganser.numerics import all_finite, narrowed, sum_of_squares
from merganser.types import TensorInfo

#: Elements of a tensor that are handled at a time where the method allows it: they stay in the processor's cache.
CHUNK_ELEMENTS = 1 << 17


class Merged:
    """A Source whose tensors are merged as they are read.

    Args:
        plan: what to merge.
        chunk_elements: elements at a time.

    Attributes:
        tokenizer_files: of the output, where the recipe asks for a vocabulary; not there otherwise.
        factor: on the change of the whole model, where the method has one and it is measured already.
        readers: of its sources' tensors.
        in_lines: names of the tensors that are seen as matrices of their lines.
        tensors: of the plan, as they are seen.
    """

    identity: str | None = None
    factor: float | None = None

    def __init__(self, plan: Plan, *, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self.plan, self.ref = plan, plan.recipe.name or "the merge"
        self._chunk_elements = chunk_elements
        self.infos: Mapping[str, TensorInfo] = {name: t.info for name, t in plan.tensors.items()}
        self.in_lines = frozenset(name for name, t in plan.tensors.items() if self._goes_in_lines(t))
        self.tensors = {name: in_lines(t) if name in self.in_lines else t for name, t in plan.tensors.items()}
        self.aliases: Mapping[str, str] = dict(plan.aliases)
        if plan.vocabulary is not None:
            self.tokenizer_files = plan.vocabulary.files
        self._measured, self._whole = dict[str, Measured](), dict[str, Tensor]()
        self._held: dict[tuple[Piece, ...], Held] = {}
        self.readers = Readers()
        self._locks = {name: threading.RLock() for name in plan.tensors}
        self.measuring = threading.Lock()

    def stages(self) -> list[Merged]:
        """The merges that this one reads, each behind those that it reads itself; this one is the last."""
        found: dict[int, Merged] = {}
        for source in self.plan.sources.values():
            if isinstance(stage := beneath(source), Merged):
                found |= {id(one): one for one in stage.stages() if id(one) not in found}
        return [*found.values(), self]

    def companions(self) -> Sequence[Path]:
        """The donor's files."""
        return self.plan.sources[self.plan.donor].companions()

    def _goes_in_lines(self, tensor: TensorPlan) -> bool:
        """Whether lines of a tensor can be merged, and its rows are too long."""
        if not is_long(tensor.info.shape) or self._locality(tensor) not in ("element", "line") or tensor.statistics:
            return False
        folds = not isinstance(self.plan.rules.method, Joint) and tensor.role not in ("fixed", "exact", "statistic")
        return not folds and all(reads_lines(self.plan.sources[p.ref], p.name) for p in tensor.pieces)

    def chunks(self, name: str) -> Iterator[Rows]:
        """Rows, or lines, to ask `read_lines` for in turn; (None,) where the whole must be merged at once."""
        tensor = self.tensors[name]
        if not tensor.info.shape or self._locality(tensor) == "tensor":
            yield None
        else:
            yield from chunk_rows(tensor.info.shape, self._chunk_elements)

    def read(self, name: str, rows: Rows = None) -> Tensor:
        """Merge one tensor, or rows of it; errors as of `read_lines`."""
        shape = self.infos[name].shape
        if name not in self.in_lines:
            return self.read_lines(name, rows)
        lines = prod(shape[1:-1])
        part = (rows[0] * lines, rows[1] * lines) if rows is not None else None
        return self.read_lines(name, part).reshape(-1, *shape[1:])

    def read_lines(self, name: str, rows: Rows = None) -> Tensor:
        """Merge one tensor, or rows of it; lines along its last axis where it is among `in_lines`.

        Raises:
            NonFiniteError: If a model holds NaN or infinity there, or the merged value does not fit its type.
            DtypeError: If integers differ between models.
            ParameterError: If the method refuses a setting.
        """
        tensor = self.tensors[name]
        if tensor.role in ("fixed", "exact"):
            return copied(name, tensor, lambda p: read_part(self.plan.sources[p.ref], p, rows, tensor))
        with self._locks[name]:
            if rows is not None and self._reads_whole(name, tensor, rows):
                whole = self._whole.get(name)
                if whole is None:  # or forgotten meanwhile by another tensor's end
                    whole = self._whole[name] = self.read_lines(name)
                return whole[rows[0] : rows[1]]
            if rows is None and self._locality(tensor) != "tensor" and tensor.info.shape:
                return torch.cat([self.read_lines(name, part) for part in self.chunks(name)])
            merged = self._merged(name, tensor, rows)
        if not all_finite(merged):
            raise NonFiniteError(f"the merged {name} is not finite", "the weights or the scale are too large")
        return narrowed(merged, tensor.info.dtype, name)

    def _reads_whole(self, name: str, tensor: TensorPlan, rows: tuple[int, int]) -> bool:
        """Whether rows are cut from the whole tensor, which is kept until it is forgotten.

        The method needs it whole, or rows are asked for in no order, and would be measured again and again.
        """
        measured = self._measured.get(name)
        jumps = measured is not None and rows[0] not in (0, measured.position)
        return name in self._whole or jumps or self._locality(tensor) == "tensor"

    def forget(self, name: str) -> None:
        """Drop what is kept of a tensor that is not read again, in the stages before this one too."""
        self._measured.pop(name, None)
        self._whole.pop(name, None)
        tensor = self.tensors[name]
        self._held.pop(tensor.pieces, None)
        self.readers.forget(tensor.pieces)
        for piece in tensor.pieces:
            if isinstance(stage := beneath(self.plan.sources[piece.ref]), Merged):
                stage.forget(piece.name)

    # what goes into the function

    def _stored(self, tensor: TensorPlan, rows: Rows, *, again: bool) -> list[Tensor]:
        """The models' rows and behind them the base's, as stored, all finite; kept where they are read again."""

        def each(part: Rows) -> list[Tensor]:
            stored = [read_part(self.plan.sources[p.ref], p, part, tensor) for p in tensor.pieces]
            for piece, x in zip(tensor.pieces, stored, strict=True):
                refuse_nonfinite(piece, x)
            return stored

        computed = any(isinstance(beneath(self.plan.sources[piece.ref]), Merged) for piece in tensor.pieces)
        read = each if computed else self.readers.of(tensor.pieces, each, tensor.info.rows)
        held = self._held_of(tensor) if again else self._held.get(tensor.pieces)
        return read(rows) if held is None else held.stored(rows, lambda: read(rows), again=again)

    def held_bytes(self, name: str) -> int:
        """Memory in bytes that is kept of a tensor while it is merged."""
        tensor = self.tensors[name]
        row, chunked = self.plan.rules.method, self._locality(tensor) != "tensor"
        if tensor.role in ("fixed", "exact", "statistic") or not isinstance(row, Joint) or not chunked:
            return 0
        asked, elements = self._asked(tensor, names_of(self._rule(tensor)[0])), prod(tensor.info.shape)
        stored = sum(self.plan.sources[p.ref].infos[p.name].nbytes for p in tensor.pieces)
        scores, bits = score_bytes(tensor, self.plan.sources) if row.shared else 0, elements * len(tensor.models) // 8
        held = stored if asked and stored <= HELD_BYTES else 0
        held += scores if asked and scores <= SCORES_OVER_STORED * HELD_BYTES else 0
        return held + (bits if "stretch" in asked and bits <= HELD_BYTES else 0)

    def _held_of(self, tensor: TensorPlan) -> Held:
        pieces = tensor.pieces
        if pieces not in self._held:
            nbytes = sum(self.plan.sources[p.ref].infos[p.name].nbytes for p in pieces)
            self._held[pieces] = Held(nbytes, score_bytes(tensor, self.plan.sources))
        return self._held[pieces]

    def stack(
        self, tensor: TensorPlan, rows: Rows, *, changes: bool, again: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Models, or models minus the base, and the base; what is read of a small tensor is kept if `again`."""
        return widened(self._stored(tensor, rows, again=again), based=tensor.base is not None, changes=changes)

    # the function

    def _rule(self, tensor: TensorPlan) -> tuple[Any, bool]:
        """The function for a tensor and whether it wants a matrix (out, in)."""
        row = _joint(self.plan)
        if row.vector is None:
            return row.function, False
        return (row.function, True) if is_matrix(tensor.role) else (row.vector, False)

    def _locality(self, tensor: TensorPlan) -> Locality:
        if tensor.role in ("fixed", "exact", "statistic"):
            return "element"
        row = self.plan.rules.method
        if not isinstance(row, Joint):
            kind = kind_of(self.plan.recipe.method, tensor.settings)
            chunked = kind.chunked(tensor.role, tensor.info.shape) and not self.plan.recipe.post
            return "element" if chunked else "tensor"
        if self.plan.recipe.post:
            return "tensor"
        if row.vector is not None and not is_matrix(tensor.role):
            return "element"
        local = row.locality if isinstance(row.locality, str) else row.locality(self._given(tensor))
        return "tensor" if local in ("row", "line") and len(tensor.info.shape) < 2 else local  # a vector is one row

    def _merged(self, name: str, tensor: TensorPlan, rows: Rows) -> Tensor:
        if tensor.role == "statistic":
            return mean_of(self.stack(tensor, rows, changes=False)[0], tensor.weight)
        row = self.plan.rules.method
        if not isinstance(row, Joint):
            return self._folded(tensor, rows)
        function, matrix = self._rule(tensor)
        needs = names_of(function)
        changes = "d" in needs
        asked = self._asked(tensor, needs)
        stack, base = self.stack(tensor, rows, changes=changes, again=bool(asked))
        shown = [seen(x, tensor) for x in stack] if matrix else stack
        brought: dict[str, Any] = {"d": shown, "x": shown, "weight": tensor.weight}
        if base is not None:
            brought["base"] = seen(base, tensor) if matrix else base
        for kind in needs & {"gram", "fisher"}:
            part = rows if kind == "fisher" else None
            read = [
                self.plan.sources[ref].read(f"{kind}/{p.name}", part)
                for ref, p in zip(tensor.statistics, tensor.models, strict=True)
            ]
            brought[kind] = [x.to(stack[0].dtype) for x in read]
        if asked:
            measured = self._measure(name, tensor, rows, function)
            brought |= measured.brought
            if rows in measured.masks:
                brought |= {"u": (), "mask": unpacked(measured.masks[rows], stack[0].shape)}
            if measured.ranks is not None:
                brought["keep"] = kept_of(measured, self._scores(tensor, rows, stack))
            measured.position = rows[1] if rows is not None else tensor.info.rows
        if "u" in needs and "u" not in brought:
            brought["u"] = noise_of(self.plan.recipe, name, tensor, rows)
        merged = function(**{n: v for n, v in {**brought, **self._settings(tensor, function)}.items() if n in needs})
        merged = restored(merged, tensor) if matrix else merged
        if not changes:
            return merged
        assert base is not None
        return base + self._finished(tensor, merged, stack)

    def _finished(self, tensor: TensorPlan, merged: Tensor, changes: Sequence[Tensor]) -> Tensor:
        return finished(self.plan.recipe.post, tensor.role, tensor.depth, merged, changes)

    def _given(self, tensor: TensorPlan) -> dict[str, Any]:
        return {**self.plan.rules.settings, **tensor.settings}

    def _settings(self, tensor: TensorPlan, function: Any) -> dict[str, Any]:
        return {n: v for n, v in tensor.settings.items() if n in names_of(function)}

    def _folded(self, tensor: TensorPlan, rows: Rows) -> Tensor:
        changes: list[Tensor] = []
        merged, base = folded(self, tensor, rows, changes.append if self.plan.recipe.post else None)
        if has_factor(self) and tensor.role in NORMED:
            merged = merged * factor_of(self)
        return base + self._finished(tensor, merged, changes)

    # what is measured

    def _measure(self, name: str, tensor: TensorPlan, rows: Rows, function: Any) -> Measured:
        start = rows[0] if rows is not None else 0
        found = self._measured.get(name)
        if found is None or start != found.position:
            found = self._measured[name] = self._fresh(name, tensor, function)
            for part in self.chunks(name) if start else ():
                if part is None or part[0] >= start:
                    break
                if found.ranks is not None:
                    kept_of(found, self._scores(tensor, (part[0], min(part[1], start))))
            found.position = start
        return found

    def _fresh(self, name: str, tensor: TensorPlan, function: Any) -> Measured:
        needs, row = names_of(function), _joint(self.plan)
        changes, shape = "d" in needs, tensor.info.shape
        cell = cell_rows(shape)
        whole = self._locality(tensor) == "tensor" or not shape
        parts: list[Rows] = [None] if whole else list(chunk_rows(shape, self._chunk_elements))

        def stacks() -> Iterator[list[Tensor]]:
            return (self.stack(tensor, part, changes=changes, again=True)[0] for part in parts)

        measured = Measured({})
        asked = self._asked(tensor, needs)
        if "dots" in asked:
            measured.brought["dots"] = inner_products(stacks(), cell)
        if "keep" in asked:
            measured.ranks = self._ranks(tensor, parts, row, changes)
        if "energy" in asked:
            squares = (thinned for _, thinned in self._kept_parts(name, tensor, parts, row, measured))
            measured.brought["energy"] = sums(squares, cell, sum_of_squares)
        if "stretch" in asked:
            measured.brought["stretch"] = norm_ratios(self._kept_parts(name, tensor, parts, row, measured), cell)
        return measured

    def _asked(self, tensor: TensorPlan, needs: frozenset[str]) -> frozenset[str]:
        """What must be measured; norms only where the setting `rescale` says that they are used."""
        rescale = tensor.settings.get("rescale", self.plan.rules.settings.get("rescale"))
        return needs & {"dots", "keep", "energy", *(("stretch",) if rescale == "l1" else ())}

    def _ranks(self, tensor: TensorPlan, parts: Sequence[Rows], row: Joint, changes: bool) -> list[Ranked | None]:
        assert row.ranks is not None
        numel, models = prod(tensor.info.shape), 1 if row.shared else len(tensor.models)

        def scores() -> Iterator[Sequence[Tensor]]:
            return (self._scores(tensor, part) for part in parts)

        def differing() -> list[int]:
            counts = [0] * models
            for part in scores():
                counts = [n + int(torch.count_nonzero(x)) for n, x in zip(counts, part, strict=True)]
            return counts

        spans = spans_of(row.ranks, numel, self._given(tensor), models, differing)
        sought = [None if start == stop or (start, stop) == (0, numel) else (start, stop) for start, stop in spans]
        found: list[Ranked | None] = [None] * len(spans)
        if any(sought):
            for part in parts if self._held_of(tensor).fits else ():
                self._stored(tensor, part, again=True)  # the sample is taken from it
            found = ranked(scores, sought, numel, self._sample(tensor, row, changes))
        return [
            Ranked(inf, -1.0, 0, 0) if span == (0, numel) and numel else edges
            for span, edges in zip(spans, found, strict=True)
        ]

    def _scores(self, tensor: TensorPlan, rows: Rows, stack: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """Scores of some rows, of the stack where it is there already; kept where one score serves all models."""
        row = _joint(self.plan)

        def score() -> list[Tensor]:
            assert row.score is not None
            changes = "d" in names_of(row.function)
            return [*row.score(stack or self.stack(tensor, rows, changes=changes, again=True)[0])]

        return self._held_of(tensor).scores(rows, score, again=row.shared)

    def _sample(self, tensor: TensorPlan, row: Joint, changes: bool) -> list[Tensor]:
        """Some of a tensor's scores, from rows that are evenly spread."""
        assert row.score is not None
        taken = spread_rows(tensor.info.shape, SAMPLE_ELEMENTS * 4)  # rows differ more than entries of one row
        parts = [row.score(self.stack(tensor, part, changes=changes)[0]) for part in taken]
        every = [torch.cat([x.reshape(-1) for x in same]) for same in zip(*parts, strict=True)]
        return [x[:: max(1, x.numel() // SAMPLE_ELEMENTS)] for x in every]

    def _kept_parts(
        self, name: str, tensor: TensorPlan, parts: Sequence[Rows], row: Joint, measured: Measured
    ) -> Iterator[tuple[list[Tensor], Iterator[Tensor]]]:
        """Changes, chunk by chunk, whole and with zeros where the method does not keep them."""
        fresh = Measured({}, [replace(r) if r is not None else None for r in measured.ranks or []])
        names = names_of(row.mask) if row.mask is not None else frozenset()
        remembered = prod(tensor.info.shape) * len(tensor.models) <= 8 * HELD_BYTES
        for part in parts:
            d, _ = self.stack(tensor, part, changes=True, again=True)
            if row.mask is None:
                masks: Any = kept_of(fresh, self._scores(tensor, part, d))
            else:
                brought = {"d": d, "u": noise_of(self.plan.recipe, name, tensor, part), **tensor.settings}
                masks = row.mask(**{n: v for n, v in brought.items() if n in names})
                if remembered:
                    measured.masks[part] = packed(masks)
            yield d, kept(d, repeat(masks[0]) if row.shared else masks)


def _joint(plan: Plan) -> Joint:
    row = plan.rules.method
    assert isinstance(row, Joint)
    return row
