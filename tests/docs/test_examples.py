"""Every command and snippet of the documentation does what its page says."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.workers.recipes import digits
from torch import nn

from tests.docs.blocks import COMPUTING, OTHERS, REFERENCE, Block, arguments, blocks, made_small, pages

RUNNABLE = [page for page in pages() if page != REFERENCE and page not in OTHERS and blocks(page)]
MAKES_ITS_OWN = {"how-to-run.md", "own-loop.md", "tutorial.md"}


def call(given: list[str], where: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, given)
    assert done.exit_code == code, f"{where}: hydra-pipe {' '.join(given)}\n{done.output}\n{done.stderr}"
    return done.stdout + done.stderr


def narrow_cnn() -> nn.Sequential:
    """Two channels where the recipe has 16, under the same names."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * 4 * 4, 10),
    )


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """Give the digits a narrower network: the pages' dozens of runs take half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "small_cnn", narrow_cnn)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run of digits with wrong labels."""
    place = tmp_path_factory.mktemp("docs")
    words = ["run", "digits", "--set", "label_noise=0.1", "--out", str(place / "digits"), "--quiet"]
    call(made_small(words), "the prepared run")
    return place / "digits"


@pytest.mark.timeout(3600)  # one page is dozens of runs
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_blocks_of_a_page_run_in_order(page, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as of a script beside the files
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if page.name not in MAKES_ITS_OWN:
        shutil.copytree(prepared, tmp_path / "runs" / "digits")
    names: dict[str, object] = {"__name__": "snippet"}
    for block in blocks(page):
        if block.mark.startswith("file: "):
            (tmp_path / block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
        elif block.mark.startswith("not run: "):
            continue
        elif block.language == "bash":
            run_commands(block)
        elif block.language == "python":
            lines = "\n" * block.line + block.text
            exec(compile(lines, block.where, "exec"), names)  # noqa: S102 - our own pages


def run_commands(block: Block) -> None:
    for words in block.commands():
        call(made_small(arguments(words, block.where)), block.where)


@pytest.mark.parametrize("block", blocks(REFERENCE), ids=lambda block: str(block.line))
def test_examples_of_the_reference_are_understood(block, tmp_path, monkeypatch):
    """Parsed only: each stands alone there, and the other pages run the same commands in order."""
    monkeypatch.chdir(tmp_path)
    if block.language != "bash":
        return
    for words in block.commands():
        name, *rest = arguments(words, block.where)
        # Below the group, as on the command line: click keeps the --help that a command was first given.
        above = click.Context(main, info_name="hydra-pipe", **main.context_settings)
        main.commands[name].make_context(name, rest, parent=above)


def test_every_command_and_option_has_an_example():
    shown: dict[str, set[str]] = {name: set() for name in main.commands}
    everywhere: set[str] = set()
    for page in RUNNABLE:
        for block in blocks(page):
            if block.language != "bash" or block.mark.startswith("not run"):
                continue
            for words in block.commands():
                given = arguments(words, block.where)
                options = {word.split("=")[0] for word in given if word.startswith("-")}
                everywhere |= options
                for name in COMPUTING if given[0] in COMPUTING else given[:1]:
                    if name in shown:
                        shown[name] |= options
                if given[0] in shown:
                    shown[given[0]].add("(itself)")
    for name, command in main.commands.items():
        assert "(itself)" in shown[name], f"no page shows hydra-pipe {name}"
        for option in command.params:
            if getattr(option, "hidden", False):
                continue
            flags = {flag for flag in option.opts if flag.startswith("-")}
            common = option.name in ("output_format", "quiet", "debug", "help") or not option.expose_value
            found = everywhere if common else shown[name]
            assert not flags or flags & found, f"no page shows hydra-pipe {name} {'/'.join(sorted(flags))}"
