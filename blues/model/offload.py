"""Activations that wait for the backward in the host's memory instead of the device's.

In: blocks that run one after the other. Out: the same results and gradients, bit for bit, with the activations of about
two blocks on the device.

What a block saves for its gradient is copied to pinned memory on a stream of its own while the next block computes. In
the backward, the first activation of a block that is asked for also fetches those of the block before it, so that the
copy runs beside the computation (two buffers, as torchtune's `OffloadActivations`; the seam is torch's
`saved_tensors_hooks`, with which `save_on_cpu` does the same and waits for every copy). Under gradient checkpointing a
block saves its input alone, and that is what travels. Weights stay where they are, small tensors too.

On a CPU nothing is copied; who asks for what, and when, is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 2**20
"""Smaller tensors stay on the device: their copies would cost more than they free."""


class Transport(Protocol):
    """How tensors travel."""

    def store(self, x: Tensor) -> Tensor:
        """A copy in the host's memory; may still be under way."""
        ...

    def fetch(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy on the device, and what says that it has arrived."""
        ...


class HostTransport:
    """For a CPU: tensors are where they should be."""

    def store(self, x: Tensor) -> Tensor:
        return x

    def fetch(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        return x, None


class PinnedTransport:
    """For a CUDA device: pinned memory and a stream beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def store(self, x: Tensor) -> Tensor:
        host = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is not given away before the copy is done
        return host

    def fetch(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        with torch.cuda.stream(self.stream):  # behind the copies to the host, which are so done
            back = x.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        return back, event


class Counts(NamedTuple):
    """Of one forward and its backward so far."""

    stored: int
    """Tensors that went to the host."""
    stored_bytes: int
    prefetched: int
    """Fetched before they were asked for."""
    late: int
    """Fetched when they were asked for: the last block's, and those that are asked for again."""
    most_blocks: int
    """Blocks of which there were fetched tensors on the device at one time."""


class Offload:
    """One forward: `with offload.block(module):` around each block, in order."""

    def __init__(self, device: torch.device, *, min_bytes: int | None = None) -> None:
        self._transport: Transport = PinnedTransport(device) if device.type == "cuda" else HostTransport()
        self._device, self._min_bytes = device, MIN_BYTES if min_bytes is None else min_bytes
        self._blocks: list[_Saved] = []
        self._stored = self._bytes = self._prefetched = self._late = self._most = 0

    @contextlib.contextmanager
    def block(self, module: nn.Module) -> Iterator[None]:
        """What is saved for the gradient inside goes to the host; the weights of `module` do not."""
        saved = _Saved(self._blocks[-1] if self._blocks else None)
        self._blocks.append(saved)

        def pack(x: Tensor) -> Tensor | _Kept:
            if x.device != self._device or x.untyped_storage().nbytes() < self._min_bytes:
                return x
            # Looked up now: ZeRO-3 brings weights just before they are used.
            held = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
            if x.untyped_storage().data_ptr() in held:
                return x
            kept = _Kept(self._transport.store(x), saved)
            saved.kept.append(kept)
            self._stored += 1
            self._bytes += x.numel() * x.element_size()
            return kept

        def unpack(x: Tensor | _Kept) -> Tensor:
            return self._unpack(x) if isinstance(x, _Kept) else x

        with saved_tensors_hooks(pack, unpack):
            yield

    def counts(self) -> Counts:
        """So far."""
        return Counts(self._stored, self._bytes, self._prefetched, self._late, self._most)

    def _unpack(self, kept: _Kept) -> Tensor:
        if kept.arriving is None:
            self._late += 1
            self._fetch(kept)
        block = kept.block
        if not block.begun:
            block.begun = True
            before = block.before
            for other in (*block.kept, *(before.kept if before is not None else ())):
                if other.arriving is None:
                    self._fetch(other)
                    self._prefetched += 1
            self._most = max(self._most, sum(saved.arrived > 0 for saved in self._blocks))
        assert kept.arriving is not None
        x, event = kept.arriving
        kept.arriving = None  # autograd holds it from here on
        block.arrived -= 1
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            x.record_stream(current)
        return x

    def _fetch(self, kept: _Kept) -> None:
        kept.arriving = self._transport.fetch(kept.host)
        kept.block.arrived += 1


class _Kept:
    """A tensor that lies in the host's memory, and perhaps is on its way back."""

    def __init__(self, host: Tensor, block: _Saved) -> None:
        self.host, self.block = host, block
        self.arriving: tuple[Tensor, torch.cuda.Event | None] | None = None


class _Saved:
    """What one block saved; `before`: of the block before it, whose turn comes next in the backward."""

    def __init__(self, before: _Saved | None) -> None:
        self.before, self.kept, self.begun = before, list[_Kept](), False
        self.arrived = 0
        """Tensors on the device, or on the way there, that are not asked for yet."""
