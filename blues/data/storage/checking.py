"""Whether the versions of a dataset are whole: every byte, and everything that has to agree with something else.

In: a dataset directory. Out: issues, each with the file it is about, and what the chunks hold (`Examination`), from
which statistics follow without another read.

Every file is read once, however many versions share it. What an index says of its documents stays in memory, 24 bytes
for each; all the rest is arithmetic on that: segments, counts, and the fingerprint of each version.
"""

from __future__ import annotations

import os
import queue
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blues.data.storage.chunks import CHUNKS, ChunkRecord, FileRecord, file_checksum
from blues.data.storage.manifest import (
    FORMAT,
    MANIFEST,
    encode_json,
    parse_json,
    partial_directory,
    read_checked_json,
    require,
)
from blues.data.storage.scanning import CHANGED, Contents, Scan, Scanner, reason_of, wrong_size
from blues.data.storage.store import (
    MANIFEST_SHAPE,
    SPLITS,
    VERSION,
    VERSIONS,
    Issue,
    Store,
    content_fingerprint,
    version_folder,
)
from blues.errors import DataError

REWRITTEN = "it says what it said, but its bytes are not those that were written"
REPORT_S = 0.2
_CHUNK_NAME = re.compile(rf"(?:{'|'.join(SPLITS)})-(\d{{5,9}})-\d+\.")
Report = Callable[[int, int], None]
"""Told how many bytes of how many were read."""


@dataclass
class Examination:
    """What was found in some versions of a dataset.

    contents: by chunk, of those whose index can be used. described: the version that was asked for, None where it
    cannot be read; ordered: whether its segments can; counts_V: by split, how often each of the V ids occurs in it.
    """

    issues: list[Issue]
    described: Store | None = None
    ordered: bool = True
    contents: dict[ChunkRecord, Contents] = field(default_factory=dict)
    counts_V: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """The versions of a dataset, oldest first. `unordered`: numbers of those whose segments cannot be read, which are
    opened as if they used whole chunks. `newest`: checksum of the newest one, None if its manifest is damaged."""

    versions: tuple[Store, ...]
    unordered: frozenset[int]
    newest: str | None
    issues: tuple[Issue, ...]

    def find(self, checksum: str | None = None, number: int | None = None) -> Store | None:
        """The version with this checksum or number; the newest without either."""
        if number is not None:
            return next((store for store in self.versions if store.version == number), None)
        wanted = self.newest if checksum is None else checksum
        return next((store for store in self.versions if store.checksum == wanted), None)


@dataclass(frozen=True)
class Documents:
    """The documents of a split in order: lengths int64[D] in tokens, text_bytes int64[D], digests uint64[D]."""

    lengths: np.ndarray
    text_bytes: np.ndarray
    digests: np.ndarray


def check_stores(
    stores: Sequence[Store],
    *,
    counted: Store | None = None,
    unordered: Collection[int] = (),
    num_workers: int = 1,
    report: Report | None = None,
) -> Examination:
    """Check versions of one dataset: sizes, checksums, and whether tokens, indexes, segments and manifests agree.

    Args:
        counted: the version whose tokens are counted by id.
        unordered: numbers of versions whose segments are not known.
        num_workers: threads that read chunks.
    """
    found = _scan(stores, counted, num_workers, report)
    found.ordered = counted is None or counted.version not in unordered
    damaged = {issue.where for issue in found.issues}
    for record in dict.fromkeys(record for store in stores for record in _small_files(store)):
        found.issues += check_file(stores[0].path, record)
    damaged |= {issue.where for issue in found.issues}
    for store in stores:
        name = manifest_name(store.version)
        chunks = [chunk for split in SPLITS for chunk in store.chunks[split]]
        contradicted = [what for chunk in chunks for what in _wrong_record(chunk, found.contents.get(chunk))]
        contradicted += _wrong_tokenizer(store)
        if not contradicted and not any({c.data.file, c.index.file} & damaged for c in chunks):
            if store.version not in unordered:
                contradicted += _wrong_content(store, found.contents)
            contradicted += _wrong_sums(store)
            if store.manifest["quarantine"]["file"] not in damaged:
                contradicted += _wrong_quarantine(store)
        found.issues += [Issue(name, what) for what in contradicted]
    return found


def check_dataset(
    path: Path,
    *,
    checksum: str | None = None,
    number: int | None = None,
    num_workers: int = 1,
    report: Report | None = None,
) -> tuple[History, Examination]:
    """Check everything at `path`: the manifests of all versions, and whatever they speak of.

    Args:
        checksum, number: of the version whose tokens are counted by id; the newest without either.
        num_workers: threads that read chunks.
        report: told several times a second how far it is.
    """
    history = read_history(path)
    if not history.versions:
        return history, Examination(list(history.issues))
    found = check_stores(
        history.versions,
        counted=history.find(checksum, number),
        unordered=history.unordered,
        num_workers=num_workers,
        report=report,
    )
    found.issues[:0] = history.issues
    return history, found


