"""Wavelengths that are whole numbers of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.rope.extension import Extended
from blues.model.rope.nope import NoPE
from blues.model.rope.rotary import PlainRotary, RotaryEmbedding


class Resonance(RotaryEmbedding, variant="resonance"):
    """Resonance RoPE (arXiv 2403.00071): wavelengths below the original length are rounded to whole tokens.

    A pair with a whole wavelength shows at positions never trained on the very phases that training has shown; with
    another every new position is a new phase. It goes on top of another variant, e.g. `of=yarn`, after its scaling.

    original_length: None is that of `of`, or max_seq_len where `of` has none.
    """

    @cfg.configclass
    class Config(RotaryEmbedding.Config):
        of: RotaryEmbedding.Config = PlainRotary.Config()
        original_length: int | None = None

        def __post_init__(self) -> None:
            if isinstance(self.of, (NoPE.Config, Resonance.Config)):
                raise ConfigError(f"of: {self.of._variant} has no wavelengths to round; choose another rope")
            if self.original_length is not None and self.original_length < 2:
                raise ConfigError(f"original_length: must be at least 2 tokens, got {self.original_length}")

    config: Config

    def __init__(self, config: Config, *, head_dim: int, max_seq_len: int | None = None) -> None:
        super().__init__(config, head_dim=head_dim, max_seq_len=max_seq_len)
        self.of: RotaryEmbedding = config.of.build(head_dim=head_dim, max_seq_len=max_seq_len)
        self.attention_factor, self.depends_on_length = self.of.attention_factor, self.of.depends_on_length
        original = self.of.original_length if isinstance(self.of, Extended) else max_seq_len
        length = config.original_length or original
        if length is None:
            raise ConfigError("attention.rope.original_length: resonance needs it where max_seq_len is unknown")
        if max_seq_len is not None and length > max_seq_len:
            raise ConfigError(
                f"attention.rope.original_length: {length} tokens are more than the model ever sees (max_seq_len "
                f"{max_seq_len})"
            )
        self.original_length: int = length

    def length_key(self, length: int) -> int:
        """See the family."""
        return self.of.length_key(length)

    def wavelengths(self, device: torch.device, length: int | Tensor) -> Tensor:
        """Whole tokens per turn of each pair, (C/2,) float32; inf where it is not below the original length."""
        exact_P = 2 * math.pi / self.of.frequencies(device, length)
        return torch.where(exact_P < self.original_length, exact_P.round().clamp(min=1), torch.inf)

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        wavelengths_P = self.wavelengths(device, length)
        return torch.where(wavelengths_P.isinf(), self.of.frequencies(device, length), 2 * math.pi / wavelengths_P)

    def angles(self, positions_BT: Tensor, length: int | Tensor) -> Tensor:
        """See the family. Counted from the turn's own beginning, so that phases repeat bit for bit."""
        wavelengths_P = self.wavelengths(positions_BT.device, length)
        positions_BT1 = positions_BT[..., None].float()
        within_BTP = torch.where(wavelengths_P.isinf(), positions_BT1, positions_BT1.remainder(wavelengths_P))
        return within_BTP * self.frequencies(positions_BT.device, length)
