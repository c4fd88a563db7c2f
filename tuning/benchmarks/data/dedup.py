"""Near duplicates: speed on the whole corpus, and what is found among copies whose similarity is known."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tuning.benchmarks.bench import Probe
from tuning.benchmarks.data.duplicates import SETTINGS, SIMILARITY
from tuning.benchmarks.data.kept import Facts, kept
from tuning.benchmarks.data.setting import MB, Setting
from tuning.benchmarks.record import number

GROUP = "dedup"
METRICS = ("MB/s a core", "recall %", "wrong", "MB/s", "growth MB")
VERIFIED = "signatures, proposals, exact Jaccard index"
PROPOSED = "signatures and proposals, not verified"
COPIES = 0.25
"""Of the drawn documents, so many get a changed copy."""


def measure(setting: Setting) -> None:
    """Measure the group."""
    bench, corpus, prepared = setting.bench, setting.corpus, setting.prepared
    copies = str(setting.folder / "copies")
    known, made, brute = _copies(setting, copies)
    of_copies = f"{number(made['bytes'] / MB)} MB"
    title = (
        f"{corpus.size} of Python; {made['documents']:,} documents, {of_copies}, with "
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
            Probe("blues dedup, whole corpus", "blues", ours(whole), METRICS, VERIFIED, of=corpus.size, judge=counted),
            Probe("blues dedup, copies", "blues", ours(few), METRICS, VERIFIED, of=of_copies, judge=judge),
            Probe("datasketch, copies", "peer", peer, METRICS, PROPOSED, of=of_copies, judge=judge),
        ],
    )
    speed = done["blues dedup, whole corpus"].spread(METRICS[0])
    bench.figure(GROUP, "near duplicates of the whole corpus", speed, METRICS[0], of=corpus.size, at_least=30.0)
    found = done["blues dedup, copies"]
    recall, wrong = found.spread("recall %"), found.spread("wrong")
    bench.figure(GROUP, f"recall of pairs with J >= {SIMILARITY}", recall, "%", of=of_copies, at_least=95.0)
    bench.figure(GROUP, "documents that go wrongly", wrong, "", of=of_copies, at_most=0.0)


def _copies(setting: Setting, copies: str) -> tuple[str, Facts, Facts]:
    """The file of the pairs that brute force finds; what was made, and what was found."""
    wanted = {"documents": setting.options.documents, "copies": COPIES, "seed": setting.options.seed}
    known = str(Path(copies, "known.npz"))
    write = setting.ours("duplicates", "write_copies", {"prepared": setting.prepared, "output": copies, **wanted})
    search = setting.ours("duplicates", "brute_force", {"folder": copies, "output": known})
    request = {**wanted, "corpus": setting.corpus.xxh3, "code": setting.code("duplicates")}

    def make(_: Path) -> Facts:
        return {"made": setting.bench.call(write), "brute": setting.bench.call(search)}

    facts = kept(Path(copies), request, make, say=setting.bench.say)
    return known, facts["made"], facts["brute"]


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
