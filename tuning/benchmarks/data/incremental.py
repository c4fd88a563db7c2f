"""Updating: a git repository moves from commit A to commit B, and the dataset follows, beside preparing B anew, and
beside an update where nothing has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from blues.data.storage.store import Store
from tuning.benchmarks.bench import Call, Probe
from tuning.benchmarks.data import repository as repo
from tuning.benchmarks.data.kept import kept
from tuning.benchmarks.data.setting import Setting, settle
from tuning.benchmarks.record import Measurement, Spread, ratio

GROUP = "incremental"
METRICS = ("s", "cpu s")
ANEW, FOLLOW, IDLE = "everything anew", "update", "update, nothing changed"
INSIDE = "in a process that has Blues loaded; Ray is started where it is needed"
WHOLE = "the whole command, with the start of Python and all imports"
MOST_PERCENT = 3.0


def measure(setting: Setting) -> None:
    """Measure the group."""
    bench, options = setting.bench, setting.options
    path = setting.folder / "repository"
    made = repo.build(path, setting.corpus, share=options.edited, seed=options.seed, say=bench.say)
    title = (
        f"{setting.corpus.size} of Python source, {made.files:,} files; {made.edited} edited, {made.removed} removed, "
        f"{made.renamed} renamed"
    )
    bench.begin(GROUP, title, before=made.before, after=made.after, bytes=setting.corpus.bytes, files=made.files)
    old, new, same, anew = (setting.folder / f"incremental-{name}" for name in ("old", "new", "same", "anew"))
    request = {"repository": made.before, "code": setting.code("ours")}
    first = _inside(setting, made, old, "prepare", commit=made.before)
    kept(old, request, lambda _: bench.call(first), say=bench.say)
    again, still = partial(_copy, old, new), partial(_copy, old, same)
    remove = partial(_remove, anew)
    idle = _inside(setting, made, same, "update", commit=made.before, makes=False)
    probe = partial(_probe, setting)
    done = bench.measure(
        GROUP,
        [
            probe(f"{FOLLOW}, inside", _inside(setting, made, new, "update"), INSIDE, again),
            probe(f"{IDLE}, inside", idle, INSIDE, still),
            probe(f"{ANEW}, inside", _inside(setting, made, anew, "prepare"), INSIDE, remove),
            probe(f"{FOLLOW}, command", _command(setting, made.path, made.after, new, 2, "--update"), WHOLE, again),
            probe(f"{IDLE}, command", _command(setting, made.path, made.before, same, 1, "--update"), WHOLE, still),
            probe(f"{ANEW}, command", _command(setting, made.path, made.after, anew, 1), WHOLE, remove),
        ],
    )
    _figures(setting, done, new, anew)


def _copy(dataset: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(dataset, target)
    settle()


def _remove(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    settle()


def _probe(setting: Setting, name: str, call: Call, note: str, before: Callable[[], object]) -> Probe:
    return Probe(name, "blues", call, METRICS, note, before, setting.corpus.size)


def _inside(
    setting: Setting, made: repo.Repository, output: Path, mode: str, commit: str | None = None, makes: bool = True
) -> Call:
    """commit: B by default. makes: whether there is something to do."""
    arguments = {"repository": made.path, "commit": commit or made.after, "output": str(output)}
    return setting.ours("ours", "follow", {**arguments, "mode": mode, "makes": makes})


def _command(setting: Setting, repository: str, commit: str, output: Path, version: int, *options: str) -> Call:
    """version: what the dataset has afterwards."""
    words = ["prepare", "--input-dir", repository, "--commit", commit, "--data-cache-dir", str(output), *options]
    return setting.ours("ours", "command", {"words": words, "dataset": str(output), "version": version})


def _figures(setting: Setting, made: dict[str, Measurement], new: Path, anew: Path) -> None:
    figure = partial(setting.bench.figure, GROUP, of=setting.corpus.size)
    for how in ("inside", "command"):
        for metric, what in (("s", "time"), ("cpu s", "processor time")):
            update, idle, rebuild = (made[f"{name}, {how}"].spread(metric) for name in (FOLLOW, IDLE, ANEW))
            share = f"share of preparing anew, {how}, in {what}"
            if update is not None and rebuild is not None:
                figure(share, ratio(update, rebuild, 100), "%", at_most=MOST_PERCENT)
            if idle is not None and rebuild is not None:
                figure(f"nothing changed: {share}", ratio(idle, rebuild, 100), "%")
    if all(measurement.problem is None for measurement in made.values()):
        differing = Spread((float(Store.open(new).fingerprint != Store.open(anew).fingerprint),))
        figure("fingerprints that differ from preparing anew", differing, "", at_most=0.0)
