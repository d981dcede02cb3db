"""Fenced blocks of the documentation, and how the tests run them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference-cli.md"
OTHERS = {ROOT / "docs" / "how-to-deploy.md", ROOT / "docs" / "benchmarks.md"}
"""Pages about machines that a test does not have: their links are checked, their commands are not run."""

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>file: \S+|not run: [^\n]+) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

COMPUTING = ("run", "record", "replay", "reduce", "plan")
GOING_ON = ("replay", "reduce")
"""Commands that read what makes a run small from the run."""

FEW_TERMS = ("--option", "influence-lissa.depth=5")
FEW_COLUMNS = ("--project", "200")
"""Fewer than the parameters of the narrow network that the tests put in place of the digits' own."""

SMALL = ("--epochs", "1", "--executor", "serial")
SMALL_DIGITS = (*SMALL, "--set", "train_size=160", "--set", "test_size=24")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One fenced block.

    Attributes:
        page: The file it is in.
        line: Its first line there, from 1.
        language: Word after the fence.
        mark: The HTML comment before it, such as ``not run: why``, or "".
        text: What is between the fences.
    """

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """Yield the arguments of each ``hydra-pipe`` command of a bash block."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            yield words


def pages() -> list[Path]:
    """Return every page, in a fixed order."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page=page,
            line=text.count("\n", 0, match.start("text")),
            language=match["language"],
            mark=match["mark"] or "",
            text=match["text"],
        )
        for match in _BLOCK.finditer(text)
    ]


def arguments(words: list[str], where: str) -> list[str]:
    """Return what follows ``hydra-pipe``."""
    program = words[0].rsplit("/", 1)[-1]
    assert program == "hydra-pipe", f"{where}: `{words[0]}` is no hydra-pipe command; mark the block"
    return words[1:]


def made_small(given: list[str]) -> list[str]:
    """Append what makes a command quick; the last value of an option wins."""
    if "--help" not in given and any("influence-lissa" in word for word in given):
        return [*given, *FEW_TERMS]
    if not given or given[0] not in COMPUTING or given[0] in GOING_ON or "--help" in given:
        return given
    own = any(".py:" in word for word in given[1:2])
    fewer = FEW_COLUMNS if "--project" in given else ()
    return [*given, *(SMALL[2:] if own else SMALL_DIGITS), *fewer]
