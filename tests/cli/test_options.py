"""Command line and configuration file become one RunSpec."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import fields
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.cli.headings import HEADINGS as HEADINGS_TABLE
from hydra_pipe.cli.headings import headed
from hydra_pipe.cli.spec_options import (
    BUDGET,
    CURVATURE,
    ELSEWHERE,
    METHOD,
    OF_THE_RUN,
    PLACEMENT,
    SPEC_OPTIONS,
    build_spec,
    parse_pairs,
    spec_options,
)
from hydra_pipe.pipeline.analysis.status import command_line
from hydra_pipe.pipeline.plan import stored_spec
from hydra_pipe.pipeline.spec.setting import names
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.errors import SpecError


def spec_of(*words: str) -> RunSpec:
    found: list[RunSpec] = []

    @click.command()
    @spec_options
    @click.pass_context
    def probe(ctx: click.Context, /, **_: Any) -> None:
        found.append(build_spec(ctx))

    result = CliRunner().invoke(probe, words, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return found[0]


def test_nothing_given_is_the_default_spec() -> None:
    assert spec_of() == RunSpec()


def test_every_field_of_the_spec_can_be_given(tmp_path: Any) -> None:
    (tmp_path / "w.pt").touch()
    text = "mod:Recipe --out o --shards 3 --track 10% --test 0:5 --mode adjoint --hessian ekfac "
    text += "--targets classes --exact-rank 4 --dtype float64 --epochs 2 --batch-size 8 --seed 0 --seeds 3 "
    text += "--batch-norm coupled --per-sample vjp --layers head.*,fc "
    text += "--executor serial --address 10.0.0.1:6379 --gpus-per-actor 0.5 --cpus-per-actor 2 "
    text += (
        "--workers 3 --threads 1 --device cpu --graphs auto --memory 4GiB --reduce-memory 1GiB --overwrite "
    )
    text += "--checkpoint-every 7 --curvature-checkpoints 3 --curvature-at 0,5 --curvature-samples 9 --curvature-core 8 --curvature-flat 0.1 --curvature-share 0.3 --max-attempts 5 --start-timeout 9 --unit-timeout 99 --visits off --set a=1"
    spec = spec_of(*text.split(), "--init", str(tmp_path / "w.pt"))
    default = RunSpec()
    same = [f.name for f in fields(RunSpec) if getattr(spec, f.name) == getattr(default, f.name)]
    assert same == [
        "at_checkpoint",
        "at",
        "project",
        "store_dtype",
        "segments",
        "wait",
        "reduce_memory",
    ]  # instead of a training; its middle; not of adjoint mode; not waiting and 1GiB are the default
    assert spec.layers == ("head.*", "fc")
    rows = spec_of("--project", "4096", "--store-dtype", "float16")
    assert (rows.project, rows.store_dtype) == (4096, "float16")
    assert spec_of("--at", "4").at == 4
    assert spec_of("--at-checkpoint", str(tmp_path / "w.pt")).at_checkpoint == str(tmp_path / "w.pt")
    assert (spec.shards, spec.memory, spec.recipe_args) == (3, 4 << 30, {"a": 1})


def test_the_command_line_wins_over_the_file(tmp_path: Any) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'recipe = "mod:A"\nepochs = 9\nbatch-size = 4\noverwrite = true\n[set]\nx = 1\ny = "two"\n'
    )
    spec = spec_of("--config", str(file), "--epochs", "3", "--set", "x=5")
    assert (spec.recipe, spec.epochs, spec.batch_size, spec.overwrite) == ("mod:A", 3, 4, True)
    assert spec.recipe_args == {"x": 5, "y": "two"}
    assert spec_of("mod:B", "--config", str(file)).recipe == "mod:B"


def test_a_default_given_on_the_command_line_wins_too(tmp_path: Any) -> None:
    file = tmp_path / "run.toml"
    file.write_text('hessian = "exact"\n')
    assert spec_of("--config", str(file), "--hessian", "none").hessian == "none"


def test_an_unknown_key_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "run.toml"
    file.write_text("epoch = 3\n")
    with pytest.raises(SpecError, match="epoch"):
        spec_of("--config", str(file))


HEADINGS = ["What is trained", "What is asked", "Curvature", "Placement", "Budget", "Output"]


def help_of(command: str) -> list[str]:
    """The lines of a command's help, from its options on."""
    text = CliRunner().invoke(main, [command, "--help"]).stdout
    return text[text.index(" Example: ") :].splitlines()


