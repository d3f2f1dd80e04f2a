"""Tiny versions of architectures in use, by name."""

from __future__ import annotations

from attention_architectures import ATTENTION
from convolutional_architectures import CONVOLUTIONAL
from generative_architectures import GENERATIVE
from hub_architectures import HUB
from other_architectures import OTHER
from sequence_architectures import SEQUENCE
from tiny import Builder

ARCHITECTURES: dict[str, Builder] = {**OTHER, **CONVOLUTIONAL, **GENERATIVE, **ATTENTION, **SEQUENCE, **HUB}
