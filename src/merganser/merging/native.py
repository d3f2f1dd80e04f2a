"""Our language of recipes: one YAML file, strictly read.

    method: ties
    base: org/base
    models:
      - org/maths                                  # a reference, or a mapping with this model's own settings beside it
      - {model: org/code, weight: 0.5, density: [0.2, 0.8]}
    settings: {density: 0.2, scale: [{filter: mlp, value: 0.5}, 1.0]}
    dtype: bfloat16

| key | what |
|---|---|
| `method` | of the table (`merganser methods`) |
| `base` | what changes are taken against |
| `models` | all models, whole, each with `statistics` of `merganser measure` where the method asks for them; or |
| `slices` | a list of `{models: [{model, layers: [first, end), weight, ...}], settings, base}`: layers of the output |
| `settings` | of the method; those that a method takes per model may stand here for all of them |
| `post` | names of post-processors, or `{name: settings}`, in order |
| `dtype` | of the output's floating tensors: `bfloat16`, `bf16` or `BF16`, and so on; without it as in the models |
| `dialect` | `paper`, or `mergekit` for mergekit's meaning and defaults |
| `seed` | of the noise of stochastic methods |
| `name` | by which other recipes of the file may use the output as a model |
| `vocabulary` | `union`, `base`, `intersection`, a model, or `{source, tokens, pad_to_multiple_of}` |
| `chat_template` | `auto`, or the template itself |
| `keep` | patterns of names that stay as they are in the base (or in the first model) |
| `adapter` | `{rank: 16}` or `{rank: keep}`: all models are LoRA adapters, and the output is one of that rank |

A file may hold several documents; all but one need a `name`. Values run over layers and names as
`merganser.merging.values` says. A document with the key `merge_method` is mergekit's.

A relative path is first looked for beside the recipe; where nothing is there, it is left as it is: relative to the
working folder, or a name on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from merganser.errors import ParameterError
from merganser.merging import mergekit
from merganser.merging.checking import Words, check_method, method_for
from merganser.merging.common import (
    SOURCES,
    Origin,
    base_of_slice,
    read_dtype,
    read_keep,
    read_member,
    read_name,
    read_source,
    read_template,
    read_token,
    uses,
    uses_base,
)
from merganser.merging.dialect import with_defaults
from merganser.merging.documents import read_documents
from merganser.merging.lookup import merge_names, rules_of
from merganser.merging.reading import Node, Problems, short
from merganser.merging.recipe import AdapterOut, Dialect, Input, Recipe, Settings, Slice, Token, Vocabulary

KEYS = (
    "method", "base", "models", "slices", "settings", "post", "dtype", "dialect", "seed", "name", "vocabulary",
    "chat_template", "keep", "adapter",
)  # fmt: skip
SLICE_KEYS = ("models", "settings", "base")
#: What other languages call it.
OTHERS = {
    "base_model": "base",
    "parameters": "settings",
    "tokenizer": "vocabulary",
    "tokenizer_source": "vocabulary",
    "out_dtype": "dtype",
    "random_seed": "seed",
    "layer_range": "layers",
    "sources": "models",
}
#: Keys of files that belong to other programs, and what these do.
FOREIGN = {
    "experts": "mergekit-moe, which makes a mixture of experts rather than merge weights",
    "genome": "mergekit-evolve, which searches for a recipe",
}


def read_recipes(path: Path, *, lenient: bool = False) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
    """Read a file of recipes in our language or in mergekit's.

    Args:
        path: a YAML file.
        lenient: warn of keys that mergekit would ignore where they are unknown, rather than refuse them.

    Returns:
        The recipes, each behind those that it uses and the one without a name last, and warnings.

    Raises:
        RefError: If the file cannot be read.
        ParameterError: If anything is wrong with it; lists everything.
    """
    problems = Problems()
    documents = read_documents(path, problems)
    if not documents:
        raise ParameterError(f"{path}: holds no recipe")
    names = [read_name(document) for document in documents]
    _refuse_names(documents, names)
    origin = Origin(path.parent, tuple(name for name in names if name is not None))
    recipes: list[tuple[Node, Recipe]] = []
    for document, name in zip(documents, names, strict=True):
        entries = document.mapping("a mapping, from method to models")
        if not entries:
            if isinstance(document.value, dict):
                document.error("holds no recipe")
            continue
        if foreign := [FOREIGN[key] for key in entries if key in FOREIGN]:
            document.error(f"is a file of {foreign[0]}; write a recipe: method, base, models")
            continue
        if "merge_method" in entries:
            recipe, words = mergekit.read(document, origin, lenient=lenient)
        else:
            recipe, words = _read(document, origin)
        recipe = replace(recipe, name=name, text=document.text, written=dict(origin.written))
        if recipe.method:
            problems.found(check_method(recipe, words), document.lines)
        _refuse_recipes_as_adapters(document, recipe, origin)
        recipes.append((document, recipe))
    ordered = _sorted(recipes)
    problems.refuse(path)
    return ordered, problems.listed_warnings()


def _refuse_names(documents: Sequence[Node], names: Sequence[str | None]) -> None:
    lines: dict[str, int] = {}
    for document, name in zip(documents, names, strict=True):
        if name is not None and name in lines:
            document.mapping()["name"].error(f"{short(name)} is taken by the recipe in line {lines[name]}")
        elif name is not None:
            lines[name] = document.line
    for document in [d for d, name in zip(documents, names, strict=True) if name is None][1:]:
        document.error("name is missing; only one recipe of a file, the last to run, may have none")


def _refuse_recipes_as_adapters(document: Node, recipe: Recipe, origin: Origin) -> None:
    """Refuse another recipe's output in the place of an adapter; it may be what one is applied to."""
    for ref in recipe.refs if recipe.adapter is None else ():
        adapters = origin.written.get(ref, ref).split("+")[1:]
        if made := next((part for part in adapters if part in origin.names), None):
            document.error(f"{short(origin.written.get(ref, ref))}: {made} is a recipe of this file, and no adapter")


