"""Merges in parts: each tensor once and every file whole, whatever dies; with workers in this process."""

from __future__ import annotations

import json
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_helpers import pair
from adapter_helpers import written as adapter
from cluster_helpers import SHARD_BYTES, InProcess, content, evened, family, half_then_gone, recipe, squares
from command_line import run as run_command  # noqa: F401  # a fixture
from documented import make_models
from merganser.checkpoints.placed import Place
from merganser.errors import ClusterError, NonFiniteError, ParameterError, RefError
from merganser.merging import cluster_work
from merganser.merging.cluster import measure_on, measure_then_merge, merge_on, moved_bytes, summed
from merganser.merging.cluster_jobs import Part
from merganser.merging.cluster_tasks import Limits
from merganser.merging.cluster_work import Work, Written, write_part
from merganser.merging.cluster_worker import Failure
from merganser.merging.recipe import AdapterOut, Recipe
from merganser.merging.run import plan_recipes, run
from support import load, save


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return family(tmp_path_factory.mktemp("models"))


def ways(models: list[Path]) -> dict[str, list[Recipe]]:
    base, *others = models
    half = recipe("linear", others, name="half", dtype="F32")
    lora = adapter(base.parent / "lora", pair("large", 40, 36), target_modules=["large"])
    return {
        "linear": [recipe("linear", others)],
        "ties": [recipe("ties", others, base, settings={"density": 0.4})],
        "dare_ties": [recipe("dare_ties", others, base, settings={"density": 0.4, "rescale": "l1"}, seed=3)],
        "iso_c": [recipe("iso_c", others, base, dtype="BF16")],
        "gram": [recipe("gram", others, base)],
        "opcm": [recipe("opcm", others, base)],
        "opcm-stage": [
            recipe("opcm", others, base, name="first"),
            recipe("slerp", ["first"], base, settings={"t": 0.3}),
        ],
        "stages": [half, recipe("slerp", ["half"], base, settings={"t": 0.3})],
        "adapted-stage": [half, recipe("slerp", [f"half+{lora}"], base, settings={"t": 0.3})],
    }


