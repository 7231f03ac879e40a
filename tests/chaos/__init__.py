"""Faults on purpose, under load, with a judge of what clients saw."""
