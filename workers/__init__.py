"""What runs beside the model: recipes, the training loop, per-sample gradients, hypergradients."""
