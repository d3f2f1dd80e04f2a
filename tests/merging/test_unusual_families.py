"""Models that are stored otherwise, that are not quite alike, or that belong to another library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from family_models import (
    WEIGHTS,
    Families,
    check_close,
    config_of,
    linear,
    loaded,
    mean_of,
    merge,
    runs,
    state_of,
    store,
    ties_of,
)
from merganser.errors import ExtraTensorError, ShapeError
from support import load
from vocabulary_helpers import MERGES, MORE, bpe, embeddings, save_model


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


# how models come


@pytest.mark.parametrize("name", ["bert", "llama-3", "whisper", "hub-resnet"])
def test_shards_and_torch_files_merge_as_one_safetensors_file_does(
    name: str, families: Families, tmp_path: Path
) -> None:
    """Torch's own files hold tied tensors under all their names."""
    family = families(name)
    expected = load(merge(linear(family.folders[1:]), tmp_path / "expected"))
    family.network.load_state_dict(family.states[1])
    shards, torch_file = tmp_path / "shards", tmp_path / "torch"
    family.network.save_pretrained(shards, max_shard_size="8KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    torch_file.mkdir()
    torch.save(family.network.state_dict(), torch_file / "pytorch_model.bin")
    (torch_file / "config.json").write_bytes((family.folders[1] / "config.json").read_bytes())
    for number, folder in enumerate((shards, torch_file)):
        out = merge(linear([folder, family.folders[2]]), tmp_path / f"out{number}")
        found = load(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(x, expected[n]) for n, x in found.items())
        assert ties_of(loaded(family.network, out)) == family.tied


# models that are not quite alike


def refused(text: str, tmp_path: Path) -> str:
    with pytest.raises((ExtraTensorError, ShapeError)) as caught:
        merge(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_heads_that_differ_are_named_and_keep_leaves_the_base_its_own(families: Families, tmp_path: Path) -> None:
    """Classifiers with a masked language model as their base."""
    base, tasks = families("bert"), families("bert-classifier")
    text = {
        "method": "task_arithmetic",
        "base": str(base.folders[0]),
        "models": [str(f) for f in tasks.folders[1:]],
    }
    message = refused(json.dumps(text), tmp_path)
    assert f"bert.pooler.dense.bias (and 3 more) is in {tasks.folders[1]} and not in {base.folders[0]}" in message
    text["keep"] = ["cls.*", "bert.pooler.*", "classifier.*"]
    out = merge(json.dumps(text), tmp_path / "out")
    network = loaded(base.network, out)
    assert ties_of(network) == base.tied
    found, old = load(out), load(base.folders[0])
    for name, x in found.items():
        assert torch.equal(x, old[name]) == name.startswith("cls."), name


def test_a_body_without_its_prefix_is_refused_by_name(families: Families, tmp_path: Path) -> None:
    family = families("bert-classifier")
    tensors = load(family.folders[2])
    body = {n.removeprefix("bert."): x for n, x in tensors.items() if n.startswith("bert.")}
    bare = store(body, tmp_path / "bare", config_of(family.folders[2]))
    message = refused(linear([family.folders[1], bare]), tmp_path)
    assert f"(and 38 more) is in {bare} and not in {family.folders[1]}" in message


def test_buffers_of_old_checkpoints_are_left_out_by_keep(families: Families, tmp_path: Path) -> None:
    """Older GPT-2 files hold a mask in every layer."""
    family = families("gpt2")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool) for i in range(2)}
    old = store({**load(family.folders[1]), **masks}, tmp_path / "old", config_of(family.folders[1]))
    assert "transformer.h.0.attn.bias (and 1 more)" in refused(linear([family.folders[2], old]), tmp_path)
    out = merge(linear([family.folders[2], old], keep="*.attn.bias"), tmp_path / "out")
    check_close(loaded(family.network, out).state_dict(), mean_of(family.states[:0:-1], WEIGHTS))
    # In the first model they are kept, and merged they were equal or refused.
    assert (
        load(merge(linear([old, family.folders[2]], keep="*.attn.bias"), tmp_path / "kept")).keys() > load(out).keys()
    )


def test_embeddings_of_other_lengths_are_refused_by_name(families: Families, tmp_path: Path) -> None:
    family = families("qwen2")
    tensors = load(family.folders[2])
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    longer = {n: torch.cat([x, x.new_zeros(31, 32)]) if n in tables else x for n, x in tensors.items()}
    config = {**config_of(family.folders[2]), "vocab_size": 128}
    padded = store(longer, tmp_path / "padded", config)
    message = refused(linear([family.folders[1], padded]), tmp_path)
    assert f"lm_head.weight has 2 shapes: (97, 32) in {family.folders[1]}; (128, 32) in {padded}" in message
    assert "vocabulary: union" in message
    out = merge(linear([family.folders[1], padded], keep=list(tables)), tmp_path / "out")
    network = loaded(family.network, out)
    assert torch.equal(network.state_dict()[tables[0]], family.states[1][tables[0]])
    runs(network, family.inputs)


def test_experts_that_are_fused_in_one_model_alone_are_refused(families: Families, tmp_path: Path) -> None:
    folders = [families("mixtral").folders[1], families("mixtral-fused").folders[2]]
    assert "model.layers.0.mlp.experts.down_proj (and 5 more)" in refused(linear(folders), tmp_path)


# networks of other libraries


def sequential() -> nn.Module:
    """Names that begin with a number."""
    blocks = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)]
    return nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 8))


