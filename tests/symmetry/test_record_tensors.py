"""Tensors of a run by their numbers: the same ones whatever kernels run, and none that nobody asked for."""

from __future__ import annotations

import gc
import weakref
from functools import lru_cache

import pytest
import torch
from architectures import ARCHITECTURES
from tiny import vectors
from torch import Tensor, nn

from merganser.symmetry.record import record_run, record_tensors, unrecorded


@pytest.mark.parametrize("name", ["lstm", "beit", "vgg-bn", "bert", "llama", "swin", "unet"])
def test_every_tensor_of_a_record_is_there_in_its_shape(name: str) -> None:
    network, args, kwargs = ARCHITECTURES[name]()
    values = record_run(network, args, kwargs).values
    kept = record_tensors(network, args, kwargs, range(len(values)))
    assert {v.number: (v.shape, v.dtype) for v in values} == {n: (tuple(x.shape), x.dtype) for n, x in kept.items()}


def test_a_recurrent_layer_gives_what_it_gives() -> None:
    """Its steps are seen one by one, though oneDNN would do all of them at once."""
    torch.manual_seed(0)
    network, x = nn.LSTM(4, 5).eval(), torch.randn(3, 2, 4)
    record = record_run(network, (x,))
    assert not any("mkldnn" in call.op for call in record.calls)
    kept = record_tensors(network, (x,), {}, [value.number for value in record.outputs])
    y, (h, c) = network(x)
    for value, expected in zip(record.outputs, (y, h, c), strict=True):
        torch.testing.assert_close(kept[value.number], expected)


@lru_cache(maxsize=1)
def _offsets() -> Tensor:
    return torch.arange(12).float().square().sqrt()


class Caching(nn.Module):
    """Computes a table at its first run, which outlives it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return (self.up(x + _offsets()).relu()).cumsum(-1)


def test_a_cache_that_the_first_run_fills_moves_no_number() -> None:
    _offsets.cache_clear()
    network, x = Caching(), vectors()
    record = record_run(network, (x,))
    (result,) = record.outputs
    kept = record_tensors(network, (x,), {}, [result.number])
    torch.testing.assert_close(kept[result.number], network(x))


def test_activations_go_when_the_network_lets_them_go() -> None:
    gone: list[bool] = []

    class Passing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()
            before = weakref.ref(y)
            y = y * 2
            gone.append(before() is None)
            return y

    gc.disable()
    try:
        record_tensors(Passing(), (vectors(),), {}, [])
    finally:
        gc.enable()
    assert gone == [True]


def test_what_a_hook_does_unrecorded_moves_no_number() -> None:
    network, x = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), vectors()
    record = record_run(network, (x,))
    seen: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Tensor]) -> None:
        with unrecorded():
            seen.append(args[0].square().mean())

    handle = network[2].register_forward_pre_hook(look)
    kept = record_tensors(network, (x,), {}, [record.outputs[0].number])
    handle.remove()
    torch.testing.assert_close(kept[record.outputs[0].number], network(x))
    torch.testing.assert_close(seen, [network[1](network[0](x)).square().mean()])
