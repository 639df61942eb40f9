"""The contract: which fields an event has, of which type and range, since which version.

Written as YAML after the Open Data Contract Standard, version 3; only this module imports yaml.
Identity fields (device_id, timestamp) are always there, required, and not among ``values``.

A rule that stands in the file is enforced or refused, never skipped: a pattern that nobody
checks would be a promise that nobody keeps. What only describes (team, roles, tags, price, …) is
left to other tools.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, cast, get_args

import yaml

from kvstore.errors import ContractError

Type = Literal["string", "number", "integer"]
Unknown = Literal["keep", "reject", "drop"]

DEVICE: Final = "device_id"
TIMESTAMP: Final = "timestamp"
LATEST: Final = 2  # of the contracts that come with the package

FILE_BYTES_MAX: Final = 1 << 20  # a contract is read by people
FIELDS_MAX: Final = 500  # every sink holds that many columns; PostgreSQL ends at 1,600
NAME_CHARS_MAX: Final = 63  # PostgreSQL cuts longer names silently
VERSION_MAX: Final = 32_767  # lineage keeps it as int16
DEVICE_CHARS_MAX: Final = 200  # B-tree keys are bounded, PostgreSQL's to 2,704 bytes

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_IDENTITY: Final = {
    DEVICE: ("string", 1, {"minLength": 1, "maxLength": DEVICE_CHARS_MAX}),
    TIMESTAMP: ("timestamp", 2, {"timezone": True}),
}
# Names that the sinks' own columns have.
_TAKEN: Final = frozenset(
    {"ts", "ts_us", "extras", "source", "partition", "offset"}
    | {"ingested_us", "ingested_at", "contract_version", "run", DEVICE, TIMESTAMP}
)
_UNENFORCED: Final = frozenset({"unique", "quality", "enum"})


@dataclass(frozen=True, slots=True)
class ContractField:
    """One field of an event but the identity. Numbers and integers are stored as float64.

    minimum, maximum: both included; None where there is no limit. since: first version that has it.
    """

    name: str
    type: Type
    required: bool = False
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    since: int = 1
    description: str = ""

    @property
    def is_number(self) -> bool:
        """Whether it is stored as float64; else as text."""
        return self.type != "string"


@dataclass(frozen=True, slots=True)
class Contract:
    """What an event has to be.

    interval_s: how often a device publishes; latency_s: how long an event may take from its own
    time to the source. None where nothing is promised: then the report has no completeness, or
    no timeliness.
    """

    version: int
    values: tuple[ContractField, ...]
    unknown: Unknown = "keep"
    interval_s: float | None = None
    latency_s: float | None = None

    def at(self, version: int) -> Contract:
        """The contract as it was at an earlier version."""
        kept = tuple(field for field in self.values if field.since <= version)
        return replace(self, version=version, values=kept)


def brief(version: int = LATEST) -> Contract:
    """The contract of the brief's two examples: version 2, with ``pressure`` since then."""
    shipped = files("kvstore.telemetry") / "contracts" / f"telemetry-v{version}.yaml"
    return parse(shipped.read_bytes(), f"telemetry-v{version}.yaml")


def load(path: Path | str) -> Contract:
    """Read a contract from its file; ``v1`` and ``v2`` are those of the package.

    Raises ContractError where it cannot be read, or says what nobody would enforce.
    """
    if str(path) in {f"v{version}" for version in range(1, LATEST + 1)}:
        return brief(int(str(path)[1:]))
    try:
        with Path(path).open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ContractError(f"{path}: {error.strerror}; v1 and v2 come with kvstore") from error
    if len(text) > FILE_BYTES_MAX:
        raise ContractError(f"{path}: longer than {FILE_BYTES_MAX} bytes: is it a contract?")
    return parse(text, str(path))


def parse(text: bytes, name: str = "contract") -> Contract:
    """A contract from its YAML; name: what to call it in an error."""
    try:
        found = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError(f"{name}: not YAML: {error}") from error
    return _Reader(name).contract(found)


class _Loader(yaml.SafeLoader):
    """YAML without its quiet loss: of two equal keys the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        """Refuse a key that stands twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                problem=f"{min(twice)!r} stands twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


