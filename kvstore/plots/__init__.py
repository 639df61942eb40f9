"""Figures of a range of a stream: matplotlib ``Figure`` objects, for ``savefig`` or a notebook.

    overview(store, "particles")     rate with gaps, fields over time, mean and percentile images
    row(store, "particles", 17)      one row, such as one particle

No pyplot and no global state: figures may be made in any thread. Memory is bounded however
long the range; a figure says itself whether it shows all rows or a sample. Importing this
package loads matplotlib, the extra ``plot``; ``import kvstore`` does not.
"""

from kvstore.export.extras import needed_for

with needed_for("plotting", extra="plot"):
    import matplotlib.figure  # noqa: F401

from kvstore.plots.figures import overview, row

__all__ = ["overview", "row"]
