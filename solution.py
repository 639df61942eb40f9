"""The day-file ETL, as ``python solution.py --input data/ --output output/``.

The same as ``kvstore dayfiles convert data/ output/``, whose other options are taken as well.
"""

from __future__ import annotations

import argparse
import sys

from kvstore.cli import main


def arguments(given: list[str]) -> list[str]:
    """What the kvstore command is to be told."""
    parser = argparse.ArgumentParser(
        description="Convert raw exports to hourly Parquet files on a 5-second grid.",
        epilog="All other options of `kvstore dayfiles convert` are taken as well, "
        "such as --every 10s, --fill linear, --workers 4 or --report report.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--input", default="data/", help="folder with exports (default: data/)")
    parser.add_argument("--output", default="output/", help="folder to fill (default: output/)")
    known, others = parser.parse_known_args(given)
    return ["dayfiles", "convert", *others, "--", known.input, known.output]


if __name__ == "__main__":
    sys.argv[1:] = arguments(sys.argv[1:])
    main()
