"""A tokenizer written anew with other tokens: more of them, or fewer, with ids that begin at 0 and leave none out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser.errors import CheckpointError, ParameterError
from merganser.merging.tokenizer_json import (
    CONFIG_NAME,
    FLAGS,
    KEPT_NAMES,
    SPECIAL_KEYS,
    SPECIAL_LISTS,
    TEMPLATE_NAMES,
    TOKENIZER_NAME,
    Tokenizer,
    bytes_of,
    joined,
    merges_of,
    object_of,
    token_of,
)


def needed(tokenizer: Tokenizer) -> dict[str, str]:
    """Tokens that a tokenizer uses by itself, and what for."""
    content, model = tokenizer.content, tokenizer.content["model"]
    found: dict[str, str] = {}
    config = object_of(bytes_of(tokenizer.files, CONFIG_NAME), f"{CONFIG_NAME} of {tokenizer.ref}")
    for key in SPECIAL_KEYS:
        if (text := token_of(config.get(key))) is not None:
            found[text] = key
    unknown = model.get("unk_token")
    if tokenizer.kind == "Unigram" and isinstance(model.get("unk_id"), int):
        unknown = model["vocab"][model["unk_id"]][0]
    if isinstance(unknown, str):
        found[unknown] = "token for what is not known"
    if isinstance(padding := content.get("padding"), dict):
        found[str(padding.get("pad_token"))] = "padding"
    found |= dict.fromkeys(_framing(content.get("post_processor")), "frame around a text")
    if model.get("byte_fallback"):
        found |= dict.fromkeys((f"<0x{byte:02X}>" for byte in range(256)), "byte of what is not known")
    elif tokenizer.kind == "BPE" and (unknown is None or '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))):
        end = model.get("end_of_word_suffix") or ""
        letters = (t for t in tokenizer.plain if len(t) == 1 or (end and t.endswith(end) and len(t) == len(end) + 1))
        found |= dict.fromkeys(letters, "letter, without which text is lost")
    return {token: use for token, use in found.items() if token in tokenizer.ids}


def _framing(processor: Any) -> Iterator[str]:
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors") or []:
        yield from _framing(inner)
    for entry in (processor.get("special_tokens") or {}).values():
        yield from entry["tokens"]
    yield from (processor[key][0] for key in ("sep", "cls") if key in processor)


def written(
    donor: Tokenizer,
    tokens: Sequence[str],
    *,
    plain: Mapping[str, float] | None = None,
    added: Mapping[str, Mapping[str, Any]] | None = None,
    merges: Sequence[tuple[str, str]] = (),
) -> dict[str, bytes | Path]:
    """Files of the donor's tokenizer with other tokens.

    Args:
        donor: what it is like.
        tokens: by id; those of the donor that are not among them are dropped.
        plain: tokens that become part of the vocabulary, with their scores where it is a Unigram's.
        added: entries of tokens that become added ones.
        merges: of a BPE, behind the donor's.

    Raises:
        ParameterError: If the donor needs a token that is dropped.
        CheckpointError: If the donor's file is not sound.
    """
    try:
        return _written(donor, tokens, plain or {}, added or {}, merges)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{TOKENIZER_NAME} of {donor.ref} is not sound: {type(error).__name__} {error}"[:300],
            "save the tokenizer anew with the library that it is for",
        ) from error


def _written(
    donor: Tokenizer,
    tokens: Sequence[str],
    plain: Mapping[str, float],
    added: Mapping[str, Mapping[str, Any]],
    merges: Sequence[tuple[str, str]],
) -> dict[str, bytes | Path]:
    ids = {token: i for i, token in enumerate(tokens)}
    if lost := [(token, use) for token, use in needed(donor).items() if token not in ids]:
        (token, use), more = lost[0], f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise ParameterError(
            f"the output would lack {token!r}{more}, which the tokenizer of {donor.ref} uses as {use}",
            "take vocabulary: union, or base",
        )
    entries = [{**entry, "id": ids[token]} for token, entry in {**donor.added, **added}.items() if token in ids]
    content = {**donor.content, "added_tokens": entries}
    content["model"] = _model(donor, ids, tokens, plain, merges)
    content["post_processor"] = _framed(donor.content.get("post_processor"), ids)
    if isinstance(padding := content.get("padding"), dict) and padding.get("pad_token") in ids:
        content["padding"] = {**padding, "pad_id": ids[padding["pad_token"]]}
    files: dict[str, bytes | Path] = {n: donor.files[n] for n in TEMPLATE_NAMES if n in donor.files}
    files[TOKENIZER_NAME] = _json(content, indent=None)  # a hundred thousand entries, which indents make slow
    for name in KEPT_NAMES:
        if name in donor.files:
            settings = object_of(bytes_of(donor.files, name), f"{name} of {donor.ref}")
            files[name] = _json(_naming(settings, ids, entries))
    return files


def _json(content: Mapping[str, Any], *, indent: int | None = 2) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode("utf-8", "surrogatepass")


def _model(
    donor: Tokenizer,
    ids: Mapping[str, int],
    tokens: Sequence[str],
    plain: Mapping[str, float],
    merges: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    model = dict(donor.content["model"])
    # Everything before the last token of the vocabulary is written into it, so that no id is left to be guessed.
    last = max((ids[token] for token in (*donor.plain, *plain) if token in ids), default=-1)
    unused = [t for t in donor.names if t not in donor.ids and t in ids]
    last = max([last, *(ids[t] for t in unused)])
    if donor.kind == "Unigram":
        old = model["vocab"]
        lowest = min((float(score) for _, score in old), default=0.0)
        scores = {**{token: float(score) for token, score in old}, **plain}
        model["vocab"] = [[token, scores.get(token, lowest)] for token in tokens[: last + 1]]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = ids[old[model["unk_id"]][0]]
        return model
    model["vocab"] = {token: i for i, token in enumerate(tokens[: last + 1])}
    if donor.kind == "BPE":
        old, known = merges_of(donor), model["vocab"]
        new = list(dict.fromkeys([*old, *merges]))
        made = joined(donor, new)
        kept = [p for p, whole in zip(new, made, strict=True) if p[0] in known and p[1] in known and whole in known]
        spelled = isinstance(next(iter(model.get("merges") or []), None), str)
        if spelled and not any(" " in part for pair in kept for part in pair):
            model["merges"] = [" ".join(pair) for pair in kept]
        else:
            model["merges"] = [list(pair) for pair in kept]
    return model


def _framed(processor: Any, ids: Mapping[str, int]) -> Any:
    """A post-processor with the ids of the output."""
    if not isinstance(processor, dict):
        return processor
    new = dict(processor)
    if isinstance(processor.get("processors"), list):
        new["processors"] = [_framed(inner, ids) for inner in processor["processors"]]
    if isinstance(processor.get("special_tokens"), dict):
        new["special_tokens"] = {
            key: {**entry, "ids": [ids[token] for token in entry["tokens"]]}
            for key, entry in processor["special_tokens"].items()
        }
    return new | {key: [processor[key][0], ids[processor[key][0]]] for key in ("sep", "cls") if key in processor}


def _naming(config: Mapping[str, Any], ids: Mapping[str, int], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that name tokens, for those that are there."""
    new = dict(config)
    if "added_tokens_decoder" in new:
        new["added_tokens_decoder"] = {
            str(e["id"]): {key: e[key] for key in ("content", *FLAGS) if key in e} for e in entries
        }
    for key in SPECIAL_LISTS:
        if isinstance(listed := new.get(key), list):
            new[key] = [one for one in listed if token_of(one) in ids]
        elif isinstance(listed, dict):
            new[key] = {name: one for name, one in listed.items() if token_of(one) in ids}
    return new
