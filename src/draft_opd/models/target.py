"""The frozen target: forward over trajectories, cached decoding, branch forward."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draft_opd.models.block_sparse import FLEX_MINIMUM, branch_mask
from draft_opd.models.cpu_linear import prepack
from draft_opd.models.gqa_attention import use_grouped
from draft_opd.models.hub import EMBEDDED
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.layer_walk import LayerWalk
from draft_opd.models.loading import load_model, told
from draft_opd.models.logit_map import LogitMap, find_logit_map
from draft_opd.models.masks import Masks, other_kinds
from draft_opd.models.stateful import StatefulCache, branch_texts
from draft_opd.models.target_info import TargetInfo, find_target
from draft_opd.utils.errors import UserError


@dataclass
class TargetOutput:
    """`hidden` [batch, tokens, H], normed, ready for the LM head; `features` [batch, tokens, F]:
    the tapped layers' outputs side by side, None when no layer was tapped."""

    hidden: Tensor
    features: Tensor | None


class Target(TargetInfo):
    """A frozen transformers causal LM.

    >>> target = Target.from_pretrained("embedded", device="cpu")
    >>> target.num_layers, target.hidden_size, target.dtype
    (8, 192, torch.float32)

    Positions are absolute and every row starts at position 0 (right padding): a token sees
    exactly the cached slots at or before its own position.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        name: str = "",
        prepacked: bool = True,
        captured: bool = True,
    ):
        """prepacked: on a CPU, keep the matrices in the layout that multiplies fastest as well.
        captured: on a GPU, decode in CUDA graphs, where that is possible."""
        super().__init__(model.config, model.generation_config, tokenizer, name)
        self.model = model.eval().requires_grad_(False)
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.vocab_size = self.head.weight.shape[0]
        self._narrow_head: Tensor | None = None
        self.sharded, self.captured = False, captured
        self.workspaces: OrderedDict = OrderedDict()  # of decoding: storage and graphs, see `captured`
        self.walk: LayerWalk | None = None  # how layers run over a cache; None: the decoder's forward
        self.masks = Masks(self.config, self.dtype, booleans=use_grouped(model))
        if prepacked:
            prepack(model)
        self.logit_map = self._find_logit_map()
        self.states = other_kinds(self.config)  # kinds of layers that are no attention over slots
        self.one_by_one = False  # whether layers with states go on with one token at a time only
        if self.states:
            self.one_by_one = self._needs_single_tokens()
        else:
            self.walk = LayerWalk.matches(self.decoder, self.config, self._cached_forward)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        prepacked: bool = True,
        captured: bool = True,
    ) -> Target:
        """Loads a model folder or hub id (`embedded`: the shipped target), frozen.

        `dtype` ("auto": as stored) defaults to float32 on a CPU and for the shipped target, to the
        stored type elsewhere. Raises `UserError` when there is no such model or it is not a plain
        causal LM.
        """
        path = find_target(path_or_id)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            small = device.type == "cpu" or str(path_or_id) == EMBEDDED
            dtype = torch.float32 if small else "auto"
        elif isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        try:
            model, tokenizer = load_model(path, dtype, trust_remote_code)
        except Exception as error:
            raise UserError(f"target '{path_or_id}' cannot be loaded: {told(error)}") from error
        return cls(model.to(device), tokenizer, str(path_or_id), prepacked, captured)

    def _find_logit_map(self) -> LogitMap:
        """Refuses models whose layers cannot be tapped, or whose logits are not a known map of
        `head(hidden)`: our losses rely on it."""
        weight = getattr(self.head, "weight", None)
        if not hasattr(self.decoder, "layers") or getattr(self.head, "bias", None) is not None:
            raise UserError(
                f"target '{self.name}' ({type(self.model).__name__}) is not supported: its decoder "
                "must have `layers`, and its LM head no bias"
            )
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            raise UserError(f"target '{self.name}': its LM head is quantised: losses multiply with it")
        found = find_logit_map(self.model, self.head, self.config)
        if found is None:
            raise UserError(
                f"target '{self.name}' transforms its logits after the LM head in a way that its config "
                "does not say (known: soft-capping and scaling)"
            )
        return found

    @torch.inference_mode()
    def _cached_forward(self, walk: LayerWalk | None) -> Tensor:
        """Hidden states of tokens behind a cached text, by the walk or by the decoder's forward."""
        before, self.walk = self.walk, walk
        try:
            ids = torch.arange(6, device=self.device).view(2, 3) % self.vocab_size
            cache = self.cache()
            self.trajectories(ids, cache=cache)
            positions = torch.tensor([[3, 4], [2, 3]], device=self.device)
            return self.extend(ids[:, :2], positions, cache).hidden
        finally:
            self.walk = before

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the first 4 rows of every weight: different models may have the same name."""
        digest = hashlib.sha256()
        for weight in (self.head.weight, *self.decoder.parameters()):
            first = weight.detach() if weight.ndim == 0 else weight.detach()[:4]  # scales of FP8 have no axis
            digest.update(first.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def capturable(self) -> bool:
        """Whether rounds can be CUDA graphs. Not: experts that route on the host, frequencies that
        follow the longest position, a target in parts, a decoder that is not walked."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)]
        fixed = not {"dynamic", "longrope"} & set(kinds)
        possible = fixed and self.walk is not None and not self.sharded and not self.is_mixture
        return self.captured and possible and self.device.type == "cuda"

    @property
    def skips_tiles(self) -> bool:
        """Whether its attention takes masks of tiles: ours, without sliding windows."""
        plain = self.masks.booleans and not self.masks.window
        capped = getattr(self.config, "attn_logit_softcapping", None)
        return plain and not capped and self.walk is not None and not self.sharded

    @property
    def is_mixture(self) -> bool:
        """Whether it has experts of which a token takes some."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return any(getattr(self.config, name, None) for name in names)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """[...] token ids -> [..., H] input embeddings."""
        return self.model.get_input_embeddings()(ids)

    @cached_property
    def embedding_scale(self) -> float:
        """What `embed` multiplies its table with: √H in Gemma, else 1."""
        table = self.model.get_input_embeddings()
        ids = torch.arange(3, self.vocab_size, max(1, self.vocab_size // 64), device=self.device)
        with torch.inference_mode():
            scale = float(table(ids).float().norm() / table.weight[ids].float().norm().clamp_min(1e-12))
        return 1.0 if abs(scale - 1) < 1e-2 or not scale else scale

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], as the model gives them: scaled and capped where it does that."""
        return self.logit_map(self.head(hidden))

    def head_weight(self) -> Tensor:
        """LM head [V, H], in autocast's type where that is on: autocast itself would convert a
        frozen weight again at every use."""
        weight, kind = self.head.weight, self.device.type
        if not torch.is_autocast_enabled(kind) or weight.dtype == torch.get_autocast_dtype(kind):
            return weight
        dtype = torch.get_autocast_dtype(kind)
        if self._narrow_head is None or self._narrow_head.dtype != dtype:
            self._narrow_head = weight.to(dtype)
        return self._narrow_head

    def cache(self, capacity: int = 0) -> Any:
        """A `PositionCache`, or a `StatefulCache` where layers keep states."""
        return StatefulCache() if self.states else PositionCache(capacity)

    @torch.inference_mode()
    def _needs_single_tokens(self) -> bool:
        """Whether several tokens at once do not go on from a state. Refuses a target whose states do
        not go on at all."""
        ids = (torch.arange(12, device=self.device) * 7 % self.vocab_size)[None]
        positions = torch.arange(12, device=self.device)[None]
        whole = self.trajectories(ids).hidden[:, 8:]
        for self.one_by_one in (False, True):
            cache = self.cache()
            try:
                self.extend(ids[:, :5], positions[:, :5], cache)
                wrong = (ids[:, 5:9] + 1) % self.vocab_size
                self.extend(wrong, positions[:, 5:9], cache)
                found = self.extend(ids[:, 5:], positions[:, 5:], cache).hidden[:, 3:]
            except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
                continue  # another interface, or none
            if torch.allclose(found.float(), whole.float(), rtol=0, atol=0.05 * float(whole.abs().max())):
                return self.one_by_one
        raise UserError(
            f"target '{self.name}' has layers of kind {self.states} whose state transformers does not go "
            "on with: it cannot be decoded here"
        )

    def _run_row(self, layers: Sequence[int], ids: Tensor, positions: Tensor, cache: Any) -> tuple:
        """Of one row over transformers' cache: (hidden, features), and the cache."""
        at = positions.to(self.device)
        with self._taps(layers) as found:
            out = self.decoder(
                input_ids=ids.to(self.device), position_ids=at, past_key_values=cache, use_cache=True
            )
        made = _output(out.last_hidden_state, found, layers)
        return (made.hidden, made.features), out.past_key_values

    @contextmanager
    def _taps(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collects the outputs of 0-based decoder layers in ascending order."""
        found: dict[int, Tensor] = {}

        def hook(index):
            def keep(_module, _inputs, output):
                found[index] = output[0] if isinstance(output, tuple) else output

            return keep

        handles = [self.decoder.layers[i].register_forward_hook(hook(i)) for i in set(layers)]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, ids: Tensor, layers: Sequence[int], **kwargs: Any) -> TargetOutput:
        with self._taps(layers) as found:
            hidden = self.decoder(input_ids=ids, **kwargs).last_hidden_state
        return _output(hidden, found, layers)

    def _over_cache(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Any,  # tensors, by kind of layer where they differ, or tiles
        cache: PositionCache | StatefulCache,
        layers: Sequence[int],
    ) -> TargetOutput:
        if self.walk is not None and not self.sharded:
            return _output(*self.walk(ids, positions, mask, cache, layers), layers)
        return self._forward(
            ids,
            layers,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )

    @torch.no_grad()
    def trajectories(
        self, ids: Tensor, layers: Sequence[int] = (), cache: PositionCache | None = None
    ) -> TargetOutput:
        """One forward over right-padded rows [batch, tokens], filling `cache` when given.

        What is computed at padding is meaningless, but no real token sees it.
        """
        batch, width = ids.shape
        if cache is not None:
            positions = torch.arange(width, device=ids.device).expand(batch, -1)
            return self.extend(ids, positions, cache, layers)
        return self._forward(ids, layers, use_cache=False)

    @torch.no_grad()
    def extend(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: PositionCache | StatefulCache,
        layers: Sequence[int] = (),
    ) -> TargetOutput:
        """Runs tokens [batch, m] at absolute `positions` [batch, m] against the cache.

        Used to prefill and to verify a block. Tokens see cached slots at or before their own
        position; their keys are written to the slots of their positions, over whatever was there.
        """
        if isinstance(cache, StatefulCache):
            run = partial(self._run_row, layers)
            hidden, features = cache.extend(run, ids, positions, self.one_by_one)
            assert hidden is not None
            return TargetOutput(hidden, features)
        cache.prepare(positions)
        key = torch.arange(cache.visible, device=ids.device)[None]
        mask = self.masks(key[:, None, :] <= positions[:, :, None], positions, key)
        if cache.static:  # blocks keep their length near the context's end; what lies beyond is not kept
            positions = positions.clamp_max(self.max_positions - 1)
        return self._over_cache(ids, positions, mask, cache, layers)

    @torch.no_grad()
    def branches(
        self,
        ids: Tensor,
        positions: Tensor,
        own: Tensor,
        prefix: Tensor,
        cache: PositionCache | StatefulCache,
        layers: Sequence[int] = (),
    ) -> TargetOutput:
        """Runs many continuations of cached texts in one forward.

        ids, positions, prefix [batch, m]; own [batch, m, m]: which of these tokens each sees. A
        token also sees the first `prefix` cached slots. The cache is not changed (`cache.keep`
        takes what should stay).
        """
        if isinstance(cache, StatefulCache):
            return self._run_branches(ids, own, prefix, cache)
        width = cache.reach(prefix - 1)
        cache.prepare(positions, branch=True, visible=width)
        if self.skips_tiles and ids.is_cuda and ids.shape[1] >= FLEX_MINIMUM:
            return self._over_cache(ids, positions, branch_mask(own, prefix, width), cache, layers)
        slots = torch.arange(width, device=ids.device)[None]
        visible = torch.cat([slots[:, None, :] < prefix[:, :, None], own], -1)
        key = torch.cat([slots.expand(len(ids), -1), positions], -1)
        return self._over_cache(ids, positions, self.masks(visible, positions, key), cache, layers)

    def _run_branches(self, ids: Tensor, own: Tensor, prefix: Tensor, cache: StatefulCache) -> TargetOutput:
        """`branches` of a target with states: every branch is run behind its text from the beginning."""
        hidden = torch.zeros(*ids.shape, self.hidden_size, dtype=self.dtype, device=self.device)
        for place, text, end in branch_texts(ids, own, prefix, cache):
            rows = torch.tensor([text], device=self.device)
            hidden[place] = self.trajectories(rows).hidden[0, end:]
        return TargetOutput(hidden, None)

    def describe(self) -> dict:
        """What `inspect` prints."""
        return {
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "context": self.max_positions,
            "stop_ids": sorted(self.stop_ids),
            "stop_ids_by": self.stop_sources,
            "stop_ids_inside_turns": self.stops_inside_turns,
            "thinking_switch": self.chat.thinking_switch if self.tokenizer is not None else None,
            "template_variables": sorted(self.chat.variables) if self.tokenizer is not None else [],
            "decoding": "layers walked" if self.walk else "by the model's own forward",
            **self.abilities(),
        }

    def abilities(self) -> dict[str, str]:
        """What can be done with this target, and how."""
        if not self.states:
            return dict.fromkeys(("sft", "opd", "branches", "speculative_decoding", "trees"), "yes")
        step = "one token at a time" if self.one_by_one else "a block at a time"
        return {
            "layers_with_states": ", ".join(self.states),
            "sft": "yes",
            "opd": "yes",
            "branches": "yes, each from the beginning of its text (slow: objectives on the text need none)",
            "speculative_decoding": f"yes, every row by itself, {step}",
            "trees": "no: states follow one chain of tokens",
        }


def _output(hidden: Tensor, found: dict[int, Tensor], layers: Sequence[int]) -> TargetOutput:
    features = torch.cat([found[i] for i in layers], -1) if layers else None
    return TargetOutput(hidden, features)
