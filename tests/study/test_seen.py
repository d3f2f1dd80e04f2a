"""Rules may look at pictures of other data than the networks learnt, of as many sizes as they take in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_apart import write_data, write_groups
from small_data import write_npz

from merganser.errors import ParameterError
from merganser.study.apart import Album
from merganser.study.words import PackedSource
from merganser.study.words_apart import Pictures

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`corners`, and `dark`: 8 x 8 pictures without any light; `large`: 16 x 16."""
    folder = write_data(tmp_path / "data")
    for name, side in (("dark", 8), ("large", 16)):
        x = np.zeros((400, side, side, 3), dtype=np.uint8)
        write_npz(folder / f"{name}.npz", {"train": (x, [0] * 400), "test": (x[:9], [0] * 9)}, ["none", "some"])
    return folder


def album(data: Path, seen: str | None) -> Album:
    counts = Pictures(compare=32, measure=16, held_out=16, batch=16)
    return Album("tiny", PackedSource(file="corners"), counts, data, PackedSource(file=seen) if seen else None)


def test_what_is_compared_measured_and_held_out_is_of_other_data_and_what_is_learnt_and_judged_is_not(
    data: Path,
) -> None:
    own, other = album(data, None), album(data, "dark")
    for batches, count in ((other.compare, 32), (other.measure, 16), (other.held_out, 16)):
        shown = torch.cat([args[0] for args, _ in batches])
        assert len(shown) == count
        assert (shown == -1).all()  # black
    assert not any((args[0] == -1).all() for args, _ in own.compare)
    assert other.train.digest == own.train.digest
    assert other.test.digest == own.test.digest


def test_other_data_of_another_size_are_refused(data: Path) -> None:
    with pytest.raises(
        ParameterError, match=r"seen holds pictures of \(16, 16, 3\), and the networks take in \(8, 8, 3\)"
    ):
        _ = album(data, "large").compare


def test_a_study_says_whose_pictures_its_rules_saw_and_is_not_mixed_with_another(
    data: Path, tmp_path: Path, run: Run
) -> None:
    groups = write_groups(tmp_path / "groups")
    folders = ("--data", data, "--config-dir", groups, "--zoo", tmp_path / "zoo", "--quiet")
    some = ("study.networks.net.splits=[]", "study.rules=[average,activations]")
    words = ("study", "study=tiny-halves", "~study.surface", "~study.networks.net", some[1], *folders)
    seen = ("+study.seen={kind: packed, file: dark}",)
    assert run(*words, "--out", tmp_path / "own")[0] == 0
    assert run(*words, *seen, "--out", tmp_path / "other")[0] == 0
    reports = [(tmp_path / out / "report.md").read_text() for out in ("own", "other")]
    assert "compared on 32 training pictures" in reports[0]
    assert "compared on 32 pictures of other data (dark)" in reports[1]
    records = [json.loads((tmp_path / out / "pairs/plain/split-0.json").read_text()) for out in ("own", "other")]
    assert records[0]["rules"]["average"] != records[1]["rules"]["average"]  # REPAIR saw other statistics
    code, _, error = run(*words, *seen, "--out", tmp_path / "own")
    assert code == 2
    assert "holds a study with other seen" in error
