"""Numbers for devices, so that arrays can be indexed by them, and one text for each of them.

Of many equal ids that a decoder makes one is kept: readings hold it again and again, its hash is
known, and the others' memory is used for the next block. Memory is bounded: ``forget`` starts
anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.telemetry.contract import DEVICE_CHARS_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEVICES_MAX: Final = 1_000_000  # some 100 MB


class Devices:
    """Gives each valid id its number, from 0 on; an invalid one has -1."""

    def __init__(self) -> None:
        self.names: list[str] = []  # by number
        self._numbers: dict[str, int] = {}

    def numbered(self, ids: list[str]) -> NDArray[np.int64]:
        """The number of each."""
        numbers = self._numbers
        try:
            return np.fromiter(map(numbers.__getitem__, ids), np.int64, len(ids))
        except KeyError:
            for device in dict.fromkeys(ids):
                if device not in numbers and 1 <= len(device) <= DEVICE_CHARS_MAX:
                    numbers[device] = len(self.names)
                    self.names.append(device)
            return np.fromiter((numbers.get(each, -1) for each in ids), np.int64, len(ids))

    def named(self, numbers: NDArray[np.int64]) -> list[str]:
        """The one text of each; of an invalid one, any."""
        return list(map(self.names.__getitem__, numbers.tolist())) if self.names else []

    def forget(self) -> bool:
        """Start anew where there are too many; whether that was so."""
        if len(self.names) <= DEVICES_MAX:
            return False
        self.names.clear()
        self._numbers.clear()
        return True
