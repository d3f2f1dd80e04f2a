"""`merganser fold`: words, output and exit codes; what a fold computes is tested beside `merganser.continual`."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.checkpoints.writer import CheckpointWriter
from merganser.continual.ledger import Contributor, Ledger

Run = Callable[..., tuple[int, str, str]]


def model(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    change = 0.1 if seed else 1.0
    base = model(0) if seed else {"a.weight": torch.zeros(6, 5), "a.bias": torch.zeros(6)}
    return {name: x + change * torch.randn(x.shape, generator=generator) for name, x in base.items()}


def write_model(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    save_file(model(seed), folder / "model.safetensors")
    return folder


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A folder with `base`, `one` and `two`."""
    for seed, name in enumerate(("base", "one", "two")):
        write_model(tmp_path / name, seed)
    return tmp_path


def begin(run: Run, family: Path, *words: str, state: str = "state", experts: tuple[str, ...] = ("one",)) -> Path:
    place = family / state
    assert run("fold", "init", family / "base", place, *words)[0] == 0
    for name in experts:
        assert run("fold", "add", place, family / name)[0] == 0
    return place


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_main_job_end_to_end_prints_one_line_a_command(run: Run, family: Path) -> None:
    state, out = family / "state", family / "out"
    assert run("fold", "init", family / "base", state, "-m", "mean") == (
        0, f"{state}: mean over {family / 'base'} (1 vector, 1 matrix)\n", "",
    )  # fmt: skip
    for number, name in enumerate(("one", "two"), 1):
        code, printed, err = run("fold", "add", state, family / name)
        cost, done = printed.splitlines()
        assert (code, err) == (0, "")
        assert re.fullmatch(r"reads .*B, writes .*B, peak memory about .*B beside Python and torch", cost)
        assert done == f"{state}: {name} is in, as number {number}"
    assert run("fold", "export", state, out) == (0, f"{out}: written\n", "")
    merged, expected = load_file(out / "model.safetensors"), (model(1)["a.weight"] + model(2)["a.weight"]) / 2
    torch.testing.assert_close(merged["a.weight"], expected, rtol=0, atol=1e-6)
    assert run("fold", "reweight", state, "one", "3") == (0, f"{state}: one now has weight 3\n", "")
    assert run("fold", "remove", state, family / "two") == (0, f"{state}: two is out\n", "")
    assert run("fold", "export", state, out, "--overwrite")[0] == 0
    torch.testing.assert_close(load_file(out / "model.safetensors"), model(1), rtol=0, atol=1e-6)


def test_combine_adds_up_states_into_a_new_one(run: Run, family: Path) -> None:
    one = begin(run, family, "-m", "mean", state="s1", experts=("one",))
    two = begin(run, family, "-m", "mean", state="s2", experts=("two",))
    assert run("fold", "combine", one, two, family / "both") == (0, f"{family / 'both'}: 2 experts of 2 states\n", "")
    assert run("fold", "export", family / "both", family / "out")[0] == 0
    expected = {name: (x + model(2)[name]) / 2 for name, x in model(1).items()}
    torch.testing.assert_close(load_file(family / "out" / "model.safetensors"), expected, rtol=0, atol=1e-6)


def test_quiet_prints_nothing_at_all_for_any_command_that_has_it(run: Run, family: Path) -> None:
    nothing = (0, "", "")
    state, base = family / "state", family / "base"
    assert run("fold", "init", base, state, "-q") == nothing
    assert run("fold", "add", state, family / "one", "--quiet") == nothing
    assert run("fold", "add", state, family / "two", "--dry-run", "-q") == nothing
    assert run("fold", "add", state, family / "two", "-q") == nothing
    assert run("fold", "reweight", state, "two", "2", "-q") == nothing
    assert run("fold", "remove", state, "two", "-q") == nothing
    assert run("fold", "export", state, family / "out", "-q") == nothing
    assert run("fold", "init", base, family / "other", "-q") == nothing
    assert run("fold", "add", family / "other", family / "two", "-q") == nothing
    assert run("fold", "combine", state, family / "other", family / "both", "-q") == nothing


