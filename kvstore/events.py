"""What a running writer has to say: plain records, handed to whoever prints them.

``message`` is for people and says it all. ``name`` and ``fields`` are for programs: a name never
changes its meaning, and what is counted or measured in the message stands in the fields, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

Level = Literal["info", "warning", "error"]


class Event(NamedTuple):
    """One thing that happened. The fields' values are numbers, text or None."""

    level: Level
    name: str
    message: str
    fields: Mapping[str, object] = MappingProxyType({})


Report = Callable[[Event], None]
