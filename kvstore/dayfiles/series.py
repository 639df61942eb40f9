"""Which tree and which column a reading belongs to, by its tags: the identity of a series.

    phase and module    -> {phase}_{module}     phase alone -> {phase}     neither -> system

The column is the measure's name, to which other tags add what sets them apart: cell=5 ``_5``,
battery=2 ``_battery_2``, sensor=2 ``_sensor_2``, a debug value's key ``_KEY``. What all the real
data has (battery=1, sensor=1, message_source=master) adds nothing. Tags that nobody foresaw add
``.KEY=VALUE``. So two readings are of one series exactly if tree and column are equal, and a
second battery or sensor is never mixed in. Tags have no order; a number is the same with zeros
in front.

Names become folders and columns: what is neither letter, digit, ``-`` nor ``_`` is written as
``%`` and its bytes in hex, so that no input leads out of the output folder.

Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from kvstore.dayfiles.measures import Column, column

SYSTEM: Final = "system"
_NAME_LENGTH_MAX: Final = 100  # of a tag or measure
_FOLDER_LENGTH_MAX: Final = 255  # of what file systems take; escapes are three times as long
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]")
_UNSAFE_PART: Final = re.compile(r"[^A-Za-z0-9-]")
_DEFAULTS: Final = {"battery": "1", "sensor": "1", "message_source": "master"}
_PREFIXES: Final = {
    "cell": "_",
    "debug_value_key": "_",
    "battery": "_battery_",
    "sensor": "_sensor_",
    "message_source": "_from_",
}
# A pair as it is printed by pandas, Python, JSON or nobody in particular: [phase,1], ['phase' '1']
_PAIR: Final = re.compile(r"\[\s*([^\[\],]+?)\s*,\s*([^\[\],]*?)\s*\]")
_ARRAY: Final = re.compile(r"array\(|,\s*dtype=object\)")


class Series(NamedTuple):
    """Where readings go. tree: the folder below the output."""

    tree: str
    column: Column

    @property
    def key(self) -> str:
        """The series in reports and manifests: 1_3/module_voltage."""
        return f"{self.tree}/{self.column.name}"


def series_of(name: str | None, tags: Iterable[tuple[str | None, str | None]]) -> Series | None:
    """The series of a measure with these tags; None where they make no sense."""
    tags = list(tags)
    if not name or len(name) > _NAME_LENGTH_MAX or any(map(_is_odd, tags)):
        return None
    pairs = {(str(key).strip(), _plain(str(value))) for key, value in tags}
    named = dict(pairs)
    if len(named) != len(pairs):
        return None  # two phases at once
    tree = tree_of(named.pop("phase", None), named.pop("module", None))
    if tree is None:
        return None
    return Series(tree, column(_unreserved(escaped(name) + _suffix(named))))


def _is_odd(pair: tuple[str | None, str | None]) -> bool:
    return not all(part and len(part) <= _NAME_LENGTH_MAX for part in pair)


def tree_of(phase: str | None, module: str | None) -> str | None:
    """The folder of a phase's module, of a phase, or of the system; None for too long a name.

    Numbers are without zeros in front.
    """
    tree = _tree(phase, module)
    return tree if len(tree) <= _FOLDER_LENGTH_MAX else None


def _tree(phase: str | None, module: str | None) -> str:
    phase, module = (None if part is None else _plain(part) for part in (phase, module))
    if phase is None:
        return SYSTEM if module is None else f"%_{_part(module)}"
    tree = _part(phase)
    if module is not None:
        return f"{tree}_{_part(module)}"
    return "%73ystem" if tree == SYSTEM else tree


def _unreserved(name: str) -> str:
    """The name of a column, unless it is that of the times, or of some column's flags."""
    if name == "timestamp":
        return "%74imestamp"
    return f"{name[:-4]}%66lag" if name.endswith("_flag") else name


def _suffix(tags: Mapping[str, str]) -> str:
    """What the tags beside phase and module add to the name."""
    told = {key: value for key, value in tags.items() if _DEFAULTS.get(key) != value}
    known = [prefix + escaped(told[key]) for key, prefix in _PREFIXES.items() if key in told]
    others = sorted(told.keys() - _PREFIXES.keys())
    return "".join([*known, *(f".{escaped(key)}={escaped(told[key])}" for key in others)])


def _plain(text: str) -> str:
    text = text.strip()
    is_number = text.isascii() and text.isdigit() and len(text) <= _NAME_LENGTH_MAX
    return str(int(text)) if is_number else text


def escaped(text: str) -> str:
    """A name as it is safe in folders' and columns' names."""
    return _UNSAFE.sub(_hex, text)


def _part(text: str) -> str:
    """A name as part of a folder's, in which an underscore stands between phase and module."""
    return _UNSAFE_PART.sub(_hex, text)


def _hex(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass"))


def column_of_header(header: str) -> Column:
    """The column that a wide table's column of that name goes to."""
    return column(_unreserved(escaped(header.strip())))


def parsed_tags(text: str | None) -> list[tuple[str | None, str | None]]:
    """Tags that are written out, as in CSV: JSON, or what printing nested lists gives.

    Raises ValueError where that cannot be read.
    """
    if text is None or not text.strip():
        return []
    try:
        found = json.loads(text)
    except ValueError:
        return _loose_tags(text)
    if isinstance(found, dict):
        return [(str(key), _text(value)) for key, value in found.items()]
    if not isinstance(found, list):
        raise ValueError(text)  # noqa: TRY004  # as json does
    return [_json_pair(pair) for pair in found]


def _json_pair(pair: object) -> tuple[str | None, str | None]:
    if not isinstance(pair, list) or len(pair) != 2:  # noqa: PLR2004  # key, value
        raise ValueError(pair)
    return _text(pair[0]), _text(pair[1])


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _loose_tags(text: str) -> list[tuple[str | None, str | None]]:
    plain = _ARRAY.sub("", text).strip()
    found = [(_unquoted(key), _unquoted(value)) for key, value in _PAIR.findall(plain)]
    rest = _PAIR.sub("", plain)
    if not re.fullmatch(r"\[[\s,]*\]", rest):
        raise ValueError(text)
    return list(found)


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
