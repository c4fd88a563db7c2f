"""Loading: random windows of a large store as int64 tensors, in one process, beside mosaicml-streaming and litdata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tuning.benchmarks.bench import Call, Probe
from tuning.benchmarks.data.setting import Setting, cool, files_below, warm

GROUP = "loader"
METRICS = ("MB/s", "MB/s a core", "open ms", "first batch ms", "growth MB", "of it files MB")
COLD_SHARE = 10
"""Of the windows, one in so many is read when the files are not in memory: a disk seeks slowly."""
MDS, LITDATA = "mosaicml-streaming", "litdata"
BLOCKS = "fixed blocks, in shards"
ORDERS = {"numbered": "random blocks by number", "shuffled": "its own shuffled order"}
FROM_DISK = ", from disk"


def measure(setting: Setting) -> None:
    """Measure the group."""
    options, bench = setting.options, setting.bench
    title = (
        f"{options.windows:,} windows of {options.window_tokens:,} tokens from {setting.store_size}, "
        f"batches of {options.batch}, one process; MB of uint32 tokens"
    )
    bench.begin(GROUP, title, store_bytes=setting.store_bytes, chunks=len(setting.token_files))
    made = bench.measure(GROUP, _probes(setting))
    best, figure = made["Store.read_windows"], partial(bench.figure, GROUP, of=setting.store_size)
    figure("random windows", best.spread("MB/s"), "MB/s", at_least=500.0)
    figure("open", best.spread("open ms"), "ms", at_most=100.0)
    figure("growth of memory", best.spread("growth MB"), "MB", at_most=200.0)
    figure("what training reads", made["Mixture.batch"].spread("MB/s"), "MB/s", at_least=500.0)


def _probes(setting: Setting) -> list[Probe]:
    """First everything in the page cache, then everything from the disk."""
    ours = _ours(setting)
    peers = [*_peer(setting, MDS, "write_mds", "read_mds"), *_peer(setting, LITDATA, "write_litdata", "read_litdata")]
    return sorted([*ours, *peers], key=lambda probe: probe.name.endswith(FROM_DISK))


def _ours(setting: Setting) -> list[Probe]:
    files, reading = files_below(setting.store), _reading(setting)
    heat, chill, anywhere = partial(warm, files), partial(cool, files), "windows that start at any token"

    def call(function: str, arguments: dict[str, Any]) -> Call:
        return setting.ours("ours", function, {"store": setting.store, **arguments})

    memmap = setting.ours("ours", "read_memmap", {"files": setting.token_files, **reading})
    return [
        Probe("Store.read_windows", "blues", call("read_windows", reading), METRICS, anywhere, heat),
        Probe("Mixture.batch", "blues", call("read_mixture", reading), METRICS, "every window once, shuffled", heat),
        Probe("numpy memory map", "reference", memmap, METRICS, "as nanoGPT reads, same files", heat),
        Probe(
            f"Store.read_windows{FROM_DISK}", "blues", call("read_windows", _cold(reading)), METRICS, anywhere, chill
        ),
        Probe(f"Mixture.batch{FROM_DISK}", "blues", call("read_mixture", _cold(reading)), METRICS, anywhere, chill),
    ]


def _peer(setting: Setting, name: str, writer: str, reader: str) -> list[Probe]:
    packages, reading, folder = (name, "torch", "numpy"), _reading(setting), str(setting.folder / name)
    length = setting.options.window_tokens
    write = setting.peer(writer, {"files": setting.token_files, "output": folder, "length": length}, packages)

    def before(what: Callable[[Sequence[str]], None]) -> Callable[[], None]:
        return lambda: what(files_below(setting.peer_store(name, write)))

    def probe(order: str, arguments: dict[str, Any], ready: Callable[[], None], where: str = "") -> Probe:
        call = setting.peer(reader, {"folder": folder, "order": order, **arguments}, packages)
        return Probe(f"{name}, {order}{where}", "peer", call, METRICS, f"{ORDERS[order]}; {BLOCKS}", ready)

    return [
        *(probe(order, reading, before(warm)) for order in ORDERS),
        *(probe(order, _cold(reading), before(cool), FROM_DISK) for order in ORDERS),
    ]


def _reading(setting: Setting) -> dict[str, Any]:
    options = setting.options
    return {
        "windows": options.windows,
        "length": options.window_tokens,
        "batch": options.batch,
        "seed": options.seed,
    }


def _cold(reading: dict[str, Any]) -> dict[str, Any]:
    return {**reading, "windows": max(reading["batch"], reading["windows"] // COLD_SHARE)}
