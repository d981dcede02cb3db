"""Built-in recipes: digits, mnist, fashion-mnist, cifar10.

Only names live here, so that listing them (``hydra-pipe --help``) imports neither torch nor
scikit-learn; ``loading.load_recipe`` imports the one that is asked for.

Letters: n images, k of a batch, C channels, H x W pixels, B samples of a batch.
"""

from __future__ import annotations

BUILT_IN: dict[str, str] = {
    "digits": f"{__name__}.digits:Digits",
    "mnist": f"{__name__}.mnist:Mnist",
    "fashion-mnist": f"{__name__}.mnist:FashionMnist",
    "cifar10": f"{__name__}.cifar10:Cifar10",
}
"""Name of each built-in recipe -> ``module:Class``."""


def names() -> list[str]:
    """Return the names of the built-in recipes, the default (``digits``) first."""
    return list(BUILT_IN)