def _sorted(recipes: Sequence[tuple[Node, Recipe]]) -> tuple[Recipe, ...]:
    """Each recipe behind those that it uses, else in the order of the file; the one without a name last."""
    names = [recipe.name for _, recipe in recipes if recipe.name is not None]
    waiting = sorted(recipes, key=lambda entry: entry[1].name is None)
    done: list[Recipe] = []
    while waiting:
        ready = {recipe.name for recipe in done}
        found = next((e for e in waiting if all(u in ready for u in uses(e[1], names))), None)
        if found is None:
            _refuse_circle(waiting, names)
            break
        waiting.remove(found)
        done.append(found[1])
    return tuple(done)


def _refuse_circle(waiting: Sequence[tuple[Node, Recipe]], names: Sequence[str]) -> None:
    by_name = {recipe.name: (document, recipe) for document, recipe in waiting if recipe.name is not None}
    walk = [next(iter(by_name))]
    while (follower := next(u for u in uses(by_name[walk[-1]][1], names) if u in by_name)) not in walk:
        walk.append(follower)
    circle = [*walk[walk.index(follower) :], follower]
    document = by_name[circle[0]][0]
    if len(circle) == 2:
        document.error(f"the recipe {circle[0]} uses its own output")
    else:
        document.error(f"recipes use each other in a circle: {' -> '.join(circle)}")


