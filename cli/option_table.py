"""The options of a run, one by one: what they are called, take and say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_POSITIVE = click.IntRange(min=1)


def _option(name: str, default: str, text: str, **settings: Any) -> Callable[[F], F]:
    """Return an option that is None unless given; ``default`` is shown, `RunSpec` applies it."""
    return click.option(name, default=None, help=f"{text}  [default: {default}]", **settings)


# In the order of the contract's table. A default of None everywhere: what is not given comes from
# the configuration file, then from RunSpec, and what RunSpec leaves open from the recipe.
SPEC_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    _option(
        "--out",
        "runs/<recipe name>",
        "Run directory: a local path, s3://, gs:// or az:// address.",
        metavar="URI",
    ),
    _option(
        "--shards",
        "auto",
        "How many shards the tracked samples are cut into; more than there are workers queue. "
        "`auto` decides from memory and workers.",
        metavar="N|auto",
    ),
    _option(
        "--track",
        "all",
        "Training samples to track: the first N, indices A to B-1, a share of every class, "
        "or a file with one index a line.",
        metavar="all|N|A:B|F%|FILE",
    ),
    _option(
        "--test",
        "all",
        "Test samples: the first N, indices A to B-1, or a file with one index a line.",
        metavar="all|N|A:B|FILE",
    ),
    _option(
        "--mode",
        "forward",
        "forward: one hypergradient a tracked sample, stored. adjoint: one vector a test sample, "
        "carried backwards; contributions of all training samples.",
        type=click.Choice(["forward", "adjoint"]),
    ),
    _option(
        "--hessian",
        "none",
        "Drop the Hessian (HyDRA's fast form), keep it in EKFAC form, or keep it exactly.",
        type=click.Choice(["none", "ekfac", "exact"]),
    ),
    _option(
        "--targets",
        "samples",
        "With --mode adjoint: one vector a test sample, one a class (the mean over its test samples), "
        "or one for the mean over all test samples.",
        type=click.Choice(["samples", "classes", "mean"]),
    ),
    _option(
        "--exact-rank",
        "0",
        "With --hessian ekfac: correct exactly along R directions of the test gradients.",
        type=click.IntRange(min=0),
        metavar="R",
    ),
    _option(
        "--dtype",
        "float32",
        "Numbers of training and of hypergradients.",
        type=click.Choice(["float32", "float64"]),
    ),
    _option("--epochs", "the recipe's", "Passes over the training samples.", type=_POSITIVE, metavar="N"),
    _option("--batch-size", "the recipe's", "Samples a step.", type=_POSITIVE, metavar="B"),
    _option("--seed", "the recipe's", "Of initial weights, batch order and dropout.", type=int, metavar="N"),
    _option(
        "--seeds",
        "1",
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
        "constant",
        "Statistics of a BatchNorm layer within a step: held constant, or coupling the samples "
        "of the batch exactly (slower).",
        type=click.Choice(["constant", "coupled"]),
    ),
    _option(
        "--per-sample",
        "auto",
        "Gradients of single samples: the fastest way that agrees with autograd when tried, or autograd "
        "itself, one backward pass a sample (slow, always right).",
        type=click.Choice(["auto", "vjp"]),
    ),
    _option(
        "--executor",
        "ray",
        "Where shards run: on Ray, or in this process.",
        type=click.Choice(["ray", "serial"]),
    ),
    _option(
        "--address",
        "RAY_ADDRESS, a running local cluster, or a new one",
        "Ray cluster to use.",
        metavar="ADDRESS",
    ),
    _option(
        "--gpus-per-actor",
        "1 where the cluster has GPUs, else 0",
        "GPUs an actor asks Ray for; a fraction shares one.",
        type=click.FloatRange(min=0),
        metavar="X",
    ),
    _option(
        "--cpus-per-actor",
        "1",
        "CPU cores an actor asks Ray for.",
        type=click.FloatRange(min=0),
        metavar="X",
    ),
    _option("--workers", "what the cluster holds", "Actors at a time.", type=_POSITIVE, metavar="N"),
    _option(
        "--threads",
        "the whole part of --cpus-per-actor",
        "CPU threads of each worker; part of what makes runs repeat bit for bit.",
        type=_POSITIVE,
        metavar="N",
    ),
    _option("--device", "auto", "Where tensors live.", type=click.Choice(["auto", "cpu", "cuda"])),
    _option(
        "--memory",
        "measured",
        "Memory an actor may use: bytes, or with a unit such as 4GiB.",
        metavar="SIZE",
    ),
    _option(
        "--reduce-memory",
        "1GiB",
        "Memory a reduce task may use: bytes, or with a unit such as 1GiB.",
        metavar="SIZE",
    ),
    _option(
        "--checkpoint-every",
        "the plan's",
        "Steps between checkpoints of the record.",
        type=_POSITIVE,
        metavar="STEPS",
    ),
    _option(
        "--curvature-checkpoints",
        "5",
        "With ekfac: checkpoints of the record the curvature is taken at.",
        type=_POSITIVE,
        metavar="N",
    ),
    _option(
        "--curvature-at",
        "spread evenly",
        "With ekfac: steps whose nearest checkpoints are taken instead.",
        metavar="STEP,...",
    ),
    _option(
        "--curvature-samples",
        "4096",
        "With ekfac: at most how many training samples the curvature is averaged over.",
        type=_POSITIVE,
        metavar="N",
    ),
    _option(
        "--curvature-core",
        "256",
        "With ekfac: leading coordinates that keep their full curvature, across layers too; 0: none.",
        type=click.IntRange(min=0),
        metavar="C",
    ),
    _option(
        "--max-attempts",
        "3",
        "How often a shard is tried when its worker dies.",
        type=_POSITIVE,
        metavar="N",
    ),
    _option(
        "--start-timeout",
        "120",
        "Seconds to wait for the cluster to place the actors.",
        type=click.FloatRange(min=0.1),
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
