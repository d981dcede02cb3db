"""Recipes of LightningModules, and what of a ``lightning.Trainer`` is not followed. Lightning itself is not imported here."""
