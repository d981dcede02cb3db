"""The cluster launcher's file: Ray's own schema and checks, and what ours demand."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.deploy.commands import DEPLOY


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())


def test_ray_accepts_it(cluster):
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    logging.disable(logging.INFO)
    try:
        filled = prepare_config(copy.deepcopy(cluster))
        validate_config(filled)
    finally:
        logging.disable(logging.NOTSET)
    # Ray's defaults for AWS install another Ray; our lists must have taken their place.
    commands = [*filled["setup_commands"], *filled["worker_setup_commands"], *filled["head_setup_commands"]]
    assert not any("ray-wheels" in command for command in commands)


def test_the_head_places_no_actors_and_the_workers_have_gpus(cluster):
    kinds = cluster["available_node_types"]
    assert kinds[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    (worker,) = [kind for name, kind in kinds.items() if name != cluster["head_node_type"]]
    assert worker["resources"]["GPU"] == 1
    assert 0 <= worker["min_workers"] <= worker["max_workers"] <= cluster["max_workers"]


def test_the_dashboard_stays_on_the_head(cluster):
    (start,) = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert "0.0.0.0" not in (DEPLOY / "ray-cluster.yaml").read_text()


def test_the_container_is_started_with_a_shell_and_with_tokens_on(cluster):
    options = cluster["docker"]["run_options"]
    assert "--entrypoint=" in options  # the launcher says `docker run … IMAGE bash`
    assert "--env=RAY_AUTH_MODE=token" in options
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_no_secrets(cluster):
    text = (DEPLOY / "ray-cluster.yaml").read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|ssh_private_key", text, re.IGNORECASE)
