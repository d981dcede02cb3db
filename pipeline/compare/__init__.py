"""The methods of a run held against each other without retraining: their order, extremes, signs and cost.

``by_epoch`` does so in the course of training. Letters: n tracked training samples, Q targets.
"""
