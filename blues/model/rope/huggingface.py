"""Rotary embeddings as transformers writes them: `rope_parameters`.

In: a rotary embedding. Out: the dictionary with which transformers rotates alike; and back.

    plain, base_change, ntk -> default (a base says it all, so they come back as plain)
    linear -> linear        dynamic_ntk -> dynamic       yarn -> yarn
    longrope -> longrope    llama3 -> llama3             p_rope -> proportional
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blues.errors import ConfigError
from blues.model.rope.base_change import BaseChange
from blues.model.rope.linear import LinearInterpolation
from blues.model.rope.llama3 import Llama3
from blues.model.rope.longrope import LongRoPE
from blues.model.rope.ntk import DynamicNTK, NTKAware
from blues.model.rope.p_rope import PRoPE
from blues.model.rope.rotary import PlainRotary, RotaryEmbedding
from blues.model.rope.yarn import YaRN


def to_rope_parameters(rope: RotaryEmbedding) -> dict[str, Any]:
    """The `rope_parameters` of this embedding. For `dynamic`, `max_position_embeddings` must be its original length.

    Raises:
        ConfigError: transformers has no such method.
    """
    config = rope.config
    if isinstance(rope, (PlainRotary, BaseChange, NTKAware)):
        theta = rope.theta if isinstance(rope, (BaseChange, NTKAware)) else rope.config.theta
        return {"rope_type": "default", "rope_theta": theta}
    if isinstance(rope, PRoPE):
        # transformers counts pairs by int(share * channels // 2): half a pair more, and rounding cannot lose one
        share = (rope.turning + (rope.turning < rope.head_dim // 2) / 2) / (rope.head_dim // 2)
        return {"rope_type": "proportional", "rope_theta": config.theta, "partial_rotary_factor": share}
    if isinstance(rope, LinearInterpolation):
        return {"rope_type": "linear", "rope_theta": config.theta, "factor": config.factor}
    if isinstance(rope, DynamicNTK):
        return {"rope_type": "dynamic", "rope_theta": config.theta, "factor": config.factor}
    if not isinstance(rope, (YaRN, LongRoPE, Llama3)):
        raise ConfigError(
            f"attention.rope={config._variant}: Qwen3-MoE cannot express it, so this model cannot be exported"
        )
    common = {
        "rope_type": config._variant,
        "rope_theta": config.theta,
        "factor": config.factor,
        "original_max_position_embeddings": rope.original_length,
    }
    if isinstance(rope, YaRN):
        ramp = {"beta_fast": config.beta_fast, "beta_slow": config.beta_slow, "truncate": config.truncate}
        return {**common, **ramp, **_given(config, "attention_factor", "mscale", "mscale_all_dim")}
    if isinstance(rope, LongRoPE):
        lists = {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
        return {**common, **lists, **_given(config, "attention_factor")}
    return {**common, "low_freq_factor": config.low_freq_factor, "high_freq_factor": config.high_freq_factor}


def from_rope_parameters(values: Mapping[str, Any]) -> tuple[RotaryEmbedding.Config, int]:
    """The rotary embedding of a config.json (`values`), and the model's max_seq_len.

    transformers 5 writes `rope_parameters`; before, `rope_scaling` stood beside `rope_theta`. With `dynamic`,
    `max_position_embeddings` is the length before the extension.

    Raises:
        ConfigError: a method that Blues does not know, or settings that do not fit it.
        KeyError: a setting that the method needs is missing.
    """
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = {name: value for name, value in given.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0)
    length = values["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings", length)
    theta: dict[str, Any] = {"theta": float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))}
    if kind == "proportional" and rope.get("factor", 1.0) == 1.0:
        return PRoPE.Config(**theta, fraction=share), length
    if kind not in READ or share != 1.0:
        raise ConfigError(f"config.json: Blues cannot express rope_type={kind!r} in {dict(given)!r}")
    if kind == "default":
        return PlainRotary.Config(**theta), length
    scaled: dict[str, Any] = {**theta, "factor": float(rope["factor"] if "factor" in rope else length / original)}
    if kind == "linear":
        return LinearInterpolation.Config(**scaled), length
    if kind == "dynamic":
        return DynamicNTK.Config(**scaled, original_length=length), int(length * scaled["factor"])
    if kind == "yarn":
        return YaRN.Config(**scaled, original_length=original, **_settings_of_yarn(rope)), length
    if kind == "longrope":
        lists: dict[str, Any] = {name: tuple(map(float, rope[name])) for name in ("short_factor", "long_factor")}
        factor = rope.get("attention_factor")
        return LongRoPE.Config(**scaled, original_length=original, **lists, attention_factor=factor), length
    bounds: dict[str, Any] = {name: float(rope[name]) for name in ("low_freq_factor", "high_freq_factor")}
    return Llama3.Config(**scaled, original_length=original, **bounds), length


def _given(config: RotaryEmbedding.Config, *names: str) -> dict[str, Any]:
    """Settings that are not left to their default, which transformers computes alike."""
    return {name: value for name in names if (value := getattr(config, name)) is not None}


READ = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def _settings_of_yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Of the ramp and of attention; `attention_factor` counts before `mscale`, which counts with `mscale_all_dim`."""
    settings: dict[str, Any] = {
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "truncate": rope.get("truncate", True),
    }
    if "attention_factor" in rope:
        settings["attention_factor"] = float(rope["attention_factor"])
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        settings |= {name: float(rope[name]) for name in ("mscale", "mscale_all_dim")}
    return settings
