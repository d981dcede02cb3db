"""The truth by retraining: trials without some of the samples, and every method of a run held against them.

Tables and sentences of the verdict are made in ``report``. Letters: U retrainings, n tracked training
samples, M test samples, Q targets of a method.
"""