def read_history(path: Path) -> History:
    """Every version of the dataset at `path` whose manifest can be read, and what is wrong with the manifests."""
    issues: list[Issue] = []
    top = _read_manifest(path, MANIFEST, issues)
    trees = {number: _read_manifest(path, manifest_name(number), issues, number) for number in _numbers(path, top)}
    issues += [*_wrong_parents(trees), *_lost_versions(path, max(trees, default=0))]
    if top is not None:
        issues += _wrong_copies(path, top, trees)
        if trees.get(top["version"]) is None:
            trees[top["version"]] = top
    versions, unordered = [], set()
    for number, tree in sorted(trees.items()):
        if tree is None:
            continue
        if tree["segments"] is not None and (damage := check_file(path, FileRecord(**tree["segments"]))):
            issues += damage
            unordered.add(number)
            tree = tree | {"segments": None}
        try:
            versions.append(Store.of(path, tree))
        except DataError as error:
            issues.append(Issue(manifest_name(number), str(error)))
    return History(tuple(versions), frozenset(unordered), None if top is None else top["checksum"], tuple(issues))


def _numbers(path: Path, top: Mapping[str, Any] | None) -> list[int]:
    """The versions that there are or have to be."""
    there = {int(entry.name) for entry in (path / VERSIONS).glob("*") if entry.name.isdecimal()}
    last = max(there, default=1) if top is None else max([top["version"], *there])
    expected = range(1, last + 1) if last <= 2 * len(there) + 100 else ()  # a made-up number is no number of folders
    return sorted({*there, *expected})


def unknown_files(path: Path, versions: Sequence[Store]) -> list[str]:
    """Files of the folder that belong to no version of the dataset, sorted."""
    known = {MANIFEST} | {manifest_name(store.version) for store in versions}
    known |= {record.file for store in versions for record in store.files()}
    present = (entry.relative_to(path).as_posix() for entry in path.rglob("*") if not entry.is_dir())
    return sorted(name for name in present if name not in known)


def outside_links(path: Path, versions: Sequence[Store]) -> list[str]:
    """Files of these versions that links lead out of the folder of the dataset, sorted."""
    root = os.path.join(os.path.realpath(path), "")
    known = {MANIFEST} | {manifest_name(store.version) for store in versions}
    known |= {record.file for store in versions for record in store.files()}
    return sorted(name for name in known if not os.path.realpath(path / name).startswith(root))


def manifest_name(version: int) -> str:
    """The manifest of a version, relative to the dataset."""
    return f"{version_folder(version)}/{MANIFEST}"


def check_file(path: Path, record: FileRecord) -> list[Issue]:
    """Whether a file is what was written."""
    wrong = wrong_size(path, record)
    if wrong:
        return wrong
    try:
        same = file_checksum(path / record.file) == record.xxh3
    except OSError as error:
        return [Issue(record.file, f"cannot be read ({reason_of(error)})")]
    return [] if same else [Issue(record.file, CHANGED)]


def documents_of(store: Store, split: str, contents: Mapping[ChunkRecord, Contents]) -> Documents:
    """The documents of a split as its segments order them."""
    lengths, text_bytes, digests = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for number, first, documents, start, _ in store.segments[split].tolist():
        chunk = contents[store.chunks[split][number]]
        rows = slice(first, first + documents)
        lengths.append(np.diff(chunk.ends[rows], prepend=start))
        text_bytes.append(chunk.text_bytes[rows])
        digests.append(chunk.digests[rows])
    return Documents(np.concatenate(lengths), np.concatenate(text_bytes), np.concatenate(digests))


def _scan(stores: Sequence[Store], counted: Store | None, num_workers: int, report: Report | None) -> Examination:
    """Read all chunks of the stores, each once, in several threads."""
    chunks = list(dict.fromkeys(chunk for store in stores for split in SPLITS for chunk in store.chunks[split]))
    ranges = {} if counted is None else _counted_ranges(counted)
    tokenizer, nothing = (counted or stores[0]).tokenizer.build(), np.zeros((0, 2), dtype=np.int64)
    workers = max(1, min(num_workers, len(chunks)))
    scanners = [Scanner(stores[0].path, tokenizer.n_vocab, tokenizer.eot_id) for _ in range(workers)]
    total = sum(chunk.data.bytes + chunk.index.bytes for chunk in chunks)

    def scan(scanner: Scanner, chunk: ChunkRecord) -> Scan:
        return scanner.scan(chunk, ranges.get(chunk, nothing))

    def tell() -> None:
        if report is not None:
            report(sum(scanner.bytes for scanner in scanners), total)

    found = Examination([], counted)
    for chunk, result in zip(chunks, _spread(scan, scanners, chunks, tell), strict=True):
        found.issues += result.issues
        if result.contents is not None:
            found.contents[chunk] = result.contents
    for split in SPLITS:
        of_split = [scanner.counts_V[split] for scanner in scanners if split in scanner.counts_V]
        found.counts_V[split] = sum(of_split, np.zeros(tokenizer.n_vocab, dtype=np.int64))
    found.issues = list(dict.fromkeys(found.issues))  # a chunk that two versions describe differently is read twice
    return found


