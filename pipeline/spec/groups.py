"""The groups of what a run can be asked for: fields with their defaults, checks and meaning.

They are also the headings of the command line's help, so nothing here is heavy to import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ...storage.errors import SpecError
from ..vocabulary import (
    ADJOINT,
    FORMS,
    FORWARD,
    GAUSS_NEWTON,
    MIXED,
    SAMPLES,
    Form,
    Hessian,
    Mode,
    Targets,
)
from . import checks
from .setting import Group, free, of_the_method, of_the_run
from .state_file import identity_of, state_file

Dtype = Literal["float32", "float64"]
StoreDtype = Literal["float32", "bfloat16", "float16"]
BatchNorm = Literal["constant", "coupled"]
PerSample = Literal["auto", "vjp"]
VisitsKept = Literal["auto", "on", "off"]
ExecutorName = Literal["ray", "serial"]
Device = Literal["auto", "cpu", "cuda"]
Graphs = Literal["auto", "off"]


@dataclass(frozen=True, kw_only=True)
class TrainingSpec(Group):
    """What is trained.

    Attributes:
        recipe: Built-in name, ``module:Class``, ``path/to/file.py:Class``, or a Recipe instance.
        recipe_args: Keyword arguments of the recipe's constructor; JSON-able. Not with an instance.
        epochs: Passes over the training dataset; None: the recipe's.
        batch_size: Samples a step; None: the recipe's.
        seed: Seed of the training; None: the recipe's.
        seeds: Trainings with as many seeds, from ``seed`` on; contributions are averaged over them.
        dtype: ``float32`` or ``float64``, of training and hypergradients.
        checkpoint_every: Steps between checkpoints of the record; None: chosen by the plan.
        init: File of weights that training starts from, ``.safetensors`` or ``.pt``; None: what the recipe's
            ``initial_state()`` gives, or fresh ones.
        at_checkpoint: File of weights of a model that is trained already: a run without training, for
            estimators that need none; see ``drive.attribute``.
        at: As if training had ended after so many steps, at a checkpoint of the run at ``out``, which is recorded:
            a run of its own beside it, ``OUT-at-STEP``, from the same record. None: at its end.
        visits: Whether the record keeps each sample's own loss and margin at its visits, which detectors read:
            ``on``, ``off``, or ``auto``: while they take at most 1 GiB. Changes nothing else of the run.
    """

    recipe: str | Any = field(
        default="digits",
        metadata=of_the_run(checks.recipe, stored=lambda group: group.recipe_reference),
    )
    recipe_args: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=of_the_run(checks.arguments, stored=lambda group: group._made_with()),
    )
    epochs: int | None = field(default=None, metadata=of_the_run(checks.whole(1, 10**6, optional=True)))
    batch_size: int | None = field(default=None, metadata=of_the_run(checks.whole(1, optional=True)))
    seed: int | None = field(default=None, metadata=of_the_run(checks.whole(0, 2**63 - 1, optional=True)))
    seeds: int = field(default=1, metadata=free(checks.whole(1, 1000)))  # each has a record of its own
    dtype: Dtype = field(default="float32", metadata=of_the_run(checks.one_of(*get_args(Dtype))))
    checkpoint_every: int | None = field(default=None, metadata=of_the_run(checks.whole(1, optional=True)))
    init: str | None = field(
        default=None,
        metadata=of_the_run(state_file, stored=lambda group: identity_of(group.init), unless_default=True),
    )
    at_checkpoint: str | None = field(
        default=None,
        metadata=of_the_run(
            state_file, stored=lambda group: identity_of(group.at_checkpoint), unless_default=True
        ),
    )
    at: int | None = field(
        default=None, metadata=of_the_run(checks.whole(1, optional=True), unless_default=True)
    )
    visits: VisitsKept = field(default="auto", metadata=free(checks.one_of(*get_args(VisitsKept))))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.recipe, str) and self.recipe_args:
            raise SpecError(
                f"recipe_args {sorted(self.recipe_args)}: a Recipe instance takes none; "
                "pass them to its constructor"
            )
        asked = {"init": self.init, "epochs": self.epochs, "checkpoint_every": self.checkpoint_every}
        asked |= {
            "at": self.at,
            "seeds": self.seeds if self.seeds > 1 else None,
            "visits": self.visits if self.visits == "on" else None,
        }
        for name, value in asked.items() if self.at_checkpoint else ():
            if value is not None:
                raise SpecError(
                    f"{name} {value!r}: with at_checkpoint nothing is trained or recorded; leave it out"
                )

        if self.at is not None and self.seeds > 1:
            raise SpecError(
                f"at {self.at}: one training has this checkpoint, not {self.seeds}; leave seeds out"
            )

    @property
    def recipe_reference(self) -> str:
        """The recipe as text: what was given, or ``module:Class`` of an instance."""
        if isinstance(self.recipe, str):
            return self.recipe
        kind = type(self.recipe)
        return f"{kind.__module__}:{kind.__qualname__}"

    def _made_with(self) -> Mapping[str, Any]:
        if isinstance(self.recipe, str):
            return self.recipe_args
        return self.recipe.arguments() if hasattr(self.recipe, "arguments") else {}


@dataclass(frozen=True, kw_only=True)
class QuestionSpec(Group):
    """What is asked of the training.

    Attributes:
        track: Which training samples: ``all``, N, ``A:B``, ``F%``, a file, or positions.
        test: Which test samples, likewise.
        mode: ``forward`` or ``adjoint``.
        targets: In adjoint mode, what is carried backwards: ``samples``, one vector a test sample;
            ``classes``, the mean over those of each label; ``mean``, the mean over all of them.
        batch_norm: ``constant``: batch statistics held constant in per-sample gradients;
            ``coupled``: differentiated through.
        per_sample: ``auto``: the fastest way to each parameter's per-sample gradients that agrees with
            autograd when tried; ``vjp``: autograd itself, one backward pass a sample.
        layers: Parameters that count: patterns over their names (or text such as ``"head.*,norm.weight"``); None: all.
            Contributions are then what goes through these alone.
        project: In forward mode: most numbers that a row of hypergradients or test gradients is projected to;
            None: rows are whole.
        store_dtype: In forward mode: what hypergradients are stored as, ``float32``, ``bfloat16`` or ``float16``
            with a scale a row; None: as ``dtype``.
    """

    track: str | int | Sequence[int] = field(default="all", metadata=of_the_run(checks.samples))
    test: str | int | Sequence[int] = field(default="all", metadata=of_the_run(checks.samples))
    mode: Mode = field(default=FORWARD, metadata=of_the_method(checks.one_of(*get_args(Mode))))
    targets: Targets = field(default=SAMPLES, metadata=of_the_method(checks.one_of(*get_args(Targets))))
    batch_norm: BatchNorm = field(
        default="constant", metadata=of_the_run(checks.one_of(*get_args(BatchNorm)))
    )
    per_sample: PerSample = field(
        default="auto",
        # Rounding alone, so that runs of before it existed go on.
        metadata=of_the_run(checks.one_of(*get_args(PerSample)), unless_default=True),
    )
    layers: Sequence[str] | str | None = field(
        default=None, metadata=of_the_run(checks.patterns, unless_default=True)
    )
    project: int | None = field(
        default=None, metadata=of_the_run(checks.whole(1, optional=True), unless_default=True)
    )
    store_dtype: StoreDtype | None = field(
        default=None, metadata=of_the_method(checks.one_of(*get_args(StoreDtype), optional=True))
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets != SAMPLES and self.mode != ADJOINT:
            raise SpecError(
                f"targets {self.targets!r}: only mode='adjoint' carries targets, {self.mode!r} has every test "
                "sample at the same price; use mode='adjoint', or targets='samples' and the table interclass"
            )
        for name in ("project", "store_dtype"):
            if self.mode == ADJOINT and getattr(self, name) is not None:
                raise SpecError(
                    f"{name} {getattr(self, name)!r}: mode='adjoint' stores no rows, so that it has no meaning there; leave "
                    "it out, or use mode='forward'"
                )


@dataclass(frozen=True, kw_only=True)
class CurvatureSpec(Group):
    """What becomes of the Hessian.

    Attributes:
        hessian: ``none``, ``ekfac``, ``exact``, ``gauss-newton`` or ``mixed``.
        exact_rank: With ``ekfac``: directions along which contributions are corrected exactly.
        curvature_checkpoints: With ``ekfac``: checkpoints of the record the curvature is taken at.
        curvature_at: With ``ekfac``: steps (or text such as ``"0,100"``) whose nearest checkpoints are taken
            instead; None: spread evenly.
        curvature_samples: With ``ekfac``: at most how many training samples it is averaged over.
        curvature_core: With ``ekfac``: leading coordinates that keep their full curvature; 0: none.
        curvature_flat: With ``ekfac``: eigenvalues that change no coefficient by more than this share are set to 0,
            which saves most of the work on large models; 0: all are kept.
        curvature_share: With ``mixed``: share of the Hessian; the rest is the Gauss-Newton matrix's.
    """

    hessian: Hessian = field(default="none", metadata=of_the_method(checks.one_of(*get_args(Hessian))))
    exact_rank: int = field(default=0, metadata=of_the_method(checks.whole(0, 10**6)))
    curvature_checkpoints: int = field(default=5, metadata=of_the_method(checks.whole(1, 10**6)))
    curvature_at: Sequence[int] | str | None = field(default=None, metadata=of_the_method(checks.steps))
    curvature_samples: int = field(default=1024, metadata=of_the_method(checks.whole(1)))
    curvature_core: int = field(default=256, metadata=of_the_method(checks.whole(0)))
    curvature_flat: float = field(default=0.01, metadata=of_the_method(checks.between(0.0, 1.0)))
    curvature_share: float = field(default=0.5, metadata=of_the_method(checks.between(0.01, 0.99)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact_rank and self.hessian != "ekfac":
            raise SpecError(
                f"exact_rank {self.exact_rank}: only hessian='ekfac' is corrected, not {self.hessian!r}; "
                "use hessian='ekfac' or exact_rank=0"
            )

    @property
    def form(self) -> Form:
        """Name of this Hessian's form, and of the curvature that its methods share."""
        return FORMS[self.hessian]

    @property
    def hessian_share(self) -> float:
        """Share of the Hessian in the products of a form that carries vectors; see ``HessianTiles``."""
        return {GAUSS_NEWTON: 0.0, MIXED: self.curvature_share}.get(self.form, 1.0)


