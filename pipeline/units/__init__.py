"""What a worker does with one unit of a stage: read stores, call ``workers``, write results, commit.

A unit is idempotent; executors may do it twice. Letters: N training samples, n tracked ones, M test
samples, D parameters, T steps.
"""
