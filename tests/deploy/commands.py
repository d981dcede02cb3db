"""Reads hydra-pipe commands out of pages and files, and has the command line understand them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hydra_pipe.cli import main
from hydra_pipe.cli.spec_options import build_spec

from deploy import submit

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PAGE = ROOT / "docs" / "how-to-deploy.md"
SECRET = re.compile(r"secret|token|passw|credential|access_key|api_?key", re.IGNORECASE)
COMPUTING = ("run", "plan", "record", "replay", "reduce")

_BASH = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_IMAGE = re.compile(r"hydra-pipe:\S+")


def bash_lines(text: str) -> list[list[str]]:
    """Return the words of every command in the ``bash`` blocks of a page."""
    joined = "\n".join(_BASH.findall(text)).replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def hydra_words(words: list[str]) -> list[str] | None:
    """Return what a command gives to ``hydra-pipe``, by whatever way it does; None if nothing."""
    if "deploy/submit.py" in words:
        return submit.parse(words[words.index("deploy/submit.py") + 1 :]).command
    if words[:2] == ["docker", "run"]:
        image = next(i for i, word in enumerate(words) if _IMAGE.fullmatch(word))
        return words[image + 1 :]
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    return words[1:] if words and words[0] == "hydra-pipe" else None


def understand(words: list[str]) -> None:
    """Have click parse the words after ``hydra-pipe``, and the specification check their values."""
    context = main.commands[words[0]].make_context(words[0], list(words[1:]))
    if words[0] in COMPUTING:
        build_spec(context)
