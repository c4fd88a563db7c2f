"""Blues: a Ray-distributed experimentation platform for a Mixture-of-Experts language model.

    from blues import load_model, sample_text
    model = load_model("runs/tiny")
    print(sample_text(model, "def ", max_length=64, temperature=0.8, top_p=0.95))

The journey of data, in the order of the folders: `data` -> `kernels` -> `model` -> `tracking` -> `training` ->
`inference` -> `evaluation` -> `experiment` (the one configuration tree over them) -> `cluster` (Ray) -> `cli`.
Each imports only from those before it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_model", "sample_text"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing `blues` for its command line must not import torch.
    if name in __all__:
        return getattr(import_module("blues.inference.engine"), name)
    raise AttributeError(f"module 'blues' has no attribute {name!r}")
