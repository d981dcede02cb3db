"""The slow judges that users have: every number once more, densely, in float64 and with nothing of the fast
engines.

Letters: n samples, Q test samples, D parameters, T steps, B samples of a batch, N training samples; du and
dm the tangents, r what the optimiser sees, h, p, L its settings, J the derivative of the update, v a
direction.
"""
