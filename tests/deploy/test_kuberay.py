"""The RayJob: the fields KubeRay needs, and a command that ours understands."""

from __future__ import annotations

import itertools
import re
import shlex

import pytest
import yaml

from tests.deploy.commands import DEPLOY, ROOT, SECRET, understand

# Fields of RayJobSpec and RayClusterSpec (ray.io/v1, KubeRay 1.6) that this file may use.
JOB_FIELDS = {
    "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "runtimeEnvYAML",
    "rayClusterSpec", "activeDeadlineSeconds", "suspend", "submitterPodTemplate", "submissionMode",
}  # fmt: skip
CLUSTER_FIELDS = {
    "rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling",
    "autoscalerOptions",
}  # fmt: skip


@pytest.fixture(scope="module")
def job() -> dict:
    return yaml.safe_load((DEPLOY / "kuberay-rayjob.yaml").read_text())


@pytest.fixture(scope="module")
def spec(job) -> dict:
    return job["spec"]


@pytest.fixture(scope="module")
def pods(spec) -> list[dict]:
    """The pod specs: head first, then each worker group."""
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_it_is_a_rayjob(job, spec):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    # KubeRay makes names of services from it, and those end at 63 characters.
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", job["metadata"]["name"])
    assert set(spec) <= JOB_FIELDS
    assert set(spec["rayClusterSpec"]) <= CLUSTER_FIELDS
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert set(group) == {
            "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
        }  # fmt: skip
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_it_is_tried_again_and_cleaned_up(spec):
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] >= 1
    assert spec["ttlSecondsAfterFinished"] > 0


def test_the_entrypoint_is_understood_and_writes_where_all_pods_can(spec):
    program, *words = shlex.split(spec["entrypoint"])
    assert program == "hydra-pipe"
    understand(words)
    given = dict(itertools.pairwise(words))
    assert given["--out"].startswith("s3://")
    assert int(given["--shards"]) == 8
    assert float(given["--start-timeout"]) >= 600  # GPU nodes take minutes to come up


def test_an_actor_fits_into_a_worker_pod(spec):
    words = shlex.split(spec["entrypoint"])
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert float(limits["nvidia.com/gpu"]) == float(words[words.index("--gpus-per-actor") + 1]) == 1
        assert float(limits["cpu"]) >= float(words[words.index("--cpus-per-actor") + 1])
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_ray_start_parameters_are_text(spec):
    """KubeRay refuses numbers there."""
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_ray_version_is_the_images(spec):
    assert (
        f"ray=={spec['rayClusterSpec']['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    )


def test_requests_equal_limits_and_all_pods_run_one_image(pods):
    images = set()
    for pod in pods:
        for container in pod["containers"]:
            images.add(container["image"])
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert "command" not in container  # KubeRay's own takes the place of the entrypoint
    assert len(images) == 1


def test_pods_have_no_privileges(pods):
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_secrets_come_from_a_secret_and_never_by_the_runtime_environment(spec, pods):
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert not any(SECRET.search(name) for name in environment.get("env_vars", {}))
    for pod in pods:
        for container in pod["containers"]:
            secret = [entry for entry in container["env"] if SECRET.search(entry["name"])]
            assert secret, "head and workers both write the run"
            assert all("secretKeyRef" in entry["valueFrom"] and "value" not in entry for entry in secret)
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_mounts_have_volumes(pods):
    for pod in pods:
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
