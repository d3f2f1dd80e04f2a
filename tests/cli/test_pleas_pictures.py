"""`merganser pleas` on folders and arrays of pictures, and words that are no scale or budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from merganser.cli.partial import budgets_of
from merganser.cli.pictures import picture_batches, scale_of
from merganser.cli.subject import Subject
from merganser.errors import MerganserError, ParameterError
from pleas_networks import Run, write_networks


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_networks()
    return tmp_path


def painted(folder: Path, count: int, value: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(folder / f"{i}.png")


def test_pictures_of_folders_are_mixed_scaled_and_cut_to_the_input_of_the_network(shop: Path) -> None:
    painted(Path("dark/deep"), 120, 0)
    painted(Path("light"), 90, 255)
    it = Subject(nn.Identity(), (torch.zeros(2, 3, 4, 4),), {"more": 1})
    places = [Path("dark"), Path("light")]
    batches = picture_batches(places, it, "nets.py:pictures", count=160, scale=scale_of("0.5,0.5,0/0.25"))
    assert [(tuple(args[0].shape), kwargs) for args, kwargs in batches] == [((80, 3, 4, 4), {"more": 1})] * 2
    x = torch.cat([args[0] for args, _ in batches])
    assert x[::2].unique().tolist() == [-2, 0]
    assert x[1::2, :2].unique().tolist() == [2]
    assert x[1::2, 2].unique().tolist() == [4]


def test_arrays_of_pictures_are_those_to_train_with_and_lie_as_the_network_takes_them(shop: Path) -> None:
    pictures = np.arange(10 * 4 * 4 * 3, dtype=np.int64).reshape(10, 4, 4, 3).astype(np.uint8)
    np.savez("set.npz", x_train=pictures, x_test=255 - pictures, y_train=np.zeros(10))
    it = Subject(nn.Identity(), (), {"x": torch.zeros(2, 4, 4, 3)})
    ((args, kwargs),) = picture_batches([Path("set.npz")], it, "m", count=5, scale=scale_of("0/1"))
    assert args == ()
    assert torch.equal(kwargs["x"], torch.from_numpy(pictures[::2].astype(np.float32) / np.float32(255)))


def test_a_folder_of_pictures_is_enough(shop: Path, run: Run) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    np.save("pictures.npy", rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8))
    for name in "gh":
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        save_file(network.state_dict(), f"{name}.safetensors")
    named = ["pleas", "g.safetensors", "h.safetensors", "out", "--model", "nets.py:pictures", "--data", "pictures.npy"]
    code, _, error = run(*named)
    assert (code, "--scale MEAN/DEVIATION" in error) == (2, True)
    code, text, error = run(*named, "--scale", "0.5/0.5")
    assert (code, error) == (0, "")
    assert "40 examples" in text


def test_align_by_method_and_pictures_is_align_by_balance_and_batches(shop: Path, run: Run) -> None:
    rng = np.random.default_rng(0)
    np.save("pictures.npy", rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8))
    Path("more.py").write_text(
        "import numpy, torch\n"
        "def batches():\n"
        "    x = torch.from_numpy(numpy.load('pictures.npy')) / 255 / 0.5 - 1\n"
        "    return [x.movedim(-1, 1).contiguous()]\n"
    )
    for seed, name in enumerate("gh"):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        save_file(network.state_dict(), f"{name}.safetensors")
    named = ["align", "g.safetensors", "h.safetensors"]
    of = ["--model", "nets.py:pictures", "--quiet"]
    pictures, batches = ["--data", "pictures.npy", "--scale", "0.5/0.5"], ["--batches", "more.py:batches"]
    for method, balance in (("activation", "0"), ("dual", "0.5")):
        assert run(*named, f"{method}-a", *of, *pictures, "--method", method) == (0, "", "")
        assert run(*named, f"{method}-b", *of, *batches, "--balance", balance) == (0, "", "")
        one, two = (Path(f"{method}-{end}/model.safetensors").read_bytes() for end in "ab")
        assert one == two
    zips = ["zip", *named[1:], *of, *batches]
    for more in ([], ["--balance", "0.4"]):
        assert run(*named, "zipped-a", *of, *pictures, "--method", "zip", "--overwrite", *more) == (0, "", "")
        assert run(*zips, "--out", "zipped-b", "--overwrite", *more) == (0, "", "")
        one, two = (Path(f"zipped-{end}/model.safetensors").read_bytes() for end in "ab")
        assert one == two
    assert run(*named, "weight", *of, "--input", "2,3,4,4", "--method", "weight")[0] == 0
    assert run(*named, "plain", *of, "--input", "2,3,4,4")[0] == 0
    assert Path("weight/model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("place", "it", "scale", "message"),
    [
        ("nowhere", torch.zeros(1, 3, 4, 4), "0/1", "nowhere does not exist"),
        ("nets.py", torch.zeros(1, 3, 4, 4), "0/1", "holds no pictures"),
        ("bad.png", torch.zeros(1, 3, 4, 4), "0/1", "is not a picture"),
        ("small.npy", torch.zeros(1, 3, 4, 4), "0/1", r"holds pictures of \(2, 2, 3\)"),
        ("small.npy", torch.zeros(1, 3, 4, 5), "0/1", "cut to squares"),
        ("small.npy", torch.zeros(1, 6), "0/1", r"the network takes \(1, 6\)"),
    ],
)
def test_what_is_no_picture_for_the_network_is_refused(
    shop: Path, place: str, it: Tensor, scale: str, message: str
) -> None:
    Path("bad.png").write_bytes(b"no picture")
    np.save("small.npy", np.zeros((3, 2, 2), np.uint8))
    with pytest.raises(MerganserError, match=message):
        picture_batches([Path(place)], Subject(nn.Identity(), (it,)), "m", count=9, scale=scale_of(scale))


@pytest.mark.parametrize("text", ["0.5", "a/b", "1,2/1", "0/0", "0/-1", "1/2/3"])
def test_scales_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="--scale is"):
        scale_of(text)


@pytest.mark.parametrize("text", ["", "1;2", "a", "0.5"])
def test_budgets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="budget"):
        budgets_of(text)
