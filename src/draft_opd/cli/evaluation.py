"""Commands that measure and show: eval, analyze, report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from draft_opd.cli.options import (
    Device,
    DrafterName,
    Dtype,
    Json,
    Length,
    Seed,
    TargetName,
    Temperature,
    Thinking,
    TopK,
    TopP,
    Tree,
    Trust,
    at_least,
    to_drafter,
    to_lengths,
    to_numbers,
    to_sampling,
    to_target,
    to_widths,
)
from draft_opd.evaluation.names import by_name
from draft_opd.models.hub import check_models
from draft_opd.utils.console import Screen, table
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import make_folder, write_json


def evaluate(
    target: TargetName,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="Drafter folder or hub id, or NAME=it; give several to compare them."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="gsm8k, math500, aime2025, mbpp, humaneval, swe-bench-lite, mt-bench "
            "from the hub; gsm8k=FILE.jsonl; embedded; comma-separated."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="'paper': its seven tasks, counts and order.")] = None,
    shuffle: Annotated[
        int | None, typer.Option(help="Seed of a random order, before --skip and --limit.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="A prompts file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts a task.")] = None,
    skip: Annotated[int, typer.Option(help="Leave out the first N prompts a task.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest response; default: 512.")
    ] = None,
    draft_length: Annotated[
        str | None,
        typer.Option(help="Tokens drafted a round; 2,4,auto compares them. Default: all."),
    ] = None,
    tree: Tree = None,
    advise: Annotated[
        bool,
        typer.Option("--advise", help="Which draft length is best, here and on other hardware."),
    ] = False,
    hardware: Annotated[
        list[str] | None,
        typer.Option(help="NAME=GB/s,TFLOP/s for --advise, instead of some GPUs; repeatable."),
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Throughput at so many requests at a time, as 1,4,16.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Measure this running vLLM or SGLang server instead.")
    ] = None,
    server_model: Annotated[str | None, typer.Option(help="Default: the one it serves.")] = None,
    baseline_server: Annotated[
        str | None, typer.Option(help="A server of the target alone, for the speed-up.")
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    draft: Annotated[str, typer.Option(help="'sample' or 'argmax', at temperature > 0.")] = "sample",
    thinking: Thinking = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for eval.json, rounds.jsonl and report.html.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """τ, speed-up and losslessness against the target alone; drafters and lengths compared."""
    at_least(limit, 1, "--limit")
    at_least(skip, 0, "--skip")
    at_least(max_new_tokens, 1, "--max-new-tokens")
    from draft_opd.data.openai_client import Server
    from draft_opd.data.tasks import PAPER_LENGTH, load_tasks, paper_tasks

    screen = Screen(json)
    sampling, widths = to_sampling(temperature, top_k, top_p, draft), to_widths(tree)
    lengths = to_lengths(draft_length)
    sizes = to_numbers(concurrency, "--concurrency")
    if preset not in (None, "paper"):
        raise UserError(f"--preset {preset}: there is 'paper'")
    if preset and (tasks or prompts or limit or skip or shuffle is not None):
        raise UserError("--preset says which prompts: leave --tasks, --limit and the like out")
    if server and (drafter or lengths or tree or advise or device or dtype):
        raise UserError("--server has its own drafter: leave --drafter and its options out")
    if not server and not drafter:
        raise UserError("nothing to evaluate: give --drafter, or --server")
    if baseline_server and not server:
        raise UserError("--baseline-server goes with --server")
    if hardware and not advise:
        raise UserError("--hardware goes with --advise")
    if lengths and tree:
        raise UserError("give a draft length or a tree, not both")
    if not server:
        check_models(target, *by_name(drafter).values())
    chosen = paper_tasks() if preset else load_tasks(tasks, prompts, limit, skip, shuffle)
    options = {
        "max_new_tokens": max_new_tokens or (PAPER_LENGTH if preset else 512),
        "sampling": sampling, "thinking": thinking, "seed": seed,
    }  # fmt: skip
    if out:
        make_folder(out)  # what cannot be written should be known before hours of decoding
    if server:
        servers = [Server(server, server_model), baseline_server and Server(baseline_server)]
        report, pages = _served(screen, target, servers, chosen, sizes, options), {}
        if out:
            write_json(out / "eval.json", report)
    else:
        report, pages = _local(
            screen, (target, device, dtype, trust_remote_code), drafter, chosen, lengths, widths,
            advise, hardware, sizes, options, out,
        )  # fmt: skip
    shown = _shown(report)
    if out:
        from draft_opd.report.page import Report

        lead = f"Target {report['target']}; {report['drafter'] or report['server']}."
        page = Report("Evaluation", lead, evaluation=report, **pages).write(out)
        shown.append(f"Report: {page}")
    screen.result(report, *shown)


def _local(
    screen, model_options, drafters, chosen, lengths, widths, advise, hardware, sizes, options, out
) -> tuple[dict, dict]:
    from draft_opd.evaluation.lengths import HARDWARE, to_hardware
    from draft_opd.evaluation.measure import sides_of
    from draft_opd.evaluation.run import Evaluation
    from draft_opd.training.run_folder import lineage

    places = to_hardware(hardware or ()) or HARDWARE
    paths = by_name(drafters)
    model = to_target(*model_options)
    loaded = {name: (path, to_drafter(path, model)) for name, path in paths.items()}
    sides = sides_of(loaded, lengths or [None], widths)
    evaluation = Evaluation(model, sides, chosen, **options)
    with screen.progress("eval", sum(len(t.prompts) for t in chosen)) as update:
        count = iter(range(1, 1 << 30))
        evaluation.say = lambda name, *_: update(next(count), name)
        evaluation.run()
    evaluation.say = lambda what, done, of: screen.say(f"{what}: {done}/{of}")
    more = [partial(evaluation.lengths, places)] if advise else []
    more += [partial(evaluation.concurrency, sizes)] if sizes else []
    for extra in more:
        if out:  # should the next one fail, what is decoded is kept
            evaluation.save(out, evaluation.report())
        extra()
    report = evaluation.report()
    if not out:
        return report, {}
    evaluation.save(out, report)
    training = {name: lineage(path) for name, path in paths.items()}
    return report, {"samples": evaluation.samples, "training": training}


def _served(screen, target, servers, chosen, sizes, options) -> dict:
    from draft_opd.evaluation.summary import evaluation_report
    from draft_opd.serving.load import measure_server
    from draft_opd.utils.machine import machine

    for which in filter(None, servers):
        which.check()
    with screen.progress("eval", len(chosen) * len(sizes or [1])) as update:
        count = iter(range(1, 1 << 30))
        rows = [
            measure_server(
                *servers, task, sizes or [1], progress=lambda name, *_: update(next(count), name),
                **options,
            )
            for task in chosen
        ]  # fmt: skip
    sampling = options.pop("sampling")
    return evaluation_report(
        target, None, sampling.temperature, rows, server=servers[0].url,
        baseline_server=servers[1] and servers[1].url, top_k=sampling.top_k, top_p=sampling.top_p,
        **options, machine={"client": machine()},
    )  # fmt: skip


def _shown(report: dict) -> list:
    """Tables and lines for a terminal."""
    from draft_opd.report.format import number, same_text, spread, times
    from draft_opd.report.page import best_length, comparison_rows, elsewhere_rows, length_rows, sides_in

    sides = sides_in(report)
    many = len(sides) > 1
    columns = [*(["drafter"] if many else []), "task", "prompts", "τ", "95 %", "tok/s target",
               "tok/s speculative", "speed-up", "same text"]  # fmt: skip
    rows = [
        [*([s["side"]] if many else []), t["task"], t["prompts"], number(t["tau"]),
         spread(t.get("tau_interval")), number(t["tokens_per_second"]["target"], 1),
         number(t["tokens_per_second"]["speculative"], 1), times(t["speedup"]), same_text(t)]
        for s in sides for t in s["tasks"]
    ]  # fmt: skip
    shown = [table("", columns, rows)]
    if many:
        title = "Differences, paired by prompt"
        shown.append(table(title, *comparison_rows(report["comparison"])))
    for advice in report.get("draft_lengths", ()):
        title = f"{advice['drafter']}: here {best_length(advice)}"
        shown.append(table(title, *length_rows(advice)))
        if advice["elsewhere"]:
            shown.append(table("Elsewhere, at best", *elsewhere_rows(advice)))
    if rows := report.get("concurrency"):
        cells = [
            [r["side"], r["batch"], number(r["tokens_per_second"], 1), times(r["speedup"]),
             number(r["seconds_per_request"]["mean"], 2), number(r["tau"])]
            for r in rows
        ]  # fmt: skip
        columns = ["", "at a time", "tok/s", "speed-up", "s a request", "τ"]
        shown.append(table("Requests at a time", columns, cells))
    for task in report["tasks"]:
        if levels := task.get("concurrency"):
            shown.append(_levels(task["task"], levels))
    return shown


def _levels(task: str, levels: list[dict]):
    from draft_opd.report.format import number, times

    sides = [s for s in ("target", "speculative") if s in levels[0]]
    rows = [
        [str(row["in_flight"]), side, number(row[side]["tokens_per_second"], 1),
         times(row.get("speedup") if side == "speculative" else None),
         number(row[side]["milliseconds_to_first_token"]["p50"], 1),
         number(row[side]["seconds_per_request"]["p50"], 2),
         number(row[side]["seconds_per_request"]["p95"], 2),
         number(row.get("tau") if side == "speculative" else None)]
        for row in levels for side in sides
    ]  # fmt: skip
    columns = ["at a time", "server", "tok/s", "speed-up", "first token, ms", "s a request, p50",
               "p95", "τ"]  # fmt: skip
    return table(task, columns, rows)


def analyze(
    target: TargetName,
    drafter: DrafterName,
    trajectories: Annotated[str, typer.Option(help="trajectories.jsonl or its folder.")],
    out: Annotated[Path, typer.Option(help="Folder for analysis.json and report.html.")],
    limit: Annotated[int | None, typer.Option(help="Only the first N trajectories.")] = None,
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
    from draft_opd.report.page import Report
    from draft_opd.training.run_folder import lineage

    model = to_target(target, device, dtype, trust_remote_code)
    check_trajectories(rows, model, trajectories)
    helper = to_drafter(drafter, model)
    with screen.progress("analyze", len(rows)) as update:
        value = analyse(model, helper, rows, draft_length=draft_length, progress=update)
    path = out / "analysis.json"
    write_json(path, value)
    lead = f"{drafter} along its own traces on {len(rows)} trajectories of {target}."
    runs = lineage(drafter)
    page = Report("Analysis", lead, training={drafter: runs} if runs else {},
                  analyses={drafter: value}).write(out)  # fmt: skip
    lines = [
        [g, *(value[key].get(g) for key in ("tokens", "share", "forward_kl", "reverse_kl"))] for g in GROUPS
    ]
    screen.result(
        value,
        table(f"τ {value['tau']:.3f} over {value['rounds']} rounds; more in {path}",
              ["state", "tokens", "share", "KL(p‖q)", "KL(q‖p)"], lines),
        f"Report: {page}",
    )  # fmt: skip


def report(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Folders of eval, analyze, sft and opd.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html and plots.")],
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Draft-OPD",
    json: Json = False,
) -> None:
    """One page from finished work: evaluation, training runs and analyses together."""
    from draft_opd.report.load import gather

    screen = Screen(json)
    page = gather(paths, title).write(out)
    screen.result({"kind": "report", "path": str(page)}, f"Report: {page}")
