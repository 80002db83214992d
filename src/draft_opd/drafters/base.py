"""What every drafter family offers; nothing outside a family's file asks which one it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from draft_opd.drafters.registry import FAMILIES, family_of
from draft_opd.drafters.target_config import full_attention
from draft_opd.drafters.weights import compare_copies, read_tensors, split_copies, write_model
from draft_opd.models.cpu_linear import prepack
from draft_opd.models.fused_layers import FusedLayers
from draft_opd.models.hub import find_drafter_files
from draft_opd.models.logit_map import IDENTITY, LogitMap
from draft_opd.utils.errors import UserError, one_line
from draft_opd.utils.files import replace_folder

if TYPE_CHECKING:
    from draft_opd.models.target import Target
    from draft_opd.models.target_info import TargetInfo

# Picks draft tokens from logits [..., V]: returns ids [...] and, when the draft is sampled,
# the distribution [..., V] they were drawn from (None for argmax in greedy decoding).
Choose = Callable[[Tensor], tuple[Tensor, Tensor | None]]

# Changes config and tensors of a drafter's files in place; may return what the drafter itself does otherwise.
Fault = Callable[[dict, dict[str, Tensor]], Callable[[Any], None] | None]


class DraftCache(Protocol):
    """What a drafter keeps of a batch of texts that the target has already run on (for DFlash,
    projected keys and values by position). Callers use these methods and look no further."""

    def reserve(self, capacity: int) -> None:
        """Makes room for positions 0..capacity - 1, so that the storage need not move."""

    def set_bound(
        self, slots: int | None, filled: bool = False, static: bool = False, fused: bool = False
    ) -> None:
        """The next drafts look at so many positions at most. `filled`: every row reaches just so
        far. `static`: where they reach is known to the device only, and no value may be read.
        `fused`: layers may be compiled ones, if the family has any."""

    # For decoding in storage that never moves:

    def allocate(self, rows: int, capacity: int) -> DraftCache:
        """An empty cache of the same kind for other rows, its storage made at once."""

    def first_rows(self, rows: int) -> DraftCache:
        """A cache over the storage of the first rows of this one."""

    def copy_rows(self, source: DraftCache, rows: Tensor) -> None:
        """Copies the rows of `source` over `rows` of this one (index tensor)."""

    def move_rows(self, source: Tensor, rows: Tensor) -> None:
        """Copies rows `source` of this cache over `rows` (index tensors)."""

    def select(self, rows: Tensor) -> None:
        """Keeps only the given batch rows (index tensor)."""

    def snapshot(self) -> Any:
        """What `rollback` needs to come back to this state."""

    def rollback(self, state: Any, lengths: Tensor) -> None:
        """Back to a snapshot, keeping what came after it in positions below `lengths` [batch]."""


class Drafter(nn.Module):
    """A trainable drafter for one target; `build_cache` and `extend_cache` feed its `DraftCache`."""

    family: ClassVar[str]  # set by `register`
    target_layers: tuple[int, ...]  # 0-based target layers whose outputs are the features
    draft_length: int  # K, tokens proposed per round as trained
    vocabulary: Tensor | None = None  # [Vd] the target's ids it can draft, ascending; None: all
    options: ClassVar[type[BaseModel]]  # of `create`: what a recipe's model.options may hold
    formats: ClassVar[tuple[str, ...]]  # what `export` can write: engines and layouts
    vllm_method: ClassVar[str]  # in vLLM's --speculative-config
    gradient_checkpointing: bool = False  # compute layers again in the backward pass
    layout: str = ""  # the layout of the files it was read from
    has_trees: ClassVar[bool] = False
    sees_drafts: ClassVar[bool] = False  # an offset is conditioned on the tokens before it
    copies: Mapping[str, Tensor] = MappingProxyType({})  # of the target's, in its files; until `bind`
    fused: FusedLayers | None = None  # made when a context first asks for compiled layers
    sft_loss: ClassVar[str] = "cross_entropy"  # of `losses/sft.py`, where the recipe says auto
    has_confidence: bool = False  # see `confidence`
    logit_map: LogitMap = IDENTITY  # behind the head
    num_candidates: int | None = None  # it drafts only among so many tokens of its body's logits
    weights_per_token: int = 0  # of what `parameters` hold: read anew for every drafted token
    tables: ClassVar[tuple[str, ...]] = ("lm_head",)  # prefixes: matrices that Muon leaves to AdamW
    taken_from: ClassVar[tuple[str, ...]] = ()  # families whose drafters it can begin with, see `grow`

    # -- what a family implements ---------------------------------------------------------

    @classmethod
    def create(cls, target: Target, counts: Tensor | None = None, **options: Any) -> Drafter:
        """A fresh, randomly initialised drafter that fits `target`.

        counts [V]: how often the target says each token, for a draft vocabulary.
        """
        raise NotImplementedError

    @classmethod
    def grow(cls, drafter: Drafter, target: Target, **options: Any) -> Drafter:
        """A new drafter of this family that drafts as `drafter`, one of the families `taken_from`, does; what
        it has beside that learns from there."""
        raise NotImplementedError

    @classmethod
    def matches(cls, config: dict) -> bool:
        """Whether a config.json belongs to this family."""
        raise NotImplementedError

    @classmethod
    def from_files(cls, config: dict, tensors: dict[str, Tensor]) -> tuple[Drafter, dict[str, Tensor]]:
        """A drafter as config.json describes it, and the file's tensors under its own names.

        Takes every layout of the family; the caller loads the tensors.
        """
        raise NotImplementedError

    def config_dict(self) -> dict:
        """config.json, with every key any reader of the layout needs."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds."""
        return dict(self.state_dict())

    def speculators_files(self, verifier: dict) -> tuple[dict, dict[str, Tensor]]:
        """config.json and tensors as speculators has them; `verifier` names the target."""
        raise NotImplementedError

    def check_target(self, target: TargetInfo) -> None:
        """Raises `UserError` when this drafter cannot serve `target`; changes nothing."""
        raise NotImplementedError

    def bind(self, target: TargetInfo) -> None:
        """Checks the target and takes from it what the drafter's files leave open. Must come before
        the drafter is used; may be repeated. Raises `UserError` as `check_target` does."""
        self.check_target(target)
        prepack(self)
        if self.copies and hasattr(target, "model"):
            compare_copies(self.copies, target)
            self.copies = {}

    def build_cache(self, target: Target, ids: Tensor, features: Tensor) -> DraftCache:
        """ids [batch, L], features [batch, L, F] of whole right-padded rows."""
        raise NotImplementedError

    def extend_cache(
        self, context: DraftCache, target: Target, ids: Tensor, features: Tensor, positions: Tensor
    ) -> None:
        """Adds tokens the target has just run on ([batch, m], F features each) to a context.

        What it knew of those positions is overwritten; later positions are forgotten.
        """
        raise NotImplementedError

    def replay(
        self, target: Target, context: DraftCache, anchors: Tensor, ids: Tensor, drafted: Tensor
    ) -> Tensor:
        """Drafts again, with gradient, exactly as at inference.

        anchors, ids [batch, A]: anchor positions and the tokens there; drafted [batch, A, K]: the
        tokens that later offsets are conditioned on, for families that are (at inference: what was
        proposed). Returns hidden states [batch, A, K, H] for `logits`.
        """
        raise NotImplementedError

    def propose(
        self,
        target: Target,
        context: DraftCache,
        anchors: Tensor,
        ids: Tensor,
        draft_length: int,
        choose: Choose,
        confidence: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts a block at every anchor; anchors, ids [batch, A].

        `choose` is given logits [batch * A, m, V] of the next m offsets, from left to right.
        Returns ids [batch, A, K] and their distributions [batch, A, K, V] (or None). confidence: with
        `has_confidence`, a block ends before its first offset that passes with a smaller chance; ids are -1
        from there on.
        """
        raise NotImplementedError

    def propose_tree(
        self, target: Target, context: DraftCache, anchors: Tensor, ids: Tensor, widths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A draft tree a row; anchors, ids [batch]; `widths` nodes at depths 1, 2, ...

        Returns tokens, parents and depths [batch, 1 + Σ widths]; node 0 is the anchor's token, and
        parents (-1 for it) come before their children. Only where `has_trees`.
        """
        raise NotImplementedError

    def hidden_along_text(
        self, target: Target, context: DraftCache, anchors: Tensor, ids: Tensor, text: Tensor
    ) -> Iterator[Tensor]:
        """Hidden states for `logits` of blocks whose drafts agree with the text; anchors, ids
        [batch, A], text [batch, A, K]. Yields [batch, A, m, H] of the next m offsets, K in all; who
        asks may stop. By default all offsets at once."""
        yield self.replay(target, context, anchors, ids, text)

    def head(self, target: Target) -> nn.Linear:
        """LM head [Vd, H] that turns `replay`'s hidden states into logits over `vocabulary`."""
        raise NotImplementedError

    def confidence(self, hidden: Tensor, before: Tensor) -> Tensor | None:
        """Logits [...] of the chance that each offset passes, given that those before it did; None for
        families that do not say. hidden [..., H] of `replay`, before [...]: the token in front of each."""
        return None

    def forward_token_counts(self, num_draft_tokens: int) -> list[int]:
        """One entry a forward of the drafter in a round: the number of tokens that it runs."""
        raise NotImplementedError

    def position_decay(self, num_draft_tokens: int) -> float:
        """γ_sft for blocks of `num_draft_tokens` offsets: SFT weighs offset k with exp(-(k-1)/γ_sft)."""
        raise NotImplementedError

    def sglang_flags(self) -> dict[str, int | str]:
        """What SGLang's command line needs to know, by the names of its --speculative flags."""
        raise NotImplementedError

    def known_faults(self, num_layers: int) -> dict[str, Fault]:
        """{name: change} for `with_fault`: each reproduces a known bug of an export or an engine.
        num_layers: the target's.
        """
        raise NotImplementedError

    def misreadings(self) -> dict[str, Fault]:
        """{name: change} for `with_fault`: other ways in which tools read the same weights."""
        return {}

    # -- common -----------------------------------------------------------------------------

    def with_fault(self, change: Fault) -> Drafter | None:
        """A copy through its files, after `change(config, tensors)`; None if that is no drafter."""
        config = json.loads(json.dumps(self.config_dict()))
        tensors = {k: v.detach().cpu().clone() for k, v in self.tensors().items()}
        adjust = change(config, tensors)
        try:
            drafter, tensors = type(self).from_files(config, tensors)
            drafter.load_state_dict(tensors)
        except (UserError, RuntimeError):
            return None
        if adjust is not None:
            adjust(drafter)
        return drafter.to(self.device, next(self.parameters()).dtype).eval()

    def common_faults(self, num_layers: int, shift: Callable[[dict, int], None]) -> dict:
        """Those of every family; `shift(config, by)` moves the tapped layers."""
        faults: dict[str, Fault] = {}
        for by, name in ((1, "one higher"), (-1, "one lower")):
            if self.target_layers[0] + by >= 0 and self.target_layers[-1] + by < num_layers - 1:

                def move(config, _, by=by):
                    shift(config, by)

                faults[f"the target's layers are tapped {name} than trained"] = move
        ours = full_attention(self.config_dict()["rope_parameters"])["rope_theta"]
        for theta in (10_000.0, 500_000.0, 1_000_000.0, 5_000_000.0):

            def turn(config, _, theta=theta):
                config["rope_theta"] = full_attention(config["rope_parameters"])["rope_theta"] = theta

            if theta != ours:
                faults[f"the rope base is {theta:g}, trained was {ours:g}"] = turn
        for name, value in self.tensors().items():
            if value.is_floating_point() and value.ndim == 2:

                def forget(_, tensors, name=name):
                    tensors[name].zero_()

                faults[f"the tensor {name} was not loaded (a misnamed weight)"] = forget
        return faults

    def run(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`part(*inputs)`; with `gradient_checkpointing` only the inputs are kept for the backward
        pass."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return part(*inputs)
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)

    def head_weights(self, target: Target) -> tuple[Tensor, ...]:
        """Matrices [Vd, H_i] whose products with consecutive parts of the hidden states add up to the logits:
        that of `head`, in autocast's type where it is the target's, and what else a family has."""
        head = self.head(target)
        return (target.head_weight() if head is target.head else head.weight,)

    def draft_logits(self, target: Target, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., Vd], over `vocabulary`; -inf for what cannot be drafted."""
        head = self.head(target)
        return self.logit_map(head(hidden.to(head.weight.dtype)))

    def logits(self, target: Target, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], the target's vocabulary; -inf for what cannot be drafted."""
        return over_target(self.draft_logits(target, hidden), self.vocabulary, target.vocab_size)

    def can_draft(self, ids: Tensor) -> Tensor:
        """Whether each of `ids` [...] is in the draft vocabulary."""
        if self.vocabulary is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return torch.isin(ids, self.vocabulary)

    def checked_length(self, asked: int | None) -> int:
        """A draft length in range; None is as trained. Raises `UserError`."""
        num_draft_tokens = self.draft_length if asked is None else asked
        if not 1 <= num_draft_tokens <= self.draft_length:
            raise UserError(
                f"draft length {num_draft_tokens} is out of range: this drafter proposes "
                f"1 to {self.draft_length} tokens"
            )
        return num_draft_tokens

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @staticmethod
    def from_pretrained(
        path_or_id: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Drafter:
        """Loads a drafter folder or hub id of any family.

        Raises `UserError` for anything that is not one: no config, an unknown layout, missing,
        misnamed or misshapen tensors, or weights that are not safetensors.
        """
        config, files = find_drafter_files(path_or_id)
        weights, folder = files[0], files[0].parent
        family = family_of(config)
        if family is None:
            raise UserError(
                f"'{path_or_id}' is not a drafter we know: its config.json names "
                f"{config.get('architectures')}; known families: {', '.join(FAMILIES)}"
            )
        tensors, copies = split_copies(read_tensors(files))
        try:
            drafter, tensors = family.from_files(config, tensors)
        except UserError as error:
            raise UserError(f"'{folder}': {error}") from None
        except Exception as error:
            line = one_line(error)
            raise UserError(f"the config.json of '{folder}' describes no drafter ({line})") from error
        drafter.copies = {**drafter.copies, **copies}
        expected = drafter.state_dict()
        for name in sorted(set(expected) | set(tensors)):
            if name not in tensors:
                raise UserError(f"'{weights}' lacks the tensor '{name}'")
            if name not in expected:
                raise UserError(f"'{weights}' has an unknown tensor '{name}'")
            if expected[name].shape != tensors[name].shape:
                raise UserError(
                    f"'{weights}': tensor '{name}' is {list(tensors[name].shape)}, "
                    f"the config asks for {list(expected[name].shape)}"
                )
        drafter.load_state_dict(tensors)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return drafter.to(device=device, dtype=dtype or torch.float32).eval()

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        *,
        verifier: dict | None = None,
        card: str | None = None,
        copies: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Writes config.json and model.safetensors; the folder appears whole or not at all. verifier: write
        speculators' layout instead of the family's own. card: README.md. copies: the target's, added."""
        config, tensors = self.config_dict(), self.tensors()
        if verifier is not None:
            config, tensors = self.speculators_files(verifier)
        with replace_folder(Path(folder)) as temporary:
            if card is not None:
                (temporary / "README.md").write_text(card, encoding="utf-8")
            write_model(temporary, config, {**tensors, **copies}, dtype or next(self.parameters()).dtype)


def over_target(logits: Tensor, vocabulary: Tensor | None, size: int) -> Tensor:
    """Logits [..., Vd] over a draft vocabulary -> [..., size] over the target's, else -inf."""
    if vocabulary is None:
        return logits
    wide = logits.new_full((*logits.shape[:-1], size), -torch.inf)
    return wide.index_copy(-1, vocabulary, logits)
