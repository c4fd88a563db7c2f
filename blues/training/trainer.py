"""The training loop, the same for one process and for many.

In: a model, a `Mixture` of training data and one of validation data, and the folder where the run lies.
Out: checkpoints in that folder, and events (training and validation metrics) for an `Observer`.

An update is a pure function of the checkpoint before it: the samples follow from the step (`rank_indices`), the router
noise from (seed, step, micro step, worker). A run that was killed and resumed ends with the same weights, bit for bit.

Metrics: train/{loss, cross_entropy, load_balancing, router_z, gradient_norm, learning_rate, tokens}, throughput/
{step_seconds, tokens_per_second, checkpoint_seconds}, experts/..., attention/...,
validation/{loss, perplexity, loss/<source>}, with learned attention spans train/attention_span (tokens), with
early exits train/exit_loss, and where tokens may pass layers by validation/layers (share of them that was computed).
Cross-entropies are means over the targets of a global batch, without padding; tokens are all inputs, padding included.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from blues import config as cfg
from blues.data.mixture.batches import Batch, Mixture, rank_indices
from blues.errors import ConfigError, TrainingError
from blues.model.attention.precision import overflow_metrics
from blues.model.losses import UpdateLoad
from blues.model.moe.layer import MoE, mixtures
from blues.model.moe.rules.switch_off import switched_on_metrics
from blues.model.transformer import Transformer
from blues.tracking.metrics import ExpertStatistics
from blues.training.adaptation import RouterAdaptation
from blues.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    state_key,
    write_checkpoint,
)
from blues.training.curriculum import Curriculum, Stage, check_stages
from blues.training.engine import Engine
from blues.training.observer import Event, Kind, Observer
from blues.training.optim import AdamW, Cosine, Optimizer, Schedule
from blues.training.parallel import Parallel, Precision, Ranks, arithmetic
from blues.training.sequence_parallel import SequenceParallel
from blues.training.specialization import SpecializationLog
from blues.training.validation import Validation

LOSSES = ("total", "cross_entropy", "load_balancing", "router_z")
NAMES = {"total": "loss"}


@dataclass(frozen=True)
class Outcome:
    """How a stretch of training ended: the last update, whether it was the last of the run, the newest checkpoint."""

    step: int
    finished: bool
    saved_step: int


class Trainer(cfg.Configurable):
    """Trains one model on one mixture."""

    @cfg.configclass
    class Config(cfg.Config):
        """The length of the run, the batch, and what happens every so many steps.

        steps: updates in all. global_batch_size: sequences per update over all workers; micro_batch_size: sequences
        per worker and forward pass (the rest is accumulated). context: stages of a curriculum of growing context, in
        which sequences are cut into shorter rows. gradient_clipping: largest global gradient norm, 0 for
        none. precision: `auto` is bf16 with fp32 master weights where the device has it, else fp32. log_every,
        validate_every, checkpoint_every: in steps, 0 for never (the last step always gets all three).
        validation_samples: sequences of the validation split, always the same. keep_checkpoints: newest ones that
        stay. specialization: what each expert learned, at the end unless it says otherwise. max_failures: restarts of
        the workers after a crash before the run gives up. seed: of the weights and of the router noise.
        """

        steps: int = 10_000
        global_batch_size: int = 256
        micro_batch_size: int = 8
        context: tuple[Stage, ...] = ()
        optimizer: Optimizer.Config = AdamW.Config()
        schedule: Schedule.Config = Cosine.Config()
        gradient_clipping: float = 1.0
        precision: Precision = "auto"
        parallel: Parallel.Config = Parallel.Config()
        log_every: int = 10
        validate_every: int = 500
        validation_samples: int = 256
        checkpoint_every: int = 500
        keep_checkpoints: int = 2
        specialization: SpecializationLog.Config = SpecializationLog.Config()
        max_failures: int = 3
        seed: int = 0

        def __post_init__(self) -> None:
            for name in ("steps", "global_batch_size", "micro_batch_size", "keep_checkpoints"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
            for name in ("log_every", "validate_every", "validation_samples", "checkpoint_every", "max_failures"):
                if getattr(self, name) < 0:
                    raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}")
            if self.gradient_clipping < 0:
                raise ConfigError(f"gradient_clipping must be >= 0 (0 for none), got {self.gradient_clipping}")
            check_stages(self.context)
            at_once = self.micro_batch_size * self.parallel.data_parallel_size
            if self.global_batch_size % at_once:
                sharing = self.parallel.sequence_parallel_size
                workers = f"parallel.num_workers {self.parallel.num_workers}"
                if sharing > 1:
                    workers += f" / parallel.sequence_parallel_size {sharing}"
                raise ConfigError(
                    f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                    f"{self.micro_batch_size} x {workers}; nearest that fits: "
                    f"{max(1, round(self.global_batch_size / at_once)) * at_once}"
                )

        @property
        def accumulation(self) -> int:
            """Forward passes per worker and update."""
            return self.global_batch_size // (self.micro_batch_size * self.parallel.data_parallel_size)

    config: Config

    def __init__(
        self,
        config: Trainer.Config,
        *,
        model: Transformer,
        train_data: Mixture,
        validation_data: Mixture | None,
        run_dir: str | Path,
        tree: Mapping[str, Any],
        observer: Observer | None = None,
    ) -> None:
        """`tree` is the experiment's dump, kept in every checkpoint. All workers get the same arguments, except that
        only worker 0's observer hears events."""
        self.config, self.model, self.tree = config, model, dict(tree)
        self.train_data, self.validation_data = train_data, validation_data
        self.run_dir, self.observer = Path(run_dir), observer or Observer()

    def run(self) -> Outcome:
        """Train from the newest checkpoint of the run folder, or from the start, to the last step or a wish to stop.

        Raises:
            ConfigError: the device or the number of workers is not there.
            CheckpointError: the newest checkpoint has other shapes or was trained on other data.
        """
        with self.config.parallel.build().join() as ranks:
            sequence = SequenceParallel(self.model, ranks)
            with sequence.shared():
                return _Loop(self, ranks, sequence).run()


