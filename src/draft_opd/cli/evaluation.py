"""Commands that measure and show: eval, eval-server, analyze, report."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from draft_opd.cli.options import (
    Compile,
    Device,
    DrafterName,
    Dtype,
    Json,
    Length,
    MaxSkipShare,
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
    Tree,
    Trust,
    at_least,
    set_chat,
    to_confidences,
    to_drafter,
    to_lengths,
    to_numbers,
    to_sampling,
    to_skipped,
    to_target,
    to_template_kwargs,
    to_widths,
)
from draft_opd.evaluation.drafter_names import by_name
from draft_opd.models.hub import check_models
from draft_opd.utils.console import Screen, table
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import make_folder, write_json

Tasks = Annotated[
    str | None,
    typer.Option(
        help="gsm8k, math500, aime2025, mbpp, humaneval, swe-bench-lite, mt-bench "
        "from the hub; gsm8k=FILE.jsonl; embedded; comma-separated."
    ),
]
Preset = Annotated[str | None, typer.Option(help="'paper': its seven tasks, counts and order.")]
Shuffle = Annotated[int | None, typer.Option(help="Seed of a random order, before --skip and --limit.")]
PromptsFile = Annotated[str | None, typer.Option(help="A prompts file.")]
Limit = Annotated[int | None, typer.Option(help="Only the first N prompts a task.")]
Skip = Annotated[int, typer.Option(help="Leave out the first N prompts a task.")]
Longest = Annotated[int | None, typer.Option("--max-new-tokens", help="Longest response; default: 512.")]
Concurrency = Annotated[str | None, typer.Option(help="Throughput at so many requests at a time, as 1,4,16.")]


def _to_tasks(
    tasks: str | None,
    preset: str | None,
    prompts: str | None,
    limit: int | None,
    skip: int,
    shuffle: int | None,
    skipped=None,
    say=lambda _: None,
):
    """The prompts that these options name."""
    from draft_opd.data.tasks import load_tasks, paper_tasks

    at_least(limit, 1, "--limit")
    at_least(skip, 0, "--skip")
    if preset is None:
        return load_tasks(tasks, prompts, limit, skip, shuffle, skipped, say)
    if preset != "paper":
        raise UserError(f"--preset {preset}: there is 'paper'")
    if tasks or prompts or limit or skip or shuffle is not None:
        raise UserError("--preset says which prompts: leave --tasks, --limit and the like out")
    return paper_tasks()


def _longest(asked: int | None, preset: str | None) -> int:
    from draft_opd.data.tasks import PAPER_LENGTH

    at_least(asked, 1, "--max-new-tokens")
    return asked or (PAPER_LENGTH if preset else 512)


def evaluate(
    target: TargetName,
    drafter: Annotated[
        list[str],
        typer.Option(help="Drafter folder or hub id, or NAME=it; give several to compare them."),
    ],
    tasks: Tasks = None,
    preset: Preset = None,
    shuffle: Shuffle = None,
    prompts: PromptsFile = None,
    limit: Limit = None,
    skip: Skip = 0,
    max_new_tokens: Longest = None,
    draft_length: Annotated[
        str | None,
        typer.Option(help="Tokens drafted a round; 2,4,auto compares them. Default: all."),
    ] = None,
    tree: Tree = None,
    confidence: Annotated[
        str | None,
        typer.Option(help="DSpark: end drafts before a less likely token; 0,0.3,0.5 compares (0: never)."),
    ] = None,
    advise: Annotated[
        bool,
        typer.Option("--advise", help="Which draft length is best, here and on other hardware."),
    ] = False,
    hardware: Annotated[
        list[str] | None,
        typer.Option(help="NAME=GB/s,TFLOP/s for --advise, instead of some GPUs; repeatable."),
    ] = None,
    concurrency: Concurrency = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    draft: Annotated[str, typer.Option(help="'sample' or 'argmax', at temperature > 0.")] = "sample",
    skip_invalid: SkipInvalid = False,
    max_skip_share: MaxSkipShare = 0.1,
    template: Template = None,
    template_kwargs: TemplateKwargs = None,
    stop_ids: StopIds = None,
    thinking: Thinking = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for eval.json, rounds.jsonl and report.html.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """τ, speed-up and losslessness against the target alone; drafters and lengths compared."""
    screen = Screen(json)
    sampling, widths = to_sampling(temperature, top_k, top_p, draft), to_widths(tree)
    lengths, confidences = to_lengths(draft_length), to_confidences(confidence)
    sizes = to_numbers(concurrency, "--concurrency")
    if advise and confidences != [None]:
        raise UserError("--advise tells about whole drafts: leave --confidence out")
    if hardware and not advise:
        raise UserError("--hardware goes with --advise")
    if lengths and tree:
        raise UserError("give a draft length or a tree, not both")
    longest, paths = _longest(max_new_tokens, preset), by_name(drafter)
    check_models(target, *paths.values())
    skipped = to_skipped(skip_invalid, max_skip_share)
    chosen = _to_tasks(tasks, preset, prompts, limit, skip, shuffle, skipped, screen.say)
    if out:
        make_folder(out)  # what cannot be written should be known before hours of decoding
    from draft_opd.data.tasks import usable_tasks
    from draft_opd.evaluation.draft_length_advice import HARDWARE, to_hardware
    from draft_opd.evaluation.measure import sides_of
    from draft_opd.evaluation.run import Evaluation
    from draft_opd.training.run_folder import lineage

    places = to_hardware(hardware or ()) or HARDWARE
    model = to_target(target, device, dtype, trust_remote_code, compile)
    set_chat(model, template, template_kwargs, stop_ids)
    if skip_invalid:
        chosen = usable_tasks(chosen, model, thinking, skipped)
        for line in skipped.lines():
            screen.say(line)
        if out:
            skipped.write(out)
    loaded = {name: (path, to_drafter(path, model)) for name, path in paths.items()}
    sides = sides_of(loaded, lengths or [None], widths, confidences=confidences)
    options = {"max_new_tokens": longest, "sampling": sampling, "thinking": thinking, "seed": seed}
    evaluation = Evaluation(model, sides, chosen, **options)
    with screen.progress("eval", sum(len(t.prompts) for t in chosen)) as update:
        count = itertools.count(1)
        evaluation.say = lambda name, *_: update(next(count), name)
        evaluation.run()
    evaluation.say = lambda what, done, of: screen.say(f"{what}: {done}/{of}")
    more = [partial(evaluation.lengths, places)] if advise else []
    more += [partial(evaluation.concurrency, sizes)] if sizes else []
    for extra in more:
        if out:  # should the next one fail, what is decoded is kept
            evaluation.save(out, evaluation.report())
        extra()
    result, pages = evaluation.report(), {}
    if out:
        evaluation.save(out, result)
        training = {name: lineage(path) for name, path in paths.items()}
        pages = {"samples": evaluation.samples, "training": training}
    _show(screen, result, out, **pages)


def evaluate_server(
    target: TargetName,
    server: Annotated[str, typer.Option(help="URL of a running vLLM or SGLang server with a drafter.")],
    server_model: Annotated[str | None, typer.Option(help="Default: the one it serves.")] = None,
    baseline_server: Annotated[
        str | None, typer.Option(help="A server of the target alone, for the speed-up.")
    ] = None,
    tasks: Tasks = None,
    preset: Preset = None,
    shuffle: Shuffle = None,
    prompts: PromptsFile = None,
    limit: Limit = None,
    skip: Skip = 0,
    max_new_tokens: Longest = None,
    concurrency: Concurrency = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    skip_invalid: SkipInvalid = False,
    max_skip_share: MaxSkipShare = 0.1,
    template_kwargs: TemplateKwargs = None,
    thinking: Thinking = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for eval.json and report.html.")] = None,
    json: Json = False,
) -> None:
    """What users of a running server see: throughput, latency, τ by its own counters."""
    from draft_opd.data.openai_client import Server

    screen = Screen(json)
    sampling = to_sampling(temperature, top_k, top_p)
    sizes = to_numbers(concurrency, "--concurrency") or [1]
    skipped = to_skipped(skip_invalid, max_skip_share)
    longest = _longest(max_new_tokens, preset)
    chosen = _to_tasks(tasks, preset, prompts, limit, skip, shuffle, skipped, screen.say)
    for line in skipped.lines():
        screen.say(line)
    if out:
        make_folder(out)
        skipped.write(out)
    servers = [Server(server, server_model), Server(baseline_server) if baseline_server else None]
    for which in filter(None, servers):
        which.check()
    from draft_opd.evaluation.result import EvaluationResult, mean_of
    from draft_opd.models.target_info import TargetInfo
    from draft_opd.serving.measure_server import measure_server
    from draft_opd.utils.machine import machine

    options = {"max_new_tokens": longest, "sampling": sampling, "seed": seed}
    options["template_kwargs"] = to_template_kwargs(template_kwargs)
    if thinking is not None:  # by the name that this target's template has for it
        info = TargetInfo.from_pretrained(target)
        options["template_kwargs"] |= info.chat.arguments(thinking)
    with screen.progress("eval", len(chosen) * len(sizes)) as update:
        count = itertools.count(1)
        rows = [
            measure_server(
                *servers, task, sizes, progress=lambda name, *_: update(next(count), name), **options
            )
            for task in chosen
        ]
    result = EvaluationResult(
        target=target,
        drafter=None,
        temperature=temperature,
        server=servers[0].url,
        baseline_server=servers[1] and servers[1].url,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=longest,
        thinking=thinking,
        seed=seed,
        tasks=rows,
        mean=mean_of(rows),
        machine={"client": machine()},
    )
    if out:
        write_json(out / "eval.json", result.to_json())
    _show(screen, result, out)


def _show(screen: Screen, result, out: Path | None, **pages) -> None:
    """The report's page and the terminal's tables."""
    from draft_opd.report.tables import evaluation_tables

    shown = [table(t.title, t.columns, t.rows) for t in evaluation_tables(result)]
    if out:
        from draft_opd.report.page import Report

        lead = f"Target {result.target}; {result.drafter or result.server}."
        page = Report("Evaluation", lead, evaluation=result, **pages).write(out)
        shown.append(f"Report: {page}")
    screen.result(result.to_json(), *shown)


def analyze(
    target: TargetName,
    drafter: DrafterName,
    trajectories: Annotated[str, typer.Option(help="trajectories.jsonl or its folder.")],
    out: Annotated[Path, typer.Option(help="Folder for analysis.json and report.html.")],
    limit: Annotated[int | None, typer.Option(help="Only N trajectories, drawn by their ids.")] = None,
    draft_length: Length = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Where a drafter fails: replay composition, mismatch by state group, anchor positions."""
    at_least(limit, 1, "--limit")
    from draft_opd.data.trajectory import check_trajectories, read_trajectories

    screen = Screen(json)
    make_folder(out)  # what cannot be written should be known before the work
    rows = read_trajectories(trajectories, limit=limit)
    check_models(target, drafter)
    from draft_opd.evaluation.analysis import GROUPS, analyse
    from draft_opd.evaluation.misreadings import better_misreadings
    from draft_opd.report.page import Report
    from draft_opd.training.run_folder import lineage

    model = to_target(target, device, dtype, trust_remote_code)
    check_trajectories(rows, model, trajectories)
    helper = to_drafter(drafter, model)
    with screen.progress("analyze", len(rows)) as update:
        value = analyse(model, helper, rows, draft_length=draft_length, progress=update)
    value["misread"] = better_misreadings(model, helper, rows)
    path = out / "analysis.json"
    write_json(path, value)
    lead = f"{drafter} along its own traces on {len(rows)} trajectories of {target}."
    runs = lineage(drafter)
    page = Report(
        "Analysis", lead, training={drafter: runs} if runs else {}, analyses={drafter: value}
    ).write(out)
    lines = [
        [g, *(value[key].get(g) for key in ("tokens", "share", "forward_kl", "reverse_kl"))] for g in GROUPS
    ]
    forward = f"KL(p‖q) over {value['support']}" if value["support"] else "KL(p‖q)"
    screen.result(
        value,
        table(
            f"τ {value['tau']:.3f} over {value['rounds']} rounds; more in {path}",
            ["state", "tokens", "share", forward, "KL(q‖p)"],
            lines,
        ),
        *(f"Is the drafter read rightly? {line}" for line in value["misread"]),
        *_confidence_lines(value["confidence"]),
        f"Report: {page}",
    )


def _confidence_lines(found: dict | None) -> list:
    """What a drafter said of its tokens, and what came of them; nothing where it says nothing."""
    if found is None:
        return []
    rows = [[b["said"], b["passed"], b["tokens"]] for b in found["bins"] if b["tokens"]]
    title = f"Confidence: expected calibration error {100 * found['error']:.1f} %"
    return [table(title, ["said", "passed", "tokens"], rows)]


def report(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Folders of eval, analyze, sft and opd.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html and plots.")],
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Draft-OPD",
    json: Json = False,
) -> None:
    """One page from finished work: evaluation, training runs and analyses together."""
    from draft_opd.report.gather import gather

    screen = Screen(json)
    page = gather(paths, title).write(out)
    screen.result({"kind": "report", "path": str(page)}, f"Report: {page}")
