"""Secrets stay out of files, logs and messages.

In: text in which URIs may stand. Out: the text without their user names, passwords and keys.
"""

from __future__ import annotations

import re
import urllib.parse

# a password may hold / and @, unescaped; a number before / is a port
_USER = re.compile(r"(\w[\w+.-]*://)(?:[^\s/@]*:(?!\d+/)\S*|[^\s/@]+)@")
_QUERY = re.compile(r"(?i)([?&;][^=&\s]*(?:token|secret|passw|key|auth|sig)[^=&\s]*=)[^&\s]+")


def redact(text: str) -> str:
    """`text` with `***` for the user information and the secret query values of its URIs."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))


def has_credentials(uri: str) -> bool:
    """Whether a URI holds a user name, a password or a secret query value."""
    try:
        parts = urllib.parse.urlsplit(uri)
    except ValueError:
        return redact(uri) != uri
    return "@" in parts.netloc or redact(uri) != uri