class Attended(nn.Module):
    """A block of attention, named as in Diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, 8)
        self.attn1 = nn.ModuleDict({n: nn.Linear(8, 8, bias=n == "to_v") for n in ("to_q", "to_k", "to_v")})
        self.attn1["to_out"] = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).flatten(2).transpose(1, 2)
        q, k, v = (self.attn1[n](y) for n in ("to_q", "to_k", "to_v"))
        y = self.attn1["to_out"][0](nn.functional.scaled_dot_product_attention(q, k, v))
        return x + y.transpose(1, 2).view_as(x)


class UNet(nn.Module):
    """The names of Diffusers' UNet2DConditionModel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(4, 8), "linear_2": nn.Linear(8, 8)})
        self.down_blocks, self.up_blocks = (
            nn.ModuleList(
                nn.ModuleDict(
                    {
                        "resnets": nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1)]),
                        "attentions": nn.ModuleList([Attended()]),
                    }
                )
                for _ in range(2)
            )
            for _ in range(2)
        )
        self.mid_block = nn.ModuleDict({"attentions": nn.ModuleList([Attended()])})
        self.conv_norm_out = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        time = self.time_embedding["linear_2"](self.time_embedding["linear_1"](torch.ones(1, 4)).relu())
        x = self.conv_in(x) + time[..., None, None]
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = block["resnets"][0](x) if "resnets" in block else x
            x = block["attentions"][0](x)
        return self.conv_out(self.conv_norm_out(x))


class DiT(nn.Module):
    """The names of Diffusers' transformers."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 8, 2, 2)})
        self.proj_in, self.proj_out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        self.transformer_blocks = nn.ModuleList(Attended() for _ in range(num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(self.pos_embed["proj"](x))
        for block in self.transformer_blocks:
            x = block(x)
        return self.proj_out(x * self.scale_shift_table[0][:, None, None])


CONFIGS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "unet": (UNet, {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", "layers_per_block": 1}),
    "dit": (DiT, {"_class_name": "DiTTransformer2DModel", "_diffusers_version": "0.30.0", "num_layers": 3}),
}


def diffusers(name: str, tmp_path: Path) -> tuple[list[Path], list[dict[str, Tensor]], dict[str, Any]]:
    make, config = CONFIGS[name]
    folders, states = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(state_of(make()))
        folders.append(store(states[-1], tmp_path / f"{name}{seed}", config, "diffusion_pytorch_model"))
    return folders, states, config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_diffusers_folder_is_merged_with_its_config(name: str, tmp_path: Path) -> None:
    folders, states, config = diffusers(name, tmp_path)
    out = merge(linear(folders), tmp_path / "out")
    found = load(out)
    check_close(found, mean_of(states, WEIGHTS))
    assert config_of(out) == config
    network = CONFIGS[name][0]()
    network.load_state_dict(found)
    assert bool(torch.isfinite(network.eval()(torch.randn(2, 3, 8, 8))).all())


def test_blocks_of_a_diffusers_transformer_are_stacked(tmp_path: Path) -> None:
    folders, states, config = diffusers("dit", tmp_path)
    parts = [{"models": [{"model": str(f), "layers": list(s)}]} for f, s in zip(folders, ((0, 3), (1, 3)), strict=True)]
    out = merge(json.dumps({"method": "passthrough", "slices": parts}), tmp_path / "out")
    assert config_of(out) == config | {"num_layers": 5}
    network, found = DiT(5), load(out)
    network.load_state_dict(found)
    for name, x in found.items():
        if not name.startswith("transformer_blocks."):
            first = name.startswith(("pos_embed.", "proj_in."))
            assert torch.equal(x, states[0 if first else 1][name]), name
    assert bool(torch.isfinite(network(torch.randn(2, 3, 8, 8))).all())


def test_a_name_that_begins_with_a_number_is_a_layer(tmp_path: Path) -> None:
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(state_of(sequential()))
    folders = [store(state, tmp_path / f"m{i}", {}) for i, state in enumerate(states)]
    models = [{"model": str(folders[0]), "weight": 1.0}, {"model": str(folders[1]), "weight": [0.0, 1.0]}]
    text = {"method": "linear", "models": models, "settings": {"normalize": False}}
    found = load(merge(json.dumps(text), tmp_path / "out"))
    expected = {n: x.double() + int(n.partition(".")[0]) / 4 * states[1][n].double() for n, x in states[0].items()}
    check_close(found, expected)


# stages


def test_a_vocabulary_and_a_template_of_an_earlier_stage_come_out_of_the_last(tmp_path: Path) -> None:
    folders = [
        save_model(tmp_path / "base", bpe(), embeddings(0, 64)),
        save_model(tmp_path / "more", bpe((*MERGES, *MORE), turned=5), embeddings(1, 66)),
    ]
    stage = {"method": "linear", "models": [str(f) for f in folders], "vocabulary": "union", "chat_template": "{{ x }}"}
    expected = merge(json.dumps(stage), tmp_path / "expected")
    last = {"method": "linear", "models": ["a", "b"]}
    documents = [stage | {"name": "a"}, stage | {"name": "b"}, last]
    out = merge("\n---\n".join(json.dumps(d) for d in documents), tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {p.name for p in expected.iterdir()}
    assert (out / "tokenizer.json").read_bytes() != (folders[0] / "tokenizer.json").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    assert config_of(out)["vocab_size"] == 66
