"""What manifests of a run vouch for, read: whole stores and tables, panels of contributions, states of stages.

Nothing half-written is ever read as a result. Letters: N training samples, n tracked ones, M test samples,
Q targets, D parameters.
"""
