"""What speaks for a method's numbers, in words; see ``pipeline.drive.trust`` for where it comes from."""

from __future__ import annotations

from collections.abc import Sequence

from ..reading.run_info import Trust

SHOWN = 4
"""Names of parameters that a line shows."""


def trust_lines(trust: Trust) -> list[str]:
    """Return a method's entry in words, a line a fact."""
    lines = []
    ways, tests = trust.ways, trust.test_ways
    if ways:
        tried = f"tried on {ways['trials']} batches" if ways["trials"] else "each sample by itself"
        slow = sum(len(ways[kind]) for kind in ("func", "vjp", "untried"))
        lines.append(f"gradients: {ways['rule']} parameters by layer rules, {slow} otherwise; {tried}")
        for kind, what in (
            ("func", "by torch.func"),
            ("vjp", "sample by sample"),
            ("untried", "zero in every trial"),
            ("repaired", "inside the batch where their way did not fit"),
        ):
            if ways[kind]:
                lines.append(f"  {what}: {_names(ways[kind])}")
        if ways["coupled"]:
            lines.append("  training samples see each other in the losses: traced inside their batch")
    if tests and tests["coupled"]:
        lines.append("test losses depend on the other samples of a batch: each was computed alone")
    if tests and tests.get("through"):
        lines.append("test losses detach something: differentiated through, as the loss itself changes")
    if tests and tests.get("derivative") is False:
        lines.append("test gradients are those of backward, which is not the derivative of the test loss")
    if trust.matrix:
        lines.append(f"products: {trust.matrix}; agree with autograd and differences, factor by factor")
    elif trust.field:
        lines.append(f"the update is no gradient: {trust.field}")
    elif trust.differences:
        lines.append("Hessian products agree with differences of the gradient")
    if trust.running_statistics:
        lines.append("running statistics of BatchNorm count as constants in test losses")
    law = trust.law
    if not law.checked:
        lines.append(f"conservation law: not applicable, {law.reason}")
    elif law.error is not None and law.limit is not None:
        lines.append(f"conservation law: holds (error {law.error:.1e}, limit {law.limit:.1e})")
    else:
        lines.append("conservation law: holds for every target")
    return lines


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
