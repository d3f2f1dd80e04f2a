"""`merganser inspect` and `merganser convert` on real folders."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.checkpoints.writer import CheckpointWriter
from merganser.cli.show import progress_bar, size

Run = Callable[..., tuple[int, str, str]]

#: Names that a terminal's markup, emoji codes, shells or patterns would make something else of.
ODD_NAMES = ("[bold]x", "[/bold]", "[red]a[/red]", "a:smile:b", "a\\[b", "sp ace", "[link=x]", "100%", "é名")


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layers.0.proj.weight": torch.randn(8, 6, generator=generator),
        "layers.0.proj.bias": torch.randn(8, generator=generator),
        "embed.weight": torch.randn(10, 6, generator=generator).bfloat16(),
        "position_ids": torch.arange(10),
    }


def folder_of(folder: Path, tied: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(model(), folder / "model.safetensors", {"format": "pt", **(tied or {})})
    (folder / "config.json").write_text('{"model_type": "own"}')
    (folder / "README.md").write_text("not brought along")
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


# inspect


def test_inspect_prints_counts_types_roles_and_ties(run: Run, tmp_path: Path) -> None:
    ref = folder_of(tmp_path / "m", {"lm_head.weight": "embed.weight"})
    code, out, err = run("inspect", ref)
    assert (code, err) == (0, "")
    # 48 + 8 + 60 + 10 numbers; 4 * 56 + 2 * 60 + 8 * 10 bytes
    assert out.splitlines() == [
        f"{ref}: 4 tensors, 126 parameters, 424 B",
        "types  BF16, F32, I64",
        "roles  2 vector, 1 matrix, 1 exact",
        "tied   lm_head.weight = embed.weight",
    ]


def test_inspect_tensors_lists_every_tensor_in_full(run: Run, tmp_path: Path) -> None:
    long = ".".join(["model.layers.0.a_name_that_is_longer_than_any_terminal_is_wide"] * 6) + ".weight"
    save_file({long: torch.zeros(2, 3), "b[red]": torch.zeros(1)}, tmp_path / "x.safetensors")
    code, out, _ = run("inspect", tmp_path / "x.safetensors", "--tensors")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[3:]]
    assert rows == [
        ["tensor", "shape", "type", "role"],
        ["b[red]", "(1,)", "F32", "vector"],
        [long, "(2,", "3)", "F32", "matrix"],
    ]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_characters_of_a_path_are_printed_as_they_are(run: Run, tmp_path: Path, name: str) -> None:
    ref, out_folder = folder_of(tmp_path / name), tmp_path / f"{name}-out"
    assert f"{ref}: 4 tensors" in run("inspect", ref)[1]
    assert run("convert", ref, out_folder) == (0, f"{out_folder}: written\n", "")
    missing = tmp_path / f"{name}-missing" / "x"
    code, out, err = run("inspect", missing)
    assert (code, out) == (2, "")
    assert err == f"RefError: {missing} does not exist\nhint: there is no folder {missing.parent} either\n"


def test_odd_characters_of_a_tensors_name_are_printed_as_they_are(run: Run, tmp_path: Path) -> None:
    tied = {"[bold]tied": "[red]:key:"}
    save_file({"[red]:key:": torch.zeros(1)}, tmp_path / "x.safetensors", tied)
    _, out, _ = run("inspect", tmp_path / "x.safetensors", "--tensors")
    assert "tied   [bold]tied = [red]:key:" in out
    assert "\n [red]:key:  (1,)   F32   vector" in out


def test_a_damaged_file_exits_with_2_message_and_hint_on_stderr(run: Run, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = run("inspect", path)
    assert (code, out) == (2, "")
    message, hint = err.splitlines()
    assert message.startswith(f"CheckpointError: {path} holds 423 bytes of data")
    assert hint == "hint: the file is truncated or damaged; fetch it again"


# convert


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth"])
def test_convert_writes_a_torch_file_as_safetensors_of_equal_tensors(run: Run, tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = model()
    torch.save(tensors | {"tied": tensors["embed.weight"]}, source / name)
    (source / "config.json").write_text("{}")
    assert run("convert", source, tmp_path / "out") == (0, f"{tmp_path / 'out'}: written\n", "")
    assert_same(loaded(tmp_path / "out"), model())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "merganser.json",
        "model.safetensors",
    ]
    code, out, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert "tied   tied = embed.weight" in out


def test_convert_takes_a_key_of_a_torch_file(run: Run, tmp_path: Path) -> None:
    torch.save({"model": model(), "ema": {"w": torch.ones(2)}}, tmp_path / "x.ckpt")
    assert run("convert", f"{tmp_path / 'x.ckpt'}::ema", tmp_path / "out")[0] == 0
    assert_same(loaded(tmp_path / "out"), {"w": torch.ones(2)})


def test_convert_writes_a_receipt_with_the_source_and_the_digest_of_every_tensor(run: Run, tmp_path: Path) -> None:
    ref = folder_of(tmp_path / "m")
    assert run("convert", ref, tmp_path / "out", "--rename", "layers.=l.")[0] == 0
    receipt = json.loads((tmp_path / "out" / "merganser.json").read_text())
    assert receipt["source"] == str(ref)
    assert receipt["rename"] == ["layers.=l."]
    expected = hashlib.sha256(model()["layers.0.proj.bias"].numpy().tobytes()).hexdigest()
    assert receipt["outputs"]["l.0.proj.bias"] == expected
    assert set(receipt["outputs"]) == set(loaded(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("BF16", torch.bfloat16), ("F16", torch.float16), ("F64", torch.float64), ("F32", torch.float32)],
)
def test_convert_dtype_casts_floating_tensors_and_no_others(
    run: Run, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    assert run("convert", folder_of(tmp_path / "m"), tmp_path / "out", "--dtype", name)[0] == 0
    expected = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model().items()}
    assert_same(loaded(tmp_path / "out"), expected)


def test_convert_renames_prefixes_in_order(run: Run, tmp_path: Path) -> None:
    words = ("--rename", "layers.=model.layers.", "--rename", "embed=model.embed")
    assert run("convert", folder_of(tmp_path / "m"), tmp_path / "out", *words)[0] == 0
    assert sorted(loaded(tmp_path / "out")) == [
        "model.embed.weight",
        "model.layers.0.proj.bias",
        "model.layers.0.proj.weight",
        "position_ids",
    ]


def test_convert_begins_a_new_file_at_shard_bytes(run: Run, tmp_path: Path) -> None:
    assert run("convert", folder_of(tmp_path / "m"), tmp_path / "out", "--shard-bytes", 150)[0] == 0
    assert len(list((tmp_path / "out").glob("model-*-of-00004.safetensors"))) == 4
    assert_same(loaded(tmp_path / "out"), model())


def test_convert_applies_an_adapter_to_its_base(run: Run, tmp_path: Path) -> None:
    base, adapter = folder_of(tmp_path / "m"), tmp_path / "lora"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    a, b = torch.arange(12.0).reshape(2, 6), torch.ones(8, 2)
    prefix = "base_model.model.layers.0.proj."
    save_file({f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}, adapter / "adapter_model.safetensors")
    assert run("convert", f"{base}+{adapter}", tmp_path / "out")[0] == 0
    expected = model()
    expected["layers.0.proj.weight"] = expected["layers.0.proj.weight"] + 2 * (b @ a)
    torch.testing.assert_close(loaded(tmp_path / "out"), expected, rtol=1e-6, atol=0)
    assert (tmp_path / "out" / "config.json").is_file()


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing there": (("{m}x", "{out}"), "RefError: {m}x does not exist"),
    "dtype": (("{m}", "{out}", "--dtype", "bf16"), "ParameterError: dtype is bf16; it is one of F64, F32, F16, BF16"),
    "renaming": (("{m}", "{out}", "--rename", "a"), "ParameterError: renaming is 'a'; it is written OLD=NEW"),
    "no such prefix": (("{m}", "{out}", "--rename", "a=b"), "ParameterError: {m}: no tensor's name starts with 'a'"),
    "collision": (
        ("{m}", "{out}", "--rename", "layers.0.proj.weight=embed.weight"),
        "ParameterError: {m}: embed.weight and layers.0.proj.weight would both be called embed.weight",
    ),
    "target exists": (("{m}", "{taken}"), "OutputError: {taken} exists"),
    "target is a file": (("{m}", "{taken}/mine.txt", "--overwrite"), "OutputError: {taken}/mine.txt exists and is not"),
    "onto itself": (("{m}", "{m}", "--overwrite"), "OutputError: {m} is, holds or lies within what is read"),
    "onto its folder": (
        ("{m}/model.safetensors", "{m}", "--overwrite"),
        "OutputError: {m} is, holds or lies within what is read",
    ),
    "onto its parent": (("{m}", "{root}", "--overwrite"), "OutputError: {root} is, holds or lies within what is read"),
    "onto a base": (("{m}+{lora}", "{m}", "--overwrite"), "OutputError: {m} is, holds or lies within what is read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_convert_refuses_with_2_one_message_and_everything_as_it_was(run: Run, tmp_path: Path, case: str) -> None:
    places = {"m": tmp_path / "m", "out": tmp_path / "out", "taken": tmp_path / "taken", "root": tmp_path}
    places["lora"] = tmp_path / "lora"
    folder_of(places["m"])
    places["taken"].mkdir()
    (places["taken"] / "mine.txt").write_text("mine")
    places["lora"].mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["proj"], "bias": "none"}
    (places["lora"] / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": torch.ones(1, 6), "B": torch.ones(8, 1)}
    tensors = {f"base_model.model.layers.0.proj.lora_{k}.weight": v for k, v in factors.items()}
    save_file(tensors, places["lora"] / "adapter_model.safetensors")

    def everything() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = everything()
    words, message = REFUSED[case]
    code, out, err = run("convert", *(word.format(**places) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith(message.format(**places))
    assert err.count("\n") == 1 + err.count("\nhint: ")
    assert everything() == before


def test_overwrite_replaces_the_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    code, _, err = run("convert", folder_of(tmp_path / "m"), tmp_path / "out", "--overwrite")
    assert (code, "it was not made here" in err) == (2, True)
    assert (tmp_path / "out" / "old.txt").read_text() == "old"
    (tmp_path / "out" / "merganser.json").write_text("{}")
    assert run("convert", tmp_path / "m", tmp_path / "out", "--overwrite")[0] == 0
    assert not (tmp_path / "out" / "old.txt").exists()
    assert_same(loaded(tmp_path / "out"), model())


def test_ctrl_c_exits_with_130_says_so_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = CheckpointWriter.put, []

    def interrupted(self: CheckpointWriter, name: str, *rest: Any) -> None:
        put(self, name, *rest)
        calls.append(name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(CheckpointWriter, "put", interrupted)
    code, out, err = run("convert", folder_of(tmp_path / "m"), tmp_path / "out")
    assert (code, out, err) == (130, "", "interrupted; nothing was changed\n")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# what commands share


def test_a_progress_bar_shows_its_label_as_it_is_and_only_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("adding [bold]x") as nothing:
        assert nothing is None
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar("adding [bold]x", quiet=True) as nothing:
        assert nothing is None
    with progress_bar("adding [bold]x") as progress:
        assert progress is not None
        progress(500, 1000)
    out, err = capsys.readouterr()
    assert out == ""
    assert "adding [bold]x" in err


def test_sizes_are_in_decimal_units() -> None:
    assert [size(n) for n in (0, 999, 1000, 350e6, 5e9, 2.5e12)] == [
        "0 B", "999 B", "1.0 kB", "350.0 MB", "5.0 GB", "2.5 TB",
    ]  # fmt: skip
