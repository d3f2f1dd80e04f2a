"""Experts folded in parts: the state of one process, byte for byte, whatever dies; workers are this process."""

from __future__ import annotations

import shutil
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cluster_helpers import InProcess, half_then_gone
from command_line import run as run_command  # noqa: F401  # a fixture
from documented import make_models
from merganser.checkpoints.placed import Place
from merganser.continual import Fold
from merganser.errors import ClusterError, MerganserError, StateError
from merganser.merging.cluster_fold import Folded, FoldWork, add_on, fold_part
from merganser.merging.cluster_jobs import Part
from merganser.merging.cluster_tasks import Limits
from merganser.merging.cluster_worker import Failure
from support import Model, load, make_base, save, save_family, tree

#: Small enough for several files of a state, the largest of a single tensor's slots.
SHARD_BYTES = 3000
#: Sequential, sums of one slot and of two, factors; their states are in F32, F64, F64 and F32.
METHODS = ("opcm", "mean", "gram", "tsv_m")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("models"), 4)


@pytest.fixture(scope="module")
def begun(family: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """States that one expert is in, by method."""
    folder = tmp_path_factory.mktemp("begun")
    for method in METHODS:
        Fold.init(family[0], folder / method, method, threads=1).add(family[1], threads=1)
    return {method: folder / method for method in METHODS}


def copied(state: Path, to: Path) -> Path:
    return Path(shutil.copytree(state, to))


def half_at_first(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
    """A task that leaves wrong bytes wherever the next one is to put that right."""
    return half_then_gone(work, part, places, fold_part)  # type: ignore[no-any-return]


def dying_at_first(seen: Counter[int]) -> Callable[..., Folded | Failure]:
    def fold(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
        seen[part.number] += 1
        return (half_at_first if seen[part.number] <= part.number % 3 else fold_part)(work, part, places)

    return fold


# the same bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("workers", [1, 4])
def test_parts_give_the_state_of_one_process_byte_for_byte_whatever_dies(
    method: str, workers: int, family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    whole, parts = copied(begun[method], tmp_path / "whole"), copied(begun[method], tmp_path / "parts")
    expected = Fold(whole).add_all(family[2:4], threads=1, shard_bytes=SHARD_BYTES)
    tasks = InProcess(dies=lambda number, time: time <= number % 3)
    found = add_on(
        tasks,
        parts,
        family[2:4],
        shard_bytes=SHARD_BYTES,
        limits=Limits(workers=workers, threads=2),
        fold=dying_at_first(Counter()),
    )
    assert found == expected
    assert tree(parts) == tree(whole)
    assert len({*tasks.log}) > 2
    shards = [load_file(path) for path in parts.glob("sums-00002/*.safetensors")]
    assert len(shards) > 3
    held = [name for shard in shards for name in {slot.partition("/")[2] for slot in shard}]
    assert len(held) == len({*held}), "all slots of a tensor lie in one file"


def test_one_file_is_the_state_that_a_fold_without_parts_writes(
    family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    whole, parts = copied(begun["gram"], tmp_path / "whole"), copied(begun["gram"], tmp_path / "parts")
    Fold(whole).add(family[2])
    add_on(InProcess(), parts, [family[2]])
    assert tree(parts) == tree(whole)
    assert [p.name for p in parts.glob("sums-00002/*.safetensors")] == ["sums.safetensors"]


def test_a_first_expert_under_other_names_with_a_weight_is_folded_as_by_one_process(
    family: list[Path], tmp_path: Path
) -> None:
    model = load(family[2])
    model["bf16.weight"][1, 2] = float("inf")
    expert = save({f"model.{name}": x for name, x in model.items() if name != "scale"}, tmp_path / "other")
    options: dict[str, Any] = {"name": "odd", "weight": 0.5, "ignore": ["scale"], "rename": ["model.="]}
    options |= {"allow_nonfinite": True, "shard_bytes": SHARD_BYTES}
    whole = Fold.init(family[0], tmp_path / "whole", "gram", freeze=["norm.*"])
    parts = Fold.init(family[0], tmp_path / "parts", "gram", freeze=["norm.*"])
    assert add_on(InProcess(), parts.path, [expert], **options) == whole.add_all([expert], **options)
    assert tree(parts.path) == tree(whole.path)


def test_adapters_are_folded_as_by_one_process(tmp_path: Path) -> None:
    make_models(tmp_path)
    base, lora = tmp_path / "models" / "base", tmp_path / "models" / "code-lora"
    whole, parts = (Fold.init(base, tmp_path / name, "gram") for name in ("whole", "parts"))
    assert add_on(InProcess(), parts.path, [lora], shard_bytes=9000) == whole.add_all([lora], shard_bytes=9000)
    assert tree(parts.path) == tree(whole.path)


def test_a_state_without_anything_to_merge_takes_experts_too(tmp_path: Path) -> None:
    names = ("position_ids", "bn.num_batches_tracked")
    base, expert = save_family(tmp_path / "models", 1, names=names)
    states = [Fold.init(base, tmp_path / name, "mean", freeze=["bn.*"]) for name in ("whole", "parts")]
    assert add_on(InProcess(), states[1].path, [expert]) == states[0].add_all([expert])
    assert tree(states[1].path) == tree(states[0].path)


def test_relative_places_mean_the_same_to_a_task(
    family: list[Path], begun: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copied(begun["mean"], tmp_path / "whole")
    copied(begun["mean"], tmp_path / "here" / "parts")
    Fold(whole).add(family[2])
    copied(family[0], tmp_path / "here" / "base")
    copied(family[2], tmp_path / "here" / "there" / family[2].name)

    def away(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path)
            return fold_part(work, part, places)

    monkeypatch.chdir(tmp_path / "here")
    add_on(InProcess(), "parts", [f"there/{family[2].name}"], base="base", fold=away)
    found, expected = tree(tmp_path / "here" / "parts"), tree(whole)
    differing = {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
    assert differing == {"ledger.json", "sums-00002/merganser.json"}, "they name where the expert was"


def test_progress_ends_at_all_bytes(family: list[Path], begun: dict[str, Path], tmp_path: Path) -> None:
    state, seen = copied(begun["mean"], tmp_path / "state"), list[tuple[int, int]]()
    add_on(InProcess(), state, [family[2]], shard_bytes=SHARD_BYTES, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert {total for _, total in seen} == {seen[-1][0]}


# a state of several files


@pytest.mark.parametrize("method", ["gram", "opcm"])
def test_a_state_of_several_files_is_verified_exported_and_folded_on_without_a_cluster(
    method: str, family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    plain, parts = Fold(copied(begun[method], tmp_path / "plain")), copied(begun[method], tmp_path / "parts")
    plain.add(family[2])
    add_on(InProcess(), parts, [family[2]], shard_bytes=SHARD_BYTES)
    fold = Fold(parts)
    assert {f.status for f in fold.verify()} == {"ok"}
    assert files(fold.export(tmp_path / "a")) == files(plain.export(tmp_path / "b"))
    damaged = sorted((parts / "sums-00002").glob("*-00002-of-*.safetensors"))[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [f.part for f in Fold(parts).verify() if f.status != "ok"] == ["sums"]
    damaged.write_bytes(whole)
    fold.add(family[3])
    plain.add(family[3])
    assert tree(parts) == tree(plain.path)
    if method == "gram":
        add_on(InProcess(), parts, [family[4]], shard_bytes=SHARD_BYTES)
        plain.add(family[4])
        fold, plain = Fold(parts), Fold(plain.path)
        fold.remove(family[4])
        plain.remove(family[4])
        assert tree(parts) == tree(plain.path)


def files(out: Path) -> dict[str, str]:
    """All but the receipt, which tells the time."""
    return {name: digest for name, digest in tree(out).items() if name != "merganser.json"}


# what is refused


def nan(model: Model) -> None:
    model["conv.weight"][2] = float("nan")


def other_integers(model: Model) -> None:
    model["position_ids"] += 1


def smaller(model: Model) -> None:
    model["wide.weight"] = model["wide.weight"][:, :-1].contiguous()


BAD: dict[str, Callable[[list[Path], Path], Sequence[Path]]] = {
    "nowhere": lambda _, folder: [folder / "nowhere"],
    "known": lambda family, _: [family[1]],
    "twice": lambda family, _: [family[2], family[2]],
    "twin": lambda family, folder: [copied(family[1], folder / "twin")],
    "twins": lambda family, folder: [family[2], copied(family[2], folder / "twin")],
    "stranger": lambda _, folder: [save(make_base(99), folder / "stranger")],
    "none": lambda *_: [],
    "missing": lambda family, folder: [changed(family, folder, lambda m: m.pop("wide.bias"))],
    "shape": lambda family, folder: [changed(family, folder, smaller)],
    "nan": lambda family, folder: [changed(family, folder, nan)],
    "second is nan": lambda family, folder: [family[3], changed(family, folder, nan)],
    "integers": lambda family, folder: [changed(family, folder, other_integers)],
}
#: What only a task sees, so that the message names its machine.
IN_A_TASK = ("nan", "second is nan", "integers", "base", "sums")


def changed(family: list[Path], folder: Path, edit: Callable[[Model], object]) -> Path:
    model = load(family[2])
    edit(model)
    return save(model, folder / "bad")


def both_refusals(state: Path, experts: Sequence[Path], **options: Any) -> list[MerganserError]:
    """The error without a cluster and the one with it, each leaving the state as it was."""
    before, errors = tree(state), []
    for add in (Fold(state).add_all, lambda e, **o: add_on(InProcess(), state, e, shard_bytes=SHARD_BYTES, **o)):
        with pytest.raises(MerganserError) as caught:
            add(experts, **options)
        assert tree(state) == before
        errors.append(caught.value)
    return errors


@pytest.mark.parametrize("problem", BAD)
def test_what_cannot_come_in_is_refused_in_the_same_words_and_the_state_is_as_it_was(
    problem: str, family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    experts = BAD[problem](family, tmp_path)
    alone, together = both_refusals(copied(begun["mean"], tmp_path / "state"), experts)
    where = f" (on {socket.gethostname()})" if problem in IN_A_TASK else ""
    assert (type(together), together.message) == (type(alone), alone.message + where)
    assert together.hint == alone.hint


def test_a_weight_out_of_range_and_a_place_that_is_no_state_are_refused_in_the_same_words(
    family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    alone, together = both_refusals(copied(begun["gram"], tmp_path / "state"), family[2:3], weight=-1.0)
    assert str(together) == str(alone)
    with pytest.raises(StateError, match="nothing does not exist"):
        add_on(InProcess(), tmp_path / "nothing", family[2:3])


@pytest.mark.parametrize("part", ["base", "sums"])
def test_what_the_state_rests_on_is_checked_by_the_tasks(
    part: str, family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    state, base = copied(begun["mean"], tmp_path / "state"), copied(family[0], tmp_path / "base")
    (path,) = (base if part == "base" else state / "sums-00001").glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    alone, together = both_refusals(state, family[2:3], base=base)
    assert (type(together), together.message) == (type(alone), f"{alone.message} (on {socket.gethostname()})")


def test_the_state_is_held_while_its_parts_are_folded(
    family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    state, tried = copied(begun["mean"], tmp_path / "state"), []

    def meanwhile(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
        with pytest.raises(StateError, match="another process is working on"):
            Fold(state).add(family[3])
        tried.append(part)
        return fold_part(work, part, places)

    add_on(InProcess(), state, [family[2]], shard_bytes=SHARD_BYTES, fold=meanwhile)
    assert len(tried) > 2
    Fold(state).add(family[3])


def test_a_machine_with_other_files_or_without_the_state_is_refused(
    family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    state = copied(begun["mean"], tmp_path / "state")
    expert = copied(family[2], tmp_path / family[2].name)
    before = tree(state)

    def rewritten(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
        shutil.rmtree(expert)
        save(load(family[3]), expert)
        return fold_part(work, part, places)

    def elsewhere(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
        return fold_part(replace(work, folder="/nowhere", state="/nowhere"), part, places)

    with pytest.raises(ClusterError, match=r"/nowhere/sums.safetensors is not there .on .*\n.*all machines see"):
        add_on(InProcess(), state, [expert], fold=elsewhere)
    with pytest.raises(ClusterError, match="other files, or another version of merganser"):
        add_on(InProcess(), state, [expert], fold=rewritten)
    assert tree(state) == before


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_add_leaves_the_state_as_it_was(
    end: type[BaseException], family: list[Path], begun: dict[str, Path], tmp_path: Path
) -> None:
    state, done = copied(begun["mean"], tmp_path / "state"), list[Part]()
    before = tree(state)

    def interrupted(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
        if len(done) == 2:
            raise end
        done.append(part)
        return fold_part(work, part, places)

    with pytest.raises(end):
        add_on(InProcess(), state, [family[2]], shard_bytes=SHARD_BYTES, fold=interrupted)
    assert tree(state) == before


# the command line, without Ray


def test_what_cannot_come_in_is_refused_before_any_process_is_begun_and_a_dry_run_needs_none(
    run_command: Run,  # noqa: F811
    family: list[Path],
    begun: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import merganser.merging.cluster_ray as cluster_ray

    def begin(*_: object, **__: object) -> None:
        raise AssertionError("a cluster was looked for")

    monkeypatch.setattr(cluster_ray, "connected", begin)
    state = copied(begun["gram"], tmp_path / "state")
    before = tree(state)
    words = ("fold", "add", state)
    code, _, err = run_command(*words, family[1], "--ray", "local", "-q")
    assert (code, err.splitlines()[0]) == (2, f"StateError: expert-01 is in {state} already")
    code, _, err = run_command(*words, family[2], "--workers", 2)
    assert (code, err.splitlines()[0]) == (2, "ParameterError: --workers is for --ray")
    code, _, err = run_command(*words, family[2], "--ray", "local", "--device", "cuda")
    assert (code, err.splitlines()[0]) == (2, "ParameterError: --device cuda is for one process")
    code, out, err = run_command(*words, family[2], "--ray", "local", "--dry-run")
    assert (code, err) == (0, "")
    assert "peak memory of a task about" in out
    assert tree(state) == before


def test_an_address_without_a_cluster_is_named_and_the_state_is_as_it_was(
    run_command: Run,  # noqa: F811
    family: list[Path],
    begun: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import merganser.merging.cluster_ray as cluster_ray

    class Ray:
        is_initialized = staticmethod(lambda: False)
        shutdown = staticmethod(lambda: None)

    monkeypatch.setattr(cluster_ray, "_ray", Ray)
    state = copied(begun["mean"], tmp_path / "state")
    before = tree(state)
    code, _, err = run_command("fold", "add", state, family[2], "--ray", "127.0.0.1:1", "-q")
    assert code == 2
    assert err.startswith("ClusterError: no Ray cluster at 127.0.0.1:1: ")
    assert tree(state) == before
