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
from contextlib import nullcontext
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.linear_cross_entropy import IGNORED, LINEAR_CROSS_ENTROPY
from blues.kernels.precision import at_least_float32
from blues.model import chunking, compute
from blues.model.attention import backends
from blues.model.attention.layer import Attention, KVCache, SequenceSplit, make_views
from blues.model.attention.masks import BlockMasks
from blues.model.attention.patterns import AttentionPattern, TokenTree
from blues.model.block import Block, BlockParts
from blues.model.context import Context, KeepsHistory, Past
from blues.model.depth import Depth, Passing
from blues.model.layers import Linear, RMSNorm
from blues.model.losses import Losses, UpdateLoad, add_span_penalty, combine_losses
from blues.model.moe.layer import MoE, mixtures
from blues.model.moe.routing import Routing
from blues.model.offload import Offload
from blues.model.recompute import keep_decisions
from blues.model.rope import RotaryEmbedding


class ModelOutput(NamedTuple):
    """What a forward returns. A NamedTuple, because DeepSpeed and DDP look for tensors inside tuples."""

    logits_BTV: Tensor | None
    """float32 (or better); None when targets were given."""
    losses: Losses | None
    """None without targets."""
    routing: tuple[Routing, ...]
    """One for each mixture layer, in order; its tokens are batch and time flattened."""
    compute_LC: Tensor | None = None
    """int64, `blues.model.compute.COUNTS` of every layer; None for models that leave nothing out."""


