"""What has no end, and numbers beyond use, are refused at once; keys in addresses are never shown or stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.cli import main
from hydra_pipe.pipeline.spec.spec import RunSpec, load_toml
from hydra_pipe.storage.errors import HydraError, SpecError
from hydra_pipe.storage.secrets import holds_credentials, masked

from tests.end_to_end.support import cli

GOOD = "tests.recipes:Small"
PLAN = ("plan", GOOD, "--executor", "serial")
SECRET = "hunter2/hunter3"
ADDRESSES = (
    f"s3://KEY:{SECRET}@bucket/run",
    f"S3:/KEY:{SECRET}@bucket/run",
    f"simplecache::s3://KEY:{SECRET}@bucket/run",
    f"https://user:{SECRET}@host/run",
    "s3://bucket/run?X-Amz-Signature=hunter2",
    "az://container/run?sv=1&sig=hunter2",
)
HUGE = str(10**12)


def refused(result: Any, *says: str) -> str:
    assert result.exit_code in (1, 2), result.output
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)
    text: str = result.output
    assert "unexpected" not in text
    assert "Traceback" not in text
    for one in says:
        assert one in text
    return text


@pytest.mark.parametrize("option", ["--track", "--test", "--config"])
def test_devices_and_pipes_are_no_files(option, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for path in ("/dev/zero", tmp_path / "endless", tmp_path / "pipe"):
        refused(cli(*PLAN, option, path), "no regular file")


def test_a_recipe_is_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.py")
    refused(cli("plan", f"{tmp_path / 'recipe.py'}:Mine"), "there is no Python file")


@pytest.mark.parametrize(
    "words",
    [
        ("--epochs", HUGE),
        ("--seeds", HUGE),
        ("--shards", "9" * 5000),
        ("--workers", HUGE),
        ("--threads", HUGE),
        ("--max-attempts", HUGE),
        ("--exact-rank", HUGE, "--hessian", "ekfac"),
        ("--batch-size", HUGE),
        ("--batch-size", "1000000000"),
        ("--checkpoint-every", HUGE),
        ("--seed", "9" * 30),
        ("--track", "9" * 5000),
        ("--test", "0:" + "9" * 5000),
        ("--track", "9" * 5000 + "%"),
        ("--memory", "9" * 400 + "GiB"),
        ("--reduce-memory", HUGE + "TiB"),
        ("--curvature-at", HUGE),
        ("--option", "curvature-checkpoints=" + HUGE),
        ("--option", "curvature-samples=--5"),
        ("--address", "host:²"),
        ("--unit-timeout", "0"),
        ("--unit-timeout", "nan"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_giant_numbers_are_refused_at_once(words):
    refused(cli(*PLAN, *words))


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "RUN", "--subsets", HUGE),
        ("evaluate", "RUN", "--leave-one-out", HUGE),
        ("evaluate", "RUN", "--seeds", HUGE),
        ("evaluate", "RUN", "--subset-seed", "9" * 30),
        ("clean", "RUN", "--retrain", HUGE),
        ("top", "RUN", "-k", HUGE),
        ("compare", "RUN", "-k", HUGE),
        ("detect", "RUN", "--neighbours", HUGE),
        ("report", "RUN", "--rows", HUGE, "--to", "x.html"),
        ("attribute", "RUN", "--seeds", HUGE),
        ("verify", "RUN", "--deep", "--rows", HUGE),
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_giant_counts_of_other_commands_too(words, tmp_path):
    assert HUGE[:6] in refused(cli(*words)) or "9999" in cli(*words).output


CONFIGS = {
    "deep": "a = " + "[" * 3000 + "]" * 3000,
    "many digits": "epochs = " + "9" * 5000,
    "another encoding": "\xff".encode("latin1"),
    "no TOML": "epochs = = 3",
    "a table for a number": "[epochs]\na = 1",
    "a date": "seed = 2020-01-01",
    "NaN": "start_timeout = nan",
    "a list for a word": 'hessian = ["exact"]',
    "an address with a key": f'out = "s3://KEY:{SECRET}@bucket/run"',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_read_or_refused(name, tmp_path):
    text = CONFIGS[name]
    (tmp_path / "c.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as caught:
        RunSpec(**load_toml(str(tmp_path / "c.toml")))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("address", ADDRESSES)
def test_keys_in_addresses_are_found_and_masked(address):
    assert holds_credentials(address)
    assert "hunter" not in masked(f"cannot read {address}: it is so")
    assert "hunter" not in str(HydraError(f"no run at {address}"))
    with pytest.raises(SpecError) as caught:
        RunSpec(out=address)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("address", ["s3://bucket/a@b", "/a/b@c", "user@host", "s3://bucket/run", "a:b@c"])
def test_what_is_no_key_is_left_alone(address):
    assert masked(address) == address


def commands() -> list[tuple[str, ...]]:
    """Every place of every command that takes an address or a path, with KEY for it."""
    found = []
    for name, command in main.commands.items():
        paths = {
            "--out",
            "--to",
            "--figures",
            "--init",
            "--at-checkpoint",
            "--track",
            "--test",
            "--config",
            "--list",
        }
        paths |= {
            "--drop",
            "--cut",
            "--check",
            "--truth",
            "--copy",
            "--address",
            "--set",
            "--detection",
            "--name",
        }
        takes = [p for p in command.params if p.param_type_name == "argument"]
        found += [(name, *("KEY" if j == k else "nowhere" for j in range(k + 1))) for k in range(len(takes))]
        options = {o for p in command.params if p.param_type_name == "option" for o in p.opts}
        for option in sorted(options & paths):
            value = "data=KEY" if option == "--set" else "KEY"
            found.append((name, *("nowhere" for p in takes if p.required), option, value))
    return found


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words))
def test_no_command_shows_a_key(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ADDRESSES[:1]:
        result = cli(*(word.replace("KEY", address) for word in words))
        assert result.exit_code in (1, 2)
        assert "hunter" not in result.output
        assert "Traceback" not in result.output
    assert not any(Path(tmp_path).iterdir())


def test_arguments_with_a_key_are_not_stored():
    with pytest.raises(SpecError, match="recipe_args data: holds an address with credentials"):
        RunSpec(recipe_args={"data": [{"at": ADDRESSES[0]}]})
