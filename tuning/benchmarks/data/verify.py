"""Verifying: everything of a dataset read, hashed and compared, beside nothing but reading and hashing."""

from __future__ import annotations

from functools import partial
from typing import Any

from tuning.benchmarks.bench import Probe
from tuning.benchmarks.data.setting import Setting, files_below, warm
from tuning.benchmarks.record import Side

GROUP = "verify"
METRICS = ("GB/s a core", "GB/s", "s")
HASHING = "reading and hashing the token files, no structure"


def measure(setting: Setting) -> None:
    """Measure the group."""
    bench, size = setting.bench, setting.store_bytes
    bench.begin(GROUP, f"{setting.store_size} of tokens; GB of tokens by second of processor time, and by second")
    heat = partial(warm, files_below(setting.store))

    def probe(name: str, side: Side, function: str, arguments: dict[str, Any], note: str) -> Probe:
        return Probe(name, side, setting.ours("ours", function, {**arguments, "size": size}), METRICS, note, heat)

    whole, files = {"store": setting.store}, {"files": setting.token_files}
    made = bench.measure(
        GROUP,
        [
            probe("Store.check", "blues", "check", whole, "checksums, structure, totals"),
            probe("blues verify", "blues", "verify_command", whole, "the whole command: the same, and all statistics"),
            probe("xxh3 alone", "reference", "hash_files", {**files, "algorithm": "xxh3"}, HASHING),
            probe("sha256 alone", "reference", "hash_files", {**files, "algorithm": "sha256"}, HASHING),
        ],
    )
    for name in ("Store.check", "blues verify"):
        bench.figure(GROUP, name, made[name].spread(METRICS[0]), METRICS[0], of=setting.store_size, at_least=1.0)
