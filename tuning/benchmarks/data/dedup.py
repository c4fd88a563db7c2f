"""Near duplicates: speed on the whole corpus, and what is found among copies whose similarity is known."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import numpy as np

from tuning.benchmarks.bench import Probe
from tuning.benchmarks.data.duplicates import SETTINGS, SIMILARITY
from tuning.benchmarks.data.setting import MB, Setting

GROUP = "dedup"
METRICS = ("MB/s a core", "recall %", "wrong", "MB/s", "growth MB")
VERIFIED = "signatures, proposals, exact Jaccard index"
COPIES = 0.25
"""Of the drawn documents, so many get a changed copy."""


def measure(setting: Setting) -> None:
    """Measure the group."""
    bench, corpus, prepared = setting.bench, setting.corpus, setting.prepared
    copies, known = str(setting.folder / "copies"), str(setting.folder / "known.npz")
    wanted = {"documents": setting.options.documents, "copies": COPIES, "seed": setting.options.seed}
    made = bench.call(setting.ours("duplicates", "write_copies", {"prepared": prepared, "output": copies, **wanted}))
    brute = bench.call(setting.ours("duplicates", "brute_force", {"folder": copies, "output": known}))
    title = (
        f"{corpus.bytes / MB:,.0f} MB of Python; {made['documents']:,} documents, {made['bytes'] / MB:.0f} MB, with "
        f"{brute['pairs']:,} pairs of Jaccard index >= {SIMILARITY}. recall: of these pairs not both stay; wrong: "
        f"documents that go though nothing has an index >= {SETTINGS.threshold} with them"
    )
    bench.begin(GROUP, title, settings=asdict(SETTINGS), brute_force_s=brute["s"], **made)
    ours = functools.partial(setting.ours, "duplicates", "remove")
    defaults = {"ngram": SETTINGS.ngram, "permutations": SETTINGS.permutations, "threshold": SETTINGS.threshold}
    peer = setting.peer("remove_copies", {"folder": copies, "size": made["bytes"], **defaults}, ["datasketch", "numpy"])
    whole, few = {"store": prepared, "size": corpus.bytes}, {"store": copies, "size": made["bytes"]}
    judge = functools.partial(judged, known)
    done = bench.measure(
        GROUP,
        [
            Probe("blues dedup, whole corpus", "blues", ours(whole), METRICS, VERIFIED, judge=counted),
            Probe("blues dedup, copies", "blues", ours(few), METRICS, VERIFIED, judge=judge),
            Probe("datasketch, copies", "peer", peer, METRICS, "signatures and proposals, not verified", judge=judge),
        ],
    )
    speed = done["blues dedup, whole corpus"].spread(METRICS[0])
    bench.figure(GROUP, "near duplicates of the whole corpus", speed, METRICS[0], at_least=30.0)
    found = done["blues dedup, copies"]
    bench.figure(GROUP, f"recall of pairs with J >= {SIMILARITY}", found.spread("recall %"), "%", at_least=95.0)
    bench.figure(GROUP, "documents that go wrongly", found.spread("wrong"), "", at_most=0.0)


def judged(known: str, answer: dict[str, Any]) -> dict[str, Any]:
    """What the removed documents are worth, by the pairs of brute force in the file `known`."""
    with np.load(known) as file:
        pairs, index = file["pairs"], file["index"]
    asked, removed = pairs[index >= SIMILARITY], np.array(answer["removed"], dtype=np.int64)
    recall = np.isin(asked, removed).any(axis=1).mean() if len(asked) else 1.0
    wrong = np.count_nonzero(~np.isin(removed, pairs))
    return counted(answer) | {"recall %": 100 * float(recall), "wrong": int(wrong)}


def counted(answer: dict[str, Any]) -> dict[str, Any]:
    """The number of removed documents in place of their list."""
    return {**answer, "removed": len(answer["removed"])}
