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
from merganser.merging.run import files_of, job_bytes, merge, plan_recipes
from support import load, save
from vocabulary_helpers import family_at

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
    ("inner", "outer"),
    [
        ("models: [base, more]\nvocabulary: union\n", "models: [REF, chat]\nvocabulary: union\n"),
        ("models: [base, more]\nvocabulary: union\n", "models: [chat, REF]\nvocabulary: REF\n"),
        ("models: [base, wide]\nvocabulary: wide\n", "models: [REF, more]\nvocabulary: union\n"),  # as many rows
    ],
)
def test_vocabulary_is_that_of_the_recipe_and_not_of_its_donor(tmp_path: Path, inner: str, outer: str) -> None:
    family_at(tmp_path)
    shape = load(tmp_path / "base")["model.layers.0.mlp.up_proj.weight"].shape
    written(tmp_path / "lora", pair("model.layers.0.mlp.up_proj", *shape), target_modules=["up_proj"])
    inner, outer = (f"method: linear\n{text}" for text in (inner, outer))
    run(tmp_path, "stage", inner)
    expected = run(tmp_path, "expected", outer.replace("REF", "stage+lora"))
    found = run(tmp_path, "found", f"name: S\n{inner}---\n{outer.replace('REF', 'S+lora')}")
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    for file in ("tokenizer.json", "config.json"):
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_identity_of_an_adapter_is_its_own_whatever_it_is_applied_to(folder: Path) -> None:
    found = set()
    for k, models in enumerate(("[S+lora, m1]", "[S+dora+lora, m1]", "[S+lora, S+dora+lora]", "[S+dora+lora, S+lora]")):
        run(folder, f"o{k}", f"name: S\n{MEAN}---\nmethod: linear\nmodels: {models}\n")
        receipt = json.loads((folder / f"o{k}" / "merganser.json").read_text("utf-8"))
        found.add(receipt["inputs"][str(folder / "lora")]["identity"])
    assert len(found) == 1


def test_prediction_counts_the_earlier_recipe_and_what_is_held_of_it_beneath_an_adapter(folder: Path) -> None:
    sizes = []
    for ref in ("m1", "mean", "mean+lora"):
        (folder / "r.yaml").write_text(f"name: mean\n{MEAN}---\n{OUTER.format(ref=ref)}", "utf-8")
        sizes.append(job_bytes(plan_recipes(read_recipes(folder / "r.yaml")[0]), "q.weight"))
    assert sizes[0] < sizes[1]
    assert sizes[2] == sizes[1] + 2 * 700 * 300


@pytest.mark.parametrize("below", ["a+b", "a"])
def test_folders_may_have_a_plus_in_their_names(tmp_path: Path, below: str) -> None:
    place = tmp_path / below
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    save({"q.weight": x}, place / "m")
    written(place / "lo+ra", pair("q", 20, 30), target_modules=["q"])
    (place / "r.yaml").write_text("method: passthrough\nmodels: [m+lo+ra]\n", "utf-8")
    found = load(merge(place / "r.yaml", tmp_path / "out"))["q.weight"]
    a, b = (pair("q", 20, 30)[f"q.lora_{letter}.weight"].double() for letter in "AB")
    torch.testing.assert_close(found.double(), x.double() + b @ a, rtol=1e-6, atol=0)
    with pytest.raises(OutputError, match="lies within what is read"):
        merge(place / "r.yaml", place / "lo+ra" / "out")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("mean+", "names no adapter behind the plus"),
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
