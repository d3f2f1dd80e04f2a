"""Agents that each hold data of their own, train, and merge with their neighbours of a graph."""
