"""The Blues transformer: a decoder-only language model with a mixture of experts in every n-th layer.

In: token ids. Out: logits, or (given targets) losses without ever holding all logits; and the routing of every mixture
layer, for metrics.

    embedding -> num_layers x Block(attention, feed-forward or mixture) -> norm -> head (tied to the embedding)

Parameters (names of `state_dict`): embedding.weight (V, D); blocks.N.attention_norm.weight (D);
blocks.N.attention.{qkv, output, query_norm, key_norm}.weight; blocks.N.feed_forward_norm.weight (D);
blocks.N.feed_forward.{gate_up, down}.weight in dense layers, blocks.N.feed_forward.router.{weight, noise_weight} (E, D)
and blocks.N.feed_forward.experts.{gate_up_EGD, down_EDF} in mixtures (other routers have other weights, and buffers of
what they adapt); norm.weight (D); head.weight (V, D) if untied.

Legend: B batch, T time, D width, V vocabulary, E experts.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.linear_cross_entropy import IGNORED, LINEAR_CROSS_ENTROPY
from blues.kernels.precision import at_least_float32
from blues.model.attention import backends
from blues.model.attention.layer import Attention, KVCache, make_views
from blues.model.attention.masks import BlockMasks
from blues.model.attention.patterns import AttentionPattern, TokenTree
from blues.model.block import Block
from blues.model.context import Context, KeepsHistory, Past
from blues.model.layers import Linear, RMSNorm
from blues.model.losses import Losses, UpdateLoad, add_span_penalty, combine_losses
from blues.model.moe.layer import MoE, mixtures
from blues.model.moe.routing import Routing
from blues.model.rope import RotaryEmbedding


class ModelOutput(NamedTuple):
    """What a forward returns. A NamedTuple, because DeepSpeed and DDP look for tensors inside tuples."""

    logits_BTV: Tensor | None
    """float32 (or better); None when targets were given."""
    losses: Losses | None
    """None without targets."""
    routing: tuple[Routing, ...]
    """One for each mixture layer, in order; its tokens are batch and time flattened."""


class Transformer(nn.Module, cfg.Configurable):
    """See the module's docstring. `config.build(seed=0)` draws the weights from the seed alone."""

    @cfg.configclass
    class Config(cfg.Config):
        vocab_size: int = 200_064
        dim: int = 768
        num_layers: int = 12
        max_seq_len: int = 2048
        attention: Attention.Config = Attention.Config()
        ffn_dim: int = 2048
        moe: MoE.Config | None = MoE.Config()
        experts_per_layer: tuple[int, ...] | None = None
        """Experts of each mixture layer, as pruning leaves them; None: `moe.num_experts` in all."""
        routed_per_layer: tuple[int, ...] | None = None
        """Experts that each mixture's router knows, where `moe.redirect` makes it more than there are."""
        norm_eps: float = 1e-6
        tie_embeddings: bool = True
        init_std: float = 0.02
        gradient_checkpointing: bool = False
        cross_entropy: Literal["auto", "naive", "chunked"] = "auto"

        def __post_init__(self) -> None:
            for name in ("vocab_size", "dim", "num_layers", "max_seq_len", "ffn_dim"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
            for name in ("norm_eps", "init_std"):
                if getattr(self, name) <= 0:
                    raise ConfigError(f"{name}: must be positive, got {getattr(self, name)}")
            mixtures = sum(is_mixture(self, layer) for layer in range(self.num_layers))
            for name in ("experts_per_layer", "routed_per_layer"):
                numbers = getattr(self, name)
                if numbers is not None and len(numbers) != mixtures:
                    raise ConfigError(
                        f"{name}: must have one number for each of the {mixtures} mixture layers, got {len(numbers)}"
                    )
            if (self.routed_per_layer is None) != (self.moe is None or self.moe.redirect is None):
                raise ConfigError("routed_per_layer: goes with moe.redirect; set both or none (pruning does)")
            self.attention.pattern.build().check(self.attention.num_heads, self.num_layers)
            self.attention.rope.build(head_dim=self.attention.head_dim, max_seq_len=self.max_seq_len)

    config: Config

    def __init__(self, config: Config, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()  # "meta" makes a model without weights, and has no generator of its own
        generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
        std = config.init_std
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        nn.init.normal_(self.embedding.weight, std=std, generator=generator)
        self.blocks = nn.ModuleList(
            Block(
                layer=layer,
                dim=config.dim,
                attention=config.attention.for_layer(layer),
                ffn_dim=config.ffn_dim,
                moe=mixture_config(config, layer),
                norm_eps=config.norm_eps,
                std=std,
                # 2 * num_layers additions to the residual stream: its variance stays independent of depth (GPT-2).
                output_std=std / math.sqrt(2 * config.num_layers),
                generator=generator,
            )
            for layer in range(config.num_layers)
        )
        routers = [moe.router for _, moe in mixtures(self)]
        self.balanced_by_loss = all(router.balanced_by == "loss" for router in routers)
        self.softmax_routers = all(router.is_softmax for router in routers)
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = Linear(config.dim, config.vocab_size, std=std, generator=generator)
        self.rope: RotaryEmbedding = config.attention.rope.build(
            head_dim=config.attention.head_dim, max_seq_len=config.max_seq_len
        )
        self.pattern: AttentionPattern = config.attention.pattern.build()
        self.block_masks = BlockMasks()

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        languages: Tensor | None = None,
        progress: float = 1.0,
        tree: TokenTree | None = None,
        num_logits: int | None = None,
        num_targets: float | None = None,
        load: UpdateLoad | None = None,
    ) -> ModelOutput:
        """Read tokens.

        Args:
            tokens_BT: ids (int64).
            targets_BT: the id that follows each token, or -100 for no loss. With targets the output holds losses and
                no logits.
            cache: earlier keys and values; this forward adds its own.
            positions: `positions_BT` of the tokens, by default counting on from `cache.length` (from 0 without one).
                With a cache, the key of slot j is at position j.
            documents: `documents_BT`, numbers; attention stays among tokens of a row that have the same one.
            languages: `languages_BT`, the number of each token's language; 0 (and None) for unknown.
            progress: share of the training that is done, which schedules go by.
            tree: of all tokens of the rows, those in the cache included; for attention patterns that follow it.
            num_logits: logits of the last `num_logits` tokens only (1 is enough to go on from a prompt).
            load: of the update so far, for load balancing over the global batch.
            num_targets: what the summed cross-entropy is divided by, instead of the targets that count here. Given the
                mean over the micro batches of an update, the mean of their losses is that of one large batch, however
                the targets are spread over them.

        Raises:
            ValueError: documents together with a cache; a pattern's tree that is missing or of other length.
        """
        x_BTD, routing = self.hidden(
            tokens_BT,
            cache=cache,
            positions=positions,
            documents=documents,
            languages=languages,
            progress=progress,
            tree=tree,
        )
        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        if targets_BT is None:
            if num_logits is not None:
                x_BTD = x_BTD[:, x_BTD.shape[1] - num_logits :]
            return ModelOutput(at_least_float32(F.linear(x_BTD, weight_VD)), None, routing)
        linear_cross_entropy = LINEAR_CROSS_ENTROPY[self._cross_entropy]
        cross_entropy = linear_cross_entropy(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten())
        if num_targets is not None:
            cross_entropy = cross_entropy * ((targets_BT != IGNORED).sum().to(cross_entropy.dtype) / num_targets)
        return ModelOutput(None, self._losses(cross_entropy, routing, len(tokens_BT), load), routing)

    def _losses(
        self, cross_entropy: Tensor, routing: tuple[Routing, ...], rows: int, load: UpdateLoad | None
    ) -> Losses:
        moe = self.config.moe
        losses = combine_losses(
            cross_entropy,
            routing,
            load_balancing_weight=moe.load_balancing_weight if moe and self.balanced_by_loss else 0.0,
            router_z_weight=moe.router_z_weight if moe and self.softmax_routers else 0.0,
            scope=moe.load_balancing_scope if moe else "micro_batch",
            rows=rows,
            load=load,
            balance=[layer.balance(cross_entropy.device) for _, layer in mixtures(self)],
        )
        return add_span_penalty(losses, [layer.span for layer in self.attentions if layer.span is not None])

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        languages: Tensor | None = None,
        progress: float = 1.0,
        tree: TokenTree | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """`x_BTD` after the final norm, and the routing of every mixture layer. Arguments as in `forward`."""
        attention = self.config.attention
        views = make_views(
            [(self.rope if layer.rotates else None, layer.pattern) for layer in self.attentions],
            length=tokens_BT.shape[1],
            device=tokens_BT.device,
            past=None if cache is None else cache.length,
            positions_BT=positions,
            documents_BT=documents,
            tree=tree,
            num_heads=attention.num_heads,
            block_masks=self.block_masks if attention.reads_block_masks(tokens_BT.device) else None,
        )
        context = Context(tokens_BT, documents, languages, progress, _past(tokens_BT, cache, positions))
        if not torch.compiler.is_compiling():
            for number, layer in enumerate(self.attentions):  # here, between two forwards: see `Precision.poll`
                layer.attend.precision.poll(f"layer {number}")
        x_BTD = self.embedding(tokens_BT)
        routings: list[Routing] = []
        recompute = self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block, view in zip(self.blocks, views, strict=True):
            if recompute:
                # The random state is restored for the second run, so the routers draw the same noise again.
                x_BTD, routing = checkpoint(
                    block, x_BTD, view, context, cache, use_reentrant=False, context_fn=_keep_decisions
                )
            else:
                x_BTD, routing = block(x_BTD, view, context, cache)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_BTD), tuple(routings)

    def backends(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """The implementation of each operation for activations of `dtype` on `device`, to be logged with a run.

        Raises:
            ConfigError: one that was asked for by name cannot run there.
        """
        config = self.config
        attention = config.attention
        attends = (
            backends.resolve(
                attention.backend,
                attention.precision,
                device=device,
                dtype=dtype,
                head_dim=attention.head_dim,
                num_heads=attention.num_heads,
                num_kv_heads=attention.num_kv_heads,
                form=form,
            )
            for form in dict.fromkeys(layer.form(device) for layer in self.attentions)
        )
        chosen = {"attention": " + ".join(dict.fromkeys(attends)), "cross_entropy": self._cross_entropy}
        if layers := mixtures(self):
            chosen["experts"] = layers[0][1].experts.backend(device, dtype)
        return chosen

    @property
    def attentions(self) -> list[Attention]:
        """The attention of every layer."""
        return [cast(Block, block).attention for block in self.blocks]

    @property
    def _cross_entropy(self) -> str:
        return "chunked" if self.config.cross_entropy == "auto" else self.config.cross_entropy

    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: all but the experts it is not routed to."""
        layers = [moe for _, moe in mixtures(self)]
        idle = sum(p.numel() for moe in layers for p in moe.parameters()) - sum(
            moe.num_active_parameters() for moe in layers
        )
        return self.num_parameters() - idle

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training per token, forward and backward (PaLM, arXiv 2204.02311, app. B).

        6 for each active parameter in a matrix product (the head counts, looking up an embedding does not), and
        attention's scores and mixing, halved because the causal half is never computed. Recomputation by gradient
        checkpointing is not counted.
        """
        config = self.config
        lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim
        attention = 6 * config.num_layers * config.attention.num_heads * config.attention.head_dim * seq_len
        return 6 * (self.num_active_parameters() - lookup) + attention


def _past(tokens_BT: Tensor, cache: KVCache | None, positions_BT: Tensor | None) -> Past | None:
    """Where these tokens lie in `cache`."""
    if cache is None:
        return None
    if positions_BT is None:
        start, (B, T) = cache.length, tokens_BT.shape
        positions_BT = torch.arange(start, start + T, device=tokens_BT.device).expand(B, T)
    return Past(positions_BT, cache.history if isinstance(cache, KeepsHistory) else None)


DECISIONS = (torch.ops.aten.topk.default, torch.ops.aten.sort.stable)
THRESHOLDS = (torch.ops.aten.gt.Tensor, torch.ops.aten.gt.Scalar, torch.ops.aten.ge.Scalar)
"""How routers decide: by rank, or by comparing a matrix of tokens and experts with thresholds."""


def _keep_decisions() -> tuple[Any, Any]:
    """Contexts of a checkpointed block in which all is computed again but the choice and order of experts.

    torch.compile may fuse, and so round, the second computation differently. One token that then chose another expert
    would shift the sorted places of every token behind it, against what the first computation has left for the
    gradient: gradients came out wrong by half their length.
    """

    def policy(_: Any, operation: Any, *inputs: Any, **__: Any) -> CheckpointPolicy:
        kept = operation in DECISIONS or (operation in THRESHOLDS and inputs[0].ndim == 2)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def is_mixture(config: Transformer.Config, layer: int) -> bool:
    """Whether `layer` (from 0) is a mixture of experts."""
    return config.moe is not None and (layer + 1) % config.moe.every == 0


def mixture_config(config: Transformer.Config, layer: int) -> MoE.Config | None:
    """The configuration of `layer`'s mixture with its own number of experts; None for a dense layer."""
    if config.moe is None or not is_mixture(config, layer):
        return None
    number = sum(is_mixture(config, earlier) for earlier in range(layer))
    moe = config.moe
    if config.experts_per_layer is not None:
        num_experts = config.experts_per_layer[number]
        moe = moe.replace(num_experts=num_experts, top_k=min(moe.top_k, num_experts))
    if config.routed_per_layer is None:
        return moe
    routed = config.routed_per_layer[number]
    if routed == moe.num_experts:  # nothing was taken from this layer
        return moe.replace(redirect=None, num_routed=None)
    return moe.replace(num_routed=routed)
