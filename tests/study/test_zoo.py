"""A zoo: trained once, whole again after a kill, never mixed with another."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dying_training import NETWORK, make_zoo, silent, zoo_and_tasks
from safetensors.torch import load_file, save_file
from small_data import bar_task, packed
from tiny_models import tiny_bert

from merganser.checkpoints import open_source
from merganser.errors import MerganserError, ParameterError, RefError, StateError
from merganser.study.data import load_examples
from merganser.study.heads import make_head
from merganser.study.judge import Paper
from merganser.study.networks import load_encoder, new_encoder
from merganser.study.words import Task, TaskPool, Zoo
from merganser.study.zoo import base_of, missing, save_encoder, train_zoo
from support import tree

pytestmark = pytest.mark.xdist_group("zoo")  # what was killed is made once
PLACES = ("base", "experts/one", "experts/two")
TUNING = {"epochs": 1, "lr": 0.01, "batch": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a zoo that was trained without a break."""
    folder = tmp_path_factory.mktemp("made")
    make_zoo(folder)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same; data stay where they are."""
    shutil.copytree(made / "zoo", tmp_path / "zoo")
    return tmp_path


def again(made: Path, folder: Path, **changes: Any) -> None:
    node, tasks = zoo_and_tasks(made)
    options = {"zoo": node, "tasks": tasks, "folder": folder, "data": made / "data", "seed": 1, "bar": silent}
    train_zoo(**(options | changes))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def receipt(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "merganser.json").read_text())
    return content


def test_a_zoo_is_a_base_and_one_expert_a_task_and_nothing_else(made: Path) -> None:
    names = {name for name in tree(made / "zoo") if "/" not in name or name.count("/") == 1}
    files = {"model.safetensors", "config.json", "merganser.json"}
    assert names - {f"base/{file}" for file in files} == {"zoo.json", "base", "experts", "experts/one", "experts/two"}
    assert {path.name for path in (made / "zoo/experts/one").iterdir()} == files


def test_base_and_experts_have_the_same_tensors_and_other_values(made: Path) -> None:
    sources = [open_source(made / "zoo" / place) for place in PLACES]
    assert sources[0].infos == sources[1].infos == sources[2].infos
    assert len({weights(made / "zoo" / place) for place in PLACES}) == 3


def test_an_expert_is_good_at_its_task(made: Path) -> None:
    _, tasks = zoo_and_tasks(made)
    for name, task in tasks.tasks.items():
        examples = load_examples(name, task, "test", made / "data")
        score = Paper(examples, make_head(name, task, examples.classes)).judge(
            load_encoder(made / "zoo/experts" / name)
        )
        assert score.value >= 90


def test_a_receipt_tells_what_an_expert_learned_from(made: Path) -> None:
    zoo, tasks = zoo_and_tasks(made)
    found = receipt(made / "zoo/experts/two")
    examples = load_examples("two", tasks.tasks["two"], "train", made / "data")
    assert found["tasks"] == {"two": {"n": 20, "classes": 2, "digest": examples.digest}}
    assert found["training"] == zoo.finetuning.model_dump(mode="json")
    assert (found["seed"], len(found["losses"])) == (1, 2)


def test_a_base_learns_its_tasks_and_a_little_of_those_named(made: Path) -> None:
    _, tasks = zoo_and_tasks(made)
    found = receipt(made / "zoo/base")["tasks"]
    little = load_examples("two", tasks.tasks["two"], "train", made / "data").first(4)
    assert {name: part["n"] for name, part in found.items()} == {"wide": 27, "little two": 4}
    assert found["little two"]["digest"] == little.digest


def test_training_again_touches_nothing(made: Path, copied: Path) -> None:
    before = tree(copied / "zoo")
    again(made, copied / "zoo")
    assert tree(copied / "zoo") == before


@pytest.mark.parametrize("lost", ["base", "experts/one"])
def test_what_is_missing_is_trained_alone_with_the_same_bits(made: Path, copied: Path, lost: str) -> None:
    shutil.rmtree(copied / "zoo" / lost)
    node, tasks = zoo_and_tasks(made)
    assert missing(node, tasks, copied / "zoo") == [lost.rpartition("/")[2]]
    trained = []

    @contextlib.contextmanager
    def bar(name: str) -> Iterator[None]:
        trained.append(name)
        yield None

    again(made, copied / "zoo", bar=bar)
    assert trained == [lost.rpartition("/")[2]]
    assert missing(node, tasks, copied / "zoo") == []
    assert weights(copied / "zoo" / lost) == weights(made / "zoo" / lost)


def test_experts_of_some_tasks_only_are_the_same_ones(made: Path, tmp_path: Path) -> None:
    again(made, tmp_path / "zoo", only=["two"])
    assert [path.name for path in (tmp_path / "zoo/experts").iterdir()] == ["two"]
    assert weights(tmp_path / "zoo/experts/two") == weights(made / "zoo/experts/two")


#: 27 + 4 examples in batches of 8 make 5 steps an epoch of the base; experts have 2 and 3.
DEATHS = ("base:7", "base:replace-2", "one:3", "two:6", "two:replace-1")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each moment, left by a process that got SIGKILL there."""
    root = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("dying_training.py")
    command = [sys.executable, str(script), "zoo", str(root), *DEATHS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-9"] * len(DEATHS), done.stderr
    return root


@pytest.mark.parametrize("moment", DEATHS)
def test_a_killed_zoo_goes_on_and_gives_the_same_bits(made: Path, killed: Path, moment: str) -> None:
    folder = killed / moment.replace(":", "-")
    model = moment.partition(":")[0]
    assert not (folder / "zoo" / (model if model == "base" else f"experts/{model}")).exists()
    make_zoo(folder)
    for place in PLACES:
        assert weights(folder / "zoo" / place) == weights(made / "zoo" / place)
    assert set(tree(folder / "zoo")) == set(tree(made / "zoo"))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"zoo": {"finetuning": TUNING}},
        {"zoo": {"name": "other"}},
        {"zoo": {"changes": {"two": {"lr": 0.5}}}},
        {"classes": ("up", "down")},
    ],
)
def test_a_folder_that_holds_another_zoo_is_refused_and_left_alone(made: Path, copied: Path, change: Any) -> None:
    node, tasks = zoo_and_tasks(made)
    if "zoo" in change:
        change = {"zoo": Zoo.model_validate(node.model_dump() | change["zoo"])}
    if "classes" in change:
        two = tasks.tasks["two"].model_copy(update=change)
        change = {"tasks": tasks.model_copy(update={"tasks": tasks.tasks | {"two": two}})}
    before = tree(copied / "zoo")
    with pytest.raises(StateError, match=r"holds a zoo with other (seed|finetuning|name|changes|tasks)") as caught:
        again(made, copied / "zoo", **change)
    assert str(copied / "zoo") in caught.value.message
    assert "--zoo" in (caught.value.hint or "")
    assert tree(copied / "zoo") == before


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_zoo_file_that_is_damaged_is_refused_by_path(made: Path, copied: Path, content: str) -> None:
    (copied / "zoo/zoo.json").write_text(content)
    with pytest.raises(StateError) as caught:
        again(made, copied / "zoo")
    assert str(copied / "zoo") in caught.value.message


