"""Stored runs damaged and drivers killed on purpose, by the hundred, from a seed: ``make torture``."""
