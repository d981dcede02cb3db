"""Addresses, directories and messages of Ray, handled without importing Ray."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
from pathlib import Path

from ..spec.checks import ray_address

OUT_OF_MEMORY = "out of memory"
"""Begins the reason of a worker's death where it is known to be that."""
_SOCKET_LIMIT = 103  # characters of a unix socket's path; Linux allows 107, macOS 103
_SESSION_PART = 68  # "/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store" and a few to spare


def inside_ray_job() -> bool:
    """Tell whether this process was started by ``ray job submit``.

    Its working directory is then an unpacked copy that vanishes: a relative ``--out`` would be lost.
    """
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def asked_address(argument: str | None) -> str | None:
    """Return the address to connect to: the argument, else ``RAY_ADDRESS``, else None.

    Raises:
        SpecError: ``RAY_ADDRESS`` is no ``host:port``; often it is a dashboard's, for ``ray job submit``.
    """
    if argument is not None:
        return argument
    given = os.environ.get("RAY_ADDRESS") or None
    return given if given in (None, "auto", "local") else ray_address(given, "RAY_ADDRESS")


def listening(address: str, timeout: float = 3.0) -> bool:
    """Tell whether anything accepts connections at ``host:port`` within ``timeout`` seconds.

    Ray itself would try an address that is gone for a minute.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except (OSError, ValueError):
        return False
    return True


def grows(status: bytes | None) -> bool:
    """Tell from the autoscaler's status report whether a cluster can get more nodes.

    Every cluster reports, a plain local one too; but only an autoscaler knows named types of nodes, where
    the others name each node after itself (``node_<56 hex digits>``).

    Args:
        status: JSON as Ray's internal key-value store has it; None where there is none.
    """
    report = json.loads(status or b"{}").get("autoscaler_report") or {}
    kinds = [*(report.get("active_nodes") or {}), *(report.get("idle_nodes") or {})]
    return any(not re.fullmatch(r"node_[0-9a-f]{40,}", kind) for kind in kinds)


def session_directory() -> str | None:
    """Make a directory of our own for a Ray that we start, to be removed with it.

    Returns:
        Its path, or None where the user chose one (``RAY_TMPDIR``) or its sockets' paths were too long.
    """
    base = tempfile.gettempdir()
    if os.environ.get("RAY_TMPDIR"):
        return None
    if len(base) + len("/hp-12345678") + _SESSION_PART > _SOCKET_LIMIT:
        base = "/tmp"
    if not (Path(base).is_dir() and os.access(base, os.W_OK)):
        return None
    return tempfile.mkdtemp(prefix="hp-", dir=base)


def reason(error: BaseException) -> str:
    """Return one line on why a worker died, from the many that Ray writes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or "memory monitor" in text or "low on memory" in text:
        told = re.search(r"was ([\d.]+ ?\w?B) used / ([\d.]+ ?\w?B) limit", text)
        used = f" ({told[1]} of {told[2]} used)" if told else ""
        return f"{OUT_OF_MEMORY}: Ray killed it because its node ran low{used}"
    if "connection error code 2" in text or "SIGKILL" in text:
        return "its process was killed or crashed (the system may have run out of memory)"
    if match := re.search(r"exit code (-?\d+)", text):
        return f"its process ended with exit code {match[1]}"
    if kind == "NodeDiedError" or "node has died" in text or "node was terminated" in text:
        return "its node died"
    line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), kind)
    return f"{kind}: {line[:200]}"
