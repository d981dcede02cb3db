"""Curvature in EKFAC form: estimated along the record, and the basis in which it is diagonal.

Letters: n or R rows, D parameters, K checkpoints, C coordinates of the core, O and I a layer's outputs and
inputs, the bias column counted among these; x a layer's input, d the gradient at its output, g_i a sample's
gradient, w a weight as a matrix.
"""
