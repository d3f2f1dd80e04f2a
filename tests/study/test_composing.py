"""Composing: shipped configurations, overrides, and every word that means nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from merganser.continual.kinds import check_settings
from merganser.errors import MerganserError, ParameterError
from merganser.study.composing import CONF, GROUPS, Plan, expanded, merged_plans, names_in, plan_of, study_of, zoo_of
from merganser.study.networks import new_encoder
from merganser.study.words import MethodNode, Zoo
from merganser.study.words_agents import AgentsNode
from merganser.study.words_apart import KINDS

POOLS = ("modelpool=vision8", "taskpool=vision8")


def shipped(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", shipped("method"))
def test_every_method_composes_with_settings_that_its_method_takes(name: str) -> None:
    plan = plan_of([f"method={name}", *POOLS])
    node = plan.methods[name]
    check_settings(node.method, node.settings)
    assert (plan.study.methods, plan.study.seeds) == ((name,), (0,))
    assert node.source


def content_of(name: str) -> dict[str, Any]:
    """What a study's file says; one that only changes another has the rest from it."""
    content = yaml.safe_load((CONF / "study" / f"{name}.yaml").read_text())
    others = [other for other in content.get("defaults", []) if isinstance(other, str) and other != "_self_"]
    return (content_of(others[0]) if others else {}) | content["study"]


def kind_of(name: str) -> str:
    """What kind a study is."""
    return content_of(name).get("kind", "fold")


@pytest.mark.parametrize("name", [n for n in shipped("study") if kind_of(n) == "fold"])
def test_every_study_composes(name: str) -> None:
    content = yaml.safe_load((CONF / "study" / f"{name}.yaml").read_text())["study"]
    variants = content.get("variants", {})
    named = (set(content["methods"]) - set(variants)) | {variant["of"] for variant in variants.values()}
    assert named <= set(shipped("method"))  # every one of them composes
    plan = plan_of([f"study={name}", "study.methods=[gram]"])
    assert plan.study.name == name
    assert list(plan.study.seeds) == content["seeds"]
    assert list(plan.tasks.tasks) == list(plan.models.models)


@pytest.mark.parametrize("name", [n for n in shipped("study") if kind_of(n) in KINDS])
def test_every_study_of_networks_apart_composes_with_networks_that_can_be_made(name: str) -> None:
    content = content_of(name)
    node = study_of([f"study={name}", "zoo_folder=/data/zoo"])
    assert isinstance(node, KINDS[content["kind"]])
    assert (node.name, node.zoo, list(node.networks)) == (name, "/data/zoo", list(content["networks"]))
    assert study_of([f"study={name}"]).zoo == content["zoo"]
    for network in node.networks.values():
        new_encoder({**network.network, "width": 3})


@pytest.mark.parametrize("name", [n for n in shipped("study") if kind_of(n) == "agents"])
def test_every_study_of_agents_composes_with_runs_that_can_be_made(name: str) -> None:
    node = study_of([f"study={name}", "zoo_folder=/data/zoo"])
    assert isinstance(node, AgentsNode)
    assert (node.name, node.zoo) == (name, "/data/zoo")
    assert set(node.chosen) <= set(node.methods)
    for method in node.chosen:
        new_encoder({"width": 3, **dict(node.config(method, node.seeds[0]).network)})


def test_a_study_of_another_kind_is_a_plan() -> None:
    found = study_of(["study=vision8", "study.methods=[gram]"])
    assert isinstance(found, Plan)
    assert found == plan_of(["study=vision8", "study.methods=[gram]"])


def test_a_study_has_its_methods_in_its_order() -> None:
    plan = plan_of(["study=vision8"])
    content = yaml.safe_load((CONF / "study/vision8.yaml").read_text())["study"]
    assert list(plan.methods) == list(plan.study.methods) == content["methods"]


@pytest.mark.parametrize("group", ["modelpool", "taskpool"])
def test_every_pool_belongs_to_a_study(group: str) -> None:
    used = set()
    for path in (CONF / "study").glob("*.yaml"):
        for override in yaml.safe_load(path.read_text()).get("defaults", []):
            if isinstance(override, str):  # another study
                continue
            used |= {value for key, value in override.items() if key == f"override /{group}"}
    assert sorted(used) == shipped(group)


@pytest.mark.parametrize("group", ["modelpool", "taskpool", "zoo", "study"])
def test_every_node_is_named_as_its_file(group: str) -> None:
    for name in shipped(group):
        content = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
        assert (content["study"] if group == "study" else content)["name"] == name


@pytest.mark.parametrize("name", shipped("zoo"))
def test_every_zoo_composes_with_tasks_that_it_knows(name: str) -> None:
    zoo, tasks = zoo_of(name)
    assert (zoo.name, tasks.name) == (name, zoo.taskpool)
    if zoo.pretraining is not None:
        assert set(zoo.pretraining.little) <= set(tasks.tasks)


