"""Files of a git repository at a commit, read from its objects: nothing is checked out and none of its code runs.

In: a repository on this machine or at a URL, and a commit, branch or tag. Out: `GitFiles`, a `Place`.

`git ls-tree` lists names, sizes and the ids of contents; one `git cat-file --batch` a process gives the contents. Since
git names a content by its hash, a commit can be compared with another one without reading a file. Of a repository at a
URL the one commit is fetched into a bare repository in the cache; of another commit later on, what is new in it.

Contents are as git stores them: no line ends are converted, no filters run, pointers of LFS stay pointers. Hooks,
aliases, pagers and replaced objects of the repository have no effect, and nothing is fetched behind a reader's back.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import subprocess
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from blues.config import nearest
from blues.data.reading.places import (
    LINK,
    SUBMODULES,
    Choose,
    Entry,
    Listing,
    Place,
    hidden_below,
    in_order,
    shown,
    texts,
)
from blues.data.reading.remote import redact
from blues.data.storage.arrays import Strings
from blues.errors import DataError

SCHEMES = ("https", "http", "ssh", "git", "file")
OBJECT_ID = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
HELD_BYTES = 8 << 20
"""Contents up to this size are held in memory; a larger one lies in a temporary file while it is read."""
LISTED_BYTES = 1 << 18
"""Of a listing, taken from git at a time."""
SYMLINK, SUBMODULE = "120000", "160000"
"""Modes of what is no file."""
CONTENT = "git:"
"""What `content` begins with."""
FETCHED = "refs/blues"
"""Where the cache keeps what was fetched whole, by commit."""
FORGOTTEN = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES"),
    *("GIT_COMMON_DIR", "GIT_NAMESPACE", "GIT_PREFIX", "GIT_SHALLOW_FILE", "GIT_GRAFT_FILE"),
)
"""Variables that would make git look at another repository than the one named, such as within a hook."""
OPTIONS = (
    *("core.hooksPath=/dev/null", "core.fsmonitor=false", "core.bigFileThreshold=16m", "gc.autoDetach=false"),
    *("http.lowSpeedLimit=1", "http.lowSpeedTime=60"),  # a server that falls silent is given up
)
CREDENTIALS = re.compile(
    "could not read (?:username|password|from)|authentication failed|permission denied|terminal prompts disabled", re.I
)

Report = Callable[[str], None]


@dataclass(frozen=True)
class GitFiles(Place):
    """The files of one commit, below `folder` of the repository.

    repository: a folder of it on this machine. commit: the full id. ref: what the person called it, if not by the id.
    url: where it was fetched from, if it was. tree: the id of what lies below the folder, empty if nothing does.
    """

    repository: Path
    commit: str
    name: str
    ref: str = ""
    url: str = field(default="", repr=False)  # may hold a password
    tree: str = ""
    _contents: Contents = field(default_factory=lambda: Contents(), compare=False, repr=False)

    def entries(self, choose: Choose, ignored: Counter[str]) -> Listing:
        paths: list[str] = []
        ids: list[str] = []
        sizes: list[int] = []
        hidden: dict[str, bool] = {}
        for line in _list_tree(self.repository, self.commit):
            about, _, path = line.partition("\t")
            folder, _, name = path.rpartition("/")
            if folder not in hidden:
                hidden[folder] = hidden_below(path)
            if hidden[folder]:
                continue
            mode, _, id, size = about.split()
            reason = _why_passed_over(mode, name, choose)
            if reason is not None:
                ignored[reason] += 1
            elif not size.isdigit():
                raise DataError(_missing(self.where(shown(path)), self.repository))
            else:
                paths.append(path)
                ids.append(id)
                sizes.append(int(size))
        return in_order(Listing(texts(paths), ids, sizes, ids))

    def look(self, listing: Listing) -> tuple[Listing, Sequence[str]]:
        if isinstance(listing.paths, Strings):  # from `git_changes`
            return listing, Strings(listing.paths.array)
        return listing, [f"{CONTENT}{id}" for id in listing.paths]

    def open(self, entry: Entry) -> BinaryIO:
        if self.url and not self.repository.exists():  # in a process on another machine than the one that planned
            fetch(self.url, self.commit, lambda _: None)
        return self._contents.open(self.repository, entry)

    def check(self, entry: Entry) -> None:
        """A content that git names by its hash is always the same."""

    def content(self, entry: Entry) -> str:
        return f"{CONTENT}{entry.path}"

    def where(self, file: str) -> str:
        return repr(f"{self.name}@{self.commit[:12]}" + (f":{file}" if file else ""))

    def absolute(self) -> GitFiles:
        return replace(self, repository=self.repository.absolute())

    def provenance(self) -> dict[str, Any]:
        about = {"kind": "git", "commit": self.commit}
        if self.tree:
            about["tree"] = self.tree
        if self.ref:
            about["ref"] = self.ref
        if self.url:
            about["url"] = redact(self.url)
        return about


def passed_over(mode: str, path: str, choose: Choose) -> str | None:
    """Why a path is not read, `""` if it lies where nobody looks; None if it is read."""
    return "" if hidden_below(path) else _why_passed_over(mode, path.rpartition("/")[2], choose)


def _why_passed_over(mode: str, name: str, choose: Choose) -> str | None:
    return SUBMODULES if mode == SUBMODULE else LINK if mode == SYMLINK else choose(name)


class Contents:
    """The contents of objects, from one `git cat-file` for each process that reads; it travels without it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: Callable[[], Any] = lambda: None
        self._owner = 0
        self._errors: IO[bytes] | None = None
        self._large: tuple[str, IO[bytes]] | None = None  # parts of a large file are read one after the other

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def open(self, repository: Path, entry: Entry) -> BinaryIO:
        """A stream of the content with the id `entry.path`.

        Raises:
            OSError: the repository lacks it or is damaged.
        """
        with self._lock:
            if self._large is not None and self._large[0] == entry.path:
                return io.BufferedReader(_Spooled(self._large[1]))
            process = self._started(repository)
            requests, answers = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
            try:
                requests.write(f"{entry.path}\n".encode())
                requests.flush()
                header = answers.readline().decode().split()
                if len(header) != 3 or header[1] != "blob":
                    raise OSError(errno.EIO, self._problem(header, repository))
                size = int(header[2])
                content: IO[bytes] = io.BytesIO() if size <= HELD_BYTES else _temporary()
                _copy(answers, content, size)
                if answers.read(1) != b"\n":
                    raise OSError(errno.EIO, self._problem([], repository))
            except BaseException:  # an answer read by half would be taken for the next one
                self._ending()
                self._process = None
                raise
            if size <= HELD_BYTES:
                content.seek(0)
                return io.BufferedReader(cast(io.RawIOBase, content))
            self._large = (entry.path, content)
            return io.BufferedReader(_Spooled(content))

    def _started(self, repository: Path) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():  # a forked process must not share the pipes
            self._errors = _temporary()
            self._process = _start(["cat-file", "--batch"], repository, stderr=self._errors)
            self._owner = os.getpid()
            self._ending = weakref.finalize(self, _stop, self._process)
        return self._process

    def _problem(self, header: list[str], repository: Path) -> str:
        if header[1:] == ["missing"]:
            return _missing("the content", repository)
        cast(IO[bytes], self._errors).seek(0)
        return f"git cannot read it from {str(repository)!r}: {_words(cast(IO[bytes], self._errors).read())}"