@dataclass(frozen=True, kw_only=True)
class PlacementSpec(Group):
    """Where the work is done.

    Attributes:
        executor: ``ray`` or ``serial``.
        address: Ray cluster, ``host:port``, ``auto`` or ``local``; None: ``RAY_ADDRESS``, then a
            running local cluster, then a new one.
        gpus_per_actor: GPUs a worker holds; None: 1 where the cluster has GPUs, else 0.
        cpus_per_actor: CPUs a worker holds.
        workers: Most workers at a time; None: as many as fit.
        threads: torch threads of every process that computes; None: the whole part of
            ``cpus_per_actor``, at least 1.
        device: ``auto``, ``cpu`` or ``cuda``.
        graphs: ``auto``: on a GPU, replayed steps are captured as CUDA graphs where they can be, with the same bits;
            ``off``: never. Capturing has not been run on a GPU yet.
        shards: How many shards the tracked samples are cut into, or ``auto``.
        segments: In forward mode without the Hessian or with EKFAC: how many segments the steps are cut into, or
            ``auto``; a unit of the replay is then a shard and a segment. None: 1, or what the method has.
        wait: Wait for another command that writes to the run, where there is one; else that is an error.
    """

    executor: ExecutorName = field(default="ray", metadata=free(checks.one_of(*get_args(ExecutorName))))
    address: str | None = field(default=None, metadata=free(checks.address))
    gpus_per_actor: float | None = field(
        default=None, metadata=free(checks.number(0, optional=True, whole_above_one=True))
    )
    cpus_per_actor: float = field(default=1, metadata=free(checks.number(0.01)))
    workers: int | None = field(default=None, metadata=free(checks.whole(1, 10**5, optional=True)))
    threads: int | None = field(
        default=None,
        metadata=of_the_run(checks.whole(1, 4096, optional=True), stored=lambda group: group.torch_threads),
    )
    device: Device = field(default="auto", metadata=of_the_run(checks.one_of(*get_args(Device))))
    graphs: Graphs = field(default="off", metadata=free(checks.one_of(*get_args(Graphs))))
    shards: int | str = field(default="auto", metadata=of_the_method(checks.shards))
    segments: int | str | None = field(default=None, metadata=of_the_method(checks.segments))
    wait: bool = field(default=False, metadata=free(checks.flag))

    @property
    def torch_threads(self) -> int:
        """Torch threads of every process that computes."""
        return self.threads if self.threads is not None else max(1, int(self.cpus_per_actor))


