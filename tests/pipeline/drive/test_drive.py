"""What drives a run notes its own in ``run.json`` and leaves what another command noted meanwhile."""

from __future__ import annotations

import pytest
from hydra_pipe.pipeline.drive import drive as driving
from hydra_pipe.pipeline.drive import notes
from hydra_pipe.pipeline.executors.events import null
from hydra_pipe.pipeline.executors.serial import SerialExecutor
from hydra_pipe.pipeline.plan.survey import survey
from hydra_pipe.pipeline.reading.run_info import read_info
from hydra_pipe.pipeline.vocabulary import STAGES

from hydra_pipe import RunSpec, run
from tests.recipes import Small


@pytest.fixture
def asked(tmp_path):
    return RunSpec(
        recipe=Small(), out=str(tmp_path / "r"), executor="serial", device="cpu", track="6", test="4"
    )


def other_command(directory):
    info = read_info(directory).with_method("tracin", mode="attribute", shards=1)
    directory.update(lambda _: info.with_stage("tracin/attribute", units=2).to_json())


def test_what_was_noted_before_the_first_stage_stays(asked):
    run(asked)
    begun = driving.begin(asked, survey(asked), SerialExecutor(), null)
    other_command(begun.session.directory)
    driving.drive(begun, STAGES)
    info = read_info(begun.session.directory)
    assert info.entry("tracin").mode == "attribute"
    assert info.stages["tracin/attribute"].units == 2
    assert info.entry("hydra").state == "complete"


def test_what_was_noted_while_the_manifests_are_read_at_the_end_stays(asked, monkeypatch):
    begun = driving.begin(asked, survey(asked), SerialExecutor(), null)
    directory = begun.session.directory
    read = notes.open_trajectory

    def meanwhile(uri, *source):
        other_command(directory)
        return read(uri, *source)

    monkeypatch.setattr(notes, "open_trajectory", meanwhile)
    driving.drive(begun, STAGES)
    info = read_info(directory)
    assert info.entry("tracin").mode == "attribute"
    assert info.summary.disk_bytes
    assert info.rest["environment"]