def one_expert(task: Task, **changes: Any) -> tuple[Zoo, TaskPool]:
    """A zoo of one expert over a base that learns the same task."""
    pretraining = {"tasks": {"t": task}, "training": TUNING}
    zoo = {"name": "z", "taskpool": "z", "network": NETWORK, "pretraining": pretraining, "finetuning": TUNING}
    return Zoo.model_validate(zoo | changes), TaskPool(name="z", tasks={"t": task})


def train_one(folder: Path, task: Task, **changes: Any) -> Path:
    zoo, tasks = one_expert(task, **changes)
    train_zoo(zoo, tasks, folder / "zoo", data=folder, bar=silent)
    return folder / "zoo"


def test_items_limit_an_experts_examples_to_the_first(tmp_path: Path) -> None:
    task = bar_task(tmp_path)
    zoo = train_one(tmp_path, task, finetuning={**TUNING, "items": 7})
    found = receipt(zoo / "experts/t")["tasks"]["t"]
    assert found["n"] == 7
    assert found["digest"] == load_examples("t", task, "train", tmp_path).first(7).digest


def test_a_first_try_that_fails_before_training_claims_nothing(tmp_path: Path) -> None:
    with pytest.raises(RefError):
        train_one(tmp_path, packed("missing"))
    assert not (tmp_path / "zoo").exists()
    train_one(tmp_path, bar_task(tmp_path))


