"""How far a pipeline is: figures that it writes, and that reports and metrics read.

Written by the pipeline's thread alone, read from others without a lock, a figure at a time: two
may be one commit apart. All counters are of this process and begin at 0.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvstore.stats import CommitStats
from kvstore.telemetry.records import Place


@dataclass(slots=True)
class Progress:
    """Figures of one run. received = stored + duplicates + rejected, as of the last commit.

    reasons: rejections by code; an event may have several. watermark_us: the newest event time
    that is committed. oldest_unsent_us: when the source took the oldest event that was read and
    is not committed (where it does not know: when we read it), None where there is none.
    lag: events that each place has beyond what is committed, where the source knows.
    """

    received: int = 0
    stored: int = 0
    duplicates: int = 0
    rejected: int = 0
    conflicts: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    late: int = 0
    drift: int = 0
    commits: CommitStats = field(default_factory=CommitStats)
    unknown_commits: int = 0  # whose reply was lost
    fenced: int = 0
    watermark_us: int | None = None
    committed_us: int | None = None  # when the last commit was made
    oldest_unsent_us: int | None = None
    lag: dict[Place, int] = field(default_factory=dict)
