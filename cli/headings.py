"""``--help`` with its options below headings."""

from __future__ import annotations

from dataclasses import dataclass

import click

from ..pipeline.spec.groups import (
    BudgetSpec,
    CurvatureSpec,
    OutputSpec,
    PlacementSpec,
    QuestionSpec,
    TrainingSpec,
)
from ..pipeline.spec.setting import Group, names

FIRST = "Options"
"""Heading of what belongs below no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    """A heading, and which options stand below it.

    Attributes:
        title: Its text.
        group: Group of a specification whose fields they are for.
        more: Names of further parameters.
        specified: Whether only commands with a whole specification have it.
    """

    title: str
    group: type[Group]
    more: tuple[str, ...] = ()
    specified: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        """Names of parameters."""
        return (*names(self.group), *self.more)


HEADINGS = (
    Heading(title="What is trained", group=TrainingSpec, specified=True),
    Heading(title="What is asked", group=QuestionSpec, more=("estimators",), specified=True),
    Heading(
        title="Curvature",
        group=CurvatureSpec,
        more=("curvature_options", "estimator_options"),
        specified=True,
    ),
    Heading(title="Placement", group=PlacementSpec),
    Heading(title="Budget", group=BudgetSpec),
    Heading(
        title="Output",
        group=OutputSpec,
        more=("config", "figures", "output_format", "quiet", "debug", "help"),
    ),
)


def headed(command: click.Command, context: click.Context) -> dict[str, list[click.Option]]:
    """Return the options that ``--help`` shows, by heading, none of them empty.

    One heading, ``Options``, where the command places no work and there is nothing to tell apart.
    """
    options = [
        parameter
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option) and parameter.get_help_record(context) is not None
    ]
    there = {option.name for option in options}
    if "executor" not in there:
        return {FIRST: options}
    used = [heading for heading in HEADINGS if not heading.specified or "config" in there]
    known = {name: heading.title for heading in used for name in heading.members}
    found = {title: list[click.Option]() for title in (FIRST, *known.values())}
    for option in options:
        name = "help" if "--help" in option.opts else option.name or ""  # click has a name of its own for it
        found[known.get(name, FIRST)].append(option)
    return {heading: members for heading, members in found.items() if members}


class HeadedCommand(click.Command):
    """A command whose help has its options below headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        for heading, options in headed(self, ctx).items():
            with formatter.section(heading):
                records = [option.get_help_record(ctx) for option in options]
                formatter.write_dl([record for record in records if record is not None])
