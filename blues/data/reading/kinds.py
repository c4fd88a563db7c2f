"""What a file holds, by its name.

In: the name of a file. Out: its kind (a table, text or source code) and, of text and code, its language. Both follow
from the suffix alone, so that whoever looks at a great many files needs to ask only once for each suffix.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blues.data.reading.streams import COMPRESSIONS
from blues.data.storage.arrays import whole_numbers

TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
TEXTS = {".txt": None, ".md": "markdown", ".rst": "restructuredtext", ".tex": "tex"}
LANGUAGES = {
    **{".py": "python", ".pyi": "python", ".go": "go", ".rs": "rust", ".java": "java", ".kt": "kotlin"},
    **{".js": "javascript", ".jsx": "javascript", ".mjs": "javascript", ".ts": "typescript", ".tsx": "typescript"},
    **{".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".cs": "csharp"},
    **{".rb": "ruby", ".php": "php", ".swift": "swift", ".scala": "scala", ".lua": "lua", ".pl": "perl", ".r": "r"},
    **{".jl": "julia", ".hs": "haskell", ".ml": "ocaml", ".sh": "bash", ".bash": "bash", ".sql": "sql", ".zig": "zig"},
    **{".html": "html", ".css": "css", ".json": "json", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"},
}
KIND_OF = {**dict.fromkeys(LANGUAGES, "source"), **dict.fromkeys(TEXTS, "text"), **TABLES}
KINDS = ("csv", "jsonl", "parquet", "text", "source")
TABLE_KINDS = frozenset(TABLES.values())


def suffix_of(name: str) -> str:
    """`.py` of `pkg/a.py`, `.jsonl.gz` of `a.jsonl.gz`, as it is written; empty without one."""
    stem, _, suffix = name.rpartition(".")
    if not suffix or not stem or stem[-1] == "/" or "/" in suffix:
        return ""
    suffix = f".{suffix}"
    return suffix_of(stem) + suffix if suffix.lower() in COMPRESSIONS else suffix


def suffixes_of(names: pa.Array) -> tuple[list[str], np.ndarray]:
    """`suffix_of` of all names, none of them hidden: the different ones, and the number of each name's: int32[names].

    Python looks at one name for each different ending, and at those of compressed files."""
    pieces = pc.split_pattern(names, ".", max_splits=1, reverse=True)
    ends = np.from_dlpack(pieces.offsets)
    endings = pieces.flatten().take(whole_numbers(ends[1:] - 1, pa.int32())).dictionary_encode()
    ending_F = np.from_dlpack(endings.indices)
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(suffix_of(name), len(numbers))

    dotted_F = np.diff(ends) > 1
    number_F = np.full(len(names), number("") if not dotted_F.all() else -1, np.int32)
    example_E = np.full(len(endings.dictionary), -1)
    dotted = np.flatnonzero(dotted_F)
    example_E[ending_F[dotted]] = dotted
    number_E = np.full(len(example_E), -1, np.int32)
    for at, ending in enumerate(endings.dictionary.to_pylist()):
        if example_E[at] < 0:
            continue
        if f".{ending.lower()}" not in COMPRESSIONS:
            number_E[at] = number(names[int(example_E[at])].as_py())
            continue
        for file in dotted[ending_F[dotted] == at].tolist():
            number_F[file] = number(names[file].as_py())
    found = number_E[ending_F[dotted]]
    number_F[dotted] = np.where(found < 0, number_F[dotted], found)
    return list(numbers), number_F


def guess_kind(suffix: str) -> str | None:
    """The kind of the files with a `suffix_of`: a member of KINDS, or None if that does not say."""
    inner, packed = _parts(suffix)
    kind = KIND_OF.get(inner)
    return None if packed and kind in ("parquet", "source") else kind


def language_of(suffix: str) -> str | None:
    """The language of text or source code, None for plain text."""
    inner, _ = _parts(suffix)
    return LANGUAGES.get(inner, TEXTS.get(inner))


def _parts(suffix: str) -> tuple[str, bool]:
    """The suffix of what is in the file, in small letters, and whether it is compressed."""
    _, dot, last = suffix.lower().rpartition(".")
    compressed = dot + last in COMPRESSIONS
    return (suffix.lower().removesuffix(dot + last) if compressed else suffix.lower()), compressed
