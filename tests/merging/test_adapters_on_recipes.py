"""Adapters on the output of another recipe of the file: as on the folder that it would have been written to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adapter_helpers import pair, written
from merganser.checkpoints.overlap import stamp
from merganser.errors import MerganserError, OutputError, RefError
from merganser.merging.native import read_recipes
from merganser.merging.run import files_of, merge, plan_recipes
from support import load, save

MEAN = "method: linear\nmodels: [m0, m1]\n"
OUTER = "method: ties\nbase: m0\nmodels: [{ref}, m2]\nsettings: {{density: 0.6}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three models of one layer that is adapted, one that is not, and two adapters, the second a DoRA."""
    generator = torch.Generator().manual_seed(0)
    for k in range(3):
        shapes = {"q.weight": (700, 300), "k.weight": (30, 40)}
        model = {n: torch.randn(s, generator=generator).to(torch.bfloat16) for n, s in shapes.items()}
        save(model, tmp_path / f"m{k}", {"model_type": "llama"})
    small = {n: x / 1e3 for n, x in pair("q", 700, 300).items()}
    written(tmp_path / "lora", small, target_modules=["q"])
    magnitude = {"q.lora_magnitude_vector": 1 + torch.rand(700, generator=generator)}
    written(tmp_path / "dora", small | magnitude, target_modules=["q"], use_dora=True)
    return tmp_path


def run(folder: Path, name: str, text: str, **options: int) -> dict[str, torch.Tensor]:
    (folder / f"{name}.yaml").write_text(text, "utf-8")
    return load(merge(folder / f"{name}.yaml", folder / name, **options))


@pytest.mark.parametrize("adapters", ["lora", "dora", "lora+dora"])
@pytest.mark.parametrize("method", ["ties", "linear", "iso_c"])
def test_bits_are_those_of_the_adapter_on_the_folder_that_the_recipe_writes(
    folder: Path, adapters: str, method: str
) -> None:
    outer = OUTER if method == "ties" else f"method: {method}\nbase: m0\nmodels: [{{ref}}, m2]\n"
    outer = outer.replace("base: m0\n", "") if method == "linear" else outer
    run(folder, "written", MEAN)
    expected = run(folder, "expected", outer.format(ref=f"written+{adapters}"))
    text = f"name: mean\n{MEAN}---\n{outer.format(ref=f'mean+{adapters}')}"
    for threads in (1, 3):
        found = run(folder, f"found-{threads}", text, threads=threads)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())
    plain = run(folder, "plain", outer.format(ref="written"))
    assert not torch.equal(plain["q.weight"], expected["q.weight"])
    assert torch.equal(plain["k.weight"], expected["k.weight"])


def test_receipt_card_and_resume_know_the_adapter(folder: Path) -> None:
    text = f"name: mean\n{MEAN}---\n{OUTER.format(ref='mean+lora')}"
    run(folder, "out", text)
    receipt = json.loads((folder / "out" / "merganser.json").read_text("utf-8"))
    lora = str(folder / "lora")
    assert sorted(receipt["inputs"]) == sorted([lora, *(str(folder / f"m{k}") for k in range(3))])
    assert receipt["inputs"][lora]["identity"] is not None
    assert lora in (folder / "out" / "README.md").read_text("utf-8")
    merged = plan_recipes(read_recipes(folder / "out.yaml")[0])
    before = stamp(files_of(merged))
    written(
        folder / "lora", {n: x / 1e2 for n, x in pair("q", 700, 300).items()}, target_modules=["q"], r=2, note="new"
    )
    assert stamp(files_of(merged)) != before  # so that `--resume` does not go on with the old one


def test_output_in_the_adapter_is_refused(folder: Path) -> None:
    (folder / "r.yaml").write_text(f"name: mean\n{MEAN}---\n{OUTER.format(ref='mean+lora')}", "utf-8")
    with pytest.raises(OutputError, match="lies within what is read"):
        merge(folder / "r.yaml", folder / "lora" / "out")
    assert not (folder / "lora" / "out").exists()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("mean+m1", "m1 is no adapter, and only an adapter can be applied to mean"),
        ("m0+m1", "m1 is no adapter, and only an adapter can be applied to "),
        ("mean+lost", "lost does not exist"),
        ("m0+mean", "mean is a recipe of this file, and no adapter"),
    ],
)
def test_what_is_no_adapter_is_refused_by_name(folder: Path, ref: str, message: str) -> None:
    (folder / "r.yaml").write_text(f"name: mean\n{MEAN}---\n{OUTER.format(ref=ref)}", "utf-8")
    with pytest.raises(MerganserError, match=message) as caught:
        merge(folder / "r.yaml", folder / "out")
    assert isinstance(caught.value, RefError) == ("recipe" not in message)
    assert not (folder / "out").exists()
