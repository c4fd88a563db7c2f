"""Near duplicates: speed on the whole corpus, and what is found among copies whose similarity is known."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

from tuning.benchmarks.bench import Probe
from tuning.benchmarks.data.duplicates import SETTINGS, SIMILARITY
from tuning.benchmarks.data.setting import MB, Setting
from tuning.benchmarks.record import Spread

GROUP = "dedup"
METRICS = ("MB/s a core", "recall %", "s", "growth MB")
COPIES = 0.25
"""Of the drawn documents, so many get a changed copy."""


def measure(setting: Setting) -> None:
    """Measure the group."""
    bench, corpus, prepared = setting.bench, setting.corpus, setting.prepared
    copies, pairs = str(setting.folder / "copies"), str(setting.folder / "pairs.npy")
    wanted = {"documents": setting.options.documents, "copies": COPIES, "seed": setting.options.seed}
    made = bench.call(setting.ours("duplicates", "write_copies", {"prepared": prepared, "output": copies, **wanted}))
    known = bench.call(setting.ours("duplicates", "brute_force", {"folder": copies, "output": pairs}))
    title = (
        f"{corpus.bytes / MB:,.0f} MB of Python; {made['documents']:,} documents, {made['bytes'] / MB:.0f} MB, with "
        f"{known['pairs']:,} pairs of Jaccard index >= {SIMILARITY}; MB of text by second of processor time"
    )
    bench.begin(GROUP, title, settings=asdict(SETTINGS), brute_force_s=known["s"], **made)
    among = {"size": made["bytes"], "pairs": pairs}
    defaults = {"ngram": SETTINGS.ngram, "permutations": SETTINGS.permutations, "threshold": SETTINGS.threshold}
    ours = functools.partial(setting.ours, "duplicates", "remove")
    peer = setting.peer("find_copies", {"folder": copies, **among, **defaults}, ["datasketch", "numpy"])
    whole: dict[str, Any] = {"store": prepared, "size": corpus.bytes}
    done = bench.measure(
        GROUP,
        [
            Probe("blues dedup, whole corpus", "blues", ours(whole), METRICS, "signatures, candidates, exact Jaccard"),
            Probe("blues dedup, copies", "blues", ours({"store": copies, **among}), METRICS, "the same"),
            Probe("datasketch, copies", "peer", peer, METRICS, "signatures and candidates; nothing is verified"),
        ],
    )
    speed = done["blues dedup, whole corpus"].spread(METRICS[0])
    bench.figure(GROUP, "near duplicates of the whole corpus", speed, METRICS[0], at_least=30.0)
    found = done["blues dedup, copies"]
    recall = found.spread("recall %")
    bench.figure(GROUP, f"recall of pairs with J >= {SIMILARITY}", recall, "%", at_least=95.0)
    strangers: Spread | None = found.spread("strangers")
    bench.figure(GROUP, "removed as similar, but unknown to brute force", strangers, "documents", at_most=0.0)