def _read(document: Node, origin: Origin) -> tuple[Recipe, Words]:
    entries = _known(document)
    method = entries["method"].string("the name of a method") if "method" in entries else ""
    if "method" not in entries:
        document.error("method is missing")
    base = _base(entries["base"], origin) if "base" in entries else None
    method = method_for(method, based=base is not None)
    settings = _settings(entries["settings"].mapping("settings by name")) if "settings" in entries else {}
    draft = Recipe(
        method=method,
        slices=_slices(document, entries, method, base, origin),
        base=base,
        settings=settings,
        post=_post(entries["post"]) if "post" in entries else (),
        dtype=read_dtype(entries["dtype"]) if "dtype" in entries else None,
        dialect="mergekit" if "dialect" in entries and _dialect(entries["dialect"]) == "mergekit" else "paper",
        seed=entries["seed"].integer(0) if "seed" in entries else 0,
        chat_template=read_template(entries["chat_template"]) if "chat_template" in entries else None,
        keep=read_keep(entries["keep"]) if "keep" in entries else (),
        adapter=_adapter(entries["adapter"]) if "adapter" in entries else None,
    )
    vocabulary = _vocabulary(entries["vocabulary"], draft, origin) if "vocabulary" in entries else None
    recipe = replace(draft, vocabulary=vocabulary)
    return with_defaults(recipe) if recipe.dialect == "mergekit" else recipe, Words()


def _known(document: Node) -> dict[str, Node]:
    """Entries of a document by key; those that belong elsewhere are told so."""
    entries = document.mapping()
    method = entries["method"].value if "method" in entries else None
    known = rules_of(method) if isinstance(method, str) and method in merge_names() else None
    for key, node in entries.items():
        if key in KEYS:
            continue
        if known is not None and (key in known.settings or (key == "weight" and known.weighted)):
            node.error(f"settings of the method stand under settings: {{{key}: ...}}")
        else:
            _refuse_key(key, node, KEYS)
    return {key: node for key, node in entries.items() if key in KEYS and node.value is not None}


def _refuse_key(key: str, node: Node, known: Sequence[str]) -> None:
    if OTHERS.get(key) in known:
        node.error(f"is called {OTHERS[key]} in this language")
    else:
        node.unknown(key, known)


def _slices(
    document: Node, entries: Mapping[str, Node], method: str, base: Input | None, origin: Origin
) -> tuple[Slice, ...]:
    if ("models" in entries) == ("slices" in entries):
        document.error("give models or slices, not both" if "models" in entries else "models is missing")
    if "models" in entries:
        inputs = tuple(_input(node, origin) for node in entries["models"].items("a list of models"))
        return (Slice(inputs),) if inputs else ()
    if "slices" in entries:
        needed = base if uses_base(method) else None
        return tuple(_slice(node, needed, origin) for node in entries["slices"].items("a list of slices"))
    return ()


def _slice(node: Node, base: Input | None, origin: Origin) -> Slice:
    entries = node.mapping("a mapping with models")
    for key, child in entries.items():
        if key not in SLICE_KEYS:
            _refuse_key(key, child, SLICE_KEYS)
    if "models" not in entries:
        node.error("models is missing")
    models = entries["models"].items("a list of models") if "models" in entries else ()
    inputs = tuple(_input(model, origin, layered=True) for model in models)
    own = _base(entries["base"], origin, layered=True) if "base" in entries else base
    settings = _settings(entries["settings"].mapping("settings by name")) if "settings" in entries else {}
    return Slice(inputs, base_of_slice(node, inputs, own), settings)


def _input(node: Node, origin: Origin, *, layered: bool = False) -> Input:
    entries = node.value
    if not isinstance(entries, dict):
        if layered:
            node.error("needs layers: {model: ..., layers: [first, end]}")
        return Input(origin.read(node))
    if "model" not in entries:
        node.error("model is missing")
    if layered and "layers" not in entries:
        node.error("layers is missing: [first, end]")
    if not layered and "layers" in entries:
        entries["layers"].error("belongs into slices; models are taken whole")
    if "parameters" in entries:
        entries["parameters"].error("settings of a model stand directly beside it")
    if "layer_range" in entries:
        entries["layer_range"].error("is called layers in this language")
    measured = origin.read(entries["statistics"]) if "statistics" in entries else None
    apart = ("model", "layers", "statistics", "parameters", "layer_range")
    own = {k: v for k, v in entries.items() if k not in apart}
    ref = origin.read(entries["model"]) if "model" in entries else node.place
    layers = entries["layers"].layers() if layered and "layers" in entries else None
    return Input(ref, layers, _settings(own), measured)


