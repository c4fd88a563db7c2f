"""What extensions of a context have in common: a factor, and the length that the model was first trained for.

In: settings and the model's max_seq_len. Out: base classes of the variants beside this file.
"""

from __future__ import annotations

import math

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.rope.rotary import Geometric


class Scaled(Geometric):
    """Geometric frequencies, slowed for a context `factor` times longer."""

    @cfg.configclass
    class Config(Geometric.Config):
        factor: float = 4.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not (self.factor >= 1 and math.isfinite(self.factor)):
                raise ConfigError(f"factor: a context is extended by 1 (not at all) or more, got {self.factor}")

    config: Config


class Extended(Scaled):
    """Scaled with regard to the length that the model was first trained for."""

    @cfg.configclass
    class Config(Scaled.Config):
        original_length: int | None = None
        """Tokens of the context before the extension; None: max_seq_len / factor."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.original_length is not None and self.original_length < 2:
                raise ConfigError(f"original_length: must be at least 2 tokens, got {self.original_length}")

    config: Config

    def __init__(self, config: Config, *, head_dim: int, max_seq_len: int | None = None) -> None:
        super().__init__(config, head_dim=head_dim, max_seq_len=max_seq_len)
        self.original_length = original_length_of(config, max_seq_len)


def original_length_of(config: Extended.Config, max_seq_len: int | None) -> int:
    """The context before the extension.

    Raises:
        ConfigError: it is longer than the one after, or neither is known.
    """
    if config.original_length is None:
        if max_seq_len is None:
            raise ConfigError(
                f"attention.rope.original_length: {config._variant} needs it where max_seq_len is unknown"
            )
        return max(2, int(max_seq_len / config.factor))
    if max_seq_len is not None and config.original_length > max_seq_len:
        raise ConfigError(
            f"attention.rope.original_length: {config.original_length} tokens before the extension are more than the "
            f"{max_seq_len} after it (max_seq_len); {config._variant} has nothing to extend"
        )
    return config.original_length
