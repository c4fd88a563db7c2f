"""A Blues tokenizer as Hugging Face's tokenizer.json.

In: a `Tokenizer` (a tiktoken byte pair encoding given by ranks). Out: the files that `transformers.AutoTokenizer`
loads, giving the same ids for the same text.

tiktoken merges whichever neighbouring pair makes the token of lowest rank; tokenizers wants the list of merges. Running
the encoding on a token's own bytes with only the ranks below its own leaves exactly the two parts whose merge makes it,
so the list of those pairs in the order of the ranks is the same encoding. tiktoken also takes a piece that is a token
whole, without merging: `ignore_merges`.

One difference is meant: Blues reads the characters `<|endoftext|>` in a text as plain text, a Hugging Face tokenizer as
the special token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blues.data.tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer, *, max_length: int) -> dict[str, dict[str, Any]]:
    """The content of tokenizer.json and tokenizer_config.json by file name."""
    encoding = tokenizer.encoding
    end = encoding.decode([tokenizer.eot_id])
    return {
        "tokenizer.json": tokenizer_json(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": end,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
        },
    }


def tokenizer_json(ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json of the byte pair encoding with these `ranks` (token bytes -> id), `pattern` (a regular expression
    that cuts the text into pieces) and `special_tokens` (text -> id)."""
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    added = [
        {
            "id": token_id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text, token_id in sorted(special_tokens.items(), key=lambda item: item[1])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            # With the special tokens, or tokenizers would number them on from the ranks, whatever `id` says.
            "vocab": {spell(token): rank for token, rank in ranks.items()} | dict(special_tokens),
            "merges": [[spell(left), spell(right)] for left, right in merges_of(ranks)],
        },
    }


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs whose merges make the tokens of `ranks`, in the order in which they apply.

    A token that merging never makes (tiktoken only finds it as a whole piece) has no pair.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = split_below(ranks, token, rank)
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
    return merges


def split_below(ranks: Mapping[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """The parts of `token` after all merges that make tokens of rank below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        found = [ranks.get(left + right, limit) for left, right in zip(parts, parts[1:], strict=False)]
        lowest = min(found)
        if lowest >= limit:
            break
        place = found.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a tokenizer.json (GPT-2's table): printable Latin-1
    characters for themselves, the others numbered from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
