"""Models with different vocabularies in one merge: every model is seen through the vocabulary of the output.

| the row of a token in a model is | where |
|---|---|
| what the recipe's `tokens` say | they have a policy with `force`, or one and the model lacks the token |
| the model's own | it has the token |
| the base's | else, if the base has the token |
| the only owner's, or the mean of the owners' | else |
| zeros | no model has the token |

| source | tokens of the output, in order |
|---|---|
| union | the base's (or the first model's); new plain tokens of the others, by model and id; new added tokens |
| base, or a model | those of that model |
| intersection | the base's (or the first model's) that all models have, numbered anew |

Tokens that only `tokens` names come last, as added tokens. The embeddings have a row a token and then, up to a multiple
of `pad_to_multiple_of`, rows that are the mean of the model's own. Rows of a model behind its last token, which many
models have to make a round number, belong to nobody and are dropped: to have as many again, set `pad_to_multiple_of`.

New plain tokens of a union become part of the donor's vocabulary, with the merges that make them behind its own (or
with their scores): as added tokens they would be cut out of the middle of words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from merganser.errors import ParameterError, ShapeError
from merganser.merging.recipe import Recipe, Vocabulary
from merganser.merging.tokenizer_json import Tokenizer, entry_of, joined, merges_of, read_tokenizers
from merganser.merging.tokenizer_written import written
from merganser.merging.vocabulary_rows import MEAN, ZERO, RowMap, VocabularyView, vocabulary_tensors
from merganser.types import Source


@dataclass(frozen=True)
class VocabularyPlan:
    """The vocabulary of the output.

    Attributes:
        sources: every model seen through it, by reference; the source itself where nothing changes.
        tokens: by id.
        files: of the output's tokenizer; of the other models no file is copied for which `is_tokenizer_file` holds.
        vocab_size: rows of the embeddings, those behind the last token included.
        donor: reference of the model whose tokenizer it is, or was before tokens were added or dropped.
    """

    sources: Mapping[str, Source]
    tokens: tuple[str, ...] = field(repr=False)
    files: Mapping[str, bytes | Path] = field(repr=False)
    vocab_size: int
    donor: str
    _names: Mapping[str, tuple[str, ...]] = field(repr=False)
    _rows: Mapping[str, int] = field(repr=False)

    def adapted(self, config: Mapping[str, Any], ref: str, other: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A model's config.json or generation_config.json for the output: its size and the ids of its tokens.

        Args:
            config: of the model `ref`.
            ref: whose ids it holds.
            other: the same file of `donor`, whose ids count where the output lacks a token of `ref`.

        Raises:
            ParameterError: If it names a token that the output lacks, and `other` says nothing of it.
        """
        ids = _numbered(self.tokens)

        def moved(key: str, value: Any) -> Any:
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self._names[ref]):
                return value
            return ids[self._names[ref][value]]

        def moved_all(key: str, value: Any) -> Any:
            try:
                return [moved(key, one) for one in value] if isinstance(value, list) else moved(key, value)
            except KeyError as error:
                if ref != self.donor and other is not None and key in other:
                    return self.adapted({key: other[key]}, self.donor)[key]
                raise ParameterError(
                    f"{key} of {ref} is {error.args[0]!r}, which the output's vocabulary lacks",
                    "take vocabulary: union, or base",
                ) from error

        def walked(node: Mapping[str, Any]) -> dict[str, Any]:
            new = dict(node)
            for key, value in node.items():
                if key in ("vocab_size", "padded_vocab_size") and value in (self._rows[ref], len(self._names[ref])):
                    new[key] = self.vocab_size
                elif key.endswith(("_token_id", "_token_index")):
                    new[key] = moved_all(key, value)
                elif key.endswith("suppress_tokens") and isinstance(value, list):
                    lost = {i for i, token in enumerate(self._names[ref]) if token not in ids}
                    new[key] = [moved(key, one) for one in value if one not in lost]
                elif isinstance(value, dict):
                    new[key] = walked(value)
            return new

        return walked(config)


