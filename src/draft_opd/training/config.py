"""Recipes: one typed tree a run, from YAML and KEY=VALUE pairs. Unknown keys are errors."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from draft_opd.decoding.sampling import Sampling
from draft_opd.losses.config import Heads, Objective
from draft_opd.utils.config import Section, first_problem
from draft_opd.utils.errors import UserError, one_line

EMBEDDED_RECIPES = Path(__file__).parent.parent / "embedded" / "recipes"
AUTO_BATCH = 16  # trajectories a step of `batch_size: auto`, times `accumulate`
VERSION: Literal[2] = 2  # of the keys below; a recipe without one is as draft-opd 0.1 wrote it
# Keys of earlier versions and the only value that a recipe may still give them: it changes nothing.
REMOVED_KEYS = {"opd.stride": 1, "opd.max_tokens": None, "opd.objective.clamp": 10.0}


class Data(Section):
    """What to train and to evaluate on."""

    trajectories: str = Field(description="trajectories.jsonl or its folder, from `collect`")
    heldout: str = Field(description="trajectories that τ is measured on, never trained on")
    limit: int | None = Field(None, ge=1, description="use only N trajectories, drawn by their ids")
    heldout_limit: int | None = Field(64, ge=1, description="of them, only N, drawn by their ids")
    max_length: int | None = Field(None, ge=8, description="cut trajectories to N tokens")
    cache_features: Literal["none", "memory", "device", "disk"] = Field(
        "none",
        description="keep the target's features after the first forward: in the host's memory, on the "
        "device (where they fit: no copies), or on disk",
    )
    features: str | None = Field(
        None, description="folder of the features on disk; default: features/ in the run folder"
    )
    cache_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="type of the features that are kept"
    )


class Model(Section):
    """A new drafter; `options` are the family's own (`DFlashOptions`, `Eagle3Options`, ..)."""

    family: str = Field("dflash", description="dflash, eagle3, dspark or dflash2")
    options: dict[str, Any] = Field(
        default_factory=dict, description="shape of a new drafter, see the families below"
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    """Cosine schedule with linear warm-up."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices, with AdamW for the rest"
    )
    muon_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="type of Muon's products. auto: float32 on a CPU; elsewhere bfloat16 where it "
        "is multiplied faster. Decided once, when a run begins",
    )
    learning_rate: float = Field(6e-4, gt=0, description="at its peak")
    final_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate / peak")
    warmup: float = Field(0.04, ge=0, le=1, description="part of the steps")
    weight_decay: float = Field(0.0, ge=0, description="decoupled")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="of AdamW, each from 0 to under 1")
    extension: Literal["rewarm", "rescale", "constant"] = Field(
        "rewarm",
        description="schedule of steps that `--resume steps=N` adds. rewarm: a warm-up and cosine of "
        "their own; rescale: as if N had been asked for at the beginning; constant: a tenth of the peak",
    )
    clip: float = Field(1.0, gt=0, description="gradient norm")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="at a loss or gradient that is not finite; either way the step is saved in "
        "nonfinite/ for replay. The tenth in a row stops as well",
    )


class Sft(Section):
    """Stage 1: at random anchors of the target's own text."""

    anchors: int = Field(16, ge=1, description="random anchors a trajectory and step")
    loss: Literal["auto", "cross_entropy", "forward_kl", "dspark"] = Field(
        "auto",
        description="with the text's tokens; KL to the target's distributions; DSpark's 0.1 CE + 0.9 L1. "
        "auto: the family's (EAGLE-3 forward_kl, DSpark dspark, else cross_entropy)",
    )
    decay: float | None = Field(
        None,
        gt=0,
        description="γ_sft in exp(-(k-1)/γ); default: the family's (DFlash 7, 5, 4 for blocks "
        "of 16, 10, 8; EAGLE-3 4.48, which is 0.8^(k-1))",
    )


class Opd(Section):
    """Stage 2: Draft-OPD."""

    rollout: Literal["hindsight", "live"] = Field(
        "hindsight", description="rounds from stored text, or by decoding again"
    )
    anchors: Literal["trace", "random", "all", "occupancy"] = Field(
        "trace",
        description="replay where rounds began, as many random positions, max_anchors of all "
        "positions, or positions drawn by the probability that a round begins there",
    )
    max_anchors: int = Field(16, ge=1, description="anchors a trajectory and step, drawn evenly")
    trace: Literal["auto", "walk", "everywhere"] = Field(
        "auto",
        description="hindsight round by round, or by drafting at every position first; auto: the "
        "faster one, by what both took once in the run. The same rounds, but where a block reaches "
        "beyond the context",
    )
    trace_every: int = Field(1, ge=1, description="steps a hindsight trace is used for")
    objective: Objective = Field(Objective(), description="what is minimised")


class Online(Section):
    """Training on what a server answers, round by round (`draft-opd online`)."""

    server: str = Field(description="URL of the vLLM or SGLang server that runs the drafter")
    prompts: str = Field(description="rows as `collect` reads them; JSONL may grow")
    rounds: int = Field(1, ge=1, description="of collecting, training and serving")
    prompts_per_round: int = Field(256, ge=1, description="new prompts a round")
    window: int = Field(1, ge=1, description="rounds whose trajectories are trained on")
    max_new_tokens: int = Field(512, ge=1, description="longest response")
    thinking: bool | None = Field(None, description="for chat templates that know it")
    reload: str | None = Field(
        None,
        description="shell command after each export; {drafter} is the folder. The server then "
        "has `patience` seconds to answer",
    )
    export_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="type of the exported weights"
    )
    server_model: str | None = Field(None, description="default: the one that is served")
    endpoint: Literal["completions", "chat"] = Field(
        "completions", description="token ids, or messages through the server's template"
    )
    in_flight: int = Field(32, ge=1, description="requests at a time")
    patience: float = Field(300.0, gt=0, description="seconds to wait for a server that is away")


