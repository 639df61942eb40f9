"""One TOML file with a pipeline's settings, in place of flags; secrets from the environment.

    source = ["events.jsonl"]
    postgres = "postgresql://writer:${TELEMETRY_PASSWORD}@db/telemetry"
    max_rejected = "1%"
    [kafka]
    "group.id" = "ops"
    "sasl.password" = "${KAFKA_PASSWORD}"
    [catalog]
    uri = "postgresql://lake:${LAKE_PASSWORD}@db/catalog"

``${NAME}`` stands for a variable of the environment, in any text: so a file can be shown to
anybody. A flag on the command line goes before the file. What is misspelt is refused.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from kvstore.errors import SettingsError, TimeError
from kvstore.telemetry.opening import Kind, has_password, redacted
from kvstore.timestamps import parse_duration

FILE_BYTES_MAX: Final = 1 << 20
SINKS: Final[tuple[Kind, ...]] = ("store", "postgres", "lake")
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_REJECTED: Final = re.compile(r"(\d+)|(\d+(?:\.\d+)?)%")


@dataclass(frozen=True, slots=True)
class Settings:
    """What `telemetry ingest` is told, by flags or by a file; durations in seconds.

    max_rejected: "100" or "1%". kafka: options for librdkafka, as they are. catalog: pyiceberg's
    properties of the lake's catalog, where that is not an SQLite file in its folder.
    """

    source: tuple[str, ...] = ()
    store: str | None = None
    postgres: str | None = None
    lake: str | None = None
    contract: str | None = None
    follow: bool = False
    accept_loss: bool = False
    batch_rows: int | None = None
    batch_wait: float | None = None
    retry_for: float | None = None
    max_rejected: str | None = None
    future_limit: float | None = None
    age_limit: float | None = None
    metrics_file: str | None = None
    dead_letter_topic: str | None = None
    kafka: Mapping[str, str] = field(default_factory=dict)
    catalog: Mapping[str, str] = field(default_factory=dict)

    @property
    def sink(self) -> tuple[Kind, str]:
        """The one sink: its kind and its name."""
        given = [(kind, getattr(self, kind)) for kind in SINKS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise SettingsError(
                f"{len(given)} sinks given; expected one of --store, --postgres and --lake: each "
                "sink has a process of its own"
            )
        return given[0]

    def changed(self, flags: Mapping[str, Any]) -> Settings:
        """These settings with those flags that were given; another sink replaces the file's."""
        given = {name: value for name, value in flags.items() if value or value == 0.0}
        given = {name: value for name, value in given.items() if value is not False}
        if given.keys() & set(SINKS):
            given = dict.fromkeys(SINKS) | given
        if "kafka" in given:
            given["kafka"] = {**self.kafka, **given["kafka"]}
        return replace(self, **given)


DURATIONS: Final = frozenset({"batch_wait", "retry_for", "future_limit", "age_limit"})
_KINDS: Final = {
    "follow": bool, "accept_loss": bool, "batch_rows": int, "source": list, "kafka": dict,
    "catalog": dict,
}  # fmt: skip


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings in a file; SettingsError names what is wrong in it."""
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
        if len(text) > FILE_BYTES_MAX:
            raise SettingsError(f"{path}: longer than {FILE_BYTES_MAX} bytes; expected settings")
        given = tomllib.loads(text.decode())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # TOML and UTF-8
        raise SettingsError(f"{path}: is no TOML: {error}") from error
    try:
        return Settings(**{name: _value(name, value, environ) for name, value in given.items()})
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def _value(name: str, value: Any, environ: Mapping[str, str]) -> Any:
    if name not in {each.name for each in fields(Settings)}:
        known = ", ".join(each.name for each in fields(Settings))
        raise SettingsError(f"no setting {name!r}; there are {known}")
    kind = _KINDS.get(name, str)
    if name == "source" and isinstance(value, str):
        value = [value]
    if type(value) is not kind:
        raise SettingsError(f"{name} = {value!r}: expected {_WORDS[kind]}")
    if isinstance(value, dict):
        return {key: expanded(_text(f"{name}.{key}", each), environ) for key, each in value.items()}
    if isinstance(value, list):
        return tuple(expanded(_text(name, each), environ) for each in value)
    if not isinstance(value, str):
        return value
    text = expanded(value, environ)
    return duration_s(text) if name in DURATIONS else text


_WORDS: Final = {
    str: "text", bool: "true or false", int: "a whole number", list: "a list of texts",
    dict: "a table",
}  # fmt: skip


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SettingsError(f"{name} = {value!r}: expected text")
    return str(value)


def expanded(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with each ``${NAME}`` replaced from the environment."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise SettingsError(f"${{{match[1]}}}: the environment has no variable of that name")
        return environ[match[1]]

    return _VARIABLE.sub(value_of, text)


def duration_s(text: str) -> float:
    """Seconds of a duration such as 10s or 5m; ``forever`` is inf."""
    if text == "forever":
        return float("inf")
    try:
        return parse_duration(text) / 1e9
    except TimeError as error:
        raise SettingsError(str(error)) from error


def rejected_max(text: str | None) -> tuple[int | None, float | None]:
    """The limits in "100" and "1%": a number of events, and a share of 1."""
    if text is None:
        return None, None
    match = _REJECTED.fullmatch(text)
    if match is None or (match[2] and float(match[2]) > 100):  # noqa: PLR2004
        raise SettingsError(
            f"max rejected {text!r}: expected a number of events or a share, such as 100 or 1%"
        )
    return (int(match[1]), None) if match[1] else (None, float(match[2]) / 100)


def without_password(name: str) -> str:
    """A name from the command line; SettingsError where others can read a password in it."""
    if has_password(name):
        raise SettingsError(
            f"{redacted(name)}: a password on the command line is in the list of processes for "
            "all to read. Set PGPASSWORD, or write ${NAME} for a variable of the environment, "
            "here in single quotes or in a --settings file"
        )
    return name
