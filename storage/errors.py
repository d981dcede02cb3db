"""Every error hydra-pipe raises on purpose.

The tree fits on one screen. Each message is one line that states the value, the limit and the
remedy. Exceptions carry a single string, so that they survive pickling between processes.

    HydraError                     exit code 1
      InputError                   what the user gave is wrong
        SpecError                  a field of the run specification
        RecipeError                the recipe cannot be loaded or traced
        SpecMismatch               the run directory was made with another specification
      TrainingError                the training run itself
        NonFiniteLoss              a loss or weight became NaN or infinite
        NonFiniteTangents          the losses are finite, their derivatives are not
        ReplayDiverged             a replay left the recorded trajectory
        ConservationBroken         hypergradients do not add up to the training
      EstimatorError               an estimator does not apply to this model as it stands
        NegativeCurvature          the Hessian to be inverted is not positive definite
        EstimatorDiverged          an iteration ran away
      StoreError                   the run directory
        RunNotFound                no run there
        IncompleteStage            a stage has not been committed
        CorruptStore               bytes on disk are not the bytes that were written
        StorageFull                no space left
        RunLocked                  another command writes to the run
        RunLost                    another command took the run over
      RunStopped                   ended because `hydra-pipe stop` asked; exit code 130
      ResourceError                machines
        DoesNotFit                 more memory needed than there is
        ClusterTooSmall            the cluster can never place what was asked
        DeviceMissing              the asked-for device is not there
        WorkerLost                 a worker died more often than allowed
"""

from __future__ import annotations

from .secrets import masked


class HydraError(Exception):
    """Base of all deliberate errors; ``str(error)`` is one line for the user."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))  # whatever address a message repeats, no key of it is shown


class InputError(HydraError):
    """Something the user gave is wrong."""


class SpecError(InputError):
    """A field of the run specification is wrong."""


class RecipeError(InputError):
    """The recipe cannot be loaded, or its samples cannot be traced."""


class SpecMismatch(InputError):
    """The run directory holds a run of another specification."""


class TrainingError(HydraError):
    """The training run failed."""


class NonFiniteLoss(TrainingError):
    """A loss or a weight became NaN or infinite."""


class NonFiniteTangents(TrainingError):
    """A gradient, coefficient, tangent or contribution is NaN or infinite, though the losses are finite."""


class ReplayDiverged(TrainingError):
    """A replay left the recorded trajectory."""


class ConservationBroken(TrainingError):
    """The hypergradients of all samples do not add up to what training did to the weights."""


class EstimatorError(HydraError):
    """An estimator does not apply to this model as it stands."""


class NegativeCurvature(EstimatorError):
    """The Hessian to be inverted is not positive definite."""


class EstimatorDiverged(EstimatorError):
    """An iteration of an estimator ran away."""


class StoreError(HydraError):
    """The run directory cannot be read or written."""


class RunNotFound(StoreError):
    """There is no run at this place."""


class IncompleteStage(StoreError):
    """A stage whose results were asked for has not been committed."""


class CorruptStore(StoreError):
    """Bytes on disk are not the bytes that were written."""


class StorageFull(StoreError):
    """The disk is full or a quota is reached."""


class RunLocked(StoreError):
    """Another command writes to the run."""


class RunLost(StoreError):
    """Another command took the run over, and this one must not write to it any more."""


class RunStopped(HydraError):
    """The command ended because it was asked to; what it committed is kept."""

    exit_code = 130


class ResourceError(HydraError):
    """The machines cannot do what was asked."""


class DoesNotFit(ResourceError):
    """More memory is needed than there is."""


class ClusterTooSmall(ResourceError):
    """The cluster can never place what was asked."""


class DeviceMissing(ResourceError):
    """The asked-for device is not there."""


class WorkerLost(ResourceError):
    """A worker died more often than allowed."""
