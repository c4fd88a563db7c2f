"""The files of a commit, from those of another commit that a dataset was made of, and what changed between the two.

In: a `GitFiles`, and what a dataset knows of the same source. Out: the `Listing` that `GitFiles.entries` gives, and its
counts of files passed over, in time that goes with what changed and not with the size of the repository.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from blues.data.reading.git import CONTENT, OBJECT_ID, GitFiles, object_sizes, passed_over, run_git
from blues.data.reading.places import EMPTY_TABLE, HIDDEN, LINK, SUBMODULES, Choose, Listing
from blues.data.storage.arrays import Strings, flags, positions, strings, whole, whole_numbers
from blues.errors import DataError

ABSENT = "000000"
"""The mode of a file that is not there."""


@dataclass(frozen=True)
class Known:
    """What a dataset says of a commit it was made of. tree: the id of the folder that was read. ignored: files passed
    over, by reason. files: gives `Plan.files`, when it is called."""

    tree: str
    ignored: Mapping[str, int]
    files: Callable[[], pa.Table]


@dataclass(frozen=True)
class _Change:
    """What became of a file: modes and ids before and now, ABSENT where there was or is none."""

    path: str
    old_mode: str
    mode: str
    id: str


def entries_since(place: GitFiles, known: Known | None, choose: Choose, ignored: Counter[str]) -> Listing | None:
    """`place.entries`; None, with nothing counted, where it cannot be told from what is known: list everything then.

    Whether `choose` still lets the files through that are kept is for the caller to see."""
    if known is None or not place.tree or not OBJECT_ID.fullmatch(known.tree):
        return None
    counts = Counter({reason: count for reason, count in known.ignored.items() if reason != EMPTY_TABLE})
    if not all(_still_holds(reason, choose) for reason in counts):
        return None
    changes = _changes(place, known.tree)
    if changes is None:
        return None
    gone: list[str] = []
    added: dict[str, str] = {}
    for change in changes:
        for mode, step in ((change.old_mode, -1), (change.mode, 1)):
            if mode == ABSENT:
                continue
            reason = passed_over(mode, change.path, choose)
            if reason is None and step < 0:
                gone.append(change.path)
            elif reason is None:
                added[change.path] = change.id
            elif reason:
                counts[reason] += step
    if min(counts.values(), default=0) < 0:
        return None
    listing = _applied(place, known.files(), gone, dict(sorted(added.items())))
    if listing is not None:
        ignored.update(+counts)
    return listing


def _still_holds(reason: str, choose: Choose) -> bool:
    """Whether files that were passed over for this would be today, and each reason stands for itself."""
    suffix = reason if reason.startswith(".") else ""
    return reason in (HIDDEN, LINK, SUBMODULES) or choose(f"x{suffix}") == reason


def _changes(place: GitFiles, tree: str) -> list[_Change] | None:
    """What differs between two trees; None if git does not have the older one whole, or a name is not UTF-8."""
    options = ["-r", "-z", "--raw", "--no-abbrev", "--no-renames", "--no-relative", "--ignore-submodules=none"]
    try:
        output = run_git(["diff-tree", *options, tree, place.tree], place.repository).decode()
    except (DataError, UnicodeDecodeError):  # what stands in the way of a listing as well is said there
        return None
    fields = iter(output.split("\0")[:-1])
    changes = []
    for about, path in zip(fields, fields, strict=True):
        old_mode, mode, _, id, _ = about.removeprefix(":").split()
        changes.append(_Change(path, old_mode, mode, id))
    return changes


def _applied(place: GitFiles, files: pa.Table, gone: list[str], added: dict[str, str]) -> Listing | None:
    """The files without those that are gone and with those that were added (id by name, in order)."""
    names, contents, sizes = (whole(files[name]) for name in ("file", "content", "bytes"))
    at_gone, at_added = (positions(strings(list(some)), names) for some in (gone, added))
    kept_F = np.ones(len(names), dtype=bool)
    kept_F[at_gone] = False
    if (at_gone < 0).any() or kept_F[at_added[at_added >= 0]].any():
        return None  # the dataset was made of other files
    added_sizes = object_sizes(place.repository, added.values())
    if added_sizes is None:
        return None
    # Each goes in front of the first kept file that follows it.
    kept_before = np.cumsum(kept_F)
    kept_names = Strings(names.filter(flags(kept_F)))
    before = [
        int(kept_before[at]) if at >= 0 else bisect_left(kept_names, name)
        for name, at in zip(added, at_added.tolist(), strict=True)
    ]
    kept = len(kept_names)
    order = whole_numbers(np.insert(np.arange(kept), before, np.arange(kept, kept + len(added))), pa.int64())

    def column(old: pa.Array, new: pa.Array) -> pa.Array:
        return pa.concat_arrays([old.filter(flags(kept_F)), new]).take(order)

    ids = Strings(column(contents, strings([CONTENT + id for id in added.values()])), len(CONTENT))
    return Listing(
        Strings(column(names, strings(list(added)))),
        ids,
        np.from_dlpack(column(sizes, whole_numbers(np.array(added_sizes), pa.uint64()))).tolist(),
        ids,
    )
