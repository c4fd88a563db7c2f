"""Check datasets from end to end, and say what they hold.

In: prepared or merged datasets. Out: a `Report`: errors and warnings (each names a file), statistics of every split of
every source, and which documents are there more than once.

Checked are all versions of a dataset: the sha256 of every manifest, the size and xxh3-128 of every file, whether
documents, tokens, segments and manifests agree, and whether a sample of documents, decoded and tokenized again, gives
the same tokens. A merged dataset is checked source by source, in the versions that were merged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from blues.data.merging.merge import open_dataset, plain_path, read_mixture
from blues.data.reports.report import Report, Source, Version
from blues.data.reports.statistics import Overlap, Statistics, describe, overlap
from blues.data.storage.checking import (
    REWRITTEN,
    Examination,
    check_dataset,
    documents_of,
    outside_links,
    unknown_files,
)
from blues.data.storage.chunks import TOKEN_TYPE
from blues.data.storage.manifest import MANIFEST, MIXTURE, encode_json
from blues.data.storage.store import SPLITS, Issue, Store, StoredDocument, split_version
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError, DataError

SAMPLE_SEED = 0
SAMPLE_TOKENS = 1 << 24
"""Tokens that are tokenized again at most, some 5 seconds' worth: a sample may hold a document of 100 MB."""


@dataclass(frozen=True)
class Progress:
    """How far it is within one source: bytes read, of all."""

    source: str
    bytes_done: int
    bytes: int


@dataclass
class _Part:
    """A source that is to be checked. checksum, number: of the version; None for the newest. said: by mixture.json."""

    dataset: Path
    name: str
    folder: Path
    weight: Fraction
    checksum: str | None = None
    number: int | None = None
    said: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Findings:
    """What comes together while sources are checked; digests: of each split of each source that is whole."""

    issues: list[Issue] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    digests: list[np.ndarray] = field(default_factory=list)
    retokenized: int = 0


def verify(
    *paths: str | Path,
    sample: int = 200,
    num_workers: int | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Report:
    """Read all of one or more datasets and check them.

    Args:
        paths: prepared or merged datasets; `DIR@2` describes version 2 (all are checked).
        sample: documents of each source, spread over it, that are tokenized again.
        num_workers: threads that read; None for as many as there are cores.
        report: told several times a second how far it is.

    Raises:
        DataError: there is no dataset at a path at all. (A damaged one is a report with issues.)
        ConfigError: a sample or number of workers that is none, or a dataset that would be checked twice.
    """
    if sample < 0:
        raise ConfigError(f"sample (--sample) must be 0 or a number of documents, got {sample}")
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"number of workers (--num-workers) must be at least 1, got {num_workers}")
    workers = num_workers or os.cpu_count() or 1
    found = _Findings()
    parts = [part for path in paths for part in _parts(Path(path), found.issues)]
    _tell_apart(parts)
    for part in parts:
        _check_part(part, found, sample, workers, report)
    statistics, shared = found.statistics, None
    if statistics:
        shared = overlap([(line.source, line.split) for line in statistics], found.digests)
        copies = zip(statistics, shared.duplicates, strict=True)
        statistics = [replace(line, duplicates=count) for line, count in copies]
        found.issues += _leaks(found.sources, statistics, shared)
    return Report(
        paths=tuple(Path(path) for path in paths),
        issues=tuple(issue for issue in found.issues if issue.kind == "error"),
        warnings=tuple(issue for issue in found.issues if issue.kind == "warning"),
        sources=tuple(found.sources),
        statistics=tuple(statistics),
        overlap=shared,
        retokenized=found.retokenized,
    )


