"""hydra-pipe: which training samples made a model what it is.

The public face. Names are loaded on first use, so that ``import hydra_pipe`` and
``hydra-pipe --help`` need neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline.compare.by_epoch import Course, by_epoch
    from .pipeline.compare.compare import compare
    from .pipeline.decide.case import Options as DetectOptions
    from .pipeline.decide.clean import Cleaned, clean
    from .pipeline.decide.columns import with_columns
    from .pipeline.decide.detect import detect
    from .pipeline.decide.explain import explain
    from .pipeline.decide.explanation import Explanation
    from .pipeline.decide.report import report
    from .pipeline.drive.attribute import attribute
    from .pipeline.drive.hugging_face import HydraCallback
    from .pipeline.drive.lightning_trainer import LightningCallback
    from .pipeline.drive.recording import Recording, recording
    from .pipeline.evaluate.evaluate import Questions, evaluate
    from .pipeline.executors import events
    from .pipeline.opened_run import Run, open_run
    from .pipeline.reading.decisions import Decision, load_decision, read_decision
    from .pipeline.reading.detections import Detection
    from .pipeline.run import attribute_checkpoint, run
    from .pipeline.spec.spec import RunSpec
    from .pipeline.verify.deep import verify_deep
    from .pipeline.verify.deep_checks import DeepVerification
    from .pipeline.verify.verify import Verification, verify
    from .storage.errors import HydraError
    from .workers.recipe import InitialState, Recipe
    from .workers.recipes.hugging_face.recipe import TrainerRecipe
    from .workers.recipes.lightning.recipe import LightningRecipe

__version__ = "0.1.0"
__all__ = [
    "Cleaned",
    "Course",
    "Decision",
    "DeepVerification",
    "DetectOptions",
    "Detection",
    "Explanation",
    "HydraCallback",
    "HydraError",
    "InitialState",
    "LightningCallback",
    "LightningRecipe",
    "Questions",
    "Recipe",
    "Recording",
    "Run",
    "RunSpec",
    "TrainerRecipe",
    "Verification",
    "__version__",
    "attribute",
    "attribute_checkpoint",
    "by_epoch",
    "clean",
    "compare",
    "detect",
    "evaluate",
    "events",
    "explain",
    "load_decision",
    "open_run",
    "read_decision",
    "recording",
    "report",
    "run",
    "verify",
    "verify_deep",
    "with_columns",
]

_HOMES = {
    "Cleaned": ".pipeline.decide.clean:Cleaned",
    "Course": ".pipeline.compare.by_epoch:Course",
    "Decision": ".pipeline.reading.decisions:Decision",
    "DeepVerification": ".pipeline.verify.deep_checks:DeepVerification",
    "DetectOptions": ".pipeline.decide.case:Options",
    "Detection": ".pipeline.reading.detections:Detection",
    "Explanation": ".pipeline.decide.explanation:Explanation",
    "HydraCallback": ".pipeline.drive.hugging_face:HydraCallback",
    "HydraError": ".storage.errors:HydraError",
    "InitialState": ".workers.recipe:InitialState",
    "LightningCallback": ".pipeline.drive.lightning_trainer:LightningCallback",
    "LightningRecipe": ".workers.recipes.lightning.recipe:LightningRecipe",
    "Questions": ".pipeline.evaluate.evaluate:Questions",
    "Recipe": ".workers.recipe:Recipe",
    "Recording": ".pipeline.drive.recording:Recording",
    "Run": ".pipeline.opened_run:Run",
    "RunSpec": ".pipeline.spec.spec:RunSpec",
    "TrainerRecipe": ".workers.recipes.hugging_face.recipe:TrainerRecipe",
    "Verification": ".pipeline.verify.verify:Verification",
    "attribute": ".pipeline.drive.attribute:attribute",
    "attribute_checkpoint": ".pipeline.run:attribute_checkpoint",
    "by_epoch": ".pipeline.compare.by_epoch:by_epoch",
    "clean": ".pipeline.decide.clean:clean",
    "compare": ".pipeline.compare.compare:compare",
    "detect": ".pipeline.decide.detect:detect",
    "evaluate": ".pipeline.evaluate.evaluate:evaluate",
    "events": ".pipeline.executors.events",
    "explain": ".pipeline.decide.explain:explain",
    "load_decision": ".pipeline.reading.decisions:load_decision",
    "open_run": ".pipeline.opened_run:open_run",
    "read_decision": ".pipeline.reading.decisions:read_decision",
    "recording": ".pipeline.drive.recording:recording",
    "report": ".pipeline.decide.report:report",
    "run": ".pipeline.run:run",
    "verify": ".pipeline.verify.verify:verify",
    "verify_deep": ".pipeline.verify.deep:verify_deep",
    "with_columns": ".pipeline.decide.columns:with_columns",
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
