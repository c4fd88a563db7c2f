"""What the search for near duplicates keeps of every document: band keys and marks, in memory or in a temporary file.

In: the number of documents and the settings. Out: `Sketches`, two arrays to fill and to look things up in. They take
about 300 bytes for each document, so large ones lie in a file that the system pages in and out as memory allows.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from blues.data.dedup.minhash import Settings
from blues.errors import DataError

IN_MEMORY_BYTES = 1 << 28


@dataclass(frozen=True)
class Sketches:
    """keys_BN: uint64, the band keys of each document, a band at a time. marks_NP: uint8, its mark."""

    keys_BN: np.ndarray
    marks_NP: np.ndarray

    @classmethod
    @contextmanager
    def room_for(cls, documents: int, settings: Settings) -> Iterator[Sketches]:
        """Empty sketches of this many documents, which are gone after the `with`.

        Raises:
            DataError: there is no room for them on the disk.
        """
        bands, places = settings.bands.bands, settings.permutations
        keys_bytes, marks_bytes = 8 * bands * documents, places * documents
        if keys_bytes + marks_bytes <= IN_MEMORY_BYTES:
            yield cls(np.zeros((bands, documents), dtype=np.uint64), np.zeros((documents, places), dtype=np.uint8))
            return
        with tempfile.TemporaryFile(prefix="blues-sketches-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, keys_bytes + marks_bytes)  # or a full disk would end the process
            except OSError as error:
                raise DataError(
                    f"the signatures of {documents:,} documents need {(keys_bytes + marks_bytes) / 1e9:.1f} GB in "
                    f"{tempfile.gettempdir()!r} ({error.strerror}); set TMPDIR to a folder with more room"
                ) from None
            keys_BN = np.memmap(file, dtype=np.uint64, mode="r+", shape=(bands, documents))
            marks_NP = np.memmap(file, dtype=np.uint8, mode="r+", offset=keys_bytes, shape=(documents, places))
            yield cls(keys_BN.view(np.ndarray), marks_NP.view(np.ndarray))

    def put(self, start: int, keys_BD: np.ndarray, marks_DP: np.ndarray) -> None:
        """The sketches of the documents from number `start` on."""
        self.keys_BN[:, start : start + len(marks_DP)] = keys_BD
        self.marks_NP[start : start + len(marks_DP)] = marks_DP
