"""Where a run comes from: enough to start it again, and to know what it was when it was started.

In: the resolved configuration tree and what the caller knows of data and device. Out: a record of plain values for
RUN/run.json, and the same as MLflow parameters and tags.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import blues
from blues import config as cfg
from blues.errors import TrackingError
from blues.tracking.redaction import redact

PACKAGES = ("torch", "ray", "deepspeed", "mlflow", "tiktoken", "numpy", "transformers")
GIT_S = 10.0


def record(
    config: cfg.Config,
    *,
    data_fingerprint: str | None = None,
    device: str | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Everything known about a start of a run, as JSON values.

    Args:
        config: the resolved tree.
        data_fingerprint: of the training mixture.
        device: what it trains on, in words, e.g. `2 x cpu`.
        command: the command line; that of this process when None. Credentials in it are hidden.
    """
    commit, dirty = git_commit(Path(blues.__file__).parent)
    arguments = sys.orig_argv if command is None else command
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": redact(shlex.join(arguments)),
        "configuration": cfg.dump(config),
        "configuration_fingerprint": cfg.fingerprint(config),
        "data_fingerprint": data_fingerprint,
        "commit": commit,
        "dirty": dirty,
        "versions": versions(),
        "hostname": platform.node(),
        "user": _user(),
        "device": device,
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "directory": os.getcwd(),
    }


def versions() -> dict[str, str | None]:
    """Blues, Python and the packages that decide a result; None where one is not installed."""
    found: dict[str, str | None] = {"blues": blues.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def code_version() -> dict[str, Any]:
    """The code that is running: version of Blues, git commit, whether tracked files differ from it."""
    commit, dirty = git_commit(Path(blues.__file__).parent)
    return {"blues": blues.__version__, "commit": commit, "dirty": dirty}


def git_commit(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the code in `folder`; (None, None) when it is not known.

    A folder that merely lies inside somebody's repository (an installation in a virtual environment) has no commit of
    its own; what pip noted when it installed from git is used then.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(folder, "rev-parse", "HEAD") if tracked is not None else None
    if commit is None:
        return _installed_commit(), None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/")
    return commit, None if status is None else bool(status)


def params(config: cfg.Config) -> dict[str, str]:
    """Every leaf of the tree by dotted path, as MLflow parameters."""
    return {path: _text(value) for path, value in cfg.flatten(config).items()}


def tags(run_record: Mapping[str, Any]) -> dict[str, str]:
    """The record's facts as MLflow tags, with the names under which MLflow's pages show source and user."""
    known = {
        "mlflow.user": run_record["user"],
        "mlflow.source.name": run_record["command"],
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": run_record["commit"],
        "blues.dirty": run_record["dirty"],
        "blues.configuration": run_record["configuration_fingerprint"],
        "blues.data": run_record["data_fingerprint"],
        "blues.hostname": run_record["hostname"],
        "blues.device": run_record["device"],
    }
    known |= {f"blues.version.{package}": version for package, version in run_record["versions"].items()}
    return {name: _text(value) for name, value in known.items() if value is not None}


def save(path: str | Path, run_record: Mapping[str, Any]) -> None:
    """Write RUN/run.json: this start, after the earlier ones of the same run."""
    starts = [*load(path), dict(run_record)]
    cfg.write_atomic(path, json.dumps({"starts": starts}, indent=2, ensure_ascii=False).encode())


def load(path: str | Path) -> list[dict[str, Any]]:
    """The starts in RUN/run.json, oldest first; none when there is no such file.

    Raises:
        TrackingError: the file cannot be read, or is damaged.
    """
    try:
        return list(json.loads(Path(path).read_text(encoding="utf-8"))["starts"])
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrackingError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise TrackingError(f"{str(path)!r} is damaged; move it away: it only tells how the run was started") from None


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_S,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit() -> str | None:
    try:
        text = metadata.distribution("blues").read_text("direct_url.json")
        return json.loads(text)["vcs_info"]["commit_id"] if text else None
    except (metadata.PackageNotFoundError, KeyError, ValueError):
        return None


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value)
