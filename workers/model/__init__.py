"""A model seen from outside: where its parameters lie in one flat vector, and what it keeps besides.

Letters: D parameters, P parameter tensors, G parameter groups.
"""
