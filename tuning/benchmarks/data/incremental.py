"""Updating: a git repository moves from commit A to commit B, and the dataset follows, beside preparing B anew."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from blues.data.store import Store
from tuning.benchmarks.bench import Probe
from tuning.benchmarks.data import repository as repo
from tuning.benchmarks.data.setting import MB, Setting
from tuning.benchmarks.record import Measurement, Spread, ratio

GROUP = "incremental"
METRICS = ("s",)
ANEW, FOLLOW = "everything anew", "update"
INSIDE = "in a process that has Blues loaded: Ray is started where it is needed"
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
    words = ["--input-dir", made.path, "--num-workers", str(setting.options.workers)]
    if not (old / "manifest.json").exists():
        bench.call(_command(setting, "command", [*words, "--commit", made.before], old))

    def again() -> None:
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new)

    update, rebuild = [*words, "--commit", made.after, "--update"], [*words, "--commit", made.after]
    probes = []
    for how, note in (("inside", INSIDE), ("command", WHOLE)):
        call = _command(setting, how, update, new)
        probes.append(Probe(f"{FOLLOW}, {how}", "blues", call, METRICS, note, again))
        call = _command(setting, how, rebuild, anew)
        probes.append(Probe(f"{ANEW}, {how}", "blues", call, METRICS, note, lambda: shutil.rmtree(anew, True)))
    _figures(setting, bench.measure(GROUP, probes), new, anew)


def _command(setting: Setting, how: str, words: Sequence[str], output: Path):
    return setting.ours("ours", how, {"words": ["prepare", *words, "--data-cache-dir", str(output)]})


def _figures(setting: Setting, made: dict[str, Measurement], new: Path, anew: Path) -> None:
    for how in ("inside", "command"):
        update, rebuild = made[f"{FOLLOW}, {how}"].spread("s"), made[f"{ANEW}, {how}"].spread("s")
        if update is not None and rebuild is not None:
            name = f"share of preparing anew, {how}"
            setting.bench.figure(GROUP, name, ratio(update, rebuild, 100), "%", at_most=MOST_PERCENT)
    if all(measurement.problem is None for measurement in made.values()):
        differing = Spread((float(Store.open(new).fingerprint != Store.open(anew).fingerprint),))
        setting.bench.figure(GROUP, "fingerprints that differ from preparing anew", differing, "", at_most=0.0)
