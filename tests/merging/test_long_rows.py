"""A tensor of many axes is merged line by line: to the bits of the same numbers as a matrix, in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merganser.checkpoints import open_source
from merganser.merging.conflicts import measure
from merganser.merging.recipe import Recipe
from merganser.merging.run import job_bytes, plan_recipes, run
from merging_helpers import merged, recipe
from support import load

NAME = "model.layers.0.mlp.experts.down_proj"
SHAPE = (3, 4, 150, 120)  # a row of axis 0 is longer than a cell of the grid


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """A base and two models, and the same with the tensor as a matrix."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("models")
    base, found = torch.randn(SHAPE, generator=generator), ([], [])
    for i in range(3):
        x = (base + 0.1 * i * torch.randn(SHAPE, generator=generator)).bfloat16()
        for kind, shape in enumerate((SHAPE, (-1, SHAPE[-1]))):
            place = folder / f"{kind}/{i}"
            place.mkdir(parents=True)
            save_file({NAME: x.reshape(shape), "norm.weight": torch.full((4,), float(i))}, place / "model.safetensors")
            found[kind].append(place)
    return found


def named(folders: list[Path], method: str, **options: Any) -> Recipe:
    base, *others = folders
    needs = None if method in ("linear", "multislerp") else base
    written = {str(folder): folder.name for folder in folders}  # by which noise is drawn
    return recipe(method, others[:1] if method == "slerp" else others, needs, written=written, **options)


CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"settings": {"density": 0.3}},
    "breadcrumbs": {"settings": {"density": 0.8, "gamma": 0.05}},
    "dare_ties": {"settings": {"density": 0.4, "rescale": "l1"}, "seed": 5},
    "della": {"settings": {"density": 0.4, "epsilon": 0.2, "rescale": "l1", "row": "last"}, "seed": 5},
    "sce": {"settings": {"select_topk": 0.4}},
    "slerp": {"settings": {"t": 0.3}},
    "multislerp": {},
    "model_stock": {},
}


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("chunk_elements", [1, 1 << 17])
def test_bits_are_those_of_the_same_numbers_as_a_matrix(
    method: str, chunk_elements: int, models: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    found, expected = (
        merged(tmp_path / f"{kind}", named(folders, method, **CASES[method]), chunk_elements=chunk_elements, threads=2)
        for kind, folders in enumerate(models)
    )
    assert found[NAME].shape == SHAPE
    assert torch.equal(found[NAME].reshape(-1, SHAPE[-1]), expected[NAME])
    assert torch.equal(found["norm.weight"], expected["norm.weight"])


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_some_rows_are_those_of_the_whole_and_a_stage_may_read_them(
    method: str, models: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    merge = plan_recipes([named(models[0], method, **CASES[method], name="first")])
    whole = merge.read(NAME)
    assert whole.shape == SHAPE
    for rows in ((0, 1), (1, 3), (2, 3), (0, 2)):
        assert torch.equal(merge.read(NAME, rows), whole[rows[0] : rows[1]])
    twice = recipe("linear", [Path("first"), models[0][1]], each={"1": {"weight": 0.0}})
    found = merged(tmp_path / "out", named(models[0], method, **CASES[method], name="first"), twice)
    assert torch.equal(found[NAME], whole)


def test_a_tensor_that_is_kept_and_one_of_whole_numbers_go_by_lines_too(tmp_path: Path) -> None:
    x = torch.arange(3 * 70_000).reshape(3, 700, 100)
    for i in range(2):
        place = tmp_path / f"{i}"
        place.mkdir()
        save_file({"kept": x + 0.5 + i, "exact": x, "w": torch.ones(2, 2)}, place / "model.safetensors")
    merge = plan_recipes([recipe("linear", [tmp_path / "0", tmp_path / "1"], keep=("kept",))], chunk_elements=1)
    assert merge.in_lines == {"kept", "exact"}
    found = load(run(merge, tmp_path / "out"))
    assert torch.equal(found["kept"], x + 0.5)
    assert torch.equal(found["exact"], x)


def test_digests_are_those_of_the_stored_bytes(models: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    run(plan_recipes([named(models[0], "ties", settings={"density": 0.3})], chunk_elements=1), tmp_path / "out")
    receipt = json.loads((tmp_path / "out/merganser.json").read_text())
    for ref, source in receipt["inputs"].items():
        stored = (load(Path(ref))[NAME]).view(torch.int16).numpy().tobytes()
        assert source["tensors"][NAME] == hashlib.sha256(stored).hexdigest()
    written = load(tmp_path / "out")[NAME].view(torch.int16).numpy().tobytes()
    assert receipt["outputs"][NAME] == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize("method", ["ties", "dare_ties", "sce", "model_stock"])
def test_memory_does_not_grow_with_the_length_of_a_row(
    method: str, tmp_path: Path, zeros: Callable[[Path, tuple[int, ...]], Path]
) -> None:
    predicted = []
    for width in (1 << 18, 1 << 19):  # smaller ones are kept between passes
        folders = [zeros(tmp_path / f"{width}-{i}", (4, width, 256)) for i in range(3)]
        merge = plan_recipes([named(folders, method, **CASES[method])])
        predicted.append(job_bytes(merge, NAME))
    assert predicted[0] == predicted[1] < 40_000_000


@pytest.fixture
def zeros() -> Callable[[Path, tuple[int, ...]], Path]:
    """Makes a model whose one tensor is a hole in its file."""

    def make(folder: Path, shape: tuple[int, ...]) -> Path:
        folder.mkdir()
        count = 2 * torch.Size(shape).numel()
        header = json.dumps({NAME: {"dtype": "BF16", "shape": shape, "data_offsets": [0, count]}}).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + count)
        return folder

    return make


def test_lines_past_the_end_are_refused(models: tuple[list[Path], list[Path]]) -> None:
    source: Any = open_source(str(models[0][0]))
    assert torch.equal(source.read_lines(NAME, (7, 9)), load(models[0][0])[NAME].reshape(-1, SHAPE[-1])[7:9])
    with pytest.raises(IndexError, match="has 1800 rows"):
        source.read_lines(NAME, (1799, 1801))


def test_the_doctor_measures_lines_as_it_does_the_same_numbers_as_a_matrix(
    models: tuple[list[Path], list[Path]],
) -> None:
    found, expected = (measure(plan_recipes([named(folders, "ties", settings={"density": 0.3})])) for folders in models)
    assert len(found.pairs) == 1
    for one, other in zip(found.pairs.values(), expected.pairs.values(), strict=True):
        assert (one.equal, one.cosine, one.opposing) == (other.equal, other.cosine, other.opposing)
