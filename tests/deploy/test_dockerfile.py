"""The image, as far as it can be judged without Docker: by reading the Dockerfile."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib

import pytest

from tests.deploy.commands import DEPLOY, ROOT, SECRET

IGNORE = DEPLOY / "Dockerfile.dockerignore"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), comments gone and continued lines joined."""
    lines = [x for x in (DEPLOY / "Dockerfile").read_text().splitlines() if not x.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    parts = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest.strip()) for word, rest in parts]


def stages() -> list[tuple[str, list[tuple[str, str]]]]:
    """The stages as (FROM line, instructions)."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append((rest, []))
        elif found:
            found[-1][1].append((word, rest))
    return found


def last(word: str) -> str:
    return [rest for name, rest in stages()[-1][1] if name == word][-1]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(last("ENV")))


def copied() -> list[str]:
    """What COPY takes from the checkout."""
    sources = []
    for word, rest in instructions():
        if word in ("COPY", "ADD") and "--from=" not in rest:
            sources += shlex.split(rest)[:-1]
    return sources


def sent(path: str) -> bool:
    """Whether the ignore file lets a path into the build; the last pattern that matches decides."""
    answer = True
    for line in IGNORE.read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            keep = pattern.startswith("!")
            pattern = pattern.lstrip("!").removeprefix("**/")
            top = path.split("/")[0]
            if any(fnmatch.fnmatch(name, pattern) for name in (path, top, path.rsplit("/", 1)[-1])):
                answer = keep
    return answer


def test_stages_build_on_one_base_and_the_last_is_what_runs():
    bases = [rest.split()[0] for rest, _ in stages()]
    assert len(bases) == 3
    # /usr/local is copied from one to another: only the same base makes that right.
    assert set(bases) == {"python:${PYTHON}-slim-bookworm"}
    names = [rest.split()[-1] for rest, _ in stages()[:-1]]
    used = re.findall(r"--from=(\S+)", " ".join(rest for word, rest in instructions() if word == "COPY"))
    assert set(used) == set(names)


def test_what_is_copied_is_there_and_sent():
    assert copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert sent(source.rstrip("/")), f"{source} is copied but ignored"


def test_all_that_the_wheel_is_built_from_is_copied():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = tables["project"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"]}
    needed |= {path.split("/")[0] for path in tables["tool"]["setuptools"]["package-dir"].values()}
    assert needed <= {source.rstrip("/") for source in copied()}


@pytest.mark.parametrize(
    "path", [".git", ".venv", "runs", "tests", ".env", "deploy", "id_rsa", "cli/__pycache__"]
)
def test_nothing_else_is_sent(path):
    assert not sent(path)


def test_the_device_is_an_argument_and_anything_else_is_refused():
    (rest,) = [rest for word, rest in instructions() if word == "ARG" and rest.startswith("DEVICE")]
    assert rest == "DEVICE=cpu"
    (choice,) = [rest for word, rest in instructions() if word == "RUN" and "case" in rest]
    assert set(re.findall(r"(\w+|\*)\) ", choice)) == {"cpu", "cuda", "*"}
    assert "exit 1" in choice


def test_everything_is_installed_under_the_constraints():
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert len(installs) == 3
    for rest in installs:
        assert "constraints.txt" in rest
        assert "--no-cache-dir" in rest
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extra,) = [rest for word, rest in instructions() if word == "ARG" and rest.startswith("EXTRAS=")]
    assert extra.removeprefix("EXTRAS=") in extras


def test_the_constraints_allow_what_the_image_installs():
    """The extra s3 must be installable: s3fs wants its twin of fsspec, botocore an older dateutil."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    assert pins["python-dateutil"].startswith("2."), "botocore, which s3fs needs, wants python-dateutil < 3"
    assert pins.get("s3fs") == pins["fsspec"], "s3fs wants the fsspec of its own version: pin both alike"


def test_it_runs_as_an_ordinary_user_with_a_home_of_its_own():
    assert last("USER") == "1000"  # a number: Kubernetes cannot look names up
    home = environment()["HOME"]
    runs = " ".join(rest for word, rest in stages()[-1][1] if word == "RUN")
    assert "--uid 1000" in runs
    assert f"chmod 1777 {home}" in runs
    words = [word for word, _ in stages()[-1][1]]
    assert words.index("USER") > words.index("RUN")


def test_it_is_hydra_pipe():
    assert last("ENTRYPOINT") == '["hydra-pipe"]'
    assert last("CMD") == '["--help"]'
    assert environment()["RAY_JOB_STOP_SIGNAL"] == "SIGINT"


def test_what_ray_needs_on_nodes_is_there():
    runs = " ".join(rest for word, rest in stages()[-1][1] if word == "RUN")
    for tool in ("wget", "rsync", "openssh-client"):
        assert tool in runs


def test_no_secrets():
    for word, rest in instructions():
        if word in ("ARG", "ENV", "LABEL"):
            assert not SECRET.search(rest), f"{word} {rest}"
        assert "COPY . " not in f"{word} {rest} "
