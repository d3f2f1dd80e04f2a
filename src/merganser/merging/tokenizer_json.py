"""The tokens of a model, read from its tokenizer.json as JSON and by no library.

A library that loads such a file takes the ids of added tokens from their order behind the vocabulary, not from the
file, and puts special tokens that only tokenizer_config.json names behind all others. The ids here are those that the
file states, which are what the rows of the embeddings were trained by; `sound` tells whether a library agrees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merganser.errors import CheckpointError, RefError
from merganser.types import Source

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
#: Files that name tokens, and stay true when the vocabulary is another.
KEPT_NAMES = (CONFIG_NAME, "special_tokens_map.json")
#: Files that hold a chat template of their own.
TEMPLATE_NAMES = ("chat_template.jinja", "chat_template.json")
#: Files from which tokenizers written in Python are made.
SLOW_NAMES = (
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "added_tokens.json", "tiktoken.model", "tekken.json",
)  # fmt: skip
#: Settings that name one special token, in the order in which a library adds those that are not there.
SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
#: Ids from here on are a mistake and no vocabulary.
MAX_TOKENS = 1 << 24

Files = Mapping[str, bytes | Path]


@dataclass(frozen=True)
class Tokenizer:
    """The tokens of one model.

    Attributes:
        ref: of the model.
        content: of its tokenizer.json.
        files: of the tokenizer, by name.
        kind: "BPE", "WordPiece", "WordLevel" or "Unigram".
        plain: ids of the tokens of the vocabulary.
        added: the entries of added tokens, by token, sorted by id.
        ids: of all tokens.
        names: for every id its token; an id that nobody uses has a name that is made up.
        sound: whether a library that loads the file gives these very ids.
    """

    ref: str
    content: Mapping[str, Any] = field(repr=False)
    files: Files = field(repr=False)
    kind: str
    plain: Mapping[str, int] = field(repr=False)
    added: Mapping[str, Mapping[str, Any]] = field(repr=False)
    ids: Mapping[str, int] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    sound: bool


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to a tokenizer, so that it is not copied where the output has another one.

    >>> is_tokenizer_file("merges.txt"), is_tokenizer_file("qwen.tiktoken"), is_tokenizer_file("config.json")
    (True, True, False)
    """
    known = (TOKENIZER_NAME, *KEPT_NAMES, *TEMPLATE_NAMES, *SLOW_NAMES)
    return name in known or name.endswith(".tiktoken")


def tokenizer_files(source: Source) -> dict[str, bytes | Path]:
    """Files of a source's tokenizer by name; those it brings as `tokenizer_files` count before its folder's."""
    own: Files | None = getattr(source, "tokenizer_files", None)
    if own is not None:
        return dict(own)
    return {path.name: path for path in source.companions() if is_tokenizer_file(path.name)}


def read_tokenizers(sources: Mapping[str, Source]) -> dict[str, Tokenizer]:
    """The tokenizer of every source; equal files are read once.

    Raises:
        RefError: If a model has no tokenizer.json.
        CheckpointError: If one is not sound.
    """
    seen: dict[bytes, Tokenizer] = {}
    found = {}
    for ref, source in sources.items():
        files = tokenizer_files(source)
        if TOKENIZER_NAME not in files:
            slow = [name for name in files if name in SLOW_NAMES or name.endswith(".tiktoken")]
            raise RefError(
                f"{ref} has no {TOKENIZER_NAME}, so its tokens are not known"
                + (f"; it has {', '.join(slow)} only" if slow else ""),
                f"make one beside its weights: AutoTokenizer.from_pretrained({ref!r}).save_pretrained(FOLDER)",
            )
        text, config = bytes_of(files, TOKENIZER_NAME), bytes_of(files, CONFIG_NAME)
        key = hashlib.sha256(text).digest() + hashlib.sha256(config).digest()
        if key not in seen:
            seen[key] = _parsed(ref, text, config, files)
        found[ref] = replace(seen[key], ref=ref, files=files)
    return found


def bytes_of(files: Files, name: str) -> bytes:
    """Content of one file of a tokenizer; an empty JSON object where it is not there."""
    value = files.get(name, b"{}")
    if isinstance(value, bytes):
        return value
    try:
        return value.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{value} cannot be read: {error.strerror}") from error


