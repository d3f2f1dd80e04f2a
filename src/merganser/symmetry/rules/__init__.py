"""What every operation does to axes: one small function an operation, by its name in ATen."""

from __future__ import annotations

from collections.abc import Mapping

from merganser.symmetry.flow import Rule
from merganser.symmetry.rules import norms, pointwise, products, shapes

RULES: Mapping[str, Rule] = {**pointwise.RULES, **shapes.RULES, **products.RULES, **norms.RULES}
