"""The signed JSON files that make a folder a dataset: `manifest.json` of a store, `mixture.json` of a merged one.

In: a tree of plain values. Out: a file that carries the sha256 of its own content, and the reader that checks it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blues import config as cfg
from blues.errors import ConfigError, DataError

FORMAT = "blues-store"
MIXTURE_FORMAT = "blues-mixture"
MANIFEST = "manifest.json"
MIXTURE = "mixture.json"
NOT_REGULAR = "it is no regular file"


def write_checked_json(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Write `tree` with its sha256 under the key `checksum`, atomically; returns it with the checksum."""
    signed = {**tree, "checksum": _tree_checksum(tree)}
    cfg.write_atomic(path, encode_json(signed, indent=1))
    return signed


def read_checked_json(directory: Path, name: str, kind: str, version: int) -> dict[str, Any]:
    """Read what `write_checked_json` wrote, and check format, version and checksum.

    Raises:
        DataError: with the reason and the remedy.
    """
    path = directory / name
    try:
        content = read_regular(path)
    except OSError as error:
        raise DataError(_why_not_a_dataset(directory, name, error)) from None
    try:
        tree = parse_json(content)
        if not isinstance(tree, dict):
            raise ValueError("not a mapping")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{str(path)!r} is damaged ({error}); restore it or make the dataset again") from None
    if tree.get("format") != kind or tree.get("format_version") != version:
        raise DataError(
            f"{str(path)!r} is of format {tree.get('format')!r} version {tree.get('format_version')!r}, and this Blues "
            f"reads {kind!r} version {version}; make the dataset again with this version"
        )
    checksum = tree.pop("checksum", None)
    if checksum != _tree_checksum(tree):
        raise DataError(f"{str(path)!r} was changed after it was written; restore it or make the dataset again")
    return {**tree, "checksum": checksum}


def read_regular(path: Path) -> bytes:
    """The bytes of a file, links followed.

    Raises:
        OSError: it cannot be read, or it is of a kind whose end may never come, such as a pipe.
    """
    if not is_regular(os.stat(path)):
        raise OSError(0, NOT_REGULAR, str(path))
    return path.read_bytes()


def is_regular(found: os.stat_result) -> bool:
    """Whether it is a file whose bytes lie on a disk: no folder, pipe, socket or device."""
    return stat.S_ISREG(found.st_mode)


def parse_json(content: bytes | str) -> Any:
    """`json.loads`, to which brackets in brackets without end are a ValueError like any other damage."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def require(tree: Any, shape: Any, where: str = "") -> None:
    """Check that a tree has the keys of `shape` and, at its leaves, values that its functions say True to.

    A list in a shape stands for any number of its only element, a tuple for null or its only element, and the key
    `...` for every key there is.

    Raises:
        ValueError: names the first key that is missing, or whose value is of another kind.
    """
    if isinstance(shape, tuple):
        if tree is not None:
            require(tree, shape[0], where)
    elif callable(shape):
        if not shape(tree):
            raise ValueError(f"{where!r}")
    elif type(tree) is not type(shape):
        raise ValueError(f"{where!r}")
    elif isinstance(shape, list):
        for number, value in enumerate(tree):
            require(value, shape[0], f"{where}[{number}]")
    else:
        for key, inner in shape.items():
            for name in tree if key is ... else (key,):
                if name not in tree:
                    raise ValueError(f"{_join(where, name)!r}")
                require(tree[name], inner, _join(where, name))


def is_text(value: Any) -> bool:
    """For `require`: a string."""
    return isinstance(value, str)


def is_path(value: Any) -> bool:
    """For `require`: a string that can be the name of a file."""
    return isinstance(value, str) and value != "" and "\0" not in value


def is_share(value: Any) -> bool:
    """For `require`: a fraction such as 3/4, not negative."""
    return isinstance(value, str) and re.fullmatch(r"\d{1,30}(/[1-9]\d{0,30})?", value) is not None


def is_count(value: Any) -> bool:
    """For `require`: a whole number, not negative."""
    return type(value) is int and 0 <= value < 1 << 63


def is_tree(value: Any) -> bool:
    """For `require`: a mapping of anything."""
    return isinstance(value, dict)


def is_file(value: Any) -> bool:
    """For `require`: a file within a dataset."""
    return is_path(value) and not {"", "..", "."} & set(value.split("/"))


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """UTF-8 JSON that keeps names readable; a file name that is not UTF-8 turns into escapes that load reads back."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def is_dataset(directory: Path) -> bool:
    """Whether a folder is a prepared or merged dataset, going by the first words of its manifest."""
    for name, words in ((MANIFEST, FORMAT), (MIXTURE, MIXTURE_FORMAT)):
        try:
            if not is_regular(os.stat(directory / name)):
                continue
            with open(directory / name, "rb") as file:
                if f'"format": "{words}"'.encode() in file.read(64):
                    return True
        except OSError:
            continue
    return False


def check_target(path: str | Path, option: str, suffixes: Sequence[str]) -> None:
    """Whether a report may be written at `path`, which `option` names: asked before anything is computed.

    Raises:
        ConfigError: it is a folder or in none, its name has none of the `suffixes`, or it lies in a dataset, none of
            whose files is anything but what its manifest says.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{option}: {str(path)!r} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {str(path.parent)!r}; make it, or name another")
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option}: the name of {str(path)!r} has to end in {' or '.join(suffixes)}")
    for place in (path.parent.resolve() / path.name, path.resolve()):  # a link is replaced, whatever it leads to
        for folder in reversed(place.parents):  # not that of a version
            if is_dataset(folder) or all((folder / name).is_dir() for name in ("versions", "chunks")):
                raise ConfigError(f"{option}: {str(path)!r} lies in the dataset {str(folder)!r}; write it elsewhere")


def _tree_checksum(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _why_not_a_dataset(directory: Path, name: str, error: OSError) -> str:
    where = repr(str(directory))
    if not directory.exists():
        partial = partial_directory(directory)
        if partial.exists():
            return f"dataset {where} is not finished; run the same command again to finish it"
        return (
            f"dataset {where} does not exist; make it with `blues prepare --dataset FILE --data-cache-dir {directory}`"
        )
    if not isinstance(error, FileNotFoundError) and not isinstance(error, NotADirectoryError):
        return f"cannot read {str(directory / name)!r}: {error.strerror}"
    if name == MANIFEST and (directory / MIXTURE).exists():
        return f"{where} is a merged dataset, and a single prepared one is needed here; name one of its sources"
    return f"{where} is not a Blues dataset (it has no {name}); make one with `blues prepare` or `blues merge`"


def partial_directory(directory: Path) -> Path:
    """Where a dataset grows until it is whole and gets its name."""
    place = directory.resolve()  # through a link it is the same one, also for whoever names it differently
    return place.with_name(f".{place.name}.partial")