def _missing(what: str, repository: Path) -> str:
    return f"{what} is not in the repository {str(repository)!r}: it is a partial clone, or damaged; clone it whole"


def _stop(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        cast(IO[bytes], pipe).close()
    process.wait()


def _temporary() -> IO[bytes]:
    return tempfile.TemporaryFile(buffering=0)


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size:
        block = source.read(min(size, 1 << 20))
        if not block:
            raise OSError(errno.EIO, "git ended in the middle of it; check the repository with git fsck")
        target.write(block)
        size -= len(block)


class _Spooled(io.RawIOBase):
    """A temporary file that several streams read, each at its own position."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: os.fstat(self._file.fileno()).st_size}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = os.preadv(self._file.fileno(), [buffer], self._position)
        self._position += length
        return length


def is_bare(path: Path) -> bool:
    """Whether a folder holds the objects of a git repository itself: a bare one, or the `.git` of a working tree."""
    return os.path.isfile(path / "HEAD") and os.path.isdir(path / "objects") and os.path.isdir(path / "refs")


def of_folder(folder: Path, ref: str | None) -> GitFiles:
    """The files below a folder of a working tree, or of a bare repository, as they are in a commit (HEAD without one).

    Raises:
        DataError: no repository, no such commit, or one that git refuses.
    """
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder {str(folder)!r}; check the path")
    resolved = folder.resolve()
    name = resolved.parent.name if resolved.name == ".git" else resolved.name.removesuffix(".git")
    ref = "HEAD" if ref is None else ref
    commit = _commit(folder, ref)
    if commit is None:
        shallow = run_git(["rev-parse", "--is-shallow-repository"], folder).strip() == b"true"
        deepen = "; it is a shallow clone: git fetch --unshallow gets all commits" if shallow else ""
        names = run_git(["for-each-ref", "--format=%(refname:short)"], folder).decode("utf-8", "replace").split("\n")
        raise DataError(f"{str(folder)!r} has no commit {ref!r}{deepen}.{nearest(ref, [n for n in names if n][:30])}")
    below = run_git(["rev-parse", "--show-prefix"], folder).removesuffix(b"\n").removesuffix(b"/")
    return GitFiles(
        folder, commit, shown(name), "" if OBJECT_ID.fullmatch(ref) else ref, tree=_tree(folder, commit, below)
    )


def of_url(text: str, ref: str | None, report: Report) -> GitFiles:
    """The files of a commit (its HEAD without one) of a repository at `git+SCHEME://...`, fetched if they are not here.

    Raises:
        DataError: no such scheme, repository or commit, or it cannot be reached.
    """
    url = text.removeprefix("git+")
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise DataError(f"{redact(text)!r}: repositories come by git+ one of {', '.join(SCHEMES)}")
    if parts.scheme == "file":
        return of_folder(Path(unquote(parts.path)), ref)
    name = unquote(parts.path.rstrip("/").rpartition("/")[2]).removesuffix(".git") or parts.netloc
    ref = "HEAD" if ref is None else ref
    commit = ref if OBJECT_ID.fullmatch(ref) else _remote_commit(url, ref)
    repository = fetch(url, commit, report)
    return GitFiles(
        repository, commit, shown(name), "" if ref == commit else ref, url, tree=_tree(repository, commit, b"")
    )


def fetch(url: str, commit: str, report: Report) -> Path:
    """The repository in the cache that has this commit of `url`, with all its contents and none of its history.

    Raises:
        DataError: it cannot be fetched.
    """
    folder = Path(os.environ.get("BLUES_CACHE") or Path.home() / ".cache" / "blues") / "git"
    repository = folder / f"{hashlib.sha256(redact(url).encode()).hexdigest()[:32]}.git"
    kept = f"{FETCHED}/{commit}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(repository.with_suffix(".lock")):
            if not repository.exists():
                _make_bare(repository, "sha256" if len(commit) == 64 else "sha1")
            # Not the commit's own presence: a fetch that was killed may have left it without its contents.
            if _commit(repository, kept) != commit:
                report(f"fetching {commit[:12]} of {redact(url)}")
                asked = ["--depth=1", "--no-tags", "--no-write-fetch-head", "--quiet", "--", url, f"+{commit}:{kept}"]
                run_git(["fetch", *asked], repository, url=url)
    except OSError as error:
        raise DataError(f"cannot write the cache {str(folder)!r}: {error.strerror}; set BLUES_CACHE") from None
    return repository


def _make_bare(repository: Path, object_format: str) -> None:
    with tempfile.TemporaryDirectory(dir=repository.parent) as folder:
        run_git(["init", "--quiet", "--bare", "--template=", f"--object-format={object_format}", "new"], Path(folder))
        os.rename(Path(folder, "new"), repository)


def _remote_commit(url: str, ref: str) -> str:
    """The commit that a branch, tag or HEAD is at."""
    if _is_name(ref):
        lines = (
            run_git(["ls-remote", "--", url, ref, f"{ref}^{{}}"], None, url=url).decode("utf-8", "replace").splitlines()
        )
        found = {name: id for id, _, name in (line.partition("\t") for line in lines)}
        for full in (ref, f"refs/{ref}", f"refs/tags/{ref}", f"refs/heads/{ref}"):
            if full in found:
                return found.get(f"{full}^{{}}", found[full])  # a tag stands for the commit it points to
    lines = (
        run_git(["ls-remote", "--heads", "--tags", "--", url], None, url=url).decode("utf-8", "replace").splitlines()
    )
    names = [line.partition("\t")[2].split("/", 2)[-1] for line in lines if not line.endswith("^{}")]
    part = " Give the whole id of a commit." if re.fullmatch("[0-9a-f]{4,39}", ref) else nearest(ref, names[:30])
    raise DataError(f"{redact(url)!r} has no branch or tag {ref!r}.{part}")


def _commit(folder: Path, ref: str) -> str | None:
    """The full id of the commit that `ref` means, None without one."""
    if not _is_name(ref):
        return None
    arguments = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"]
    return run_git(arguments, folder, fails=1).decode().strip() or None


def _tree(repository: Path, commit: str, below: bytes) -> str:
    """The id of a folder as it is in a commit, empty where there is none."""
    arguments = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}:{os.fsdecode(below)}"]
    return run_git(arguments, repository, fails=1).decode().strip()


def object_sizes(repository: Path, ids: Iterable[str]) -> list[int] | None:
    """The bytes of contents; None if the repository lacks one of them.

    Raises:
        DataError: git failed.
    """
    asked = "".join(f"{id}\n" for id in ids).encode()
    answers = run_git(["cat-file", "--batch-check=%(objecttype) %(objectsize)"], repository, given=asked).split(b"\n")
    found = [answer.split() for answer in answers[:-1]]
    if any(kind != b"blob" for kind, _ in found):
        return None
    return [int(size) for _, size in found]


def _is_name(ref: str) -> bool:
    """Whether git would take it for the name of a commit, never for an option."""
    return bool(ref) and not ref.startswith("-") and ref.isprintable()


def _list_tree(folder: Path, commit: str) -> Iterator[str]:
    """Mode, kind, id and size with blanks between them, a tab and the path of everything below `folder` in a commit, in
    the order of paths. They are given while git still looks for the sizes of others.

    Raises:
        DataError: git failed.
    """
    with _temporary() as errors:
        process = _start(["ls-tree", "-r", "-z", "-l", commit], folder, stdin=subprocess.DEVNULL, stderr=errors)
        output = cast(IO[bytes], process.stdout)
        try:
            rest = b""
            while block := output.read(LISTED_BYTES):
                lines, _, rest = (rest + block).rpartition(b"\0")
                if lines:
                    yield from lines.decode("utf-8", "surrogateescape").split("\0")
        except BaseException:
            process.kill()
            raise
        finally:
            output.close()
            failed = process.wait()
        if failed:
            errors.seek(0)
            raise DataError(_sentence(errors.read(), str(folder)))


def run_git(
    arguments: list[str], folder: Path | None, *, url: str = "", fails: int = 0, given: bytes | None = None
) -> bytes:
    """What a git command printed. `url`: where it may reach out to. `fails`: an exit status that is an answer too.
    `given`: what it reads.

    Raises:
        DataError: it failed.
    """
    stdin = subprocess.DEVNULL if given is None else subprocess.PIPE
    process = _start(arguments, folder, url=url, stdin=stdin, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(given)
    except BaseException:
        process.kill()
        raise
    if process.returncode not in (0, fails):
        raise DataError(_sentence(errors, redact(url) if url else str(folder)))
    return output


def _start(arguments: list[str], folder: Path | None, *, url: str = "", **pipes: Any) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in FORGOTTEN}
    environment |= {
        **{"GIT_TERMINAL_PROMPT": "0", "SSH_ASKPASS_REQUIRE": "never", "GIT_NO_REPLACE_OBJECTS": "1"},
        **{"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"},
        "GIT_ALLOW_PROTOCOL": ":".join(SCHEMES) if url else "none",  # a partial clone would fetch what it lacks
    }
    command = ["git", *(word for option in OPTIONS for word in ("-c", option)), *arguments]
    try:
        # A session of its own: no terminal to ask for a password on, and Ctrl-C reaches Blues alone.
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            start_new_session=True,
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **pipes},
        )
    except FileNotFoundError:
        if folder is not None and not folder.is_dir():
            raise DataError(
                f"there is no repository {str(folder)!r} on this machine; every machine of a cluster must see it"
            ) from None
        raise DataError("git is not installed, and git repositories are read with it; install git") from None


def _sentence(errors: bytes, where: str) -> str:
    words = _words(errors)
    if "not a git repository" in words and "://" not in where:
        return f"{where!r} is not in a git repository; leave out --commit to read it as a folder"
    if "dubious ownership" in words:
        return (
            f"{where!r} belongs to another user, so git does not open it; if you trust it: "
            f"git config --global --add safe.directory '{where}'"
        )
    if CREDENTIALS.search(words):
        return f"{where!r} asks for credentials that git has not ({words}); set up a credential helper or an SSH key"
    return f"git cannot read {where!r}: {words}"


def _words(errors: bytes) -> str:
    """What git said went wrong, in one line and without passwords."""
    lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
    first = next((at for at, line in enumerate(lines) if line.startswith(("fatal:", "error:", "remote:", "ssh:"))), 0)
    return redact("; ".join(line.removeprefix("fatal: ") for line in lines[first : first + 3])) or "it said nothing"
