"""Preparing: Python source to a finished dataset, beside the tokenizers alone and beside Hugging Face datasets."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from blues.data import tokenizer as tok
from tuning.benchmarks.bench import Probe
from tuning.benchmarks.data import corpus as corp
from tuning.benchmarks.data.setting import MB, Setting, files_below, settle, warm
from tuning.benchmarks.record import Measurement, Spread, ratio

GROUP = "prepare"
QUARTER = 4
METRICS = ("MB/s", "MB/s a core", "s")
DATASETS = "Hugging Face datasets"
COMMAND = "the whole command: start of Python and Ray, reading, tokenizing, writing, checksums, fsync"
ALONE = "text in memory, vocabulary loaded, tokens thrown away"


def measure(setting: Setting) -> None:
    """Measure the group."""
    corpus, workers, bench = setting.corpus, setting.options.workers, setting.bench
    quarter = corp.share_of(corpus, setting.folder / "corpus-quarter", QUARTER)
    title = (
        f"{corpus.size} of Python source, {corpus.files:,} files, and a quarter of them, {quarter.size}; "
        f"{workers} workers"
    )
    bench.begin(GROUP, title, corpus=_facts(corpus), quarter=_facts(quarter))
    fast = ["--tokenizer-backend", "fast"]
    probes = [
        _command(setting, "blues prepare", corpus, []),
        _command(setting, "blues prepare, a quarter", quarter, []),
        _command(setting, "blues prepare, fast", corpus, fast),
        _command(setting, "blues prepare, fast, a quarter", quarter, fast),
        *(_alone(setting, name, how) for name in ("tiktoken", "fastokens") for how in ("threads", "processes")),
        _datasets(setting),
    ]
    _figures(setting, bench.measure(GROUP, probes), quarter)


def _facts(corpus: corp.Corpus) -> dict[str, Any]:
    return {"files": corpus.files, "bytes": corpus.bytes, "xxh3": corpus.xxh3}


def _command(setting: Setting, name: str, corpus: corp.Corpus, options: list[str]) -> Probe:
    folder, workers = setting.folder / "prepared", setting.options.workers
    arguments = {"corpus": corpus.path, "size": corpus.bytes, "output": str(folder / "dataset"), "workers": workers}
    call = setting.ours("ours", "prepare", {**arguments, "options": options})
    return Probe(name, "blues", call, METRICS, COMMAND, partial(_ready, folder, corpus), corpus.size)


def _ready(output: Path, corpus: corp.Corpus) -> None:
    """Nothing of an earlier run is there, finished or begun, and the text lies in the page cache for everybody."""
    shutil.rmtree(output, ignore_errors=True)
    settle()
    warm(files_below(corpus.path))


def _alone(setting: Setting, encoder: str, how: str) -> Probe:
    count = setting.options.workers
    variables = {"RAYON_NUM_THREADS": str(count if how == "threads" else 1)}
    arguments = {"corpus": setting.corpus.path, "encoder": encoder, "count": count}
    call = setting.ours("tokenizers", how, arguments, packages=[encoder], variables=variables)
    return Probe(f"{encoder} alone, {count} {how}", "peer", call, METRICS, ALONE, of=setting.corpus.size)


def _datasets(setting: Setting) -> Probe:
    corpus, folder = setting.corpus, setting.folder / "datasets"
    arguments = {
        "corpus": corpus.path,
        "size": corpus.bytes,
        "output": str(folder),
        "vocabulary": str(tok.VOCABULARY_FILE),
        "pattern": tok.PATTERN,
        "workers": setting.options.workers,
    }
    call = setting.peer("map_datasets", arguments, ["datasets", "tiktoken"])
    note = "map with tiktoken, then save_to_disk; imports are not counted, no checksums, no boundaries, no fsync"
    return Probe(DATASETS, "peer", call, METRICS, note, partial(_ready, folder, corpus), corpus.size)


def _figures(setting: Setting, made: dict[str, Measurement], quarter: corp.Corpus) -> None:
    workers, whole = setting.options.workers, setting.corpus.size
    figure = partial(setting.bench.figure, GROUP)
    speed = {name: measurement.spread("MB/s") for name, measurement in made.items()}
    figure("fast backend, everything included", speed["blues prepare, fast"], "MB/s", of=whole, at_least=60.0)
    ways = [f"tiktoken alone, {workers} {how}" for how in ("threads", "processes")]
    raw = max(filter(None, (speed[way] for way in ways)), key=lambda spread: spread.mean, default=None)
    ours = speed["blues prepare"]
    if raw is not None and ours is not None:
        share = ratio(ours, raw, 100)
        figure("share of the faster way of tiktoken alone", share, "%", of=whole, at_least=90.0)
    for backend, name in (("tiktoken", "blues prepare"), ("fastokens", "blues prepare, fast")):
        own, alone = (made[one].spread("MB/s a core") for one in (name, f"{backend} alone, {workers} processes"))
        if own is not None and alone is not None:
            title = f"{name}: share of {backend} alone in processor time, Ray's included"
            figure(title, ratio(own, alone, 100), "%", of=whole)
    for backend, name in (("tiktoken", "blues prepare"), ("fast", "blues prepare, fast")):
        _start(setting, backend, made[name].spread("s"), made[f"{name}, a quarter"].spread("s"), quarter)
    reference = made[ways[0]].spread("tokens")
    for name in ("blues prepare", "blues prepare, fast", DATASETS):
        counted = made[name].spread("tokens")
        if reference is not None and counted is not None:
            differing = Spread(tuple(abs(value - reference.mean) for value in counted.values))
            figure(f"{name}: tokens more or less than tiktoken's", differing, "", of=whole, at_most=0.0)


def _start(setting: Setting, backend: str, whole_s: Spread | None, quarter_s: Spread | None, quarter: corp.Corpus):
    """What starting takes, and the rate beyond it: the whole corpus less a quarter of it, in the same round."""
    corpus = setting.corpus
    if whole_s is None or quarter_s is None:
        return
    rounds = list(zip(whole_s.values, quarter_s.values, strict=False))
    if not rounds or any(whole <= few for whole, few in rounds):  # too small a corpus to tell
        return
    rates = [(corpus.bytes - quarter.bytes) / MB / (whole - few) for whole, few in rounds]
    starts = [whole - corpus.bytes / MB / rate for (whole, _), rate in zip(rounds, rates, strict=True)]
    of = f"{corpus.size} less {quarter.size}"
    setting.bench.figure(GROUP, f"{backend}: rate beyond the start", Spread(tuple(rates)), "MB/s", of=of)
    setting.bench.figure(GROUP, f"{backend}: the start", Spread(tuple(starts)), "s", of=of)