def _parts(path: Path, issues: list[Issue]) -> list[_Part]:
    """The sources of a dataset: itself, if it is not merged."""
    folder, number = split_version(path)
    if not (folder / MIXTURE).exists():
        if not (folder / MANIFEST).exists() and not (folder / "versions").is_dir():
            open_dataset(path)  # raises: it is none
        name = folder.absolute().name + ("" if number is None else f"@{number}")
        return [_Part(path, name, folder, Fraction(1), number=number)]
    try:
        tree = read_mixture(path)
    except DataError as error:
        issues.append(Issue(str(path / MIXTURE), str(error)))
        return []
    if (path / MIXTURE).read_bytes() != encode_json(tree, indent=1):
        issues.append(Issue(str(path / MIXTURE), REWRITTEN))
    return [
        _Part(
            path, said["name"], plain_path(path / said["path"]), Fraction(said["weight"]), said["checksum"], said=said
        )
        for said in tree["sources"]
    ]


def _tell_apart(parts: Sequence[_Part]) -> None:
    """Give every source a name of its own, and refuse one that would be counted twice."""
    seen: dict[tuple[Path, Any], _Part] = {}
    for part in parts:
        key = (part.folder.resolve(), part.checksum if part.said else part.number)
        if key in seen:
            both = sorted({str(part.dataset), str(seen[key].dataset)})
            raise ConfigError(f"{str(part.folder)!r} would be checked twice (by {' and '.join(both)}); name it once")
        seen[key] = part
    names = [part.name for part in parts]
    for part in parts:
        if names.count(part.name) > 1:
            part.name = f"{part.dataset.name}/{part.name}" if part.said else str(part.dataset)


def _check_part(
    part: _Part, found: _Findings, sample: int, workers: int, report: Callable[[Progress], None] | None
) -> None:
    if not part.folder.is_dir():
        what = f"source {part.name!r} of {str(part.dataset)!r} is not there; put it back or merge again"
        found.issues.append(Issue(str(part.folder), what))
        return
    told = None if report is None else lambda done, total: report(Progress(part.name, done, total))
    history, examination = check_dataset(
        part.folder, checksum=part.checksum, number=part.number, num_workers=workers, report=told
    )
    issues, store = list(examination.issues), examination.described
    if store is None and not issues:
        found.issues.append(_why_not_there(part, history.versions))
    if not any(issue.where.endswith(MANIFEST) for issue in issues):
        issues += _leftovers(part.folder, history.versions)
    issues += _outside(part.folder, history.versions)
    retokenized = 0
    if store is not None and not any(issue.kind == "error" for issue in issues):
        again, retokenized = _tokenize_again(store, sample, examination)
        issues += again
    found.issues += [Issue(str(part.folder / issue.where), issue.what, issue.kind) for issue in issues]
    if examination.ordered:  # else it is not known what the version holds
        found.issues += _wrong_mixture(part, store)
    if store is None or any(issue.kind == "error" for issue in issues):
        return  # statistics of damaged files would mislead
    found.retokenized += retokenized
    found.sources.append(_source(part, store, history.versions))
    for split in SPLITS:
        documents = documents_of(store, split, examination.contents)
        counts_V, tokenizer = examination.counts_V[split], store.tokenizer.build()
        found.statistics.append(describe(part.name, split, float(part.weight), documents, counts_V, tokenizer))
        found.digests.append(documents.digests)


def _why_not_there(part: _Part, versions: Sequence[Store]) -> Issue:
    """A whole dataset without the version that was asked for."""
    if part.checksum is None:
        numbers = ", ".join(str(store.version) for store in versions)
        return Issue(str(part.folder / MANIFEST), f"there is no version {part.number}; there are {numbers}")
    what = f"source {part.name!r} was prepared again after the merge ({str(part.folder)!r}); merge again"
    return Issue(str(part.dataset / MIXTURE), what)


def _leftovers(folder: Path, versions: Sequence[Store]) -> list[Issue]:
    unknown = unknown_files(folder, versions)
    if not unknown:
        return []
    more = f" (and {len(unknown) - 1:,} more)" if len(unknown) > 1 else ""
    return [Issue(unknown[0], f"belongs to no version of the dataset{more}; nothing reads it", "warning")]


def _outside(folder: Path, versions: Sequence[Store]) -> list[Issue]:
    links = outside_links(folder, versions)
    if not links:
        return []
    more = f" (and {len(links) - 1:,} more)" if len(links) > 1 else ""
    what = f"is a link out of the dataset{more}: a copy of the folder lacks what it leads to, and others may change it"
    return [Issue(links[0], what, "warning")]


