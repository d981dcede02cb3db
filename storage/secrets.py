"""Credentials in addresses: found, and never shown.

Every message of this package's errors passes `masked`, so that a key somebody typed into an address ends in
no terminal, log or ``run.json``.
"""

from __future__ import annotations

import re

# An access key and a secret before '@'; a secret may hold '/', '+' and '='. Also what no scheme stands before.
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/{1,2})(?P<secret>[^\s'\"@]*@)")
_QUERY = re.compile(
    r"(?P<key>[?&;](?:[\w.-]*(?:key|secret|token|signature|credential|password|sig)[\w.-]*)=)[^\s'\"&;]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Return ``text`` with ``***`` in place of user information and signatures in addresses."""
    text = _USER.sub(_user, text)
    return _QUERY.sub(r"\g<key>***", text)


def holds_credentials(text: str) -> bool:
    """Return whether an address in ``text`` holds user information or a signature."""
    return masked(text) != text


def _user(found: re.Match[str]) -> str:
    # In an object's name '@' is harmless: user information lies before the first '/', or has a ':' in it.
    secret = found["secret"]
    return f"{found['scheme']}***@" if "/" not in secret or ":" in secret else found[0]
