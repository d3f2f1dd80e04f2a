"""One agent: its phases, what it sends, whom it hears, and a learner of networks."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from merganser.decentral.agent import Agent, Phase
from merganser.decentral.learner import Memory
from merganser.decentral.rounds import Together, run, together
from merganser.decentral.schedule import Exchange
from merganser.decentral.snapshot import Snapshot, decode
from merganser.decentral.torch_learner import Labelled, TorchLearner, varied
from merganser.decentral.words import Augment, Limits, Optimizer
from merganser.errors import ParameterError
from tiny_agents import Still, TinyLearner, model, tiny_config


def work(crew: Together, number: int, *, without: tuple[int, ...] = ()) -> None:
    """A step of all agents but some, which are not there."""
    for phase in Phase:
        for agent in crew.agents:
            if agent.number not in without:
                agent.do(phase, number)


def test_phases_come_in_order_and_pass_the_hook() -> None:
    seen: list[tuple[int, int, str]] = []
    config = tiny_config(agents=2, rounds=2)
    crew = together(config, TinyLearner, hook=lambda agent, step, phase: seen.append((agent, step, phase.value)))
    crew.plan()
    work(crew, 0)
    names = ("train", "publish", "collect", "merge", "recalibrate", "checkpoint")
    assert seen == [(agent, 0, name) for name in names for agent in (0, 1)]


def test_an_agent_takes_all_its_phases_by_itself() -> None:
    config = tiny_config(agents=1, rounds=2)
    (agent,) = together(config, TinyLearner).agents
    agent.plan(agent.batches())
    first, second = agent.step(0), agent.step(1)
    alone = TinyLearner(0)
    assert first["loss"] == alone.train(3)
    assert second["loss"] == alone.train(3)
    assert second["merged"] == alone.evaluate()


def test_an_agent_can_be_sent_to_another_process() -> None:
    (one, _) = together(tiny_config(agents=2), TinyLearner).agents
    one.transport = None  # type: ignore[assignment]  # an actor has its own
    other: Agent = pickle.loads(pickle.dumps(one))
    other.plan(3)
    other.train(other.steps[0])
    one.plan(3)
    one.train(one.steps[0])
    assert all(torch.equal(other.learner.state()[n], x) for n, x in one.learner.state().items())


def test_what_is_sent_is_a_snapshot_after_training_in_the_runs_codec() -> None:
    seen: dict[int, bytes] = {}

    def tamper(agent: int, step: int, payload: bytes) -> bytes:
        return seen.setdefault(agent, payload)

    crew = together(tiny_config(agents=2, codec="bf16"), TinyLearner, tamper=tamper)
    crew.plan()
    work(crew, 0)
    learner = TinyLearner(1)
    learner.train(3)
    found = decode(seen[1], Limits())
    assert (found.sender, found.round, found.run) == (1, 0, "run")
    for name, x in learner.state().items():
        sent = x.bfloat16().float() if x.is_floating_point() else x
        assert torch.equal(found.tensors[name], sent)


def test_the_weight_of_a_neighbour_that_is_gone_returns_to_the_agent() -> None:
    crew = together(tiny_config(), Still)
    crew.plan()
    work(crew, 0, without=(2,))
    left, far = crew.agents[1].learner.state()["w"].double(), crew.agents[4].learner.state()["w"].double()
    w = [model(i)["w"].double() for i in range(5)]
    torch.testing.assert_close(left, (w[0] + 2 * w[1]) / 3, rtol=0, atol=1e-6)
    torch.testing.assert_close(far, (w[3] + w[4] + w[0]) / 3, rtol=0, atol=1e-6)
    assert crew.agents[1].record(0)["missing"] == 1
    assert crew.agents[1].record(0)["peers"] == [0]


def edited(change: Callable[[Snapshot], Snapshot]) -> Callable[[int, int, bytes], bytes]:
    """What agent 0 publishes, opened, changed and sealed again."""

    def tamper(agent: int, step: int, payload: bytes) -> bytes:
        return payload if agent else change(decode(payload, Limits())).encode()

    return tamper


def scaled(found: Snapshot, factor: float) -> Snapshot:
    tensors = {n: x * factor if x.is_floating_point() else x for n, x in found.tensors.items()}
    return Snapshot(found.run, found.sender, found.incarnation, found.round, tensors)


@pytest.mark.parametrize(
    ("kind", "tamper"),
    [
        ("truncated", lambda agent, step, payload: payload if agent else payload[:-5]),
        ("corrupted", lambda agent, step, payload: payload if agent else payload[:-1] + bytes([payload[-1] ^ 1])),
        ("oversized", lambda agent, step, payload: payload if agent else payload + bytes(100_000)),
        ("stale", edited(lambda s: Snapshot(s.run, 0, 0, s.round + 7, s.tensors))),
        ("wrong_run", edited(lambda s: Snapshot("another", 0, 0, s.round, s.tensors))),
        ("wrong_model", edited(lambda s: Snapshot(s.run, 0, 0, s.round, {"x": torch.ones(3)}))),
        ("non_finite", edited(lambda s: scaled(s, math.nan))),
        ("norm", edited(lambda s: scaled(s, 1e6))),
    ],
)
def test_a_bad_snapshot_is_counted_by_its_kind_and_changes_nobody(
    tmp_path: Path, kind: str, tamper: Callable[[int, int, bytes], bytes]
) -> None:
    config = tiny_config(rounds=2, limits={"snapshot_bytes": 50_000, "norm_ratio": 1e3})
    crew = together(config, TinyLearner, tamper=tamper)
    lines = run(config, crew, tmp_path)
    for line in lines:
        for record in line["agents"]:
            assert record["rejected"] == ({kind: 1} if record["agent"] in (1, 4) else {})
    alone = TinyLearner(0)
    alone.train(6)
    found = crew.agents[0].learner.state()
    assert all(torch.equal(found[name], x) for name, x in alone.state().items())  # its edges count for neither end


def test_an_agent_without_its_parents_order_listens_and_does_not_speak_until_it_has_one(tmp_path: Path) -> None:
    config = tiny_config(merge={"rule": "aligned_once"}, rounds=3, topology={"kind": "star"}, agents=3)
    crew = together(config, TinyLearner)
    order, first, second, third = crew.plan()
    assert [s.exchange for s in (order, first, second, third)] == [Exchange.ORDER, *[Exchange.MERGE] * 3]
    assert [agent.placed for agent in crew.agents] == [True, False, False]
    for phase in Phase:
        for agent in crew.agents:
            if (agent.number, phase) != (2, Phase.COLLECT):  # it misses its parent's snapshot
                agent.do(phase, 0)
    assert [agent.placed for agent in crew.agents] == [True, True, False]
    work(crew, 1)
    records = [agent.record(1) for agent in crew.agents]
    assert [record["peers"] for record in records] == [[1], [0], []]
    assert [record["sent"]["snapshots"] for record in records] == [4, 1, 0]
    assert crew.agents[2].placed  # it has heard the hub, and takes its order over
    work(crew, 2)
    assert [agent.record(2)["peers"] for agent in crew.agents] == [[1, 2], [0], [0]]


def test_asynchronous_agents_merge_what_is_there_and_not_too_old() -> None:
    config = tiny_config(mode="async", max_staleness=1, rounds=4, agents=2)
    crew = together(config, Still)
    crew.plan()
    work(crew, 0)
    work(crew, 1, without=(1,))
    assert crew.agents[0].record(1)["peers"] == [1]  # of round 0
    work(crew, 2, without=(1,))
    assert crew.agents[0].record(2)["peers"] == []  # two rounds old
    assert crew.agents[0].record(2)["missing"] == 1


def test_a_rule_that_compares_units_needs_a_learner_that_can() -> None:
    class Blind(TinyLearner):
        def aligner(self) -> None:  # type: ignore[override]
            return None

    with pytest.raises(ParameterError, match="aligns nothing"):
        together(tiny_config(merge={"rule": "aligned"}), Blind)
    assert together(tiny_config(), Blind).distances()["aligned"] is None
    with pytest.raises(ParameterError, match="agent 5 of 5"):
        Agent(5, tiny_config(), TinyLearner(0), None)  # type: ignore[arg-type]


# the learner of networks


def shard(count: int = 30, seed: int = 0) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, 6, 2, generator=generator)
    return Labelled(x, (x.mean((1, 2, 3)) > 0).long())


class Net(nn.Module):
    """A convolution, BatchNorm, dropout and a linear layer."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5, momentum=0.3)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.drop(self.norm(self.conv(x.movedim(-1, 1))).relu().mean((2, 3))))
        return y


