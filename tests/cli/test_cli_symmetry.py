"""`merganser symmetry show` and `merganser align` on code, folders and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merganser.study.networks import VisionTransformer
from merganser.symmetry import Spec
from support import load, save, tree

Run = Callable[..., tuple[int, str, str]]

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.up, self.down = nn.Linear(12, width), nn.Linear(width, 11)

    def forward(self, x):
        return self.down(self.act(self.up(x)))

    act = staticmethod(torch.relu)

class Unknown(Net):
    act = staticmethod(torch.special.bessel_j0)

class Sneaky(Net):
    def forward(self, x):
        return super().forward(x) * self.up(x)[0].tolist()[0]

class Spare(Net):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3, bias=False)

class Plain:
    pass

network, number = Net(), 3

def alone():
    return Net()

def with_inputs():
    return Net(), (torch.randn(5, 12),)

def named():
    return Net(), (), {"x": torch.randn(5, 12)}

def needs(width):
    return Net(width)

def gives_text():
    return "text"

def sneaky():
    return Sneaky(), (torch.randn(5, 12),)
"""


def weights(seed: int = 0, width: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up.weight": (width, 12), "up.bias": (width,), "down.weight": (11, width), "down.bias": (11,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


ORDER = torch.randperm(24, generator=torch.Generator().manual_seed(3))


def permuted(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network, its 24 hidden units in another order."""
    up, bias, down = x["up.weight"][ORDER], x["up.bias"][ORDER], x["down.weight"][:, ORDER].contiguous()
    return {"up.weight": up, "up.bias": bias, "down.weight": down, "down.bias": x["down.bias"]}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Code, a checkpoint, a permuted copy of it, and damaged or unfit things."""
    names = ("a", "b", "out", "taken", "empty", "damaged", "unnamed", "wide", "lacking")
    places = {name: tmp_path / name for name in names}
    places |= {"code": tmp_path / "some_networks.py", "half": tmp_path / "half.json"}
    places["code"].write_text(CODE)
    save(weights(), places["a"])
    save(permuted(weights()), places["b"])
    save(weights(width=20), places["wide"])
    save({name: x for name, x in weights().items() if name != "up.bias"}, places["lacking"])
    places["taken"].mkdir()
    (places["taken"] / "mine.txt").write_text("mine")
    places["empty"].mkdir()
    for name, text in (("damaged", "{"), ("unnamed", "{}")):
        places[name].mkdir()
        (places[name] / "config.json").write_text(text)
    places["half"].write_text('{"merganser_symmetry": 1, "groups"')
    return places


# show


@pytest.mark.parametrize("name", ["alone", "with_inputs", "named", "network", "Net"])
def test_show_prints_groups_and_what_share_they_move(run: Run, places: dict[str, Path], name: str) -> None:
    """24 units of 12 x 24 + 24 + 24 x 11 + 11 parameters."""
    shape = () if name in ("with_inputs", "named") else ("--input", "5,12")
    code, out, err = run("symmetry", "show", f"{places['code']}:{name}", *shape)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["group", "units", "moves"]
    assert rows[1] == ["up", "24", "up.weight[0],", "up.bias[0]", "and", "1", "more"]
    assert out.splitlines()[2] == "1 group moves 98.1% of the parameters; self-check passed"


def test_show_takes_a_name_of_a_package(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "inner.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run("symmetry", "show", "some_package.inner:with_inputs")
    assert code == 0
    assert "98.1% of the parameters" in out


def test_show_pinned_lists_every_axis_that_cannot_move_and_why(run: Run, places: dict[str, Path]) -> None:
    code, out, _ = run("symmetry", "show", f"{places['code']}:with_inputs", "--pinned")
    assert code == 0
    reasons = dict(line.split(": ", 1) for line in out.splitlines()[3:])
    assert list(reasons) == ["up.weight[1]", "down.weight[0]", "down.bias[0]"]
    assert reasons["up.weight[1]"] == "addmm in up, with the input of the network"
    assert reasons["down.bias[0]"].startswith("output of the network")


def test_show_names_operations_without_a_rule_and_what_was_not_used(run: Run, places: dict[str, Path]) -> None:
    _, out, _ = run("symmetry", "show", f"{places['code']}:Unknown", "--input", "5,12")
    assert "no rule for special_bessel_j0: what it met is fixed" in out.splitlines()
    _, out, _ = run("symmetry", "show", f"{places['code']}:Spare", "--input", "5,12")
    assert "not used in this run, and fixed: spare.weight" in out.splitlines()


def test_show_exits_with_1_where_the_self_check_refuses_a_group(run: Run, places: dict[str, Path]) -> None:
    code, out, err = run("symmetry", "show", f"{places['code']}:sneaky")
    assert (code, err) == (1, "")
    assert "refused by the self-check: up" in out.splitlines()
    code, out, _ = run("symmetry", "show", f"{places['code']}:sneaky", "--no-check")
    assert code == 0
    assert "1 group moves 98.1% of the parameters; not checked" in out.splitlines()


def test_show_json_is_the_spec(run: Run, places: dict[str, Path]) -> None:
    code, out, _ = run("symmetry", "show", f"{places['code']}:with_inputs", "--json", places["out"])
    assert (code, out.splitlines()[-1]) == (0, f"{places['out']}: written")
    spec = Spec.from_json(places["out"].read_text("utf-8"))
    assert {name: group.size for name, group in spec.groups.items()} == {"up": 24}
    assert spec.axes == {"up.weight": ("up", 12), "up.bias": ("up",), "down.weight": (11, "up"), "down.bias": (11,)}


def test_show_needs_no_weights_of_a_network_of_transformers(run: Run, tmp_path: Path) -> None:
    """BERT of two layers: a stream, and heads, units of queries and keys, of values, and an MLP in each."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    more = {"vocab_size": 97, "max_position_embeddings": 40, "architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **sizes, **more}))
    code, out, _ = run("symmetry", "show", tmp_path)
    assert code == 0
    assert "9 groups move 99.5% of the parameters; self-check passed" in out.splitlines()


# align


def test_align_gives_a_permuted_copy_the_very_tensors(run: Run, places: dict[str, Path]) -> None:
    model = f"{places['code']}:with_inputs"
    code, out, err = run("align", places["a"], places["b"], places["out"], "--model", model)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith("-> 0")
    assert out.splitlines()[-1] == f"{places['out']}: written"
    aligned, wanted = load(places["out"]), weights()
    assert list(aligned) == sorted(wanted)
    assert all(torch.equal(aligned[name], wanted[name]) for name in wanted)


def test_align_writes_what_it_did_into_the_receipt(run: Run, places: dict[str, Path]) -> None:
    run("align", places["a"], places["b"], places["out"], "--model", f"{places['code']}:with_inputs", "--seed", 4)
    receipt = json.loads((places["out"] / "merganser.json").read_text())
    assert receipt["orders"] == {"up": ORDER.argsort().tolist()}  # for every place, which unit of b is there
    expected = {"stays": str(places["a"]), "moves": str(places["b"]), "similarity": "frobenius", "seed": 4}
    assert {key: receipt[key] for key in expected} == expected
    a, b = weights(), permuted(weights())
    before = sum(float((a[n].double() - b[n].double()).square().sum()) for n in ("up.weight", "up.bias", "down.weight"))
    assert receipt["distance_before"] == pytest.approx(before**0.5, rel=1e-12)
    assert (receipt["distance_after"], receipt["settled"]) == (0.0, True)


@pytest.mark.parametrize("similarity", ["frobenius", "pearson"])
def test_symmetries_from_a_file_align_like_those_of_the_code(
    run: Run, places: dict[str, Path], tmp_path: Path, similarity: str
) -> None:
    model, words = f"{places['code']}:with_inputs", ("--similarity", similarity)
    run("symmetry", "show", model, "--json", tmp_path / "spec.json")
    noisy = {name: x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) for name, x in
             permuted(weights()).items()}  # fmt: skip
    save(noisy, tmp_path / "noisy")
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("align", places["a"], tmp_path / "noisy", one, "--model", model, *words)[0] == 0
    assert run("align", places["a"], tmp_path / "noisy", two, "--symmetry", tmp_path / "spec.json", *words)[0] == 0
    files = [folder / "model.safetensors" for folder in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.equal(load_file(files[0])["up.bias"], noisy["up.bias"][ORDER.argsort()])


def test_align_keeps_number_formats_and_tensors_that_the_network_lacks(run: Run, places: dict[str, Path]) -> None:
    halves = {name: x.bfloat16() for name, x in weights().items()}
    save(permuted(halves) | {"more": torch.arange(3)}, places["out"] / "moves")
    save(halves, places["out"] / "stays")
    model = f"{places['code']}:with_inputs"
    code, out, _ = run("align", places["out"] / "stays", places["out"] / "moves", places["out"] / "x", "--model", model)
    assert code == 0, out
    aligned = load(places["out"] / "x")
    assert torch.equal(aligned.pop("more"), torch.arange(3))
    assert all(aligned[name].dtype == torch.bfloat16 and torch.equal(aligned[name], x) for name, x in halves.items())


def test_align_reads_files_of_torch(run: Run, places: dict[str, Path], tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "a.pt")
    torch.save(permuted(weights()), tmp_path / "b.pt")
    model = f"{places['code']}:with_inputs"
    assert run("align", tmp_path / "a.pt", tmp_path / "b.pt", places["out"], "--model", model, "-q") == (0, "", "")
    assert all(torch.equal(load(places["out"])[name], x) for name, x in weights().items())


def test_align_takes_the_network_from_the_folder_that_stays(run: Run, tmp_path: Path) -> None:
    """A vision transformer of our own: a stream, and heads, units of both kinds, and an MLP in its one layer."""
    torch.manual_seed(0)
    encoder = VisionTransformer(image=8, patch=4, hidden=12, depth=1, heads=2, width=10)
    tensors = encoder.state_dict()
    save(tensors, tmp_path / "a", encoder.config())
    code, out, _ = run("symmetry", "show", tmp_path / "a", "--json", tmp_path / "spec.json")
    assert (code, "5 groups move" in out) == (0, True)
    spec = Spec.from_json((tmp_path / "spec.json").read_text("utf-8"))
    orders = spec.random(torch.Generator().manual_seed(1))
    save({n: spec.apply(orders, n, x).contiguous() for n, x in tensors.items()}, tmp_path / "b", encoder.config())
    assert run("align", tmp_path / "a", tmp_path / "b", tmp_path / "out")[0] == 0
    assert all(torch.equal(load(tmp_path / "out")[name], x) for name, x in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "merganser-vit"


# what cannot be used

CODE_AND_SHAPE = ("symmetry", "show", "{code}:alone", "--json", "{out}", "--input")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    # symmetry show
    "no such file": (("symmetry", "show", "{code}x.py:alone"), "RefError: {code}x.py does not exist"),
    "no such name": (
        ("symmetry", "show", "{code}:alon", "--json", "{out}"),
        "RefError: {code} has no alon\nhint: did you mean alone?",
    ),
    "no such module": (("symmetry", "show", "no.such:name"), "RefError: no.such cannot be imported: No module named"),
    "needs arguments": (
        ("symmetry", "show", "{code}:needs", "--input", "5,12"),
        "ParameterError: {code}:needs cannot be called without arguments: missing a required argument: 'width'",
    ),
    "gives no network": (
        ("symmetry", "show", "{code}:gives_text", "--input", "5,12"),
        "ParameterError: {code}:gives_text gives a str; it must give a network",
    ),
    "a number": (("symmetry", "show", "{code}:number"), "ParameterError: {code}:number is a int; it must be a network"),
    "another class": (("symmetry", "show", "{code}:Plain"), "ParameterError: {code}:Plain is a type; it must be a"),
    "no inputs": (
        CODE_AND_SHAPE[:-1],
        "ParameterError: {code}:alone gives a network without inputs\nhint: --input 2,3,32,32",
    ),
    "no numbers": ((*CODE_AND_SHAPE, "2,x"), "ParameterError: --input is '2,x'; it is a shape such as 2,3,32,32"),
    "another shape": (
        (*CODE_AND_SHAPE, "2,7"),
        "ParameterError: {code}:alone cannot be run on these inputs: mat1 and mat2 shapes cannot be multiplied",
    ),
    "no config": (("symmetry", "show", "{empty}"), "RefError: {empty} is no folder with a config.json\nhint: or name"),
    "no folder": (("symmetry", "show", "{out}"), "RefError: {out} is no folder with a config.json\nhint: or name code"),
    "damaged config": (
        ("symmetry", "show", "{damaged}"),
        "RefError: {damaged}/config.json does not tell which network this is: Expecting property name",
    ),
    "config of nothing": (
        ("symmetry", "show", "{unnamed}"),
        "RefError: {unnamed}/config.json does not tell which network this is: 'model_type'",
    ),
    # align
    "no inputs to align": (
        ("align", "{a}", "{b}", "{out}", "--model", "{code}:alone"),
        "ParameterError: {code}:alone gives a network without inputs\nhint: --input 2,3,32,32",
    ),
    "no network": (("align", "{a}", "{b}", "{out}"), "RefError: {a} is no folder with a config.json\nhint: or name"),
    "nothing to move": (("align", "{a}", "{b}x", "{out}", "--symmetry", "{spec}"), "RefError: {b}x does not exist"),
    "no symmetries": (
        ("align", "{a}", "{b}", "{out}", "--symmetry", "{out}.json"),
        "RefError: {out}.json does not exist\nhint: merganser symmetry show MODEL --json FILE",
    ),
    "damaged symmetries": (
        ("align", "{a}", "{b}", "{out}", "--symmetry", "{half}"),
        "ParameterError: this is no file of symmetries: JSONDecodeError(",
    ),
    "other sizes move": (
        ("align", "{a}", "{wide}", "{out}", "--symmetry", "{spec}"),
        "ShapeError: up.weight of {wide} is (20, 12), and the symmetries are those of one of (24, 12)",
    ),
    "other sizes stay": (
        ("align", "{wide}", "{b}", "{out}", "--symmetry", "{spec}"),
        "ShapeError: up.weight of {wide} is (20, 12), and the symmetries are those of one of (24, 12)",
    ),
    "a tensor is not there": (
        ("align", "{a}", "{lacking}", "{out}", "--symmetry", "{spec}"),
        "MissingTensorError: {lacking} lacks up.bias, which may move",
    ),
    "a tensor was not there": (
        ("align", "{lacking}", "{b}", "{out}", "--symmetry", "{spec}"),
        "MissingTensorError: {lacking} lacks up.bias, which may move",
    ),
    "target exists": (("align", "{a}", "{b}", "{taken}", "--symmetry", "{spec}"), "OutputError: {taken} exists"),
    "target is not ours": (
        ("align", "{a}", "{b}", "{taken}", "--symmetry", "{spec}", "--overwrite"),
        "OutputError: {taken} holds no merganser.json: it was not made here",
    ),
    "onto what stays": (
        ("align", "{a}", "{b}", "{a}", "--symmetry", "{spec}", "--overwrite"),
        "OutputError: {a} is, holds or lies within what is read",
    ),
    "into what moves": (
        ("align", "{a}", "{b}", "{b}/inner", "--symmetry", "{spec}"),
        "OutputError: {b}/inner is, holds or lies within what is read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_exits_with_2_one_message_and_everything_as_it_was(
    run: Run, places: dict[str, Path], tmp_path: Path, case: str
) -> None:
    places["spec"] = tmp_path / "spec.json"
    run("symmetry", "show", f"{places['code']}:with_inputs", "--json", places["spec"])
    words, message = REFUSED[case]
    before = tree(tmp_path)
    code, out, err = run(*(word.format(**places) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith(message.format(**places))
    assert err.count("\n") == 1 + err.count("\nhint: ")
    assert tree(tmp_path) == before


def test_overwrite_replaces_what_was_aligned_before(run: Run, places: dict[str, Path]) -> None:
    words = ("align", places["a"], places["b"], places["out"], "--model", f"{places['code']}:with_inputs")
    assert run(*words)[0] == 0
    first = tree(places["out"])
    assert run(*words)[0] == 2
    assert run(*words, "--overwrite")[0] == 0
    assert tree(places["out"]) == first
