"""hydra-pipe: which training samples made a model what it is.

The public face. Names are loaded on first use, so that ``import hydra_pipe`` and
``hydra-pipe --help`` need neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import events
    from .pipeline.analysis.compare import compare
    from .pipeline.analysis.verify import Verification, verify
    from .pipeline.attribute import attribute
    from .pipeline.deep import verify_deep
    from .pipeline.deep_checks import DeepVerification
    from .pipeline.drive import run
    from .pipeline.evaluate import Questions, evaluate
    from .pipeline.handle import Run, open_run
    from .pipeline.over_training import Course
    from .pipeline.over_training import over_training as by_epoch
    from .pipeline.spec import RunSpec
    from .storage.errors import HydraError
    from .workers.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "Course",
    "DeepVerification",
    "HydraError",
    "Questions",
    "Recipe",
    "Run",
    "RunSpec",
    "Verification",
    "__version__",
    "attribute",
    "by_epoch",
    "compare",
    "evaluate",
    "events",
    "open_run",
    "run",
    "verify",
    "verify_deep",
]

_HOMES = {
    "Course": ".pipeline.over_training:Course",
    "DeepVerification": ".pipeline.deep_checks:DeepVerification",
    "HydraError": ".storage.errors:HydraError",
    "Questions": ".pipeline.evaluate:Questions",
    "Recipe": ".workers.recipe:Recipe",
    "Run": ".pipeline.handle:Run",
    "RunSpec": ".pipeline.spec:RunSpec",
    "Verification": ".pipeline.analysis.verify:Verification",
    "attribute": ".pipeline.attribute:attribute",
    "by_epoch": ".pipeline.over_training:over_training",
    "compare": ".pipeline.analysis.compare:compare",
    "evaluate": ".pipeline.evaluate:evaluate",
    "events": ".pipeline.events",
    "open_run": ".pipeline.handle:open_run",
    "run": ".pipeline.drive:run",
    "verify": ".pipeline.analysis.verify:verify",
    "verify_deep": ".pipeline.deep:verify_deep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, inside = _HOMES[name].partition(":")
    module = import_module(home, __name__)
    value = getattr(module, inside) if inside else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
