"""`merganser meet`: copies give the network, every method one result, bad input is refused and nothing is written."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.align.many import mean_of, merge_many, star
from merganser.align.universe import universe
from merganser.symmetry import symmetries
from support import tree

Run = Callable[..., tuple[int, str, str]]

CODE = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)), torch.randn(2, 6)

def normed():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 6)

def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 6, generator=generator) for _ in range(4)]

def wide():
    return [torch.randn(8, 7)]
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("meet_nets", tmp_path / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kind in ("mlp", "normed"):
        for seed in range(3):
            torch.manual_seed(seed)
            network, _ = getattr(module, kind)()
            save_file(network.state_dict(), tmp_path / f"{kind}-{seed}.safetensors")
        first = load_file(tmp_path / f"{kind}-0.safetensors")
        order = torch.randperm(16)
        last = "2.weight" if kind == "mlp" else "3.weight"
        moved = {n: x[:, order] if n == last else x[order] if x.shape[:1] == (16,) else x for n, x in first.items()}
        save_file({n: x.contiguous() for n, x in moved.items()}, tmp_path / f"{kind}-copy.safetensors")
    return tmp_path


def words(shop: Path, *checkpoints: str, model: str = "mlp", more: tuple[str, ...] = ()) -> list[str]:
    named = [str(shop / f"{name}.safetensors") for name in checkpoints]
    return ["meet", *named, "--model", f"{shop / 'nets.py'}:{model}", "--out", str(shop / "out"), *more]


@pytest.mark.parametrize("kind", ["mlp", "normed"])
@pytest.mark.parametrize("method", ["c2m3", "merge-many", "star"])
def test_copies_meet_in_the_network_itself(shop: Path, run: Run, method: str, kind: str) -> None:
    names = (f"{kind}-0", f"{kind}-copy", f"{kind}-0")
    code, out, _ = run(*words(shop, *names, model=kind, more=("--method", method)))
    assert code == 0
    assert "3 networks, 1 group; statistics as they are" in out
    found, one = load_file(shop / "out" / "model.safetensors"), load_file(shop / f"{kind}-0.safetensors")
    units = torch.cdist(found["0.weight"], one["0.weight"]).argmin(0)  # the common order is anybody's
    last = "2.weight" if kind == "mlp" else "3.weight"
    torch.testing.assert_close(found["0.weight"][units], one["0.weight"])
    torch.testing.assert_close(found[last][:, units], one[last])


@pytest.mark.parametrize("method", ["c2m3", "merge-many", "star"])
def test_what_is_written_is_the_mean_that_python_gives(shop: Path, run: Run, method: str) -> None:
    assert run(*words(shop, "mlp-0", "mlp-1", "mlp-2", more=("--method", method, "--seed", "4")))[0] == 0
    states = [load_file(shop / f"mlp-{i}.safetensors") for i in range(3)]
    network = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 3))
    spec = symmetries(network, (torch.randn(2, 6),)).spec
    orders = {
        "c2m3": lambda: universe(spec, states, seed=4).orders,
        "merge-many": lambda: merge_many(spec, states, seed=4),
        "star": lambda: star(spec, states, seed=4),
    }[method]()
    expected = mean_of(spec, states, orders)
    found = load_file(shop / "out" / "model.safetensors")
    assert all(torch.equal(found[n], x) for n, x in expected.items())
    receipt = json.loads((shop / "out" / "merganser.json").read_text())
    assert receipt["method"] == method
    assert receipt["seed"] == 4


@pytest.mark.parametrize(("kind", "said"), [("mlp", "2 layers repaired"), ("normed", "1 BatchNorm measured anew")])
def test_inputs_set_statistics_right(shop: Path, run: Run, kind: str, said: str) -> None:
    more = ("--batches", f"{shop / 'nets.py'}:batches")
    code, out, _ = run(*words(shop, f"{kind}-0", f"{kind}-1", model=kind, more=more))
    assert code == 0
    assert said in out
    plain = shop / "out" / "model.safetensors"
    renormed = load_file(plain)
    assert run(*words(shop, f"{kind}-0", f"{kind}-1", model=kind, more=("--overwrite",)))[0] == 0
    changed = {n for n, x in load_file(plain).items() if not torch.equal(x, renormed[n])}
    expected = {"mlp": {"0.weight", "0.bias", "2.weight", "2.bias"}}
    assert changed == expected.get(kind, {"1.running_mean", "1.running_var", "1.num_batches_tracked"})


@pytest.mark.parametrize(
    ("names", "model", "more", "says"),
    [
        (("mlp-0",), "mlp", (), "two or more"),
        (("mlp-0", "nowhere"), "mlp", (), "nowhere"),
        (("mlp-0", "normed-0"), "mlp", (), "2.weight"),
        (("mlp-0", "mlp-1"), "nothing", (), "has no nothing"),
        (("mlp-0", "mlp-1"), "mlp", ("--batches", "nets.py:none_such"), "nets.py does not exist"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    shop: Path, run: Run, names: tuple[str, ...], model: str, more: tuple[str, ...], says: str
) -> None:
    before = tree(shop)
    code, _, err = run(*words(shop, *names, model=model, more=more))
    assert code == 2
    assert says in err
    assert {p: d for p, d in tree(shop).items() if "__pycache__" not in str(p)} == before


def test_a_folder_that_is_there_is_kept(shop: Path, run: Run) -> None:
    (shop / "out").mkdir()
    code, _, err = run(*words(shop, "mlp-0", "mlp-1"))
    assert code == 2
    assert "exists" in err
    assert not list((shop / "out").iterdir())


def test_a_count_of_batches_may_be_missing(shop: Path, run: Run) -> None:
    for seed in range(2):
        tensors = load_file(shop / f"normed-{seed}.safetensors")
        save_file({n: x for n, x in tensors.items() if "num_batches" not in n}, shop / f"older-{seed}.safetensors")
    assert run(*words(shop, "normed-0", "normed-1", model="normed"))[0] == 0
    expected = load_file(shop / "out" / "model.safetensors")
    assert run(*words(shop, "older-0", "older-1", model="normed", more=("--overwrite",)))[0] == 0
    found = load_file(shop / "out" / "model.safetensors")
    assert all(torch.equal(x, found[n]) for n, x in expected.items())
