"""What a store keeps of its user's wishes: retention limits, gap limits, pinned time ranges.

Kept in the store itself, so that every later writer honours them. Pure: who carries them out is
retention.py (what may be dropped), gaps.py (what is doubtful) and active.py (when).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, Self

from kvstore.errors import StoreError

MAX_BYTES_MIN: Final = 2 << 20  # a few of the smallest segments, and what stands beside them
BYTES_MAX: Final = 1 << 60
SECONDS_MAX: Final = 9_000_000_000  # as ns within an int64
CLOCK_STEP_S: Final = 60.0
LABEL_CHARS_MAX: Final = 200
PINS_MAX: Final = 1000
WhenFull = Literal["", "drop-oldest", "stop"]


class Settings(NamedTuple):
    """Limits of one store; None is no limit.

    max_bytes: of all its files together. max_age_s: since a segment's last commit, in seconds.
    min_free_bytes: to be left on its disk. when_full: at one of the two limits of size, or on a
    full disk, the oldest segments go or writing stops with DiskFull; "" is drop-oldest where such
    a limit is set, else stop. gap_after_s: silence of a stream to be recorded as a gap.
    clock_step_s: how far a clock may step back or ahead before that is recorded.
    """

    max_bytes: int | None = None
    max_age_s: float | None = None
    min_free_bytes: int | None = None
    when_full: WhenFull = ""
    gap_after_s: float | None = None
    clock_step_s: float | None = CLOCK_STEP_S

    @property
    def drops_oldest(self) -> bool:
        """Whether a full store drops its oldest segments rather than stop."""
        if self.when_full:
            return self.when_full == "drop-oldest"
        return self.limits_size

    @property
    def limits_size(self) -> bool:
        """Whether room has to be looked at before a commit."""
        return self.max_bytes is not None or self.min_free_bytes is not None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The inverse of ``_asdict``; names of a later kvstore are left out."""
        return cls(**{name: record[name] for name in cls._fields if name in record})

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """These settings with some others; StoreError where one is unknown or makes no sense."""
        if unknown := changes.keys() - set(self._fields):
            raise StoreError(f"no setting {min(unknown)!r}: there are {', '.join(self._fields)}")
        return self._replace(**changes).checked()

    def checked(self) -> Self:
        """These settings with whole numbers of bytes; StoreError where one makes no sense."""
        if self.when_full not in ("", "drop-oldest", "stop"):
            raise StoreError(f"when_full={self.when_full!r}: use 'drop-oldest' or 'stop'")
        for name in ("max_age_s", "gap_after_s", "clock_step_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= SECONDS_MAX:
                raise StoreError(f"{name}={value}: use seconds from 0 to {SECONDS_MAX}, or None")
        return self._replace(
            max_bytes=_whole("max_bytes", self.max_bytes, MAX_BYTES_MIN),
            min_free_bytes=_whole("min_free_bytes", self.min_free_bytes, 0),
        )


def _whole(name: str, value: float | None, least: int) -> int | None:
    if value is not None and not least <= value <= BYTES_MAX:
        raise StoreError(f"{name}={value}: use at least {least}, at most {BYTES_MAX}, or None")
    return None if value is None else int(value)


class Pin(NamedTuple):
    """A range of data time, both ends included, whose segments retention leaves alone.

    request: names the request that it answers, so that one repeated after a crash pins once.
    """

    pin_id: int
    start_ns: int
    stop_ns: int
    label: str
    created_ns: int
    request: str = ""


def storable(text: str) -> str:
    """The text with what UTF-8 has no bytes for written out; from a file name, for instance."""
    return text.encode("utf-8", "backslashreplace").decode()
