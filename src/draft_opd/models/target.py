"""The frozen target: forward over trajectories, cached decoding, branch forward."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from draft_opd.models.cpu_linear import prepack
from draft_opd.models.gqa_attention import use_grouped
from draft_opd.models.hub import EMBEDDED
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.layer_walk import LayerWalk
from draft_opd.models.target_info import TargetInfo, check_tokenizer, find_target
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import read_json


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
        self._takes_booleans = use_grouped(model)
        if prepacked:
            prepack(model)
        self._check_supported()
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
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
            try:
                with _no_progress_bar():
                    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **options)
            except ValueError as error:
                if "scaled_dot_product_attention" not in str(error):
                    raise
                # Attention sinks, as gpt-oss has: eager attention takes our masks as well.
                with _no_progress_bar():
                    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            check_tokenizer(tokenizer)
        except Exception as error:
            raise UserError(f"target '{path_or_id}' cannot be loaded: {_told(error)}") from error
        return cls(model.to(device), tokenizer, str(path_or_id), prepacked, captured)  # type: ignore[arg-type]

    def _check_supported(self) -> None:
        """Refuses models whose logits are not `head(hidden)` (our losses rely on it) or whose
        layers cannot be tapped."""
        if not hasattr(self.decoder, "layers") or getattr(self.head, "bias", None) is not None:
            raise UserError(
                f"target '{self.name}' ({type(self.model).__name__}) is not supported: its decoder "
                "must have `layers`, and its LM head no bias"
            )
        ids = torch.arange(3, device=self.device)[None]
        with torch.inference_mode():
            logits = self.model(input_ids=ids, use_cache=False).logits
            ours = self.head(self.trajectories(ids).hidden)
        if not torch.allclose(logits.float(), ours.float(), rtol=1e-2, atol=1e-2):
            raise UserError(
                f"target '{self.name}' transforms its logits after the LM head "
                "(soft-capping or scaling), which is not supported yet"
            )

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
            digest.update(weight.detach()[:4].float().cpu().numpy().tobytes())
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

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        return self.head(hidden)

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

    def cache(self, capacity: int = 0) -> PositionCache:
        return PositionCache(capacity)

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

    def _mask(self, visible: Tensor, query: Tensor, key: Tensor) -> Tensor | dict[str, Tensor]:
        """What attention takes, [batch, 1, queries, keys], for who sees whom [batch, queries,
        keys]; per layer type if needed."""

        def additive(allowed: Tensor) -> Tensor:
            if self._takes_booleans:
                return allowed[:, None]
            zero = torch.zeros((), dtype=self.dtype, device=allowed.device)
            return torch.where(allowed, zero, torch.finfo(self.dtype).min)[:, None]

        window = getattr(self.config, "sliding_window", None)
        if window and getattr(self.config, "use_sliding_window", True):
            near = visible & (query[:, :, None] - key[:, None, :] < window)
        else:
            near = visible
        layer_types = getattr(self.config, "layer_types", None)
        if not layer_types:  # models that say nothing by layer slide everywhere or nowhere
            return additive(near)
        types = set(layer_types)
        if types == {"full_attention"}:
            return additive(visible)
        masks = {"full_attention": additive(visible), "sliding_attention": additive(near)}
        if types - set(masks):
            raise UserError(
                f"target '{self.name}' has layers of kind {sorted(types - set(masks))}; only full "
                "and sliding attention are supported"
            )
        return masks

    def _forward(self, ids: Tensor, layers: Sequence[int], **kwargs: Any) -> TargetOutput:
        with self._taps(layers) as found:
            hidden = self.decoder(input_ids=ids, **kwargs).last_hidden_state
        return _output(hidden, found, layers)

    def _over_cache(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | dict[str, Tensor],
        cache: PositionCache,
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
        self, ids: Tensor, positions: Tensor, cache: PositionCache, layers: Sequence[int] = ()
    ) -> TargetOutput:
        """Runs tokens [batch, m] at absolute `positions` [batch, m] against the cache.

        Used to prefill and to verify a block. Tokens see cached slots at or before their own
        position; their keys are written to the slots of their positions, over whatever was there.
        """
        cache.prepare(positions)
        key = torch.arange(cache.visible, device=ids.device)[None]
        mask = self._mask(key[:, None, :] <= positions[:, :, None], positions, key)
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
        cache: PositionCache,
        layers: Sequence[int] = (),
    ) -> TargetOutput:
        """Runs many continuations of cached texts in one forward.

        ids, positions, prefix [batch, m]; own [batch, m, m]: which of these tokens each sees. A
        token also sees the first `prefix` cached slots. The cache is not changed (`cache.keep`
        takes what should stay).
        """
        width = cache.reach(prefix - 1)
        cache.prepare(positions, branch=True, visible=width)
        slots = torch.arange(width, device=ids.device)[None]
        visible = torch.cat([slots[:, None, :] < prefix[:, :, None], own], -1)
        key = torch.cat([slots.expand(len(ids), -1), positions], -1)
        return self._over_cache(ids, positions, self._mask(visible, positions, key), cache, layers)

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
        }


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> Tensor:
    """Right-pads lists of ids to a tensor [rows, longest]."""
    width = max(map(len, rows))
    return torch.tensor([[*r, *[fill] * (width - len(r))] for r in rows], device=device)


def _output(hidden: Tensor, found: dict[int, Tensor], layers: Sequence[int]) -> TargetOutput:
    features = torch.cat([found[i] for i in layers], -1) if layers else None
    return TargetOutput(hidden, features)


@contextmanager
def _no_progress_bar():
    """One bar at a time, and that one is ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _told(error: Exception) -> str:
    """What transformers says of a model that does not load, in a line that helps."""
    text = str(error).strip() or repr(error)
    if "trust_remote_code" in text:
        return "it needs code that ships with it: read that, then pass --trust-remote-code"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json asks for"
    if "Unrecognized configuration class" in text:
        return "its config.json is of no causal language model"
    return (
        f"{text.splitlines()[0][:200]}; give a model folder with config.json and safetensors, a "
        f"hub id, or '{EMBEDDED}'"
    )


def is_target_folder(path: Path) -> bool:
    """Whether a folder's config names a causal LM."""
    try:
        config = read_json(path / "config.json")
        return any("CausalLM" in a for a in config.get("architectures") or [])
    except (UserError, AttributeError):
        return False
