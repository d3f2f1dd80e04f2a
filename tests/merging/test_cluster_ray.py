"""Merges and folds over two Ray nodes of one processor: the bytes of one process, whatever is killed on the way."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster_helpers import SHARD_BYTES, WAIT_S, content, evened, family, half_then_gone, recipe, squares, until
from command_line import run as run_command  # noqa: F401  # a fixture
from merganser.checkpoints.placed import Place
from merganser.continual import Fold
from merganser.errors import ClusterError, NonFiniteError, ParameterError, StateError
from merganser.merging import cluster_ray
from merganser.merging.cluster import measure_on, measure_then_merge, merge_on, summed
from merganser.merging.cluster_fold import Folded, FoldWork, add_on, fold_part
from merganser.merging.cluster_jobs import Part
from merganser.merging.cluster_ray import RayTasks, connected
from merganser.merging.cluster_tasks import Limits
from merganser.merging.cluster_work import Work, Written, write_part
from merganser.merging.cluster_worker import Failure
from merganser.merging.run import plan_recipes, run
from support import load, save, tree

pytestmark = [
    pytest.mark.xdist_group("ray"),  # one worker starts Ray, not every one
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its log files open
]

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    "RAY_DISABLE_MEMORY_MONITOR": "1",
    "RAY_memory_monitor_refresh_ms": "0",
}
PATHS = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
Run = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class TwoNodes:
    """The cluster, and this process's way to it."""

    tasks: RayTasks
    address: str


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", PATHS)  # so that workers find the helpers
        import ray
        from ray.cluster_utils import Cluster

        size = {"num_cpus": 1, "object_store_memory": 80_000_000, "memory": 2_000_000_000}
        cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
        try:
            cluster.add_node(**size)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield TwoNodes(RayTasks(ray), cluster.address)
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return family(tmp_path_factory.mktemp("models"))


def test_no_cluster_at_an_address_is_said_at_once_and_no_address_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_ray, "ANSWER_S", 0.5)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"no Ray cluster at {address}: timed out"), connected(address):
            pass
        with ThreadPoolExecutor(1) as pool:
            web = pool.submit(_answer_as_web_server, server)
            with pytest.raises(ClusterError, match=f"at {address}: what answers there is something"):
                connected(address).__enter__()
            web.result()
    with pytest.raises(ClusterError, match=r"no Ray cluster at 127.0.0.1:1: .*refused"), connected("127.0.0.1:1"):
        pass
    with pytest.raises(ParameterError, match="--ray is 'nonsense'; it is local, auto or HOST:PORT"):
        connected("nonsense").__enter__()
    assert time.monotonic() - began < 10


def _answer_as_web_server(server: socket.socket) -> None:
    server.settimeout(10)
    for _ in range(2):  # the first one is gone already
        with contextlib.suppress(OSError), server.accept()[0] as link:
            link.recv(100)
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_two_nodes_together_write_the_bytes_of_one_process(nodes: TwoNodes, models: list[Path], tmp_path: Path) -> None:
    one = [recipe("dare_ties", models[1:], models[0], settings={"density": 0.4, "rescale": "l1"}, seed=3)]
    whole = run(plan_recipes(one), tmp_path / "whole", threads=1, shard_bytes=SHARD_BYTES)
    seen = tmp_path / "seen"
    seen.mkdir()

    def both(work: Work, part: Part, places: Mapping[str, Place]) -> Written | Failure:
        import ray

        (seen / ray.get_runtime_context().get_node_id()).touch()
        end = time.monotonic() + 20
        while len([*seen.iterdir()]) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return write_part(work, part, places)

    merge_on(nodes.tasks, one, tmp_path / "out", shard_bytes=SHARD_BYTES, write=both)
    assert len([*seen.iterdir()]) == 2
    assert content(tmp_path / "out") == content(whole)