@pytest.mark.parametrize(
    "way", ["linear", "ties", "dare_ties", "iso_c", "gram", "opcm", "opcm-stage", "stages", "adapted-stage"]
)
@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 10**9])
def test_parts_give_the_bytes_of_one_process_and_the_receipt_too(
    way: str, shard_bytes: int, models: list[Path], tmp_path: Path
) -> None:
    recipes = ways(models)[way]
    whole = run(plan_recipes(recipes), tmp_path / "whole", threads=1, shard_bytes=shard_bytes)
    write, dies = half_then_gone_at_first()
    tasks = InProcess(dies=dies)
    out = merge_on(tasks, recipes, tmp_path / "out", shard_bytes=shard_bytes, write=write)
    assert content(out) == content(whole)
    assert (len([*out.glob("*.safetensors")]) > 3) == (shard_bytes == SHARD_BYTES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_tasks_keep_no_digests_of_inputs_where_none_are_asked_for(models: list[Path], tmp_path: Path) -> None:
    recipes = ways(models)["linear"]
    for digests in (True, False):
        out = merge_on(InProcess(), recipes, tmp_path / str(digests), shard_bytes=SHARD_BYTES, digests=digests)
        read = json.loads((out / "merganser.json").read_text())["inputs"].values()
        assert [bool(source["tensors"]) for source in read] == [digests] * len(read)


def half_then_gone_at_first() -> tuple[Callable[..., Written | Failure], Callable[[int, int], bool]]:
    """A task whose first attempts at some parts leave wrong bytes, and whether the worker of an attempt dies."""
    seen = Counter[int]()

    def write(work: Work, part: Part, places: Mapping[str, Place]) -> Written | Failure:
        seen[part.number] += 1
        return (half_then_gone if seen[part.number] <= part.number % 3 else write_part)(work, part, places)

    return write, lambda number, _: 0 < seen[number] <= number % 3


def test_progress_ends_at_all_bytes_that_are_read_and_written(models: list[Path], tmp_path: Path) -> None:
    one = recipe("linear", models[1:])
    merged = plan_recipes([one])
    seen: list[tuple[int, int]] = []
    merge_on(InProcess(), [one], tmp_path / "out", shard_bytes=SHARD_BYTES, progress=lambda *at: seen.append(at))
    total = 3 * merged.plan.output_bytes
    assert sum(moved_bytes(merged, name) for name in merged.infos) == total
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_a_tasks_error_comes_back_as_what_it_is_with_the_tensor_and_the_machine_and_leaves_nothing(
    models: list[Path], tmp_path: Path
) -> None:
    model = load(models[1])
    model["wide.weight"][2, 3] = float("nan")
    bad = save(model, tmp_path / "bad")
    with pytest.raises(NonFiniteError) as caught:
        merge_on(InProcess(), [recipe("linear", [models[2], bad])], tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert caught.value.message == f"wide.weight of {bad} holds NaN or infinity (on {socket.gethostname()})"
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_a_defect_of_a_task_is_one_line_with_its_files_and_no_trace(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(cluster_work, "write_tensor", broken)
    with pytest.raises(ClusterError) as caught:
        merge_on(InProcess(), [recipe("linear", models[1:])], tmp_path / "out")
    expected = f"model.safetensors failed with ZeroDivisionError: division by zero (on {socket.gethostname()})"
    assert str(caught.value) == expected


def test_a_machine_with_other_files_or_without_the_output_is_refused(models: list[Path], tmp_path: Path) -> None:
    def elsewhere(change: Callable[[Work], Work]) -> Callable[..., Written | Failure]:
        return lambda work, part, places: write_part(change(work), part, places)

    from dataclasses import replace

    one, out = [recipe("linear", models[1:])], tmp_path / "out"
    with pytest.raises(ClusterError, match="other files, or another version of merganser"):
        merge_on(InProcess(), one, out, write=elsewhere(lambda work: replace(work, key="other")))
    with pytest.raises(ClusterError, match=r"/nowhere/model.safetensors is not there .on .*\n.*all machines see"):
        merge_on(InProcess(), one, out, write=elsewhere(lambda work: replace(work, folder="/nowhere")))
    lost = replace(one[0], slices=recipe("linear", ["gone", models[1]]).slices)
    with pytest.raises(RefError, match="gone"):
        merge_on(InProcess(), one, out, write=elsewhere(lambda work: replace(work, recipes=(lost,))))
    assert not [*tmp_path.iterdir()]


def test_relative_references_mean_the_same_to_a_task(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models[0].parent)
    one = [recipe("dare_linear", ["m1", "m2"], Path("m0"), settings={"density": 0.5})]
    whole = run(plan_recipes(one), tmp_path / "whole", threads=1)

    def away(work: Work, part: Part, places: Mapping[str, Place]) -> Written | Failure:
        with monkeypatch.context() as here:
            here.chdir(tmp_path)
            result = write_part(work, part, places)
            assert Path.cwd() == tmp_path
        return result

    assert content(merge_on(InProcess(), one, tmp_path / "out", write=away)) == content(whole)


@pytest.mark.parametrize("second", ["cluster", "one process"])
def test_an_interrupted_merge_goes_on_with_the_parts_that_were_done_wherever(
    second: str, models: list[Path], tmp_path: Path
) -> None:
    one = [recipe("linear", models[1:])]
    whole = run(plan_recipes(one), tmp_path / "whole", threads=1, shard_bytes=SHARD_BYTES)
    done: list[str] = []

    def interrupted(work: Work, part: Part, places: Mapping[str, Place]) -> Written | Failure:
        if len(done) >= 5:
            raise KeyboardInterrupt
        done.extend(part.names)
        return write_part(work, part, places)

    options = {"shard_bytes": SHARD_BYTES, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        merge_on(InProcess(), one, tmp_path / "out", write=interrupted, **options)
    assert not (tmp_path / "out").exists()
    tasks = InProcess()
    if second == "cluster":
        merge_on(tasks, one, tmp_path / "out", **options)
    else:
        run(plan_recipes(one), tmp_path / "out", threads=1, **options)
    found = content(tmp_path / "out")
    resumed = found["merganser.json"].pop("resumed")
    assert {*resumed} == {name for name in done if plan_recipes(one).infos[name].nbytes}
    expected = content(whole)
    assert expected["merganser.json"].pop("resumed") == []
    left = expected["merganser.json"]["inputs"], found["merganser.json"].pop("inputs")
    for ref, entry in expected["merganser.json"].pop("inputs").items():
        assert left[1][ref]["tensors"] == {n: d for n, d in entry["tensors"].items() if n not in resumed}
    assert found == expected


def test_figures_of_whole_models_are_exact_sums_whatever_the_split(models: list[Path]) -> None:
    one = [recipe("task_arithmetic", models[1:], models[0])]
    found = measure_on(InProcess(dies=lambda n, time: time <= n % 2), one, squares, limits=Limits(workers=3))
    merged = plan_recipes(one)
    assert [*found] == [*merged.infos]
    assert found == {name: squares(merged, name) for name in merged.infos}
    backwards = dict(reversed(found.items()))
    assert summed(found) == summed(backwards) == summed(measure_on(InProcess(), one, squares))


def test_two_phases_are_the_merge_with_what_the_first_one_measured(models: list[Path], tmp_path: Path) -> None:
    one = [recipe("task_arithmetic", models[1:], models[0])]
    sums = summed({name: squares(plan_recipes(one), name) for name in plan_recipes(one).infos})
    whole = run(plan_recipes(evened(one, sums)), tmp_path / "whole", threads=1, shard_bytes=SHARD_BYTES)
    out = measure_then_merge(
        InProcess(), one, squares, lambda found: evened(one, found), tmp_path / "out", shard_bytes=SHARD_BYTES
    )
    assert content(out) == content(whole)


def test_adapters_are_merged_by_one_process(tmp_path: Path) -> None:
    make_models(tmp_path)
    loras = [tmp_path / "models" / f"{name}-lora" for name in ("code", "chat")]
    one = replace(recipe("linear", loras), adapter=AdapterOut(4))
    with pytest.raises(ParameterError, match="adapters are merged with each other by one process"):
        merge_on(InProcess(), [one], tmp_path / "out")


# the command line, without Ray

Run = Callable[..., tuple[int, str, str]]


def written(models: list[Path], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"method": "linear", "models": [str(m) for m in models[1:]]}))
    return path


def test_ray_that_is_missing_is_named_with_the_extra(
    run_command: Run,  # noqa: F811
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run_command("merge", written(models, tmp_path), tmp_path / "out", "--ray", "local")
    assert code == 2
    assert err == 'ParameterError: --ray needs ray, which is missing\nhint: pip install "merganser[cluster]"\n'
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_and_adapters_are_refused_before_any_process_is_begun(
    run_command: Run,  # noqa: F811
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("merganser.merging.cluster_ray.connected", lambda *_, **__: pytest.fail("Ray was begun"))
    words = ("merge", written(models, tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for out, more, says in (
        (tmp_path / "out", (), "out exists"),
        (tmp_path / "out", ("--overwrite",), "it was not made here"),
        (models[1] / "out", (), "OutputError"),
    ):
        code, _, err = run_command(*words, out, *more, "--ray", "local")
        assert code == 2
        assert says in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    make_models(tmp_path)
    loras = [str(tmp_path / "models" / f"{name}-lora") for name in ("code", "chat")]
    (tmp_path / "adapters.yaml").write_text(json.dumps({"method": "linear", "models": loras, "adapter": {"rank": 4}}))
    code, _, err = run_command("merge", tmp_path / "adapters.yaml", tmp_path / "new", "--ray", "local")
    assert code == 2
    assert "adapters are merged with each other by one process" in err


def test_workers_without_ray_are_refused(run_command: Run, models: list[Path], tmp_path: Path) -> None:  # noqa: F811
    code, _, err = run_command("merge", written(models, tmp_path), tmp_path / "out", "--workers", 2)
    assert (code, err.splitlines()[0]) == (2, "ParameterError: --workers is for --ray")
