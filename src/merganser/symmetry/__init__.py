"""Permutation symmetries of any network, found by tracing one run of it."""

from merganser.symmetry.discover import Symmetries, symmetries
from merganser.symmetry.spec import Group, Orders, Spec

__all__ = ["Group", "Orders", "Spec", "Symmetries", "symmetries"]
