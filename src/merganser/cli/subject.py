"""A network and inputs to run it once, from what a person names."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from merganser.errors import MerganserError, MissingTensorError, NonFiniteError, ParameterError, RefError, ShapeError
from merganser.types import Source

if TYPE_CHECKING:
    from torch import nn

    from merganser.align.activations import Batch
    from merganser.symmetry.record import Output

#: Examples and places of a sequence: numbers that no size of a network is likely to be.
BATCH, LENGTH = 2, 7


@dataclass(frozen=True)
class Subject:
    """A network to trace.

    Attributes:
        network: with any weights.
        args: positional inputs.
        kwargs: named inputs.
        output: what of the result must stay.
    """

    network: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: Output | None = None


def subject(model: str, shape: tuple[int, ...] | None, batch: Batch | None = None) -> Subject:
    """What `MODEL` names: `package.module:name`, `path/file.py:name`, a folder with a `config.json`, or a `.pt2`.

    Args:
        model: a callable gives a network, or (network, args), or (network, args, kwargs).
        shape: of one input of random numbers, for a network without inputs of its own.
        batch: inputs to use instead of all that the model brings.

    Raises:
        RefError: If there is no such module, file, name or folder.
        ParameterError: If what is there is no network, or inputs are missing.
    """
    path, colon, name = model.rpartition(":")
    if colon and not Path(model).exists():
        return _made(model, _named(path, name), shape, batch)
    if model.endswith(".pt2"):
        return _program(Path(model), shape, batch)
    content = _config(Path(model))
    if content["model_type"] == "merganser-partial":
        return _partly_merged(Path(model), shape, batch)
    it = _from_config(Path(model), content, shape)
    return it if batch is None else replace(it, args=tuple(batch[0]), kwargs=batch[1])


def loaded(network: nn.Module, source: Source) -> nn.Module:
    """A copy of a network with the weights of a checkpoint, in evaluation mode.

    A tied tensor may be stored under any of its names, and every tensor under the one that transformers gives it in
    files. BatchNorm's count of batches may be missing: nothing depends on it, and older files have none.

    Raises:
        MissingTensorError: If the checkpoint lacks a tensor of the network.
        ShapeError: If one has another shape.
        NonFiniteError: If one holds NaN or infinity.
        CheckpointError: If the checkpoint holds one in another form.
    """
    from merganser.cli.stored import stored_names
    from merganser.numerics import all_finite

    other = copy.deepcopy(network)
    stored = {**{name: name for name in source.infos}, **source.aliases}
    stored |= {name: stored[held] for name, held in stored_names(network, source).items()}
    state = other.state_dict()
    twins: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    for name, x in state.items():
        twins.setdefault((x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape)), []).append(name)
    same = {name: names for names in twins.values() for name in names}
    tensors = {}
    for name, x in state.items():
        place = next((stored[n] for n in (name, *same[name]) if n in stored), None)
        if place is None and name.endswith("num_batches_tracked"):
            tensors[name] = x
            continue
        if place is None:
            raise MissingTensorError(
                f"{source.ref} lacks {name} of the network",
                f"it has {', '.join(sorted(source.infos)[:3])} ..; were they saved by another version of the library?",
            )
        tensors[name] = source.read(place)
        if tensors[name].shape != x.shape:
            shapes = f"{tuple(tensors[name].shape)}, and the network's {tuple(x.shape)}"
            raise ShapeError(f"{name} of {source.ref} is {shapes}")
        if not all_finite(tensors[name]):
            raise NonFiniteError(f"{name} of {source.ref} holds NaN or infinity")
    other.load_state_dict(tensors)
    return other.eval()


@contextmanager
def running(model: str) -> Iterator[None]:
    """What code of a network raises while it runs on batches becomes an error of ours.

    Raises:
        ParameterError: If it raises anything of its own.
    """
    try:
        yield
    except MerganserError:
        raise
    except Exception as error:  # whatever the code of a network does
        said = f"{type(error).__name__}: {error}{line_of(error)}"
        raise ParameterError(f"{model} cannot be run on these inputs: {said}") from error


def line_of(error: BaseException) -> str:
    """Where an error was raised: the innermost line that is not torch's; nothing where ours only called torch.

    >>> line_of(ValueError())
    ''
    """
    import torch

    library, ours = Path(torch.__file__).parent, Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(library) and frame.filename[0] != "<"]
    if not own or (Path(own[-1].filename).is_relative_to(ours) and own[-1] is not frames[-1]):
        return ""
    return f" (line {own[-1].lineno} of {own[-1].filename})"


def batches_of(name: str) -> list[Batch]:
    """What `path/file.py:name` gives, as positional and named inputs.

    Raises:
        RefError: If there is no such file or name.
        ParameterError: If what it gives is no batch of tensors, or there is none.
    """
    found = [as_batch(name, batch) for batch in given_by(name)]
    if not found:
        raise ParameterError(f"{name} gives no batch")
    return found


def given_by(name: str) -> list[Any]:
    """All that the code that `path/file.py:name` names gives.

    Raises:
        RefError: If there is no such file or name.
        ParameterError: If it cannot be called.
    """
    path, colon, what = name.rpartition(":")
    if not colon:
        raise RefError(f"{name} names no code", "path/file.py:name or package.module:name")
    given = _called(name, _named(path, what))
    try:
        return list(given)
    except Exception as error:  # whatever a generator does
        raise ParameterError(f"{name} cannot be run through: {type(error).__name__}: {error}") from error


def as_batch(name: str, batch: Any) -> Batch:
    """Positional and named inputs from a tensor, several, or a mapping.

    Raises:
        ParameterError: If it is none of these.
    """
    import torch

    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), batch
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Mapping):
        return tuple(batch[0]), batch[1]
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise ParameterError(f"{name} gives a {type(batch).__name__}; a batch is a tensor, or tensors by place or name")


def _called(name: str, given: Any) -> Any:
    """What code gives: itself, or what it returns without arguments."""
    if not callable(given):
        return given
    try:
        inspect.signature(given).bind()
    except (TypeError, ValueError) as error:
        raise ParameterError(f"{name} cannot be called without arguments: {error}") from error
    try:
        return given()
    except Exception as error:  # whatever the code does
        raise ParameterError(f"{name} cannot be run: {type(error).__name__}: {error}") from error


def _named(path: str, name: str) -> Any:
    if path.endswith(".py"):
        module = _from_file(Path(path))
    else:
        try:
            module = importlib.import_module(path)
        except Exception as error:  # whatever the module does
            raise RefError(f"{path} cannot be imported: {error}", "name a file as path/file.py:name") from error
    if not hasattr(module, name):
        from difflib import get_close_matches

        near = get_close_matches(name, dir(module), n=1)
        raise RefError(f"{path} has no {name}", f"did you mean {near[0]}?" if near else None)
    return getattr(module, name)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RefError(f"{path} does not exist")
    name = f"merganser_subject_{path.stem}"  # what the file is called may be the name of a library
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise RefError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _made(model: str, made: Any, shape: tuple[int, ...] | None, batch: Batch | None) -> Subject:
    import torch
    from torch import nn

    if not isinstance(made, nn.Module | tuple):
        if not callable(made) or (inspect.isclass(made) and not issubclass(made, nn.Module)):
            raise ParameterError(f"{model} is a {type(made).__name__}; it must be a network or give one")
        made = _called(model, made)
    network, args, kwargs = (*made, {})[:3] if isinstance(made, tuple) and len(made) > 1 else (made, None, {})
    if not isinstance(network, nn.Module):
        raise ParameterError(f"{model} gives a {type(network).__name__}; it must give a network")
    if batch is not None:
        args, kwargs = batch
    if args is None:
        if shape is None:
            raise ParameterError(
                f"{model} gives a network without inputs",
                "--input 2,3,32,32, or give (network, args) from the callable",
            )
        args = (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)
    return Subject(network, (args,) if isinstance(args, torch.Tensor) else tuple(args), dict(kwargs))


def _program(path: Path, shape: tuple[int, ...] | None, batch: Batch | None) -> Subject:
    """What `torch.export.save` wrote, on the inputs that it was exported with."""
    from merganser.symmetry.program import network_of
    from merganser.symmetry.program_file import read_program

    program = read_program(path)
    try:
        network = network_of(program)
    except ParameterError as error:
        raise ParameterError(f"{path}: {error.message}", error.hint) from error
    if batch is None and shape is None and program.example_inputs is None:
        raise ParameterError(f"{path} brings no example inputs", "--input 2,3,32,32, or export it with some")
    given = batch or program.example_inputs
    return replace(_made(str(path), network, shape, given), output=_logits)


def _logits(result: Any) -> Any:
    return result.logits if hasattr(result, "logits") else result


def _config(folder: Path) -> Mapping[str, Any]:
    """What the `config.json` of a folder says; it names a kind of network."""
    path = folder / "config.json"
    if not path.is_file():
        raise RefError(
            f"{folder} is no folder with a config.json",
            "or name code, package.module:name or path/file.py:name, or a program, FILE.pt2",
        )
    try:
        content: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        return {**content, "model_type": str(content["model_type"])}
    except (ValueError, KeyError, TypeError) as error:
        raise RefError(f"{path} does not tell which network this is: {error}") from error


def _from_config(folder: Path, content: Mapping[str, Any], shape: tuple[int, ...] | None) -> Subject:
    if content["model_type"].startswith("merganser-"):
        return _ours(folder, shape)
    return _transformer(folder, content)


def _partly_merged(folder: Path, shape: tuple[int, ...] | None, batch: Batch | None) -> Subject:
    """What `merganser pleas` wrote: the network that its `config.json` names, in the shapes that it tells."""
    from merganser.align.partial_file import read_partial

    partial = read_partial(folder)
    model = _beside(folder, partial.model)
    hint = f'run this where it is, put it beside {folder}, or correct "model" in {folder / "config.json"}'
    if Path(model).resolve() == folder.resolve():
        raise RefError(f"{folder / 'config.json'} names itself as what it was made of", hint)
    try:
        it = subject(model, shape, batch)
    except RefError as error:
        raise RefError(f"{folder} was made of {partial.model}: {error.message}", hint) from error
    return replace(it, network=partial.built(it.network))


def _beside(folder: Path, model: str) -> str:
    """A network by its name; where there is no such file here, and one beside a folder, that."""
    path, colon, name = model.rpartition(":")
    if not colon or Path(model).exists():
        path, colon, name = model, "", ""
    near = folder.resolve().parent / path
    return f"{near}{colon}{name}" if not Path(path).exists() and near.exists() else model


def _ours(folder: Path, shape: tuple[int, ...] | None) -> Subject:
    import numpy as np

    from merganser.study.networks import load_encoder

    encoder: Any = load_encoder(folder)
    side = shape[-1] if shape else encoder.image
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), dtype=np.uint8)
    return Subject(encoder, (encoder.prepare(pixels),))


def _transformer(folder: Path, content: Mapping[str, Any]) -> Subject:
    try:
        import transformers
    except ImportError as error:
        raise MerganserError(f"{folder} needs transformers", 'pip install "merganser[study]"') from error
    names = content.get("architectures") or []
    kind: Any = getattr(transformers, names[0], None) if names else None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        network = kind(config) if kind is not None else transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # the library raises errors of many kinds
        raise RefError(f"{folder / 'config.json'} gives no network: {error}") from error

    return Subject(network, (), _inputs(network, config), _logits)


def _inputs(network: Any, config: Any) -> dict[str, Any]:
    """Random inputs of a network of transformers, by the name of its main input."""
    import torch

    generator = torch.Generator().manual_seed(0)
    part = getattr(config, "vision_config", None) or getattr(config, "text_config", None) or config
    ids = torch.randint(0, getattr(part, "vocab_size", 2), (BATCH, LENGTH), generator=generator)
    main = network.main_input_name
    takes = inspect.signature(network.forward).parameters
    if main == "input_ids":
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given |= {"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}
    elif main == "pixel_values":
        size = getattr(part, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        given = {main: torch.randn(BATCH, getattr(part, "num_channels", 3), height, width, generator=generator)}
    else:
        raise ParameterError(
            f"{type(network).__name__} takes {main}, which is not made here",
            "name code that gives (network, args, kwargs): path/file.py:name",
        )
    return {name: x for name, x in given.items() if name in takes} | (
        {"use_cache": False} if "use_cache" in takes else {}
    )
