"""Statistics of a network are those of plain loops; merges that use them are what their equations say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from command_line import run as run_command
from merganser.errors import ParameterError
from merganser.merging.measuring import measure
from support import load

run = run_command


def test_gram_of_a_linear_layer_is_the_float64_loop_over_all_places() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batches = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found = measure(network, [((x,), {}) for x in batches], ["gram"])
    expected = np.zeros((5, 5))
    for x in batches:
        for row in x.reshape(-1, 5).double().numpy():
            expected += np.outer(row, row)
    np.testing.assert_allclose(found["gram/0.weight"].numpy(), expected, rtol=1e-6)
    assert found.keys() == {"gram/0.weight", "gram/2.weight"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.Conv2d(2, 4, (2, 3), dilation=(1, 2), padding="same", padding_mode="circular"),
        nn.Conv1d(3, 5, 4, padding=2),
    ],
    ids=["strided", "dilated", "1-D"],
)
def test_gram_of_a_convolution_predicts_the_energy_of_its_output(layer: nn.Module) -> None:
    weight: torch.Tensor = layer.weight.data  # type: ignore[assignment, union-attr]
    layer.bias.data.zero_()  # type: ignore[union-attr, operator]
    side = (7,) if isinstance(layer, nn.Conv1d) else (7, 8)
    x = torch.randn(2, weight.shape[1], *side, generator=torch.Generator().manual_seed(0))
    gram = measure(nn.Sequential(layer), [((x,), {})], ["gram"])["gram/0.weight"].double()
    flat = weight.flatten(1).double()
    y = layer(x).detach().double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(flat @ gram @ flat.T, y @ y.T, rtol=1e-5, atol=1e-6)


def test_fisher_of_a_softmax_regression_is_its_closed_form_on_the_mean_of_the_draws() -> None:
    network = nn.Linear(3, 4)
    x = torch.tensor([[0.5, -1.0, 2.0]])
    n = 4000
    found = measure(network, [((x.expand(n, 3),), {})], ["fisher"], seed=3)
    p = network(x)[0].softmax(0).double().detach()
    expected = (p * (1 - p))[:, None] * x.double().square()  # E (1[y = c] - p_c)^2 = p_c (1 - p_c)
    spread = (p * (1 - p) * (1 - 3 * p + 3 * p**2))[:, None].sqrt() * x.double().square() / n**0.5
    assert bool(((found["fisher/weight"] - expected).abs() < 5 * spread + 1e-9).all())
    assert torch.equal(
        found["fisher/weight"], measure(network, [((x.expand(n, 3),), {})], ["fisher"], seed=3)["fisher/weight"]
    )


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ParameterError, match="no linear layer"):
        measure(nn.ReLU(), [((torch.ones(1, 2),), {})], ["gram"])
    with pytest.raises(ParameterError, match="no batch"):
        measure(nn.Linear(2, 2), [], ["gram"])


CODE = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.zeros(2, 4)

def batches(seed):
    return [torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 2.0, 0.1, 1.0])]

def one():
    return batches(1)

def two():
    return batches(2)
"""


def test_regmean_from_measured_statistics_is_the_least_squares_of_its_equation(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code = tmp_path / "net.py"
    code.write_text(CODE)
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        state = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).state_dict()
        torch.save(state, tmp_path / f"{name}.pt")
        words = ["measure", tmp_path / f"{name}.pt", f"{code}:{name}", tmp_path / f"{name}-seen"]
        assert run(*words, "--model", f"{code}:network", "--kind", "both")[0] == 0
    lines = [f"- {{model: {tmp_path / n}.pt, statistics: {tmp_path / n}-seen}}" for n in ("one", "two")]
    for method in ("regmean", "fisher"):
        (tmp_path / f"{method}.yaml").write_text("\n".join([f"method: {method}", "models:", *lines]) + "\n")
        assert run("merge", tmp_path / f"{method}.yaml", tmp_path / method)[0] == 0
    models = [torch.load(tmp_path / f"{n}.pt") for n in ("one", "two")]
    inputs = [torch.randn(30, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    grams = []
    for x in inputs:
        x = (x * torch.tensor([1.0, 2.0, 0.1, 1.0])).double()
        gram = x.T @ x
        grams.append(0.95 * gram + 0.05 * gram.diag().diag())
    expected = sum(m["0.weight"].double() @ g for m, g in zip(models, grams, strict=True)) @ torch.linalg.inv(
        sum(grams)
    )
    found = load(tmp_path / "regmean")
    torch.testing.assert_close(found["0.weight"].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["0.bias"], (models[0]["0.bias"] + models[1]["0.bias"]) / 2)
    seen = [load(tmp_path / f"{n}-seen") for n in ("one", "two")]
    weights = [s["fisher/2.weight"].double() for s in seen]
    mean = sum(f * m["2.weight"].double() for f, m in zip(weights, models, strict=True)) / sum(weights)
    torch.testing.assert_close(load(tmp_path / "fisher")["2.weight"].double(), mean, rtol=1e-4, atol=1e-5)


def test_recipe_without_statistics_says_how_to_get_them(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "m.pt")
    (tmp_path / "r.yaml").write_text(f"method: regmean\nmodels: [{tmp_path}/m.pt, {tmp_path}/m.pt]\n")
    code, _, err = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert code == 2
    assert "regmean needs statistics of" in err
    assert "merganser measure" in err
