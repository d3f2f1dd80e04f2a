"""Tied models and untied ones, torch's own files beside safetensors, and what is refused before it goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from family_models import (
    TEXT,
    WEIGHTS,
    Families,
    check_close,
    config_of,
    hub,
    linear,
    loaded,
    mean_of,
    merge,
    runs,
    state_of,
    store,
    ties_of,
    tuned,
)
from merganser.errors import ExtraTensorError, MissingTensorError, ParameterError
from support import load


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart", "falcon", "gemma2", "bert"])
def test_a_tied_torch_file_merges_with_a_safetensors_file(name: str, families: Families, tmp_path: Path) -> None:
    """It holds the embedding under all names, and the first of them need not be the other's."""
    family = families(name)
    folders = []
    for number in (1, 2):
        family.network.load_state_dict(family.states[number])
        folder = tmp_path / f"torch{number}"
        folder.mkdir()
        torch.save(family.network.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_bytes((family.folders[1] / "config.json").read_bytes())
        folders.append(folder)
    pairs = ([folders[0], family.folders[2]], [family.folders[1], folders[1]], folders)
    for number, pair in enumerate(pairs):
        out = merge(linear(pair), tmp_path / f"out{number}")
        network = loaded(family.network, out)
        check_close(network.state_dict(), mean_of(family.states[1:], WEIGHTS))
        assert ties_of(network) == family.tied
        assert config_of(out) == config_of(family.folders[1])
        assert len(load(out)) == len(load(family.folders[1]))


@pytest.mark.parametrize("first", [0, 1])
def test_a_tied_model_merges_with_an_untied_one(first: int, tmp_path: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    networks, folders, states = [], [], []
    for number, tied in enumerate((True, False)):
        torch.manual_seed(0)
        network = hub(
            "Qwen2ForCausalLM", "Qwen2Config", **(TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": tied})
        )
        tuned(network, number)
        networks.append(network)
        folders.append(tmp_path / str(number))
        network.save_pretrained(folders[-1])
        states.append(state_of(network))
    order = (first, 1 - first)
    out = merge(linear([folders[i] for i in order]), tmp_path / "out")
    network = loaded(networks[1], out)
    check_close(network.state_dict(), mean_of([states[i] for i in order], WEIGHTS))
    assert config_of(out)["tie_word_embeddings"] is False
    assert ties_of(network) == []
    text: dict[str, Any] = {"method": "task_arithmetic", "base": str(folders[0]), "models": [str(folders[1])]}
    loaded(networks[1], merge(json.dumps(text), tmp_path / "change"))


def test_slices_that_would_leave_a_gap_are_refused(families: Families, tmp_path: Path) -> None:
    """BART's encoder is less deep here than its decoder."""
    family = families("bart")
    parts = [{"models": [{"model": str(f), "layers": [0, 2]}]} for f in family.folders[1:]]
    with pytest.raises(ParameterError, match=r"model\.encoder\.layers\. would have a gap: it has 1 layers in"):
        merge(json.dumps({"method": "passthrough", "slices": parts}), tmp_path / "out")


def test_a_pattern_of_keep_that_fits_nothing_is_refused(families: Families, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"keep: no tensor of the models is called 'classifer\.\*'"):
        merge(linear(families("bert-classifier").folders[1:], keep="classifer.*"), tmp_path / "out")


def test_hints_name_all_that_is_missing_and_a_prefix(families: Families, tmp_path: Path) -> None:
    family = families("bert-classifier")
    tensors = load(family.folders[2])
    config = config_of(family.folders[2])
    body = {n.removeprefix("bert."): x for n, x in tensors.items() if n.startswith("bert.")}
    bare = store(body, tmp_path / "bare", config)
    for order in ([family.folders[1], bare], [bare, family.folders[1]]):
        with pytest.raises(ExtraTensorError, match=r"the names differ by the prefix bert\."):
            merge(linear(order), tmp_path / "out")
    fewer = store({n: x for n, x in tensors.items() if ".output.dense" not in n}, tmp_path / "fewer", config)
    patterns = (
        r"\['bert\.encoder\.layer\.\*\.attention\.output\.dense\.bias', "
        r"'bert\.encoder\.layer\.\*\.attention\.output\.dense\.weight', "
        r"'bert\.encoder\.layer\.\*\.output\.dense\.bias', "
        r"'bert\.encoder\.layer\.\*\.output\.dense\.weight'\]"
    )
    with pytest.raises(MissingTensorError, match=f"keep: {patterns} takes it from"):
        merge(linear([family.folders[1], fewer]), tmp_path / "out")
    with pytest.raises(ExtraTensorError, match=f"leave it out with keep: {patterns}"):
        merge(linear([fewer, family.folders[1]]), tmp_path / "out")


def test_a_diffusers_folder_has_the_names_that_diffusers_looks_for(tmp_path: Path) -> None:
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}
    stem = "diffusion_pytorch_model"
    folders = [store({"conv_in.weight": torch.randn(4, 3, 3, 3)}, tmp_path / str(i), config, stem) for i in range(2)]
    out = merge(linear(folders), tmp_path / "out")
    assert [p.name for p in out.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]


def test_code_that_a_config_names_goes_along(families: Families, tmp_path: Path) -> None:
    tensors, code = load(families("qwen2").folders[1]), "# a model of its own\n"
    folders = []
    for number, config in enumerate(({"auto_map": {"AutoModel": "modeling_own.OwnModel"}}, {})):
        folders.append(store(tensors, tmp_path / str(number), config))
        (folders[-1] / "modeling_own.py").write_text(code)
    assert (merge(linear(folders), tmp_path / "out") / "modeling_own.py").read_text() == code
    assert not (merge(linear(folders[::-1]), tmp_path / "other") / "modeling_own.py").exists()


def test_tied_names_in_a_sharded_output_load(families: Families, tmp_path: Path) -> None:
    from merganser.merging.native import read_recipes
    from merganser.merging.run import plan_recipes, run

    family = families("bert")
    folders = []
    for number in (1, 2):
        family.network.load_state_dict(family.states[number])
        folder = tmp_path / f"torch{number}"
        folder.mkdir()
        torch.save(family.network.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_bytes((family.folders[1] / "config.json").read_bytes())
        folders.append(folder)
    (tmp_path / "r.yaml").write_text(linear(folders))
    out = run(plan_recipes(read_recipes(tmp_path / "r.yaml")[0]), tmp_path / "out", threads=1, shard_bytes=20_000)
    network = loaded(family.network, out)
    assert ties_of(network) == family.tied
    check_close(network.state_dict(), mean_of(family.states[1:], WEIGHTS))
    runs(network, family.inputs)
