"""A study measures what it says, goes on after kill -9, grows by methods and orders, and refuses to be mixed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from small import TASKS, times_out, write, write_groups

pytestmark = pytest.mark.xdist_group("study-runs")  # its studies are run once

Run = Callable[..., tuple[int, str, str]]


class Shop:
    """A zoo that is trained, and the words of a study over it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.groups = write_groups(root / "groups")
        self.zoo = root / "zoo"

    def words(self, out: Path, *more: str) -> tuple[object, ...]:
        return ("study", *(more or ("study=small",)), "--config-dir", self.groups, "--zoo", self.zoo, "--out", out)

    def records(self, out: Path) -> dict[str, Any]:
        runs = out / "runs"
        return {str(p.relative_to(runs)): json.loads(p.read_text()) for p in sorted(runs.rglob("seed-*.json"))}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("shop"))
    done = subprocess.run(
        [sys.executable, "-m", "merganser", *map(str, shop.words(shop.root / "whole")), "--quiet"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return shop


def test_study_leaves_one_record_a_method_and_order_and_a_report(shop: Shop) -> None:
    out = shop.root / "whole"
    assert set(shop.records(out)) == {f"{m}/seed-{s}.json" for m in ("mean", "gram", "opcm") for s in (0, 1)}
    assert {"report.md", "report.html", "scores.json", "controls.json", "curve-1.png"} <= {
        p.name for p in out.iterdir()
    }
    assert not any((out / "states").iterdir())
    assert not any((out / "merged").iterdir())


def test_every_number_has_its_n_and_the_newest_and_last_rows_use_all_items(shop: Shop) -> None:
    for record in shop.records(shop.root / "whole").values():
        for t, row in enumerate(record["rows"], 1):
            counts = {task: score["n"] for task, score in row["scores"].items()}
            whole = {row["arrived"]} if t < len(TASKS) else set(TASKS)
            assert counts == {task: 599 if task in whole else 50 for task in TASKS}
            assert all(score["unit"] == "%" and len(score["digest"]) == 64 for score in row["scores"].values())


def shuffled_digits(shuffle: int) -> tuple[np.ndarray, np.ndarray]:
    """Test images of a task by loops: every third image, its 2 x 2 patches in a fixed order, in [-1, 1]."""
    digits = load_digits()
    order = np.random.default_rng(shuffle).permutation(16)
    images, labels = [], []
    for i in range(2, len(digits.target), 3):
        x = np.zeros((8, 8))
        for place, patch in enumerate(order):
            r, c, pr, pc = place // 4 * 2, place % 4 * 2, patch // 4 * 2, patch % 4 * 2
            x[r : r + 2, c : c + 2] = digits.images[i][pr : pr + 2, pc : pc + 2] * 15
        images.append(x / 127.5 - 1)
        labels.append(digits.target[i])
    return np.array(images), np.array(labels)


def accuracy(w: dict[str, np.ndarray], prototypes: np.ndarray, shuffle: int) -> float:
    """The small network in float64."""
    images, labels = shuffled_digits(shuffle)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        return centred / np.sqrt(x.var(1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * 0.5 * (1 + torch.erf(torch.from_numpy(x) / 2**0.5).numpy())

    x = linear(images.reshape(len(images), 64), "stem")
    x = x + linear(gelu(linear(norm(x, "norms.0"), "ups.0")), "downs.0")
    y = linear(norm(x, "norm"), "project")
    unit = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    return float(100 * ((y @ unit.T).argmax(1) == labels).mean())


def test_controls_and_the_mean_are_what_float64_loops_give(shop: Shop) -> None:
    prototypes = load_file(shop.groups / "prototypes.safetensors")["prototypes"].double().numpy()
    base, *experts = (
        {n: x.double().numpy() for n, x in load_file(shop.zoo / place / "model.safetensors").items()}
        for place in ("base", *(f"experts/{task}" for task in TASKS))
    )
    merged = {n: np.mean([e[n] for e in experts], axis=0) for n in base}
    controls = json.loads((shop.root / "whole" / "controls.json").read_text())
    final = shop.records(shop.root / "whole")["mean/seed-0.json"]["rows"][-1]["scores"]
    for i, task in enumerate(TASKS):
        one = 100 / 599 + 1e-9  # an image on the edge may fall to either side
        assert controls["zero_shot"][task]["value"] == pytest.approx(accuracy(base, prototypes, i + 1), abs=one)
        assert controls["experts"][task]["value"] == pytest.approx(accuracy(experts[i], prototypes, i + 1), abs=one)
        assert final[task]["value"] == pytest.approx(accuracy(merged, prototypes, i + 1), abs=one)


def test_orders_differ_and_methods_of_sums_end_alike_in_all_of_them(shop: Shop) -> None:
    records = shop.records(shop.root / "whole")
    assert records["mean/seed-0.json"]["order"] != records["mean/seed-1.json"]["order"]
    scores = json.loads((shop.root / "whole" / "scores.json").read_text())["methods"]
    for method in ("mean", "gram"):
        assert scores[method]["acc"]["max"] - scores[method]["acc"]["min"] <= 100 / 599 / 3 + 1e-9
        assert scores[method]["acc"]["orders"] == 2


def test_acc_and_bwt_are_those_of_the_records(shop: Shop) -> None:
    records = shop.records(shop.root / "whole")
    scores = json.loads((shop.root / "whole" / "scores.json").read_text())["methods"]
    for method in ("mean", "gram", "opcm"):
        accs, bwts = [], []
        for seed in (0, 1):
            record = records[f"{method}/seed-{seed}.json"]
            last = record["rows"][-1]["scores"]
            accs.append(sum(last[task]["value"] for task in TASKS) / 3)
            own = {row["arrived"]: row["scores"][row["arrived"]]["value"] for row in record["rows"]}
            bwts.append(sum(last[task]["value"] - own[task] for task in record["order"][:-1]) / 2)
        assert scores[method]["acc"]["mean"] == pytest.approx(sum(accs) / 2)
        assert scores[method]["bwt"]["mean"] == pytest.approx(sum(bwts) / 2)
        assert scores[method]["bwt_over_T"]["mean"] == pytest.approx(sum(bwts) / 2 * 2 / 3)


def test_killed_study_goes_on_to_the_same_numbers(shop: Shop, tmp_path: Path) -> None:
    """Killed three times: soon after its controls, and twice some seconds after it was begun again."""
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "merganser", *map(str, shop.words(out)), "--quiet"]
    for after_s in (0.4, 3.0, 5.0):
        process = subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / "controls.json").exists():
            time.sleep(0.01)
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    found, whole = shop.records(out), shop.records(shop.root / "whole")
    assert {n: times_out(r) for n, r in found.items()} == {n: times_out(r) for n, r in whole.items()}


def test_half_removed_folders_of_a_killed_study_do_not_stop_it(shop: Shop, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    (out / "merged" / "mean").mkdir(parents=True)
    (out / "merged" / "mean" / "model.safetensors").write_bytes(b"half")
    (out / "states" / "sums-1-seed-0").mkdir(parents=True)
    (out / "states" / "sums-1-seed-0" / "base.json").write_text("{}")
    assert run(*shop.words(out), "--quiet") == (0, "", "")
    found, whole = shop.records(out), shop.records(shop.root / "whole")
    assert {n: times_out(r) for n, r in found.items()} == {n: times_out(r) for n, r in whole.items()}


def test_method_or_order_that_comes_later_is_added_and_nothing_is_measured_again(
    shop: Shop, tmp_path: Path, run: Run
) -> None:
    out = Path(shutil.copytree(shop.root / "whole", tmp_path / "out"))
    before = shop.records(out)
    more = ("study=small", "study.methods=[mean,gram,opcm,task_arithmetic]", "study.seeds=[0,1,2]")
    assert run(*shop.words(out, *more), "--quiet") == (0, "", "")
    after = shop.records(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == 12
    assert {r["seed"] for r in after.values()} == {0, 1, 2}


def test_other_settings_of_a_method_are_refused_and_leave_the_records(shop: Shop, tmp_path: Path, run: Run) -> None:
    out = Path(shutil.copytree(shop.root / "whole", tmp_path / "out"))
    write(shop.groups / "method/gram.yaml", "method: gram\nlabel: Gram\nsettings: {eps: 0.5}\n")
    try:
        code, _, error = run(*shop.words(out, "method=gram", "modelpool=small", "taskpool=small", "seed=0"))
    finally:
        shutil.rmtree(shop.groups / "method")
    assert code == 2
    assert "holds a study with other" in error or "was measured with other settings" in error
    assert shop.records(out) == shop.records(shop.root / "whole")


def test_study_of_other_models_in_the_same_folder_is_refused(shop: Shop, tmp_path: Path, run: Run) -> None:
    out = Path(shutil.copytree(shop.root / "whole", tmp_path / "out"))
    zoo = Path(shutil.copytree(shop.zoo, tmp_path / "zoo"))
    words = ("study", "study=small", "--config-dir", shop.groups, "--zoo", zoo, "--out", out)
    code, _, error = run(*words)
    assert code == 2
    assert "holds a study with other models" in error
    assert "hint: name another folder with --out" in error


def test_expert_of_another_base_is_refused_by_name(shop: Shop, tmp_path: Path, run: Run) -> None:
    zoo = Path(shutil.copytree(shop.zoo, tmp_path / "zoo"))
    stranger = {n: torch.randn_like(x) * 50 for n, x in load_file(zoo / "experts/second/model.safetensors").items()}
    save_file(stranger, zoo / "experts/second/model.safetensors")
    code, _, error = run("study", "study=small", "--config-dir", shop.groups, "--zoo", zoo, "--out", tmp_path / "out")
    assert code == 2
    assert "experts/second" in error
    assert "hardly tuned from it" in error


def test_single_run_and_multirun_take_the_words_of_hydra(shop: Shop, tmp_path: Path, run: Run) -> None:
    one = ("method=task_arithmetic", "method.settings.scale=0.5", "modelpool=small", "taskpool=small", "seed=3")
    assert run(*shop.words(tmp_path / "one", *one), "--quiet") == (0, "", "")
    (record,) = shop.records(tmp_path / "one").values()
    assert (record["method"]["settings"], record["seed"]) == ({"scale": 0.5}, 3)
    several = ("-m", "method=mean,opcm", "modelpool=small", "taskpool=small", "seed=0,1")
    assert run(*shop.words(tmp_path / "several", *several), "--quiet") == (0, "", "")
    assert set(shop.records(tmp_path / "several")) == {f"{m}/seed-{s}.json" for m in ("mean", "opcm") for s in (0, 1)}


def test_dry_run_says_what_would_be_compared_and_writes_nothing(shop: Shop, tmp_path: Path, run: Run) -> None:
    code, text, error = run(*shop.words(tmp_path / "out"), "--dry-run")
    assert (code, error) == (0, "")
    assert "A small study: 3 models of small, mean, gram, opcm; orders 0, 1; test split" in text
    assert not (tmp_path / "out").exists()


def test_model_that_is_not_there_is_named(shop: Shop, tmp_path: Path, run: Run) -> None:
    words = ("study=small", "modelpool.zoo=null", f"modelpool.models.second={tmp_path}/nowhere")
    code, _, error = run(*shop.words(tmp_path / "out", *words))
    assert code == 2
    assert f"second of small is not at {tmp_path}/nowhere" in error
    assert not (tmp_path / "out" / "runs").exists()


def test_variant_is_its_method_with_other_settings(shop: Shop, tmp_path: Path, run: Run) -> None:
    words = ("study=small", "study.methods=[half]", "+study.variants={half:{of:task_arithmetic,settings:{scale:0.5}}}")
    assert run(*shop.words(tmp_path / "variant", *words, "study.seeds=[1]"), "--quiet") == (0, "", "")
    (variant,) = shop.records(tmp_path / "variant").values()
    plain = ("method=task_arithmetic", "method.settings.scale=0.5", "modelpool=small", "taskpool=small", "seed=1")
    assert run(*shop.words(tmp_path / "plain", *plain), "--quiet") == (0, "", "")
    (other,) = shop.records(tmp_path / "plain").values()
    assert variant["method"]["label"] == "task arithmetic .3, scale 0.5"
    assert [row["weights"] for row in variant["rows"]] == [row["weights"] for row in other["rows"]]


def test_unknown_method_of_a_study_names_the_nearest(shop: Shop, tmp_path: Path, run: Run) -> None:
    code, _, error = run(*shop.words(tmp_path / "out", "study=small", "study.methods=[gramm]"))
    assert code == 2
    assert "there is no method 'gramm'" in error
    assert "did you mean gram?" in error
