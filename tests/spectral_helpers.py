"""Noise, decompositions and tolerances of the tests of spectral methods."""

import numpy as np
import pytest
import torch

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["F32", "F64"])


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def svd(x):
    return np.linalg.svd(np.asarray(x), full_matrices=False)


def polar(blocks):
    p, _, qt = svd(np.hstack(blocks))
    return p @ qt


def gap(out, expected):
    expected = torch.as_tensor(expected)
    return float((out.double() - expected).norm() / expected.norm())


def bound(dtype):
    return 2e-5 if dtype == torch.float32 else 1e-9
