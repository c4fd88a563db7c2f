"""Credentials never reach a file, a log or a message."""

from __future__ import annotations

import pytest

from blues.tracking.redaction import has_credentials, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hunter2@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://me:p/a@ss@db/blues", "postgresql+psycopg2://***@db/blues"),
        ("https://hunter2@host", "https://***@host"),
        ("https://host/x?api_key=hunter2&page=3", "https://host/x?api_key=***&page=3"),
        ("train tracking.uri=http://u:hunter2@h tiny", "train tracking.uri=http://***@h tiny"),
    ],
)
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert has_credentials(text.split("uri=")[-1].split(" ")[0])


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000",
        "sqlite:////home/me@work/mlflow.db",
        "databricks://profile",
        "http://h:80/@a",
        "mail me@h",
        "",
    ],
)
def test_what_holds_none_is_unchanged(text: str) -> None:
    assert redact(text) == text
    assert not has_credentials(text)
