"""Where a run may live: which addresses are accepted, and how they are put together.

Local paths become absolute paths without a scheme; remote addresses keep theirs. Everything else
in this room takes addresses that have been through `check_uri`.
"""

from __future__ import annotations

import os
import re

from .errors import SpecError
from .secrets import holds_credentials

REMOTE_SCHEMES = ("s3", "gs", "az", "memory")
"""fsspec protocols a run directory may use besides the local file system."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"(file|s3|gs|az|memory):", re.IGNORECASE)
_NOT_INSIDE = frozenset({"", ".", ".."})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_uri(uri: str | os.PathLike[str]) -> str:
    """Return ``uri`` in its one normal form.

    Args:
        uri: A local path (relative, absolute, with ``~``, or ``file://``), or an ``s3://``,
            ``gs://``, ``az://`` or ``memory://`` address.

    Returns:
        An absolute local path without scheme, or a remote address without trailing slash.

    Raises:
        SpecError: Another scheme, a chain (``::``), a secret in the address, ``..`` in a remote
            address, or control characters.
    """
    text = os.fspath(uri)
    if not text.strip():
        raise SpecError("the run address is empty; give a directory or an s3://, gs://, az:// address")
    if any(ord(letter) < 32 for letter in text):
        raise SpecError(f"the run address {text!r} holds control characters; give it without them")
    # A secret must not reach any message, so this comes before every check that prints the address.
    if holds_credentials(text):
        raise SpecError(
            "the address holds credentials (something before an '@', or a key or signature after '?'); leave them out "
            "and give credentials through the provider's own configuration"
        )
    if "::" in text:
        raise SpecError(f"the run address {text!r} is a chain ('::'); give one plain address")
    match = _SCHEME.match(text)
    if match is None:
        if _ONE_SLASH.match(text):
            raise SpecError(
                f"the run address {text!r} lacks '//' after the scheme; write e.g. s3://bucket/run"
            )
        return _local(text)
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        if not rest.startswith("/"):
            raise SpecError(f"the run address {text!r} names a host; write file:///path or a plain path")
        return _local(rest)
    if scheme not in REMOTE_SCHEMES:
        allowed = ", ".join(f"{name}://" for name in REMOTE_SCHEMES)
        raise SpecError(f"the scheme {scheme}:// of {text!r} is not allowed; use a local path or {allowed}")
    rest = rest.strip("/") if scheme == "memory" else rest.rstrip("/")
    if any(part in ("", ".", "..") for part in rest.split("/")):
        raise SpecError(
            f"the run address {text!r} has an empty, '.' or '..' part; write {scheme}://bucket/run"
        )
    return f"{scheme}://{rest}"


def is_local(uri: str) -> bool:
    """Return whether a checked address is on the local file system."""
    return "://" not in uri


def join(uri: str, *parts: str) -> str:
    """Return the address of something inside ``uri``.

    Args:
        uri: A checked address.
        parts: Relative paths, ``/``-separated; each stays inside ``uri``.

    Raises:
        SpecError: A part is absolute, empty, or climbs out with ``..``.
    """
    for part in parts:
        if not _NOT_INSIDE.isdisjoint(part.split("/")) or "\\" in part:
            raise SpecError(f"{part!r} is no path inside {uri}; give a relative path without '.' and '..'")
    return "/".join([uri.rstrip("/"), *parts]) if parts else uri


def parent(uri: str) -> str:
    """Return the address one level up."""
    return uri.rsplit("/", 1)[0] or "/"


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can be part of a path everywhere.

    Args:
        name: The name of a stage, a unit, a method, …
        what: What it names, for the message.

    Raises:
        SpecError: It is not ``[A-Za-z0-9][A-Za-z0-9._-]{0,63}``.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"{what} {name!r} is no valid name; use 1 to 64 letters, digits, '.', '_' or '-', "
            "the first a letter or a digit"
        )
    return name


def _local(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