def test_every_file_is_in_a_known_group() -> None:
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == {*GROUPS, "decentral"}
    assert all(names_in(group) == shipped(group) for group in GROUPS)


def test_keys_of_a_study_can_be_overridden() -> None:
    plan = plan_of(["study=vision8", "study.seeds=[4,5]", "study.methods=[gram,mean]"])
    assert plan.study.seeds == (4, 5)
    assert list(plan.methods) == ["gram", "mean"]


def test_keys_of_a_study_that_its_file_leaves_out_can_be_overridden_too() -> None:
    assert plan_of(["study=vision8", "study.curve_items=7"]).study.curve_items == 7


def test_settings_of_a_method_can_be_overridden() -> None:
    plan = plan_of(["method=gram", *POOLS, "method.settings.eps=0.5", "method.label=G"])
    assert plan.methods == {
        "gram": MethodNode(method="gram", label="G", settings={"eps": 0.5}, source=plan.methods["gram"].source)
    }


def test_a_seed_replaces_those_of_a_study() -> None:
    assert plan_of(["study=digits8", "study.methods=[gram]", "seed=7"]).study.seeds == (7,)
    assert plan_of([*POOLS, "seed=7"]).study.seeds == (7,)


def test_a_method_asked_for_beside_a_study_is_not_lost() -> None:
    # The line that conf/config.yaml shows.
    plan = plan_of(["study=vision8", "study.seeds=[0]", "method=gram", "method.settings.eps=0.1"])
    assert plan.methods["gram"].settings == {"eps": 0.1}


def test_the_folder_of_a_zoo_is_where_its_models_are() -> None:
    assert plan_of([*POOLS]).models.models["mnist"] == "zoo/vision/experts/mnist"
    plan = plan_of([*POOLS, "zoo_folder=/data/zoo"])
    assert (plan.models.base, plan.models.models["mnist"]) == ("/data/zoo/base", "/data/zoo/experts/mnist")


