"""hydra-pipe: which training samples made a model what it is.

The public face. Names are loaded on first use, so that ``import hydra_pipe`` and
``hydra-pipe --help`` need neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline.drive import run
    from .pipeline.handle import Run, open_run
    from .pipeline.spec import RunSpec
    from .storage.errors import HydraError
    from .workers.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["HydraError", "Recipe", "Run", "RunSpec", "__version__", "open_run", "run"]

_HOMES = {
    "HydraError": ".storage.errors",
    "Recipe": ".workers.recipe",
    "Run": ".pipeline.handle",
    "RunSpec": ".pipeline.spec",
    "open_run": ".pipeline.handle",
    "run": ".pipeline.drive",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
