"""What is measured of other projects, in their own environment: nothing here needs Blues.

In: `meter`, the class that measures a `with` block, and paths. Out: figures by name, the same as of ours.

Both loaders deliver fixed blocks in an order that they shuffle; only one of the two ways below asks for a block by its
number, which is the nearest to a window anywhere. Neither checks what it reads.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tuning.benchmarks.worker import Meter

MB, TOKEN_BYTES = 1e6, 4
_encodings: dict[str, Any] = {}


def blocks_of(files: list[str], length: int) -> Iterator[np.ndarray]:
    """The tokens of files end to end, cut into blocks of `length`; what is left over at the end is dropped."""
    rest = np.empty(0, dtype=np.uint32)
    for file in files:
        tokens = np.concatenate([rest, np.fromfile(file, dtype="<u4")])
        whole = len(tokens) - len(tokens) % length
        yield from tokens[:whole].reshape(-1, length)
        rest = tokens[whole:]


def write_mds(meter: type[Meter], files: list[str], output: str, length: int) -> dict:
    """The tokens as a dataset of mosaicml-streaming, a block a sample, with its defaults (64 MiB shards, no hashes)."""
    from streaming import MDSWriter

    with meter() as spent, MDSWriter(out=output, columns={"tokens": f"ndarray:uint32:{length}"}) as writer:
        for block in blocks_of(files, length):
            writer.write({"tokens": block})
    return {"s": spent.seconds}


def read_mds(meter: type[Meter], folder: str, order: str, windows: int, length: int, batch: int, seed: int) -> dict:
    """Blocks of mosaicml-streaming: `numbered` asks for random ones, `shuffled` iterates with its own shuffle."""
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    torch.zeros(1)

    def make() -> Callable[[], Any]:
        dataset = StreamingDataset(
            local=folder, shuffle=order == "shuffled", shuffle_seed=seed, batch_size=batch, num_canonical_nodes=1
        )
        take = _taker(dataset, order, batch, seed)
        return lambda: torch.from_numpy(np.stack([sample["tokens"] for sample in take()]).astype(np.int64))

    return meter.loader(make, windows // batch, batch * length * TOKEN_BYTES)


def write_litdata(meter: type[Meter], files: list[str], output: str, length: int) -> dict:
    """The tokens as a dataset of litdata for its TokensLoader, in chunks of about 64 MB."""
    import torch
    from litdata import TokensLoader, optimize

    def tokens_of(file: str) -> Iterator[Any]:
        yield torch.from_numpy(np.fromfile(file, dtype="<u4").astype(np.int32))

    with meter() as spent:
        optimize(
            fn=tokens_of,
            inputs=files,
            output_dir=output,
            chunk_size=length * (64_000_000 // (TOKEN_BYTES * length)),
            item_loader=TokensLoader(block_size=length),
            num_workers=1,
            start_method="fork",  # a function of this file is not found by name in another process
        )
    return {"s": spent.seconds}


def read_litdata(meter: type[Meter], folder: str, order: str, windows: int, length: int, batch: int, seed: int) -> dict:
    """Blocks of litdata: `numbered` asks for random ones, `shuffled` iterates with its own shuffle."""
    import torch
    from litdata import StreamingDataset, TokensLoader

    torch.zeros(1)

    def make() -> Callable[[], Any]:
        loader = TokensLoader(block_size=length)
        dataset = StreamingDataset(folder, item_loader=loader, shuffle=order == "shuffled", seed=seed)
        take = _taker(dataset, order, batch, seed)
        return lambda: torch.stack([block.to(torch.int64) for block in take()])

    return meter.loader(make, windows // batch, batch * length * TOKEN_BYTES)


def _taker(dataset: Any, order: str, batch: int, seed: int) -> Callable[[], list[Any]]:
    """Takes a batch of samples: at random by number, or the next ones."""
    if order == "shuffled":
        samples = itertools.chain.from_iterable(iter(dataset) for _ in itertools.repeat(None))
        return lambda: list(itertools.islice(samples, batch))
    rng = np.random.default_rng(seed)
    return lambda: [dataset[number] for number in rng.integers(len(dataset), size=batch).tolist()]


def remove_copies(meter: type[Meter], folder: str, size: int, ngram: int, permutations: int, threshold: float) -> dict:
    """Near duplicates by datasketch's MinHash and MinHashLSH: a document goes if an earlier one that stays is proposed.

    Proposals are not verified. Hashing the shingles is part of the work, as it is of ours.
    """
    from datasketch import MinHash, MinHashLSH

    content, ends = np.load(Path(folder, "tokens.npy")).tobytes(), np.load(Path(folder, "ends.npy")).tolist()
    starts = [0, *ends[:-1]]
    removed = []
    with meter() as spent:
        shingles = (_shingles(content, a, b - 1, ngram) for a, b in zip(starts, ends, strict=True))
        index = MinHashLSH(threshold=threshold, num_perm=permutations)
        for number, signature in enumerate(MinHash.bulk(shingles, num_perm=permutations)):
            if index.query(signature):
                removed.append(number)
            else:
                index.insert(number, signature)
    return {"MB/s a core": size / MB / spent.cpu_s, "MB/s": size / MB / spent.seconds, "removed": removed}


def _shingles(content: bytes, start: int, stop: int, ngram: int) -> list[bytes]:
    """The runs of `ngram` tokens of tokens [start, stop), or all of them where there are fewer."""
    last = max(start, stop - ngram)
    return [content[TOKEN_BYTES * a : TOKEN_BYTES * min(a + ngram, stop)] for a in range(start, last + 1)]


def map_datasets(
    meter: type[Meter], corpus: str, size: int, output: str, vocabulary: str, pattern: str, workers: int
) -> dict:
    """Preparation with Hugging Face datasets: `map` with tiktoken, then `save_to_disk`."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    files = [str(path) for path in sorted(Path(corpus).rglob("*.py"))]
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint32"))})
    with meter() as spent:
        encoded = datasets.Dataset.from_dict({"file": files}).map(
            _encode_files,
            batched=True,
            batch_size=100,
            num_proc=workers,
            remove_columns=["file"],
            features=features,
            fn_kwargs={"vocabulary": vocabulary, "pattern": pattern},
        )
        encoded.save_to_disk(output)
    tokens = int(sum(len(row) for batch in encoded.iter(1000) for row in batch["tokens"]))
    rates = {"MB/s": size / MB / spent.seconds, "MB/s a core": size / MB / spent.cpu_s}
    return rates | {"s": spent.seconds, "tokens": tokens}


def _encode_files(batch: dict[str, list[str]], vocabulary: str, pattern: str) -> dict[str, list[np.ndarray]]:
    import tiktoken

    if vocabulary not in _encodings:
        pairs = (line.split() for line in Path(vocabulary).read_bytes().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        _encodings[vocabulary] = tiktoken.Encoding(
            "o200k_base", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 199_999}
        )
    texts = (Path(file).read_bytes().decode("utf-8") for file in batch["file"])
    return {"tokens": [_encodings[vocabulary].encode_to_numpy(text, disallowed_special=()) for text in texts]}