def flags_of(command: str) -> set[str]:
    lines = help_of(command)
    return {line.split()[0] for line in lines if line.startswith("  --")}


@pytest.mark.parametrize(
    ("command", "headings"),
    [
        ("run", HEADINGS),
        ("plan", HEADINGS),
        ("record", [name for name in HEADINGS if name != "Curvature"]),
        ("replay", HEADINGS),
        ("reduce", HEADINGS),
        ("attribute", ["Options", *HEADINGS[3:]]),
        ("evaluate", ["Options", "Placement", "Output"]),
        ("compare", ["Options", *HEADINGS[3:]]),
        ("top", ["Options"]),
    ],
)
def test_help_has_headings(command: str, headings: list[str]) -> None:
    assert [line[:-1] for line in help_of(command) if line.endswith(":") and line[0] != " "] == headings


def test_each_stage_shows_what_it_uses() -> None:
    whole, stages = flags_of("run"), {name: flags_of(name) for name in ("record", "replay", "reduce")}
    method = {"--mode", "--hessian", "--targets", "--exact-rank", "--shards", "--store-dtype", "--option"}
    fixed = {"--epochs", "--seed", "--set", "--track", "--test", "--dtype", "--threads"}
    assert method | fixed <= whole
    assert stages["record"] == whole - method - {"--method"}
    assert method <= stages["replay"]
    assert stages["reduce"] == stages["replay"] - {
        "--mode",
        "--shards",
        "--segments",
        "--store-dtype",
        "--option",
    }
    assert not fixed & (stages["replay"] | stages["reduce"])
    assert not any("curvature-" in flag for flag in whole.union(*stages.values()))
    for command in ("replay", "reduce"):  # a run is replaced by those that make a whole one
        assert CliRunner().invoke(main, [command, "--overwrite"]).exit_code == 2


def test_curvature_has_three_spellings(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[RunSpec] = []
    module = ModuleType("hydra_pipe.pipeline.plan.plan")
    module.make_plan = found.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hydra_pipe.pipeline.plan.plan", module)
    keys = {"checkpoints": 3, "at": "0,5", "samples": 9, "core": 8}
    file = tmp_path / "run.toml"
    file.write_text("".join(f"curvature-{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    options = [f"--option=curvature-{key}={value}" for key, value in keys.items()]
    for words in (options, [f"--curvature-{k}={v}" for k, v in keys.items()], [f"--config={file}"]):
        CliRunner().invoke(main, ["plan", *words])
    assert found[0] == found[1] == found[2]
    assert (found[0].curvature_core, found[0].curvature_at) == (8, (0, 5))
    assert CliRunner().invoke(main, ["plan", f"--config={file}", "--option", "curvature_core=7"]).exception
    assert found[3].curvature_core == 7


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["plan", "--option", "damping=3"], 2, "KEY being one of curvature-checkpoints, curvature-at"),
        (["replay", "--option", "curvature-core"], 2, "write KEY=VALUE"),
        (["run", "--option", "damping=3"], 2, "needs a --method that has it"),
        (["run", "--curvature-core", "3", "--option", "curvature-core=4"], 2, "given twice; keep one"),
        (["run", "--option", "curvature-core=many"], 1, "curvature_core 'many'"),
        (["run", "--option", "curvature-core=-1"], 1, "curvature_core -1"),
        (["run", "--hessian", "mixed", "--curvature-share", "1"], 2, "not in the range 0.01<=x<=0.99"),
        (["run", "--hessian", "mixed", "--option", "curvature-share=1"], 1, "a number from 0.01 to 0.99"),
    ],
)
def test_a_wrong_curvature_option_is_refused(words: list[str], code: int, says: str) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == code
    assert says in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("a=3", 3),
        ("a=0.5", 0.5),
        ("a=true", True),
        ("a=null", None),
        ("a=text", "text"),
        ('a="3"', "3"),
        ("a=", ""),
        ("a=b=c", "b=c"),
        ("a=[1]", [1]),
        ('a=[1, "b", [true, null]]', [1, "b", [True, None]]),
        ('a="[1"', "[1"),
        ('a={"b": 1}', '{"b": 1}'),
        ("a=NaN", "NaN"),
    ],
)
def test_set_reads_json_scalars_and_lists(pair: str, value: Any) -> None:
    assert parse_pairs([pair]) == {"a": value}


