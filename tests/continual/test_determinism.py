"""The same experts in the same order give the same bits, however the work is done and the files are laid out."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merganser.continual.stream as stream
from merganser.continual import Fold
from merganser.continual.ledger import read_ledger
from merganser.methods import METHODS
from support import arrays, distance, load, load_sums, save, save_family, tree

EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("models"), 3)


def run(family: list[Path], folder: Path, method: str, threads: int | None = 1) -> dict[str, str]:
    """Digests of all files of the state and of the exported model."""
    fold = Fold.init(family[0], folder / "state", method, threads=threads)
    for expert in family[1:]:
        fold.add(expert, threads=threads)
    out = fold.export(folder / "out", threads=threads)
    return tree(fold.path) | {"merged": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()}


@EVERY_METHOD
@pytest.mark.parametrize("options", [{}, {"float64": True, "sums_dtype": "F32"}], ids=["default", "rounded"])
def test_one_pass_over_several_experts_gives_the_bits_of_as_many_passes(
    family: list[Path], tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    one_by_one = Fold.init(family[0], tmp_path / "one-by-one", method, **options)
    entries = [one_by_one.add(expert) for expert in family[1:]]
    together = Fold.init(family[0], tmp_path / "together", method, **options)
    assert list(together.add_all(family[1:], threads=2)) == entries
    sums = [load_sums(fold.path) for fold in (one_by_one, together)]
    assert {n: x.numpy().tobytes() for n, x in sums[0].items()} == {n: x.numpy().tobytes() for n, x in sums[1].items()}
    same = ("contributors", "merged_norm")
    assert [getattr(together.ledger, n) for n in same] == [getattr(one_by_one.ledger, n) for n in same]


def test_expert_without_a_tensor_counts_as_unchanged_there_in_one_pass_too(family: list[Path], tmp_path: Path) -> None:
    patterns, found = ["wide.weight", "norm.weight"], []
    first = save({n: x for n, x in load(family[1]).items() if n not in patterns}, tmp_path / "partial")
    for order in ([first, family[2]], [family[2], first]):
        fold = Fold.init(family[0], tmp_path / f"state-{len(found)}", "mean")
        fold.add_all(order, ignore=patterns)
        found.append(load_sums(fold.path))
        assert not any(found[-1][name].any() for name in ("s/wide.weight", "s/norm.weight"))
    assert all(distance(found[0][n].numpy(), found[1][n].numpy()) < 1e-15 for n in found[0])


@EVERY_METHOD
def test_number_of_threads_does_not_change_a_bit(family: list[Path], tmp_path: Path, method: str) -> None:
    one = run(family, tmp_path / "1", method, 1)
    assert run(family, tmp_path / "2", method, 2) == one
    assert run(family, tmp_path / "4", method, 4) == one


def test_threads_of_the_algebra_do_not_change_a_bit(family: list[Path], tmp_path: Path) -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            found.append(run(family, tmp_path / str(threads), "opcm"))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def rearranged(folder: Path, out: Path, shards: int) -> Path:
    """The same tensors in the reverse order, in one file or dealt out to several."""
    model = load(folder)
    out.mkdir(parents=True)
    names = sorted(model, reverse=True)
    if shards == 1:
        save_file({n: model[n] for n in names}, out / "model.safetensors")
        return out
    where = {n: f"part-{i % shards}.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: model[n] for n in names if where[n] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return out


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("method", ["gram", "opcm", "ties"])
def test_layout_of_the_files_does_not_change_a_bit(
    family: list[Path], tmp_path: Path, method: str, shards: int
) -> None:
    other = [rearranged(folder, tmp_path / "models" / folder.name, shards) for folder in family]
    one, two = run(family, tmp_path / "one", method), run(other, tmp_path / "two", method)
    ledgers = [read_ledger(tmp_path / n / "state") for n in ("one", "two")]
    assert [c.digest for c in ledgers[0].contributors] == [c.digest for c in ledgers[1].contributors]
    assert ledgers[0].base_digest == ledgers[1].base_digest
    assert one["merged"] == two["merged"]
    assert one["base.json"] == two["base.json"]
    sums = [name for name in one if name.endswith("sums.safetensors")]
    assert sums
    assert {n: one[n] for n in sums} == {n: two[n] for n in sums}


@pytest.mark.parametrize("method", ["gram", "opcm", "mean", "magmax", "ties", "tsv_m"])
def test_size_of_chunks_changes_norms_by_rounding_alone(
    family: list[Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(family, tmp_path / "whole", method)
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", 7)
    run(family, tmp_path / "chunked", method)
    one, two = (tmp_path / n / "state" for n in ("whole", "chunked"))
    # The sums themselves are the same bits, and so are digests.
    assert all(torch.equal(x, load_sums(two)[slot]) for slot, x in load_sums(one).items())
    assert (one / "base.json").read_bytes() == (two / "base.json").read_bytes()
    ledgers = read_ledger(one), read_ledger(two)
    assert [c.digest for c in ledgers[0].contributors] == [c.digest for c in ledgers[1].contributors]
    # Squares are added in float64 within a chunk and exactly between chunks.
    norms = [[c.norm for c in ledger.contributors] + [ledger.merged_norm] for ledger in ledgers]
    assert norms[0] == pytest.approx(norms[1], rel=1e-14)
    # The one factor that opcm takes from norms moves its export by no more than float32 rounding.
    merged = [arrays(load(tmp_path / n / "out")) for n in ("whole", "chunked")]
    for name, x in merged[0].items():
        assert distance(merged[1][name], x) <= 1e-7, name


def test_paths_of_one_model_and_their_order_on_the_command_line_do_not_matter_to_sums(
    family: list[Path], tmp_path: Path
) -> None:
    relative = [os.path.relpath(p) for p in family]
    one = run(family, tmp_path / "one", "gram")
    fold = Fold.init(relative[0], tmp_path / "two" / "state", "gram", threads=1)
    for expert in relative[1:]:
        fold.add(expert, threads=1)
    two = tree(fold.path)
    assert {n: d for n, d in one.items() if n != "merged"} == two


SCRIPT = """
import sys
from pathlib import Path
from test_determinism import METHODS, run
root = Path(sys.argv[1])
family = [Path(p) for p in sys.argv[2:]]
for method in METHODS:
    print(method, sorted(run(family, root / method, method).items()))
"""


def test_two_fresh_processes_give_the_same_bits(family: list[Path], tmp_path: Path) -> None:
    here = Path(__file__).parent
    outputs = []
    for seed in ("1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / seed), *map(str, family)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert [line.split()[0] for line in outputs[0].splitlines()] == list(METHODS)