def test_the_command_line_does_the_same_with_an_address(
    run_command: Run,  # noqa: F811
    nodes: TwoNodes,
    models: list[Path],
    tmp_path: Path,
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"method": "linear", "models": [str(m) for m in models[1:]]}))
    words = ("--shard-bytes", SHARD_BYTES)
    assert run_command("merge", path, tmp_path / "whole", *words)[0] == 0
    done = run_command("merge", path, tmp_path / "out", *words, "--ray", nodes.address, "--workers", 2)
    assert done == (0, f"wrote {tmp_path / 'out'}\n", "")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    code, _, err = run_command("merge", path, tmp_path / "more", "--ray", "127.0.0.1:1")
    assert (code, err.splitlines()[0]) == (
        2,
        f"ClusterError: this process belongs to the cluster {nodes.address} already, not to 127.0.0.1:1",
    )


def test_a_tasks_error_is_ours_and_not_rays_and_nothing_is_left(
    nodes: TwoNodes, models: list[Path], tmp_path: Path
) -> None:
    model = load(models[1])
    model["wide.weight"][2, 3] = float("nan")
    bad = save(model, tmp_path / "bad")
    with pytest.raises(NonFiniteError) as caught:
        merge_on(nodes.tasks, [recipe("linear", [models[2], bad])], tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert str(caught.value).startswith(f"wide.weight of {bad} holds NaN or infinity (on ")
    assert "ray" not in str(caught.value).lower().replace(str(bad).lower(), "")
    assert "\n" not in caught.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_what_no_machine_has_room_for_is_refused(nodes: TwoNodes, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"a task takes 3 processors and .* the most are 1 and 2,000,000,000"):
        merge_on(nodes.tasks, [recipe("linear", models[1:])], tmp_path / "out", limits=Limits(threads=3))
    assert not [*tmp_path.iterdir()]


def test_two_phases_give_the_bits_of_one_process(nodes: TwoNodes, models: list[Path], tmp_path: Path) -> None:
    one = [recipe("task_arithmetic", models[1:], models[0])]
    merged = plan_recipes(one)
    alone = {name: squares(merged, name) for name in merged.infos}
    assert measure_on(nodes.tasks, one, squares) == alone
    whole = run(plan_recipes(evened(one, summed(alone))), tmp_path / "whole", threads=1)
    out = measure_then_merge(nodes.tasks, one, squares, lambda sums: evened(one, sums), tmp_path / "out")
    assert content(out) == content(whole)


def test_a_worker_killed_in_the_middle_of_its_part_is_replaced(
    nodes: TwoNodes, models: list[Path], tmp_path: Path
) -> None:
    one = [recipe("linear", models[1:])]
    whole = run(plan_recipes(one), tmp_path / "whole", threads=1, shard_bytes=SHARD_BYTES)
    pids = tmp_path / "pids"
    pids.mkdir()

    def waiting(work: Work, part: Part, places: Mapping[str, Place]) -> Written | Failure:
        first = part.number == 2 and not [*pids.iterdir()]
        if part.number == 2:
            (pids / f"{os.getpid()}.new").touch()
        if not first:
            return write_part(work, part, places)
        half_then_gone(work, part, places)
        (pids / f"{os.getpid()}.new").rename(pids / str(os.getpid()))
        time.sleep(90)
        raise AssertionError("nobody killed this process")

    def kill() -> None:
        (path,) = until(lambda: [p for p in pids.iterdir() if p.name.isdecimal()], "the part was half written")
        os.kill(int(path.name), signal.SIGKILL)

    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill)
        merge_on(nodes.tasks, one, tmp_path / "out", shard_bytes=SHARD_BYTES, write=waiting)
        killer.result()
    assert time.monotonic() - began < WAIT_S
    assert len([*pids.iterdir()]) == 2, "another process did it once more"
    assert content(tmp_path / "out") == content(whole)


