"""What is kept of a block whose activations are computed again for the gradient.

In: nothing. Out: the contexts that `torch.utils.checkpoint.checkpoint` takes as `context_fn`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

DECISIONS = (torch.ops.aten.topk.default, torch.ops.aten.sort.stable)
THRESHOLDS = (torch.ops.aten.gt.Tensor, torch.ops.aten.gt.Scalar, torch.ops.aten.ge.Scalar)
"""How routers decide: by rank, or by comparing a matrix of tokens and experts with thresholds."""


def keep_decisions() -> tuple[Any, Any]:
    """Contexts of a checkpointed block in which all is computed again but the choice and order of experts.

    torch.compile may fuse, and so round, the second computation differently. One token that then chose another expert
    would shift the sorted places of every token behind it, against what the first computation has left for the
    gradient: gradients came out wrong by half their length.
    """

    def policy(_: Any, operation: Any, *inputs: Any, **__: Any) -> CheckpointPolicy:
        kept = operation in DECISIONS or (operation in THRESHOLDS and inputs[0].ndim == 2)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
