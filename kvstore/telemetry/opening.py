"""Names on the command line -> sinks and sources. What a library needs is imported here, late.

postgresql://… postgres://…      PostgreSQL
a folder with store.msgpack, *.kv  a store
any other folder or URI          a lake
kafka://host:port/topic          Kafka
a store                          its readings, as events
- or files                       JSON lines
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from kvstore.errors import SourceError
from kvstore.events import Report

if TYPE_CHECKING:  # contract.py loads yaml, and commands load this module for their --help
    from kvstore.telemetry.contract import Contract
    from kvstore.telemetry.sink import Sink
    from kvstore.telemetry.source import Source

STDIN: Final = "-"
Kind = Literal["store", "postgres", "lake"]
Mode = Literal["r", "w"]
_PASSWORD: Final = re.compile(r"(?<=://)([^/@\s:]*):([^@\s]+)@")
_PARAMETER: Final = re.compile(r"((?:password|passfile|sslpassword)=)[^&\s]+")


def kind_of(target: str) -> Kind:
    """Which sink a name means."""
    if target.startswith(("postgresql://", "postgres://")):
        return "postgres"
    return "store" if is_store(target) else "lake"


def is_store(name: str) -> bool:
    """Whether that is a store, or is to be one."""
    path = Path(name)
    return (path / "store.msgpack").exists() or (path.suffix == ".kv" and not path.is_file())


def open_sink(
    target: str,
    contract: Contract,
    mode: Mode = "w",
    *,
    kind: Kind | None = None,
    catalog: Mapping[str, str] | None = None,
) -> Sink:
    """Open a sink. kind: where its name does not say it; catalog: of a lake, its properties."""
    kind = kind or kind_of(target)
    if kind == "store":
        from kvstore.telemetry.sinks.stream import StreamSink  # noqa: PLC0415

        return StreamSink.open(target, contract, mode=mode)
    if kind == "postgres":
        from kvstore.telemetry.sinks.postgres import PostgresSink  # noqa: PLC0415

        return PostgresSink.open(target, contract, mode=mode)
    from kvstore.telemetry.sinks.iceberg import IcebergSink  # noqa: PLC0415

    return IcebergSink.open(target, contract, mode=mode, catalog=catalog)


def open_source(
    names: Sequence[str],
    *,
    run: str,
    follow: bool,
    report: Report,
    accept_loss: bool = False,
    kafka: Mapping[str, str] | None = None,
) -> Source:
    """Open what events come from: files and stdin, or one Kafka topic, or one store."""
    others = _others(names)
    if not others:
        from kvstore.telemetry.sources.files import FilesSource  # noqa: PLC0415

        return FilesSource(names, run=run, follow=follow, report=report)
    if others[0].startswith("kafka://"):
        from kvstore.telemetry.sources.kafka import KafkaSource  # noqa: PLC0415

        return KafkaSource.open(others[0], kafka or {}, accept_loss=accept_loss, report=report)
    from kvstore.telemetry.sources.stream import StreamSource  # noqa: PLC0415

    return StreamSource(others[0], follow=follow, accept_loss=accept_loss, report=report)


def check_sources(names: Sequence[str]) -> None:
    """SourceError for names that cannot be sources, before a sink is made for them."""
    others = _others(names)
    if others and len(names) > 1:
        raise SourceError(f"{redacted(others[0])}: goes alone; start another ingest for the others")
    for name in names:
        if not others and name != STDIN and not Path(name).exists():
            raise SourceError(f"{name}: No such file; expected a file of JSON lines")


def _others(names: Sequence[str]) -> list[str]:
    """Names of sources that are no files."""
    return [name for name in names if name.startswith("kafka://") or is_store(name)]


def redacted(name: str) -> str:
    """A URL as it may be shown: without its password."""
    return _PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1:***@", name))


def has_password(name: str) -> bool:
    """Whether a URL has a password in it, which then stands in the list of processes."""
    return redacted(name) != name
