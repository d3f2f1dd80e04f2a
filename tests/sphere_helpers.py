"""Noise and tolerances of the tests of great circles."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["F32", "F64"])
SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=25)


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dots_of(x):
    flat = torch.stack([v.reshape(-1) for v in x]).double()
    return flat @ flat.T


def inner(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True))


def close(out, expected, dtype=torch.float64):
    torch.testing.assert_close(
        out.double().reshape(-1),
        torch.tensor(expected, dtype=torch.float64).reshape(-1),
        rtol=1e-5 if dtype == torch.float32 else 1e-10,
        atol=1e-6 if dtype == torch.float32 else 1e-12,
    )
