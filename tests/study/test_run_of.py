"""A decentralised run by a file or a name, with some keys said otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from merganser.decentral.words import load_config
from merganser.errors import ParameterError, RefError
from merganser.study.composing import CONF, names_in, run_of, study_of
from merganser.study.words_agents import AgentsNode

Run = Callable[..., tuple[int, str, str]]
NAMES = names_in("decentral")
STUDIES = ("dimat", "dimat-full", "dimat-same", "dimat-dirichlet", "dimat-batch16")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_file_in_the_group(name: str) -> None:
    assert run_of(name) == load_config(CONF / "decentral" / f"{name}.yaml").model_copy(update={"name": name})


def test_words_change_their_keys_and_no_others() -> None:
    words = ["merge.rule=aligned", "optimizer.lr=1e-2", "data.split=dirichlet", "data.alpha=0.5", "recalibrate=false"]
    plain, changed = run_of("cifar10-ring"), run_of("cifar10-ring", words)
    assert (changed.merge.rule, changed.optimizer.lr, changed.data.alpha) == ("aligned", 0.01, 0.5)
    assert changed.merge.match == plain.merge.match
    differ = {key for key in type(plain).model_fields if getattr(plain, key) != getattr(changed, key)}
    assert differ == {"merge", "optimizer", "data", "recalibrate"}


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar10-ring").write_text("{agents: 2, rounds: 1, network: {}, data: {source: {}}}")
    monkeypatch.chdir(tmp_path)
    assert run_of("cifar10-ring").agents == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["merge.rul=plain"], "did you mean rule"),
        (["merge"], "sets no key"),
        (["=1"], "sets no key"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["topology.kind=rign"], "did you mean ring"),
        (["merge.rule=${x}"], "cannot be composed"),
    ],
)
def test_words_that_mean_nothing_are_refused(words: list[str], says: str) -> None:
    with pytest.raises(ParameterError) as caught:
        run_of("cifar10-ring", words)
    assert says in str(caught.value)


def test_the_command_takes_words_behind_the_name(tmp_path: Path, run: Run) -> None:
    code, _, error = run("decentral", "run", "digits-ring", "merge.rul=plain", "--out", tmp_path / "out")
    assert (code, "did you mean rule?" in error) == (2, True), error
    assert not (tmp_path / "out").exists()


def test_what_is_neither_file_nor_name_is_refused_with_the_names() -> None:
    with pytest.raises(RefError, match="cifar10-ring"):
        run_of("cifar11-ring")


@pytest.mark.parametrize("name", STUDIES)
def test_every_method_of_a_shipped_study_is_a_run_and_all_share_their_data(name: str) -> None:
    node = study_of([f"study={name}"])
    assert isinstance(node, AgentsNode)
    assert node.name == name
    runs = [node.config(method, 0) for method in node.methods]
    shared = (runs[0].data, runs[0].optimizer, runs[0].network, max(node.shown))
    assert all((run.data, run.optimizer, run.network, run.rounds) == shared for run in runs)