def object_of(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: If the text is anything else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return content


def _parsed(ref: str, text: bytes, config_text: bytes, files: Files) -> Tokenizer:
    where = f"{TOKENIZER_NAME} of {ref}"
    content, config = object_of(text, where), object_of(config_text, f"{CONFIG_NAME} of {ref}")
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise CheckpointError(f"{where} has no model with a vocab")
    kind = str(model.get("type") or _guessed(model))
    if kind not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        raise CheckpointError(
            f"{where} is of the unknown kind {kind}", "known are BPE, WordPiece, WordLevel and Unigram"
        )
    plain = dict(_entries(model["vocab"], where))
    added = dict(_added(content.get("added_tokens") or [], where))
    for token, entry in _of_config(config, where):
        added.setdefault(token, entry)
    ids = dict(plain)
    for token, entry in added.items():
        if ids.setdefault(token, entry["id"]) != entry["id"]:
            raise CheckpointError(f"{where} gives {token!r} two ids: {ids[token]} and {entry['id']}", _ANEW)
    ends = max(ids.values(), default=-1) + 1
    for token in _named(config):
        if token not in ids:  # a library puts it behind all others when it loads the file
            ids[token] = ends
            added[token] = entry_of(token, ends, special=True)
            ends += 1
    names: list[str | None] = [None] * ends
    for token, i in ids.items():
        if (other := names[i]) is not None:
            raise CheckpointError(f"{where} gives id {i} to {other!r} and {token!r}", _ANEW)
        names[i] = token
    behind = [entry["id"] for token, entry in added.items() if token not in plain]
    sound = behind == list(range(len(plain), len(plain) + len(behind)))
    added = dict(sorted(added.items(), key=lambda item: int(item[1]["id"])))
    return Tokenizer(ref, content, files, kind, plain, added, ids, _filled(names, ids), sound)


_ANEW = "save the tokenizer anew with the library that it is for"


def _guessed(model: Mapping[str, Any]) -> str:
    """The kind of a model of the time when files did not say it."""
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _entries(vocab: Mapping[str, Any] | Sequence[Any], where: str) -> Iterator[tuple[str, int]]:
    if isinstance(vocab, Mapping):
        yield from ((token, _id(i, token, where)) for token, i in vocab.items())
        return
    for i, entry in enumerate(vocab):
        if not isinstance(entry, list) or [type(e) for e in entry] not in ([str, float], [str, int]):
            raise CheckpointError(f"{where}: entry {i} of its vocab is not [token, score]")
        yield entry[0], i


def _id(value: object, token: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_TOKENS:
        raise CheckpointError(f"{where}: the id of {token!r} is {str(value)[:40]}, which no token can have")
    return value


def _added(entries: object, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{where}: its added_tokens are not a list of objects with id and content")
        _id(entry.get("id"), entry["content"], where)
        yield entry["content"], entry


def _of_config(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Added tokens that tokenizer_config.json lists by id."""
    listed = config.get("added_tokens_decoder")
    for i, entry in (listed if isinstance(listed, dict) else {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(i).isdecimal():
            flags = {key: value for key, value in entry.items() if key in FLAGS}
            yield entry["content"], {**entry_of(entry["content"], _id(int(i), entry["content"], where)), **flags}


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def entry_of(token: str, number: int, *, special: bool = False) -> dict[str, Any]:
    """An added token that is found wherever its very text stands."""
    return {"id": number, "content": token, **dict.fromkeys(FLAGS, False), "special": special}


def token_of(value: object) -> str | None:
    """A token that a setting names, in short or at length."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _named(config: Mapping[str, Any]) -> list[str]:
    return [text for key in SPECIAL_KEYS if (text := token_of(config.get(key))) is not None]


def _filled(names: Iterable[str | None], ids: Mapping[str, int]) -> tuple[str, ...]:
    filled = []
    for i, name in enumerate(names):
        made_up = f"<|unused id {i}|>"
        while name is None and made_up in ids:
            made_up += "_"
        filled.append(made_up if name is None else name)
    return tuple(filled)


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Merges of a BPE in order; none of another kind.

    Raises:
        CheckpointError: If one is not two parts.
    """
    found = []
    merges = tokenizer.content["model"].get("merges") if tokenizer.kind == "BPE" else []
    if not isinstance(merges, list):
        raise CheckpointError(f"{TOKENIZER_NAME} of {tokenizer.ref} has no list of merges")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or type(parts[0]) is not str or type(parts[1]) is not str:
            raise CheckpointError(f"{TOKENIZER_NAME} of {tokenizer.ref}: the merge {merge!r} is not two parts")
        found.append((parts[0], parts[1]))
    return found


def joined(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The tokens that merges make."""
    prefix = tokenizer.content["model"].get("continuing_subword_prefix")
    cut = len(prefix) if isinstance(prefix, str) else 0
    return [first + second[cut:] for first, second in pairs]
