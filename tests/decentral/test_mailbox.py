"""What an agent accepts of its neighbours, and what it counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from merganser.decentral.faults import spoiled
from merganser.decentral.mailbox import Mailbox
from merganser.decentral.snapshot import Kind, Snapshot, norm_of
from merganser.decentral.words import Limits

LIMITS = Limits(snapshot_bytes=4096)
SOUND = Snapshot("run", 1, 0, 5, {"w": torch.arange(1.0, 5.0), "n": torch.tensor(3)})
NORM = norm_of(SOUND.tensors)


def mailbox(limits: Limits = LIMITS) -> Mailbox:
    return Mailbox("run", SOUND.fingerprint, limits)


def kinds(box: Mailbox) -> list[Kind]:
    return [refused.kind for refused in box.refused]


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("oversize", Kind.OVERSIZED),
        ("truncate", Kind.TRUNCATED),
        ("corrupt", Kind.CORRUPTED),
        ("foreign", Kind.WRONG_RUN),
        ("wrong", Kind.WRONG_MODEL),
        ("stale", Kind.STALE),
        ("nan", Kind.NON_FINITE),
        ("huge", Kind.NORM),
    ],
)
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_every_bad_snapshot_is_counted_by_kind_and_the_good_one_stays(action: str, kind: Kind, codec: str) -> None:
    box = mailbox()
    before = replace(SOUND, codec=codec)  # type: ignore[arg-type]
    bad = spoiled(replace(before, round=6).encode(), action, LIMITS)
    assert box.receive(1, before.encode(), round=5, own_norm=NORM) is not None
    assert box.receive(1, bad, round=6, own_norm=NORM) is None
    assert box.counts() == {kind.value: 1}
    assert [(r.sender, r.round, r.kind) for r in box.refused] == [(1, 6, kind)]
    newest = box.newest(1)
    assert newest is not None
    assert newest.age == (0, 5)
    assert box.receive(1, replace(before, round=7).encode(), round=7, own_norm=NORM) is not None


def test_every_kind_has_a_case_above() -> None:
    assert len(Kind) == 8


def test_the_same_bytes_again_are_the_same_answer_and_counted_once() -> None:
    box = mailbox()
    good, bad = SOUND.encode(), SOUND.encode()[:-1]
    first = box.receive(1, good, round=5, own_norm=NORM)
    assert first is box.receive(1, good, round=5, own_norm=NORM)
    assert box.receive(2, bad, round=5, own_norm=NORM) is box.receive(2, bad, round=5, own_norm=NORM) is None
    assert box.counts() == {"truncated": 1}


def test_the_newest_incarnation_and_round_of_each_sender_is_kept() -> None:
    box = mailbox()

    def age(incarnation: int, round: int) -> tuple[int, int] | None:
        payload = replace(SOUND, incarnation=incarnation, round=round).encode()
        box.receive(1, payload, round=5, own_norm=NORM, max_staleness=100)
        newest = box.newest(1)
        return newest.age if newest else None

    assert age(0, 5) == (0, 5)
    assert age(0, 4) == (0, 5)
    assert age(0, 7) == (0, 7)
    assert age(1, 3) == (1, 3)  # started again from an older checkpoint
    assert age(0, 8) == (1, 3)
    assert age(1, 4) == (1, 4)
    assert box.counts() == {"stale": 2}
    assert box.newest(2) is None


def test_another_snapshot_of_the_same_age_does_not_take_the_place_of_the_first() -> None:
    box = mailbox()
    box.receive(1, SOUND.encode(), round=5, own_norm=NORM)
    other = replace(SOUND, tensors={**SOUND.tensors, "w": torch.ones(4)})
    assert box.receive(1, other.encode(), round=5, own_norm=NORM) is None
    assert kinds(box) == [Kind.STALE]


@pytest.mark.parametrize(
    ("at", "staleness", "accepted"),
    [(5, None, True), (4, None, False), (6, None, False), (5, 0, True), (6, 0, False), (7, 2, True), (8, 2, False)],
)
def test_synchronous_takes_its_round_and_asynchronous_what_is_not_too_old(
    at: int, staleness: int | None, accepted: bool
) -> None:
    box = mailbox()
    got = box.receive(1, SOUND.encode(), round=at, own_norm=NORM, max_staleness=staleness)
    assert (got is not None) == accepted
    assert kinds(box) == ([] if accepted else [Kind.STALE])


def test_asynchronous_takes_newer_ones_and_forgets_them_when_they_have_become_too_old() -> None:
    box, payload = mailbox(), SOUND.encode()
    assert box.receive(1, payload, round=2, own_norm=NORM, max_staleness=1) is not None
    assert box.receive(1, payload, round=6, own_norm=NORM, max_staleness=1) is not None
    assert box.receive(1, payload, round=7, own_norm=NORM, max_staleness=1) is None
    assert box.counts() == {}  # it was sound when it came


def test_who_sends_under_another_number_is_rejected() -> None:
    box = mailbox()
    assert box.receive(2, SOUND.encode(), round=5, own_norm=NORM) is None
    assert kinds(box) == [Kind.WRONG_RUN]
    assert box.newest(1) is box.newest(2) is None


def test_norm_may_be_the_ratio_times_that_of_the_agent_and_no_more() -> None:
    box = mailbox(Limits(norm_ratio=10.0))
    assert box.receive(1, SOUND.encode(), round=5, own_norm=NORM / 9.99) is not None
    box = mailbox(Limits(norm_ratio=10.0))
    assert box.receive(1, SOUND.encode(), round=5, own_norm=NORM / 10.01) is None
    assert kinds(box) == [Kind.NORM]
    assert mailbox().receive(1, SOUND.encode(), round=5, own_norm=0.0) is not None


def test_a_norm_that_overflows_is_rejected() -> None:
    x = {"w": torch.full((4,), 1e300, dtype=torch.float64)}
    box = Mailbox("run", Snapshot("run", 1, 0, 5, x).fingerprint, LIMITS)
    assert box.receive(1, Snapshot("run", 1, 0, 5, x).encode(), round=5, own_norm=1e-9) is None
    assert kinds(box) == [Kind.NORM]


def test_senders_are_kept_apart() -> None:
    box = mailbox()
    for sender in (1, 2, 3):
        assert box.receive(sender, replace(SOUND, sender=sender).encode(), round=5, own_norm=NORM) is not None
    box.receive(2, b"", round=5, own_norm=NORM)
    assert [box.newest(sender) is not None for sender in range(5)] == [False, True, True, True, False]
    assert box.counts() == {"truncated": 1}
