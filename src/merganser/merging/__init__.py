"""Simultaneous merging: a recipe is read, planned from headers alone, and run tensor by tensor."""