def write_extra(folder: Path, **models: str) -> Path:
    """Groups of one's own: one task, one model, a method and a study."""
    task = "{data: {kind: digits}, head: {kind: linear, file: h.safetensors}}"
    files = {
        "taskpool/mine.yaml": f"name: mine\ntasks: {{a: {task}, b: {task}}}\n",
        "modelpool/mine.yaml": f"name: mine\nbase: x\nmodels: {models or {'b': 'y'}}\n",
        "method/mine.yaml": "method: opcm\nlabel: Mine\nsettings: {alpha: 0.25}\n",
        "study/mine.yaml": "# @package _global_\ndefaults: [override /modelpool: mine, override /taskpool: mine]\n"
        "study: {name: mine, title: Mine, methods: [mine, mean], seeds: [3]}\n",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("name", ["mine", "my files", "a,b", "(x) [y] {z}", "it's", "k=v", "größe"])
def test_groups_of_ones_own_are_found_in_any_folder(tmp_path: Path, name: str) -> None:
    extra = write_extra(tmp_path / name)
    plan = plan_of(["study=mine"], extra=extra)
    assert [node.label for node in plan.methods.values()] == ["Mine", "mean (SWA)"]
    assert list(plan.tasks.tasks) == ["b"]  # a has no model
    assert "mine" in names_in("method", extra)


def test_a_model_without_its_task_is_refused_with_the_tasks(tmp_path: Path) -> None:
    extra = write_extra(tmp_path, c="y")
    with pytest.raises(
        ParameterError, match="modelpool mine has a model for c, and taskpool mine no such task"
    ) as caught:
        plan_of(["study=mine"], extra=extra)
    assert caught.value.hint == "its tasks: a, b"


@pytest.mark.parametrize(
    ("words", "says", "hint"),
    [
        (["study=visoin8"], "there is no study 'visoin8'", "did you mean vision8?"),
        (["stduy=vision8"], "there is no group 'stduy'", "did you mean study?"),
        (["zebra=1"], "there is no group 'zebra'", "groups: method, modelpool, taskpool, study, zoo"),
        (["method=opmc", *POOLS], "there is no method 'opmc'", "did you mean opcm?"),
        (["study=vision8", "study.methods=[grma]"], "there is no method 'grma'", "did you mean gram?"),
        (["study=vision8", "study.sedes=[0]"], "study.sedes", "seeds"),
        (["study=vision8", "+study.sedes=[0]"], "study.sedes", "did you mean seeds?"),
        ([*POOLS, "method.settings.epss=1"], "method.settings.epss", "eps"),
        ([*POOLS, "+taskpool.tasks.mnist.metrik=x"], "taskpool.tasks.mnist.metrik", "metric"),
        (["method=opcm"], "no modelpool is chosen", "modelpool=NAME"),
        (["modelpool=vision8"], "no taskpool is chosen", "taskpool=NAME"),
        ([*POOLS, "method=null"], "method", ""),
        (["study"], "'study' is no override", "study=vision8"),
    ],
)
def test_an_unknown_word_is_refused_with_the_nearest_known_one(words: list[str], says: str, hint: str) -> None:
    with pytest.raises(ParameterError) as caught:
        plan_of(words)
    assert says in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("study.seeds=often", "study.seeds"),
        ("study.methods=[]", "study.methods"),
        ("seed=often", "seed"),
        ("seed=1.5", "seed"),
        ("seed=[1,2]", "seed"),
        ("taskpool.tasks.mnist.data.kind=packt", "taskpool.tasks.mnist.data"),
        ("taskpool.tasks.mnist.data.file=3", "taskpool.tasks.mnist.data"),
        ("taskpool.tasks.mnist.head.template=digit", "taskpool.tasks.mnist.head"),
        ("+taskpool.tasks.mnist.metric=acuracy", "taskpool.tasks.mnist.metric"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_place(word: str, place: str) -> None:
    with pytest.raises(ParameterError) as caught:
        plan_of(["study=vision8", word])
    assert place in caught.value.message


def test_a_template_without_a_place_for_the_name_is_refused_with_what_it_needs() -> None:
    with pytest.raises(ParameterError, match=r"template 'digit' needs one \{\} for the class name"):
        plan_of(["study=vision8", "taskpool.tasks.mnist.head.template=digit"])


@pytest.mark.parametrize("value", ["true", "null", "[1]"])
def test_a_setting_that_is_neither_number_nor_word_is_refused(value: str) -> None:
    with pytest.raises(ParameterError, match=r"method\.settings\.eps"):
        plan_of([*POOLS, f"method.settings.eps={value}"])


@pytest.mark.parametrize("word", ["study=vision8,text8", "seed=1,2", "seed=range(0,3)", "study.seeds=[0],[1]"])
def test_several_values_without_m_are_refused_with_the_option(word: str) -> None:
    with pytest.raises(ParameterError, match="has several values") as caught:
        plan_of(["study=vision8", word])
    assert "-m" in (caught.value.hint or "")


def test_every_combination_is_made_and_the_last_choice_changes_fastest() -> None:
    assert expanded(["study=x", "method=gram,opcm", "seed=range(0,2)"]) == [
        ["study=x", "method=gram", "seed=0"],
        ["study=x", "method=gram", "seed=1"],
        ["study=x", "method=opcm", "seed=0"],
        ["study=x", "method=opcm", "seed=1"],
    ]


def test_words_without_choices_are_one_combination() -> None:
    assert expanded(["study.seeds=[0,1]", "study.title='a,b'"]) == [["study.seeds=[0,1]", "study.title='a,b'"]]
    assert expanded([]) == [[]]


@pytest.mark.parametrize("word", ["study", "method=glob(*)", "seed=interval(0,1)"])
def test_a_word_that_cannot_be_expanded_is_refused(word: str) -> None:
    with pytest.raises(ParameterError, match=word.partition("=")[0]):
        expanded([word])


def test_runs_that_differ_in_method_or_seed_become_one_study() -> None:
    words = expanded(["method=gram,mean", "seed=3,1", *POOLS])
    (plan,) = merged_plans([plan_of(w) for w in words])
    assert (plan.study.methods, plan.study.seeds) == (("gram", "mean"), (3, 1))
    assert list(plan.methods) == ["gram", "mean"]


def test_runs_of_other_pools_or_other_settings_stay_apart() -> None:
    text = ["modelpool=text8", "taskpool=text8"]
    runs = [[*POOLS], text, [*POOLS, "method.settings.eps=0.5"], [*POOLS, "seed=1"]]
    merged = merged_plans([plan_of(words) for words in runs])
    assert [(plan.models.name, plan.study.seeds) for plan in merged] == [
        ("vision8", (0, 1)),
        ("text8", (0,)),
        ("vision8", (0,)),
    ]


ZOO: dict[str, Any] = {"name": "z", "taskpool": "t", "finetuning": {"epochs": 1, "lr": 0.1}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "name either a network or a start"),
        ({"start": "x", "network": {"kind": "vit"}}, "name either a network or a start"),
        ({"network": {"kind": "vit"}}, "a network needs pretraining"),
    ],
)
def test_a_zoo_starts_from_one_thing(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Zoo.model_validate(ZOO | changes)


def test_hydra_not_installed_is_said_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "hydra"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hydra", None)  # as if it were not there
    with pytest.raises(MerganserError, match="studies need hydra") as caught:
        plan_of(["study=vision8"])
    assert caught.value.hint == 'pip install "merganser[study]"'
