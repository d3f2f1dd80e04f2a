"""The documents of a YAML file as nodes, with nothing taken on trust.

Bytes, nesting and the values that aliases multiply to are limited, no tag makes an object, and no key may be given
twice.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from merganser.errors import ParameterError, RefError
from merganser.merging.reading import Node, Problems, short
from merganser.merging.values import Scalar

#: Largest recipe, in bytes; the longest that people write have some hundred slices, a twentieth of this.
MAX_BYTES = 1 << 20
#: Most values of a recipe after its aliases are written out.
MAX_VALUES = 30_000

_EXPONENT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+")  # YAML 1.1 takes 1e-5 for text
_TOO_MANY = f"more than {MAX_VALUES} values, or aliases that multiply to that"
_TAG = "tag:yaml.org,2002:"


def read_documents(path: Path, problems: Problems) -> tuple[Node, ...]:
    """Documents of a file that are not empty.

    Args:
        path: a YAML file.
        problems: where everything that is found later is collected.

    Raises:
        RefError: If the file cannot be read.
        ParameterError: If it is too large or no YAML.
    """
    text = _text_of(path)
    try:
        loader = _Loader(text)
        roots = []
        while loader.check_node():
            roots.append(loader.get_node())
        builder = _Builder(problems)
        single = len(roots) == 1
        documents = [
            builder.document(root, text if single else text[root.start_mark.index : root.end_mark.index])
            for root in roots
        ]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ParameterError(f"{path}: {line}not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ParameterError(f"{path}: not YAML: {' '.join(str(error).split())}"[:300]) from error
    except RecursionError as error:
        raise ParameterError(f"{path}: lists and mappings are nested too deeply") from error
    except _TooMuchError as error:
        raise ParameterError(f"{path}: {error}") from error
    return tuple(d for d in documents if d.value is not None)


class _TooMuchError(Exception):
    """A file that is not walked to its end."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which stops early."""

    composed = 0

    def compose_node(self, parent: yaml.Node, index: object) -> yaml.Node:
        self.composed += 1
        if self.composed > MAX_VALUES:
            raise _TooMuchError(_TOO_MANY)
        return super().compose_node(parent, index)


class _Builder:
    """From PyYAML's nodes to ours: aliases and merge keys are written out, and counted."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.constructor = yaml.SafeLoader("")
        self.count = 0
        self.open: list[int] = []

    def document(self, root: yaml.Node, text: str) -> Node:
        self.lines: dict[str, int] = {}
        node = self.build(root, "")
        return Node(node.value, "", node.line, text, self.problems, self.lines)

    def build(self, node: yaml.Node, place: str) -> Node:
        self.count += 1
        line = node.start_mark.line + 1
        if self.count > MAX_VALUES:
            raise _TooMuchError(_TOO_MANY)
        if id(node) in self.open:
            raise _TooMuchError(f"line {line}: {place} holds itself")
        self.lines.setdefault(place, line)
        self.open.append(id(node))
        value: Scalar | tuple[Node, ...] | dict[str, Node] | None
        if isinstance(node, yaml.MappingNode):
            value = self.entries(node, place)
        elif isinstance(node, yaml.SequenceNode):
            value = tuple(self.build(child, f"{place}[{i}]") for i, child in enumerate(node.value))
        else:
            value = self.scalar(node, place)
        self.open.pop()
        return Node(value, place, line, node.value if isinstance(node, yaml.ScalarNode) else "", self.problems)

    def entries(self, node: yaml.MappingNode, place: str) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, child in node.value:
            if key.tag == f"{_TAG}merge":
                for entry in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                    inherited = self.build(entry, place).mapping("a mapping to merge")
                    merged = {**inherited, **merged}
                continue
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (
                f"{_TAG}str",
                f"{_TAG}timestamp",
                f"{_TAG}value",
            ):
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                self.problems.errors.append((line, f"{_inside(place, shown)}: a key must be text; put it in quotes"))
                continue
            where = _inside(place, key.value)
            if key.value in own:
                first = own[key.value].line
                self.problems.errors.append((line, f"{where}: given twice; the first is in line {first}"))
                continue
            self.lines[where] = line
            built = self.build(child, where)
            own[key.value] = Node(built.value, where, line, built.text, self.problems)
        return {**merged, **own}

    def scalar(self, node: yaml.Node, place: str) -> Scalar | None:
        kind = node.tag.removeprefix(_TAG)
        if kind in ("str", "timestamp", "value"):
            plain = node.style is None and _EXPONENT.fullmatch(node.value)
            return float(node.value) if plain else str(node.value)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return bool(self.constructor.construct_yaml_bool(node))
            if kind == "int":
                return int(self.constructor.construct_yaml_int(node))
            if kind == "float":
                return float(self.constructor.construct_yaml_float(node))
        except (ValueError, KeyError, IndexError, OverflowError):
            message = f"{short(node.value)} is no {'truth value' if kind == 'bool' else 'number'}"
        else:
            message = f"the tag {short(kind)} is not understood"
        self.problems.errors.append((node.start_mark.line + 1, f"{place}: {message}" if place else message))
        return str(node.value)


def _inside(place: str, key: str) -> str:
    word = key if key.isprintable() and len(key) <= 80 else short(key)
    return f"{place}.{word}" if place else word


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RefError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise RefError(f"{path} is a folder, and a recipe is a file") from error
    except (OSError, ValueError) as error:
        raise RefError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_BYTES:
        raise ParameterError(f"{path}: larger than {MAX_BYTES} bytes; a recipe is not")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path}: byte {error.start} is not UTF-8; a recipe is text") from error