DRIVER = """
    import json, os, sys, time
    from pathlib import Path
    from cluster_helpers import SHARD_BYTES, recipe
    from merganser.merging.cluster import merge_on
    from merganser.merging.cluster_ray import connected
    from merganser.merging.cluster_tasks import Limits
    from merganser.merging.cluster_work import write_part

    address, out, pids, *models = sys.argv[1:]

    def slow(work, part, places):
        (Path(pids) / str(os.getpid())).touch()
        if (Path(work.folder) / ".journal").read_text().count("\\n") > 3:  # no part after that ends by itself
            time.sleep(90)
        return write_part(work, part, places)

    with connected(address) as tasks:
        options = {"shard_bytes": SHARD_BYTES, "resume": True, "limits": Limits(workers=1)}
        merge_on(tasks, [recipe("linear", models)], Path(out), write=slow, **options)
"""


def test_a_killed_driver_leaves_nothing_half_written_and_the_next_goes_on(
    nodes: TwoNodes, models: list[Path], tmp_path: Path
) -> None:
    one = [recipe("linear", [str(m) for m in models[1:]])]
    whole = run(plan_recipes(one), tmp_path / "whole", threads=1, shard_bytes=SHARD_BYTES)
    pids, out = tmp_path / "pids", tmp_path / "out"
    pids.mkdir()
    words = [sys.executable, "-c", textwrap.dedent(DRIVER), nodes.address, out, pids, *models[1:]]
    driver = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        finished = until(lambda: driver.poll() is not None or _journal(tmp_path), "a part was finished")
        assert driver.poll() is None, driver.stderr.read() if driver.stderr is not None else ""
    finally:
        driver.kill()
        driver.communicate()
    assert not out.exists()
    (leftover,) = tmp_path.glob(".out.partial-*")
    assert not (leftover / "merganser.json").exists()
    until(lambda: not [p for p in pids.iterdir() if Path("/proc", p.name).exists()], "its workers were gone")
    finished = _journal(tmp_path)
    begun = tmp_path / "begun"
    begun.mkdir()

    def noted(work: Work, part: Part, places: Mapping[str, Place]) -> Written | Failure:
        for name in part.names:
            (begun / name).touch()
        return write_part(work, part, places)

    assert finished < {*plan_recipes(one).infos}
    merge_on(nodes.tasks, one, out, shard_bytes=SHARD_BYTES, resume=True, write=noted)
    found, expected = content(out), content(whole)
    assert {*found["merganser.json"]["resumed"]} == finished
    assert not finished & {p.name for p in begun.iterdir()}
    assert {n: f for n, f in found.items() if n != "merganser.json"} == {
        n: f for n, f in expected.items() if n != "merganser.json"
    }
    assert found["merganser.json"]["outputs"] == expected["merganser.json"]["outputs"]
    assert not [*tmp_path.glob(".out.partial-*")]


def _journal(folder: Path) -> set[str]:
    """Names of the tensors, of any size, that a writer's journal says are there."""
    lines = [line for path in folder.glob(".out.partial-*/.journal") for line in path.read_text().split("\n")[1:-1]]
    return {json.loads(line.partition(" ")[2]) for line in lines} - {"empty.weight"}


# folds