def test_quiet_still_prints_errors(run: Run, family: Path) -> None:
    code, out, err = run("fold", "init", family / "nobody", family / "state", "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("RefError: ")


def test_a_dry_run_prints_the_cost_and_changes_nothing(run: Run, family: Path) -> None:
    state = begin(run, family)
    before = everything(state)
    code, out, err = run("fold", "add", state, family / "two", "--dry-run")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert "peak memory about" in out
    assert everything(state) == before


def test_a_dry_run_refuses_what_the_run_would_refuse(run: Run, family: Path) -> None:
    state = begin(run, family)
    save_file({"other": torch.zeros(1)}, family / "two" / "model.safetensors")
    assert run("fold", "add", state, family / "two", "--dry-run")[0] == 2


def test_show_prints_what_the_state_is_and_who_is_in_it(run: Run, family: Path) -> None:
    state = begin(run, family, "-m", "gram", "--eps", "0.02", experts=())
    code, out, _ = run("fold", "show", state)
    assert code == 0
    assert out.startswith(f"{state}: gram (eps=0.02), ")
    assert out.endswith("no expert yet: merganser fold add STATE EXPERT\n")
    run("fold", "add", state, family / "one", "-w", "0.5")
    _, out, _ = run("fold", "show", state)
    assert f"base     {family / 'base'}" in out
    assert "exports  " in out
    assert "gram" in out.split("exports  ")[1].split("\n")[0].split(", ")
    header, row = out.splitlines()[-2:]
    assert header.split() == ["#", "expert", "weight", "norm", "of", "change", "digest", "from"]
    assert row.split()[:3] == ["1", "one", "0.5"]
    assert row.split()[-1] == str(family / "one"), "a path is never shortened where it is piped"


def documented(kind: type[Any]) -> set[str]:
    """Names in the Attributes section of a docstring."""
    section = (inspect.getdoc(kind) or "").split("Attributes:")[1]
    return set(re.findall(r"^    (\w+):", section, re.MULTILINE))


def test_show_json_is_the_documented_ledger_with_the_states_size_and_exports(run: Run, family: Path) -> None:
    state = begin(run, family, "-m", "mean", "--sums", "F64", experts=("one", "two"))
    code, out, err = run("fold", "show", state, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert set(shown) == documented(Ledger) | {"format", "version", "state_bytes", "exports"}
    assert all(set(entry) == documented(Contributor) for entry in shown["contributors"])
    assert shown["method"] == "mean"
    assert shown["sums_dtype"] == "F64"
    assert shown["format"] == "merganser-fold-1"
    assert shown["base_ref"] == str(family / "base")
    assert [entry["name"] for entry in shown["contributors"]] == ["one", "two"]
    assert [entry["ref"] for entry in shown["contributors"]] == [str(family / "one"), str(family / "two")]
    assert shown["state_bytes"] == sum(p.stat().st_size for p in state.rglob("*") if p.is_file())
    assert {"mean", "linear", "task_arithmetic"} <= set(shown["exports"])
    change = {name: x - model(0)[name] for name, x in model(1).items()}
    norm = sum(float(d.double().square().sum()) for d in change.values()) ** 0.5
    assert shown["contributors"][0]["norm"] == pytest.approx(norm, rel=1e-6)


def test_verify_prints_a_line_a_part_and_exits_with_0_where_all_is_well(run: Run, family: Path) -> None:
    state = begin(run, family)
    code, out, err = run("fold", "verify", state)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [["ok", "base"], ["ok", "sums"], ["ok", "one"]]


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("part", ["base", "sums"])
def test_verify_exits_with_1_where_a_needed_part_is_damaged(run: Run, family: Path, part: str) -> None:
    state = begin(run, family)
    damaged = family / "base" if part == "base" else next(state.glob("sums-*"))
    flip_last_byte(next(damaged.glob("*.safetensors")))
    code, out, err = run("fold", "verify", state)
    assert (code, err) == (1, "")
    assert [line.split()[0] for line in out.splitlines() if line.split()[1] == part] == ["changed"]


def test_verify_exits_with_0_where_an_expert_is_gone_since_the_state_is_sound_without_it(
    run: Run, family: Path
) -> None:
    state = begin(run, family, experts=("one", "two"))
    (family / "one").rename(family / "moved")
    flip_last_byte(family / "two" / "model.safetensors")
    code, out, _ = run("fold", "verify", state)
    assert code == 0
    status = {line.split()[1]: line.split()[0] for line in out.splitlines()}
    assert status == {"base": "ok", "sums": "ok", "one": "missing", "two": "changed"}


def test_verify_of_a_damaged_ledger_exits_with_2(run: Run, family: Path) -> None:
    state = begin(run, family)
    (state / "ledger.json").write_text("{}")
    code, out, err = run("fold", "verify", state)
    assert (code, out) == (2, "")
    assert err.startswith(f"StateError: {state / 'ledger.json'} is damaged")


REFUSED: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "method": (
        ("init", "{base}", "{new}", "-m", "opmc"),
        "ParameterError: there is no method 'opmc'",
        "did you mean o",
    ),
    "setting": (("init", "{base}", "{new}", "--set", "epps=1"), "ParameterError: ", None),
    "form": (("init", "{base}", "{new}", "--set", "eps"), "ParameterError: --set eps: it is written NAME=VALUE", None),
    "no name": (("init", "{base}", "{new}", "--set", "=1"), "ParameterError: --set =1: it is written NAME=VALUE", None),
    "twice": (("init", "{base}", "{new}", "--eps", "1", "--set", "eps=2"), "ParameterError: eps is given twice", None),
    "base": (("init", "{base}x", "{new}"), "RefError: {base}x does not exist", "did you mean {base}?"),
    "taken": (("init", "{base}", "{state}"), "OutputError: {state} exists", None),
    "no state": (("add", "{new}", "{one}"), "StateError: {new} does not exist", "merganser fold init BASE {new}"),
    "not a state": (("add", "{base}", "{one}"), "StateError: {base} is not a fold's state", None),
    "expert": (("add", "{state}", "{one}x"), "RefError: {one}x does not exist", "did you mean {one}?"),
    "again": (("add", "{state}", "{one}"), "StateError: ", None),
    "stranger": (("remove", "{state}", "{two}"), "StateError: ", None),
    "combine one": (("combine", "{state}", "{new}"), "ParameterError: 1 state given; combining needs at least 2", None),
    "combine none": (("combine", "{new}"), "ParameterError: 0 state given; combining needs at least 2", None),
    "export": (("export", "{state}", "{new}", "-m", "opcm"), "StateError: ", None),
    "export place": (("export", "{state}", "{base}"), "OutputError: ", None),
    "moved base": (
        ("export", "{state}", "{new}", "--base", "{new}"),
        "StateError: the base of {state} is not",
        "if it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_exits_with_2_one_message_and_everything_as_it_was(run: Run, family: Path, case: str) -> None:
    begin(run, family)
    places = {name: str(family / name) for name in ("base", "one", "two", "state", "new")}
    before = everything(family)
    words, message, hint = REFUSED[case]
    code, out, err = run("fold", *(word.format(**places) for word in words))
    assert code == 2
    assert not out or words[0] == "add", "only the cost may stand before a refusal"
    assert err.startswith(message.format(**places))
    assert "Traceback" not in err
    if hint is not None:
        assert f"\nhint: {hint.format(**places)}" in err
    assert everything(family) == before


@pytest.mark.parametrize("name", ["[bold]x", "a\\[b", "a:smile:b", "sp ace"])
def test_odd_characters_of_states_and_experts_are_printed_as_they_are(run: Run, tmp_path: Path, name: str) -> None:
    base, expert = write_model(tmp_path / f"{name}-base", 0), write_model(tmp_path / f"{name}-expert", 1)
    state, out = tmp_path / f"{name}-state", tmp_path / f"{name}-out"
    assert run("fold", "init", base, state)[1].startswith(f"{state}: gram over {base} (")
    assert f"{state}: {name}-expert is in" in run("fold", "add", state, expert)[1]
    shown = run("fold", "show", state)[1]
    assert shown.startswith(f"{state}: gram")
    assert f"base     {base}" in shown
    assert f" {name}-expert " in shown
    assert shown.rstrip().endswith(str(expert))
    assert f"ok      {name}-expert  {expert}" in run("fold", "verify", state)[1]
    assert run("fold", "export", state, out)[1] == f"{out}: written\n"
    assert run("fold", "reweight", state, f"{name}-expert", "2")[1] == f"{state}: {name}-expert now has weight 2\n"
    assert run("fold", "remove", state, expert)[1] == f"{state}: {name}-expert is out\n"


@pytest.mark.parametrize("command", ["add", "export"])
def test_ctrl_c_exits_with_130_and_changes_nothing(
    run: Run, family: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    state = begin(run, family)
    before = everything(family)
    put, calls = CheckpointWriter.put, []

    def interrupted(self: CheckpointWriter, *rest: Any) -> None:
        put(self, *rest)
        calls.append(rest)
        if len(calls) == 1:
            time.sleep(0.2)  # until the main thread waits: Python drops an interrupt that meets a weakref's callback
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(CheckpointWriter, "put", interrupted)
    target = family / ("two" if command == "add" else "out")
    code, _, err = run("fold", command, state, target, "--threads", "1")
    assert code == 130
    assert err == "interrupted; nothing was changed\n"
    assert everything(family) == before


def test_a_setting_by_set_equals_its_own_option(run: Run, family: Path) -> None:
    shown = []
    for number, words in enumerate((("--eps", "0.05"), ("--set", "eps=0.05"), ("--set", "eps=5e-2"))):
        state = begin(run, family, "-m", "gram", *words, state=f"s{number}", experts=())
        shown.append(json.loads(run("fold", "show", state, "--json")[1])["settings"])
    assert shown == [{"eps": 0.05}] * 3


def test_a_negative_weight_is_taken_as_an_option_and_as_an_argument(run: Run, family: Path) -> None:
    state = begin(run, family, "-m", "task_arithmetic", experts=())
    assert run("fold", "add", state, family / "one", "--weight", "-0.5")[0] == 0
    assert run("fold", "reweight", state, "one", "--", "-0.25")[:2] == (0, f"{state}: one now has weight -0.25\n")
