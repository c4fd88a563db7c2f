"""When and on what the specialization of experts is measured in a run, and where that goes.

In: every forward pass of the updates before a report, and a model to route a fixed probe with. Out: metrics for the
observer, and in the run folder

    RUN/specialization/step-00000100.json   all figures: loads, co-activation, P(expert | domain), tokens of each expert
    RUN/specialization/step-00000100.npz    the experts of every probe token, for the curve of router saturation

Two sources: `training` counts the batches that the updates learned from; `probe` is a fixed set of held-out sequences
(of the training data where nothing is held out), routed without noise. The probe alone says what the model predicts,
which a training step never computes, and how much routing changed since the probe before.

Legend: R rows of the probe on this worker, B samples of a batch, T tokens, L mixture layers, K slots per token.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from blues import config as cfg
from blues.data.mixture.batches import Batch, Mixture
from blues.data.mixture.packing import IGNORED
from blues.errors import ConfigError
from blues.model.moe.layer import mixtures
from blues.model.moe.routing import Routing
from blues.model.transformer import ModelOutput, Transformer
from blues.tracking.metrics import stack_ids
from blues.tracking.specialization import (
    Labels,
    SpecializationCounts,
    copy_together,
    describe,
    layer_metrics,
    overlap,
)
from blues.tracking.specialization_files import FOLDER, forget_after, probe_steps, read_probe, write_probe
from blues.training.parallel import Ranks
from blues.training.probe import Probe

MOST_COUNTED = 2**31 - 1

Route = Callable[[Batch], ModelOutput]
"""The model's logits and routing of a batch."""


