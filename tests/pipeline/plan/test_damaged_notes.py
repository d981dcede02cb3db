"""What ``run.json`` says of recipe and arguments may be damaged: that is said by name, in one line."""

from __future__ import annotations

import json

import pytest
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.storage.errors import CorruptStore

from hydra_pipe import RunSpec, run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    few = {"train_size": 20, "test_size": 5}
    run(RunSpec(recipe="digits", recipe_args=few, epochs=1, out=str(out), executor="serial", device="cpu"))
    return out


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("made_of", "source", 5),
        ("made_of", "source", [1]),
        ("made_of", "data", None),
        ("made_of", "model", [1]),
        ("made_of", "settings", 5),
        ("identity", "recipe_args", "x"),
        ("identity", "recipe_args", [1]),
    ],
)
def test_notes_of_another_type_are_named(recorded, part, name, value):
    file = recorded / "run.json"
    whole = file.read_text()
    info = json.loads(whole)
    info[part][name] = value
    info.pop("document_sha256", None)
    file.write_text(json.dumps(info))
    try:
        with pytest.raises(CorruptStore, match=f"{part}.*restore"):
            attribute(str(recorded), {"gradient-dot": {}})
    finally:
        file.write_text(whole)
