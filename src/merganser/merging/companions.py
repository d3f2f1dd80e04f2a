"""The files beside the weights: the donor's config with what the merge changed, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merganser.checkpoints.writer import write_json
from merganser.merging.config_depth import Described, deepen
from merganser.merging.layers import depths, place_of
from merganser.merging.plan import Plan
from merganser.merging.tokenizer_json import CONFIG_NAME, TEMPLATE_NAMES, is_tokenizer_file
from merganser.merging.vocabulary_rows import adapters_on, beneath
from merganser.types import FLOAT_DTYPES

CARD_NAME = "README.md"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TEMPLATE, _OLD_TEMPLATE = TEMPLATE_NAMES
_TYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: A file as it is, or its new content.
_File = Path | bytes | dict[str, Any]


def write_companions(plan: Plan, folder: Path, *, taken: set[str]) -> list[Path]:
    """Write what differs from the donor's files into the folder; return those to be copied as they are.

    Args:
        plan: of the merge.
        folder: where the weights are being written.
        taken: names of files that are there.
    """
    copied = []
    for name, file in _files(plan).items():
        if isinstance(file, dict):
            write_json(folder / name, file)
        elif isinstance(file, bytes):
            (folder / name).write_bytes(file)
        elif file.name != name:
            (folder / name).write_bytes(file.read_bytes())
        elif name not in taken:
            copied.append(file)
    (folder / CARD_NAME).write_text(_card(plan), "utf-8")
    return copied


def check_companions(plan: Plan) -> None:
    """Refuse what the files beside the weights could not be made of, before any work.

    Raises:
        ParameterError: If the configs of the models do not fit together.
    """
    _files(plan)


def _files(plan: Plan) -> dict[str, _File]:
    """The files beside the output of a plan, by name; those of an earlier stage are as that stage would write them."""
    files = _files_of(plan, plan.donor)
    for name in (_CONFIG, _GENERATION):
        content = _content(files.get(name))
        if content is not None and (changed := _adapted(name, content, plan)) != content:
            files[name] = changed
    if plan.vocabulary is not None:
        files = {n: f for n, f in files.items() if not is_tokenizer_file(n)} | dict(plan.vocabulary.files)
    if plan.chat_template is not None:
        for name in (CONFIG_NAME, _OLD_TEMPLATE):  # programs differ in which of several they believe
            content = _content(files.get(name))
            if content is not None and "chat_template" in content:
                files[name] = content | {"chat_template": plan.chat_template}
        files[_TEMPLATE] = plan.chat_template.encode()
    return files


def _files_of(plan: Plan, ref: str) -> dict[str, _File]:
    source = plan.sources[ref]
    inner = getattr(beneath(source), "plan", None)
    return _files(inner) if isinstance(inner, Plan) else {path.name: path for path in source.companions()}


def _content(file: _File | None) -> dict[str, Any] | None:
    if isinstance(file, dict) or file is None:
        return file
    try:
        content = json.loads(file if isinstance(file, bytes) else file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _adapted(name: str, config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """A file of the donor's for the output: vocabulary, depth, type of the weights, tied embeddings; nothing else."""
    changed: dict[str, Any] = dict(config)
    if plan.vocabulary is not None:
        other = _content(_files_of(plan, plan.vocabulary.donor).get(name))
        changed = plan.vocabulary.adapted(config, plan.donor, other)
    if name != _CONFIG:
        return changed
    changed = _deepened(changed, plan)
    types = {t.info.dtype for t in plan.tensors.values() if t.info.dtype in FLOAT_DTYPES}
    stored = {i.dtype for i in plan.sources[plan.donor].infos.values() if i.dtype in FLOAT_DTYPES}
    if len(types) == 1 and types != stored:
        for key in ("torch_dtype", "dtype"):
            if key in config:
                changed[key] = _TYPE_NAMES[next(iter(types))]
    if config.get("tie_word_embeddings", True) and set(plan.sources[plan.donor].aliases) - set(plan.aliases):
        changed["tie_word_embeddings"] = False
    return changed


def _deepened(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The donor's config for as many layers as the output has, and of the kinds that they are."""
    origins = _origins(plan)
    refs = dict.fromkeys(ref for found in origins.values() for ref, _ in found.values())
    models = {ref: _described(plan, ref) for ref in refs}
    donor = models[plan.donor] = replace(_described(plan, plan.donor), config=config)
    after: dict[str, list[tuple[Described, int]]] = {}
    for stack, found in origins.items():
        if not found:
            continue
        after[stack] = []
        for number in range(plan.layers[stack]):
            near = number if number in found else min(found, key=lambda n: abs(n - number))
            model, layer = models[found[near][0]], found[near][1] + number - near
            after[stack].append((model, max(0, min(layer, model.depths[stack] - 1))))
    return deepen(donor, after)


def _described(plan: Plan, ref: str) -> Described:
    names: dict[str, dict[int, set[str]]] = {}
    for place in filter(None, map(place_of, plan.sources[ref].infos)):
        names.setdefault(place.stack, {}).setdefault(place.index, set()).add(place.rest)
    parts = {stack: {i: frozenset(rests) for i, rests in layers.items()} for stack, layers in names.items()}
    config = _content(_files_of(plan, ref).get(_CONFIG)) or {}
    return Described(ref, config, depths(plan.sources[ref].infos), parts)


def _origins(plan: Plan) -> dict[str, dict[int, tuple[str, int]]]:
    """For every layer of each stack of the output, the model and the layer that it is like.

    The donor's where it is one of those that are merged there, else the lead's.
    """
    found: dict[str, dict[int, tuple[str, int]]] = {}
    for name, tensor in plan.tensors.items():
        if (place := place_of(name)) is None:
            continue
        pieces = [p for p in (tensor.base, *tensor.models) if p is not None]
        layers = found.setdefault(place.stack, {})
        for piece in pieces:
            origin = place_of(piece.name)
            if origin is None or origin.stack != place.stack:
                continue  # tied to another
            if place.index not in layers or (piece.ref == plan.donor != layers[place.index][0]):
                layers[place.index] = (piece.ref, origin.index)
    return found


def _card(plan: Plan) -> str:
    """A model card as the Hugging Face hub reads it: what was merged, how, and the recipe itself."""
    recipe = plan.recipe
    models = [ref for ref in recipe.refs if recipe.base is None or ref != recipe.base.ref]
    listed = "\n".join(f"- {ref}" for ref in dict.fromkeys(_inputs(plan)))
    based = f", with `{recipe.base.ref}` as base" if recipe.base is not None else ""
    hub = [ref.removeprefix("hf:").partition("@")[0] for ref in _inputs(plan) if not Path(ref).exists()]
    front = ["base_model:", *(f"- {ref}" for ref in dict.fromkeys(hub))] if hub else []
    header = "\n".join(["---", *front, "base_model_relation: merge", "tags:", "- merge", "- merganser", "---"])
    return f"""{header}
# {recipe.name or "A merged model"}

{len(models)} models merged by `{recipe.method}`{based}:

{listed}

The receipt `merganser.json` holds the digest of every tensor that was read and written.

```yaml
{recipe.text.strip()}
```
"""


def _inputs(plan: Plan) -> list[str]:
    """References of everything that is read from files, through all stages."""
    found: list[str] = []
    for ref, source in plan.sources.items():
        inner = getattr(beneath(source), "plan", None)
        found += _inputs(inner) if isinstance(inner, Plan) else [ref]
        found += [adapter.ref for adapter in adapters_on(source)]
    return found