class SpecializationLog(cfg.Configurable):
    """Measures one run on one worker. All workers call every method alike."""

    @cfg.configclass
    class Config(cfg.Config):
        """How often, and over how many tokens.

        every: updates between two reports, 0 for one after the last update only. window: updates before a report whose
        batches are counted, 0 for none; the others cost nothing. A run that is resumed inside a window counts the rest
        of it. probe_samples: sequences of the probe, 0 for no probe; their logits are made one sequence at a time.
        """

        every: int = 0
        window: int = 100
        probe_samples: int = 16

        def __post_init__(self) -> None:
            for name in ("every", "window", "probe_samples"):
                if getattr(self, name) < 0:
                    raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}")

    config: Config

    def __init__(
        self,
        config: Config,
        *,
        model: Transformer,
        train_data: Mixture,
        held_out: Mixture | None,
        ranks: Ranks,
        run_dir: Path,
        steps: int,
        tokens_per_step: int,
        step: int,
    ) -> None:
        """`steps`: of the whole run. `step`: updates that are done; reports of later ones are deleted.

        Raises:
            ConfigError: a window has more tokens than can be counted.
        """
        self.config, self.ranks, self.steps, self.folder = config, ranks, steps, run_dir / FOLDER
        self.layers = [layer for layer, _ in mixtures(model)]
        self.num_experts = [moe.router.num_experts for _, moe in mixtures(model)]
        self.active = bool(self.layers) and bool(config.window or config.probe_samples)
        if not self.active:
            return
        window = min(config.window, config.every or steps)
        if window * tokens_per_step > MOST_COUNTED:
            raise ConfigError(
                f"training.specialization.window={config.window}: {window * tokens_per_step:,} tokens are more than "
                f"can be counted; at most {MOST_COUNTED // tokens_per_step} updates"
            )
        self.updates = 0
        self._text = functools.lru_cache(maxsize=1 << 12)(token_text(train_data))
        self.training = None
        if config.window:
            self.training = self._counts(_kinds(train_data, model.config.vocab_size))
        self.probe, self.probed = None, None
        if config.probe_samples:
            data = train_data if held_out is None else held_out
            self.probe = Probe(data, config.probe_samples, ranks.rank, ranks.world_size)
            self.probed = self._counts([Labels("predicted_token", model.config.vocab_size)])
        if ranks.rank == 0:
            forget_after(self.folder, step)
        ranks.barrier()
        self._before_RTLK: Tensor | None = None
        known = [earlier for earlier in probe_steps(self.folder) if earlier <= step]
        if known and self.probe is not None:
            before = self.probe.own_rows(read_probe(self.folder, known[-1]).ids_NLK)
            self._before_RTLK = None if before is None else before.to(ranks.device)

    def _counts(self, kinds: Sequence[Labels]) -> SpecializationCounts:
        return SpecializationCounts(self.layers, self.num_experts, kinds, self.ranks.device)

    def due(self, step: int) -> bool:
        """Whether a report belongs after this update."""
        every = self.config.every
        return self.active and (step == self.steps or (every > 0 and step % every == 0))

    def counts(self, step: int) -> bool:
        """Whether the batches of this update are counted."""
        if not self.active or self.training is None:
            return False
        every = self.config.every or self.steps
        report = min(self.steps, -(-step // every) * every)
        return step > report - self.config.window

    def add(self, batch: Batch, routing: Sequence[Routing]) -> None:
        """Count one forward pass of an update. Does not wait for the device."""
        if self.training is not None:
            counted_T = (batch.targets != IGNORED).flatten()
            labels = {
                "input_token": batch.inputs.flatten(),
                "target_token": batch.targets.flatten().clamp(min=0),
                "domain": batch.sources[:, None].expand_as(batch.inputs).flatten(),
            }
            if batch.languages is not None:
                labels["language"] = batch.languages.flatten()
            self.training.update(routing, labels, counted_T)

    def next_update(self) -> None:
        """An update was counted."""
        self.updates += 1

    @torch.no_grad()
    def report(self, step: int, route: Route) -> tuple[dict[str, float], Path]:
        """Metrics, and the file of all figures; the counts start anew. The model must be in evaluation mode.

        One copy to the host for everything.
        """
        sources: dict[str, SpecializationCounts] = {}
        found: dict[str, Tensor] = {}
        if self.training is not None and self.updates:
            sources["training"] = self.training
        if self.probe is not None and self.probed is not None:
            sources["probe"] = self.probed
            found = self._route(self.probe, self.probed, route)
        for name, counts in sources.items():
            dist.all_reduce(counts.counts)
            found |= {f"{name}/{key}": value for key, value in counts.results().items()}
        host = copy_together(found)
        figures = {name: counts.figures(_below(host, f"{name}/")) for name, counts in sources.items()}
        for counts in sources.values():
            counts.reset()
        metrics: dict[str, float] = {}
        for measured in reversed(figures.values()):  # what both know is reported of the training batches
            metrics |= measured.metrics()
        changed = {}
        if "saturation" in host:
            changed = dict(zip(self.layers, host["saturation"].tolist(), strict=True))
            metrics |= layer_metrics({"saturation": changed})
        path = self.folder / f"step-{step:08d}.json"
        if self.ranks.rank == 0:
            tree = {"step": step, "updates": self.updates, "saturation": list(changed.values())}
            tree |= {name: describe(measured, self._text).tree() for name, measured in figures.items()}
            self.folder.mkdir(parents=True, exist_ok=True)
            if "ids" in host:
                write_probe(self.folder, step, host["ids"].flatten(0, 1), self.layers, self.num_experts)
            cfg.write_atomic(path, json.dumps(tree).encode())
        self.updates = 0
        return metrics, path

    def _route(self, probe: Probe, counts: SpecializationCounts, route: Route) -> dict[str, Tensor]:
        """Route and count the probe; its experts `ids`, and its `saturation` since the probe before if there is one."""
        width, rows = max(self.num_experts), []
        for batch, mine in probe.batches:
            batch = batch.to(self.ranks.device)
            output = route(batch)
            assert output.logits_BTV is not None
            rows.append(stack_ids(output.routing, width))
            if mine:
                predicted_T = output.logits_BTV.argmax(-1).flatten()
                counts.update(output.routing, {"predicted_token": predicted_T}, (batch.targets != IGNORED).flatten())
        now_RTLK = torch.stack(rows)
        found = {"ids": self._all_rows(now_RTLK, probe)}
        if self._before_RTLK is not None:
            own = slice(probe.num_own)
            share_TL = overlap(now_RTLK[own].flatten(0, 1), self._before_RTLK[own].flatten(0, 1), width)
            sums = torch.cat([share_TL.sum(0), share_TL.new_tensor([float(len(share_TL))])])
            dist.all_reduce(sums)
            found["saturation"] = sums[:-1] / sums[-1]
        self._before_RTLK = now_RTLK
        return found

    def _all_rows(self, now_RTLK: Tensor, probe: Probe) -> Tensor:
        """The rows of all workers, in the order of the probe's samples."""
        mine = now_RTLK.to(torch.int32)
        pieces = [torch.empty_like(mine) for _ in range(self.ranks.world_size)]
        dist.all_gather(pieces, mine)
        return torch.stack(pieces, dim=1).flatten(0, 1)[: probe.num_samples]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _kinds(data: Mixture, vocab_size: int) -> list[Labels]:
    """What is known of the tokens of a batch."""
    kinds = [Labels("input_token", vocab_size), Labels("target_token", vocab_size)]
    kinds.append(Labels("domain", len(data.source_names), tuple(data.source_names)))
    if data.language_names:
        kinds.append(Labels("language", len(data.language_names), data.language_names))
    return kinds


def token_text(data: Mixture) -> Callable[[int], str]:
    """What a token id stands for; bytes that are no character by themselves are replaced."""
    tokenizer = data.config.tokenizer.build()
    return lambda token: tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")
