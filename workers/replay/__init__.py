"""The recorded training run again, and what it gives: hypergradients, contributions, states by epoch.

One step (``base``) finds the tracked members of a batch, watches them and hands their rows to a sink; the
forms of the Hessian and the modes are sinks (``make`` chooses), but for the exact adjoint, which goes
backwards. Beside them: buffers, the join of rows with test gradients, targets that are means, directions of
a correction.

Letters: N training samples, n tracked ones, M test samples, Q targets, R rows at a time, B of a batch, D
parameters, T steps, E epochs, V visits kept as factors, O and I outputs and inputs of a layer, G parameter
groups; c_t the coefficient of step t, du and dm the tangents, a_u and a_m the adjoints, v the direction
they give, and the step's p, k, s, q, h, L as in ``recursion``.
"""
