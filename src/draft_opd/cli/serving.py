"""Commands that work with an inference engine."""

from __future__ import annotations

import itertools
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from draft_opd.cli.options import (
    Config,
    Device,
    Dtype,
    Json,
    Length,
    MaxSkipShare,
    NewTokens,
    Overrides,
    SkipInvalid,
    TargetName,
    Thinking,
    Trust,
    at_least,
    to_drafter,
    to_skipped,
    to_target,
)
from draft_opd.models.hub import EMBEDDED, check_models, resolve_path
from draft_opd.utils.console import Screen, table
from draft_opd.utils.errors import UserError

EngineCommand = Annotated[str, typer.Option(help="How vLLM's server starts here; the rest is added.")]
EngineArgs = Annotated[str, typer.Option(help="More arguments for it, as one string.")]


def check_serving(
    target: TargetName,
    drafter: Annotated[
        str | None, typer.Option("--drafter", help="The drafter as trained: folder or hub id.")
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm.")] = "vllm",
    url: Annotated[str | None, typer.Option(help="A running server, instead of starting one.")] = None,
    server_model: Annotated[str | None, typer.Option(help="Default: the one it serves.")] = None,
    served: Annotated[
        Path | None, typer.Option(help="Folder to serve, if not an export of --drafter.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="An untrained drafter, as --config describes it.")
    ] = False,
    config: Annotated[
        str, typer.Option("--config", help="Recipe whose model a dry run serves.")
    ] = "embedded",
    prompts: Annotated[str, typer.Option(help="JSONL, or embedded:heldout.")] = "embedded:heldout",
    limit: Annotated[int, typer.Option(help="Only the first N prompts.")] = 16,
    max_new_tokens: NewTokens = 128,
    draft_length: Length = None,
    skip_invalid: SkipInvalid = False,
    max_skip_share: MaxSkipShare = 0.1,
    thinking: Thinking = None,
    engine_command: EngineCommand = "vllm serve",
    engine_args: EngineArgs = "",
    timeout: Annotated[float, typer.Option(help="Seconds for the engine to start.")] = 900.0,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> int:
    """Is what was trained what is served? Text, prompts and acceptance, the engine's and ours."""
    for value, option in ((limit, "--limit"), (max_new_tokens, "--max-new-tokens")):
        at_least(value, 1, option)
    if engine != "vllm":
        raise UserError(f"--engine {engine}: only vllm can be checked")
    if dry_run == bool(drafter):
        raise UserError("give --drafter, or --dry-run with --config")
    if url and (served or dry_run):
        raise UserError("--url takes what runs there: leave --served and --dry-run out")
    if served and not (served / "config.json").exists():
        raise UserError(f"--served {served}: no drafter folder (it has no config.json)")
    from draft_opd.data.prompts import read_prompts

    skipped = to_skipped(skip_invalid, max_skip_share)
    asked = read_prompts(prompts, limit, skipped)
    for line in skipped.lines():
        Screen(json).say(line)
    check_models(target, *([drafter] if drafter else []))
    from draft_opd.data.openai_client import Server
    from draft_opd.drafters import Drafter
    from draft_opd.models.target_info import TargetInfo
    from draft_opd.serving.check_serving import ask, compare
    from draft_opd.serving.export import export, format_for_vllm
    from draft_opd.serving.vllm_process import Engine, EngineFailed, read_metrics

    screen = Screen(json)
    kind = dtype or default_dtype(target, device)
    place = Path(tempfile.mkdtemp(prefix="draft-opd-check-"))  # stays: the engine's log is in it
    if dry_run:
        drafter = str(place / "untrained")
        untrained(config, target, trust_remote_code).save_pretrained(drafter)
    # The engine needs the device for itself: until it has ended, the target stays on disk.
    helper = Drafter.from_pretrained(drafter, device="cpu")
    helper.bind(TargetInfo.from_pretrained(target, trust_remote_code=trust_remote_code))
    length = helper.checked_length(draft_length)
    with ExitStack() as stack:
        if url is None:
            start = Engine(
                resolve_path(target),
                served or place / "export",
                helper.vllm_method,
                length,
                place / "vllm.log",
                command=engine_command,
                extra=engine_args,
                timeout=timeout,
                dtype=kind,
            )
            if served is None:
                layout = format_for_vllm(helper)
                export(
                    target, drafter, layout, place / "export", dtype=kind, trust_remote_code=trust_remote_code
                )
            screen.say(f"starting vLLM; its log: {start.log}")
            try:
                url = stack.enter_context(start).url
            except EngineFailed as error:
                value = {
                    "equal": False,
                    "causes": [f"vLLM did not start: {error.why}"],
                    "log": str(error.log),
                }
                screen.result(value, f"NOT SERVED. {value['causes'][0]}", f"Log: {error.log}")
                return 1
        server = Server(url, server_model)
        server.check()
        width = len(read_metrics(server).by_position)
        if draft_length is None and 0 < width < length:
            length = width  # a server that drafts less than was trained
        with screen.progress("check-serving", len(asked)) as update:
            found = ask(server, asked, max_new_tokens, update)
    model = to_target(target, device, kind, trust_remote_code)
    value = compare(model, to_drafter(drafter, model), found, length, thinking)
    if value["equal"]:
        screen.result(value, *_shown(value))
        return 0
    value["report"] = str(place / "report")
    more = f"What was asked, answered and counted is in {value['report']}: attach it to a report."
    screen.result(value, *_shown(value), more)
    _keep(place, value, found.rows, drafter, served)
    return 1


def _keep(place: Path, value: dict, rows: list, drafter: str, served: Path | None) -> None:
    """place/report: the finding, the engine's answers and log, what was trained and what was served."""
    from draft_opd.data.trajectory import write_trajectories
    from draft_opd.models.hub import find_folder
    from draft_opd.utils.files import make_folder, write_json
    from draft_opd.utils.machine import machine

    out = make_folder(place / "report")
    write_trajectories(out / "answers", rows, {"kind": "an engine's answers, from check-serving"})
    write_json(out / "check.json", {**value, "machine": machine()})
    files = {
        "drafter-config.json": find_folder(drafter, "drafter") / "config.json",
        "served-config.json": (served or place / "export") / "config.json",
        "vllm.log": place / "vllm.log",
    }
    for name, file in files.items():
        if file.exists():
            (out / name).write_bytes(file.read_bytes())


def default_dtype(target: str, device: str | None) -> str:
    """float32 on a CPU and for the shipped target, else bfloat16, as engines serve."""
    import torch

    here = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return "float32" if here == "cpu" or target == EMBEDDED else "bfloat16"


def untrained(config: str, target: str, trust_remote_code: bool):
    """The drafter that training with this recipe would begin with."""
    import torch

    from draft_opd.models.target import Target
    from draft_opd.training.config import load_recipe
    from draft_opd.training.setup import new_drafter

    recipe = load_recipe(config, [], "sft")
    model = Target.from_pretrained(target, device="cpu", trust_remote_code=trust_remote_code)
    torch.manual_seed(recipe.seed)
    counts = torch.arange(model.vocab_size).flip(0)  # a draft vocabulary: any tokens will do
    return new_drafter(recipe.model, model, counts)


def online(
    config: Config,
    overrides: Overrides = None,
    skip_invalid: SkipInvalid = False,
    max_skip_share: MaxSkipShare = 0.1,
    json: Json = False,
) -> None:
    """Follow a server's traffic: collect what it answers, train, export, reload; in rounds."""
    from draft_opd.training.config import load_recipe
    from draft_opd.training.inputs import check_online

    screen = Screen(json)
    # The loop collects its own trajectories.
    recipe = load_recipe(config, ["data.trajectories=(collected)", *(overrides or [])], "opd")
    check_online(recipe)
    from draft_opd.pipelines.online import OnlineLoop

    value = OnlineLoop(recipe, screen.say, to_skipped(skip_invalid, max_skip_share)).run()
    rows = [
        [str(r["round"]), r["trajectories"], r["tau_before"], r["tau"], r["served"]] for r in value["rounds"]
    ]
    columns = ["round", "trajectories", "τ before", "τ", "served"]
    screen.result(value, table("", columns, rows), f"Serving: {value['served']}")


def _shown(value: dict) -> list:
    served, ours = value["served"], value["ours"]
    rows = [["τ", served["tau"], ours["tau"]], ["rounds", served["rounds"], ours["rounds"]]]
    counts = [side["accepted_by_position"] for side in (served, ours)]
    for k, pair in enumerate(itertools.zip_longest(*counts, fillvalue=0), 1):
        rows.append([f"accepted at {k}", *pair])
    text, prompt = value["same_text"], value["same_prompt"]
    lines = [
        f"{value['responses']} responses, {value['tokens']} tokens; text is the target's own: "
        f"{text['matched']}/{text['of']}; prompts as trained: {prompt['matched']}/{prompt['of']}"
    ]
    if value["equal"]:
        lines.append("EQUAL: what was trained is what is served.")
    else:
        lines += ["DIFFERENT. Likely:", *(f"  * {cause}" for cause in value["causes"])]
    return [table("", ["", "engine", "ours"], rows), *lines]
