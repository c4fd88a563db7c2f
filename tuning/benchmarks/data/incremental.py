"""Updating: a git repository moves from commit A to commit B, and the dataset follows, beside preparing B anew."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from blues.data.storage.store import Store
from tuning.benchmarks.bench import Call, Probe
from tuning.benchmarks.data import repository as repo
from tuning.benchmarks.data.setting import MB, Setting
from tuning.benchmarks.record import Measurement, Spread, ratio

GROUP = "incremental"
METRICS = ("s", "cpu s")
ANEW, FOLLOW = "everything anew", "update"
INSIDE = "in a process that has Blues loaded; Ray is started where it is needed"
WHOLE = "the whole command, with the start of Python and all imports"
MOST_PERCENT = 3.0


def measure(setting: Setting) -> None:
    """Measure the group."""
    bench, folder = setting.bench, setting.folder
    made = repo.build(folder / "repository", setting.corpus, share=setting.options.edited, seed=setting.options.seed)
    title = (
        f"{made.files:,} files of {setting.corpus.bytes / MB:,.0f} MB; {made.edited} edited, {made.removed} removed, "
        f"{made.renamed} renamed"
    )
    bench.begin(GROUP, title, before=made.before, after=made.after)
    old, new, anew = (folder / f"incremental-{name}" for name in ("old", "new", "anew"))
    if not (old / "manifest.json").exists():
        bench.call(_inside(setting, replace(made, after=made.before), old, "prepare"))

    def again() -> None:
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new)

    def remove() -> None:
        shutil.rmtree(anew, ignore_errors=True)

    done = bench.measure(
        GROUP,
        [
            Probe(f"{FOLLOW}, inside", "blues", _inside(setting, made, new, "update"), METRICS, INSIDE, again),
            Probe(f"{ANEW}, inside", "blues", _inside(setting, made, anew, "prepare"), METRICS, INSIDE, remove),
            Probe(f"{FOLLOW}, command", "blues", _command(setting, made, new, "--update"), METRICS, WHOLE, again),
            Probe(f"{ANEW}, command", "blues", _command(setting, made, anew), METRICS, WHOLE, remove),
        ],
    )
    _figures(setting, done, new, anew)


def _inside(setting: Setting, made: repo.Repository, output: Path, mode: str) -> Call:
    arguments = {"repository": made.path, "commit": made.after, "output": str(output), "mode": mode}
    return setting.ours("ours", "follow", arguments)


def _command(setting: Setting, made: repo.Repository, output: Path, *options: str) -> Call:
    words = ["prepare", "--input-dir", made.path, "--commit", made.after, "--data-cache-dir", str(output), *options]
    return setting.ours("ours", "command", {"words": words})


def _figures(setting: Setting, made: dict[str, Measurement], new: Path, anew: Path) -> None:
    for how in ("inside", "command"):
        for metric, what in (("s", "time"), ("cpu s", "processor time")):
            update, rebuild = made[f"{FOLLOW}, {how}"].spread(metric), made[f"{ANEW}, {how}"].spread(metric)
            if update is not None and rebuild is not None:
                name = f"share of preparing anew, {how}, in {what}"
                setting.bench.figure(GROUP, name, ratio(update, rebuild, 100), "%", at_most=MOST_PERCENT)
    if all(measurement.problem is None for measurement in made.values()):
        differing = Spread((float(Store.open(new).fingerprint != Store.open(anew).fingerprint),))
        setting.bench.figure(GROUP, "fingerprints that differ from preparing anew", differing, "", at_most=0.0)
