"""Check a dataset from end to end, and say what it holds.

In: a prepared or merged dataset. Out: a `Report`: issues (each names a file), and statistics of every source and split.

Checked are the manifest's own checksum, the size and xxh3-128 of every file, whether documents, tokens and manifest
agree, and whether a sample of documents, decoded and tokenized again, gives the same tokens. A merged dataset is
checked source by source; a source that was prepared again after the merge is an issue.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from blues.data import store as st
from blues.data.manifest import MANIFEST, MIXTURE
from blues.data.merge import Dataset, open_dataset, sources_of
from blues.errors import ConfigError, DataError
from blues.table import align

SAMPLE_SEED = 0
REMEDY = "restore the files, or prepare the dataset again with --overwrite (and then merge again)"


@dataclass(frozen=True)
class Statistics:
    """One split of one source. Lengths are tokens of a document, its `<|endoftext|>` included; `used_ids` are the
    distinct token ids that occur, of `vocabulary` ids; weight is the source's share of the training samples."""

    source: str
    split: str
    weight: float
    documents: int
    tokens: int
    text_bytes: int
    mean_length: float
    median_length: float
    longest: int
    used_ids: int
    vocabulary: int
    duplicates: int
    """Documents whose tokens equal those of an earlier document of the same dataset, merged or not."""


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    path: Path
    issues: tuple[st.Issue, ...]
    statistics: tuple[Statistics, ...]
    rejected: int
    retokenized: int
    """Documents that were decoded and tokenized again."""

    @property
    def good(self) -> bool:
        """Nothing is wrong."""
        return not self.issues

    def json(self) -> str:
        """All of it."""
        tree = asdict(self) | {"path": str(self.path), "good": self.good}
        return json.dumps(tree if self.good else tree | {"remedy": REMEDY}, indent=2)

    def table(self) -> str:
        """For a person."""
        lines = [f"dataset {self.path}"]
        if self.statistics:
            lines += ["", *align([_HEADER, *(_row(line) for line in self.statistics)]), ""]
            tokens, documents = (sum(getattr(s, name) for s in self.statistics) for name in ("tokens", "documents"))
            lines.append(f"{documents:,} documents, {tokens:,} tokens; {self.rejected:,} rejected rows in quarantine")
            copies = sum(line.duplicates for line in self.statistics)
            if copies:
                lines.append(f"{copies:,} documents are exact copies of another one")
        if self.good:
            lines.append(f"good: all checksums hold, {self.retokenized:,} documents tokenize to what is stored")
        else:
            lines.append(f"{len(self.issues):,} issue{'s' if len(self.issues) != 1 else ''}:")
            lines += [f"  {issue}" for issue in self.issues]
            lines.append(REMEDY)
        return "\n".join(lines)


_HEADER = (
    *("source", "split", "weight", "documents", "tokens", "MB of text"),
    *("mean", "median", "longest", "ids used", "copies"),
)


def _row(line: Statistics) -> tuple[str, ...]:
    coverage = f"{100 * line.used_ids / line.vocabulary:.1f}%"
    return (
        *(line.source, line.split, f"{line.weight:.3f}", f"{line.documents:,}", f"{line.tokens:,}"),
        *(f"{line.text_bytes / 1e6:.2f}", f"{line.mean_length:,.0f}", f"{line.median_length:,.0f}"),
        *(f"{line.longest:,}", coverage),
        f"{line.duplicates:,}",
    )


