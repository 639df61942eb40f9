"""``kvstore telemetry produce``: JSON lines into a Kafka topic, keyed by device."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli.log import Log, LogFormat
from kvstore.cli.options import STDIN, Json, input_file
from kvstore.cli.telemetry.ingest import Contracts, contract_of, kafka_option
from kvstore.cli.terminal import LOSS

if TYPE_CHECKING:
    from kvstore.telemetry.kafka import Address
    from kvstore.telemetry.produce import Encode


def produce(
    topic: Annotated[str, typer.Argument(metavar="kafka://HOST:PORT/TOPIC", help="Where to.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE...]", parser=input_file, help="JSON lines; - or none for stdin."
        ),
    ] = None,
    *,
    rate: Annotated[
        float, typer.Option(min=0, help="Events per second; 0 for as fast as it goes.")
    ] = 0,
    contract: Contracts = None,
    kafka_options: Annotated[
        list[str] | None,
        typer.Option(
            "--kafka-option",
            metavar="NAME=VALUE",
            help="An option for librdkafka; may be repeated. With schema.registry.url events go "
            "as Avro of the contract's schema.",
        ),
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Lines on stderr.")] = "text",
    as_json: Json = False,
) -> None:
    """Send events to a topic: each acknowledged by all replicas, a device's in their order.

    Starting it again sends the events again, which the sinks find. Exit code 3 where some could
    not be sent.
    """
    from kvstore.telemetry.kafka import (  # noqa: PLC0415
        REGISTRY,
        environment_options,
        parse_address,
    )
    from kvstore.telemetry.produce import LineProducer  # noqa: PLC0415

    log = Log(log_format)
    address = parse_address(topic)
    options = {**dict(map(kafka_option, kafka_options or ())), **environment_options(os.environ)}
    encode = _encoder(options.pop(REGISTRY, None), address, contract)
    producer = LineProducer(address, options, encode=encode, report=log)
    try:
        producer.send(_lines(files or [STDIN]), rate_hz=rate)
    finally:  # a signal included: what was queued still goes
        done = producer.finish()
        log.say(
            "produced",
            f"{done.sent:,} events sent to {address}, {done.unkeyed:,} of them without a device, "
            f"{done.unsent:,} not sent",
            **asdict(done),
        )
    if as_json:
        print(json.dumps(asdict(done)))
    if done.unsent:
        raise typer.Exit(LOSS)


def _encoder(registry: str | None, address: Address, contract: str | None) -> Encode:
    if registry is None:
        return bytes
    from kvstore.telemetry.avro import Encoder, Registry, schema_of  # noqa: PLC0415

    schema = schema_of(contract_of(contract))
    return Encoder(Registry(registry), address.topic, schema).encode


def _lines(paths: list[Path]) -> Iterator[bytes]:
    """Lines without their ends, empty ones left out."""
    for path in paths:
        if path == STDIN:
            yield from filter(None, map(_stripped, sys.stdin.buffer))
        else:
            with path.open("rb") as file:
                yield from filter(None, map(_stripped, file))


def _stripped(line: bytes) -> bytes:
    return line.rstrip(b"\r\n")
