"""`merganser pleas`: what it writes is of the size that it says and gives what both give; or nothing is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from merganser.align.blocks import skipping_zeros
from merganser.checkpoints import open_source
from merganser.cli.subject import loaded, subject
from merganser.errors import ParameterError, RefError
from pleas_networks import Run, State, drawn, write_networks
from support import tree


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_networks()
    return tmp_path


def given(tensors: State, x: Tensor, *, head: str = "4") -> Tensor:
    """What a perceptron of two hidden layers gives, in float64."""
    t = {name: y.double() for name, y in tensors.items()}
    y = x.double()
    for layer in ("0", "2"):
        y = (y @ t[f"{layer}.weight"].T + t[f"{layer}.bias"]).relu()
    return y @ t[f"{head}.weight"].T + t[f"{head}.bias"]


def words(one: str, two: str, *more: str, model: str = "deep", batches: str = "batches", out: str = "out") -> list[str]:
    named = ["--model", f"nets.py:{model}", "--batches", f"nets.py:{batches}"]
    return ["pleas", f"{one}.safetensors", f"{two}.safetensors", out, *named, *more]


def built(folder: str = "out", x: Tensor | None = None) -> nn.Module:
    """The network of a folder, as other commands load it."""
    batch = ((torch.zeros(2, 6) if x is None else x,), {})
    return loaded(subject(folder, None, batch).network, open_source(folder))


def inputs() -> Tensor:
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(9))


def test_copies_in_another_order_become_the_network_again(shop: Path, run: Run) -> None:
    code, text, error = run(*words("a", "c", "--budget", "1"))
    assert (code, error) == (0, "")
    assert "2 of 2 groups can be split; 96 examples" in text
    with torch.no_grad():
        assert torch.allclose(built()(inputs()).double(), given(load_file("a.safetensors"), inputs()), atol=1e-4)
    assert json.loads(Path("out/merganser.json").read_text())["pleas"] == ["a.safetensors", "c.safetensors"]


@pytest.mark.parametrize("dense", [False, True])
def test_at_twice_the_size_the_mean_of_both_is_given(shop: Path, run: Run, dense: bool) -> None:
    code, _, error = run(*words("a", "b", "--budget", "2", "--quiet", *(["--dense"] if dense else [])))
    assert (code, error) == (0, "")
    with torch.no_grad():
        y = built()(inputs()).double()
    tensors = load_file("out/model.safetensors")
    mean = sum(given(load_file(f"{n}.safetensors"), inputs()) for n in "ab") / 2
    assert torch.allclose(y, mean, atol=1e-3) is not dense  # whole layers would be four times as large
    assert ("2.first_weight" in tensors) is not dense
    if not dense:
        assert sum(x.numel() for n, x in tensors.items() if n.startswith("2")) == 2 * (8 * 8 + 8)


@pytest.mark.parametrize(
    "more", [(), ("--dense",), ("--measure", "parameters"), ("--way", "layers", "--target", "mixed")]
)
def test_the_network_is_within_its_budget_and_of_the_size_that_the_receipt_tells(
    shop: Path, run: Run, more: tuple[str, ...]
) -> None:
    assert run(*words("a", "b", "--budget", "1.5", "--quiet", *more))[0] == 0
    network = skipping_zeros(built())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 6))
    parameters = sum(p.numel() for p in network.parameters())
    costs = json.loads(Path("out/merganser.json").read_text())["costs"]
    assert (counter.get_total_flops(), parameters) == (costs["flops"], costs["parameters"])
    one = 2 * (6 * 8 + 8 * 8 + 8 * 3), 6 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3
    assert (costs["parent_flops"], costs["parent_parameters"]) == one
    share = parameters / one[1] if "parameters" in more else counter.get_total_flops() / one[0]
    assert 1.3 < share <= 1.5


def test_a_preview_tells_reasons_and_the_size_of_what_is_written_and_writes_nothing(shop: Path, run: Run) -> None:
    sizes = {"0": (8, 6), "1": (8,), "3": (8, 8), "5": (3, 8)}
    for seed, name in enumerate("ef"):
        shapes = {f"{n}.{x}": s if x == "weight" else s[:1] for n, s in sizes.items() for x in ("weight", "bias")}
        save_file(drawn(seed, shapes), f"{name}.safetensors")
    run(*words("e", "f", "--preview", model="normed"))  # compiles the file of networks
    before = tree(shop)
    code, text, error = run(*words("e", "f", "--preview", "--budgets", "1,1.4", model="normed"))
    assert (code, error) == (0, "")
    assert tree(shop) == before
    lines = text.splitlines()
    assert "8      no: the output changed" in lines[1]
    assert lines[1].rstrip().endswith("1 normalises its units together")
    assert lines[2].split() == ["3", "8", "yes"]
    flops, parameters = 2 * (48 + 64 + 24), 48 + 8 + 16 + 64 + 8 + 24 + 3
    assert lines[4].split()[:5] == ["1", str(flops), str(parameters), str(4 * parameters), "B"]
    k = int(0.4 * flops / (2 * (8 + 3)))  # each pair apart takes one unit more, read by three
    assert lines[5].split()[1] == str(flops + k * 2 * (8 + 3))
    assert lines[5].rstrip().endswith(f"8 -> {8 + k}")
    assert run(*words("e", "f", "--budget", "1.4", "--quiet", model="normed"))[0] == 0
    stored = sum(x.numel() * x.element_size() for x in load_file("out/model.safetensors").values())
    assert lines[5].split()[3] == str(stored)


def test_outputs_of_both_stay_apart_in_a_head(shop: Path, run: Run) -> None:
    more = ("--other-model", "nets.py:five", "--apart", "4")
    code, _, error = run(*words("a", "d", *more, "--budget", "1.1"))
    assert code == 2
    least = (48 + 64 + 8 * 8) / (48 + 64 + 8 * 3)
    assert f"costs {least:.4f} of one" in error
    assert not Path("out").exists()
    assert run(*words("a", "d", *more, "--budget", "1.3", "--quiet"))[0] == 0
    with torch.no_grad():
        y = built()(inputs()).double()
    apart = [given(load_file(f"{n}.safetensors"), inputs()) for n in "ad"]
    assert torch.allclose(y, torch.cat(apart, 1), atol=1e-4)


def test_a_curve_is_a_table_or_a_plot_and_right_answers_are_counted(shop: Path, run: Run) -> None:
    more = ("--curve", "curve.md", "--budgets", "1,1.5,2", "--labelled", "nets.py:labelled")
    code, text, error = run(*words("a", "b", *more, "--budget", "1.2"))
    assert (code, error) == (0, "")
    rows = [line.strip("| \n").split(" | ") for line in Path("curve.md").read_text().splitlines()]
    assert rows[0] == ["budget", "FLOPs", "parameters", "bytes", "pairs apart", "output error", "right"]
    values = [[float(x) for x in (row[0], row[1], row[4], row[5])] for row in rows[2:]]
    assert [v[0] for v in values] == [1, 1.5, 2]
    assert all(flops <= budget for budget, flops, *_ in values)
    assert [v[2] for v in values][::2] == [0, 16]
    assert values[0][3] > values[1][3] > values[2][3] == 0
    mean = sum(given(load_file(f"{n}.safetensors"), x := _batches()) for n in "ab")
    right = float((mean.argmax(1) == (x[:, 0] > 0)).float().mean())
    assert rows[-1][-1] == f"{100 * right:.1f} %"
    assert sum(line.startswith(("1", "2 ")) for line in text.splitlines()[1:6]) == 4
    assert run(*words("a", "b", "--curve", "curve.png", "--budgets", "1,2", "--overwrite", "--quiet"))[0] == 0
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")


def _batches() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.randn(32, 6, generator=generator) for _ in range(3)])


def test_a_program_gives_what_the_folder_gives_for_any_number_of_examples(shop: Path, run: Run) -> None:
    assert run(*words("a", "b", "--export", "out.pt2", "--quiet"))[0] == 0
    program: Any = torch.export.load("out.pt2").module()
    with torch.no_grad():
        assert torch.allclose(program(inputs()), built()(inputs()), atol=1e-6)


def test_too_few_examples_are_refused_with_how_many_a_layer_has_and_needs(shop: Path, run: Run) -> None:
    code, _, error = run(*words("a", "b", batches="few"))
    assert code == 2
    assert "has too few rows of inputs for a stable solve, 5, and needs 9; so have 2 others" in error
    assert "give 9 examples or more (these are 5), or --way none" in error
    assert not Path("out").exists()
    assert run(*words("a", "b", "--few", "--quiet", batches="few")) == (0, "", "")
    assert run(*words("a", "b", "--way", "none", "--quiet", out="none", batches="few")) == (0, "", "")


def test_a_share_of_b_is_that_of_its_outputs(shop: Path, run: Run) -> None:
    code, text, error = run(*words("a", "b", "--budget", "2", "--share", "0.25"))
    assert (code, error) == (0, "")
    assert "16           0.0000" in text
    with torch.no_grad():
        y = built()(inputs()).double()
    mean = 0.75 * given(load_file("a.safetensors"), inputs()) + 0.25 * given(load_file("b.safetensors"), inputs())
    assert torch.allclose(y, mean, atol=1e-3)
    assert json.loads(Path("out/merganser.json").read_text())["share"] == 0.25


def test_types_stay_those_of_the_files(shop: Path, run: Run) -> None:
    assert run(*words("half-a", "half-b", "--quiet"))[0] == 0
    assert {x.dtype for x in load_file("out/model.safetensors").values()} == {torch.float16}


def test_units_that_no_measured_layer_takes_in_are_said_to_be_kept_together(shop: Path, run: Run) -> None:
    for seed, name in enumerate("gh"):
        save_file(drawn(seed, {"a": (6, 8), "b": (8, 8), "c": (8, 3)}), f"{name}.safetensors")
    code, text, error = run(*words("g", "h", "--budget", "1.5", model="functional"))
    assert (code, error) == (0, "")
    said = " ".join(text.split())
    assert "nothing is gained by keeping units of a, b apart, so none are" in said
    assert "widths" not in said
    assert "nothing is gained" not in run(*words("a", "b", "--budget", "1.5", "--overwrite"))[1]
    assert "nothing is gained" not in run(*words("g", "h", "--budget", "1", "--overwrite", model="functional"))[1]


def test_a_probe_fits_the_last_layer_to_labels_and_nothing_else(shop: Path, run: Run) -> None:
    asked = ("--budget", "1.5", "--curve", "curve.md", "--budgets", "1,1.5", "--labelled", "nets.py:labelled")
    assert run(*words("a", "b", *asked, "--quiet"))[0] == 0
    without = [line.split(" | ")[-1] for line in Path("curve.md").read_text().splitlines()[2:]]
    code, text, error = run(*words("a", "b", *asked, "--overwrite", "--probe", "nets.py:labelled"))
    assert (code, error) == (0, "")
    assert "the last layer was fitted to 96 labelled examples of nets.py:labelled" in text
    rights = [line.split(" | ")[-1] for line in Path("curve.md").read_text().splitlines()[2:]]
    assert all(float(y.split()[0]) > float(x.split()[0]) + 20 for x, y in zip(without, rights, strict=True))
    with torch.no_grad():
        right = float((built()(_batches()).argmax(1) == (_batches()[:, 0] > 0)).float().mean())
    assert rights[-1].startswith(f"{100 * right:.1f} %")
    told = json.loads(Path("out/merganser.json").read_text())
    assert told["probe"] == {"labelled": "nets.py:labelled", "examples": 96}
    assert run(*words("a", "b", "--budget", "1.5", "--quiet", out="plain"))[0] == 0
    one, other = (load_file(f"{folder}/model.safetensors") for folder in ("out", "plain"))
    assert {n.rpartition(".")[0] for n in one if not torch.equal(one[n], other[n])} == {"4"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--probe", "nets.py:batches"), "pairs of inputs and classes"),
        (("--probe", "nets.py:nobody"), "nobody"),
        (("--probe", "nets.py:labelled_wrongly"), "classes are 0 to 7, and 4 has 3 outputs"),
        (("--budget", "0.9"), "a budget of 0.9 is not in [1, 2]"),
        (("--budget", "2.1"), "a budget of 2.1 is not in [1, 2]"),
        (("--budget", "nan"), "a budget of nan is not in [1, 2]"),
        (("--preview", "--budgets", "1,3"), "a budget of 3 is not in [1, 2]"),
        (("--ridge", "-1"), "ridge is -1.0"),
        (("--target", "separate"), "--way layers"),
        (("--share", "1"), "share is 1.0"),
        (("--apart", "7"), "there is no head 7"),
        (("--data", "."), "inputs come from one place, and --batches and --data are given"),
        (("--noise", "50"), "inputs come from one place, and --batches and --noise are given"),
        (("--export", "out/x.pt2"), "lies in out"),
        (("--export", "x.pt"), "FILE.pt2"),
        (("--export", "nowhere/x.pt2"), "nowhere is no folder"),
        (("--curve", "curve.txt"), "FILE.png or FILE.md"),
        (("--curve", "nets.py"), "nets.py exists"),
        (("--batches", "nets.py:uneven"), "batch 3 is of shape (20, 6), and the first of (32, 6)"),
        (("--batches", "nets.py:nans"), "batch 1 holds NaN or infinity"),
        (("--labelled", "nets.py:batches"), "pairs of inputs and classes"),
        (("--model", "nets.py:other"), "0.weight of a.safetensors is (8, 6)"),
        (("--other-model", "nets.py:five"), "4.weight of b.safetensors is (3, 8)"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    shop: Path, run: Run, change: tuple[str, ...], message: str
) -> None:
    run("symmetry", "show", "nets.py:pictures")  # compiles the file of networks
    before = tree(shop)
    code, _, error = run(*words("a", "b"), *change)
    assert code == 2
    assert message in error
    assert tree(shop) == before


@pytest.mark.parametrize(
    ("two", "more", "message", "hint"),
    [
        ("d", (), "4.weight of d.safetensors is (5, 8)", "--other-model MODEL --apart 4"),
        ("d", ("--other-model", "nets.py:five"), "4.weight is (3, 8) in A and (5, 8) in B", "--apart 4"),
        ("other", ("--other-model", "nets.py:other"), "only A has 4.weight", "both must be of one architecture"),
    ],
)
def test_networks_that_do_not_fit_are_told_apart_from_other_labels(
    shop: Path, run: Run, two: str, more: tuple[str, ...], message: str, hint: str
) -> None:
    code, _, error = run(*words("a", two, *more))
    assert code == 2
    assert message in error
    assert hint in error
    assert not Path("out").exists()


def test_without_its_packages_onnx_is_refused_before_the_work(
    shop: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = run(*words("a", "b", "--onnx", "x.onnx"))
    assert code == 2
    assert "pip install onnx onnxscript" in error
    assert not Path("out").exists()


def test_a_program_that_cannot_be_made_leaves_no_folder(shop: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: Any, **_kwargs: Any) -> None:
        raise ParameterError("the network cannot be exported: it is a test")

    monkeypatch.setattr("merganser.align.partial_file.export_onnx", failing)
    monkeypatch.setattr("merganser.align.partial_file.check_onnx", lambda: None)
    code, _, error = run(*words("a", "b", "--export", "x.pt2", "--onnx", "x.onnx"))
    assert code == 2
    assert "it is a test" in error
    assert not Path("out").exists()
    assert not Path("x.pt2").exists()


def test_a_folder_that_is_there_is_kept_unless_told(shop: Path, run: Run) -> None:
    assert run(*words("a", "b", "--quiet"))[0] == 0
    before = Path("out/model.safetensors").read_bytes()
    code, _, error = run(*words("a", "b", "--budget", "1"))
    assert code == 2
    assert "out exists" in error
    assert Path("out/model.safetensors").read_bytes() == before
    assert run(*words("a", "b", "--budget", "1", "--overwrite", "--quiet"))[0] == 0
    assert Path("out/model.safetensors").read_bytes() != before
    Path("mine").mkdir()
    Path("mine/a-file").write_text("mine")
    code, _, error = run(*words("a", "b", "--overwrite", out="mine"))
    assert code == 2
    assert "it was not made here" in error


def test_the_folder_is_a_model_of_other_commands_wherever_its_code_stands_beside_it(
    shop: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*words("a", "b", "--budget", "1.5", "--quiet"))[0] == 0
    code, text, _ = run("symmetry", "show", "out", "--input", "2,6")
    assert code == 0
    assert "self-check passed" in text
    code, text, _ = run("barrier", "out", "out", "--model", "out", "--labelled", "nets.py:labelled")
    assert code == 0
    assert "96 examples" in text
    (shop / "elsewhere").mkdir()
    monkeypatch.chdir(shop / "elsewhere")
    with torch.no_grad():
        assert torch.isfinite(built("../out")(inputs())).all()
    shutil.move(shop / "out", shop / "elsewhere/out")
    with pytest.raises(RefError, match=r'was made of nets.py:deep: .*(?s:.)*correct "model"'):
        subject("out", None)


def test_a_folder_that_names_itself_is_refused(shop: Path, run: Run) -> None:
    assert run(*words("a", "b", "--quiet"))[0] == 0
    config = json.loads(Path("out/config.json").read_text())
    Path("out/config.json").write_text(json.dumps({**config, "model": "out"}))
    with pytest.raises(RefError, match="names itself"):
        subject("out", None)
