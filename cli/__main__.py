"""``python -m hydra_pipe.cli``: the command where its script is not installed."""

from .main import main

main()
