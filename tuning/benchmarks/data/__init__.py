"""The data platform measured, from preparing to updating, beside the projects that people use for it today.

In: options. Out: a record, see `tuning.benchmarks.record`. Each module named like a group says what is measured and of
whom; `ours`, `tokenizers`, `duplicates` and `peers` hold what runs in processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from blues.config import nearest
from blues.errors import BluesError, ConfigError
from tuning.benchmarks.bench import Bench, installed
from tuning.benchmarks.data import dedup, incremental, loader, prepare, verify
from tuning.benchmarks.data.kept import clear
from tuning.benchmarks.data.setting import Options, Setting

MODULES = (prepare, loader, verify, dedup, incremental)
GROUPS: dict[str, Callable[[Setting], None]] = {module.GROUP: module.measure for module in MODULES}


def measure(bench: Bench, options: Options, only: str | None = None, *, keep: bool = False) -> None:
    """Measure the groups named in `only`, joined by commas (None: all); one that fails does not stop the others.

    keep: leave the data in the work folder for another run, which uses what it would make just so (see `kept`).

    Raises:
        ConfigError: there is no such group, or the peers' interpreter cannot be run.
    """
    names = list(GROUPS) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in GROUPS:
            raise ConfigError(f"unknown group {name!r} in --only.{nearest(name, GROUPS)}")
    installed(options.peer_python, [])
    setting = Setting(bench, options)
    try:
        for name in names:
            try:
                GROUPS[name](setting)
            except (BluesError, OSError) as error:
                bench.lose(name, str(error))
    except KeyboardInterrupt:
        bench.record.interrupted = True
        raise
    finally:
        bench.record.save()
        if not keep:
            clear(setting.folder)