class Evaluation(Section):
    """Held-out τ while training."""

    every: int = Field(50, ge=1, description="steps between measurements of held-out τ")
    patience: int | None = Field(
        None, ge=1, description="end after so many measurements without a new best; default: never"
    )


class Parallel(Section):
    """Several processes (torchrun, accelerate launch); the run they make does not depend on it."""

    drafter: Literal["replicate", "shard"] = Field(
        "replicate", description="whole in every process (DDP), or in parts (FSDP2)"
    )
    target: Literal["replicate", "shard"] = Field("replicate", description="the same, for the frozen target")
    tensor: int = Field(
        1, ge=1, description="processes that share one target by tensor parallelism (its tp_plan)"
    )
    timeout: float = Field(
        600.0, gt=0, description="seconds after which a process gives up waiting for the others"
    )


class Recipe(Section):
    """A run of one stage."""

    version: Literal[2] = Field(VERSION, description="of the recipe's keys; older recipes are read too")
    target: str = Field(description="folder, hub id, or embedded")
    drafter: str | None = Field(None, description="start from this folder or hub id")
    out: str = Field(description="run folder")
    data: Data = Field(description="trajectories")
    model: Model = Field(Model(), description="a new drafter (stage 1)")
    steps: int = Field(ge=1, description="optimiser steps; may grow on --resume")
    extended_from: list[int] = Field(
        [], description="steps that the run had before it was lengthened; --resume writes it"
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        16,
        description="trajectories a forward, of all processes. auto: 16 times accumulate a step, in as "
        "few forwards as memory takes (a split changes results a little); decided once, when a run begins",
    )
    accumulate: int = Field(1, ge=1, description="forwards an optimiser step")
    seed: int = Field(0, ge=0, lt=2**32, description="of weights, data order, anchors and sampling")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of forward and backward (autocast); weights stay float32. auto: bfloat16 "
        "where this machine multiplies it at least 1.5 times as fast as float32, by a measurement. "
        "Decided once, when a run begins",
    )
    draft_length: int | None = Field(None, ge=1, description="K; default: what the drafter has")
    sampling: Sampling = Field(
        Sampling(), description="how the target's text was sampled, and how the drafter will draft"
    )
    optim: Optim = Field(Optim(), description="optimiser and schedule")
    sft: Sft = Field(Sft(), description="stage 1")
    opd: Opd = Field(Opd(), description="stage 2")
    heads: Heads = Field(Heads(), description="confidence and candidates, for families that have them")
    evaluation: Evaluation = Field(Evaluation(), description="held-out τ")
    online: Online | None = Field(None, description="for `draft-opd online`")
    save_every: int | None = Field(None, ge=1, description="steps; default: as evaluation.every")
    keep_checkpoints: int = Field(
        1, ge=1, description="checkpoints before the last that stay, in case that is damaged"
    )
    parallel: Parallel = Field(Parallel(), description="several processes; may change on --resume")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="where metrics go beside metrics.jsonl; may change on --resume"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute the drafter's layers again in the backward pass: less memory"
    )
    trust_remote_code: bool = Field(False, description="run code that ships with the target")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        objective = self.opd.objective
        single = objective.estimator in ("k1", "k2", "k3", "bernoulli")
        if single and objective.kind in ("total_variation", "log_overlap"):
            raise ValueError(
                f"opd.objective.estimator '{objective.estimator}' estimates a KL divergence, not "
                f"{objective.kind}: use exact or top_k"
            )
        if objective.kind in ("rounds", "advantage"):
            if not self.sampling.takes_argmax:
                raise ValueError(
                    f"opd.objective.kind '{objective.kind}' is for argmax drafts: sampling.temperature 0, or "
                    "sampling.draft argmax"
                )
            if objective.draft_temperature != 1:
                raise ValueError(f"opd.objective.kind '{objective.kind}' takes draft_temperature 1 only")
        if self.data.features and self.data.cache_features != "disk":
            raise ValueError("data.features goes with data.cache_features: disk")
        if objective.accepted_weight + objective.rejected_weight == 0:
            raise ValueError("accepted_weight and rejected_weight cannot both be 0")
        if self.parallel.target == "shard":
            for key, value, needed in (
                ("parallel.tensor", self.parallel.tensor, 1),
                ("data.cache_features", self.data.cache_features, "none"),
                ("opd.rollout", self.opd.rollout, "hindsight"),
            ):
                if value != needed:
                    raise ValueError(f"parallel.target: shard needs {key}: {needed}, not {value}")
        return self

    @property
    def save_interval(self) -> int:
        return self.save_every or self.evaluation.every