def _base(node: Node, origin: Origin, *, layered: bool = False) -> Input:
    if not isinstance(node.value, dict):
        return Input(origin.read(node))
    entries = node.fields(("model", "layers") if layered else ("model",))
    if "model" not in entries:
        node.error("model is missing")
    ref = origin.read(entries["model"]) if "model" in entries else node.place
    return Input(ref, entries["layers"].layers() if "layers" in entries else None)


def _settings(entries: Mapping[str, Node]) -> Settings:
    return {key: node.setting() for key, node in entries.items()}


def _post(node: Node) -> tuple[tuple[str, Settings], ...]:
    steps: list[tuple[str, Settings]] = []
    for entry in node.items("a list of post-processors"):
        if not isinstance(entry.value, dict):
            steps.append((entry.string("the name of a post-processor"), {}))
        elif len(entry.value) != 1:
            entry.error("must be a name, or one name with its settings: {name: {setting: value}}")
        else:
            ((name, settings),) = entry.value.items()
            steps.append((name, {} if settings.value is None else _settings(settings.mapping("settings by name"))))
    return tuple(steps)


def _dialect(node: Node) -> str:
    return node.one_of(get_args(Dialect))


def _adapter(node: Node) -> AdapterOut:
    entries = node.fields(("rank",), "a mapping with the rank of the output: {rank: 16}, or {rank: keep}")
    if "rank" not in entries:
        if isinstance(node.value, dict):
            node.error("rank is missing: a whole number, or keep for no truncation")
        return AdapterOut()
    rank = entries["rank"]
    if isinstance(rank.value, str):
        if rank.value != "keep":
            rank.error(f"must be a whole number from 1 on, or keep for no truncation, and is {short(rank.value)}")
        return AdapterOut()
    return AdapterOut(rank.integer(1))


def _vocabulary(node: Node, recipe: Recipe, origin: Origin) -> Vocabulary:
    if not isinstance(node.value, dict):
        return Vocabulary(_source(node, recipe, origin))
    entries = node.fields(("source", "tokens", "pad_to_multiple_of"))
    if "source" not in entries:
        node.error("source is missing")
    tokens = entries["tokens"].mapping("tokens by their text") if "tokens" in entries else {}
    return Vocabulary(
        source=_source(entries["source"], recipe, origin) if "source" in entries else SOURCES[0],
        tokens={text: _token(entry, recipe, origin) for text, entry in tokens.items()},
        pad_to_multiple_of=entries["pad_to_multiple_of"].integer(1) if "pad_to_multiple_of" in entries else 1,
    )


def _source(node: Node, recipe: Recipe, origin: Origin) -> str:
    text = node.string(f"one of {', '.join(SOURCES)}, or a model")
    if text == "base" and recipe.base is None:
        node.error("the recipe has no base; name one of the models")
    return read_source(node, text if text in SOURCES or not text else origin.located(text), recipe.refs, SOURCES)


def _token(node: Node, recipe: Recipe, origin: Origin) -> Token:
    if not isinstance(node.value, dict):
        return Token("model", read_member(node, origin.read(node), recipe.refs))
    entries = node.fields(("kind", "model", "token", "force"))
    stated = "token" if "token" in entries else "model"
    kind = entries["kind"].one_of(("model", "token", "zero")) if "kind" in entries else stated
    if kind == "zero" and ("model" in entries or "token" in entries):
        node.error("zero takes no model and no token")
    if kind != "zero" and "model" not in entries:
        node.error("model is missing")
    if (kind == "token") != ("token" in entries) and kind != "zero":
        node.error("token is missing" if kind == "token" else "a row of another token is kind: token")
    model = entries.get("model")
    return Token(
        "zero" if kind == "zero" else "token" if kind == "token" else "model",
        None if model is None else read_member(model, origin.read(model), recipe.refs),
        read_token(entries["token"]) if "token" in entries else None,
        entries["force"].flag() if "force" in entries else False,
    )
