"""A run's configuration: what it may say, and what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merganser.decentral.words import Merge, RunConfig, load_config, read_config
from merganser.errors import ParameterError, RefError

LEAST: dict[str, Any] = {"agents": 5, "rounds": 3, "network": {"kind": "mlp"}, "data": {"source": {"kind": "digits"}}}


def refusal(**changes: Any) -> ParameterError:
    with pytest.raises(ParameterError) as caught:
        read_config({**LEAST, **changes})
    return caught.value


def test_a_configuration_survives_json() -> None:
    config = read_config({**LEAST, "merge": {"rule": "soft", "own": 0.99}, "optimizer": {"lr": 1}})
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert config.optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"agnets": 5}, "agnets: there is no such key", "did you mean agents?"),
        ({"topology": {"knid": "ring"}}, "topology.knid: there is no such key", "did you mean kind?"),
        ({"merge": {"match": {"imags": 1}}}, "merge.match.imags: there is no such key", "did you mean images?"),
        ({"optimizer": {"zzz": 1}}, "optimizer.zzz: there is no such key", "the keys here: name, lr, momentum, keep"),
        ({"topology": {"kind": "rnig"}}, "topology.kind: Input should be 'full', ", "did you mean ring?"),
        ({"merge": {"rule": "aligned_one"}}, "merge.rule: Input should be", "did you mean aligned_once?"),
        ({"optimizer": {"lr": "1e-3"}}, "optimizer.lr: Input should be a valid number ('1e-3')", "write 0.001"),
        ({"rounds": "three"}, "rounds: Input should be a valid integer ('three')", None),
        ({"rounds": True}, "rounds: Input should be a valid integer (True)", None),
        ({"rounds": 2.5}, "rounds: Input should be a valid integer", None),
        ({"rounds": 0}, "rounds: Input should be greater than 0 (0)", None),
        ({"agents": 0}, "agents: ", None),
        ({"recalibrate": 1}, "recalibrate: Input should be a valid boolean", None),
        ({"local_epochs": float("inf")}, "local_epochs: Input should be a finite number", None),
        ({"topology": None}, "topology: ", None),
    ],
)
def test_an_error_names_the_place_and_what_is_near(changes: dict[str, Any], message: str, hint: str | None) -> None:
    error = refusal(**changes)
    assert error.message.startswith(message)
    assert (error.hint is None) if hint is None else (error.hint is not None and hint in error.hint)


@pytest.mark.parametrize("key", ["agents", "rounds", "network", "data"])
def test_what_a_run_cannot_do_without_is_asked_for(key: str) -> None:
    with pytest.raises(ParameterError, match=f"^{key} is missing"):
        read_config({name: value for name, value in LEAST.items() if name != key})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"topology": {"kind": "file"}}, "kind is file where a file is named"),
        ({"topology": {"kind": "ring", "file": "graph.json"}}, "kind is file where a file is named"),
        ({"merge": {"rule": "soft"}}, "merge: own belongs to the rule soft"),
        ({"merge": {"rule": "plain", "own": 0.5}}, "own belongs to the rule soft"),
        ({"merge": {"start": 3}}, "merge.start is 3, and there are 3 rounds"),
        ({"merge": {"rule": "aligned", "match": {"data": "proxy"}}}, "data.proxy sets no examples aside"),
        ({"optimizer": {"momentum": 0.9}}, "momentum belongs to sgd"),
        ({"max_staleness": 1}, "max_staleness belongs to the mode async"),
        ({"algorithm": "cdsgd", "merge": {"rule": "aligned"}}, "algorithm cdsgd takes no merge"),
        ({"algorithm": "sgp", "mode": "async"}, "algorithm sgp is synchronous"),
        ({"data": {}}, "name a source, or domains"),
        ({"data": {"source": {}, "split": "domains"}}, "name a source, or domains"),
        ({"data": {"source": {}, "domains": {"a": {}}}}, "name a source, or domains"),
        ({"data": {"source": {}, "split": "dirichlet"}}, "alpha belongs to the split dirichlet"),
        ({"data": {"source": {}, "alpha": 0.5}}, "alpha belongs to the split dirichlet"),
    ],
)
def test_words_that_do_not_go_together_are_refused(changes: dict[str, Any], what: str) -> None:
    assert what in refusal(**changes).message


def test_words_that_do_go_together_are_taken() -> None:
    for changes in (
        {"topology": {"kind": "file", "file": "graph.json"}},
        {"merge": {"rule": "none", "start": 9}},
        {"merge": {"rule": "aligned", "match": {"data": "proxy"}}, "data": {"source": {}, "proxy": 100}},
        {"mode": "async", "max_staleness": 3},
        {"data": {"domains": {"a": {}, "b": {}}, "split": "domains"}},
        {"optimizer": {"name": "sgd", "momentum": 0.9, "keep": False}, "algorithm": "cdsgd"},
    ):
        read_config({**LEAST, **changes})


def test_late_and_rare_merges() -> None:
    assert [t for t in range(7) if Merge().at(t)] == list(range(7))
    assert [t for t in range(7) if Merge(start=2, every=2).at(t)] == [2, 4, 6]
    assert not any(Merge(rule="none").at(t) for t in range(7))


def test_a_file_is_read_and_its_errors_name_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("agents: 2\nrounds: 1\nnetwork: {kind: mlp}\ndata: {source: {kind: digits}}\n")
    assert load_config(path).agents == 2
    for text, what in (
        ("agents: [", "not sound YAML"),
        ("- a", "not a mapping"),
        ("1: a", "not a mapping"),
        ("", "not a mapping"),
        ("agents: 2\nronds: 1", f"{path}: "),
    ):
        path.write_text(text)
        with pytest.raises(ParameterError) as caught:
            load_config(path)
        assert what in caught.value.message
        assert str(path) in caught.value.message
    with pytest.raises(RefError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
