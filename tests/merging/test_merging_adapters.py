"""Adapters merged with each other: peft loads the outcome, and it is the dense merge up to the cut that is reported."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapter_helpers import combined, loaded, merge, pair, randomise, train, written
from merganser.errors import AdapterError
from merganser.merging.adapter_out import config_of
from merganser.merging.lookup import merge_names, rules_of
from merganser.merging.native import read_recipes
from merganser.merging.run import plan_any, run

HERE = Path(__file__).parent


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 12, bias=False), nn.Linear(12, 6)
        self.o_proj = nn.Linear(6, 12)


class Net(nn.Module):
    """A small network with a layer of every kind that a LoRA sits on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(12, 9, 3, padding=1)
        self.head = nn.Linear(9, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = x + block.o_proj(torch.tanh(block.v_proj(block.q_proj(x))))
        return self.head(torch.tanh(self.conv(x.transpose(1, 2))).mean(2))


IDS = torch.arange(14).reshape(2, 7) % 17


@pytest.fixture
def net(tmp_path: Path) -> Net:
    """A base, saved in the folder `base`."""
    made = Net()
    randomise(made, 0)
    (tmp_path / "base").mkdir()
    save_file({n: x.clone() for n, x in made.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    return made


def applied(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    found = loaded(model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return found.merge_and_unload().state_dict()


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name].double(), x.double(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


#: Adapters with unequal ranks, scalings of every kind, and modules that not all of them change.
KINDS: dict[str, list[dict[str, Any]]] = {
    "unequal": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 5, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    ],
    "patterns": [
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.q_proj": 2},
            "alpha_pattern": {"v_proj": 12},
        },
        {"r": 3, "target_modules": ["q_proj"], "alpha_pattern": {"layers.1.q_proj": 1}, "use_rslora": True},
        {"r": 1, "target_modules": r"layers\.1\.(q|o)_proj"},
    ],
    "layers": [
        {"r": 2, "target_modules": ["embed", "conv", "head"]},
        {"r": 3, "target_modules": ["embed", "conv"], "lora_alpha": 5},
    ],
    "few": [
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("based", [False, True], ids=["alone", "based"])
def test_full_rank_output_is_the_dense_merge(kind: str, based: bool, net: Net, tmp_path: Path) -> None:
    models = [train(net, tmp_path / f"a{i}", i + 1, **settings) for i, settings in enumerate(KINDS[kind])]
    weights = [1.0, 0.5, -2.0][: len(models)]
    listed = ", ".join(f"{{model: a{i}, weight: {w}}}" for i, w in enumerate(weights))
    based_on = "base: base\n" if based else ""
    receipt = merge(tmp_path, f"method: task_arithmetic\n{based_on}models: [{listed}]\nadapter: {{rank: keep}}\n")
    close(applied(net, tmp_path / "out"), combined(net, models, weights), 2e-6)
    assert receipt["adapter"]["truncation_error"] == 0
    with torch.no_grad():
        expected = copy.deepcopy(net)
        expected.load_state_dict({n: x.float() for n, x in combined(net, models, weights).items()})
        torch.testing.assert_close(loaded(net, tmp_path / "out")(IDS), expected(IDS), rtol=1e-4, atol=1e-5)


def test_output_is_laid_out_as_peft_writes_it(net: Net, tmp_path: Path) -> None:
    for i, settings in enumerate(KINDS["unequal"]):
        train(net, tmp_path / f"a{i}", i, **settings, task_type="FEATURE_EXTRACTION")
    merge(tmp_path, "method: linear\nbase: base\nmodels: [a0, a1]\nadapter: {rank: 3}\nname: both\n")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"layers.0.v_proj": 2, "layers.1.v_proj": 2}
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "merganser.json",
    }
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert held["base_model.model.layers.0.o_proj.lora_A.weight"].shape == (3, 6)
    assert held["base_model.model.layers.0.v_proj.lora_B.weight"].shape == (6, 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "method: linear" in card


def test_truncation_error_is_that_of_the_dense_merge(net: Net, tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["q_proj", "o_proj"]}
    models = [train(net, tmp_path / f"a{i}", i + 1, **settings) for i in range(2)]
    receipt = merge(tmp_path, "method: task_arithmetic\nmodels: [a0, a1]\nadapter: {rank: 3}\n")
    expected, found = combined(net, models, [1.0, 1.0]), applied(net, tmp_path / "out")
    lost = whole = 0.0
    for name, figures in receipt["adapter"]["weights"].items():
        old = net.state_dict()[name].double()
        u, sigma, vh = torch.linalg.svd(expected[name] - old, full_matrices=False)
        cut = (u[:, :3] * sigma[:3]) @ vh[:3]
        torch.testing.assert_close(found[name].double() - old, cut, rtol=0, atol=2e-6)
        tail, energy = float(sigma[3:].square().sum()), float(sigma.square().sum())
        assert figures["truncation_error"] == pytest.approx((tail / energy) ** 0.5, rel=1e-5)
        assert figures["rank"] == 3
        assert figures["core"] == [min(8, old.shape[0]), min(8, old.shape[1])]
        lost, whole = lost + tail, whole + energy
    assert receipt["adapter"]["truncation_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert set(receipt["inputs"]) == {str(tmp_path / "a0"), str(tmp_path / "a1")}
    assert receipt["inputs"][str(tmp_path / "a0")]["tensors"]


def test_products_of_two_adapters_do_not_appear(tmp_path: Path) -> None:
    """The mean of the factors would hold B_0 A_1 as well."""
    one, zero = torch.eye(2)[:, :1], torch.zeros(2, 1)
    first = {"q.lora_A.weight": torch.tensor([[1.0, 0.0]]), "q.lora_B.weight": one}
    second = {"q.lora_A.weight": torch.tensor([[0.0, 1.0]]), "q.lora_B.weight": zero}
    for i, tensors in enumerate((first, second)):
        written(tmp_path / f"a{i}", tensors, r=1, lora_alpha=1, target_modules=["q"])
    merge(tmp_path, "method: linear\nmodels: [a0, a1]\nadapter: {rank: keep}\n")
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (held[f"base_model.model.q.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(b @ a, torch.tensor([[0.5, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("method", [name for name in merge_names() if not rules_of(name).measured])
def test_every_method_of_the_table_merges_adapters(method: str, tmp_path: Path) -> None:
    most = rules_of(method).models[1]
    count = 2 if most is None else most + rules_of(method).base_is_model
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        a, b = torch.randn(2, 9, generator=generator), torch.randn(8, 2, generator=generator)
        tensors = {"layers.0.q.lora_A.weight": a, "layers.0.q.lora_B.weight": b}
        written(tmp_path / f"a{i}", tensors, target_modules=["q"])
    required = "".join(f"settings: {{{n}: 0.3}}\n" for n in rules_of(method).required)
    models = ", ".join(f"a{i}" for i in range(count))
    receipt = merge(tmp_path, f"method: {method}\nmodels: [{models}]\n{required}adapter: {{rank: 2}}\n")
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(x).all()) and bool(x.any()) for x in held.values())
    assert 0 <= receipt["adapter"]["truncation_error"] < 1
    assert receipt["adapter"]["weights"]["layers.0.q.weight"]["rank"] == 2


def test_slerp_of_two_adapters_is_the_great_circle_of_their_changes(tmp_path: Path) -> None:
    changes = []
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        a, b = torch.randn(2, 9, generator=generator), torch.randn(8, 2, generator=generator)
        written(tmp_path / f"a{i}", {"q.lora_A.weight": a, "q.lora_B.weight": b}, lora_alpha=4, target_modules=["q"])
        changes.append(2.0 * b.double() @ a.double())
    merge(tmp_path, "method: slerp\nmodels: [a0, a1]\nsettings: {t: 0.25}\nadapter: {rank: keep}\n")
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    x, y = changes
    angle = torch.acos((x * y).sum() / x.norm() / y.norm())
    expected = (torch.sin(0.75 * angle) * x + torch.sin(0.25 * angle) * y) / torch.sin(angle)
    found = held["base_model.model.q.lora_B.weight"].double() @ held["base_model.model.q.lora_A.weight"].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_settings_run_over_layers_and_choose_by_name(net: Net, tmp_path: Path) -> None:
    models = [train(net, tmp_path / f"a{i}", i + 1, r=2, target_modules=["q_proj", "o_proj"]) for i in range(2)]
    text = """
        method: task_arithmetic
        models: [{model: a0, weight: [0.0, 1.0]}, {model: a1, weight: [{filter: q_proj, value: 0.5}, 2.0]}]
        adapter: {rank: keep}
        keep: "*.1.o_proj.*"
    """
    merge(tmp_path, text)
    found, old = applied(net, tmp_path / "out"), net.state_dict()
    factors = {
        "layers.0.q_proj.weight": (0.0, 0.5),
        "layers.1.q_proj.weight": (1.0, 0.5),
        "layers.0.o_proj.weight": (0.0, 2.0),
        "layers.1.o_proj.weight": (0.0, 0.0),
    }
    for name, (a, b) in factors.items():
        expected = old[name] + a * (models[0][name] - old[name]) + b * (models[1][name] - old[name])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6, msg=name)
    assert not any("layers.1.o_proj" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_biases_of_b_are_merged_as_vectors(net: Net, tmp_path: Path) -> None:
    models = [
        train(net, tmp_path / "a0", 1, r=2, lora_alpha=6, target_modules=["v_proj"], lora_bias=True),
        train(net, tmp_path / "a1", 2, r=3, target_modules=["v_proj", "o_proj"]),
    ]
    merge(tmp_path, "method: task_arithmetic\nmodels: [a0, a1]\nadapter: {rank: keep}\n")
    close(applied(net, tmp_path / "out"), combined(net, models, [1.0, 1.0]), 2e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
        {"target_modules": ["v_proj"], "bias": "all"},
        {"target_modules": ["v_proj"], "bias": "lora_only"},
    ],
    ids=["head", "bias", "own bias"],
)
def test_whole_tensors_are_merged_by_their_change_against_the_base(
    settings: dict[str, Any], net: Net, tmp_path: Path
) -> None:
    models = [train(net, tmp_path / "a0", 1, r=2, **settings), train(net, tmp_path / "a1", 2, r=2, **settings)]
    text = "method: task_arithmetic\nmodels: [{model: a0, weight: 0.5}, a1]\nadapter: {rank: keep}\n"
    with pytest.raises(
        AdapterError, match=r"which adapters hold as a whole, is another in .*a1\nhint: .*say base: PATH"
    ):
        merge(tmp_path, text)
    assert not (tmp_path / "out").exists()
    merge(tmp_path, f"base: base\n{text}")
    close(applied(net, tmp_path / "out"), combined(net, models, [0.5, 1.0]), 2e-6)
    merge(tmp_path, f"keep: ['head.*', '*bias']\n{text}")
    old = net.state_dict()
    left = {name: x for name, x in combined(net, models, [0.5, 1.0]).items() if "proj.weight" in name}
    close(applied(net, tmp_path / "out"), old | left, 2e-6)


def test_type_of_the_output_is_the_adapters_or_the_recipe_s(tmp_path: Path) -> None:
    for i in range(2):
        tensors = {name: x.bfloat16() for name, x in pair("q", 6, 5).items()}
        written(tmp_path / f"a{i}", tensors, target_modules=["q"])
    for line, dtype in (("", torch.bfloat16), ("dtype: float32\n", torch.float32)):
        merge(tmp_path, f"method: linear\nmodels: [a0, a1]\n{line}adapter: {{rank: 2}}\n")
        held = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert {x.dtype for x in held.values()} == {dtype}


def test_ranks_of_names_that_end_on_each_other_are_told_apart(tmp_path: Path) -> None:
    tensors = pair("q", 6, 5, 1) | pair("deep.q", 6, 5, 3) | pair("deep.er.q", 6, 5, 3) | pair("k", 6, 5, 3)
    written(tmp_path / "a0", tensors, r=3, rank_pattern={"^q": 1}, target_modules=["q", "k"])
    (tmp_path / "recipe.yaml").write_text("method: linear\nmodels: [a0]\nadapter: {rank: keep}\n")
    planned = plan_any(read_recipes(tmp_path / "recipe.yaml")[0])
    run(planned, tmp_path / "out", threads=1)
    assert list(config_of(planned)["rank_pattern"].items()) == [("deep.er.q", 3), ("deep.q", 3), ("k", 3), ("q", 1)]


def test_same_bits_at_any_number_of_threads(net: Net, tmp_path: Path) -> None:
    for i, settings in enumerate(KINDS["patterns"]):
        train(net, tmp_path / f"a{i}", i, **settings)
    text = "method: dare_ties\nmodels: [a0, a1, a2]\nsettings: {density: 0.6}\nseed: 3\nadapter: {rank: 2}\n"
    seen = [merge(tmp_path, text, threads=threads)["outputs"] for threads in (1, 3)]
    assert seen[0] == seen[1]


def test_dense_merge_of_adapters_on_a_base_still_works(net: Net, tmp_path: Path) -> None:
    settings = {"r": 3, "target_modules": ["q_proj", "conv"]}
    for i in range(2):
        train(net, tmp_path / f"a{i}", i + 1, **settings)
    merge(tmp_path, "method: task_arithmetic\nmodels: [base+a0, base+a1]\nadapter: {rank: keep}\n")
    in_core = applied(net, tmp_path / "out")
    merge(tmp_path, "method: task_arithmetic\nbase: base\nmodels: [base+a0, base+a1]\n")
    close(load_file(tmp_path / "out" / "model.safetensors"), in_core, 2e-6)
