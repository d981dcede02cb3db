"""The optimiser's step as a linear recursion: recorded settings, coefficients, what follows without a model.

Letters: T steps, S of a segment, G parameter groups, D parameters or eigendirections, P parameter tensors,
W what scalars are held for (G or D), n rows, Q targets, K checkpoints. A step is r = g + L w, m' = p m + k
r, w' = w - h (s m' + q r) with learning rate h, momentum p, weight decay L (in code ``carry, gain, along,
direct`` for p, k, s, q). c_t: what a gradient met at step t adds to w at the end; c_u and c_m: to the
tangents du and dm at the end of a segment; a_u, a_m: the adjoints; phi: what becomes of w_0.
"""
