"""Pages of documentation are run where the models that they speak of are."""

from pathlib import Path

import pytest
from documented import make_models


@pytest.fixture(autouse=True)
def _beside_the_documented_models(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(request.node, pytest.DoctestItem) and request.node.path.suffix == ".md":
        make_models(tmp_path)
        monkeypatch.chdir(tmp_path)
