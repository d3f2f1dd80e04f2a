"""Files of safetensors that are open: as few, as briefly and as little of them as can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merganser.checkpoints import open_source
from merganser.errors import DtypeError
from safetensors_helpers import entry, opened, write


def shards(folder: Path, count: int) -> Path:
    folder.mkdir()
    weight_map = {}
    for i in range(count):
        file = f"model-{i:05d}.safetensors"
        save_file({f"layer.{i}": torch.full((4, 4), float(i))}, folder / file)
        weight_map[f"layer.{i}"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_sixty_shards_hold_no_file_open_between_reads(tmp_path: Path) -> None:
    folder = shards(tmp_path / "model", 60)
    before = len(os.listdir("/dev/fd"))
    source = open_source(folder)
    assert len(os.listdir("/dev/fd")) == before
    tensors = [source.read(name) for name in source.infos]
    assert len(os.listdir("/dev/fd")) == before
    assert sorted(float(t[0, 0]) for t in tensors) == [float(i) for i in range(60)]


def test_a_refused_file_is_closed_again(tmp_path: Path) -> None:
    # an unclosed file would warn, and warnings are failures here
    for number in range(50):
        path = write(tmp_path / f"{number}.safetensors", {"a": entry("F4")}, b"1234")
        with pytest.raises(DtypeError):
            opened(path)
        path.unlink()


def test_opening_reads_the_header_only_and_reading_a_row_maps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rows, columns = 2000, 25_000  # 200 MB of zeros
    write(path, {"a": entry(shape=(rows, columns), offsets=(0, 4 * rows * columns))})
    os.truncate(path, path.stat().st_size + 4 * rows * columns)
    script = """
        import resource, sys
        from pathlib import Path
        import torch
        from merganser.checkpoints import open_source
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        torch.zeros(10).sum()
        before = peak()
        source = open_source(sys.argv[1])
        for row in range(0, 2000, 10):
            assert source.read("a", (row, row + 10)).sum() == 0
        maps = Path("/proc/self/maps")
        assert not maps.exists() or "x.safetensors" not in maps.read_text()
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 40e6, "200 MB went by"
