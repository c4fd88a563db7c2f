"""What a checkpoint knows, as one report: loss per source, bits per byte, and what every expert did."""

from __future__ import annotations

from blues import config as cfg
from blues.config import Configurable, configclass
from blues.errors import ConfigError


class Evaluation(Configurable):
    """Scores texts and dataset splits with a model."""

    @configclass
    class Config(cfg.Config):
        split: str = "validation"
        """The split of the dataset that is scored."""
        max_tokens: int = 100_000
        """Tokens scored per source, spread evenly over the split; 0 = all of them."""
        context: int = 0
        """Tokens the model sees at once; 0 = its max_seq_len."""
        stride: int = 0
        """Tokens by which a window moves on; 0 = half the context, so every token but the first has at least half
        a window before it."""
        batch_size: int = 8
        """Windows per forward pass."""

        def __post_init__(self) -> None:
            if self.batch_size < 1:
                raise ConfigError(f"batch_size must be at least 1 window, got {self.batch_size}")
            for name in ("max_tokens", "context", "stride"):
                if getattr(self, name) < 0:
                    raise ConfigError(f"{name} must be 0 (the default) or a positive count, got {getattr(self, name)}")
            if self.context and self.stride > self.context:
                raise ConfigError(
                    f"stride must not exceed context ({self.context}): tokens would be skipped; got {self.stride}"
                )

    def __init__(self, config: Config) -> None:
        self.config = config