def vocabulary_views(recipe: Recipe, sources: Mapping[str, Source]) -> VocabularyPlan | None:
    """See every model of a recipe through the vocabulary that it asks for; headers and tokenizers are read, no tensor.

    Args:
        recipe: what to merge.
        sources: the opened source of every reference of the recipe.

    Returns:
        The plan; None where the recipe says nothing of a vocabulary.

    Raises:
        ParameterError: If the vocabulary or one of its tokens cannot be had.
        RefError: If a model has no tokenizer.json.
        CheckpointError: If one is not sound.
        TensorError: If the tensors that have a row a token cannot be told, or rows of two models do not fit.
    """
    vocabulary = recipe.vocabulary
    if vocabulary is None:
        return None
    if vocabulary.pad_to_multiple_of < 1:
        raise ParameterError(f"pad_to_multiple_of is {vocabulary.pad_to_multiple_of}; it is a whole number from 1 on")
    refs = list(recipe.refs)
    for token, policy in vocabulary.tokens.items():
        if policy.model is not None and policy.model not in refs:
            raise ParameterError(f"token {token!r}: {policy.model} is no model of this recipe")
    tokenizers = read_tokenizers({ref: sources[ref] for ref in refs})
    found = {ref: vocabulary_tensors(sources[ref], tokenizers[ref].names, recipe.keep) for ref in refs}
    _refuse_half_mapped(sources, {ref: names for ref, (names, _) in found.items()})
    tokens, files, donor = _output(recipe, vocabulary, tokenizers)
    step = vocabulary.pad_to_multiple_of
    size = (len(tokens) + step - 1) // step * step
    policies = _policies(vocabulary, tokenizers, {ref: rows for ref, (_, rows) in found.items()})
    maps = _maps(recipe, donor, tokenizers, tokens, policies, size)
    models = [sources[ref] for ref in refs]
    views: dict[str, Source] = {}
    for ref, rows in zip(refs, maps, strict=True):
        names, stored = found[ref]
        changed = rows.changes(stored)
        views[ref] = VocabularyView(sources[ref], names, rows, models) if changed else sources[ref]
    return VocabularyPlan(
        {**sources, **views},
        tokens,
        files,
        size,
        donor,
        {ref: tokenizers[ref].names for ref in refs},
        {ref: rows for ref, (_, rows) in found.items()},
    )


def _refuse_half_mapped(sources: Mapping[str, Source], mapped: Mapping[str, Sequence[str]]) -> None:
    """Refuse a tensor that has a row a token in one model, and is something else in another."""
    for ref, names in mapped.items():
        for name in names:
            for other, theirs in mapped.items():
                if name in sources[other].infos and name not in theirs:
                    raise ShapeError(
                        f"{name} has a row a token in {ref} and not in {other}: {sources[other].infos[name].shape}",
                        "leave the model out",
                    )


# which tokens


def _output(
    recipe: Recipe, vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer]
) -> tuple[tuple[str, ...], Mapping[str, bytes | Path], str]:
    first = recipe.base.ref if recipe.base is not None else recipe.slices[0].inputs[0].ref
    donor = tokenizers[first]
    others = [t for ref, t in tokenizers.items() if ref != first]
    tokens = donor.names
    plain: dict[str, float] = {}
    added: dict[str, Mapping[str, Any]] = {}
    if vocabulary.source == "union":
        plain, added = _new(donor, others)
    elif vocabulary.source == "intersection":
        tokens = tuple(t for t in tokens if t in donor.ids and all(t in other.ids for other in others))
        if not tokens:
            raise ParameterError("the models have no token in common", "take vocabulary: union, or base")
    elif vocabulary.source == "base":
        if recipe.base is None:
            raise ParameterError("vocabulary is base, and the recipe has none", "name one of its models instead")
    elif vocabulary.source in tokenizers:
        donor = tokenizers[vocabulary.source]
        tokens = donor.names
    else:
        raise ParameterError(
            f"vocabulary is {vocabulary.source!r}, which is no model of this recipe",
            f"known: union, base, intersection, {', '.join(tokenizers)}",
        )
    known = {*tokens, *plain, *added}
    added |= {token: entry_of(token, 0) for token in vocabulary.tokens if token not in known}
    wanted = (*tokens, *plain, *added)
    if wanted == donor.names and donor.sound:
        return wanted, donor.files, donor.ref
    merges = _merges(donor, others, plain) if plain else []
    return wanted, written(donor, wanted, plain=plain, added=added, merges=merges), donor.ref


