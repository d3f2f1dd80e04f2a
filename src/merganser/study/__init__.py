"""Studies: pools of models and tasks, methods that merge the models as they arrive, and what the result can do.

Read `words.py` (what a configuration may say), then `running.py` (what a study does). Merging needs nothing of this.
"""
