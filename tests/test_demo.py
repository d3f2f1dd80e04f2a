"""The cheap parts of the demo; `make demo` is the rest."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from commands import CommandError, Shell
from model import DigitReader, Sizes, accuracy_percent, load, save
from removal import largest_difference
from tasks import TASKS, patch_order, plain_digits, seen_by
from train import Training, is_trained

SMALL = Sizes(width=16, blocks=1, text_width=8)


@pytest.fixture(scope="module")
def splits():
    return plain_digits()


def test_the_split_is_fixed_and_covers_every_image_once(splits) -> None:
    train, test = splits
    assert (len(train.images), len(test.images)) == (1200, 597)
    again, _ = plain_digits()
    assert torch.equal(train.images, again.images)
    assert torch.equal(train.digits, again.digits)
    assert float(train.images.max()) == 1.0


def test_each_task_is_the_same_every_time_and_unlike_the_others() -> None:
    orders = [tuple(patch_order(task).tolist()) for task in ("plain", *TASKS)]
    assert orders == [tuple(patch_order(task).tolist()) for task in ("plain", *TASKS)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len(set(orders)) == 9


def test_the_plain_order_changes_nothing(splits) -> None:
    assert torch.equal(seen_by("plain", splits[1]).images, splits[1].images)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_moves_whole_patches(task, splits) -> None:
    image, moved = splits[1].images[0], seen_by(task, splits[1]).images[0]
    for place, source in enumerate(patch_order(task).tolist()):
        row, column = 2 * (place // 4), 2 * (place % 4)
        top, left = 2 * (source // 4), 2 * (source % 4)
        assert torch.equal(moved[row : row + 2, column : column + 2], image[top : top + 2, left : left + 2])


def test_a_saved_network_loads_with_the_same_outputs(tmp_path, splits) -> None:
    torch.manual_seed(0)
    model = DigitReader(SMALL).eval()
    save(model, tmp_path / "one")
    again = load(tmp_path / "one")
    images = splits[1].images[:32]
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_the_head_is_saved_and_never_trained() -> None:
    model = DigitReader(SMALL)
    assert "prototypes" in model.state_dict()
    assert "prototypes" not in dict(model.named_parameters())
    assert torch.equal(model.prototypes, DigitReader(SMALL).prototypes)


def test_accuracy_counts_right_answers_in_percent() -> None:
    answers = torch.nn.functional.one_hot(torch.tensor([1, 2, 3, 4]), 10).float()
    assert accuracy_percent(lambda images: images, answers, torch.tensor([1, 2, 3, 9])) == 75.0


def test_a_checkpoint_is_reused_only_for_the_settings_that_made_it(tmp_path) -> None:
    assert not is_trained(tmp_path, "a")
    save(DigitReader(SMALL), tmp_path, training="a")
    assert is_trained(tmp_path, "a")
    assert not is_trained(tmp_path, "b")
    assert Training().key == Training().key != Training(handful=16).key


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