def verify(path: str | Path, *, sample: int = 200) -> Report:
    """Read all of a dataset and check it.

    Args:
        sample: documents of each source, spread over it, that are tokenized again.

    Raises:
        DataError: there is no dataset at `path` at all. (A damaged one is a report with issues.)
    """
    if sample < 0:
        raise ConfigError(f"sample (--sample) must be 0 or a number of documents, got {sample}")
    path = Path(path)
    if not (path / MANIFEST).exists() and not (path / MIXTURE).exists():
        open_dataset(path)  # raises: it is none
    issues: list[st.Issue] = []
    statistics: list[Statistics] = []
    seen: set[int] = set()
    retokenized = rejected = 0
    try:
        _, sources = sources_of(path, check_sizes=False)
    except DataError as error:
        return Report(path, (st.Issue(str(path), str(error)),), (), rejected=0, retokenized=0)
    for name, weight, open_source in sources:
        try:
            store = open_source()
        except DataError as error:
            issues.append(st.Issue(name, str(error)))
            continue
        found = store.check()
        issues += [_placed(issue, store) for issue in found]
        rejected += sum(store.manifest["rejected"].values())
        if found:  # statistics of damaged files would mislead
            continue
        different, count = _tokenize_again(store, sample)
        issues += [_placed(issue, store) for issue in different]
        retokenized += count
        statistics += [_statistics(name, store, split, float(weight), seen) for split in st.SPLITS]
    return Report(path, tuple(issues), tuple(statistics), rejected=rejected, retokenized=retokenized)


def mixture_table(dataset: Dataset) -> str:
    """The sources of a dataset with their shares, from the manifests alone."""
    rows: list[tuple[str, ...]] = [("source", "weight", "train documents", "train tokens", "validation tokens")]
    for name, store, weight in zip(dataset.names, dataset.stores, dataset.weights, strict=True):
        counts = (store.num_documents("train"), store.num_tokens("train"), store.num_tokens("validation"))
        rows.append((name, f"{float(weight):.3f}", *(f"{count:,}" for count in counts)))
    return "\n".join([f"dataset {dataset.path} ({dataset.strategy})", "", *align(rows)])


def _placed(issue: st.Issue, store: st.Store) -> st.Issue:
    return st.Issue(str(store.path / issue.where), issue.what)


def _tokenize_again(store: st.Store, sample: int) -> tuple[list[st.Issue], int]:
    """Decode and encode some documents; returns what differs and how many were tried."""
    tokenizer = store.tokenizer.build()
    generator = np.random.default_rng(SAMPLE_SEED)
    sizes = [store.num_documents(split) for split in st.SPLITS]
    chosen = np.sort(generator.choice(sum(sizes), size=min(sample, sum(sizes)), replace=False)).tolist()
    issues = []
    for number in chosen:
        split, place = ("train", number) if number < sizes[0] else ("validation", number - sizes[0])
        document = store.document(split, place)
        where = store.chunks[split][store.locate(split, place)[0]].data.file
        text = tokenizer.decode_bytes(document.tokens[:-1].tolist())
        if len(text) != document.text_bytes:
            what = f"document {document.id!r} has {len(text)} bytes where its index says {document.text_bytes}"
            issues.append(st.Issue(where, what))
        if not np.array_equal(tokenizer.encode_array(text.decode("utf-8", "replace")), document.tokens[:-1]):
            issues.append(st.Issue(where, f"document {document.id!r} tokenizes to other tokens than are stored"))
    return issues, len(chosen)


def _statistics(name: str, store: st.Store, split: str, weight: float, seen: set[int]) -> Statistics:
    n_vocab = store.manifest["tokenizer"]["n_vocab"]
    used_V = np.zeros(n_vocab, dtype=bool)
    lengths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    duplicates = 0
    for chunk, _, _, first, count in store.segments[split].tolist():
        used_V[store.chunk(split, chunk)[first : first + count]] = True
    for table in store.tables(split, ["length", "digest"]):
        lengths.append(table["length"].to_numpy())
        for digest in table["digest"].to_pylist():
            duplicates += digest in seen
            seen.add(digest)
    length = np.concatenate(lengths)
    return Statistics(
        source=name,
        split=split,
        weight=weight,
        documents=len(length),
        tokens=int(length.sum()),
        text_bytes=store.text_bytes(split),
        mean_length=float(length.mean()) if len(length) else 0.0,
        median_length=float(np.median(length)) if len(length) else 0.0,
        longest=int(length.max(initial=0)),
        used_ids=int(used_V.sum()),
        vocabulary=n_vocab,
        duplicates=duplicates,
    )
