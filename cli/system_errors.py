"""What the system or a library says when it cannot go on, in one line with a remedy.

The rooms below name what they can at the place where it happens; this is for what is left.
"""

from __future__ import annotations

import errno
import os

from ..storage.refused import REMEDIES

_REMEDIES = {
    **REMEDIES,
    errno.ENOSPC: "free some space, then run the same command again: what is committed is kept",
    errno.EDQUOT: "free some space, then run the same command again: what is committed is kept",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EACCES: "check who may read and write there",
    errno.EPERM: "check who may read and write there",
    errno.EROFS: "choose a place that can be written",
}


def of_the_system(error: Exception) -> str | None:
    """Return the line for what no recipe and no mistake of ours is the cause of; None: it may be one."""
    if isinstance(error, MemoryError) or type(error).__name__ == "ArrowMemoryError":
        return (
            "no memory is left; use more --shards, fewer --workers or a smaller --reduce-memory, then run the same "
            "command again: what is committed is kept"
        )
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "the system gives this process no more threads; raise the limit (ulimit -u), or end other work"
    if type(error).__module__.partition(".")[0] == "pyarrow":
        return f"a table cannot be read ({error}); `hydra-pipe verify RUN` names what is damaged"
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        remedy = _REMEDIES.get(error.errno, "correct that and try again")
        return f"{where}{os.strerror(error.errno)}; {remedy}"
    return None
