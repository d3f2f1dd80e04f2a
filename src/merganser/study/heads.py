"""Heads: embeddings to logits. All of a task's models share one fixed head, or each expert brings its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from merganser.checkpoints import open_source
from merganser.errors import MerganserError, MissingTensorError, ParameterError
from merganser.study.networks import Encoder, load_encoder, resolve
from merganser.study.words import ClipHead, LinearHead, PrototypeHead, Task

#: Embeddings (n, width) to logits (n, classes).
HeadFunction = Callable[[Tensor], Tensor]


def make_head(name: str, task: Task, classes: tuple[str, ...], expert: Path | None = None) -> HeadFunction:
    """The head of a task.

    Args:
        name: of the task, for errors.
        task: its node.
        classes: names of the classes.
        expert: folder of the task's own expert, for a linear head that is stored there.

    Raises:
        ParameterError: If head and classes do not fit.
        RefError: If a file or an encoder is not there.
    """
    head = task.head
    if isinstance(head, LinearHead):
        return _linear(name, head, len(classes), expert)
    if isinstance(head, ClipHead):
        prototypes, scale = _clip_prototypes(head, classes)
    elif head.file is not None:
        prototypes, scale = _read(Path(head.file), "prototypes"), head.scale
    else:
        assert head.encoder is not None
        prototypes, scale = text_prototypes(head, classes), head.scale
    if len(prototypes) != len(classes):
        raise ParameterError(f"{name} has {len(classes)} classes, and its head {len(prototypes)}")
    unit = functional.normalize(prototypes, dim=1)
    return lambda x: scale * functional.normalize(x, dim=1) @ unit.to(x.device).T


def words_of(label: str) -> str:
    """A label as words.

    >>> words_of("SearchScreeningEvent"), words_of("card_not_working"), words_of("Sci/Tech")
    ('search screening event', 'card not working', 'sci tech')
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    return re.sub(r"[\W_]+", " ", spaced).strip().lower()


def text_prototypes(head: PrototypeHead, classes: tuple[str, ...]) -> Tensor:
    """The sentence encoder's embeddings of the class names in the template, shape (classes, width)."""
    _check_names("a head", head.names, classes)
    encoder = _text_encoder(resolve(head.encoder or ""))
    texts = tuple(head.template.replace("{}", head.names.get(c) or words_of(c)) for c in classes)
    with torch.no_grad():
        return torch.cat([encoder.embed(encoder.prepare((text,))) for text in texts])


@lru_cache(maxsize=1)
def _text_encoder(folder: str) -> Encoder:
    """The same one serves the heads of all tasks."""
    return load_encoder(Path(folder))


def _check_names(where: str, names: dict[str, str], classes: tuple[str, ...]) -> None:
    if unknown := sorted(set(names) - set(classes)):
        raise ParameterError(
            f"{where} renames {unknown[0]!r}, which is no class", f"classes: {', '.join(classes[:20])}"
        )


def _linear(name: str, head: LinearHead, count: int, expert: Path | None) -> HeadFunction:
    beside = expert / head.file if expert is not None else None
    path = beside if beside is not None and beside.is_file() else Path(head.file)
    weight, bias = _read(path, "weight"), _read(path, "bias")
    if len(weight) != count:
        raise ParameterError(f"{name} has {count} classes, and the head {path} {len(weight)}")
    return lambda x: functional.linear(x, weight.to(x.device), bias.to(x.device))


def _read(path: Path, name: str) -> Tensor:
    source = open_source(path)
    if name not in source.infos:
        raise MissingTensorError(f"{path} holds no tensor {name}, which a head needs")
    return source.read(name).float()


def _clip_prototypes(head: ClipHead, classes: tuple[str, ...]) -> tuple[Tensor, float]:
    """CLIP's own text embeddings, summed over templates, and its temperature."""
    _check_names("a head", head.names, classes)
    try:
        import transformers
    except ImportError as error:
        raise MerganserError("CLIP needs transformers", 'pip install "merganser[study]"') from error
    try:
        model = transformers.CLIPModel.from_pretrained(head.model.removeprefix("hf:"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(head.model.removeprefix("hf:"))
    except (OSError, ValueError) as error:
        raise MerganserError(f"{head.model} cannot be loaded", "it needs the hub, or name a local folder") from error
    templates = (head.template,) if isinstance(head.template, str) else head.template
    names = [head.names.get(c) or c.replace("_", " ") for c in classes]
    summed = torch.zeros(())
    with torch.no_grad():
        for template in templates:
            texts = [template.replace("{}", name) for name in names]
            found = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt"))
            summed = summed + functional.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=1)
        return summed, float(model.logit_scale.exp())