def load_recipe(path: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> Recipe:
    """Reads a recipe, lays `stages.<stage>` over it, applies `a.b=value` pairs (values are YAML).

    `embedded` and `embedded:FAMILY` are the demo's recipes. Raises `UserError`.
    """
    name, _, family = str(path).partition(":")
    known = sorted(p.stem for p in EMBEDDED_RECIPES.glob("*.yaml"))
    if name != "embedded":
        path = Path(path)
    elif family and family not in known:
        raise UserError(f"recipe '{path}': no such family; there are {', '.join(known)}")
    else:
        path = EMBEDDED_RECIPES / f"{family or 'dflash'}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe '{path}' does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe '{path}' is not readable YAML ({one_line(error)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe '{path}' must hold KEY: VALUE pairs")
    tree = _for_stage(tree, stage, path)
    for pair in overrides:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"'{one_line(pair, 80)}' is not KEY=VALUE")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"the value in '{one_line(pair, 80)}' is not valid YAML") from None
        *parents, last = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(f"'{key}': '{name}' is a value, not a section")
        node[last] = value
    given = tuple(pair.partition("=")[0] for pair in overrides)
    return parse_recipe(tree, str(path), given)


def _for_stage(tree: dict, stage: str | None, path: Path) -> dict:
    stages = tree.pop("stages", None) or {}
    if not isinstance(stages, dict) or set(stages) - {"sft", "opd"}:
        raise UserError(f"recipe '{path}': 'stages' holds the sections 'sft' and 'opd' only")
    chosen = stages.get(stage or "") or {}
    if not isinstance(chosen, dict):
        raise UserError(f"recipe '{path}': stages.{stage} must hold KEY: VALUE pairs")
    return _laid_over(tree, chosen)


def _laid_over(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _laid_over(old or {}, value) if both else value
    return merged


def parse_recipe(tree: dict, where: str = "recipe", given: tuple[str, ...] = ()) -> Recipe:
    """Validates a tree; `UserError` names the first wrong key and the nearest right one. `given`:
    the keys that the command line set."""
    tree = without_removed_keys(tree, where)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        key, kind, message, value = first_problem(error)
        if any(f"{key}.".startswith(f"{name}.") for name in given):
            where = "command line"
        if not key and given:
            where = f"{where} with what the command line sets"
        if kind == "extra_forbidden":
            *parents, last = key.split(".")
            known = _keys_at(parents)
            near = difflib.get_close_matches(last, known, 1, 0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key '{key}'; {hint}") from None
        if kind == "missing":
            raise UserError(f"{where}: the key '{key}' is missing") from None
        if kind == "model_type":
            message = "must hold KEY: VALUE pairs"
        shown = "" if isinstance(value, dict) else f" (got {value!r:.60})"
        name = f"'{key}' " if key else ""
        raise UserError(f"{where}: {name}{message}{shown}") from None


def without_removed_keys(tree: dict, where: str) -> dict:
    """A copy of a recipe's tree without the keys that an earlier version had.

    Raises `UserError` for one that does not stand at its default: leaving it out would train
    something else.
    """
    kept = copy.deepcopy(tree)
    for key, default in REMOVED_KEYS.items():
        *parents, last = key.split(".")
        node: object = kept
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            continue
        if (value := node.pop(last)) != default:
            raise UserError(
                f"{where}: '{key}' was removed, only its default {default} can be read (got {value!r:.60}): "
                "leave it out"
            )
    return kept


def _keys_at(path: list[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for name in path:
        kind: Any = model.model_fields[name].annotation
        model = next((k for k in get_args(kind) if k is not type(None)), kind)
    return list(model.model_fields)
