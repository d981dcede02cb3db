"""Recipes of Hugging Face models: what a ``transformers.Trainer`` is given, trained and followed here.

Needs the extra ``hf`` (transformers, datasets, accelerate; peft for adapters). Nothing is downloaded here.
"""
