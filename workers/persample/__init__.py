"""Per-sample gradients out of a batch's own passes: rules by layer, their fallbacks, the trials that choose.

Letters: B samples of a batch, R rows at a time, D parameters, O and I a layer's outputs and inputs, X positions of a
convolution's output; x a layer's input, d the gradient of the loss at its output, g_i that of a sample's loss.
"""
