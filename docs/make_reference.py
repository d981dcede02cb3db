"""Write docs/reference-cli.md from the commands themselves.

    python docs/make_reference.py            # writes the page
    python docs/make_reference.py --check    # exit code 1 when the page is out of date

A test runs the check, so the page cannot fall behind the code.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from hydra_pipe.cli import main as group
from hydra_pipe.cli.headings import headed

PAGE = Path(__file__).with_name("reference-cli.md")

HEAD = """\
# Command line

<!-- Made by docs/make_reference.py from the commands; change those, then run it again. -->

After `make run` the command is `.venv/bin/hydra-pipe`; `source .venv/bin/activate` puts it on your `PATH`.
Every command takes `--help`. Results go to stdout, progress and messages to stderr.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the run failed or the input is wrong; one line says what, where and what to do |
| 2 | usage: an unknown option or a value that cannot be read |
| 130 | interrupted, or ended by `hydra-pipe stop`; the same command continues |
| 143 | terminated (SIGTERM); the same command continues |

[How to run](how-to-run.md) shows the options at work, [Troubleshooting](troubleshooting.md) lists the errors.
"""


def page() -> str:
    """Return the whole page as Markdown."""
    parts = [HEAD]
    context = click.Context(group, info_name="hydra-pipe", **group.context_settings)
    parts.append(_section("hydra-pipe", group, context))
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        below = click.Context(command, info_name=name, parent=context, **command.context_settings)
        parts.append(_section(f"hydra-pipe {name}", command, below))
    return "\n".join(parts)


def _section(title: str, command: click.Command, context: click.Context) -> str:
    text, examples = _help(command)
    usage = " ".join([title, *command.collect_usage_pieces(context)])
    lines = [f"## {title}", "", "```text", usage, "```", "", *text, ""]
    if examples:
        lines += ["```bash", *examples, "```", ""]
    parts = {heading: list(_rows(options, context)) for heading, options in headed(command, context).items()}
    if title == "hydra-pipe plan":
        run = headed(group.commands["run"], context)
        common = {row for options in run.values() for row in _rows(options, context)}
        parts = {"": [row for rows in parts.values() for row in rows if row not in common]}
        lines += [
            "Takes the argument and the options of [`hydra-pipe run`](#hydra-pipe-run) but `--method`, and:",
            "",
        ]
    for heading, rows in parts.items():
        if len(parts) > 1:
            lines += [f"**{heading}**", ""]
        lines += ["| option | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _help(command: click.Command) -> tuple[list[str], list[str]]:
    """Return a command's paragraphs and its examples."""
    paragraphs, examples = [], []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        joined = " ".join(block.split())
        if joined.startswith("Example: "):
            examples.append(joined.removeprefix("Example: "))
        else:
            paragraphs += [_plain(joined), ""]
    return paragraphs[:-1], examples


def _rows(options: Iterable[click.Option], context: click.Context) -> Iterator[str]:
    for option in options:
        record = option.get_help_record(context)
        assert record is not None
        names, text = record
        cells = (f"`{names}`", _plain(" ".join(text.split())))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Keep Markdown from reading angle brackets as HTML."""
    return text.replace("<", "&lt;").replace(">", "&gt;")


def main() -> int:
    """Write the page, or compare it with ``--check``."""
    parser = argparse.ArgumentParser(description="Write docs/reference-cli.md from the commands.")
    parser.add_argument("--check", action="store_true", help="only compare")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE.name} is out of date; run python docs/make_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
