"""Experts weighed anew and taken out in parts: the state of one process, byte for byte; workers are this process."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cluster_helpers import InProcess, half_then_gone
from command_line import run as run_command  # noqa: F401  # a fixture
from merganser.checkpoints.placed import Place
from merganser.continual import Fold
from merganser.errors import MerganserError
from merganser.merging.cluster_fold import Folded, FoldWork, fold_part, set_weight_on
from merganser.merging.cluster_jobs import Part
from merganser.merging.cluster_tasks import Limits
from merganser.merging.cluster_worker import Failure
from support import load, save, save_family, tree

#: Small enough for several files of a state, the largest of a single tensor's slots.
SHARD_BYTES = 3000
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("models"), 3)


@pytest.fixture(scope="module")
def begun(family: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """States that one expert is in, by method."""
    folder = tmp_path_factory.mktemp("begun")
    for method in ("mean", "gram", "opcm"):
        Fold.init(family[0], folder / method, method, threads=1).add(family[1], threads=1)
    return {method: folder / method for method in ("mean", "gram", "opcm")}


def copied(state: Path, to: Path) -> Path:
    return Path(shutil.copytree(state, to))


def dying_at_first(seen: Counter[int]) -> Callable[..., Folded | Failure]:
    """Tasks of which some leave wrong bytes wherever the next one is to put that right."""

    def fold(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
        seen[part.number] += 1
        if seen[part.number] <= part.number % 3:
            return half_then_gone(work, part, places, fold_part)  # type: ignore[no-any-return]
        return fold_part(work, part, places)

    return fold


@pytest.mark.parametrize("method", ["mean", "gram"])
@pytest.mark.parametrize("weight", [None, 0.25])
def test_parts_give_an_expert_another_weight_or_none_byte_for_byte_whatever_dies(
    method: str, weight: float | None, family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    whole, parts = (copied(begun[method], tmp_path / name) for name in ("whole", "parts"))
    for state in (whole, parts):
        Fold(state).add(family[2], threads=1)
    fold = Fold(whole)
    if weight is None:
        expected = fold.remove(family[1].name, threads=1, shard_bytes=SHARD_BYTES)
    else:
        expected = fold.reweight(family[1].name, weight, threads=1, shard_bytes=SHARD_BYTES)
    tasks = InProcess(dies=lambda number, time: time <= number % 3)
    limits = Limits(workers=3, threads=2)
    found = set_weight_on(
        tasks,
        parts,
        family[1].name,
        weight,
        shard_bytes=SHARD_BYTES,
        limits=limits,
        fold=dying_at_first(Counter()),
    )
    assert found == expected
    assert tree(parts) == tree(whole)
    assert len({*tasks.log}) > 2
    assert len([*parts.glob("sums-00003/*.safetensors")]) > 3


def test_an_expert_that_has_moved_is_taken_out_and_the_last_one_leaves_an_empty_state(
    family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    whole, parts = copied(begun["gram"], tmp_path / "whole"), copied(begun["gram"], tmp_path / "parts")
    moved = copied(family[1], tmp_path / "moved" / family[1].name)
    for state in (whole, parts):
        Fold(state).add(family[2])
    assert set_weight_on(InProcess(), parts, moved, 2.0) == Fold(whole).reweight(moved, 2.0)
    assert set_weight_on(InProcess(), parts, moved, None) == Fold(whole).remove(moved)
    assert tree(parts) == tree(whole)
    tasks = InProcess()
    set_weight_on(tasks, parts, family[2], None)
    assert tasks.log == []
    assert Fold(parts).ledger.contributors == ()
    assert not [*parts.glob("sums-*")]


@pytest.mark.parametrize("problem", ["stranger", "range", "changed", "sequential", "gone"])
def test_what_cannot_be_weighed_anew_is_refused_in_the_same_words_and_the_state_is_as_it_was(
    problem: str, family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    state = copied(begun["opcm" if problem == "sequential" else "gram"], tmp_path / "state")
    expert: str | Path = family[2] if problem == "stranger" else family[1].name
    if problem in ("changed", "gone"):
        expert = copied(family[1], tmp_path / "elsewhere" / family[1].name)
        Fold(state).add(family[2])
        Fold(state).reweight(expert, 0.5)
        shutil.rmtree(expert)
        if problem == "changed":
            save(load(family[3]), expert)
    before, weight, errors = tree(state), -1.0 if problem == "range" else 2.0, []
    for do in (lambda: Fold(state).reweight(expert, weight), lambda: set_weight_on(InProcess(), state, expert, weight)):
        with pytest.raises(MerganserError) as caught:
            do()
        assert tree(state) == before
        errors.append(caught.value)
    assert (type(errors[0]), str(errors[0])) == (type(errors[1]), str(errors[1]))


def test_what_cannot_be_weighed_anew_is_refused_before_any_process_is_begun(
    run_command: Run,  # noqa: F811
    begun: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("merganser.merging.cluster_ray.connected", lambda *_, **__: pytest.fail("Ray was begun"))
    before = tree(begun["gram"])
    for words in (("remove", begun["gram"], "nobody"), ("reweight", begun["gram"], "nobody", 2)):
        code, _, err = run_command("fold", *words, "--ray", "local", "-q")
        assert (code, err.split(" ", 1)[0]) == (2, "StateError:")
        assert "nobody was never added" in err
        code, _, err = run_command("fold", *words, "--workers", 2)
        assert (code, err.splitlines()[0]) == (2, "ParameterError: --workers is for --ray")
        code, _, err = run_command("fold", *words, "--ray", "local", "--device", "cuda")
        assert (code, err.splitlines()[0]) == (2, "ParameterError: --device cuda is for one process")
    assert tree(begun["gram"]) == before