def _new(donor: Tokenizer, others: Sequence[Tokenizer]) -> tuple[dict[str, float], dict[str, Mapping[str, Any]]]:
    """Tokens that the donor lacks: plain ones with their scores, and entries of added ones."""
    taken = set(donor.names)
    added: dict[str, Mapping[str, Any]] = {}
    for other in others:
        for token, entry in other.added.items():
            if token not in taken:
                added.setdefault(token, entry)  # the first model that has it says how it is found
    plain: dict[str, float] = {}
    for other in others:
        fresh = [t for t in sorted(other.plain, key=other.plain.__getitem__) if t not in taken and t not in added]
        if fresh and other.kind != donor.kind:
            raise ParameterError(
                f"{other.ref} has a {other.kind} vocabulary and {donor.ref} a {donor.kind} one; their union would cut "
                "words as neither does",
                "take vocabulary: base, or one of the models",
            )
        scores = {t: float(s) for t, s in other.content["model"]["vocab"]} if other.kind == "Unigram" else {}
        plain |= {t: scores.get(t, 0.0) for t in fresh if t not in plain}
    return plain, added


def _merges(donor: Tokenizer, others: Sequence[Tokenizer], plain: Mapping[str, float]) -> list[tuple[str, str]]:
    """Merges that make new plain tokens, in the order of the models."""
    found = []
    for other in others:
        if other.kind == donor.kind and any(token in other.plain for token in plain):
            merges = merges_of(other)
            found += [pair for pair, made in zip(merges, joined(other, merges), strict=True) if made in plain]
    return found


# whose rows


def _policies(
    vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer], rows: Mapping[str, int]
) -> dict[str, tuple[int, int, bool]]:
    """For a token with a policy the number of the model and its row, and whether it is forced."""
    numbers = {ref: k for k, ref in enumerate(tokenizers)}
    found = {}
    for token, policy in vocabulary.tokens.items():
        if policy.kind == "zero":
            found[token] = (ZERO, 0, policy.force)
            continue
        if policy.model is None:
            raise ParameterError(f"token {token!r}: takes the row of a model, and names none")
        sought = token if policy.token is None or policy.kind == "model" else policy.token
        row = sought if isinstance(sought, int) else tokenizers[policy.model].ids.get(sought)
        if row is None or not 0 <= row < rows[policy.model]:
            what = f"id {sought}" if isinstance(sought, int) else repr(sought)
            raise ParameterError(f"token {token!r}: {policy.model} has no {what}", "name another model or token")
        found[token] = (numbers[policy.model], row, policy.force)
    return found


def _maps(
    recipe: Recipe,
    donor: str,
    tokenizers: Mapping[str, Tokenizer],
    tokens: Sequence[str],
    policies: Mapping[str, tuple[int, int, bool]],
    size: int,
) -> Iterator[RowMap]:
    refs = list(tokenizers)
    base = refs.index(recipe.base.ref) if recipe.base is not None else None
    # An id of the donor that no token has is a row of the output all the same, and only the donor's.
    ids = [_numbered(t.names) if ref == donor else t.ids for ref, t in tokenizers.items()]
    defaults: dict[str, tuple[int, int]] = {}
    means: dict[int, list[tuple[int, int]]] = {}
    for number, token in enumerate(tokens):
        if all(token in own for own in ids):
            continue
        owners = [(k, own[token]) for k, own in enumerate(ids) if token in own]
        if token in policies:
            defaults[token] = policies[token][:2]
        elif base is not None and token in ids[base]:
            defaults[token] = (base, ids[base][token])
        elif len(owners) > 1:
            defaults[token], means[number] = (MEAN, 0), owners
        else:
            defaults[token] = owners[0] if owners else (ZERO, 0)
    forced = {token: (k, row) for token, (k, row, force) in policies.items() if force}
    for k, own in enumerate(ids):
        pairs = [forced[t] if t in forced else (k, own[t]) if t in own else defaults[t] for t in tokens]
        owner, row = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        mean = {number: means[number] for number in (owner == MEAN).nonzero()[:, 0].tolist()}
        rows = torch.tensor(sorted(tokenizers[refs[k]].ids.values()), dtype=torch.int64)
        yield RowMap(k, owner.contiguous(), row.contiguous(), mean, rows, size)


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}