def learner(*, dropout: float = 0.2, agent: int = 0, optimizer: Optimizer | None = None, crop: int = 2) -> TorchLearner:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = Net(dropout)
    augment = Augment(flip=crop > 0, crop=crop)
    return TorchLearner(network, shard(), shard(20, 1), agent=agent, batch=8, optimizer=optimizer, augment=augment)


def equal(one: TorchLearner, two: TorchLearner) -> bool:
    return all(torch.equal(x, two.state()[name]) for name, x in one.state().items())


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_learner_goes_on_from_its_memory_bit_for_bit(name: str) -> None:
    optimizer = Optimizer(name=name, lr=0.01, momentum=0.9 if name == "sgd" else 0.0)  # type: ignore[arg-type]
    one, two = learner(optimizer=optimizer), learner(optimizer=optimizer)
    one.train(7)
    state, memory = one.state(), one.export()
    kept = Memory({n: x.clone() for n, x in memory.tensors.items()}, dict(memory.content))
    expected = one.train(6)
    torch.rand(3)  # somebody else draws
    two.load(state)
    two.restore(kept)
    assert two.train(6) == expected
    assert equal(one, two)


def test_steps_may_be_taken_one_by_one_and_leave_the_global_generator_alone() -> None:
    one, two = learner(), learner()
    one.train(5)
    before = torch.random.get_rng_state()
    for _ in range(5):
        two.train(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert equal(one, two)
    three = learner(agent=1)
    three.train(5)
    assert not equal(one, three)


def test_an_epoch_is_every_example_once_in_batches_of_nearly_one_size() -> None:
    seen: list[Tensor] = []
    one = learner(crop=0)
    one.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert one.batches(1.0) == 4
    assert one.batches(0.1) == 1
    assert one.batches(0) == 0
    one.train(4)
    assert [len(x) for x in seen] == [8, 8, 7, 7]
    rows = torch.cat(seen).flatten(1)
    assert torch.equal(rows.sort(0).values, one.shard.x.flatten(1).sort(0).values)


def test_training_after_evaluation_and_recalibration_is_in_training_mode_with_the_same_momentum() -> None:
    one, two = learner(), learner()
    one.evaluate()
    one.train(2)
    two.train(2)
    assert equal(one, two)
    assert one.recalibrate() == 1
    assert one.network.norm.momentum == 0.3  # type: ignore[union-attr]
    state = one.state()
    one.evaluate()
    assert one.network.training
    assert all(torch.equal(x, state[n]) for n, x in one.state().items())
    one.train(1)
    assert not torch.equal(one.state()["norm.running_mean"], state["norm.running_mean"])


def test_recalibration_takes_statistics_of_the_shard() -> None:
    one = learner()
    one.train(3)
    one.recalibrate()
    with torch.no_grad():
        y = one.network.conv(one.shard.x.movedim(-1, 1))  # type: ignore[operator]
    # four batches of 8, 8, 7 and 7 count alike, so it is not quite the mean over pictures
    torch.testing.assert_close(one.state()["norm.running_mean"], y.mean((0, 2, 3)), rtol=0, atol=0.02)
    variance = y.var((0, 2, 3))
    torch.testing.assert_close(one.state()["norm.running_var"], variance, rtol=0.05, atol=0)


def test_an_optimizer_that_is_not_kept_forgets_with_the_round() -> None:
    for keep in (True, False):
        one = learner(optimizer=Optimizer(keep=keep))
        one.train(2)
        one.new_round()
        assert bool(one.export().tensors) is keep


def test_evaluation_is_accuracy_in_percent_and_cross_entropy_in_nats() -> None:
    one = learner()
    one.network.eval()
    with torch.no_grad():
        logits = one.network(one.test.x).double()
    own = logits.gather(1, one.test.y[:, None]).squeeze(1)
    assert one.evaluate()["loss"] == pytest.approx(float((logits.logsumexp(1) - own).mean()), rel=1e-9)
    assert one.evaluate()["accuracy"] == pytest.approx(100 * float((logits.argmax(1) == one.test.y).double().mean()))


def test_training_in_another_order_of_units_is_the_same_training() -> None:
    """Adam's moments move with their units: reordering and training are exchangeable."""
    one, two = learner(dropout=0.0, crop=0), learner(dropout=0.0, crop=0)
    spec = one.aligner().found.spec
    orders = spec.random(torch.Generator().manual_seed(3))
    assert any(not torch.equal(o, torch.arange(len(o))) for o in orders.values())
    one.train(3)
    one.reorder(orders)
    one.train(3)
    two.train(6)
    two.reorder(orders)
    for name, x in one.state().items():
        torch.testing.assert_close(x, two.state()[name], rtol=1e-4, atol=1e-5)


def test_pictures_are_moved_and_mirrored_within_their_edges() -> None:
    x = torch.arange(2 * 5 * 5 * 1, dtype=torch.float32).reshape(2, 5, 5, 1)
    generator = torch.Generator().manual_seed(0)
    assert varied(x, Augment(), generator) is x
    seen = torch.stack([varied(x, Augment(flip=True), generator) for _ in range(20)])
    assert {bool(torch.equal(y[0], x[0])) for y in seen} == {True, False}
    assert all(torch.equal(y[0], x[0]) or torch.equal(y[0], x[0].flip(1)) for y in seen)
    moved = varied(x.expand(2, 5, 5, 1), Augment(crop=2), generator)
    assert moved.shape == x.shape
    assert set(moved[1].flatten().tolist()) <= set(x[1].flatten().tolist())


def test_a_learner_without_examples_or_pictures_to_vary_is_refused() -> None:
    none = Labelled(torch.zeros(0, 6, 6, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ParameterError, match="agent 3 has 0 examples"):
        TorchLearner(Net(), none, shard(), agent=3)
    flat = Labelled(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ParameterError, match="flip and crop are for pictures"):
        TorchLearner(Net(), flat, flat, augment=Augment(flip=True))


def test_a_batch_of_one_example_that_the_network_cannot_train_on_is_told_as_such() -> None:
    """BatchNorm of vectors has no variance of one example, which torch refuses in its own words."""
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    some = Labelled(torch.randn(3, 4), torch.tensor([0, 1, 0]))
    with pytest.raises(ParameterError, match="does not train on a batch of one example"):
        TorchLearner(network, some, some, batch=1).train(1)
    assert math.isfinite(TorchLearner(network, some, some, batch=3).train(1))
