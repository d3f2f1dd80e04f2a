"""Adapters of real models, from the hub and from torch files, killed, and on the command line."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from adapter_helpers import LINEAR, combined, loaded, merge, train, two
from command_line import run as run_words

run_command = run_words


@pytest.mark.parametrize(("family", "based"), [("llama", True), ("gpt2", True), ("gpt2", False)])
def test_transformers_model_gives_the_logits_of_the_dense_merge(family: str, based: bool, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    if family == "llama":
        config: Any = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
        )
        targets = [["q_proj", "down_proj"], ["q_proj", "v_proj", "embed_tokens"]]
    else:
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
        targets = [["c_attn", "c_proj"], ["c_attn", "c_fc"]]
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(20).reshape(2, 10)
    models = [
        train(base, tmp_path / f"a{i}", i + 1, r=3 + i, target_modules=t, task_type="CAUSAL_LM", lora_alpha=1.0)
        for i, t in enumerate(targets)
    ]
    line = "base: base\n" if based else ""
    merge(tmp_path, f"method: linear\n{line}models: [a0, a1]\nadapter: {{rank: keep}}\n")
    expected = copy.deepcopy(base)
    expected.load_state_dict({n: x.float() for n, x in combined(base, models, [0.5, 0.5]).items()})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if based:
            found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        else:
            found = loaded(base, tmp_path / "out").eval()
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def test_adapters_come_from_the_hub_and_from_torch_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two(tmp_path)
    held = load_file(tmp_path / "a1" / "adapter_model.safetensors")
    torch.save(held, tmp_path / "a1" / "adapter_model.bin")
    (tmp_path / "a1" / "adapter_model.safetensors").unlink()
    asked = []

    def snapshot(*words: str | None) -> Path:
        asked.append(words)
        return tmp_path / "a1"

    monkeypatch.setattr("merganser.checkpoints.hub.snapshot", snapshot)
    merge(tmp_path, "method: linear\nmodels: [a0, 'hf:org/code@main', org/maths]\nadapter: {rank: 2}\n")
    assert asked == [("org/code", "main"), ("org/maths", None)]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (found[f"base_model.model.q.lora_{x}.weight"] for x in "AB")
    expected = held["base_model.model.q.lora_B.weight"] @ held["base_model.model.q.lora_A.weight"]
    torch.testing.assert_close(b @ a, expected)


def test_kill_leaves_no_folder_and_the_next_run_clears_up(tmp_path: Path) -> None:
    two(tmp_path)
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    script = dedent(f"""
        import os, signal
        import merganser.merging.run as engine
        from merganser.merging.native import read_recipes
        from pathlib import Path
        engine.config_of = lambda merge: os.kill(os.getpid(), signal.SIGKILL)
        folder = Path({str(tmp_path)!r})
        engine.run(engine.plan_any(read_recipes(folder / "recipe.yaml")[0]), folder / "out", threads=1)
    """)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.partial-*"))
    merge(tmp_path, LINEAR)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob(".out.partial-*"))


def test_command_line_plans_and_merges_adapters(
    run_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    two(tmp_path)
    (tmp_path / "recipe.yaml").write_text(LINEAR.replace("rank: 2", "rank: 1"))
    code, out, _ = run_command("plan", tmp_path / "recipe.yaml")
    assert code == 0
    assert "linear (paper) of" in out
    assert "low rank" in out
    code, out, _ = run_command("merge", tmp_path / "recipe.yaml", tmp_path / "out", "--threads", "1")
    assert code == 0
    assert "truncation error 0." in out
    assert "at q.weight" in out
    code, _, err = run_command("doctor", tmp_path / "recipe.yaml")
    assert code == 2
    assert "merges adapters with each other" in err
