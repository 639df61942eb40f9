"""Optional libraries: an import that fails becomes an error that names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.errors import KvstoreError


@contextmanager
def needed_for(what: str, *, extra: str = "export") -> Iterator[None]:
    """Around the import of a module that owns a library of that extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        raise KvstoreError(
            f"{what} needs {library}, which is not installed: pip install 'kvstore[{extra}]'"
        ) from error