class _Reader:
    """From what YAML gave to a Contract; every complaint names the file and the place in it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def contract(self, found: Any) -> Contract:
        top = self._mapping(found, "the file")
        if top.get("kind") != "DataContract":
            self._refuse(
                "kind", top.get("kind"), "DataContract, as the Open Data Contract Standard"
            )
        if not str(top.get("apiVersion", "")).startswith("v3."):
            self._refuse("apiVersion", top.get("apiVersion"), "v3.x")
        version = self._version(top.get("version"))
        unknown = self._custom(top, "the file").get("unknownFields", "keep")
        if unknown not in get_args(Unknown):
            self._refuse("unknownFields", unknown, "keep, reject or drop")
        return Contract(
            version,
            self._fields(self._properties(top), version),
            cast("Unknown", unknown),
            interval_s=self._promised(top, "frequency"),
            latency_s=self._promised(top, "latency"),
        )

    def _version(self, found: Any) -> int:
        whole = str(found).removesuffix(".0").removesuffix(".0")
        if not (whole.isascii() and whole.isdigit() and 1 <= int(whole) <= VERSION_MAX):
            self._refuse("version", found, f"a whole number such as 2.0.0, up to {VERSION_MAX}")
        return int(whole)

    def _properties(self, top: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        tables = top.get("schema")
        if not isinstance(tables, list) or len(tables) != 1:
            self._refuse("schema", tables, "exactly one object: the event")
        event = self._mapping(tables[0], "schema")
        self._enforceable(event, "schema")
        found = event.get("properties")
        if not isinstance(found, list) or not 1 <= len(found) <= FIELDS_MAX:
            self._refuse("properties", found, f"a list of 1 to {FIELDS_MAX} fields")
        return [self._mapping(each, "properties") for each in found]

    def _fields(self, found: list[Mapping[str, Any]], version: int) -> tuple[ContractField, ...]:
        by_name: dict[str, Mapping[str, Any]] = {}
        for each in found:
            name = each.get("name")
            if not isinstance(name, str) or not 1 <= len(name) <= NAME_CHARS_MAX or "\0" in name:
                self._refuse("name", name, f"a text of 1 to {NAME_CHARS_MAX} characters")
            if name.lower() in {other.lower() for other in by_name}:
                self._refuse("name", name, "each field once, whatever its case: SQL has none")
            by_name[name] = each
        for name in _IDENTITY:
            self._identity(name, by_name.pop(name, None))
        return tuple(self._field(name, each, version) for name, each in by_name.items())

    def _identity(self, name: str, found: Mapping[str, Any] | None) -> None:
        kind, position, options = _IDENTITY[name]
        expected = f"{kind}, required, primaryKeyPosition {position}, {options}: the identity"
        if found is None:
            self._refuse(name, None, expected)
        self._enforceable(found, name)
        if (
            found.get("logicalType") != kind
            or found.get("required") is not True
            or found.get("primaryKey") is not True
            or found.get("primaryKeyPosition") != position
            or found.get("logicalTypeOptions", options) != options
        ):
            self._refuse(name, dict(found), expected)

    def _field(self, name: str, found: Mapping[str, Any], version: int) -> ContractField:
        if name.lower() in _TAKEN or name.startswith("_"):
            self._refuse(
                "name", name, "another name: this one, and any with an underscore, are ours"
            )
        self._enforceable(found, name)
        kind = found.get("logicalType")
        if kind not in get_args(Type):
            self._refuse(f"{name}: logicalType", kind, "string, number or integer")
        required = found.get("required", False)
        if not isinstance(required, bool):
            self._refuse(f"{name}: required", required, "true or false")
        low, high = self._limits(name, found, cast("Type", kind))
        custom = self._custom(found, name)
        since = custom.get("since", 1)
        if type(since) is not int or not 1 <= since <= version:
            self._refuse(f"{name}: since", since, f"a version from 1 to {version}")
        unit = custom.get("unit")
        return ContractField(
            name,
            cast("Type", kind),
            required,
            None if unit is None else str(unit),
            low,
            high,
            since,
            str(found.get("description", "")),
        )

    def _limits(
        self, name: str, found: Mapping[str, Any], kind: Type
    ) -> tuple[float | None, float | None]:
        options = self._mapping(found.get("logicalTypeOptions", {}), name)
        allowed = set() if kind == "string" else {"minimum", "maximum"}
        if others := options.keys() - allowed:
            self._refuse(
                f"{name}: {min(others)}",
                options[min(others)],
                f"none but {' and '.join(sorted(allowed)) or 'no options'}: nothing enforces it",
            )
        for key, limit in options.items():
            if type(limit) not in (int, float) or not math.isfinite(limit):
                self._refuse(f"{name}: {key}", limit, "a number")
        low, high = options.get("minimum"), options.get("maximum")
        if low is not None and high is not None and low > high:
            self._refuse(f"{name}: minimum", low, f"at most the maximum, {high}")
        return low, high

    def _promised(self, top: Mapping[str, Any], name: str) -> float | None:
        """Seconds of one of the agreement's properties, None where it has none."""
        found = top.get("slaProperties", [])
        if not isinstance(found, list):
            self._refuse("slaProperties", found, "a list")
        for each in found:
            promise = self._mapping(each, "slaProperties")
            if promise.get("property") == name:
                value, unit = promise.get("value"), promise.get("unit")
                if not isinstance(value, int | float) or value <= 0 or unit not in _SECONDS:
                    self._refuse(name, f"{value} {unit}", f"a number in {', '.join(_SECONDS)}")
                return float(value) * _SECONDS[unit]
        return None

    def _custom(self, found: Mapping[str, Any], place: str) -> dict[str, Any]:
        pairs = found.get("customProperties", [])
        if not isinstance(pairs, list):
            self._refuse(f"{place}: customProperties", pairs, "a list of property and value")
        entries = [self._mapping(each, f"{place}: customProperties") for each in pairs]
        return {str(each.get("property")): each.get("value") for each in entries}

    def _enforceable(self, found: Mapping[str, Any], place: str) -> None:
        if rules := found.keys() & _UNENFORCED:
            rule = min(rules)
            self._refuse(f"{place}: {rule}", found[rule], f"no {rule}: nothing here enforces it")

    def _mapping(self, found: Any, place: str) -> Mapping[str, Any]:
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            self._refuse(place, found, "a mapping with names as keys")
        return found

    def _refuse(self, place: str, found: Any, expected: str) -> NoReturn:
        shown = repr(found)
        shown = shown if len(shown) <= 100 else shown[:99] + "…"  # noqa: PLR2004
        raise ContractError(f"{self._name}: {place}: found {shown}, expected {expected}")
