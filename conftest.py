"""What all tests share; helpers stand in `tests/`. Pages of documentation are run beside the models they speak of."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of numpy's algebra, and of the processes that tests start

import torch
from hypothesis import settings

from command_line import run
from documented import make_models
from shop import shop

__all__ = ["run", "shop"]

settings.register_profile("merganser", derandomize=True, database=None, deadline=None)
settings.load_profile("merganser")
torch.set_num_threads(1)  # small matrices: more threads only wait for each other


@pytest.fixture(autouse=True)
def _beside_the_documented_models(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(request.node, pytest.DoctestItem) and request.node.path.suffix == ".md":
        make_models(tmp_path)
        monkeypatch.chdir(tmp_path)
