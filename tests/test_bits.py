"""Eight small runs have the bits they had: see ``tests.bits``."""

from __future__ import annotations

import json

import pytest

from tests.bits import KEPT, environment, made


def test_small_runs_have_the_bits_they_had(tmp_path):
    kept = json.loads(KEPT.read_text())
    if environment() != kept["environment"]:
        pytest.skip(f"bits were kept for {kept['environment']}, here is {environment()}")
    found = made(tmp_path)
    assert found.keys() == kept["runs"].keys()
    for name, digests in kept["runs"].items():
        unlike = [path for path, digest in digests.items() if found[name].get(path) != digest]
        assert not unlike, f"{name}: {len(unlike)} of {len(digests)} differ, such as {unlike[:3]}"
        assert found[name].keys() == digests.keys()
