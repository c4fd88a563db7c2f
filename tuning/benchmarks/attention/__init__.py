"""Attention: every backend of blues/kernels/attention/ at the shape of Blues-01, beside each other in one process.

In: a device and shapes. Out: times, rates, and how far each backend is from the naive one in float32, in a record.

Rounds, not one backend after the other: if the device slows down, it does so for all. Calls are queued back to back and
timed by the device's clock, so what the host spends counts only where the device waits for it. `auto` is what a model
runs: the choice, and the wrapper of a layer around it.

    python -m tuning.benchmarks.attention --output attention.json
"""

from tuning.benchmarks.attention.measure import measure
from tuning.benchmarks.attention.shapes import SHAPES, Shape

__all__ = ["SHAPES", "Shape", "measure"]
