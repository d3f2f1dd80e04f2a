"""A program of torch.export as MODEL: what code gives, and bad files are refused with everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support import load, tree

Run = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export, about itself

CODE = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()

def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 6, generator=generator) for _ in range(3)]

def labelled():
    return [(x, torch.arange(len(x)) % 3) for x in batches()]

class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)
        self.phase = nn.Parameter(torch.ones(16, dtype=torch.complex64))

    def forward(self, x):
        return self.down((self.up(x) * self.phase).real)

def wave():
    return Wave(), (torch.randn(64, 6),)
"""


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = mlp().state_dict()
    return {n: x + 0.1 * torch.rand(x.shape) if x.is_floating_point() else x for n, x in state.items()}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program for any batch, with the inputs that it was exported with; and one for 64 examples, without any."""
    folder = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    inputs = (torch.randn(64, 6),)
    any_batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(mlp(), inputs, dynamic_shapes=any_batch), folder / "mlp.pt2")
    program = torch.export.export(mlp(), inputs)
    program._example_inputs = None
    torch.export.save(program, folder / "alone.pt2")
    return folder


@pytest.fixture
def shop(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights a, b and c, code, and programs; b is a in another order."""
    for name in ("mlp.pt2", "alone.pt2"):
        (tmp_path / name).write_bytes((programs / name).read_bytes())
    (tmp_path / "nets.py").write_text(CODE)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    a = weights(1)
    b = {n: x if x.ndim == 0 or n == "3.bias" else x[:, order] if n == "3.weight" else x[order] for n, x in a.items()}
    for name, state in {"a": a, "b": b, "c": weights(2)}.items():
        save_file({n: x.contiguous() for n, x in state.items()}, tmp_path / f"{name}.safetensors")
    save_file({f"net.{n}": x.contiguous() for n, x in a.items()}, tmp_path / "renamed.safetensors")
    (tmp_path / "text.pt2").write_text("no program")
    torch.save(a, tmp_path / "weights.pt2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_show_needs_no_shape(run: Run, shop: Path) -> None:
    """16 units of 6 x 16 + 16 + 2 x 16 + 16 x 3 parameters, and 3 that stay."""
    code, out, err = run("symmetry", "show", "mlp.pt2")
    assert (code, err) == (0, "")
    assert "1 group moves 98.5% of the parameters; self-check passed" in out.splitlines()
    assert out.splitlines()[1].split()[:2] == ["0", "16"]


def test_align_gives_a_permuted_copy_the_very_tensors(run: Run, shop: Path) -> None:
    assert run("align", "a.safetensors", "b.safetensors", "out", "--model", "mlp.pt2", "-q") == (0, "", "")
    assert all(torch.equal(load(shop / "out")[name], x) for name, x in weights(1).items())


COMMANDS = {
    "align": ("align", "a.safetensors", "c.safetensors", "{out}", "--batches", "nets.py:batches"),
    "zip": ("zip", "a.safetensors", "c.safetensors", "--batches", "nets.py:batches", "--out", "{out}"),
    "pleas": ("pleas", "a.safetensors", "c.safetensors", "{out}", "--batches", "nets.py:batches", "--budget", "1.5"),
    "measure": ("measure", "a.safetensors", "nets.py:batches", "{out}"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_program_gives_what_the_code_gives(run: Run, shop: Path, command: str) -> None:
    """Bit by bit, BatchNorm measured anew and layers refitted."""
    for model, out in (("mlp.pt2", "one"), ("nets.py:mlp", "two")):
        code, _, err = run(*(word.format(out=out) for word in COMMANDS[command]), "--model", model)
        assert (code, err) == (0, "")
    one, two = load(shop / "one"), load(shop / "two")
    assert set(one) == set(two)
    assert all(torch.equal(x, two[name]) for name, x in one.items())


def test_barrier_judges_what_the_code_gives(run: Run, shop: Path) -> None:
    words = ("barrier", "a.safetensors", "c.safetensors", "--labelled", "nets.py:labelled", "--reset", "-q")
    for model, out in (("mlp.pt2", "one.json"), ("nets.py:mlp", "two.json")):
        assert run(*words, "--model", model, "--json", out)[0] == 0
    assert (shop / "one.json").read_text() == (shop / "two.json").read_text()


def test_a_partly_merged_network_of_a_program_is_a_model(run: Run, shop: Path) -> None:
    words = (
        "pleas",
        "a.safetensors",
        "c.safetensors",
        "out",
        "--model",
        "mlp.pt2",
        "--batches",
        "nets.py:batches",
        "-q",
    )
    assert run(*words)[0] == 0
    code, out, _ = run("symmetry", "show", "out")
    assert (code, "self-check passed" in out) == (0, True)


def test_a_program_without_inputs_takes_a_shape(run: Run, shop: Path) -> None:
    code, out, _ = run("symmetry", "show", "alone.pt2", "--input", "64,6")
    assert (code, "self-check passed" in out) == (0, True)


ALIGN = ("align", "a.safetensors", "b.safetensors", "out", "--model")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no file": (("symmetry", "show", "no.pt2"), "RefError: no.pt2 does not exist"),
    "text": (("symmetry", "show", "text.pt2"), "RefError: text.pt2 is no program of torch.export: "),
    "weights": ((*ALIGN, "weights.pt2"), "RefError: weights.pt2 is no program of torch.export: "),
    "no inputs": ((*ALIGN, "alone.pt2"), "ParameterError: alone.pt2 brings no example inputs\nhint: --input 2,3,32,32"),
    "another shape": (
        ("symmetry", "show", "alone.pt2", "--input", "5,6"),
        "ParameterError: input is (5, 6), and the program was made for (64, 6)\nhint: export it with",
    ),
    "other batches": (
        ("pleas", "a.safetensors", "c.safetensors", "out", "--model", "alone.pt2", "--batches", "nets.py:batches"),
        "ParameterError: input is (192, 6), and the program was made for (64, 6)\nhint: export it with dynamic_shapes",
    ),
    "names that do not fit": (
        ("align", "renamed.safetensors", "b.safetensors", "out", "--model", "mlp.pt2"),
        "MissingTensorError: renamed.safetensors lacks 0.weight, which may move",
    ),
    "names that do not fit a run": (
        ("zip", "renamed.safetensors", "b.safetensors", "--out", "out", "--model", "mlp.pt2", "--batches",
         "nets.py:batches"),
        "MissingTensorError: renamed.safetensors lacks 0.weight of the network",
    ),
    "complex parameters": (
        ("align", "a.safetensors", "b.safetensors", "out", "--model", "nets.py:wave"),
        "DtypeError: phase is complex; what units such parameters have is not found\nhint: hold real and imaginary",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_exits_with_2_one_message_and_everything_as_it_was(run: Run, shop: Path, case: str) -> None:
    words, message = REFUSED[case]
    before = tree(shop)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1 + err.count("\nhint: ")
    assert {name: x for name, x in tree(shop).items() if "__pycache__" not in name} == before
