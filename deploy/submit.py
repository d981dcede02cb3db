"""Submit a hydra-pipe command to a running Ray cluster as a job, and follow it.

    python deploy/submit.py --wheel dist/*.whl -- run digits --shards 8 --out s3://bucket/runs/digits

Works from any machine that has the cluster's Ray version installed and reaches its dashboard. With
``--wheel`` the cluster needs hydra-pipe's dependencies but not hydra-pipe. Submitting the same
command again resumes the run: committed work is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOCAL_DASHBOARD = "http://127.0.0.1:8265"
WRITERS = ("run", "record", "replay", "reduce")
SHIPPED_ENTRY = 'from hydra_pipe.cli import main; main(prog_name="hydra-pipe")'
"""What a shipped package is started with: its ``hydra-pipe`` script is nowhere on a node's PATH."""


class SubmitError(Exception):
    """The job cannot be submitted; one line that says what to do."""


def check_out(words: Sequence[str]) -> None:
    """Refuse an ``--out`` that would be lost: a job's working directory is a copy that vanishes.

    Raises:
        SubmitError: The command writes a run and its place is missing or relative.
    """
    if not words or words[0] not in WRITERS or "-h" in words or "--help" in words:
        return
    places = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--out"]
    places += [word.partition("=")[2] for word in words if word.startswith("--out=")]
    if not places and "--config" not in " ".join(words):
        raise SubmitError(
            f"{words[0]}: --out is missing; name a directory that all nodes share, such as s3://bucket/run"
        )
    for place in places:
        if "://" not in place and not place.startswith("/"):
            raise SubmitError(
                f"--out {place}: a relative path is lost with the job's working copy; use s3://, gs://, "
                "az:// or an absolute path that all nodes share"
            )


def unpack(wheel: Path, directory: Path) -> list[str]:
    """Unpack ``wheel`` below ``directory`` and return its top-level directories, to ship as they are.

    Ray would install a ``.whl`` with pip, all its dependencies with it: torch and ray again, in
    whatever version is newest, before the node's own on ``sys.path``, gigabytes on every node. And it
    names a wheel by its file name, so that a rebuilt one is never sent. Directories are only copied,
    and named by their content. The ``.dist-info`` goes along: runs note hydra-pipe's version.

    Raises:
        SubmitError: There is no such file, or it is not the wheel of hydra-pipe.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
    except (OSError, zipfile.BadZipFile) as error:
        raise SubmitError(
            f"--wheel {wheel}: {error}; build it with `make wheel` and give dist/*.whl"
        ) from error
    if not (directory / "hydra_pipe" / "__init__.py").is_file():
        raise SubmitError(f"--wheel {wheel}: holds no hydra_pipe; build it with `make wheel`")
    return sorted(str(path) for path in directory.iterdir() if path.is_dir())


def describe(words: Sequence[str], modules: Sequence[str], working_dir: str | None) -> dict[str, Any]:
    """Return what to submit: entrypoint and runtime environment.

    No ``env_vars``, and no way to add some: Ray shows them in clear text to whoever lists jobs, so
    they are no place for secrets.
    """
    runtime_env: dict[str, Any] = {}
    if modules:
        runtime_env["py_modules"] = list(modules)
    if working_dir is not None:
        runtime_env["working_dir"] = working_dir
    start = ["python", "-c", SHIPPED_ENTRY] if modules else ["hydra-pipe"]
    return {"entrypoint": shlex.join([*start, *words]), "runtime_env": runtime_env}


def follow(client: Any, job: str) -> int:
    """Copy the job's log to standard output until it ends.

    Returns:
        0 if it succeeded, 130 if it was stopped, else 1.
    """

    async def copy() -> None:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()

    try:
        asyncio.run(copy())
    except Exception as error:  # noqa: BLE001 - a lost connection ends the log, not the job
        note(f"the log broke off ({type(error).__name__}); waiting for the end of {job}")
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(1)
    # Ray's message repeats the log, which has been shown.
    message = (client.get_job_info(job).message or "").partition(", last available logs")[0]
    note(f"{job}: {status}; {last_line(message)}")
    return {"SUCCEEDED": 0, "STOPPED": 130}.get(str(status), 1)


def last_line(text: object) -> str:
    """Return the last line that says something: of the tracebacks Ray answers with, the one that counts."""
    lines = [line.strip() for line in str(text).splitlines() if any(map(str.isalpha, line))]
    return lines[-1][:300] if lines else type(text).__name__


def note(line: str) -> None:
    """Write one line to standard error."""
    print(line, file=sys.stderr)


def connect(address: str) -> Any:
    """Return a client of the cluster whose dashboard is at ``address``.

    Raises:
        SubmitError: Ray is not installed here, nothing answers, or the token is missing or wrong.
    """
    if not address.startswith(("http://", "https://")):
        raise SubmitError(
            f"--address {address}: must be the dashboard's, such as {LOCAL_DASHBOARD}, "
            "not the cluster's host:port"
        )
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise SubmitError(
            "Ray is not installed here; pip install 'ray[default]' as the cluster has"
        ) from error
    logging.disable(logging.INFO)  # Ray's own lines on every package and connection
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        if "uthenticat" in str(error):
            raise SubmitError(
                f"{address} wants a token: set RAY_AUTH_MODE=token, and put the cluster's token into "
                "~/.ray/auth_token or a file named by RAY_AUTH_TOKEN_PATH"
            ) from error
        raise SubmitError(
            f"no Ray dashboard answers at {address}: {last_line(error)}; check --address and the port-forward"
        ) from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options and, as ``command``, the words after ``hydra-pipe``."""
    first = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument(
        "--address",
        metavar="URL",
        default=os.environ.get("RAY_API_SERVER_ADDRESS") or LOCAL_DASHBOARD,
        help=f"the cluster's dashboard  [default: RAY_API_SERVER_ADDRESS, else {LOCAL_DASHBOARD}]",
    )
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="ship this hydra-pipe instead of the installed one"
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", help="ship this directory too, with your recipe in it"
    )
    parser.add_argument("--name", metavar="ID", help="the job's id  [default: Ray makes one]")
    parser.add_argument("--no-wait", action="store_true", help="return once the job is submitted")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what follows the word hydra-pipe")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Submit and follow; return the exit code (0 done, 1 failed, 130 interrupted)."""
    options = parse(argv)
    try:
        check_out(options.command)
        client = connect(options.address)
        with tempfile.TemporaryDirectory(prefix="hydra-pipe-") as directory:
            modules = unpack(options.wheel, Path(directory)) if options.wheel else []
            job = client.submit_job(
                submission_id=options.name, **describe(options.command, modules, options.working_dir)
            )
    except SubmitError as error:
        note(f"error: {error}")
        return 1
    except Exception as error:  # noqa: BLE001 - Ray answers with RuntimeError, ValueError and its own
        note(f"error: {options.address} refused the job: {last_line(error)}")
        return 1
    note(f"submitted {job}; stop it with: ray job stop {job} --address {options.address}")
    if options.no_wait:
        return 0
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        note(f"{job} runs on; see: ray job logs {job} --follow --address {options.address}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
