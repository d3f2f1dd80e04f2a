"""The cheap parts of the demo; `make demo` is the rest."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from commands import CommandError, Shell
from removal import EXPERTS, largest_difference

from merganser.study.composing import plan_of


def test_the_demo_removes_an_expert_that_its_study_has() -> None:
    assert tuple(plan_of(["study=digits8"]).models.models) == EXPERTS


def test_the_largest_difference_is_relative_to_each_tensor() -> None:
    a = {"big": torch.tensor([1000.0, 1.0]), "zero": torch.zeros(2)}
    b = {"big": torch.tensor([1000.0, 2.0]), "zero": torch.zeros(2)}
    assert largest_difference(a, b) == pytest.approx(1e-3)
    assert largest_difference(a, a) == 0.0


def test_a_nan_is_a_difference_wherever_it_stands() -> None:
    a = {"x": torch.tensor([1.0]), "y": torch.tensor([float("nan")]), "z": torch.tensor([1.0])}
    b = {name: torch.tensor([1.0]) for name in a}
    assert not largest_difference(a, b) <= 1.0


def test_a_tensor_of_one_side_only_is_refused() -> None:
    with pytest.raises(CommandError, match="only"):
        largest_difference({"x": torch.zeros(1)}, {"y": torch.zeros(1)})


def test_a_failing_command_tells_what_was_run_and_what_it_said(tmp_path) -> None:
    shell = Shell(tmp_path)
    with pytest.raises(CommandError, match=r"fold show nothing-here\nended with code \d+ and said:\n.*nothing"):
        shell.run("fold", "show", "nothing-here")
    assert shell.history == []
