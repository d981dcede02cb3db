"""Per-sample gradients of one batch: rules per layer, fallbacks, and the probe that judges them."""
