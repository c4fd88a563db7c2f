"""Blues models as transformers' Qwen3MoeForCausalLM, and back.

In: a `Transformer` (and its tokenizer). Out: a directory that `transformers.AutoModelForCausalLM` and every serving
engine that knows Qwen3-MoE can load, with the same logits; or, from such a directory, a configuration and weights.

The two models compute the same; names and shapes differ. Blues keeps one matrix for queries, keys and values and one
for gate and up; Qwen3-MoE has one each. Router noise belongs to training alone and is not exported.

Experts come in two layouts: one matrix per expert (the files on the hub, read by transformers 4 and 5 and by vLLM and
SGLang) and fused (the modules of transformers 5). `export_huggingface` writes the first; both are read.

Legend: V vocabulary, D width, E experts, F expert width, G = 2F, H query heads, C channels of a head.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blues import config as cfg
from blues.config import write_atomic
from blues.data.tokenizer import Tokenizer
from blues.errors import CheckpointError, ConfigError
from blues.model.attention.layer import Attention
from blues.model.attention.patterns import AttentionPattern, Causal, SlidingWindow
from blues.model.huggingface_tokenizer import tokenizer_files
from blues.model.moe.layer import MoE
from blues.model.moe.routers import NoisyTopK, SoftmaxTopK
from blues.model.moe.rules import SkipLight, SwitchOff
from blues.model.rope import DynamicNTK, RotaryEmbedding
from blues.model.rope.huggingface import from_rope_parameters, to_rope_parameters
from blues.model.transformer import Transformer, is_mixture

MODEL_TYPE = "qwen3_moe"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_KEY = "blues_tokenizer"
"""Where config.json keeps the Blues tokenizer's configuration; other readers ignore it."""

StateDict = dict[str, Tensor]


class Imported(NamedTuple):
    """A model read from a Hugging Face directory."""

    config: Transformer.Config
    state: StateDict
    """Names of `Transformer.state_dict()`."""
    tokenizer: Tokenizer.Config | None
    """Known for exports of Blues only."""


def to_huggingface(
    config: Transformer.Config, state: Mapping[str, Tensor], *, fused_experts: bool = False
) -> tuple[dict[str, Any], StateDict]:
    """The content of config.json and the weights of the equal `Qwen3MoeForCausalLM`.

    Args:
        state: as `Transformer.state_dict()` names it (or gradients under the same names). Nothing is copied.
        fused_experts: name experts as the modules of transformers 5 do, instead of one matrix per expert.

    Raises:
        ConfigError: the model has something that Qwen3-MoE cannot express.
    """
    hf_config = _config_to_huggingface(config)
    hf_state = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["norm.weight"]}
    if not config.tie_embeddings:
        hf_state["lm_head.weight"] = state["head.weight"]
    heads, kv_heads = config.attention.num_heads, config.attention.num_kv_heads
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        for name, hf_name in LAYER_NAMES.items():
            hf_state[theirs + hf_name] = state[ours + name]
        qkv = state[ours + "attention.qkv.weight"].unflatten(0, (-1, config.attention.head_dim))
        for name, part in zip("qkv", qkv.split((heads, kv_heads, kv_heads)), strict=True):
            hf_state[f"{theirs}self_attn.{name}_proj.weight"] = part.flatten(0, 1)
        if not is_mixture(config, layer):
            gate, up = state[ours + "feed_forward.gate_up.weight"].chunk(2)
            hf_state[theirs + "mlp.gate_proj.weight"] = gate
            hf_state[theirs + "mlp.up_proj.weight"] = up
            hf_state[theirs + "mlp.down_proj.weight"] = state[ours + "feed_forward.down.weight"]
            continue
        hf_state[theirs + "mlp.gate.weight"] = state[ours + "feed_forward.router.weight"]
        gate_up_EGD = state[ours + "feed_forward.experts.gate_up_EGD"]
        down_EDF = state[ours + "feed_forward.experts.down_EDF"]
        if fused_experts:
            hf_state[theirs + "mlp.experts.gate_up_proj"] = gate_up_EGD
            hf_state[theirs + "mlp.experts.down_proj"] = down_EDF
            continue
        for expert, (gate_up_GD, down_DF) in enumerate(zip(gate_up_EGD, down_EDF, strict=True)):
            gate_FD, up_FD = gate_up_GD.chunk(2)
            hf_state[f"{theirs}mlp.experts.{expert}.gate_proj.weight"] = gate_FD
            hf_state[f"{theirs}mlp.experts.{expert}.up_proj.weight"] = up_FD
            hf_state[f"{theirs}mlp.experts.{expert}.down_proj.weight"] = down_DF
    return hf_config, hf_state


