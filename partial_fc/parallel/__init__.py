"""Ranks and the data-parallel engine."""
