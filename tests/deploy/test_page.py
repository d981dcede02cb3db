"""The deployment page: its commands are understood, and the files it names are there."""

from __future__ import annotations

import re

import pytest

from tests.deploy.commands import DEPLOY, PAGE, ROOT, bash_lines, hydra_words, understand

COMMANDS = [words for line in bash_lines(PAGE.read_text()) if (words := hydra_words(line)) is not None]


def test_the_page_shows_every_way_to_run():
    lines = bash_lines(PAGE.read_text())
    assert len(COMMANDS) >= 10
    for way in (["docker", "run"], ["python", "deploy/submit.py"], ["ray", "job"], ["hydra-pipe", "run"]):
        assert any(line[: len(way)] == way for line in lines), way


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_of_the_page_are_understood(words):
    understand(words)


@pytest.mark.parametrize("path", [DEPLOY / "ray-cluster.yaml", DEPLOY / "kuberay-rayjob.yaml"])
def test_options_named_in_comments_exist(path):
    """A comment that names options of ours must not outlive them."""
    from hydra_pipe.cli import main

    known = {flag for option in main.commands["run"].params for flag in option.opts}
    comments = " ".join(re.findall(r"#(.*)", path.read_text()))
    theirs = {"--from-file", "--generate"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", comments)) - theirs <= known


def test_files_named_on_the_page_exist():
    for name in re.findall(r"deploy/[\w.-]+\.\w+", PAGE.read_text()):
        assert (ROOT / name).is_file(), name
