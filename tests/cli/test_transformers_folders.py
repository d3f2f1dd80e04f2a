"""Folders that transformers wrote, whose tensors it calls otherwise in files than in memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merganser.checkpoints import open_source
from merganser.cli.stored import stored_names
from merganser.cli.subject import loaded, subject
from merganser.errors import CheckpointError

Run = Callable[..., tuple[int, str, str]]

CODE = """
import torch

def pictures():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(20, 3, 8, 8, generator=generator)} for _ in range(2)]

def texts():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 30, (20, 6), generator=generator) for _ in range(2)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
"""
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3}
BATCHES = {"vit": "pictures", "bert": "texts"}


def network(kind: str, seed: int) -> Any:
    """A network with weights of which no two tensors are alike."""
    import transformers

    torch.manual_seed(seed)
    if kind == "vit":
        made: Any = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SIZES))
    else:
        config = transformers.BertConfig(vocab_size=30, max_position_embeddings=12, **SIZES)
        made = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for x in made.parameters():
            x.add_(0.2 * torch.randn(x.shape))
    return made.eval()


def given(of: nn.Module, kind: str) -> Tensor:
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    with torch.no_grad():
        y: Tensor = of(**scope[BATCHES[kind]]()[0]).logits
    return y


def reloaded(folder: Path, like: Any) -> Any:
    """The folder as its library loads it, when nothing of it is missing, superfluous or new."""
    found, info = type(like).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return found.eval()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(CODE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in BATCHES:
            for seed, name in enumerate("ab"):
                network(kind, seed).save_pretrained(f"{kind}-{name}")
    return tmp_path


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_folder_that_transformers_wrote_is_loaded_as_it_loads_it(shop: Path, kind: str) -> None:
    it = subject(f"{kind}-a", None)
    own = network(kind, 0)
    found = loaded(it.network, open_source(f"{kind}-a"))
    assert found.state_dict().keys() == own.state_dict().keys()
    assert torch.equal(given(found, kind), given(own, kind))


def test_tensors_of_older_files_are_known_by_their_older_names(shop: Path) -> None:
    file = Path("bert-a/model.safetensors")
    tensors = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for n, x in load_file(file).items()
    }
    assert any(name.endswith("gamma") for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    found = loaded(subject("bert-a", None).network, open_source("bert-a"))
    assert torch.equal(given(found, "bert"), given(network("bert", 0), "bert"))


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_align_writes_a_folder_under_the_names_of_the_one_it_moves(shop: Path, run: Run, kind: str) -> None:
    code, text, error = run("align", f"{kind}-a", f"{kind}-b", "out", "--batches", f"nets.py:{BATCHES[kind]}")
    assert (code, error) == (0, "")
    assert "distance" in text
    moved, before = load_file("out/model.safetensors"), load_file(f"{kind}-b/model.safetensors")
    assert moved.keys() == before.keys()
    assert any(not torch.equal(x, before[name]) for name, x in moved.items())
    own = network(kind, 1)
    torch.testing.assert_close(given(reloaded(Path("out"), own), kind), given(own, kind), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_pleas_of_a_folder_with_itself_gives_what_it_gives(shop: Path, run: Run, kind: str) -> None:
    words = ["pleas", f"{kind}-a", f"{kind}-a", "out", "--batches", f"nets.py:{BATCHES[kind]}", "--quiet"]
    assert run(*words) == (0, "", "")
    found = loaded(subject("out", None).network, open_source("out"))
    torch.testing.assert_close(given(found, kind), given(network(kind, 0), kind), rtol=1e-3, atol=1e-3)


def test_pleas_of_two_folders_is_of_the_size_that_its_preview_tells(shop: Path, run: Run) -> None:
    words = ["pleas", "vit-a", "vit-b", "out", "--batches", "nets.py:pictures"]
    code, text, error = run(*words, "--preview", "--budgets", "1,2")
    assert (code, error) == (0, "")
    assert not Path("out").exists()
    assert run(*words, "--budget", "2", "--way", "none", "--quiet") == (0, "", "")
    costs = json.loads(Path("out/merganser.json").read_text())["costs"]
    lines = [line.split() for line in text.splitlines()]
    assert ["1", f"{costs['parent_flops']:,}", f"{costs['parent_parameters']:,}"] in [line[:3] for line in lines]
    assert ["2", f"{costs['flops']:,}", f"{costs['parameters']:,}"] in [line[:3] for line in lines]
    assert costs["flops"] > 1.1 * costs["parent_flops"]
    assert given(loaded(subject("out", None).network, open_source("out")), "vit").shape == (20, 3)


def test_meet_writes_the_names_of_its_first_folder(shop: Path, run: Run) -> None:
    assert run("meet", "vit-a", "vit-b", "--out", "out", "--method", "star", "--quiet") == (0, "", "")
    assert load_file("out/model.safetensors").keys() == load_file("vit-a/model.safetensors").keys()
    reloaded(Path("out"), network("vit", 0))


def test_experts_that_files_hold_one_by_one_are_refused_with_how_to_write_them(tmp_path: Path) -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=8,
    )  # fmt: skip
    made = transformers.MixtralForCausalLM(config)
    made.save_pretrained(tmp_path / "files")
    with pytest.raises(CheckpointError, match=r"in another form, as .+experts") as caught:
        stored_names(made, open_source(str(tmp_path / "files")))
    assert "save_original_format=False" in str(caught.value)
    made.save_pretrained(tmp_path / "memory", save_original_format=False)
    assert stored_names(made, open_source(str(tmp_path / "memory"))) == {}


def test_measurements_have_the_names_of_the_folder(shop: Path, run: Run) -> None:
    assert run("measure", "vit-a", "nets.py:pictures", "out")[0] == 0
    measured = {name.partition("/")[2] for name in load_file("out/model.safetensors")}
    assert len(measured) == 8
    assert measured < load_file("vit-a/model.safetensors").keys()


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_zip_writes_the_names_of_its_first_folder(shop: Path, run: Run, kind: str) -> None:
    words = ["--model", f"{kind}-a", "--batches", f"nets.py:{BATCHES[kind]}", "--out", "out"]
    assert run("zip", f"{kind}-a", f"{kind}-b", *words, "--quiet") == (0, "", "")
    assert load_file("out/model.safetensors").keys() == load_file(f"{kind}-a/model.safetensors").keys()
