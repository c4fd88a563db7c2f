"""Texts from outside, so that no terminal and no page stumbles over them.

In: any text, such as a document, a file name or a token. Out: the same with every character that steers something
(escape sequences, control characters, marks that turn the direction of writing) replaced by one that can be seen.
"""

from __future__ import annotations

import unicodedata

STEERING = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode's general categories: control, format, surrogate, private use, unassigned, line and paragraph separator."""
_USUAL = {"\n": "\u21b5", "\t": "\u21e5"}
_JOINERS = "\u200c\u200d"  # within words of many scripts, and within emoji


def visible(text: str, *, keep: str = "") -> str:
    """`text` with control characters as pictures (ESC is ␛, the end of a line ↵), other steering ones as escapes
    (`\\u202e`).

    keep: characters that stay as they are, such as the end of a line.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep else _shown(char) for char in text)


def _shown(char: str) -> str:
    code = ord(char)
    if char in _USUAL:
        return _USUAL[char]
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if char in _JOINERS or unicodedata.category(char) not in STEERING:
        return char
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