def _spread(
    work: Callable[[Scanner, ChunkRecord], Scan],
    scanners: Sequence[Scanner],
    chunks: Sequence[ChunkRecord],
    tell: Callable[[], None],
) -> list[Scan]:
    """`work` for every chunk, in a thread for each scanner. `tell` is called all the while."""
    if len(scanners) == 1:
        results = []
        for chunk in chunks:
            results.append(work(scanners[0], chunk))
            tell()
        return results
    free: queue.SimpleQueue[Scanner] = queue.SimpleQueue()
    for scanner in scanners:
        free.put(scanner)

    def with_one(chunk: ChunkRecord) -> Scan:
        scanner = free.get()
        try:
            return work(scanner, chunk)
        finally:
            free.put(scanner)

    with ThreadPoolExecutor(len(scanners)) as pool:
        futures = [pool.submit(with_one, chunk) for chunk in chunks]
        try:
            while wait(futures, timeout=REPORT_S).not_done:
                tell()
        except BaseException:  # such as Ctrl-C: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    tell()
    return [future.result() for future in futures]


def _counted_ranges(store: Store) -> dict[ChunkRecord, np.ndarray]:
    """By chunk the stretches of its tokens that a version uses, in order: int64[ranges, 2]."""
    ranges = {}
    for split in SPLITS:
        segments = np.sort(store.segments[split], order=["chunk", "first_token"])
        bounds = np.stack([segments["first_token"], segments["first_token"] + segments["tokens"]], axis=1)
        for number in np.unique(segments["chunk"]).tolist():
            first, last = np.searchsorted(segments["chunk"], [number, number + 1]).tolist()
            ranges[store.chunks[split][number]] = bounds[first:last]
    return ranges


def _small_files(store: Store) -> Iterator[FileRecord]:
    """The files of a version beside its chunks."""
    chunks = {record for split in SPLITS for chunk in store.chunks[split] for record in (chunk.data, chunk.index)}
    return (record for record in store.files() if record not in chunks)


def _read_manifest(path: Path, name: str, issues: list[Issue], number: int | None = None) -> dict[str, Any] | None:
    """A manifest, or None and an issue."""
    try:
        tree = read_checked_json(path, name, FORMAT, VERSION)
        if (path / name).read_bytes() != encode_json(tree, indent=1):
            issues.append(Issue(name, REWRITTEN))
        require(tree, MANIFEST_SHAPE)
    except DataError as error:
        issues.append(Issue(name, str(error)))
        return None
    except ValueError as error:
        issues.append(Issue(name, f"it lacks or cannot use {error}"))
        return None
    except OSError as error:
        issues.append(Issue(name, f"cannot be read ({reason_of(error)})"))
        return None
    if number is not None and tree["version"] != number:
        issues.append(Issue(name, f"it is the manifest of version {tree['version']}"))
        return None
    return tree


def _wrong_parents(trees: Mapping[int, Mapping[str, Any] | None]) -> Iterator[Issue]:
    """Whether each version was made from the one before it."""
    for number, tree in trees.items():
        before = trees.get(number - 1)
        if tree is None or (number > 1 and before is None):
            continue
        if before is None:
            if tree["parent"] is not None:
                yield Issue(manifest_name(number), "it says it was made from another version, and it is the first")
        elif tree["parent"] != before["checksum"]:
            yield Issue(manifest_name(number), f"it was made from another version {number - 1} than there is")
            yield Issue(manifest_name(number - 1), f"it is not the version that version {number} was made from")


def _lost_versions(path: Path, newest: int) -> Iterator[Issue]:
    """Versions after the newest one that is known, of which chunks tell: those carry the number of theirs."""
    if _was_stopped(path):  # its chunks come before its version does
        return
    chunks: dict[int, str] = {}
    for name in sorted(entry.name for entry in (path / CHUNKS).glob("*")):
        found = _CHUNK_NAME.match(name)
        if found is not None and int(found[1]) > newest:
            chunks.setdefault(int(found[1]), name)
    for number, name in sorted(chunks.items()):
        what = (
            f"version {number} is gone: {CHUNKS}/{name} came with it; restore {version_folder(number)} and {MANIFEST}"
        )
        yield Issue(manifest_name(number), what)