@pytest.mark.parametrize("pair", ["a", "=1", "a-b=1", "1a=2"])
def test_set_needs_a_name(pair: str) -> None:
    result = CliRunner().invoke(main, ["run", "--set", pair])
    assert result.exit_code == 2
    assert "KEY=VALUE" in result.stderr


@pytest.mark.parametrize("pair", ["a=[1,", "a=[1,2", "a=[b]", "a=[NaN]", "a=['b']"])
def test_set_refuses_what_begins_like_a_list(pair: str) -> None:
    result = CliRunner().invoke(main, ["run", "--set", pair])
    assert (result.exit_code, result.stdout) == (2, "")
    assert pair in result.stderr
    assert "write a=[1,2]" in result.stderr


@pytest.mark.parametrize("value", [[1, 2], ["a"], "[1", "[1]", 3, "3", None, "text"])
def test_a_resuming_command_spells_what_set_reads_back(value: Any) -> None:
    words = shlex.split(command_line({"recipe_args": {"a": value}}, uri="x"))
    assert parse_pairs([words[words.index("--set") + 1]]) == {"a": value}


def test_the_defaults_that_help_shows_are_those_of_the_spec() -> None:
    function: Any = lambda: None
    for option in SPEC_OPTIONS:
        function = option(function)
    shown = {p.name: p.help or "" for p in function.__click_params__}
    for field in fields(RunSpec):
        if field.name not in shown or field.default in (None, False):
            continue
        text = {"reduce_memory": "1GiB"}.get(
            field.name, f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        )
        if field.name != "recipe_args":
            assert f"[default: {text}]" in shown[field.name], field.name
    assert set(shown) - {"config", "recipe"} == {f.name for f in fields(RunSpec)} - {"recipe"}


def test_every_option_of_the_spec_stands_below_the_heading_of_its_group() -> None:
    command = click.Command("run", params=list(spec_options(lambda: None).__click_params__))  # type: ignore[attr-defined]
    found = headed(command, click.Context(command))
    assert "Options" not in found
    for heading in HEADINGS_TABLE:
        shown = {option.name for option in found[heading.title] if "--help" not in option.opts}
        elsewhere = {"recipe", *ELSEWHERE, *CURVATURE}
        assert shown - set(heading.more) == set(names(heading.group)) - elsewhere


def test_who_takes_what_follows_from_the_fields() -> None:
    assert PLACEMENT == (
        "executor",
        "address",
        "gpus_per_actor",
        "cpus_per_actor",
        "workers",
        "graphs",
        "wait",
    )
    assert BUDGET == ("memory", "reduce_memory", "max_attempts", "start_timeout", "unit_timeout")
    assert (*PLACEMENT, *BUDGET) == stored_spec.PLACEMENT
    assert set(OF_THE_RUN) == {"executor", "cpus_per_actor", "threads", "device"}
    assert set(METHOD) == {"mode", "hessian", "targets", "exact_rank", "shards", "store_dtype", *CURVATURE}