@pytest.fixture(scope="module")
def begun(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state that the first expert is in, and beside it what one process makes of it with the second one."""
    folder = tmp_path_factory.mktemp("begun")
    fold = Fold.init(models[0], folder / "state", "gram", threads=1)
    fold.add(models[1], threads=1)
    Fold(shutil.copytree(fold.path, folder / "whole")).add(models[2], threads=1, shard_bytes=SHARD_BYTES)
    return folder


def test_two_nodes_fold_an_expert_into_the_bytes_of_one_process(
    run_command: Run,  # noqa: F811
    nodes: TwoNodes,
    models: list[Path],
    begun: Path,
    tmp_path: Path,
) -> None:
    state = Path(shutil.copytree(begun / "state", tmp_path / "state"))
    before = tree(state)
    words = ("fold", "add", state, models[2], "--shard-bytes", SHARD_BYTES, "-q", "--ray")
    code, _, err = run_command(*words, "127.0.0.1:1")
    assert (code, err.split(" ", 1)[0], tree(state)) == (2, "ClusterError:", before)
    broken = load(models[2])
    broken["conv.weight"][1] = float("nan")
    bad = save(broken, tmp_path / "bad")
    code, _, err = run_command(*words[:3], bad, *words[4:], nodes.address)
    assert (code, err.split(" (on ", 1)[0]) == (2, f"NonFiniteError: conv.weight of {bad} holds NaN or infinity")
    assert tree(state) == before
    assert run_command(*words, nodes.address, "--workers", 2) == (0, "", "")
    assert tree(state) == tree(begun / "whole")
    assert len([*state.glob("sums-00002/*.safetensors")]) > 4
    whole = Fold(shutil.copytree(begun / "whole", tmp_path / "whole"))
    whole.reweight(models[1].name, 0.5, threads=1, shard_bytes=SHARD_BYTES)
    more = ("--shard-bytes", SHARD_BYTES, "-q", "--ray", nodes.address)
    assert run_command("fold", "reweight", state, models[1].name, "0.5", *more) == (0, "", "")
    assert tree(state) == tree(whole.path)
    whole.remove(models[1].name, threads=1, shard_bytes=SHARD_BYTES)
    assert run_command("fold", "remove", state, models[1].name, *more) == (0, "", "")
    assert tree(state) == tree(whole.path)


def test_a_worker_killed_while_it_folds_is_replaced(
    nodes: TwoNodes, models: list[Path], begun: Path, tmp_path: Path
) -> None:
    state, pids = Path(shutil.copytree(begun / "state", tmp_path / "state")), tmp_path / "pids"
    pids.mkdir()

    def killed(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
        if part.number == 2:
            first = not [*pids.iterdir()]
            (pids / str(os.getpid())).touch()
            if first:
                half_then_gone(work, part, places, fold_part)
                os.kill(os.getpid(), signal.SIGKILL)
        return fold_part(work, part, places)

    add_on(nodes.tasks, state, [models[2]], shard_bytes=SHARD_BYTES, fold=killed)
    assert len([*pids.iterdir()]) == 2, "another process did it once more"
    assert tree(state) == tree(begun / "whole")


FOLD_DRIVER = """
    import os, sys, time
    from pathlib import Path
    from cluster_helpers import SHARD_BYTES, half_then_gone
    from merganser.merging.cluster_fold import add_on, fold_part
    from merganser.merging.cluster_ray import connected

    address, state, pids, expert = sys.argv[1:]

    def slow(work, part, places):
        (Path(pids) / str(os.getpid())).touch()
        if part.number < 3:
            half_then_gone(work, part, places, fold_part)
            (Path(pids) / f"{part.number}.half").touch()
            time.sleep(90)
        return fold_part(work, part, places)

    with connected(address) as tasks:
        add_on(tasks, state, [expert], shard_bytes=SHARD_BYTES, fold=slow)
"""


def test_a_killed_driver_leaves_the_old_state_and_the_next_add_goes_through(
    nodes: TwoNodes, models: list[Path], begun: Path, tmp_path: Path
) -> None:
    state, pids = Path(shutil.copytree(begun / "state", tmp_path / "state")), tmp_path / "pids"
    before = tree(state)
    pids.mkdir()
    words = [sys.executable, "-c", textwrap.dedent(FOLD_DRIVER), nodes.address, state, pids, models[2]]
    driver = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: driver.poll() is not None or [*pids.glob("*.half")], "a part was half written")
        assert driver.poll() is None, driver.stderr.read() if driver.stderr is not None else ""
        with pytest.raises(StateError, match="another process is working on"):
            Fold(state).add(models[2])
    finally:
        driver.kill()
        driver.communicate()
    left = tree(state)
    assert {name: digest for name, digest in left.items() if not name.startswith(".sums-00002")} == before
    assert len(left) > len(before)
    assert {f.status for f in Fold(state).verify()} == {"ok"}
    until(lambda: not [p for p in pids.iterdir() if Path("/proc", p.name).exists()], "its workers were gone")
    add_on(nodes.tasks, state, [models[2]], shard_bytes=SHARD_BYTES)
    assert tree(state) == tree(begun / "whole")