class Reading(NamedTuple):
    """What the blocks made of the tokens."""

    x_BTD: Tensor
    """After the final norm."""
    routing: tuple[Routing, ...]
    passings: tuple[Passing | None, ...]
    """One for each layer."""


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
        depth: Depth.Config | None = None
        """Tokens that do not go through every block; None: all do."""
        norm_eps: float = 1e-6
        tie_embeddings: bool = True
        init_std: float = 0.02
        gradient_checkpointing: bool = False
        cross_entropy: Literal["auto", "naive", "chunked"] = "auto"
        cross_entropy_chunk: int | None = None
        """Tokens whose logits the chunked cross-entropy holds at once; None: by the memory that they take."""
        activation_offload: bool = False
        """Activations wait for the backward in the host's memory (see `blues.model.offload`)."""
        sequence_chunk: int | None = None
        """Tokens of a sequence that are read at once, with activations for no more; None: all (see `chunking`)."""

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
            chunking.check(self)
            if self.cross_entropy_chunk is not None and (self.cross_entropy_chunk < 1 or self.cross_entropy == "naive"):
                raise ConfigError(
                    f"cross_entropy_chunk: must be at least 1 token, and cross_entropy be chunked, got "
                    f"{self.cross_entropy_chunk} with {self.cross_entropy}"
                )
            if self.depth is not None:
                self.depth.build(num_layers=self.num_layers).check(self.attention, self.moe)
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
        self.depth: Depth | None = None if config.depth is None else config.depth.build(num_layers=config.num_layers)
        make_block = Block if self.depth is None else self.depth.block
        self.blocks = nn.ModuleList(
            make_block(
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
        self.is_conditional = self.depth is not None or any(moe.is_conditional for _, moe in mixtures(self))
        self._sizes = self._count_sizes()  # now: ZeRO-3 empties what it splits
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
        self.split: SequenceSplit | None = None
        """How a group of workers shares the sequences, of which this model then reads slices; None: it does not."""

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
        x_BTD, routing, passings = self._read(
            tokens_BT,
            cache=cache,
            positions=positions,
            documents=documents,
            languages=languages,
            progress=progress,
            tree=tree,
        )
        if targets_BT is None:
            if num_logits is not None:
                x_BTD = x_BTD[:, x_BTD.shape[1] - num_logits :]
            return ModelOutput(self.logits(x_BTD), None, routing, self._computed(tokens_BT, routing, passings))

        def cross_entropy(x_BTD: Tensor) -> Tensor:
            linear_cross_entropy, chunk = LINEAR_CROSS_ENTROPY[self._cross_entropy], self.config.cross_entropy_chunk
            mean = linear_cross_entropy(x_BTD.flatten(0, 1), self._head_VD, targets_BT.flatten(), chunk)
            if num_targets is None:
                return mean
            return mean * ((targets_BT != IGNORED).sum().to(mean.dtype) / num_targets)

        losses = self._losses(cross_entropy(x_BTD), routing, len(tokens_BT), load)
        if self.depth is not None:
            losses = self.depth.add_losses(losses, passings, lambda x_BTD: cross_entropy(self.norm(x_BTD)))
        return ModelOutput(None, losses, routing, self._computed(tokens_BT, routing, passings))

    @property
    def _head_VD(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Of what `hidden` returns, in float32 or better."""
        return at_least_float32(F.linear(x_BTD, self._head_VD))

    def _computed(
        self, tokens_BT: Tensor, routing: tuple[Routing, ...], passings: tuple[Passing | None, ...]
    ) -> Tensor | None:
        """`compute_LC` of one forward."""
        if not self.is_conditional:
            return None
        tokens, rows, mixed = tokens_BT.numel(), [], iter(routing)
        for block, passing in zip(self.blocks, passings, strict=True):
            pairs_P = None
            feed_forward = cast(BlockParts, block).feed_forward
            if isinstance(feed_forward, MoE):
                pairs_P = feed_forward.pairs(next(mixed))
            block_tokens = tokens if passing is None else passing.block_tokens
            rows.append(compute.layer_counts(tokens, block_tokens, pairs_P, tokens_BT.device))
        return torch.stack(rows)

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
            sum_counts=None if self.split is None else self.split.sum_counts,
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
        x_BTD, routing, _ = self._read(
            tokens_BT,
            cache=cache,
            positions=positions,
            documents=documents,
            languages=languages,
            progress=progress,
            tree=tree,
        )
        return x_BTD, routing

    def _read(
        self,
        tokens_BT: Tensor,
        *,
        cache: KVCache | None,
        positions: Tensor | None,
        documents: Tensor | None,
        languages: Tensor | None,
        progress: float,
        tree: TokenTree | None,
    ) -> Reading:
        if not torch.compiler.is_compiling():
            for number, layer in enumerate(self.attentions):  # here, between two forwards: see `Precision.poll`
                layer.attend.precision.poll(f"layer {number}")
        chunk = self.config.sequence_chunk
        if chunk is not None and cache is None and chunk < tokens_BT.shape[1]:
            if positions is not None:
                raise ValueError("positions: tokens read in chunks (sequence_chunk) are at 0, 1, 2, ...")
            whole = chunking.Whole(tokens_BT, documents, languages, progress)
            x_BTD, routing = chunking.read_in_chunks(self, whole, chunk, keep_decisions)
            return Reading(x_BTD, routing, (None,) * len(self.blocks))
        attention = self.config.attention
        views = (make_views if self.split is None else self.split.make_views)(
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
        x_BTD = self.embedding(tokens_BT)
        routings: list[Routing] = []
        passings: list[Passing | None] = []
        training = self.training and torch.is_grad_enabled()
        recompute = self.config.gradient_checkpointing and training
        keep = Offload(x_BTD.device).block if self.config.activation_offload and training else nullcontext
        for number, (block, view) in enumerate(zip(self.blocks, views, strict=True)):
            with keep(block):
                if recompute:
                    # The random state is restored for the second run, so the routers draw the same noise again.
                    x_BTD, routing, *rest = checkpoint(
                        block, x_BTD, view, context, cache, use_reentrant=False, context_fn=keep_decisions
                    )
                else:
                    x_BTD, routing, *rest = block(x_BTD, view, context, cache)
            passings.append(rest[0] if rest else None)
            if routing is not None:
                routings.append(routing)
            if self.depth is not None and not self.training:
                context = self.depth.after(number, x_BTD, context, lambda x: self.logits(self.norm(x)))
        return Reading(self.norm(x_BTD), tuple(routings), tuple(passings))

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
        return [cast(BlockParts, block).attention for block in self.blocks]

    @property
    def _num_exits(self) -> int:
        return 0 if self.depth is None else self.depth.num_exits

    @property
    def _cross_entropy(self) -> str:
        return "chunked" if self.config.cross_entropy == "auto" else self.config.cross_entropy

    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: all but the experts it is not routed to, and blocks it does not go through
        (the mean over tokens of training, where these differ)."""
        idle = 0.0
        for layer, block in enumerate(self.blocks):
            everything = active = sum(parameter.numel() for parameter in block.parameters())
            feed_forward = cast(BlockParts, block).feed_forward
            if isinstance(feed_forward, MoE):
                active -= feed_forward.num_idle_parameters()
            idle += everything - active * (1.0 if self.depth is None else self.depth.share(layer))
        return self.num_parameters() - round(idle)

    def layer_costs(self, seq_len: int) -> list[compute.Cost]:
        """What each layer costs, for `blues.model.compute.flops_per_token`."""
        attention = self.config.attention.num_heads * self.config.attention.head_dim * seq_len
        return [compute.Cost(block, pair, attention) for block, pair in self._sizes]

    def _count_sizes(self) -> list[tuple[int, int]]:
        """Parameters of each block without its experts, and of one expert."""
        sizes = []
        for block in self.blocks:
            whole, pair = sum(parameter.numel() for parameter in block.parameters()), 0
            feed_forward = cast(BlockParts, block).feed_forward
            if isinstance(feed_forward, MoE):
                experts = sum(parameter.numel() for parameter in feed_forward.experts.parameters())
                whole, pair = whole - experts, experts // feed_forward.experts.num_experts
            sizes.append((whole, pair))
        return sizes

    def compute_metrics(self, counts_LC: list[list[int]], seq_len: int) -> dict[str, float]:
        """Metrics of summed `ModelOutput.compute_LC`: shares (see `blues.model.compute.summary`) and
        compute/flops_per_token, of training, as counted."""
        is_mixture_L = [isinstance(cast(BlockParts, block).feed_forward, MoE) for block in self.blocks]
        head = (1 + self._num_exits) * (self.config.vocab_size + 1) * self.config.dim  # and the final norm
        flops = compute.flops_per_token(counts_LC, self.layer_costs(seq_len), head)
        return compute.summary(counts_LC, is_mixture_L) | {"compute/flops_per_token": flops}

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training per token, forward and backward (PaLM, arXiv 2204.02311, app. B).

        6 for each active parameter in a matrix product (the head counts, looking up an embedding does not), and
        attention's scores and mixing, halved because the causal half is never computed. Recomputation by gradient
        checkpointing is not counted.
        """
        config = self.config
        lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim
        shares = [1.0 if self.depth is None else self.depth.share(layer) for layer in range(config.num_layers)]
        attended = round(
            sum(share**2 for share in shares) * config.attention.num_heads * config.attention.head_dim * seq_len
        )
        exits = self._num_exits * (config.vocab_size + 1) * config.dim
        return 6 * (self.num_active_parameters() - lookup + exits + attended)


def _past(tokens_BT: Tensor, cache: KVCache | None, positions_BT: Tensor | None) -> Past | None:
    """Where these tokens lie in `cache`."""
    if cache is None:
        return None
    if positions_BT is None:
        start, (B, T) = cache.length, tokens_BT.shape
        positions_BT = torch.arange(start, start + T, device=tokens_BT.device).expand(B, T)
    return Past(positions_BT, cache.history if isinstance(cache, KeepsHistory) else None)


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
