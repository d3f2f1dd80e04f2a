"""How good a checkpoint folder is: its accuracy on the test images of every task."""

from __future__ import annotations

from pathlib import Path

import torch
from model import accuracy_percent, load
from tasks import TASKS, plain_digits, seen_by


class Exam:
    """The 597 test images as each task shows them."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        _, test = plain_digits()
        self.papers = {task: seen_by(task, test) for task in TASKS}

    def sit(self, folder: Path) -> list[float]:
        """Accuracy in percent on the eight tasks, in their order."""
        model = load(folder)
        return [accuracy_percent(model, paper.images, paper.digits) for paper in self.papers.values()]
