"""Benchmarks of hydra-pipe: what the speed and memory claims of the documentation rest on.

``python -m benchmarks`` runs them from a checkout; ``docs/benchmarks.md`` says what each means.
"""
