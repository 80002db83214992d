"""The command that collects trajectories."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from draft_opd.cli.options import (
    Compile,
    Device,
    Dtype,
    Json,
    MaxSkipShare,
    NewTokens,
    Seed,
    SkipInvalid,
    StopIds,
    TargetName,
    Temperature,
    Template,
    TemplateKwargs,
    Thinking,
    TopK,
    TopP,
    Trust,
    at_least,
    set_chat,
    to_drafter,
    to_sampling,
    to_skipped,
    to_target,
)
from draft_opd.models.hub import check_models
from draft_opd.utils.console import Screen, facts
from draft_opd.utils.errors import UserError


def collect(
    target: TargetName,
    out: Annotated[Path, typer.Option(help="Folder for trajectories.jsonl.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Rows of prompts or chats: a file, a folder, ORG/NAME[:SPLIT] of the hub, embedded:train, "
            "embedded:heldout."
        ),
    ] = None,
    from_answers: Annotated[
        str | None, typer.Option(help="Instead: conversations whose logged answers become trajectories.")
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="With --from-answers: how far they are from the target's own.")
    ] = False,
    every_turn: Annotated[
        bool, typer.Option("--every-turn", help="Answer every assistant turn of the conversations.")
    ] = False,
    history: Annotated[
        str, typer.Option(help="With --every-turn: 'logged', or 'regenerated' (the target's own answers).")
    ] = "logged",
    server: Annotated[
        list[str] | None,
        typer.Option(help="URL of a vLLM or SGLang server that answers instead; may be repeated."),
    ] = None,
    server_model: Annotated[str | None, typer.Option(help="Default: the one it serves.")] = None,
    endpoint: Annotated[str, typer.Option(help="'completions' (token ids) or 'chat'.")] = ("completions"),
    in_flight: Annotated[int, typer.Option(help="Requests to each server at a time.")] = 32,
    patience: Annotated[float, typer.Option(help="Seconds to wait for a server that has gone away.")] = 300.0,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    samples: Annotated[int, typer.Option(help="Responses a prompt (temperature > 0).")] = 1,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    skip: Annotated[int, typer.Option(help="Leave out the first N prompts.")] = 0,
    max_new_tokens: NewTokens = 512,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 16,
    drafter: Annotated[str | None, typer.Option(help="Speeds decoding up, same text.")] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Rows (a held-out set) whose prompts are left out, by content.")
    ] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Leave out longer prompts.")] = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Ask prompts of equal content once.")
    ] = False,
    drop_truncated: Annotated[
        bool,
        typer.Option("--drop-truncated", help="Answers that reach the limit go to truncated.jsonl."),
    ] = False,
    skip_invalid: SkipInvalid = False,
    max_skip_share: MaxSkipShare = 0.1,
    template: Template = None,
    template_kwargs: TemplateKwargs = None,
    stop_ids: StopIds = None,
    thinking: Thinking = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Let the target answer prompts, here or on a server; go on where a killed run stopped."""
    for value, option in (
        (limit, "--limit"),
        (batch_size, "--batch-size"),
        (samples, "--samples"),
        (max_new_tokens, "--max-new-tokens"),
        (in_flight, "--in-flight"),
        (max_prompt_tokens, "--max-prompt-tokens"),
    ):
        at_least(value, 1, option)
    at_least(skip, 0, "--skip")
    from draft_opd.data.prompts import read_prompts

    screen = Screen(json)
    sampling = to_sampling(temperature, top_k, top_p)
    skipped = to_skipped(skip_invalid, max_skip_share)
    if history not in ("logged", "regenerated"):
        raise UserError(f"--history {history}: choose logged or regenerated")
    if (prompts is None) == (from_answers is None):
        raise UserError("give --prompts, or --from-answers")
    if score and not from_answers:
        raise UserError("--score goes with --from-answers")
    if from_answers:
        if server or drafter or every_turn or samples > 1 or temperature or skip:
            raise UserError("--from-answers asks nobody: leave --server, --drafter, --skip and the like out")
        check_models(target, weights=score)
        chat = (template, template_kwargs, stop_ids)
        model_options = (target, device, dtype, trust_remote_code)
        value = _from_answers(
            screen, model_options, from_answers, out, limit, skipped, thinking, chat, score, exclude
        )
        screen.result(value, facts(value["path"], value))
        return
    count = limit + skip if limit else None
    if every_turn:
        from draft_opd.data.answers import every_turn as turns

        if skip or (exclude and history != "logged"):
            raise UserError("leave --skip (and --exclude, if --history is not logged) out of --every-turn")
        asked = turns(prompts, count, skipped)
    else:
        asked = read_prompts(prompts, count, skipped, screen.say)[skip:]
    if exclude:
        held = {p.content for p in read_prompts(exclude)}
        kept = [p for p in asked if p.content not in held]
        screen.say(f"{len(asked) - len(kept):,} prompts left out: they stand in '{exclude}' too")
        asked = kept
    if not asked:
        raise UserError(f"no prompts of '{prompts}' are left (--skip {skip})")
    check_models(target, *([drafter] if drafter else []), weights=not server)
    from draft_opd.data.collect import collect as run
    from draft_opd.data.collect import summary
    from draft_opd.data.skipped import Filters

    common = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}
    if endpoint != "completions" and not server:
        raise UserError(f"--endpoint {endpoint}: goes with --server")
    if server:
        from draft_opd.data.openai_client import Server
        from draft_opd.data.server_collect import gather_from
        from draft_opd.models.target_info import TargetInfo

        if drafter:
            raise UserError("--drafter speeds up decoding here: a server has its own")
        askers = [Server(url, server_model, endpoint, in_flight, patience) for url in server]
        for asker in askers:
            asker.check()
        text = TargetInfo.from_pretrained(target, trust_remote_code=trust_remote_code)
        set_chat(text, template, template_kwargs, stop_ids)
        start = partial(gather_from, askers, text)
    else:
        model = to_target(target, device, dtype, trust_remote_code, compile)
        set_chat(model, template, template_kwargs, stop_ids)
        helper = to_drafter(drafter, model) if drafter else None
        start = partial(run, model, batch_size=batch_size, drafter=helper)
    filters = Filters(max_prompt_tokens, not drop_duplicates, not drop_truncated)
    dropped: Counter[str] = Counter()
    with screen.progress("collect", len(asked) * samples) as update:

        def ask(chosen: list) -> Path:
            found = start(
                chosen,
                out,
                samples=samples,
                thinking=thinking,
                skipped=skipped,
                filters=filters,
                **common,
                progress=lambda done, _, tokens: update(done, f"{tokens} tokens"),
            )
            if server:
                dropped.update(found.dropped)
            return found.path if server else found

        if every_turn and history == "regenerated":
            from draft_opd.data.answers import regenerate

            tokenizer = (text if server else model).tokenizer
            decode = partial(tokenizer.decode, skip_special_tokens=True)
            path = regenerate(prompts, limit, to_skipped(skip_invalid, max_skip_share), ask, decode)
        else:
            path = ask(asked)
    value = summary(path)
    if filters.left_out:
        value["left_out"] = dict(filters.left_out)
    if skipped.rows:
        value["skipped"] = dict(skipped.reasons)
        for line in skipped.lines():
            screen.say(line)
    if server:
        value["dropped"] = dict(dropped)
        for reason, count in dropped.items():
            screen.say(f"{count} dropped: {reason}")
    screen.result(value, facts(value["path"], value))