def _was_stopped(path: Path) -> bool:
    """Whether a command that wrote at a dataset was stopped, or is at it still."""
    partial = partial_directory(path)
    return partial.exists() or partial.with_suffix(".lock").exists()


def _wrong_copies(path: Path, top: Mapping[str, Any], trees: Mapping[int, Mapping[str, Any] | None]) -> Iterator[Issue]:
    """Whether the manifest at the top is that of the newest version."""
    newest, own = max(trees), trees.get(top["version"])
    if not (path / version_folder(top["version"])).is_dir():
        yield Issue(MANIFEST, f"it is that of version {top['version']}, which is not there")
    if top["version"] < newest:
        stopped = _was_stopped(path)
        what = f"it is that of version {top['version']}, while {manifest_name(newest)} is there: " + (
            "the command that made it was stopped; run it again" if stopped else "an old copy took its place"
        )
        yield Issue(MANIFEST, what, "warning" if stopped else "error")
    if own is not None and own["checksum"] != top["checksum"]:
        yield Issue(MANIFEST, f"it is another one than {manifest_name(top['version'])}, of which it has to be a copy")
        yield Issue(manifest_name(top["version"]), f"it is another one than {MANIFEST}, which has to be a copy of it")


def _wrong_record(chunk: ChunkRecord, contents: Contents | None) -> Iterator[str]:
    """What does not fit between a manifest and an index that is as it was written."""
    if contents is None:
        return
    name, ends = chunk.index.file, contents.ends
    if len(ends) != chunk.documents:
        yield f"{name} lists {len(ends):,} documents where the manifest says {chunk.documents:,}"
    if (int(ends[-1]) if len(ends) else 0) != chunk.tokens:
        yield f"{name} ends at token {int(ends[-1]) if len(ends) else 0:,} where the manifest says {chunk.tokens:,}"
    if int(contents.text_bytes.sum()) != chunk.text_bytes:
        yield f"the text bytes of {name} do not add up to those of the manifest"


def _wrong_content(store: Store, contents: Mapping[ChunkRecord, Contents]) -> Iterator[str]:
    """What does not fit between a manifest, its segments and its (undamaged) chunks."""
    digests = {}
    for split in SPLITS:
        for number, first, documents, start, tokens in store.segments[split].tolist():
            ends = contents[store.chunks[split][number]].ends
            if (int(ends[first - 1]) if first else 0) != start or int(ends[first + documents - 1]) != start + tokens:
                yield f"a segment of {split} does not fit documents {first} to {first + documents} of chunk {number}"
                return
        documents = documents_of(store, split, contents)
        digests[split] = documents.digests
        held = {
            "documents": len(documents.lengths),
            "tokens": int(documents.lengths.sum()),
            "text_bytes": int(documents.text_bytes.sum()),
        }
        for name, count in held.items():
            said = store.manifest["splits"][split][name]
            if count != said:
                yield f"{split} holds {count:,} {name.replace('_', ' ')} where it says {said:,}"
    if content_fingerprint(store, digests) != store.fingerprint:
        yield "the fingerprint of the content is another one than it says"


def _wrong_sums(store: Store) -> Iterator[str]:
    """What does not add up within a manifest."""
    manifest = store.manifest
    documents, rejected = sum(manifest["splits"][split]["documents"] for split in SPLITS), manifest["rejected"]
    if manifest["documents"] != documents:
        yield f"it says {manifest['documents']:,} documents, and those of its splits are {documents:,}"
    if manifest["rows"] != documents + sum(rejected.values()):
        yield f"its {manifest['rows']:,} rows are not its {documents:,} documents and the rejected ones"


def _wrong_quarantine(store: Store) -> Iterator[str]:
    """What does not fit between a manifest and its (undamaged) list of rejected rows."""
    manifest = store.manifest
    try:
        listed = _count_rejected(store.quarantine())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        yield f"{manifest['quarantine']['file']} is no list of rejected rows ({reason_of(error)})"
        return
    if listed != manifest["rejected"]:
        yield f"{manifest['quarantine']['file']} lists other rejected rows than it says"


def _count_rejected(path: Path) -> dict[str, int]:
    counts: Counter[str] = Counter()
    with open(path, "rb") as file:
        for line in file:
            row = parse_json(line)
            counts[row["reason"]] += row.get("rows", 1)
    return dict(counts)


def _wrong_tokenizer(store: Store) -> Iterator[str]:
    said, tokenizer = store.manifest["tokenizer"], store.tokenizer.build()
    if said["fingerprint"] != tokenizer.fingerprint:
        yield "it was prepared with another release of the tokenizer; prepare it again"
    elif (said["n_vocab"], said["eot_id"]) != (tokenizer.n_vocab, tokenizer.eot_id):
        yield "its number of ids, or its id of <|endoftext|>, is not that of its tokenizer"
