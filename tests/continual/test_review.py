"""What a hostile review found once, and must not find again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merganser.checkpoints import open_source
from merganser.continual import Fold
from merganser.continual.roles import assign_roles
from merganser.errors import CheckpointError, MerganserError, MissingTensorError, ParameterError, StateError

Model = dict[str, Tensor]


def saved(folder: Path, model: Model, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_model(seed: int, dtype: torch.dtype = torch.float32) -> Model:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (48, 40), "a.bias": (48,), "norm.weight": (40,)}
    return {n: (torch.randn(s, generator=generator) * 0.05).to(dtype) for n, s in shapes.items()}


def lora(folder: Path, size: float) -> Path:
    generator = torch.Generator().manual_seed(7)
    folder.mkdir(parents=True)
    factors = {"A": torch.randn(2, 40, generator=generator), "B": torch.randn(48, 2, generator=generator) * size}
    save_file(
        {f"base_model.model.a.lora_{k}.weight": v for k, v in factors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]})
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_on_a_half_precision_base_is_folded_unrounded(tmp_path: Path, dtype: torch.dtype) -> None:
    base = saved(tmp_path / "base", random_model(0, dtype))
    adapter = lora(tmp_path / "lora", 1e-4)
    fold = Fold.init(base, tmp_path / "state", "linear")
    fold.add(adapter)
    factors = load_file(adapter / "adapter_model.safetensors")
    exact = factors["base_model.model.a.lora_B.weight"].double() @ factors["base_model.model.a.lora_A.weight"].double()
    assert fold.ledger.sums is not None
    found = load_file(fold.path / fold.ledger.sums / "sums.safetensors")["s/a.weight"]
    assert float((found - exact).norm() / exact.norm()) < 1e-4


def test_adapter_on_a_base_of_its_own_is_known_by_that_bases_bytes(tmp_path: Path) -> None:
    base, other = saved(tmp_path / "base", random_model(0)), saved(tmp_path / "other", random_model(1))
    adapter = lora(tmp_path / "lora", 1e-2)
    fold = Fold.init(base, tmp_path / "state", "mean")
    fold.add(f"{other}+{adapter}", name="x", allow_distant=True)
    fold.add(adapter, name="y")
    saved(other, {n: x + 0.5 for n, x in random_model(1).items()})
    assert {f.part: f.status for f in fold.verify()}["x"] == "changed"
    with pytest.raises(StateError, match="has changed since it was added as x"):
        fold.remove("x")


def test_tie_under_any_of_its_names_is_the_same_tensor(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    torch.save({"lm_head.weight": table, "wte.weight": table}, tmp_path / "base.pt")
    expert = saved(tmp_path / "expert", {"wte.weight": table + 0.1})
    fold = Fold.init(tmp_path / "base.pt", tmp_path / "state", "mean")
    fold.add(expert)
    merged = open_source(fold.export(tmp_path / "out"))
    assert len(merged.infos) == 1
    (name,) = merged.infos
    assert torch.allclose(merged.read(name), table + 0.1, atol=1e-6)


def test_layout_is_read_off_headers_however_the_base_is_named(tmp_path: Path) -> None:
    model = {
        "h.0.mlp.c_fc.weight": torch.ones(4, 16),
        "h.0.mlp.c_fc.bias": torch.ones(16),
        "h.0.mlp.c_proj.weight": torch.ones(16, 4),
        "h.0.mlp.c_proj.bias": torch.ones(4),
        "h.0.attn.c_proj.weight": torch.ones(4, 4),
        "h.0.attn.c_proj.bias": torch.ones(4),
        "head.weight": torch.ones(3, 4),
        "head.bias": torch.ones(3),
    }
    folder = saved(tmp_path / "base", model, {"model_type": "gpt2"})
    expected = dict.fromkeys([n for n in model if n.startswith("h.") and n.endswith("weight")], "transposed")
    for ref in (folder, folder / "model.safetensors"):
        roles = assign_roles(open_source(ref))
        assert {n: r for n, r in roles.items() if len(model[n].shape) == 2} == expected | {"head.weight": "matrix"}


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("deberta.pos_key_proj.weight", (8, 8), "matrix"),
        ("albert.embedding_hidden_mapping_in.weight", (8, 4), "matrix"),
        ("embeddings_project.weight", (8, 4), "matrix"),
        ("x_embedder.weight", (8, 4), "matrix"),
        ("mixer.token_mixing.fc1.weight", (8, 4), "matrix"),
        ("patch_embedding.weight", (8, 3, 2, 2), "matrix"),
        ("attention.in_proj_weight", (12, 4), "matrix"),
        ("visual.proj", (8, 4), "transposed"),
        ("word_embeddings.weight", (9, 4), "vector"),
        ("model.embed_tokens.weight", (9, 4), "vector"),
        ("relative_attention_bias.weight", (9, 4), "vector"),
        ("perceiver.latents", (9, 4), "vector"),
        ("mixer.A_log", (9, 4), "vector"),
        ("mixer.conv1d.weight", (9, 1, 4), "vector"),
        ("experts.gate_up_proj", (2, 9, 4), "vector"),
        ("decoder.weight", (20000, 8), "vector"),
    ],
)
def test_role_is_what_the_layer_does(tmp_path: Path, name: str, shape: tuple[int, ...], role: str) -> None:
    assert assign_roles(open_source(saved(tmp_path / "m", {name: torch.zeros(shape)}))) == {name: role}


@pytest.mark.parametrize("method", ["opcm", "linear", "task_arithmetic", "mean"])
@pytest.mark.parametrize("weights", [(2.0, -1.0), (2.0,), (1.0, -1.0)])
def test_no_weights_make_a_running_variance_negative(tmp_path: Path, method: str, weights: tuple[float, ...]) -> None:
    names = ("bn.running_var", "a.weight")
    base = saved(tmp_path / "base", dict(zip(names, (torch.ones(4), torch.eye(4)), strict=True)))
    fold = Fold.init(base, tmp_path / "state", method)
    for i, weight in enumerate(weights):
        model = {"bn.running_var": torch.full((4,), 0.3 + i), "a.weight": torch.eye(4) * (1.1 + i / 10)}
        fold.add(saved(tmp_path / f"e{i}", model), weight=weight)
    if method == "mean" and sum(weights) <= 0:
        with pytest.raises(ParameterError, match="a mean needs a positive sum"):
            fold.export(tmp_path / "out")
        return
    merged = load_file(fold.export(tmp_path / "out") / "model.safetensors")
    sizes = [abs(w) for w in weights]
    expected = sum(w * (0.3 + i) for i, w in enumerate(sizes)) / sum(sizes)
    assert torch.allclose(merged["bn.running_var"], torch.full((4,), expected))


@pytest.fixture
def fold(tmp_path: Path) -> Fold:
    found = Fold.init(saved(tmp_path / "base", random_model(0)), tmp_path / "state", "gram")
    for i in (1, 2):
        model = {n: x + 0.01 * random_model(i)[n] for n, x in random_model(0).items()}
        saved(tmp_path / f"e{i}", model)
    found.add(tmp_path / "e1")
    return found


def test_damaged_sums_are_never_built_upon(fold: Fold, tmp_path: Path) -> None:
    assert fold.ledger.sums is not None
    path = fold.path / fold.ledger.sums / "sums.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for work in (lambda: fold.add(tmp_path / "e2"), lambda: fold.export(tmp_path / "out")):
        with pytest.raises(CheckpointError, match="is damaged"):
            work()
    assert not (tmp_path / "out").exists()


def test_sums_of_another_shape_are_refused_by_name(fold: Fold, tmp_path: Path) -> None:
    assert fold.ledger.sums is not None
    path = fold.path / fold.ledger.sums / "sums.safetensors"
    save_file(load_file(path) | {"s/a.bias": torch.zeros(1)}, path)
    for work in (lambda: fold.add(tmp_path / "e2"), lambda: fold.export(tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"s/a\.bias"):
            work()


def test_state_that_was_begun_anew_is_not_folded_by_old_rules(fold: Fold, tmp_path: Path) -> None:
    import shutil

    stale = Fold(fold.path)
    shutil.rmtree(fold.path)
    Fold.init(tmp_path / "base", fold.path, "opcm")
    stale.add(tmp_path / "e1")
    assert all(f.status == "ok" for f in Fold(fold.path).verify())
    Fold(fold.path).export(tmp_path / "out")


def test_another_network_is_refused_though_its_norms_are_alike(tmp_path: Path) -> None:
    def network(seed: int) -> Model:
        return random_model(seed) | {"norm.weight": torch.ones(4000)}

    fold = Fold.init(saved(tmp_path / "base", network(0)), tmp_path / "state", "gram")
    with pytest.raises(StateError, match=r"1\.4\d? times as large as the base"):
        fold.add(saved(tmp_path / "other", network(1)))


def test_expert_of_which_nothing_is_left_is_refused(fold: Fold, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"nothing of .* is left to merge"):
        fold.add(tmp_path / "e2", ignore=["*"])


@pytest.mark.parametrize("ref", ["a" * 300, "é" * 200, "a/" * 3000, "~nosuchuser/x", "bad\udcffname"])
def test_impossible_name_is_a_reference_error(tmp_path: Path, ref: str) -> None:
    for work in (lambda: open_source(ref), lambda: Fold.init(ref, tmp_path / "s"), lambda: Fold(ref)):
        with pytest.raises(MerganserError):
            work()


def test_linked_file_keeps_its_own_name(fold: Fold, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "abcdef0123"
    blob.parent.mkdir()
    (tmp_path / "e2" / "model.safetensors").rename(blob)
    (tmp_path / "e2" / "model.safetensors").symlink_to(blob)
    assert fold.add(tmp_path / "e2" / "model.safetensors").name == "model"


def test_half_precision_export_that_overflows_writes_nothing(tmp_path: Path) -> None:
    fold = Fold.init(saved(tmp_path / "base", {"a.weight": torch.full((4, 4), 1e6)}), tmp_path / "state", "mean")
    with pytest.raises(MerganserError, match=r"a\.weight overflows F16"):
        fold.export(tmp_path / "out", dtype="F16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rename", [False, True])
def test_head_that_an_experts_config_ties_is_its_embedding(tmp_path: Path, rename: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    shapes = ((9, 4), (9, 4), (4,))
    base = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in zip(names, shapes, strict=True)}
    expert = {n: x + 0.1 * torch.randn(x.shape, generator=generator) for n, x in base.items() if n != names[1]}
    stored = {f"net.{n}": x for n, x in expert.items()} if rename else expert
    root = saved(tmp_path / "base", base, {"tie_word_embeddings": False})
    fold = Fold.init(root, tmp_path / "state", "linear")
    fold.add(saved(tmp_path / "e", stored, {"tie_word_embeddings": True}), rename=["net.="] if rename else [])
    merged = load_file(fold.export(tmp_path / "out") / "model.safetensors")
    assert torch.allclose(merged["lm_head.weight"], expert[names[0]], rtol=0, atol=1e-12)
    assert [f.status for f in fold.verify()] == ["ok"] * 3
    fold.remove("e")
    lone = saved(tmp_path / "lone", stored, {"tie_word_embeddings": False})
    with pytest.raises(MissingTensorError, match=r"lm_head.weight is in the base and not in"):
        fold.add(lone, rename=["net.="] if rename else [])


def test_expert_of_weight_zero_changes_nothing_under_opcm(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", random_model(0))
    experts = [
        saved(
            tmp_path / f"e{i}",
            {n: x + 0.1 * y for (n, x), y in zip(random_model(0).items(), random_model(i).values(), strict=True)},
        )
        for i in (1, 2, 3)
    ]
    exports = []
    for weights in ((1.0, 0.5), (1.0, 0.0, 0.5), (0.0, 1.0, 0.5), (1.0, 0.5, 0.0)):
        fold = Fold.init(base, tmp_path / f"state{weights}", "opcm")
        bringing, idle = iter(experts[:2]), experts[2]
        for weight in weights:
            fold.add(next(bringing) if weight else idle, weight=weight)
        exports.append(load_file(fold.export(tmp_path / f"out{weights}") / "model.safetensors"))
    for other in exports[1:]:
        assert all(torch.equal(x, other[n]) for n, x in exports[0].items())
