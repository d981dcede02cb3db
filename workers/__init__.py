"""What runs beside the model: recipes, the training loop, per-sample gradients, hypergradients.

Each sub-room's docstring says what it holds and names its letters; they are one set for all of them.
"""