def _wrong_mixture(part: _Part, store: Store | None) -> list[Issue]:
    """What mixture.json says of a source and is not so."""
    if store is None or not part.said:
        return []
    facts = {
        "fingerprint": store.fingerprint,
        "train_tokens": store.num_tokens("train"),
        "version": store.version,
    }
    where = str(part.dataset / MIXTURE)
    return [
        Issue(where, f"it says that {key} of source {part.name!r} is {part.said[key]!r}, and it is {value!r}")
        for key, value in facts.items()
        if key in part.said and part.said[key] != value
    ]


def _source(part: _Part, store: Store, versions: Sequence[Store]) -> Source:
    numbers = {other.checksum: other.version for other in versions}
    return Source(
        name=part.name,
        dataset=part.dataset,
        path=part.folder,
        weight=float(part.weight),
        version=store.version,
        versions=tuple(
            Version(
                number=other.version,
                parent=numbers.get(other.manifest["parent"]),
                operation=other.manifest["operation"],
                documents=sum(other.num_documents(split) for split in SPLITS),
                tokens=sum(other.num_tokens(split) for split in SPLITS),
                chunks=sum(len(other.chunks[split]) for split in SPLITS),
            )
            for other in versions
        ),
        origins=tuple(store.manifest["sources"]),
        rejected=store.manifest["rejected"],
        tokenizer=store.manifest["tokenizer"],
    )


def _leaks(sources: Sequence[Source], statistics: Sequence[Statistics], shared: Overlap) -> list[Issue]:
    """Training documents that a model is validated on as well."""
    issues, paths = [], {source.name: source.path for source in sources}
    for (name, _), row, leaked, line in zip(shared.names, shared.shared, shared.leaked, statistics, strict=True):
        if not leaked:
            continue
        held = [of for (of, split), count in zip(shared.names, row, strict=True) if split == "validation" and count]
        what = (
            f"copies of validation documents (of {', '.join(held)}) are trained on: {leaked:,} of its "
            f"{line.documents:,} training documents ({leaked / line.documents:.2%}); `blues dedup` removes them"
        )
        issues.append(Issue(str(paths[name]), what, "warning"))
    return issues


def _tokenize_again(store: Store, sample: int, examination: Examination) -> tuple[list[Issue], int]:
    """Decode and encode some documents; returns what differs and how many were tried."""
    tokenizer = store.tokenizer.build()
    generator = np.random.default_rng(SAMPLE_SEED)
    sizes = [store.num_documents(split) for split in SPLITS]
    chosen = np.sort(generator.choice(sum(sizes), size=min(sample, sum(sizes)), replace=False)).tolist()
    issues: list[Issue] = []
    done = tokens = 0
    for number in chosen:
        split, place = ("train", number) if number < sizes[0] else ("validation", number - sizes[0])
        chunk, row = store.locate(split, place)
        record = store.chunks[split][chunk]
        try:
            document = store.document(split, place)
        except DataError as error:
            issues.append(Issue(record.index.file, str(error)))
            continue
        digest = int(examination.contents[record].digests[row])
        issues += [
            Issue(record.data.file, f"document {document.id!r} {what}")
            for what in _differences(document, digest, tokenizer)
        ]
        done, tokens = done + 1, tokens + len(document.tokens)
        if tokens > SAMPLE_TOKENS:
            break
    return issues, done


def _differences(document: StoredDocument, digest: int, tokenizer: Tokenizer) -> Iterator[str]:
    """What a stored document says of itself and is not so."""
    text = tokenizer.decode_bytes(document.tokens[:-1].tolist())
    if xxhash.xxh3_64_intdigest(np.ascontiguousarray(document.tokens, dtype=TOKEN_TYPE).data) != digest:
        yield "has another digest than its index says"
    if len(text) != document.text_bytes:
        yield f"has {len(text)} bytes where its index says {document.text_bytes}"
    if not np.array_equal(tokenizer.encode_array(text.decode("utf-8", "replace")), document.tokens[:-1]):
        yield "tokenizes to other tokens than are stored"
