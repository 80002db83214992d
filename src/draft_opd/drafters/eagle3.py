"""EAGLE-3: one decoder layer that drafts token by token on the target's fused hidden states.

Layout and mathematics are those of the files SGLang and vLLM serve (SafeAILab's cnets.py, sglang
llama_eagle3.py, vllm llama_eagle3.py). Slot t pairs the embedding of token t with the fused
features h of token t - 1 (RoPE position t - 1). While drafting, h is the drafter's own output of
the step before; once the target has run on a token, its slot is made again from real features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draft_opd.drafters.attention import Rotary
from draft_opd.drafters.base import Choose, Drafter
from draft_opd.drafters.eagle3_layer import Eagle3Layer
from draft_opd.drafters.eagle3_options import STEP_DECAY, STEPS, Eagle3Options, default_target_layers
from draft_opd.drafters.layouts import eagle3 as layout
from draft_opd.drafters.layouts.eagle3 import FLAGS
from draft_opd.drafters.layouts.vocabulary import as_buffers, checked_ids, most_frequent, target_ids
from draft_opd.drafters.registry import register
from draft_opd.drafters.target_config import (
    adopt_final_norm,
    config_for,
    initialise,
    raise_mismatch,
)
from draft_opd.drafters.tree_expansion import best_children
from draft_opd.models.fused_layers import FusedLayers
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.target import Target
from draft_opd.utils.errors import UserError


@register("eagle3")
class Eagle3Drafter(Drafter):
    """See the module docstring. `config` is a LlamaConfig with the EAGLE-3 keys.

    qk_norm: attention of the Qwen3 kind. own_embeddings, own_head: not the target's (embeddings
    are kept as they are, since SGLang would serve the target's).
    """

    vllm_method = "eagle3"
    options = Eagle3Options
    has_trees = sees_drafts = True
    sft_loss = "forward_kl"

    def __init__(
        self,
        config: LlamaConfig,
        *,
        qk_norm: bool = False,
        own_embeddings: bool = False,
        own_head: bool = True,
    ):
        super().__init__()
        options = getattr(config, "eagle_config", None) or {}
        self.config = config
        self.draft_length = int(options.get("draft_length", STEPS))
        nested = options.get("eagle_aux_hidden_state_layer_ids")  # layer outputs, as SGLang reads
        outer = getattr(config, "eagle_aux_hidden_state_layer_ids", None)  # one higher, as vLLM
        layers = nested or (outer and [i - 1 for i in outer])
        # Without either, what engines default to: it depends on the target's depth.
        self._given_layers = tuple(layers) if layers else None
        self.target_layers = self._given_layers or ()
        hidden, size = config.hidden_size, config.draft_vocab_size or config.vocab_size
        self.feature_size = getattr(config, "target_hidden_size", None) or hidden
        count = len(layers) if layers else getattr(config, "num_aux_hidden_states", None) or 3
        self.qk_norm = qk_norm
        self.flags = {k: bool(options.get(k, getattr(config, k, False))) for k in FLAGS}
        self.input_norm = self.fc_norm = None

        def norm(width: int) -> nn.Module:
            return LlamaRMSNorm(width, eps=config.rms_norm_eps)

        if self.flags["norm_before_fc"]:
            self.input_norm = norm(count * self.feature_size)
        if self.flags["fc_norm"]:
            self.fc_norm = nn.ModuleList(norm(self.feature_size) for _ in range(count))
        self.fc = nn.Linear(count * self.feature_size, hidden, bias=False)
        self.midlayer = Eagle3Layer(config, qk_norm, self.flags["norm_before_residual"])
        self.norm = norm(hidden)
        self.embed_tokens = self.lm_head = None
        if own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden).requires_grad_(False)
        if own_head:
            self.lm_head = nn.Linear(hidden, size, bias=False)
        d2t, t2d = as_buffers(torch.arange(size), config.vocab_size)
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)
        self.rotary = Rotary(config=config)
        initialise(self)

    # -- configuration ----------------------------------------------------------------------

    @classmethod
    def matches(cls, config: dict) -> bool:
        return layout.matches(config)

    @classmethod
    def from_files(cls, config: dict, tensors: dict[str, Tensor]):
        files = layout.read(config, tensors)
        drafter = cls(
            LlamaConfig.from_dict(files.config),
            qk_norm=files.qk_norm,
            own_embeddings=files.own_embeddings,
            own_head=files.own_head,
        )
        drafter.layout, drafter.copies = files.layout, files.copies
        return drafter, files.tensors

    @classmethod
    def create(cls, target: Target, counts: Tensor | None = None, **options) -> Eagle3Drafter:
        """A new drafter for `target`; options are the fields of `Eagle3Options`."""
        o = Eagle3Options(**options)
        size = o.draft_vocab_size or target.vocab_size
        if size > target.vocab_size:
            raise UserError(
                f"model.options.draft_vocab_size: {size} is more than the target's {target.vocab_size} tokens"
            )
        layers = o.target_layers or default_target_layers(target.num_layers)
        flags = {k: getattr(o, k) for k in FLAGS}
        config = LlamaConfig(num_hidden_layers=1, **config_for(target, o), **flags)
        config.draft_vocab_size = size
        config.eagle_config = {
            "eagle_aux_hidden_state_layer_ids": list(layers),
            "draft_length": o.draft_length,
        }
        drafter = cls(config, qk_norm=o.attention == "qwen3")
        if size < target.vocab_size:
            if counts is None:
                raise UserError("a draft vocabulary is chosen from trajectories: give some")
            ids = most_frequent(counts.cpu(), size)
            drafter.d2t, drafter.t2d = as_buffers(ids, target.vocab_size)
        else:
            ids = torch.arange(size)
        drafter.bind(target)
        drafter.lm_head.weight.data.copy_(target.head.weight[ids.to(target.device)])
        adopt_final_norm(drafter.norm, target)
        return drafter.to(target.device)

    def config_dict(self) -> dict:
        return layout.config_of(self)

    def tensors(self) -> dict[str, Tensor]:
        return layout.tensors_of(self)

    def speculators_files(self, verifier: dict):
        return layout.speculators_files(self, verifier)

    def known_faults(self, num_layers: int):
        def shift(config, by):
            key = "eagle_aux_hidden_state_layer_ids"
            config[key] = [i + by for i in config[key]]
            config["eagle_config"][key] = [i + by for i in config["eagle_config"][key]]

        made = self.common_faults(num_layers, shift)
        for flag in ("norm_before_residual", "norm_output"):
            other = not self.flags[flag]
            made[f"{flag} is {str(other).lower()}, trained was the other"] = (
                lambda config, _, flag=flag, other=other: config.update({flag: other})
            )
        return made

    def check_target(self, target: Target) -> None:
        pairs = (
            ("hidden size", self.config.hidden_size, target.hidden_size),
            ("features of", self.feature_size, target.hidden_size),
            ("vocabulary of", self.config.vocab_size, target.vocab_size),
        )
        for what, ours, theirs in pairs:
            if ours != theirs:
                raise_mismatch(target, what, ours, theirs)
        layers = list(self._given_layers or default_target_layers(target.num_layers))
        if layers != sorted(set(layers)) or len(layers) * self.feature_size != self.fc.in_features:
            count = self.fc.in_features // self.feature_size
            raise UserError(f"tapped target layers {layers} must be {count}, ascending and unique")
        if layers[0] < 0 or layers[-1] > target.num_layers - 2:
            raise_mismatch(target, "tapped layers", layers, f"usable layers 0..{target.num_layers - 2}")
        ids = checked_ids(self.d2t, target.vocab_size)
        if len(ids) == target.vocab_size and self.d2t.any():
            raise UserError("d2t reorders a whole vocabulary, which engines do not expect")

    def bind(self, target: Target) -> None:
        super().bind(target)
        # SafeAILab's files name no layers: engines take these then.
        self.target_layers = self._given_layers or default_target_layers(target.num_layers)

    @property
    def vocabulary(self) -> Tensor | None:
        if len(self.d2t) == self.config.vocab_size:
            return None
        return target_ids(self.d2t)

    def position_decay(self, num_draft_tokens: int) -> float:
        return STEP_DECAY

    @property
    def formats(self) -> tuple[str, ...]:
        # SGLang 0.5.23 has neither qk_norm nor norm_before_residual (llama_eagle3.py), and it always
        # takes the target's embeddings.
        sglang = not (self.qk_norm or self.flags["norm_before_residual"] or self.embed_tokens)
        return ("sglang", "vllm", "speculators") if sglang else ("vllm", "speculators")

    def head(self, target: Target) -> nn.Linear:
        return self.lm_head or target.head

    def forward_token_counts(self, num_draft_tokens: int) -> list[int]:
        return [1] * num_draft_tokens

    def sglang_flags(self) -> dict[str, int | str]:
        return {
            "algorithm": "EAGLE3",
            "num-steps": self.draft_length,
            "eagle-topk": 1,
            "num-draft-tokens": self.draft_length + 1,
        }

    # -- drafting ---------------------------------------------------------------------------

    # A context is a PositionCache: layer 0 holds keys and values by slot, layer 1 the fused
    # features by position (as keys; its values are empty).

    def _slots(self, target: Target, ids: Tensor, before: Tensor, positions: Tensor):
        """Keys and values of slots: tokens [batch, m], features of the token before each."""
        x, _ = self.midlayer.join(self._embed(target, ids).to(before.dtype), before)
        return self.midlayer.self_attn.keys_values(x, self.rotary(x, positions - 1))

    def _embed(self, target: Target, ids: Tensor) -> Tensor:
        return target.embed(ids) if self.embed_tokens is None else self.embed_tokens(ids)

    def _fuse(self, features: Tensor) -> Tensor:
        dtype = self.fc.weight.dtype
        features = features.to(dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.split(self.feature_size, -1)
            features = torch.cat([n(x) for n, x in zip(self.fc_norm, parts, strict=True)], -1)
        # Back from autocast's type: every step adds to what the step before has left.
        return self.fc(features).to(dtype)

    def build_cache(self, target: Target, ids: Tensor, features: Tensor) -> PositionCache:
        fused = self._fuse(features)
        before = torch.cat([torch.zeros_like(fused[:, :1]), fused[:, :-1]], 1)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        k, v = self._slots(target, ids, before, positions)
        fused = fused[:, None]
        return PositionCache.of([k, fused], [v, fused[..., :0]])

    def extend_cache(self, context, target, ids, features, positions) -> None:
        fused = self._fuse(features)
        before = torch.cat([self._fused_before(context, positions[:, :1]), fused[:, :-1]], 1)
        context.prepare(positions)
        context.update(*self._slots(target, ids, before, positions), 0)
        context.update(fused[:, None], fused[:, None, :, :0], 1)

    @staticmethod
    def _fused_before(context: PositionCache, positions: Tensor) -> Tensor:
        """Fused features [batch, A, H] of the token before each position; zeros before the text."""
        fused = context.keys[1][:, 0]
        shape = (*positions.shape, fused.shape[-1])
        if not fused.shape[1]:
            return fused.new_zeros(shape)
        found = fused.gather(1, (positions - 1).clamp_min(0)[..., None].expand(shape))
        return found * (positions > 0)[..., None]

    def _steps(self, target: Target, context, anchors: Tensor, ids: Tensor):
        """Drafting, step by step: a generator of hidden states [batch, A, H], normed for the head.

        anchors, ids [batch, A]. It is sent (tokens, parents) [batch, A'], the next step's tokens
        and the blocks of this step that they continue (None: each its own).
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        visible = min(context.reach(anchors - 1), context.capacity)
        far = tuple(
            x[0][:, :, :visible].repeat_interleave(attention.groups, 1)
            for x in (context.keys, context.values)
        )
        slot = torch.arange(visible, device=ids.device)
        # Slot 0 has no token before it; engines have no such slot.
        seen = (slot >= 1) & (slot < anchors[..., None])
        fused = context.static and context.fused
        if fused and self.fused is None:
            self.fused = FusedLayers([layer], _with_rotary)
        hidden, tokens, own = self._fused_before(context, anchors), ids, []
        positions = anchors
        while True:
            embedded = self._embed(target, tokens).to(hidden.dtype)
            x, hidden = layer.join(embedded, hidden)
            rotary = self.rotary(x, positions - 1)
            new = [t[:, :, :, None] for t in attention.keys_values(x, rotary)]
            own = [torch.cat(pair, 3) for pair in zip(own, new, strict=True)] if own else new
            if fused:
                hidden = self.fused(0, hidden, x, *rotary, *far, seen, *own)
            else:
                hidden = self.run(layer, hidden, x, rotary, far, seen, *own)
            normed = self.norm(hidden)
            tokens, parents = yield normed
            hidden = normed if self.flags["norm_output"] else hidden
            positions = positions + 1
            if parents is not None:
                hidden, seen, positions = (_take(t, parents, 1) for t in (hidden, seen, positions))
                own = [_take(t, parents, 2) for t in own]

    def replay(self, target, context, anchors, ids, drafted) -> Tensor:
        steps = self._steps(target, context, anchors, ids)
        out = [next(steps)]
        for k in range(drafted.shape[2] - 1):
            out.append(steps.send((drafted[:, :, k], None)))
        return torch.stack(out, 2)

    def propose(self, target, context, anchors, ids, draft_length, choose: Choose):
        drafted, probs = [], []
        steps = self._steps(target, context, anchors, ids)
        hidden = next(steps)
        while True:
            found, q = choose(self.logits(target, hidden.flatten(0, 1))[:, None])
            drafted.append(found.view(anchors.shape))
            if q is not None:
                probs.append(q[:, 0].unflatten(0, anchors.shape))
            if len(drafted) == draft_length:
                return torch.stack(drafted, 2), torch.stack(probs, 2) if probs else None
            hidden = steps.send((drafted[-1], None))

    def hidden_along_text(self, target, context, anchors, ids, text):
        steps = self._steps(target, context, anchors, ids)
        hidden = next(steps)
        for k in range(text.shape[2]):
            yield hidden[:, :, None]
            if k + 1 < text.shape[2]:
                hidden = steps.send((text[:, :, k], None))

    def propose_tree(self, target, context, anchors, ids, widths):
        steps = self._steps(target, context, anchors[:, None], ids[:, None])
        hidden, score = next(steps), torch.zeros_like(anchors[:, None], dtype=torch.float32)
        tokens, parents, first = [ids[:, None]], [torch.full_like(ids[:, None], -1)], 0
        for width in widths:
            found, parent, score = best_children(self.logits(target, hidden), score, width)
            tokens.append(found)
            parents.append(parent + first)
            first += hidden.shape[1]
            if len(tokens) <= len(widths):
                hidden = steps.send((found, parent))
        depths = torch.cat([torch.full_like(t, k) for k, t in enumerate(tokens)], 1)
        return torch.cat(tokens, 1), torch.cat(parents, 1), depths


def _with_rotary(layer, hidden, x, cos, sin, keys, values, *rest) -> Tensor:
    """The layer with tensors only, for `FusedLayers`."""
    return layer(hidden, x, (cos, sin), (keys, values), *rest)


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """x with its `dim`-th axis (blocks) replaced by the blocks index [batch, A']."""
    shape = list(x.shape)
    shape[dim] = index.shape[1]
    view = [1] * x.dim()
    view[0], view[dim] = index.shape
    return x.gather(dim, index.view(view).expand(shape))
