"""The contract: which fields an event has, of which type and range, since which version.

Identity fields (device_id, timestamp) are always there, required, and not among ``values``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Type = Literal["string", "number", "integer"]
Unknown = Literal["keep", "reject", "drop"]

DEVICE: Final = "device_id"
TIMESTAMP: Final = "timestamp"


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
    """What an event has to be."""

    version: int
    values: tuple[ContractField, ...]
    unknown: Unknown = "keep"


def brief() -> Contract:
    """The contract of the brief's two examples: version 2, with ``pressure`` since then."""
    return Contract(
        2,
        (
            ContractField(
                "temperature", "number", required=True, unit="Cel", minimum=-90, maximum=90
            ),
            ContractField("humidity", "number", required=True, unit="%", minimum=0, maximum=100),
            ContractField("firmware_version", "string", required=True),
            ContractField("pressure", "number", unit="hPa", minimum=300, maximum=1100, since=2),
        ),
    )
