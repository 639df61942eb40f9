"""Rows as an xarray Dataset, in memory: the time is the coordinate, exactly as it is stored.

A field's further axes are dimensions ``scattering_0``, ``scattering_1``; units and descriptions
are attributes. xarray has no time zones: times are UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xarray as xr

from kvstore.export.chunks import columns
from kvstore.schema import Batch, Field


def dataset(batches: Iterable[Batch], fields: Sequence[Field], time: str) -> xr.Dataset:
    """All rows as a Dataset."""
    found = columns(batches, fields, time)
    rows = time if time in found else "row"
    variables = {field.name: _variable(field, found[field.name], rows) for field in fields}
    coordinates = {rows: variables.pop(rows)} if rows in variables else {}
    return xr.Dataset(variables, coordinates)


def _variable(field: Field, array: object, rows: str) -> xr.Variable:
    dims = [rows, *(f"{field.name}_{axis}" for axis in range(len(field.shape)))]
    said = {"units": field.unit, "description": field.description}
    return xr.Variable(dims, array, {name: text for name, text in said.items() if text})
