"""Continual merging: models arrive one after another, one merged model is always there, the state stays the same size.

Paper: Tang et al. 2025, arXiv:2501.09522. Read `fold.py` (what can be done), then `passing.py` (how one arrival goes
by), `kinds.py` (what a method's state is) and `state.py` (how it is kept safe on disk).
"""

from merganser.continual.export import export
from merganser.continual.fold import Fold

__all__ = ["Fold", "export"]
