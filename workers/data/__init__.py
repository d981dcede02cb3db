"""Batches: in which order, of which type, on which device, with which labels; and errors of the user's own
code.

Letters: N training samples, T steps, B samples of a batch.
"""
