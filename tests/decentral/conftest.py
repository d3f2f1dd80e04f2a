"""Ray for the tests of a module, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from merganser.decentral.ray_seat import Seats
from ray_agents import local_seats


@pytest.fixture(scope="module")
def seats() -> Iterator[Seats]:
    with local_seats() as taken:
        yield taken