def test_the_fine_tuning_of_some_experts_may_be_changed(tmp_path: Path) -> None:
    zoo, tasks = one_expert(bar_task(tmp_path), changes={"t": {"lr": 0.25, "epochs": 1}})
    train_zoo(zoo, tasks, tmp_path / "zoo", data=tmp_path, bar=silent)
    found = receipt(tmp_path / "zoo/experts/t")["training"]
    assert found == zoo.finetuning.model_copy(update={"lr": 0.25, "epochs": 1}).model_dump(mode="json")


def test_a_change_of_no_expert_or_of_no_setting_is_refused(tmp_path: Path) -> None:
    task = bar_task(tmp_path)
    with pytest.raises(ParameterError, match="changes tt, which is no task") as caught:
        train_one(tmp_path, task, changes={"tt": {}})
    assert caught.value.hint == "did you mean t?"
    with pytest.raises(ValueError, match="rate"):
        one_expert(task, changes={"t": {"rate": 0.25}})


def text_task(folder: Path) -> Task:
    lines = [f"a {word} ,{word}" for word in ("cat", "dog")] * 10
    (folder / "t.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    save_file({"prototypes": torch.eye(2, 8)}, folder / "head.safetensors")
    source = {"kind": "table", "train": str(folder / "t.csv"), "test": str(folder / "t.csv")}
    head = {"kind": "prototypes", "file": str(folder / "head.safetensors")}
    return Task.model_validate({"data": source, "head": head})


def test_experts_of_a_base_that_was_there_keep_its_tokenizer_pooler_and_frozen_tensors(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "start")
    started = {"start": str(tmp_path / "start"), "network": None, "pretraining": None}
    zoo = train_one(tmp_path, text_task(tmp_path), **started, finetuning={**TUNING, "freeze": ["embeddings.*"]})
    assert not (zoo / "base").exists()
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "start", zoo / "experts/t"))
    assert set(before) == set(after)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("embeddings.", "pooler."))}
    assert (zoo / "experts/t/tokenizer.json").read_bytes() == (tmp_path / "start/tokenizer.json").read_bytes()
    assert load_encoder(zoo / "experts/t").prepare(("a cat",)) == load_encoder(tmp_path / "start").prepare(("a cat",))


def test_the_base_of_a_zoo_is_its_start_or_in_its_folder(tmp_path: Path) -> None:
    zoo, _ = one_expert(packed("x"))
    assert base_of(zoo, tmp_path) == tmp_path / "base"
    started, _ = one_expert(packed("x"), network=None, pretraining=None, start="package:torch/nn")
    assert base_of(started, tmp_path) == Path(torch.__file__).parent / "nn"


def test_a_saved_network_is_the_same_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = new_encoder(NETWORK)
    save_encoder(encoder, tmp_path / "saved", {"note": "x"}, None)
    found = load_encoder(tmp_path / "saved").state_dict()
    assert all(torch.equal(x, found[name]) for name, x in encoder.state_dict().items())


def test_a_little_of_a_task_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    task = bar_task(tmp_path)
    pretraining = {"tasks": {"t": task}, "little": ["tt"], "training": TUNING}
    with pytest.raises(MerganserError, match="tt"):
        train_one(tmp_path, task, pretraining=pretraining)


def test_a_head_wider_than_the_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MerganserError, match="9"):
        train_one(tmp_path, bar_task(tmp_path, width=9))


def test_texts_for_a_picture_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="the task has texts"):
        train_one(tmp_path, text_task(tmp_path))


def test_missing_data_and_a_missing_start_are_refused_by_path(tmp_path: Path) -> None:
    task = bar_task(tmp_path)
    started = {"network": None, "pretraining": None, "start": str(tmp_path / "nowhere")}
    with pytest.raises(RefError, match=r"nowhere/config\.json"):
        train_one(tmp_path, task, **started)
    (tmp_path / "bars.npz").unlink()
    with pytest.raises(RefError, match=r"holds neither bars\.npz"):
        train_one(tmp_path / "again", task)