def from_huggingface(
    hf_config: Mapping[str, Any], hf_state: Mapping[str, Tensor]
) -> tuple[Transformer.Config, StateDict]:
    """The inverse of `to_huggingface`; experts may come in either layout. The router becomes `softmax_top_k`.

    Raises:
        ConfigError: the configuration is not one that Blues can express.
        CheckpointError: weights are missing, left over, or of another shape than the configuration says.
    """
    config = _config_from_huggingface(hf_config)
    rest = dict(hf_state)

    def take(name: str) -> Tensor:
        if name not in rest:
            raise CheckpointError(f"the weights lack {name!r}; the directory is incomplete or of another architecture")
        return rest.pop(name)

    state = {"embedding.weight": take("model.embed_tokens.weight"), "norm.weight": take("model.norm.weight")}
    if config.tie_embeddings:
        rest.pop("lm_head.weight", None)  # some writers repeat the tied matrix
    else:
        state["head.weight"] = take("lm_head.weight")
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        for name, hf_name in LAYER_NAMES.items():
            state[ours + name] = take(theirs + hf_name)
        state[ours + "attention.qkv.weight"] = torch.cat(
            [take(f"{theirs}self_attn.{name}_proj.weight") for name in "qkv"]
        )
        if not is_mixture(config, layer):
            gate_up = [take(f"{theirs}mlp.{name}_proj.weight") for name in ("gate", "up")]
            state[ours + "feed_forward.gate_up.weight"] = torch.cat(gate_up)
            state[ours + "feed_forward.down.weight"] = take(theirs + "mlp.down_proj.weight")
            continue
        assert config.moe is not None
        experts = ours + "feed_forward.experts."
        state[ours + "feed_forward.router.weight"] = take(theirs + "mlp.gate.weight")
        if theirs + "mlp.experts.gate_up_proj" in rest:
            state[experts + "gate_up_EGD"] = take(theirs + "mlp.experts.gate_up_proj")
            state[experts + "down_EDF"] = take(theirs + "mlp.experts.down_proj")
            continue
        names = [f"{theirs}mlp.experts.{expert}." for expert in range(config.moe.num_experts)]
        state[experts + "gate_up_EGD"] = torch.stack(
            [torch.cat([take(name + "gate_proj.weight"), take(name + "up_proj.weight")]) for name in names]
        )
        state[experts + "down_EDF"] = torch.stack([take(name + "down_proj.weight") for name in names])
    if rest:
        raise CheckpointError(
            f"the weights hold {sorted(rest)[0]!r} ({len(rest)} in all), which Blues has no place for"
        )
    _check_shapes(config, state)
    return config, state


