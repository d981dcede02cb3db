"""A run opened: what `Reader` reads, and what analyses make of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .reading.reader import Reader, opened

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure

    from .analysis.interclass import Scale


class Run(Reader):
    """One run directory, read-only; made by `open_run` and by ``hydra_pipe.run``."""

    def top(
        self,
        k: int = 10,
        test: int | None = None,
        harmful: bool = False,
        method: str | None = None,
        *,
        label: int | None = None,
    ) -> pa.Table:
        """Return the ``k`` most helpful (or most harmful) training samples; see `analysis.top.top`."""
        from .analysis.top import top as find_top

        return find_top(self, k=k, test=test, label=label, harmful=harmful, method=method)

    def targets(self, method: str | None = None) -> pa.Table:
        """Return what the columns of a method's contributions are: one row a target.

        Columns: ``test_index`` (-1: no single test sample), ``test_label`` (-1: none) and
        ``test_samples``: over how many test samples it is the mean. Sorted as the contributions are.
        """
        import pyarrow as pa

        from .reading.panels import targets

        found = targets(self, self.method(method))
        columns = (found.test_index.astype("int32"), found.label.astype("int16"), found.count.astype("int32"))
        return pa.table(dict(zip(("test_index", "test_label", "test_samples"), columns, strict=True)))

    def summary(self, method: str | None = None) -> dict[str, Any]:
        """Return the closing summary as JSON-able values; see `analysis.summary.summary`."""
        from .analysis.summary import summary as summarize

        return summarize(self, method)

    def plot_top(
        self, k: int = 10, test: int | None = None, method: str | None = None, *, label: int | None = None
    ) -> Figure:
        """Draw the most helpful and most harmful training samples; see `analysis.plots.plot_top`."""
        from .analysis.plots import plot_top

        return plot_top(self, k, test, method, label=label)

    def plot_interclass(self, method: str | None = None, scale: Scale | None = None) -> Figure:
        """Draw Eq. 23 class by class, raw and scaled; see `analysis.plots.plot_interclass`."""
        from .analysis.plots import plot_interclass

        return plot_interclass(self, method, scale)

    def plot_contributions(
        self, test: int | None = None, train: int | None = None, method: str | None = None
    ) -> Figure:
        """Draw how contributions are spread; see `analysis.plots.plot_contributions`."""
        from .analysis.plots import plot_contributions

        return plot_contributions(self, test, train, method)

    def plot_curve(self, detection: str | None = None) -> Figure:
        """Draw how fast detections find labels that are known to be wrong; see `analysis.plots.plot_curve`."""
        from .analysis.plots import plot_curve

        return plot_curve(self, detection)


def open_run(uri: str | os.PathLike[str], *, check: bool = True) -> Run:
    """Open a run directory for reading.

    Args:
        uri: Local path or ``s3://``, ``gs://``, ``az://`` address, as given to ``--out``.
        check: Whether files are compared with the digests of their manifests when they are first read;
            sizes always are.

    Raises:
        SpecError: The address is of a kind that is not allowed.
        RunNotFound: There is no run.
        CorruptStore: ``run.json`` cannot be read.
    """
    return opened(Run, uri, check=check)
