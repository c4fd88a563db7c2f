"""The root of the configuration tree: everything a run is made of, in one value.

In: the `Config` of each room. Out: `Experiment`, which names them, checks what no room can check alone, and is saved
whole with every run, so that any run can be started again from its record. Named experiments live in
`tuning/experiments.py`; the command line takes a name (or a YAML file) plus dotted overrides.

It stands after the rooms whose settings it holds and before `cluster`, which carries it to the workers.
"""

from __future__ import annotations

from blues import config as cfg
from blues.data.mixture.batches import Mixture
from blues.data.tokenizer import WHOLE_VOCABULARY
from blues.errors import ConfigError
from blues.evaluation.suite import Evaluation
from blues.inference.sampling import Sampling
from blues.model.transformer import Transformer
from blues.tracking.tracker import Tracking
from blues.training import sequence_parallel
from blues.training.curriculum import check_lengths
from blues.training.trainer import Trainer


@cfg.configclass
class Experiment(cfg.Config):
    """One run: the data it reads, the model it trains, how, and where its figures go.

    Raises:
        ConfigError: settings that contradict one another across rooms, each with the two paths and the remedy.
    """

    name: str
    data: Mixture.Config
    model: Transformer.Config
    training: Trainer.Config
    tracking: Tracking.Config = Tracking.Config()
    inference: Sampling.Config = Sampling.Config()
    evaluation: Evaluation.Config = Evaluation.Config()

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"name must be usable as a folder's name, got {self.name!r}")
        if self.data.sequence_length > self.model.max_seq_len:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length} is longer than the model's context "
                f"model.max_seq_len={self.model.max_seq_len}; shorten the one or raise the other"
            )
        check_lengths(self.training.context, self.data.sequence_length)
        if self.model.sequence_chunk is not None and self.training.parallel.zero_stage == 3:
            raise ConfigError(
                f"model.sequence_chunk={self.model.sequence_chunk} uses every weight several times in a forward, and "
                "ZeRO-3 takes in one gradient for each; set training.parallel.zero_stage to 2, or model.sequence_chunk "
                "to null"
            )
        sequence_parallel.check(
            self.training.parallel.sequence_parallel_size,
            self.model,
            sequence_length=self.data.sequence_length,
            stages=self.training.context,
        )
        vocab_size = self.data.tokenizer.vocab_size or WHOLE_VOCABULARY
        if vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"data.tokenizer.vocab_size={self.data.tokenizer.vocab_size or 'null'} gives {vocab_size:,} token ids, "
                f"more than the model's embedding has (model.vocab_size={self.model.vocab_size}); set both to the same "
                "number"
            )
