"""Directions along which contributions are corrected exactly (``--exact-rank R``).

Contributions are linear in the target. With Q orthonormal directions V that span most of the
row-normalised test gradients, and ``coordinates`` their products with the gradients, (M, Q),

    C = C_ekfac + coordinates (C_exact(V) - C_ekfac(V))

costs Q exact adjoint passes, whatever the number of test samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

PANEL = 256


def spanning_directions(
    read: Callable[[int, int], Floats], rows: int, rank: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """Return directions, coordinates and the share of the normalised gradients they span.

    The Q leading right singular vectors of the row-normalised gradients, from the (M, M) matrix of
    their inner products, so that no D x D matrix is ever held.

    Args:
        read: Gives test gradients ``start`` to ``stop``, (R, D).
        rows: M.
        rank: Q; at most the number of independent test gradients is used.

    Returns:
        V (Q, D) orthonormal, coordinates (M, Q), share in 0 to 1.
    """
    spans = [(start, min(rows, start + PANEL)) for start in range(0, rows, PANEL)]
    gram = np.empty((rows, rows))
    for a, b in spans:
        left = read(a, b).astype(np.float64)
        for c, d in spans:
            if c <= a:
                gram[a:b, c:d] = left @ (left if c == a else read(c, d).astype(np.float64)).T
                gram[c:d, a:b] = gram[a:b, c:d].T
    norms = np.sqrt(np.maximum(gram.diagonal(), 0))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    values, vectors = np.linalg.eigh(gram * scale[:, None] * scale[None, :])
    order = np.argsort(values)[::-1][:rank]
    order = order[values[order] > 1e-10 * max(values.max(), 1e-300)]
    weights = vectors[:, order] / np.sqrt(values[order]) * scale[:, None]
    directions = sum(weights[a:b].T @ read(a, b).astype(np.float64) for a, b in spans)
    share = float(values[order].sum() / max(values.sum(), 1e-300))
    return np.asarray(directions), gram @ weights, share
