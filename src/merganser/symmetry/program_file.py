"""Read a program of torch.export (`.pt2`) without loading objects from it.

`torch.export.load` unpickles whatever a file calls a pickle: single weights, constants, example inputs, and objects of
custom classes; and it loads compiled libraries. Here all records are looked at first, by the reader that loads them.
What is not tensors and plain values is refused, and so are libraries, and names and sizes that are more than that:
PyTorch turns names into Python code, and evaluates sizes that are formulas.

What is left is a list of operations of PyTorch. They are looked up when the file is read, and executed when the network
runs. PyTorch gives no promise for programs of strangers; this narrows what one could do, and promises nothing either.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merganser.errors import MerganserError, RefError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: Functions of a formula for a size.
FORMULAS = """
    Symbol Integer Float Rational Add Mul Pow Abs Max Min And Or Not Equality Unequality StrictLessThan LessThan
    StrictGreaterThan GreaterThan Eq Ne Lt Le Gt Ge FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt
    FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator
    TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity
    """
_PLAIN = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Name, ast.Load, ast.keyword),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
#: Names of operations' results and inputs.
_NAME = re.compile(r"[*]{0,2}\w+([.]\w+)*")


def read_program(path: Path) -> ExportedProgram:
    """The program of a file.

    Args:
        path: what `torch.export.save` wrote.

    Raises:
        RefError: If there is no such file, it is none of this PyTorch, or it is damaged.
        CheckpointError: If it holds pickled objects, compiled code, or names that are no names.
        MerganserError: If this PyTorch is too old.
    """
    try:
        from torch.export.pt2_archive import PT2ArchiveReader
        from torch.export.pt2_archive._package import load_pt2
    except ImportError as error:
        raise MerganserError(f"{path} needs a newer PyTorch", "pip install 'torch>=2.8'") from error
    if not path.is_file():
        raise RefError(f"{path} does not exist")
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(PT2ArchiveReader(file), path)
            file.seek(0)
            return load_pt2(file).exported_programs["model"]
        except MerganserError:
            raise
        except Exception as error:  # the library raises errors of many kinds
            first = str(error).strip().partition("\n")[0]
            raise RefError(
                f"{path} is no program of torch.export: {type(error).__name__}: {first}",
                "torch.export.save(torch.export.export(network.eval(), inputs), FILE.pt2), with this PyTorch",
            ) from error


def _check(archive: Any, path: Path) -> None:
    """Refuse what would be more than tensors and operations; raises errors of any kind where something is missing."""
    from torch.export.pt2_archive import constants as at

    names = set(archive.get_file_names())
    if any(name.startswith((at.AOTINDUCTOR_DIR, at.EXECUTORCH_DIR)) for name in names):
        raise _refused(path, "compiled code")
    programs = sorted(name for name in names if name.startswith(at.MODELS_DIR))
    if programs != [at.MODELS_FILENAME_FORMAT.format("model")]:
        raise RefError(f"{path} holds {len(programs)} programs; one is needed", "torch.export.save writes one")
    pickles = (f"{at.WEIGHTS_DIR}model.pt", f"{at.CONSTANTS_DIR}model.pt", at.SAMPLE_INPUTS_FILENAME_FORMAT)
    for name in (pickle.format("model") for pickle in pickles):
        if name in names:
            _check_pickle(archive.read_bytes(name), path)
    for form, prefixes in (
        (at.WEIGHTS_CONFIG_FILENAME_FORMAT, (at.WEIGHT_FILENAME_PREFIX,)),
        (at.CONSTANTS_CONFIG_FILENAME_FORMAT, (at.TENSOR_CONSTANT_FILENAME_PREFIX,)),
    ):
        if form.format("model") not in names:
            continue
        for name, entry in json.loads(archive.read_string(form.format("model")))["config"].items():
            if entry["use_pickle"] is not False or not entry["path_name"].startswith(prefixes):
                raise _refused(path, f"{name}, which is no plain tensor")
    text = archive.read_string(programs[0])
    _check_words(json.loads(text), path)
    _import_outputs(text)


def _check_pickle(content: bytes, path: Path) -> None:
    """The library tries such a record as tensors and plain values first, and as anything else if that fails."""
    import torch

    if content:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:  # errors of many kinds
            raise _refused(path, f"pickled objects ({str(error).strip().partition(chr(10))[0]})") from error


def _refused(path: Path, what: str) -> MerganserError:
    from merganser.errors import CheckpointError

    return CheckpointError(
        f"{path} holds {what}; loading that could execute anything",
        "export a network of plain tensors, with inputs that are tensors, numbers, lists and dictionaries",
    )


def _check_words(content: Any, path: Path) -> None:
    for key, text in _words(content):
        if key == "expr_str" and not _is_formula(text):
            raise _refused(path, f"a size that is no formula: {text!r}")
        if key != "expr_str" and text and _NAME.fullmatch(text) is None:
            raise _refused(path, f"a name that is none: {text!r}")


def _words(content: Any) -> Iterator[tuple[str, str]]:
    """Sizes and names in the description of a program."""
    pending = [content]
    while pending:
        at = pending.pop()
        if isinstance(at, Mapping):
            pending += at.values()
            yield from ((key, at[key]) for key in ("expr_str", "name", "as_name") if isinstance(at.get(key), str))
        elif isinstance(at, list):
            pending += at


def _is_formula(text: str) -> bool:
    """Whether a text is made of numbers, symbols, signs and functions of sizes.

    >>> _is_formula("Mul(Integer(2), Symbol('s0', integer=True))"), _is_formula("2*Max(1, s0 // 4)")
    (True, True)
    >>> _is_formula("().__class__"), _is_formula("open(s0)"), _is_formula("Max('open(1)')")
    (False, False, False)
    """
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    return all(map(_is_plain, nodes))


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        plain = isinstance(node.value, str) and re.fullmatch(r"[\w.+-]+", node.value) is not None
        return plain or isinstance(node.value, int | float)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FORMULAS.split()
    return isinstance(node, _PLAIN)


def _import_outputs(text: str) -> None:
    """Results of networks of transformers have classes of their own, which must be known."""
    for name in dict.fromkeys(re.findall(r"\btransformers(?:\.\w+)*\.(?=[A-Z]\w*Output)", text)):
        try:
            importlib.import_module(name.removesuffix("."))
        except ImportError:
            return
