"""Preparing: Python source to a finished dataset, beside the tokenizers alone and beside Hugging Face datasets."""

from __future__ import annotations

from blues.data import tokenizer as tok
from tuning.benchmarks.bench import Probe
from tuning.benchmarks.data import corpus as corp
from tuning.benchmarks.data.setting import MB, Setting
from tuning.benchmarks.record import Measurement, Spread, ratio

GROUP = "prepare"
QUARTER = 4
METRICS = ("MB/s", "MB/s a core", "s")
COMMAND = "the whole command: start of Python and Ray, reading, tokenizing, writing, checksums, fsync"
ALONE = "text in memory, vocabulary loaded, tokens thrown away"


def measure(setting: Setting) -> None:
    """Measure the group."""
    corpus, workers, bench = setting.corpus, setting.options.workers, setting.bench
    title = f"{corpus.bytes / MB:,.0f} MB of Python source, {corpus.files:,} files, {workers} workers"
    bench.begin(GROUP, title, corpus={"files": corpus.files, "bytes": corpus.bytes, "xxh3": corpus.xxh3})
    quarter = corp.share_of(corpus, setting.folder / "corpus-quarter", QUARTER)
    probes = [
        _command(setting, "blues prepare", corpus, []),
        _command(setting, "blues prepare, a quarter of it", quarter, []),
        _command(setting, "blues prepare, fast", corpus, ["--tokenizer-backend", "fast"]),
        _command(setting, "blues prepare, fast, a quarter of it", quarter, ["--tokenizer-backend", "fast"]),
        *(_alone(setting, name, how) for name in ("tiktoken", "fastokens") for how in ("threads", "processes")),
        _datasets(setting),
    ]
    made = bench.measure(GROUP, probes)
    _figures(setting, made, corpus.bytes - quarter.bytes)


def _command(setting: Setting, name: str, corpus: corp.Corpus, options: list[str]) -> Probe:
    workers, output = setting.options.workers, str(setting.folder / "prepared")
    arguments = {"corpus": corpus.path, "size": corpus.bytes, "output": output, "workers": workers, "options": options}
    return Probe(name, "blues", setting.ours("ours", "prepare", arguments), METRICS, COMMAND)


def _alone(setting: Setting, encoder: str, how: str) -> Probe:
    count = setting.options.workers
    variables = {"RAYON_NUM_THREADS": str(count if how == "threads" else 1)}
    arguments = {"corpus": setting.corpus.path, "encoder": encoder, "count": count}
    call = setting.ours("tokenizers", how, arguments, packages=[encoder], variables=variables)
    return Probe(f"{encoder} alone, {count} {how}", "peer", call, METRICS, ALONE)


def _datasets(setting: Setting) -> Probe:
    arguments = {
        "corpus": setting.corpus.path,
        "size": setting.corpus.bytes,
        "output": str(setting.folder / "datasets"),
        "vocabulary": str(tok.VOCABULARY_FILE),
        "pattern": tok.PATTERN,
        "workers": setting.options.workers,
    }
    call = setting.peer("map_datasets", arguments, ["datasets", "tiktoken"])
    note = "map with tiktoken, then save_to_disk; imports are not counted, no checksums, no boundaries, no fsync"
    return Probe("Hugging Face datasets", "peer", call, METRICS, note)


def _figures(setting: Setting, made: dict[str, Measurement], bytes_more: int) -> None:
    bench, workers = setting.bench, setting.options.workers
    speed = {name: measurement.spread("MB/s") for name, measurement in made.items()}
    bench.figure(GROUP, "fast backend, everything included", speed["blues prepare, fast"], "MB/s", at_least=60.0)
    ways = [f"tiktoken alone, {workers} {how}" for how in ("threads", "processes")]
    raw = max(filter(None, (speed[way] for way in ways)), key=lambda spread: spread.mean, default=None)
    ours = speed["blues prepare"]
    if raw is not None and ours is not None:
        share = ratio(ours, raw, 100)
        bench.figure(GROUP, "share of the faster way of tiktoken alone", share, "%", at_least=90.0)
    for backend, name in (("tiktoken", "blues prepare"), ("fastokens", "blues prepare, fast")):
        own, alone = (made[one].spread("MB/s a core") for one in (name, f"{backend} alone, {workers} processes"))
        if own is not None and alone is not None:
            title = f"{name}: share of {backend} alone in processor time, Ray's included"
            bench.figure(GROUP, title, ratio(own, alone, 100), "%")
    for backend, name in (("tiktoken", "blues prepare"), ("fast", "blues prepare, fast")):
        whole, quarter = made[name].spread("s"), made[f"{name}, a quarter of it"].spread("s")
        if whole is not None and quarter is not None and whole.mean > quarter.mean:
            rate = bytes_more / MB / (whole.mean - quarter.mean)
            start = whole.mean - setting.corpus.bytes / MB / rate
            bench.figure(GROUP, f"{backend}: rate beyond the start (all less a quarter)", Spread((rate,)), "MB/s")
            bench.figure(GROUP, f"{backend}: the start", Spread((start,)), "s")
    reference = made[ways[0]].spread("tokens")
    for name in ("blues prepare", "blues prepare, fast", "Hugging Face datasets"):
        counted = made[name].spread("tokens")
        if reference is not None and counted is not None:
            differing = Spread((abs(counted.mean - reference.mean),))
            bench.figure(GROUP, f"{name}: tokens more or less than tiktoken's", differing, "", at_most=0.0)
