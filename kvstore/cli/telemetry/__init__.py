"""``kvstore telemetry``: events, exactly once. One module a command, one registration each.

Nothing heavy is imported here or at the head of a command's module: what a command needs, it
imports in its body, so that `kvstore --help` stays light.
"""

from __future__ import annotations

import typer

from kvstore.cli.telemetry import (
    audit,
    check,
    contract,
    demo,
    drop,
    ingest,
    maintain,
    migrate,
    produce,
    quality,
    query,
    rejects,
    simulate,
)


def examples(*lines: str) -> str:
    """The text below a command's help."""
    return "\n".join(["\b", "Examples:", *(f"  kvstore telemetry {line}" for line in lines)])


app = typer.Typer(
    name="telemetry",
    help="Device events, exactly once, into an operational store and a lake.",
    epilog=examples(
        "demo", "ingest events.jsonl --store ops.kv", "quality ops.kv --since 1h --html report.html"
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command(
    epilog=examples(
        "simulate --devices 50 --events 100000 --evolve-after 50% --bad 1% --duplicates 1%",
        "simulate --rate 1000 --events 3600000 | kvstore telemetry ingest - --store ops.kv",
    )
)(simulate.simulate)
app.command(
    epilog=examples(
        "ingest events.jsonl --store ops.kv",
        "ingest kafka://localhost:9092/telemetry --postgres postgresql://ops@db/telemetry",
        "ingest ops.kv --lake lake/ --follow --retry-for forever",
        "ingest --settings pipeline.toml --max-rejected 1%",
    )
)(ingest.ingest)

contracts = typer.Typer(
    help="What an event has to be, and what a new version would change.",
    epilog=examples("contract show", "contract diff v2 v3.yaml --against ops.kv"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
contracts.command(epilog=examples("contract show", "contract show mine.yaml --json"))(contract.show)
contracts.command(epilog=examples("contract check v3.yaml v2"))(contract.check)
contracts.command(epilog=examples("contract diff v2 v3.yaml --against ops.kv"))(contract.diff)
app.add_typer(contracts, name="contract")
app.command(
    epilog=examples(
        "quality ops.kv --since 1h",
        "quality lake/ --html report.html --fail-under 99",
        "quality ops.kv --json | jq .dimensions",
    )
)(quality.quality)
app.command(
    epilog=examples(
        "query ops.kv --device sensor-123 --last 1h",
        "query ops.kv --start 2025-01-20T10:00 --stop 2025-01-20T11:00 --format jsonl --lineage",
    )
)(query.query)
letters = typer.Typer(
    help="Events that were refused: look at them, send them through the contract again.",
    epilog=examples("rejects list ops.kv", "rejects replay ops.kv --reason range --dry-run"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
letters.command(
    "list",
    epilog=examples("rejects list ops.kv", "rejects list ops.kv --reason conflict --json"),
)(rejects.list_)
letters.command(epilog=examples("rejects show ops.kv PLACE"))(rejects.show)
letters.command(
    epilog=examples(
        "rejects replay ops.kv --reason range --dry-run",
        "rejects replay ops.kv --contract v3.yaml",
    )
)(rejects.replay)
letters.command(epilog=examples("rejects discard ops.kv --reason json"))(rejects.discard)
app.add_typer(letters, name="rejects")
app.command(epilog=examples("audit events.jsonl ops.kv"))(audit.audit)
app.command(
    epilog=examples(
        "check events.jsonl --store ops.kv",
        "check kafka://localhost:9092/telemetry --postgres postgresql://ops@db/telemetry",
    )
)(check.check)
app.command(epilog=examples("demo", "demo --dir demo/ --events 20000"))(demo.demo)
app.command(
    epilog=examples(
        "maintain lake/",
        "maintain lake/ --keep 7d --dry-run --json",
        "maintain lake/ --accept-rollback",
    )
)(maintain.maintain)
app.command(epilog=examples("drop postgresql://ops@db/telemetry --before 2025-01-20"))(drop.drop)
app.command(
    epilog=examples(
        "migrate lake/ --to postgresql://ops@db/telemetry --from 2025-01-01 --until 2025-02-01",
        "migrate lake/ --to ops.kv --verify-only",
    )
)(migrate.migrate)
app.command(
    epilog=examples(
        "produce kafka://localhost:9092/telemetry events.jsonl",
        "simulate --rate 1000 | kvstore telemetry produce kafka://localhost:9092/telemetry",
        "produce kafka://localhost:9092/telemetry events.jsonl "
        "--kafka-option schema.registry.url=http://localhost:8081",
    )
)(produce.produce)