def export_huggingface(model: Transformer, tokenizer: Tokenizer, directory: str | Path) -> Path:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files.

    The directory appears complete or not at all.

    Raises:
        ConfigError: the model cannot be expressed (see `to_huggingface`), its vocabulary is too small for the
            tokenizer, or `directory` holds something already.
    """
    target = Path(directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"cannot export to {str(directory)!r}: it is not empty; choose another or remove it first")
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {model.config.vocab_size} rows are too few for a tokenizer of {tokenizer.n_vocab} ids"
        )
    hf_config, hf_state = to_huggingface(model.config, model.state_dict())
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    end = {"eos_token_id": tokenizer.eot_id, "pad_token_id": tokenizer.eot_id}
    files = {
        "config.json": {**hf_config, **end, "dtype": dtype, TOKENIZER_KEY: cfg.dump(tokenizer.config)},
        "generation_config.json": end,
        **tokenizer_files(tokenizer, max_length=model.config.max_seq_len),
    }
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        for name, content in files.items():
            write_atomic(temporary / name, json.dumps(content, indent=2, ensure_ascii=False).encode())
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in hf_state.items()}
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        os.chmod(temporary / WEIGHTS_FILE, 0o644)  # safetensors gives its files to their owner alone
        _sync(temporary / WEIGHTS_FILE)
        _sync(temporary)
        os.rename(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def import_huggingface(directory: str | Path) -> Imported:
    """Read a directory that `export_huggingface` wrote, or any Qwen3-MoE of one or several weight files.

    Raises:
        CheckpointError: a file is missing or damaged, or weights do not fit.
        ConfigError: the configuration is not one that Blues can express.
    """
    directory = Path(directory)
    hf_config = _read_json(directory / "config.json")
    index = directory / f"{WEIGHTS_FILE}.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else [WEIGHTS_FILE]
    hf_state: StateDict = {}
    for name in names:
        try:
            hf_state |= load_file(directory / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot read {str(directory / name)!r}: {error}; export or download it again"
            ) from None
    config, state = from_huggingface(hf_config, hf_state)
    tokenizer = hf_config.get(TOKENIZER_KEY)
    return Imported(config, state, None if tokenizer is None else cfg.load(Tokenizer.Config, tokenizer, TOKENIZER_KEY))


LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
"""Weights of a layer that only change their name."""


def _config_to_huggingface(config: Transformer.Config) -> dict[str, Any]:
    attention, moe = config.attention, config.moe
    cannot = "Qwen3-MoE cannot express it, so this model cannot be exported"
    if not attention.qk_norm:
        raise ConfigError(f"attention.qk_norm=false: {cannot}")
    patterns = [attention.for_layer(layer).pattern.build() for layer in range(config.num_layers)]
    windows = {pattern.window() for pattern in patterns}
    window = windows.pop()
    if windows or window is None:
        raise ConfigError(f"attention.pattern={attention.pattern._variant}: {cannot}")
    if attention.rope_layers != "R":
        raise ConfigError(f"attention.rope_layers={attention.rope_layers}: {cannot}")
    if moe is not None and not isinstance(moe.router, (NoisyTopK.Config, SoftmaxTopK.Config)):
        raise ConfigError(f"moe.router={moe.router._variant}: {cannot}")
    if moe is not None:
        skips = any(isinstance(rule, SkipLight.Config) for rule in moe.rules)  # other rules are of training alone
        for name, is_there in (("shared_experts", moe.shared_experts), ("null_experts", moe.null_experts)):
            if is_there is not None:
                raise ConfigError(f"moe.{name}: {cannot}")
        if skips:
            raise ConfigError(f"moe.rules with skip_light: {cannot}")
        if any(isinstance(rule, SwitchOff.Config) for rule in moe.rules):
            raise ConfigError(f"moe.rules with switch_off: {cannot}; take what is off away with `blues prune --dead`")
        if moe.redirect is not None:
            raise ConfigError(f"moe.redirect={moe.redirect._variant}: {cannot}")
    if config.depth is not None:
        raise ConfigError(f"depth={config.depth._variant}: {cannot}")
    if config.experts_per_layer is not None:
        raise ConfigError(f"experts_per_layer={list(config.experts_per_layer)}: {cannot}")
    rope: RotaryEmbedding = attention.rope.build(head_dim=attention.head_dim, max_seq_len=config.max_seq_len)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": rope.original_length if isinstance(rope, DynamicNTK) else config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        **_rope_to_huggingface(rope),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": window[0] >= 0,
        "sliding_window": window[0] + 1 if window[0] >= 0 else None,  # a token counts as one of its window, as in Blues
        "max_window_layers": 0,  # that is, from the first layer on
        "num_experts": moe.num_experts if moe else 0,
        "num_experts_per_tok": moe.top_k if moe else 0,
        "moe_intermediate_size": moe.ffn_dim if moe else config.ffn_dim,
        "decoder_sparse_step": moe.every if moe else 1,
        "mlp_only_layers": [],
        # One expert's renormalized weight would be 1; Blues then takes its probability: `choose` in moe/routing.py.
        "norm_topk_prob": moe is not None and moe.top_k > 1 and _renormalizes(moe),
        # transformers sums over the k choices where Blues averages.
        "router_aux_loss_coef": moe.load_balancing_weight / moe.top_k if moe else 0.0,
    }


def _rope_to_huggingface(rope: RotaryEmbedding) -> dict[str, Any]:
    """As transformers 5 reads it, and as transformers 4 and serving engines do."""
    parameters = to_rope_parameters(rope)
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    older = {"rope_scaling": scaling} if parameters["rope_type"] != "default" else {}
    return {"rope_theta": parameters["rope_theta"], "rope_parameters": parameters, **older}


def _renormalizes(moe: MoE.Config) -> bool:
    return not isinstance(moe.router, SoftmaxTopK.Config) or moe.router.renormalize


def _pattern_from_huggingface(values: Mapping[str, Any]) -> AttentionPattern.Config:
    """Qwen3-MoE gives every layer the same window, whatever `max_window_layers` says."""
    if not values.get("use_sliding_window", False):
        return Causal.Config()
    return SlidingWindow.Config(window=values["sliding_window"])


def _config_from_huggingface(hf_config: Mapping[str, Any]) -> Transformer.Config:
    values = dict(hf_config)
    if values.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"config.json: model_type is {values.get('model_type')!r}; Blues reads {MODEL_TYPE!r} only")
    experts = values.get("num_experts", values.get("num_local_experts", 0))
    dense = set(values.get("mlp_only_layers") or ())
    top_k = values.get("num_experts_per_tok", 0)
    refused = {
        "attention_bias": values.get("attention_bias", False),
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "sliding_window": values.get("use_sliding_window", False) and not values.get("sliding_window"),
        "mlp_only_layers": bool(dense),
        "norm_topk_prob": experts > 0 and top_k == 1 and values.get("norm_topk_prob", False),
    }
    for name, bad in refused.items():
        if bad:
            raise ConfigError(f"config.json: Blues cannot express {name}={values.get(name)!r}")
    try:
        rope, max_seq_len = from_rope_parameters(values)
        head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        tree: dict[str, Any] = {
            "vocab_size": values["vocab_size"],
            "dim": values["hidden_size"],
            "num_layers": values["num_hidden_layers"],
            "max_seq_len": max_seq_len,
            "ffn_dim": values["intermediate_size"],
            "norm_eps": values["rms_norm_eps"],
            "tie_embeddings": values["tie_word_embeddings"],
            "init_std": values.get("initializer_range", 0.02),
            "attention": Attention.Config(
                num_heads=values["num_attention_heads"],
                num_kv_heads=values["num_key_value_heads"],
                head_dim=head_dim,
                rope=rope,
                pattern=_pattern_from_huggingface(values),
            ),
            "moe": None,
        }
        if experts:
            tree["moe"] = MoE.Config(
                num_experts=experts,
                top_k=top_k,
                ffn_dim=values["moe_intermediate_size"],
                every=values.get("decoder_sparse_step", 1),
                router=SoftmaxTopK.Config(renormalize=top_k == 1 or bool(values.get("norm_topk_prob", False))),
                load_balancing_weight=values.get("router_aux_loss_coef", 0.001) * top_k,
            )
    except KeyError as missing:
        raise ConfigError(f"config.json lacks {missing}") from None
    return cfg.load(Transformer.Config, tree, "config.json")


def _check_shapes(config: Transformer.Config, state: StateDict) -> None:
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name}: the weights have shape {tuple(state[name].shape)}, config.json says {tuple(tensor.shape)}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON ({error}); export or download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}")
    return content


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
