"""Figures of day files: matplotlib ``Figure`` objects, for ``savefig`` or a notebook.

    for name, figure in figures("output/", "1_3", "2024-07-29"): figure.savefig(f"{name}.png")

``FIGURES`` names them all; each takes a ``Grid`` (grids.py), what was read of one tree for some
time. No pyplot and no global state. Importing this package loads matplotlib and pyarrow.
"""

from kvstore.export.extras import needed_for

with needed_for("plotting day files", extra="dayfiles"):
    import matplotlib.figure  # noqa: F401
    import pyarrow as pa  # noqa: F401

from kvstore.dayplots.figures import FIGURES, figures
from kvstore.dayplots.grids import Grid, coverage, days_of, load, trees

__all__ = ["FIGURES", "Grid", "coverage", "days_of", "figures", "load", "trees"]
