"""Compose a study from the Hydra groups in `merganser/conf` and the words of a command line."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from merganser.decentral.words import RunConfig, load_config, read_config
from merganser.errors import MerganserError, ParameterError, RefError
from merganser.study.words import MethodNode, ModelPool, Node, StudyNode, TaskPool, Variant, Zoo
from merganser.study.words_agents import AgentsNode
from merganser.study.words_apart import KINDS, HalvesNode, LinesNode

N = TypeVar("N", bound=Node)

CONF = Path(str(files("merganser"))) / "conf"
GROUPS = ("method", "modelpool", "taskpool", "study", "zoo")
#: The kind of a study whose experts arrive one by one.
FOLD = "fold"


@dataclass(frozen=True)
class Plan:
    """A study, ready to run.

    Attributes:
        study: what is compared.
        methods: by name, in order.
        models: the pool of models.
        tasks: the pool of tasks, those that have a model, in the order of the pool of models.
    """

    study: StudyNode
    methods: dict[str, MethodNode]
    models: ModelPool
    tasks: TaskPool


def names_in(group: str, extra: Path | None = None) -> list[str]:
    """Names that a group offers."""
    places = [CONF / group, *([extra / group] if extra else [])]
    return sorted({p.stem for place in places for p in place.glob("*.yaml")})


def study_of(words: Sequence[str], *, extra: Path | None = None) -> Plan | HalvesNode | LinesNode | AgentsNode:
    """The study that overrides mean, of any kind: `kind` of its node says which; by default experts arrive one by one.

    Args:
        words: overrides of Hydra, without sweeps.
        extra: a folder of groups of one's own, searched too.

    Raises:
        ParameterError: As for `plan_of`; and if a word is of a group that a study of that kind has no use for.
    """
    content = _compose(words, extra)
    kind = (content.get("study") or {}).get("kind", FOLD)
    if kind == FOLD:
        return _plan(words, content, extra)
    kinds: dict[str, type[HalvesNode] | type[LinesNode] | type[AgentsNode]] = {**KINDS, "agents": AgentsNode}
    if kind not in kinds:
        near = get_close_matches(str(kind), (FOLD, *kinds), n=1)
        known = f"it is one of {', '.join((FOLD, *kinds))}"
        raise ParameterError(f"study.kind is {kind!r}", f"did you mean {near[0]}?" if near else known)
    for word in words:
        group = word.lstrip("+~").partition("=")[0].partition(".")[0]
        if group not in ("study", "zoo_folder"):
            raise ParameterError(f"{word}: a study of {kind} has no use for it", "its own keys are study.KEY")
    node = _node(kinds[kind], content, "study")
    folder = next((w.partition("=")[2] for w in reversed(words) if w.lstrip("+").startswith("zoo_folder=")), None)
    return node if folder is None else node.model_copy(update={"zoo": folder})


def run_of(config: str, words: Sequence[str] = ()) -> RunConfig:
    """The decentralised run that a file, or a name in the group `decentral`, means with some keys said otherwise.

    Args:
        config: path of a YAML file, or a name.
        words: such as `merge.rule=aligned`.

    Raises:
        RefError: If there is no such file or name.
        ParameterError: If it is no configuration of a run, or a word is none.
    """
    path, names = Path(config), names_in("decentral")
    if not path.is_file() and config in names:
        path = CONF / "decentral" / f"{config}.yaml"
    if not path.is_file():
        raise RefError(f"there is no file {config}, nor a run of that name", f"names: {', '.join(names)}")
    found = load_config(path)
    if path.stem == config:
        found = found.model_copy(update={"name": config})
    if not words:
        return found
    for word in words:
        key, equals, _ = word.partition("=")
        if not key or not equals:
            raise ParameterError(f"{word!r} sets no key", "as in merge.rule=aligned or rounds=4")
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise MerganserError("words about a run need omegaconf", 'pip install "merganser[study]"') from error
    try:
        said = OmegaConf.merge(found.model_dump(mode="json", exclude_defaults=True), OmegaConf.from_dotlist([*words]))
        content = OmegaConf.to_container(said, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ParameterError(f"the run cannot be composed: {error}") from error
    assert isinstance(content, dict)
    return read_config({str(key): value for key, value in content.items()})


def plan_of(words: Sequence[str], *, extra: Path | None = None) -> Plan:
    """The study that overrides such as `study=vision8` or `method=opcm modelpool=... taskpool=... seed=0` mean.

    Args:
        words: overrides of Hydra, without sweeps.
        extra: a folder of groups of one's own, searched too.

    Raises:
        ParameterError: If a group, name or key is unknown, a value is of the wrong kind, or pools do not fit.
    """
    return _plan(words, _compose(words, extra), extra)


def _plan(words: Sequence[str], content: Mapping[str, Any], extra: Path | None) -> Plan:
    models, tasks = _node(ModelPool, content, "modelpool"), _node(TaskPool, content, "taskpool")
    if lacking := [name for name in models.models if name not in tasks.tasks]:
        raise ParameterError(
            f"modelpool {models.name} has a model for {lacking[0]}, and taskpool {tasks.name} no such task",
            f"its tasks: {', '.join(tasks.tasks)}",
        )
    seed, chosen = content.get("seed"), next((w.partition("=")[2] for w in reversed(words) if w[:7] == "method="), None)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ParameterError(
            f"seed is {seed!r}; it is a whole number", "several seeds: study.seeds=[0,1], or -m seed=0,1"
        )
    if content.get("study"):
        study = _node(StudyNode, content, "study")
        if chosen is not None and chosen not in study.methods:
            names = ",".join((*study.methods, chosen))
            raise ParameterError(f"study {study.name} does not compare {chosen}", f"study.methods=[{names}]")
        if seed is not None:
            study = study.model_copy(update={"seeds": (seed,)})
        methods = {name: _method(name, study.variants.get(name), words, chosen, extra) for name in study.methods}
    else:
        node, name = _node(MethodNode, content, "method"), chosen or "gram"
        title = f"{name} on {models.name}"
        study = StudyNode(name=f"{name}-{models.name}", title=title, methods=(name,), seeds=(seed or 0,))
        methods = {name: node}
    for node in methods.values():
        _check_settings(node)
    tasks = tasks.model_copy(update={"tasks": {name: tasks.tasks[name] for name in models.models}})
    return Plan(study, methods, models, tasks)


def _method(
    name: str, variant: Variant | None, words: Sequence[str], chosen: str | None, extra: Path | None
) -> MethodNode:
    """A method of a study; words about the method are meant for the one that is named beside the study."""
    file = variant.of if variant else name
    others = [w for w in words if not w.lstrip("+~").startswith("method") or (file == chosen and "=" in w)]
    node = _node(MethodNode, _compose([*(w for w in others if w[:7] != "method="), f"method={file}"], extra), "method")
    if variant is None:
        return node
    said = ", ".join(f"{key} {value}" for key, value in (variant.settings | variant.fold).items())
    changes = {"settings": node.settings | variant.settings, "fold": node.fold | variant.fold}
    return node.model_copy(update={**changes, "label": variant.label or f"{node.label}, {said}", "source": ""})


def _check_settings(node: MethodNode) -> None:
    """A setting that the method does not have is named by its place."""
    from merganser.continual.kinds import check_settings
    from merganser.methods import find_method, settings_of

    known = settings_of(find_method(node.method))
    for setting in node.settings:
        if setting not in known:
            near = get_close_matches(setting, known, n=1)
            takes = ", ".join(known) or "no settings"
            raise ParameterError(
                f"method.settings.{setting}: {node.method} has no such setting",
                f"did you mean {near[0]}?" if near else f"it takes {takes}",
            )
    check_settings(node.method, node.settings)


def merged_plans(plans: Sequence[Plan]) -> list[Plan]:
    """Plans that differ in method or seed alone become one study; others stay apart."""
    merged: list[Plan] = []
    for plan in plans:
        for i, other in enumerate(merged):
            if (plan.models, plan.tasks) == (other.models, other.tasks) and all(
                plan.methods[name] == other.methods[name] for name in plan.methods.keys() & other.methods.keys()
            ):
                methods = {**other.methods, **plan.methods}
                seeds = tuple(dict.fromkeys((*other.study.seeds, *plan.study.seeds)))
                changed: dict[str, Any] = {"methods": tuple(methods), "seeds": seeds}
                if len(methods) > 1:
                    changed |= {"name": plan.models.name, "title": f"{len(methods)} methods on {plan.models.name}"}
                study = other.study if other.study == plan.study else other.study.model_copy(update=changed)
                merged[i] = Plan(study, methods, plan.models, plan.tasks)
                break
        else:
            merged.append(plan)
    return merged


def zoo_of(name: str, words: Sequence[str] = (), *, extra: Path | None = None) -> tuple[Zoo, TaskPool]:
    """A zoo and its tasks.

    Raises:
        ParameterError: As for `plan_of`.
    """
    zoo = _node(Zoo, _compose([f"zoo={name}", *words], extra), "zoo")
    return zoo, _node(TaskPool, _compose([f"taskpool={zoo.taskpool}"], extra), "taskpool")


def expanded(words: Sequence[str]) -> list[list[str]]:
    """Every combination of the choices in `a=1,2 b=x,y`, the last one changing fastest.

    Raises:
        ParameterError: If a word is no override.
    """
    overrides, choices = _parsed(words), []
    from hydra.errors import HydraException

    for word, override in zip(words, overrides, strict=True):
        if not override.is_sweep_override():
            choices.append([word])
            continue
        try:
            values = list(override.sweep_string_iterator())
        except HydraException as error:
            raise ParameterError(
                f"{word} cannot be taken apart: {error}", "name the values: method=gram,opcm"
            ) from error
        choices.append([f"{override.get_key_element()}={value}" for value in values])
    return [list(combination) for combination in itertools.product(*choices)]


def _parsed(words: Sequence[str]) -> list[Any]:
    try:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import OverrideParseException
    except ImportError as error:
        raise MerganserError("studies need hydra", 'pip install "merganser[study]"') from error
    try:
        return list(OverridesParser.create().parse_overrides(list(words)))
    except OverrideParseException as error:
        raise ParameterError(f"{error.override!r} is no override: {error}", "as in study=vision8 or seed=0") from error


def _compose(words: Sequence[str], extra: Path | None) -> dict[str, Any]:
    overrides = _parsed(words)
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for word, override in zip(words, overrides, strict=True):
        if override.is_sweep_override():
            raise ParameterError(f"{word} has several values", "merganser study -m runs every combination")
        _check_name(override, extra)
    path = []
    if extra is not None:
        quoted = str(extra.resolve()).replace("\\", "\\\\").replace('"', '\\"')
        path = [f'hydra.searchpath=["file://{quoted}"]']
    # A key that a file leaves out at its default is there for the user: unknown ones are found by the nodes.
    words = [f"++{w}" if "." in w.partition("=")[0] and w[0] not in "+~" else w for w in words]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=[*path, *words])
        return {
            key: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
            for key, node in ((key, composed.get(key)) for key in (*GROUPS, "seed"))
        }
    except (HydraException, OmegaConfBaseException) as error:
        raise ParameterError(f"the configuration cannot be composed: {error}") from error


def _check_name(override: Any, extra: Path | None) -> None:
    key = override.key_or_group
    top = key.partition(".")[0]
    if top not in (*GROUPS, "seed", "zoo_folder"):
        near = get_close_matches(top, GROUPS, n=1)
        raise ParameterError(
            f"there is no group {top!r}", f"did you mean {near[0]}?" if near else f"groups: {', '.join(GROUPS)}"
        )
    if key not in GROUPS or override.is_delete():
        return
    value = override.value()
    if not isinstance(value, str):
        raise ParameterError(f"{key} is {value}; it is a name", f"one of {', '.join(names_in(key, extra))}")
    if value not in (known := names_in(key, extra)):
        near = get_close_matches(value, known, n=1)
        raise ParameterError(
            f"there is no {key} {value!r}", f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        )


def _node(kind: type[N], content: Mapping[str, Any], group: str) -> N:
    if not content.get(group):
        raise ParameterError(f"no {group} is chosen", f"{group}=NAME, with one of {', '.join(names_in(group))}")
    try:
        return kind.model_validate(content[group])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (group, *first["loc"])))
        nodes: list[type[Node]] = [kind, *_below(Node)]
        known = {name for node in nodes for name in node.model_fields}
        near = get_close_matches(str(first["loc"][-1]), known, n=1) if first["loc"] else []
        hint = f"did you mean {near[0]}?" if near and first["type"] == "extra_forbidden" else None
        what = first["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(first["input"], Mapping) else f" ({first['input']!r})"
        raise ParameterError(f"{place}: {what}{shown}", hint) from error


def _below(kind: type[Node]) -> list[type[Node]]:
    """All kinds of node under one."""
    found: list[type[Node]] = []
    for child in kind.__subclasses__():
        found += [child, *_below(child)]
    return found