@dataclass(frozen=True, kw_only=True)
class BudgetSpec(Group):
    """What the work may use.

    Attributes:
        memory: Main memory one worker may use, bytes; None: measured. Text such as ``"4GiB"`` is
            turned into bytes.
        reduce_memory: Memory of one reduce worker's tile at most, bytes or text. A run keeps the tiles that it began with.
        max_attempts: How often a unit is tried when its workers die.
        start_timeout: Seconds to wait for the first worker's process.
        unit_timeout: Seconds after which the attempt at a unit counts as lost; None: never.
    """

    memory: int | None = field(default=None, metadata=free(checks.size(optional=True)))
    reduce_memory: int = field(default=1 << 30, metadata=free(checks.size()))
    max_attempts: int = field(default=3, metadata=free(checks.whole(1, 1000)))
    start_timeout: float = field(default=120.0, metadata=free(checks.number(0.1)))
    unit_timeout: float | None = field(default=None, metadata=free(checks.number(1, optional=True)))


@dataclass(frozen=True, kw_only=True)
class ExecutionSpec(BudgetSpec, PlacementSpec):
    """Where the work is done and what it may use there: what an executor is made from."""


@dataclass(frozen=True, kw_only=True)
class OutputSpec(Group):
    """Where the results go.

    Attributes:
        out: Run directory, local path or URI; None: ``runs/<recipe name>``.
        overwrite: Replace a run whose spec differs.
    """

    out: str | None = field(default=None, metadata=free(checks.out))
    overwrite: bool = field(default=False, metadata=free(checks.flag))


FILES = ("init", "at_checkpoint")
"""Fields of files: the run's identity knows which file, what was asked for last where it is."""

KEPT = ("executor", "cpus_per_actor")
"""Free fields that a run goes on with unless others are given."""
