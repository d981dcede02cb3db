"""RunSpec: everything a run can be asked for, checked when it is made.

The fields are the options of ``hydra-pipe run``. ``spec_file.py`` reads them from TOML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ...storage.errors import SpecError
from ..vocabulary import ADJOINT, FORMS, FORWARD, SAMPLES, Form, Hessian, Mode, Targets
from . import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """What to run, and where. Immutable; ``dataclasses.replace`` makes a changed, checked copy.

    Attributes:
        recipe: Built-in name, ``module:Class``, ``path/to/file.py:Class``, or a Recipe instance.
        recipe_args: Keyword arguments of the recipe's constructor; JSON-able. Not with an instance.
        out: Run directory, local path or URI; None: ``runs/<recipe name>``.
        shards: How many shards the tracked samples are cut into, or ``auto``.
        track: Which training samples: ``all``, N, ``A:B``, ``F%``, a file, or positions.
        test: Which test samples, likewise.
        mode: ``forward`` or ``adjoint``.
        hessian: ``none``, ``ekfac`` or ``exact``.
        targets: In adjoint mode, what is carried backwards: ``samples``, one vector a test sample;
            ``classes``, the mean over those of each label; ``mean``, the mean over all of them.
        exact_rank: With ``ekfac``: directions along which contributions are corrected exactly.
        dtype: ``float32`` or ``float64``, of training and hypergradients.
        epochs: Passes over the training dataset; None: the recipe's.
        batch_size: Samples a step; None: the recipe's.
        seed: Seed of the training; None: the recipe's.
        seeds: Trainings with as many seeds, from ``seed`` on; contributions are averaged over them.
        executor: ``ray`` or ``serial``.
        address: Ray cluster, ``host:port``, ``auto`` or ``local``; None: ``RAY_ADDRESS``, then a
            running local cluster, then a new one.
        gpus_per_actor: GPUs a worker holds; None: 1 where the cluster has GPUs, else 0.
        cpus_per_actor: CPUs a worker holds.
        workers: Most workers at a time; None: as many as fit.
        threads: torch threads of every process that computes; None: the whole part of
            ``cpus_per_actor``, at least 1.
        device: ``auto``, ``cpu`` or ``cuda``.
        overwrite: Replace a run whose spec differs.
        batch_norm: ``constant``: batch statistics held constant in per-sample gradients;
            ``coupled``: differentiated through.
        per_sample: ``auto``: the fastest way to each parameter's per-sample gradients that agrees with
            autograd when tried; ``vjp``: autograd itself, one backward pass a sample.
        memory: Main memory one worker may use, bytes; None: measured. Text such as ``"4GiB"`` is
            turned into bytes.
        reduce_memory: Memory of one reduce worker's tile, bytes or text; fixes the tiles.
        checkpoint_every: Steps between checkpoints of the record; None: chosen by the plan.
        curvature_checkpoints: With ``ekfac``: checkpoints of the record the curvature is taken at.
        curvature_at: With ``ekfac``: steps (or text such as ``"0,100"``) whose nearest checkpoints are taken
            instead; None: spread evenly.
        curvature_samples: With ``ekfac``: at most how many training samples it is averaged over.
        curvature_core: With ``ekfac``: leading coordinates that keep their full curvature; 0: none.
        max_attempts: How often a unit is tried when its workers die.
        start_timeout: Seconds to wait for the first worker.

    Raises:
        SpecError: A field is wrong; the message has its value, the limit and the remedy.
    """

    recipe: str | Any = "digits"
    recipe_args: Mapping[str, Any] = field(default_factory=dict)
    out: str | None = None
    shards: int | str = "auto"
    track: str | int | Sequence[int] = "all"
    test: str | int | Sequence[int] = "all"
    mode: Mode = FORWARD
    hessian: Hessian = "none"
    targets: Targets = SAMPLES
    exact_rank: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    epochs: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    seeds: int = 1
    executor: Literal["ray", "serial"] = "ray"
    address: str | None = None
    gpus_per_actor: float | None = None
    cpus_per_actor: float = 1
    workers: int | None = None
    threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    overwrite: bool = False
    batch_norm: Literal["constant", "coupled"] = "constant"
    per_sample: Literal["auto", "vjp"] = "auto"
    memory: int | None = None
    reduce_memory: int = 1 << 30
    checkpoint_every: int | None = None
    curvature_checkpoints: int = 5
    curvature_at: Sequence[int] | str | None = None
    curvature_samples: int = 4096
    curvature_core: int = 256
    max_attempts: int = 3
    start_timeout: float = 120.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = checks.CHECKS[entry.name](entry.name, getattr(self, entry.name))
            object.__setattr__(self, entry.name, value)
        if not isinstance(self.recipe, str) and self.recipe_args:
            raise SpecError(
                f"recipe_args {sorted(self.recipe_args)}: a Recipe instance takes none; "
                "pass them to its constructor"
            )
        if self.exact_rank and self.hessian != "ekfac":
            raise SpecError(
                f"exact_rank {self.exact_rank}: only hessian='ekfac' is corrected, not {self.hessian!r}; "
                "use hessian='ekfac' or exact_rank=0"
            )
        if self.targets != SAMPLES and self.mode != ADJOINT:
            raise SpecError(
                f"targets {self.targets!r}: only mode='adjoint' carries targets, {self.mode!r} has every test "
                "sample at the same price; use mode='adjoint', or targets='samples' and the table interclass"
            )

    @property
    def form(self) -> Form:
        """Name of this Hessian's form, and of the curvature that its methods share."""
        return FORMS[self.hessian]

    @property
    def base_method(self) -> str:
        """Name of the stores of this form and these targets, before any correction by ``exact_rank``."""
        return self.form if self.targets == SAMPLES else f"{self.form}-{self.targets}"

    @property
    def method(self) -> str:
        """Name of the results in the run directory: ``method=`` of the Hive partitions."""
        return f"{self.base_method}-rank{self.exact_rank}" if self.exact_rank else self.base_method

    @property
    def averaged(self) -> str:
        """Name of the average over ``seeds`` trainings; `method` where there is one."""
        return averaged(self.method, self.seeds) if self.seeds > 1 else self.method

    @property
    def torch_threads(self) -> int:
        """Torch threads of every process that computes."""
        return self.threads if self.threads is not None else max(1, int(self.cpus_per_actor))

    @property
    def recipe_reference(self) -> str:
        """The recipe as text: what was given, or ``module:Class`` of an instance."""
        if isinstance(self.recipe, str):
            return self.recipe
        kind = type(self.recipe)
        return f"{kind.__module__}:{kind.__qualname__}"

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the numbers of a run, JSON-able, by name.

        Where the work is done, how often it is retried, the methods computed from one record
        (``mode``, ``hessian``, ``targets``, ``exact_rank``) and how many more records there are (``seeds``)
        are not among them.
        """
        arguments = self.recipe_args
        if not isinstance(self.recipe, str):
            arguments = self.recipe.arguments() if hasattr(self.recipe, "arguments") else {}
        identity = {
            "recipe": self.recipe_reference,
            "recipe_args": dict(arguments),
            "track": self.track,
            "test": self.test,
            "dtype": self.dtype,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "threads": self.torch_threads,
            "device": self.device,
            "batch_norm": self.batch_norm,
            "reduce_memory": self.reduce_memory,
            "checkpoint_every": self.checkpoint_every,
        }
        if self.per_sample != "auto":  # rounding alone: runs of before it existed go on
            identity["per_sample"] = self.per_sample
        return {name: _plain(name, value) for name, value in identity.items()}

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Compare with an identity read back from a run; return one line a field that differs.

        Args:
            stored: What :meth:`identity` returned for the stored run, after JSON.
        """
        asked = self.identity()
        names = [*asked, *(name for name in stored if name not in asked)]
        return [
            f"{name}: stored {_short(stored, name)}, asked {_short(asked, name)}"
            for name in names
            if name not in stored or name not in asked or stored[name] != asked[name]
        ]

    @classmethod
    def from_toml(cls, path: str, **overrides: Any) -> RunSpec:
        """Read a spec from a TOML file; see :func:`load_toml`.

        Args:
            path: The file.
            overrides: Fields that win over the file; ``recipe_args`` is merged key by key.
        """
        values = load_toml(path)
        if "recipe_args" in values and "recipe_args" in overrides:
            overrides["recipe_args"] = {**values["recipe_args"], **overrides["recipe_args"]}
        return cls(**{**values, **overrides})


def averaged(method: str, seeds: int) -> str:
    """Return the name of the average of a method over ``seeds`` trainings."""
    return f"{method}-seeds{seeds}"


def load_toml(path: str) -> dict[str, Any]:
    """Read the keyword arguments of :class:`RunSpec` from a TOML file.

    Keys are the options of ``hydra-pipe run``, with ``-`` or ``_``; the table ``[set]`` holds the
    recipe's constructor arguments.

    Raises:
        SpecError: The file is missing or no TOML, or a key is unknown.
    """
    from .spec_file import read_spec_file

    return read_spec_file(path, [entry.name for entry in fields(RunSpec)])


def _plain(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"{name} {value!r}: cannot be stored in run.json ({error}); use plain values"
        ) from None


def _short(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "nothing"
    text = json.dumps(values[name])
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def parse_bytes(size: int | str, what: str = "size") -> int:
    """Turn ``4GiB``, ``512MB``, ``1.5 GB`` or a number of bytes into bytes.

    Raises:
        SpecError: The text is no size.
    """
    return checks.parse_bytes(size, what)
