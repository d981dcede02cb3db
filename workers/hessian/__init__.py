"""Products of the batch loss's Hessian with tiles of directions, and the trials that choose how they are had.

Letters: Q directions, B samples of a batch, D parameters; v a direction, g the gradient, H the Hessian, J
the derivative of g where that is no gradient of its loss, a a direction for its transpose, h the width of a
difference.
"""