class _Loop:
    """One stretch of training on one worker."""

    def __init__(self, trainer: Trainer, ranks: Ranks, sequence: SequenceParallel) -> None:
        self.config, self.ranks, self.sequence = trainer.config, ranks, sequence
        self.run_dir, self.tree, self.observer = trainer.run_dir, trainer.tree, trainer.observer
        self.data, model = trainer.train_data, trainer.model
        self.model = model
        config, parallel = self.config, self.config.parallel
        self.dtype = arithmetic(config.precision, parallel.zero_stage, ranks.device)
        self.schedule: Schedule = config.schedule.build(total_steps=config.steps)
        length = self.data.config.sequence_length
        self.curriculum = Curriculum(config.context, steps=config.steps, sequence_length=length)
        self.tokens_per_step = config.global_batch_size * length
        self.step = 0
        checkpoint = self._find_checkpoint()
        # Counted now: ZeRO-3 empties what it splits.
        self.num_parameters, self.num_active_parameters = model.num_parameters(), model.num_active_parameters()
        self.model.to(ranks.device)
        self.engine = Engine(
            self.model,
            config.optimizer.build(),
            ranks,
            zero_stage=parallel.zero_stage,
            dtype=self.dtype,
            micro_batch_size=config.micro_batch_size,
            accumulation=config.accumulation,
            gradient_clipping=config.gradient_clipping,
            leaf_modules=(MoE,),
        )
        self._prime(checkpoint)
        self.validation = None
        if trainer.validation_data is not None and config.validation_samples:
            samples, size = config.validation_samples, config.micro_batch_size
            self.validation = Validation(trainer.validation_data, samples, size, ranks, sequence)
        self.experts = None
        if layers := mixtures(self.model):
            sizes = [moe.router.num_experts for _, moe in layers]
            self.experts = ExpertStatistics([layer for layer, _ in layers], sizes, ranks.device)
        self.specialization: SpecializationLog = config.specialization.build(
            model=self.model,
            train_data=self.data,
            held_out=trainer.validation_data,
            ranks=ranks,
            run_dir=self.run_dir,
            steps=config.steps,
            tokens_per_step=self.tokens_per_step,
            step=self.step,
        )
        self.adaptation, self.load = RouterAdaptation(self.model), UpdateLoad()
        learned_spans = any(layer.span is not None for layer in self.model.attentions)
        self.loss_names = (
            *LOSSES,
            *(("attention_span",) if learned_spans else ()),
            *(() if model.depth is None else model.depth.losses),
        )
        self.compute: Tensor | None = None
        """What the forwards of this update computed, in models that leave something out."""
        self.losses = torch.zeros(len(self.loss_names), dtype=torch.float64, device=ranks.device)
        self._restart_clock()

    def run(self) -> Outcome:
        """From `self.step` to the end."""
        self._send("start", details=self._facts())
        if self.step == self.config.steps:  # killed after its last checkpoint, before it could say so
            self._validate()
        stopped, saved = False, self.step
        ahead = self.data.prefetch(self._index_lists(self.step), self.ranks.device)
        with contextlib.closing(ahead) as micro_batches:
            self._restart_clock()
            while self.step < self.config.steps and not stopped:
                self._update(micro_batches)
                if self._due(self.config.validate_every):
                    self._validate()
                if self.specialization.due(self.step):
                    self._report_specialization()
                stopped = self.ranks.any(self.observer.should_stop())
                if stopped or self._due(self.config.checkpoint_every):
                    self._save()
                    saved = self.step
        outcome = Outcome(step=self.step, finished=self.step == self.config.steps, saved_step=saved)
        self._send("end", details={"finished": outcome.finished})
        return outcome

    def _due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _index_lists(self, start: int) -> Iterator[list[int]]:
        """The sample indices of each of this worker's micro batches from update `start` on. Read in another thread."""
        for step in range(start, self.config.steps):
            for micro_step in range(self.config.accumulation):
                yield self._indices(step, micro_step)

    def _indices(self, step: int, micro_step: int) -> list[int]:
        config, ranks = self.config, self.ranks
        place = ranks.data_rank, ranks.data_world_size
        return rank_indices(step, micro_step, *place, config.micro_batch_size, config.global_batch_size)

    def _update(self, micro_batches: Iterator[Batch]) -> None:
        """One step; its figures are those of its own global batch, so a resumed run logs what an unbroken one does."""
        self.step += 1
        log = self._due(self.config.log_every)
        specialize = self.specialization.counts(self.step)
        if log:
            self.losses.zero_()
            self.compute = None
        if self.experts is not None:
            self.experts.next_update()

        num_targets = self._targets_per_micro_batch(self.step - 1)
        self.load.reset()

        def micro_batch(index: int) -> Tensor:
            torch.manual_seed(noise_seed(self.config.seed, self.step, index, self.ranks.rank))
            batch = self.curriculum.cut(next(micro_batches), self.step - 1)
            batch = self.sequence.part(batch).to(self.ranks.device)
            output = self._forward(
                batch,
                num_targets=num_targets,
                progress=(self.step - 1) / self.config.steps,
                load=self.load,
            )
            self.adaptation.add(output.routing)
            if self.experts is not None:
                self.experts.update(output.routing)
            if specialize:
                self.specialization.add(batch, output.routing)
            if log:
                self.losses += torch.stack([getattr(output.losses, name) for name in self.loss_names]).detach()
                if output.compute_LC is not None:
                    self.compute = output.compute_LC if self.compute is None else self.compute + output.compute_LC
            return output.losses.total

        rate_factor = self.schedule.factor(self.step - 1)
        gradient_norm = float(self.engine.update(micro_batch, rate_factor))
        if not 0 <= gradient_norm < math.inf:  # DeepSpeed says -1 for one that is not a number
            raise TrainingError(
                f"the gradient of step {self.step:,} is not finite: training diverged. Nothing was saved of it; lower "
                f"training.optimizer.lr, raise training.schedule.warmup_steps or clip harder "
                f"(training.gradient_clipping), and start with --fresh or another --run-dir"
            )
        self.adaptation.finish()
        if specialize:
            self.specialization.next_update()
        if log:
            self._log(gradient_norm, self.config.optimizer.lr * rate_factor)

    def _targets_per_micro_batch(self, update: int) -> float:
        """Targets that are not padding in a micro batch of this update (from 0), in the mean over all workers'."""
        size = self.config.global_batch_size
        targets = self.data.num_targets(range(update * size, (update + 1) * size))
        return targets / (self.config.accumulation * self.ranks.world_size)

    def _forward(self, batch: Batch, **options: Any) -> Any:
        """The model's output; `options` as in `Transformer.forward`."""
        batch = batch.to(self.ranks.device)
        return self.engine(batch.inputs, batch.targets, documents=batch.documents, languages=batch.languages, **options)

    def _report_specialization(self) -> None:
        def route(batch: Batch) -> Any:
            return self.engine(batch.inputs, documents=batch.documents, languages=batch.languages)

        with self._off_the_clock(), self.sequence.whole():
            self.engine.train(False)
            metrics, path = self.specialization.report(self.step, route)
            self.engine.train(True)
            self._send("specialization", metrics, details={"path": str(path)})

    def _log(self, gradient_norm: float, learning_rate: float) -> None:
        """Average this step's figures over the workers (one reduction, one copy to the host) and send them."""
        values = [self.losses] if self.experts is None else [self.losses, self.experts.counts.flatten()]
        if self.compute is not None:
            values.append(self.compute.flatten())
        together = torch.cat([value.double() for value in values])
        dist.all_reduce(together)
        parts = together.split([value.numel() for value in values])
        losses = (parts[0] / (self.config.accumulation * self.ranks.world_size)).tolist()
        metrics = {f"train/{NAMES.get(name, name)}": loss for name, loss in zip(self.loss_names, losses, strict=True)}
        metrics["train/gradient_norm"] = gradient_norm
        metrics["train/learning_rate"] = learning_rate
        metrics["train/tokens"] = float(self.step * self.tokens_per_step)
        seconds = (time.perf_counter() - self._clock) / (self.step - self._clock_step)
        metrics["throughput/step_seconds"] = seconds
        metrics["throughput/tokens_per_second"] = self.tokens_per_step / seconds
        metrics |= self.model.block_masks.metrics()
        metrics |= switched_on_metrics(mixtures(self.model))
        metrics |= overflow_metrics(layer.attend.precision for layer in self.model.attentions)
        if self.compute is not None:
            counts_LC = parts[-1].view_as(self.compute).long().tolist()
            metrics |= self.model.compute_metrics(counts_LC, self.data.config.sequence_length)
        load = None
        if self.experts is not None:
            self.experts.counts.copy_(parts[1].view_as(self.experts.counts))
            summary = self.experts.read()
            metrics |= summary.metrics()
            load = summary.load_LE
            self.experts.reset()
        self._send("train", metrics, expert_load=load)
        self._restart_clock()

    def _validate(self) -> None:
        if self.validation is None:
            return
        with self._off_the_clock():
            self.engine.train(False)
            metrics = self.validation.run(self._forward)
            self.engine.train(True)
            self._send("validation", metrics)

    def _save(self) -> None:
        """Write a checkpoint: every worker gathers, worker 0 writes, all wait for it."""
        with self._off_the_clock():
            began = time.perf_counter()
            first = self.ranks.rank == 0
            trained = {name: value.cpu() for name, value in self.engine.master_weights() if first}
            states = {state_key(n, k): value.cpu() for n, k, value in self.engine.optimizer_state() if first}
            if first:
                self.observer.flush()
                buffers = {n: b.cpu() for n, b in self.model.state_dict().items() if n not in trained}
                path = write_checkpoint(
                    self.run_dir,
                    step=self.step,
                    tokens=self.step * self.tokens_per_step,
                    data_fingerprint=self.data.fingerprint_until(self.step * self.config.global_batch_size),
                    tree=self.tree,
                    model_state=trained | buffers,
                    optimizer_state=states,
                    details={
                        "world_size": self.ranks.world_size,
                        "zero_stage": self.config.parallel.zero_stage,
                        "dtype": str(self.dtype),
                    },
                )
                prune_checkpoints(self.run_dir, self.config.keep_checkpoints, written=path)
                seconds = time.perf_counter() - began
                self._send("checkpoint", {"throughput/checkpoint_seconds": seconds}, details={"path": str(path)})
            self.ranks.barrier()

    def _find_checkpoint(self) -> Checkpoint | None:
        """The newest good checkpoint, chosen by worker 0 for all, with its weights put into the model."""

        def report(message: str) -> None:
            self._send("warning", details={"message": message})

        path = latest_checkpoint(self.run_dir, report) if self.ranks.rank == 0 else None
        path = self.ranks.from_first(path and str(path))
        if path is None:
            return None
        checkpoint = read_checkpoint(path, verify=False)
        checkpoint.check_shapes(self.model, self.tree)
        samples = checkpoint.step * self.config.global_batch_size
        checkpoint.check_data(self.data.fingerprint_until(samples), samples, self.tree)
        self.model.load_state_dict(checkpoint.load_model_state())
        return checkpoint

    def _prime(self, checkpoint: Checkpoint | None) -> None:
        """Check the flow of gradients, which also makes the optimizer's state, and fill that from the checkpoint."""
        batch = self.sequence.part(self.data.batch(self._indices(0, 0)))
        self.engine.require_gradients(lambda: self._forward(batch).losses.total)
        if checkpoint is None:
            self.engine.set_step(0)
            return
        self.step = checkpoint.step
        with checkpoint.open_optimizer() as states, checkpoint.open_model() as weights:
            self.engine.load_state(
                checkpoint.step,
                weights.get_tensor,
                lambda name, kind: states.get_tensor(state_key(name, kind)),
            )

    def _facts(self) -> dict[str, Any]:
        """What a person wants to know at the start."""
        return {
            "device": str(self.ranks.device.type),
            "dtype": str(self.dtype).removeprefix("torch."),
            "world_size": self.ranks.world_size,
            "zero_stage": self.config.parallel.zero_stage,
            "parameters": self.num_parameters,
            "active_parameters": self.num_active_parameters,
            "tokens_per_step": self.tokens_per_step,
            "backends": self.model.backends(self.ranks.device, self.dtype),
        }

    def _send(self, kind: Kind, metrics: dict[str, float] | None = None, **rest: Any) -> None:
        if self.ranks.rank == 0:
            self.observer.send(Event(kind=kind, step=self.step, metrics=metrics or {}, **rest))

    def _restart_clock(self) -> None:
        self._clock, self._clock_step = time.perf_counter(), self.step

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Keep what happens inside out of the throughput."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began


def noise_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """The random state of one forward pass (router noise), the same in a resumed and in an unbroken run."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{step}:{micro_step}:{rank}".encode()) >> 1
