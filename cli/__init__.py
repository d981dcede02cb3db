"""The ``hydra-pipe`` command."""

from .main import main

__all__ = ["main"]
