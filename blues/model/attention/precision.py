"""The number format in which a layer's attention is computed, and what happens when float16 is too small for it.

In: the format of the activations and the device. Out: the format of the attention.

float16 ends at 65504. A score beyond it is infinite, and the softmax of two infinities is not a number. `Precision`
watches what a float16 layer computes, on the device: a flag is copied to the host behind the computation and looked at
when the next forward begins, so nothing waits. From then on that layer computes in a wider format. The steps until then
are lost, as steps of float16 with a loss scale are: whoever scales losses skips them by their gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from blues.kernels.attention import capability_of

logger = logging.getLogger("blues")

Wanted = Literal["auto", "float32", "bfloat16", "float16"]
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.compiler.assume_constant_result
def has_bfloat16(device: str) -> bool:
    """Whether the device computes in bfloat16 by itself; where there is none to be asked, it is taken to."""
    return (capability_of(torch.device(device)) or (8, 0)) >= (8, 0)


class Precision:
    """The choice of one layer.

    "auto" is the activations' own format where the device has it: bfloat16 is float32 on CUDA before 8.0, float16 is
    float32 on CPU. Any other name is that format, whatever the activations have. float16 is left at the first overflow.

    overflows: forwards whose attention was not finite in float16, as far as they were looked at. watched: whether there
    was float16 to be looked at.
    """

    def __init__(self, wanted: Wanted = "auto") -> None:
        self.wanted = wanted
        self.overflows = 0
        self.watched = False
        self._seen: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a layer start without what is still under way on the device."""
        return {**self.__dict__, "_seen": []}

    def dtype(self, activations: torch.dtype, device: torch.device) -> torch.dtype:
        """The format for `activations` on `device`."""
        dtype = activations if self.wanted == "auto" else NAMES[self.wanted]
        if dtype == torch.float16:
            if self.overflows or (torch.compiler.is_compiling() and self.wanted == "auto"):  # see `watch`
                return torch.bfloat16 if has_bfloat16(str(device)) else torch.float32
            return torch.float32 if device.type == "cpu" and self.wanted == "auto" else dtype
        if dtype == torch.bfloat16 and not has_bfloat16(str(device)):
            return torch.float32
        return dtype

    def watch(self, out: Tensor) -> None:
        """Note whether `out` is finite, if it is float16; `poll` reads the note.

        Inside a compiled model nothing can be noted; there "auto" does not choose float16 in the first place.
        """
        if out.dtype != torch.float16 or torch.compiler.is_compiling():
            return
        self.watched = True
        overflowed = ~torch.isfinite(out.detach()).all()
        if not out.is_cuda:
            self._seen.append((overflowed, None))
            return
        with torch.cuda.device(out.device):
            noted = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(overflowed, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._seen.append((noted, event))

    def poll(self, name: str = "a layer") -> bool:
        """Look at the notes that have arrived. True if float16 has overflowed since the last call.

        Call it between forwards, never within one: activation checkpointing computes a layer again, and must find the
        format that it had the first time.
        """
        arrived = [flag for flag, event in self._seen if event is None or event.query()]
        self._seen = self._seen[len(arrived) :]  # a stream notes in order
        new = sum(int(flag) for flag in arrived)
        if new and not self.overflows:
            logger.warning("attention of %s overflowed in float16; it is computed in a wider format from now on", name)
        self.overflows += new
        return new > 0


def overflow_metrics(layers: Iterable[Precision]) -> dict[str, float]:
    """`attention/float16_overflows`: of all layers of this worker so far; empty where none was in float16."""
    watched = [layer for layer in layers if layer.watched]
    return {"attention/float16_overflows": float(sum(layer.overflows for layer in watched))} if watched else {}
