"""DFlash: a block of masks filled in one forward, conditioned on the target's hidden states.

Layout and mathematics are those of the published z-lab checkpoints: features of several
target layers are projected and normed once, and enter every draft layer as additional keys
and values; the block [anchor token, MASK x K] attends to them and, in both directions, to
itself; embeddings and LM head are the target's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from draft_opd.drafters.attention import BlockMask, DenseMask, Rotary
from draft_opd.drafters.base import Choose, Drafter, Fault
from draft_opd.drafters.dflash_layer import DFlashLayer
from draft_opd.drafters.dflash_options import DFlashOptions, default_decay, default_target_layers
from draft_opd.drafters.gemma4_layer import Gemma4Layer
from draft_opd.drafters.layouts import dflash as layout
from draft_opd.drafters.layouts import gemma4
from draft_opd.drafters.layouts.vocabulary import as_buffers, checked_ids, target_ids
from draft_opd.drafters.mask_token import find_mask_token
from draft_opd.drafters.registry import register
from draft_opd.drafters.target_config import (
    adopt_final_norm,
    config_for,
    initialise,
    raise_mismatch,
)
from draft_opd.models.fused_layers import FusedLayers, LayerSlots
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.logit_map import LogitMap
from draft_opd.models.target import Target
from draft_opd.utils.errors import UserError

# In dflash_config, as published DFlash2 drafters have it.
EMBEDDING_SCALE = "input_embedding_scale"
FIRST_NORM = (
    "every layer's context keys are normed with the first layer's weights (a bug of vLLM's CPU build, seen "
    "in 0.32: serve on a GPU, or train one layer)"
)


@dataclass
class Unwritten:
    """Features [1, m, F] at slots start.. of a cache, whose keys have not been made yet."""

    features: Tensor
    positions: Tensor
    start: int


@register("dflash")
class DFlashDrafter(Drafter):
    """See the module docstring. `config` is a Qwen3Config with the z-lab keys."""

    vllm_method = "dflash"
    first_context_norm = False  # an engine's bug, for `known_faults`
    options = DFlashOptions
    layout_module: ClassVar[ModuleType] = layout
    mapped_formats: ClassVar[tuple[str, ...]] = ("z-lab",)  # whose readers were seen to apply a `logit_map`
    layer_class: ClassVar[type[DFlashLayer]] = DFlashLayer

    def __init__(self, config: Qwen3Config, *, own_embeddings: bool = False, own_head: bool = False):
        """own_embeddings, own_head: not the target's, as a draft vocabulary or another width need."""
        super().__init__()
        options = getattr(config, "dflash_config", None) or {}
        self.config = config
        self.block_size: int = getattr(config, "block_size", None) or options.get("block_size", 16)
        # Whether the anchor's slot predicts too: a block of B slots drafts B tokens then, not B - 1.
        given = options.get("sample_from_anchor", getattr(config, "sample_from_anchor", None))
        self.anchor_first = bool(given)
        self.draft_length = self.block_size - (0 if self.anchor_first else 1)
        self.mask_token_id: int = options["mask_token_id"]
        # What the target's embedding table is multiplied with; None: whatever the target does.
        self.embedding_scale: float | None = options.get(EMBEDDING_SCALE)
        self.logit_map = LogitMap(options.get(layout.SCALE) or 1.0, options.get(layout.CAP) or None)
        layers = options.get("target_layer_ids") or default_target_layers(
            config.num_target_layers, config.num_hidden_layers
        )
        self.target_layers = tuple(layers)
        # The key holds for all layers. Without it sliding-attention layers are causal, full ones are not.
        self.causal: bool | None = getattr(config, "is_causal", options.get("causal"))
        if self.causal is None and "sliding_attention" not in config.layer_types:
            self.causal = False
        hidden = config.hidden_size
        self.feature_size: int = getattr(config, "target_hidden_size", None) or hidden
        self.fc = nn.Linear(len(self.target_layers) * self.feature_size, hidden, bias=False)
        self.hidden_norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.is_gemma4 = hasattr(config, gemma4.KEY)
        if self.is_gemma4 and self.layer_class is not DFlashLayer:
            raise UserError(f"a {self.family} drafter has layers of its own, and cannot have Gemma 4's")
        layer = Gemma4Layer if self.is_gemma4 else self.layer_class
        self.layers = nn.ModuleList(layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.rotary = Rotary(config=config)
        self.embed_tokens = self.lm_head = None
        size = getattr(config, "draft_vocab_size", None) or config.vocab_size
        if own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden).requires_grad_(False)
        if own_head:
            self.lm_head = nn.Linear(hidden, size, bias=False)
        if size < config.vocab_size:
            d2t, t2d = as_buffers(torch.arange(size), config.vocab_size)
            self.register_buffer("d2t", d2t)
            self.register_buffer("t2d", t2d)
        initialise(self)

    # -- configuration ----------------------------------------------------------------------

    @classmethod
    def matches(cls, config: dict) -> bool:
        return cls.layout_module.matches(config)

    @classmethod
    def own_keys(cls, options: DFlashOptions) -> dict[str, Any]:
        """What a family adds to `dflash_config`."""
        return {}

    @classmethod
    def from_files(cls, config: dict, tensors: dict[str, Tensor]):
        files = cls.layout_module.read(config, tensors)
        drafter = cls(
            Qwen3Config.from_dict(files.config),
            own_embeddings=files.own_embeddings,
            own_head=files.own_head,
        )
        drafter.layout, drafter.copies = files.layout, files.copies
        return drafter, files.tensors

    @classmethod
    def create(cls, target: Target, counts=None, **options) -> DFlashDrafter:
        """A new drafter for `target`; options are the fields of `DFlashOptions`."""
        o = cls.options(**options)
        count = o.num_target_features or min(5, max(1, target.num_layers - 3))
        layers = tuple(o.target_layers or default_target_layers(target.num_layers, count))
        config = Qwen3Config(num_hidden_layers=o.num_layers, **config_for(target, o))
        config.block_size = o.block_size
        config.num_target_layers = target.num_layers
        mask = o.mask_token_id if o.mask_token_id is not None else find_mask_token(target)
        config.dflash_config = {
            "mask_token_id": mask,
            "target_layer_ids": list(layers),
            **cls.own_keys(o),
        }
        if target.embedding_scale != 1:
            config.dflash_config[EMBEDDING_SCALE] = target.embedding_scale
        drafter = cls(config)
        drafter.bind(target)
        adopt_final_norm(drafter.norm, target)
        return drafter.to(target.device)

    def config_dict(self) -> dict:
        return self.layout_module.config_of(self)

    def speculators_files(self, verifier: dict):
        return self.layout_module.speculators_config(self, verifier), self.tensors()

    def misreadings(self) -> dict[str, Fault]:
        return self._other_slots(0)

    def _other_slots(self, more: int) -> dict[str, Fault]:
        """The other slot convention, in blocks of so many slots more."""
        other = not self.anchor_first
        what = "predicts too" if other else "predicts nothing"
        name = f"the anchor's slot {what} (sample_from_anchor {str(other).lower()})"

        def shift(config, _):
            config["dflash_config"]["sample_from_anchor"] = config["sample_from_anchor"] = other
            config["dflash_config"]["block_size"] = config["block_size"] = self.block_size + more

        return {name: shift}

    def known_faults(self, num_layers: int):
        def shift(config, by):
            options = config["dflash_config"]
            options["target_layer_ids"] = [i + by for i in options["target_layer_ids"]]

        def unscaled(config, _):
            config["dflash_config"][EMBEDDING_SCALE] = 1.0

        scaled: dict[str, Fault] = {}
        if self.embedding_scale not in (None, 1.0):
            name = f"the target's embeddings are not scaled, trained was with {self.embedding_scale:.4g}"
            scaled = {f"{name} (vLLM before its #41703, for Gemma)": unscaled}
        if len(self.layers) > 1:
            scaled[FIRST_NORM] = lambda *_: lambda drafter: setattr(drafter, "first_context_norm", True)
        other = not self.causal
        causal = "attention inside the block is " + ("causal" if other else "not causal")
        return {
            **self._other_slots(1 if self.anchor_first else -1),  # an engine drafts as many tokens
            causal: lambda config, _: config.update(is_causal=other),
            **scaled,
            **self.common_faults(num_layers, shift),
        }

    @property
    def formats(self) -> tuple[str, ...]:
        if self.is_gemma4:
            return ("deepspec",)
        return self.plain_formats if self.logit_map.is_identity else self.mapped_formats

    @property
    def plain_formats(self) -> tuple[str, ...]:
        """Where the body is the usual one and nothing is done to logits."""
        if self.anchor_first or self.lm_head is not None or self.embed_tokens is not None:
            return ("speculators",) if self.causal is False else ()
        # speculators and vLLM read the causal keys differently; they agree where no layer is causal.
        plain = ("z-lab", "sglang", "vllm")
        return plain if self.causal is not False else (*plain, "speculators")

    def check_target(self, target: Target) -> None:
        if self.feature_size != target.hidden_size:
            what = "hidden size" if self.feature_size == self.config.hidden_size else "features of"
            raise_mismatch(target, what, self.feature_size, target.hidden_size)
        own = self.embed_tokens is not None and self.lm_head is not None
        if self.config.hidden_size != target.hidden_size and not own:
            raise UserError(
                f"this drafter has hidden size {self.config.hidden_size}, the target '{target.name}' "
                f"{target.hidden_size}: its files must hold embed_tokens and lm_head of their own"
            )
        if self.config.vocab_size != target.vocab_size:
            raise_mismatch(target, "vocabulary of", self.config.vocab_size, target.vocab_size)
        layers = list(self.target_layers)
        if layers != sorted(set(layers)):
            raise UserError(f"tapped target layers {layers} must be ascending and unique")
        if layers[0] < 0 or layers[-1] > target.num_layers - 2:
            # The last layer's output is normed in some engines and not in others.
            raise_mismatch(target, "tapped layers", layers, f"usable layers 0..{target.num_layers - 2}")
        if self.vocabulary is not None:
            checked_ids(self.d2t, target.vocab_size)
        if not 0 <= self.mask_token_id < target.vocab_size:
            raise_mismatch(target, "mask token", self.mask_token_id, f"vocabulary of {target.vocab_size}")

    def bind(self, target: Target) -> None:
        super().bind(target)
        if not getattr(self.config, "num_target_layers", None):  # not in speculators' layout
            self.config.num_target_layers = target.num_layers

    # -- drafting ---------------------------------------------------------------------------

    def _rotary(self, like: Tensor, positions: Tensor):
        return self.rotary(like, positions)

    def _states(self, features: Tensor) -> Tensor:
        """Features [batch, m, F] -> context states [batch, m, H], which the layers' keys are made of."""
        return self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))

    def _project(self, features: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features [batch, m, F] -> keys and values of every draft layer."""
        hidden = self._states(features)
        rotary = self._rotary(hidden, positions)
        norm = self.layers[0].self_attn.k_norm if self.first_context_norm else None
        return [layer.self_attn.keys_values(hidden, rotary, norm) for layer in self.layers]

    def build_cache(self, target: Target, ids: Tensor, features: Tensor) -> PositionCache:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        pairs = self._project(features, positions)
        return PositionCache.of([k for k, _ in pairs], [v for _, v in pairs])

    def extend_cache(self, context, target, ids, features, positions) -> None:
        if context.filled and not context.static and not self.first_context_norm:
            # One row, whose next block will tell how much of this was committed. Its forward makes the
            # keys of both: half the operators.
            self._write_unwritten(context, context.bound - features.shape[1])
            context.unwritten = Unwritten(features, positions, context.bound - features.shape[1])
            return
        self._write(context, features, positions)

    def _write_unwritten(self, context: PositionCache, end: int) -> None:
        """What a block has not written, up to slot `end`."""
        if (kept := context.unwritten) is not None:
            bound, context.unwritten = context.bound, None
            count = end - kept.start
            context.set_bound(end, filled=True)
            self._write(context, kept.features[:, :count], kept.positions[:, :count])
            context.set_bound(bound, filled=True)

    def _write(self, context: PositionCache, features: Tensor, positions: Tensor) -> None:
        context.prepare(positions)
        for i, (k, v) in enumerate(self._project(features, positions)):
            context.update(k, v, i)

    def head(self, target: Target) -> nn.Linear:
        return self.lm_head or target.head

    @property
    def vocabulary(self) -> Tensor | None:
        return target_ids(self.d2t) if "d2t" in self._buffers else None

    def _embed(self, target: Target, ids: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            return self.embed_tokens(ids)
        x = target.embed(ids).to(self.fc.weight.dtype)
        if self.embedding_scale is not None and self.embedding_scale != target.embedding_scale:
            x = x * (self.embedding_scale / target.embedding_scale)
        return x

    def _blocks(self, target: Target, context, anchors: Tensor, ids: Tensor, num_draft_tokens: int) -> Tensor:
        """anchors, ids [batch, A] -> hidden states [batch, A, num_draft_tokens, H] of the mask slots."""
        batch, count = anchors.shape
        size = num_draft_tokens + (0 if self.anchor_first else 1)
        tokens = ids.new_full((batch, count, size), self.mask_token_id)
        tokens[:, :, 0] = ids
        offsets = torch.arange(size, device=ids.device)
        positions = (anchors[:, :, None] + offsets).flatten(1)  # [batch, A * size]
        x = self._embed(target, tokens.flatten(1))
        in_place, before = count == 1 and context.bound is not None, None
        if in_place:  # decoding: the block uses the slots of its positions; `extend_cache` overwrites them
            # A row that is alone reaches the bound with K + 1 slots, of which a block of K uses the first.
            end = context.bound - (1 if self.anchor_first else 0) if context.filled else None
            if (kept := context.unwritten) is not None and end is not None:
                committed = end - size - kept.start
                before, context.unwritten = self._states(kept.features[:, :committed]), None
                positions = torch.cat([kept.positions[:, :committed], positions], 1)
            context.prepare(positions, visible=end)
            visible = context.visible
        else:
            visible = min(context.reach(anchors - 1), context.capacity)
        visibility = BlockMask(
            anchors=anchors,
            size=size,
            context=visible,
            causal=self.causal,
            window=getattr(self.config, "sliding_window", None),
            in_place=in_place,
            filled=in_place and context.filled,
        )
        rotary = self._rotary(x, positions)

        def join(k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
            if in_place:
                return context.update(k, v, layer)
            pairs = ((context.keys, k), (context.values, v))
            return tuple(torch.cat([c[layer][:, :, :visible], own], 2) for c, own in pairs)

        fused = in_place and context.fused
        if fused and self.fused is None:
            self.fused = FusedLayers(self.layers, _over_slots)
        for i, layer in enumerate(self.layers):
            if fused:
                mask = visibility.dense(layer.self_attn.kind)
                storage = (context.positions, context.keys[i], context.values[i])
                x = self.fused(i, x, *rotary, mask, *storage)
            else:
                x = self.run(layer, x, partial(join, layer=i), rotary, visibility, before)
        return self.norm(x).view(batch, count, size, -1)[:, :, size - num_draft_tokens :]

    def replay(self, target, context, anchors, ids, drafted) -> Tensor:
        # The masks are filled in parallel: what was drafted does not enter.
        return self._blocks(target, context, anchors, ids, drafted.shape[2])

    def propose(self, target, context, anchors, ids, draft_length, choose: Choose):
        hidden = self._blocks(target, context, anchors, ids, draft_length)
        drafted, probs = choose(self.logits(target, hidden.flatten(0, 1)))
        shape = anchors.shape
        return drafted.unflatten(0, shape), None if probs is None else probs.unflatten(0, shape)

    def position_decay(self, num_draft_tokens: int) -> float:
        return default_decay(num_draft_tokens + 1)

    def forward_token_counts(self, num_draft_tokens: int) -> list[int]:
        return [num_draft_tokens + (0 if self.anchor_first else 1)]

    def sglang_flags(self) -> dict[str, int | str]:
        return {"algorithm": "DFLASH", "num-draft-tokens": self.block_size}


def _over_slots(layer, x, cos, sin, mask, slots, keys, values) -> Tensor:
    """A layer over its part of a cache whose storage does not move, for `FusedLayers`."""
    join = LayerSlots(keys, values, slots, mask.shape[-1]).update
    return layer(x, join, (cos, sin), DenseMask(mask))