def _from_answers(screen, model_options, name, out, limit, skipped, thinking, chat, score, exclude) -> dict:
    """Writes trajectories of logged answers."""
    from draft_opd.data.answers import answer_trajectories, scored
    from draft_opd.data.collect import pin_date, summary
    from draft_opd.data.prompts import read_prompts
    from draft_opd.data.trajectory import write_trajectories
    from draft_opd.models.target_info import TargetInfo

    if score:
        info = to_target(*model_options)
    else:
        info = TargetInfo.from_pretrained(model_options[0], trust_remote_code=model_options[3])
    set_chat(info, *chat)
    about = {"target": info.name, "source": "answers"}
    if info.chat.uses_date:
        about["date"] = pin_date(info, Path(out) / "collect.json")
    rows = answer_trajectories(info, name, skipped, limit=limit, thinking=thinking)
    if exclude:
        held = {tuple(p.ids(info, thinking)) for p in read_prompts(exclude)}
        kept = [t for t in rows if tuple(t.prompt_ids) not in held]
        screen.say(f"{len(rows) - len(kept):,} answers left out: their prompts stand in '{exclude}' too")
        if not (rows := kept):
            raise UserError(f"--exclude {exclude} leaves no answers")
    figures: dict = {}
    if score:
        rows, figures = scored(info, rows)
    path = write_trajectories(out, rows, {**about, **figures})
    skipped.write(out)
    for line in skipped.lines():
        screen.say(line)
    screen.say("these answers are logged text, not the target's own: SFT on them is SFT on foreign text")
    value = summary(path)
    value |= {"source": "answers", **figures}
    return {**value, "skipped": dict(skipped.reasons)} if skipped.rows else value
