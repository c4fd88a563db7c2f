"""The DeepSpeed engine behind a narrow face: forward, backward, step, and its whole state by parameter name.

In: a model on its device, an optimizer recipe, `Ranks`. Out: updates; and full float32 tensors by parameter name, the
same for every ZeRO stage and number of workers, so that a checkpoint of one loads into any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blues.training.optim import Optimizer
from blues.training.parallel import Ranks, deepspeed_config

STEP = "step"


class Engine:
    """One model under DeepSpeed. Every method is collective: all workers call it in the same order."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        ranks: Ranks,
        *,
        zero_stage: int,
        dtype: torch.dtype,
        micro_batch_size: int,
        accumulation: int,
        gradient_clipping: float,
        leaf_modules: tuple[type[nn.Module], ...] = (),
    ) -> None:
        """`leaf_modules`: module classes whose parts run or not depending on the data (experts); ZeRO-3 must fetch
        them whole or its workers wait for each other forever (DeepSpeed issue 5008)."""
        deepspeed = _import_deepspeed(ranks.device)
        self.model, self.ranks, self.optimizer = model, ranks, optimizer
        self.zero_stage, self.dtype, self.gradient_clipping = zero_stage, dtype, gradient_clipping
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        leaves = tuple(kind for kind in leaf_modules if any(isinstance(m, kind) for m in model.modules()))
        if zero_stage == 3 and leaves:
            deepspeed.utils.set_z3_leaf_modules(model, list(leaves))
        self._engine = deepspeed.initialize(
            model=model,
            optimizer=optimizer.make(model),
            config=deepspeed_config(
                zero_stage=zero_stage,
                dtype=dtype,
                micro_batch_size=micro_batch_size,
                accumulation=accumulation,
                gradient_clipping=gradient_clipping,
                num_parameters=sum(p.numel() for _, p in self._parameters),
            ),
            dist_init_required=False,
        )[0]
        self._peak_rates = [group["lr"] for group in self._engine.basic_optimizer.param_groups]
        self._safe = deepspeed.utils
        self._accumulation = accumulation

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The model's output; in training mode it is to be followed by `backward`."""
        return self._engine(*inputs, **options)

    __call__ = forward

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation (no router noise)."""
        self._engine.train(mode)

    def update(self, micro_batch: Callable[[int], Tensor], rate_factor: float) -> float | Tensor:
        """One update: `micro_batch(i)` gives the loss of the i-th forward pass; returns the global gradient norm
        before clipping. The norm may lie on the device: reading it waits for the device."""
        for group, peak in zip(self._engine.basic_optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * rate_factor
        norm: float | Tensor | None = None
        for index in range(self._accumulation):
            self._engine.backward(micro_batch(index))
            if index == self._accumulation - 1 and self.zero_stage == 0:
                limit = self.gradient_clipping or float("inf")
                norm = nn.utils.clip_grad_norm_([p for _, p in self._parameters], limit)
            self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return float("nan") if norm is None else norm

    def require_gradients(self, micro_batch: Callable[[], Tensor]) -> None:
        """Run one backward pass outside the training and check that every parameter takes part in it.

        ZeRO pairs gradients over the workers by the order in which they arrive: a parameter that gets none on one
        worker only silently shifts the others' sums (seen with DeepSpeed 0.19.8, stages 1 and 2).

        Raises:
            RuntimeError: a parameter received no gradient.
        """
        self._make_state()
        seen: set[str] = set()
        handles = [p.register_hook(lambda _, name=name: seen.add(name)) for name, p in self._parameters]
        self._without_change(micro_batch)
        for handle in handles:
            handle.remove()
        missing = [name for name, _ in self._parameters if name not in seen]
        if missing:
            raise RuntimeError(
                f"parameter {missing[0]!r} (one of {len(missing)}) received no gradient on worker {self.ranks.rank}; "
                "every parameter must take part in every backward pass, if only with zeros"
            )

    def _make_state(self) -> None:
        """Let torch make the optimizer state of every flat partition before DeepSpeed's first step.

        Its ZeRO-1 and 2 look for the state of all parameter groups after stepping the first one (0.19.8), and would
        never find that of the others.
        """
        optimizer = self._engine.basic_optimizer
        bare = [p for group in optimizer.param_groups for p in group["params"] if p.grad is None]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in bare:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter in bare:
            parameter.grad = None

    def _without_change(self, micro_batch: Callable[[], Tensor]) -> None:
        """A whole update with zero gradients at learning rate zero: makes the optimizer state, moves no weight."""
        self.update(lambda _: micro_batch() * 0.0, 0.0)

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 weight) one after the other; valid on every worker."""
        for name, parameter in self._parameters:
            if self.zero_stage == 0:
                yield name, parameter.detach().float()
            else:
                yield name, self._safe.safe_get_full_fp32_param(parameter)

    def optimizer_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, kind such as exp_avg, whole float32 tensor) one after the other; valid on every worker."""
        for name, parameter in self._parameters:
            for kind in self.optimizer.state_names:
                if self.zero_stage == 0:
                    yield name, kind, self._engine.basic_optimizer.state[parameter][kind].detach()
                else:
                    yield name, kind, self._safe.safe_get_full_optimizer_state(parameter, kind)

    def load_state(self, step: int, master: Callable[[str], Tensor], state: Callable[[str, str], Tensor]) -> None:
        """Continue after update number `step` from whole tensors by name.

        The optimizer state must exist (`require_gradients` makes it), and the model must have been built with the
        same weights: only what differs from them, the float32 masters of bf16 weights, is set here.
        """
        device = self.ranks.device
        with torch.no_grad():
            for name, parameter in self._parameters:
                if self.dtype != torch.float32:
                    self._safe.safe_set_full_fp32_param(parameter, master(name).to(device))
                for kind in self.optimizer.state_names:
                    value = state(name, kind).to(device)
                    if self.zero_stage == 0:
                        self._engine.basic_optimizer.state[parameter][kind].copy_(value)
                    else:
                        self._safe.safe_set_full_optimizer_state(parameter, value, kind)
        self.set_step(step)

    def set_step(self, step: int) -> None:
        """Tell the optimizer how many updates lie behind it (Adam's bias correction)."""
        for values in self._engine.basic_optimizer.state.values():
            if STEP in values:
                values[STEP] = torch.full_like(torch.as_tensor(values[STEP]), step)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for this kind of device, without its shared-memory operator, and with its state accessors.

    That operator serves inference only; building it takes a C++ compiler, 20 s, and a race between two workers.

    Raises:
        RuntimeError: this process has used DeepSpeed on another kind of device, which it cannot change.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
        import deepspeed.utils
        from deepspeed.accelerator import get_accelerator
    if get_accelerator().device_name() != device.type:
        raise RuntimeError(
            f"DeepSpeed serves {get_accelerator().device_name()} in this process; train on {device.type} in another one"
        )
    deepspeed.ops.__compatible_ops__ = {}  # consulted for that operator alone
    # DeepSpeed calls torch.distributed by names that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed
