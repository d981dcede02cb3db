"""The one seeded training loop and what follows from it.

Record, verified replay, retraining, evaluation, test gradients, and passes at weights that stay.

Letters: N training samples, M test samples, R rows at a time, B samples of a batch, D parameters, P
parameter tensors, G parameter groups, T steps; w weights, m momentum buffers, g the gradient, J the
derivative of an update that is none, v and a directions.
"""
