"""The notebook is what its text pair says, shows its figures, and runs from a new kernel."""

from __future__ import annotations

import json
from pathlib import Path

import jupytext
import nbclient
import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "dayfiles.ipynb"
FIGURES = 8


def images(notebook):
    outputs = [each for cell in notebook["cells"] for each in cell.get("outputs", ())]
    return [each for each in outputs if "image/png" in each.get("data", {})]


def test_the_pair_says_the_same():
    pair = jupytext.read(NOTEBOOK.with_suffix(".py"))
    notebook = jupytext.read(NOTEBOOK)
    assert [(c.cell_type, c.source) for c in pair.cells] == [
        (c.cell_type, c.source) for c in notebook.cells
    ]


def test_the_figures_are_kept_in_the_notebook():
    assert len(images(json.loads(NOTEBOOK.read_text(encoding="utf-8")))) == FIGURES


@pytest.mark.slow
def test_the_notebook_runs_from_beginning_to_end(tmp_path):
    notebook = jupytext.read(NOTEBOOK)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert len(images(notebook)) == FIGURES
