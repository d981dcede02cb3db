"""The options of a run, one by one: what they are called, take and say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from ..pipeline.spec.groups import BatchNorm, Device, Dtype, ExecutorName, Graphs, PerSample, VisitsKept
from ..pipeline.spec.spec import RunSpec
from ..pipeline.vocabulary import Hessian, Mode, Targets

F = TypeVar("F", bound=Callable[..., Any])

_POSITIVE = click.IntRange(min=1)


def _saying(name: str, default: str, text: str, **settings: Any) -> Callable[[F], F]:
    """Return an option that is None unless given, and what its help says of that."""
    return click.option(name, default=None, help=f"{text}  [default: {default}]", **settings)


def _option(name: str, text: str, **settings: Any) -> Callable[[F], F]:
    """Return an option that is None unless given; the default of `RunSpec`, which applies it, is shown."""
    default = getattr(RunSpec, name.removeprefix("--").replace("-", "_"))
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    return _saying(name, shown, text, **settings)


# In the order of the contract's table. A default of None everywhere: what is not given comes from
# the configuration file, then from RunSpec, and what RunSpec leaves open from the recipe.
SPEC_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    _saying(
        "--out",
        "runs/<recipe name>",
        "Run directory: a local path, s3://, gs:// or az:// address.",
        metavar="URI",
    ),
    _option(
        "--shards",
        "How many shards the tracked samples are cut into; more than there are workers queue. "
        "`auto` decides from memory and workers.",
        metavar="N|auto",
    ),
    _saying(
        "--segments",
        "1, or what the run has",
        "With --mode forward and --hessian none or ekfac: how many segments the steps of the training are cut into. A unit "
        "of the replay is then a shard and a segment, which begins at the record's state, so that the training is not run "
        "once a shard. `auto` decides from workers and bytes. Give it when recording, too: states are then kept at the borders.",
        metavar="K|auto",
    ),
    _option(
        "--track",
        "Training samples to track: the first N, indices A to B-1, a share of every class, "
        "or a file with one index a line.",
        metavar="all|N|A:B|F%|FILE",
    ),
    _option(
        "--test",
        "Test samples: the first N, indices A to B-1, or a file with one index a line.",
        metavar="all|N|A:B|FILE",
    ),
    _option(
        "--mode",
        "forward: one hypergradient a tracked sample, stored. adjoint: one vector a test sample, "
        "carried backwards; contributions of all training samples.",
        type=click.Choice(get_args(Mode)),
    ),
    _option(
        "--hessian",
        "Drop the Hessian (HyDRA's fast form), keep it in EKFAC form, keep it exactly, or put the Gauss-Newton "
        "matrix of the model's outputs, or a mixture of both, in its place.",
        type=click.Choice(get_args(Hessian)),
    ),
    _option(
        "--targets",
        "With --mode adjoint: one vector a test sample, one a class (the mean over its test samples), "
        "or one for the mean over all test samples.",
        type=click.Choice(get_args(Targets)),
    ),
    _option(
        "--exact-rank",
        "With --hessian ekfac: correct exactly along R directions of the test gradients.",
        type=click.IntRange(min=0),
        metavar="R",
    ),
    _option(
        "--dtype",
        "Numbers of training and of hypergradients.",
        type=click.Choice(get_args(Dtype)),
    ),
    _saying("--epochs", "the recipe's", "Passes over the training samples.", type=_POSITIVE, metavar="N"),
    _saying("--batch-size", "the recipe's", "Samples a step.", type=_POSITIVE, metavar="B"),
    _saying("--seed", "the recipe's", "Of initial weights, batch order and dropout.", type=int, metavar="N"),
    _saying(
        "--init",
        "the recipe's initial_state(), or fresh weights",
        "Start training from the weights in a .safetensors or .pt file, which holds tensors by name alone.",
        metavar="FILE",
    ),
    _saying(
        "--at-checkpoint",
        "none",
        "Attribute a model that is trained already: its weights, in a .safetensors or .pt file. Nothing is "
        "trained or recorded.",
        metavar="FILE",
    ),
    _saying(
        "--at",
        "its end",
        "As if training had ended after STEP steps, at a checkpoint of the run at --out, which is recorded: a run "
        "of its own beside it, OUT-at-STEP, from the same record.",
        type=_POSITIVE,
        metavar="STEP",
    ),
    _option(
        "--seeds",
        "Train with K seeds, from --seed on, and average the contributions: METHOD-seedsK, with their spread.",
        type=_POSITIVE,
        metavar="K",
    ),
    click.option(
        "--set",
        "recipe_args",
        multiple=True,
        metavar="KEY=VALUE",
        help="Keyword argument of the recipe's constructor; repeatable. VALUE is JSON "
        '(3, 0.1, true, null, [1,2], "text") or else a string.',
    ),
    _option(
        "--batch-norm",
        "Statistics of a BatchNorm layer within a step: held constant, or coupling the samples "
        "of the batch exactly (slower).",
        type=click.Choice(get_args(BatchNorm)),
    ),
    _option(
        "--per-sample",
        "Gradients of single samples: the fastest way that agrees with autograd when tried, or autograd "
        "itself, one backward pass a sample (slow, always right).",
        type=click.Choice(get_args(PerSample)),
    ),
    _option(
        "--executor",
        "Where shards run: on Ray, or in this process.",
        type=click.Choice(get_args(ExecutorName)),
    ),
    _saying(
        "--address",
        "RAY_ADDRESS, a running local cluster, or a new one",
        "Ray cluster to use.",
        metavar="ADDRESS",
    ),
    _saying(
        "--gpus-per-actor",
        "1 where the cluster has GPUs, else 0",
        "GPUs an actor asks Ray for; a fraction shares one.",
        type=click.FloatRange(min=0),
        metavar="X",
    ),
    _option(
        "--cpus-per-actor",
        "CPU cores an actor asks Ray for.",
        type=click.FloatRange(min=0),
        metavar="X",
    ),
    _saying("--workers", "what the cluster holds", "Actors at a time.", type=_POSITIVE, metavar="N"),
    _saying(
        "--threads",
        "the whole part of --cpus-per-actor",
        "CPU threads of each worker; part of what makes runs repeat bit for bit.",
        type=_POSITIVE,
        metavar="N",
    ),
    _option("--device", "Where tensors live.", type=click.Choice(get_args(Device))),
    _option(
        "--graphs",
        "On a GPU, capture replayed steps as CUDA graphs where they can be (the same bits), or never.",
        type=click.Choice(get_args(Graphs)),
    ),
    click.option(
        "--wait",
        is_flag=True,
        help="Wait for another command that writes to the run; otherwise that is an error, which names it.",
    ),
    _saying(
        "--memory",
        "measured",
        "Memory an actor may use: bytes, or with a unit such as 4GiB.",
        metavar="SIZE",
    ),
    _saying(
        "--reduce-memory",
        f"{RunSpec.reduce_memory >> 30}GiB",
        "Memory a reduce task may use: bytes, or with a unit such as 1GiB.",
        metavar="SIZE",
    ),
    _saying(
        "--checkpoint-every",
        "the plan's",
        "Steps between checkpoints of the record.",
        type=_POSITIVE,
        metavar="STEPS",
    ),
    _option(
        "--visits",
        "Keep each sample's own loss and margin at its visits in the record, for `detect`; auto: up to 1 GiB.",
        type=click.Choice(get_args(VisitsKept)),
    ),
    _option(
        "--curvature-checkpoints",
        "With ekfac: checkpoints of the record the curvature is taken at.",
        type=_POSITIVE,
        metavar="N",
    ),
    _saying(
        "--curvature-at",
        "spread evenly",
        "With ekfac: steps whose nearest checkpoints are taken instead.",
        metavar="STEP,...",
    ),
    _option(
        "--curvature-samples",
        "With ekfac: at most how many training samples the curvature is averaged over.",
        type=_POSITIVE,
        metavar="N",
    ),
    _option(
        "--curvature-core",
        "With ekfac: leading coordinates that keep their full curvature, across layers too; 0: none.",
        type=click.IntRange(min=0),
        metavar="C",
    ),
    _option(
        "--curvature-flat",
        "With ekfac: eigenvalues that change no coefficient by more than this share are 0; 0: all are kept.",
        type=click.FloatRange(0.0, 1.0),
        metavar="S",
    ),
    _option(
        "--curvature-share",
        "With mixed: share of the Hessian; the rest is the Gauss-Newton matrix's.",
        type=click.FloatRange(0.01, 0.99),
        metavar="S",
    ),
    _option(
        "--max-attempts",
        "How often a shard is tried when its worker dies.",
        type=_POSITIVE,
        metavar="N",
    ),
    _option(
        "--start-timeout",
        "Seconds to wait for the cluster to place the actors.",
        type=click.FloatRange(min=0.1),
        metavar="SECONDS",
    ),
    _saying(
        "--unit-timeout",
        "none",
        "Seconds after which the attempt at one unit (a shard, a block) counts as lost. With --executor serial the run "
        "ends there.",
        type=click.FloatRange(min=1),
        metavar="SECONDS",
    ),
    click.option(
        "--overwrite",
        is_flag=True,
        help="Replace a run at --out whose specification differs; otherwise that is refused.",
    ),
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False),
        metavar="FILE.toml",
        help="Read these settings from a file (keys as the options; [set] for --set); the command line wins.",
    ),
)
