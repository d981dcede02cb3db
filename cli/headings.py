"""``--help`` with its options below headings."""

from __future__ import annotations

import click

FIRST = "Options"
"""Heading of what belongs below no other."""

HEADINGS: dict[str, tuple[str, ...]] = {
    "What is trained": ("recipe_args", "epochs", "batch_size", "seed", "seeds", "dtype", "checkpoint_every"),
    "What is asked": ("track", "test", "mode", "targets", "batch_norm", "per_sample", "estimators"),
    "Curvature": ("hessian", "exact_rank", "curvature_options", "estimator_options"),
    "Placement": (
        *("executor", "address", "gpus_per_actor", "cpus_per_actor", "workers", "threads", "device"),
        "shards",
    ),
    "Budget": ("memory", "reduce_memory", "max_attempts", "start_timeout"),
    "Output": ("out", "overwrite", "config", "figures", "output_format", "quiet", "debug"),
}
"""Names of parameters, in the order of the headings."""

PLAIN = ("What is trained", "What is asked", "Curvature")
"""Headings that only commands with a specification have."""


def headed(command: click.Command, context: click.Context) -> dict[str, list[click.Option]]:
    """Return the options that ``--help`` shows, by heading, none of them empty.

    One heading, ``Options``, where the command places no work and there is nothing to tell apart.
    """
    options = [
        parameter
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option) and parameter.get_help_record(context) is not None
    ]
    names = {option.name for option in options}
    if "executor" not in names:
        return {FIRST: options}
    specified = "config" in names
    known = {
        name: heading
        for heading, members in HEADINGS.items()
        for name in members
        if specified or heading not in PLAIN
    }
    found = {heading: list[click.Option]() for heading in (FIRST, *HEADINGS)}
    for option in options:
        heading = "Output" if "--help" in option.opts else known.get(option.name or "", FIRST)
        found[heading].append(option)
    return {heading: members for heading, members in found.items() if members}


class HeadedCommand(click.Command):
    """A command whose help has its options below headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        for heading, options in headed(self, ctx).items():
            with formatter.section(heading):
                records = [option.get_help_record(ctx) for option in options]
                formatter.write_dl([record for record in records if record is not None])
