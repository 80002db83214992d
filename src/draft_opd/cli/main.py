"""The command line: one command a job. What commands do lives elsewhere; this asks and shows."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

# torch's threads spin while they wait, and on a machine with other work to do they wait for each
# other longer than they work. Short spinning costs little where it is idle
# (benchmarks/threads.py). It is read when torch is loaded: nothing above may load it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from draft_opd.cli.evaluation import analyze, evaluate, report
from draft_opd.cli.options import (
    MARKS,
    AutoLength,
    Config,
    Device,
    DrafterName,
    Dtype,
    Json,
    NewTokens,
    Overrides,
    Resume,
    Seed,
    TargetName,
    Temperature,
    Thinking,
    TopK,
    TopP,
    Tree,
    Trust,
    at_least,
    example,
    one_length,
    to_drafter,
    to_sampling,
    to_target,
    to_widths,
)
from draft_opd.cli.serving import check_serving, online
from draft_opd.models.hub import check_models
from draft_opd.utils.console import Screen, ending, facts
from draft_opd.utils.errors import Failure, UserError

app = typer.Typer(
    name="draft-opd",
    help="Trains speculative-decoding drafters on their own mistakes (Draft-OPD).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(epilog=example("draft-opd demo --out runs/demo"))
def demo(
    out: Annotated[Path, typer.Option(help="New folder for everything that is made.")],
    family: Annotated[str, typer.Option(help="Drafter family.")] = "dflash",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """The whole pipeline on the shipped target, in minutes: SFT, Draft-OPD, evaluation."""
    from draft_opd.pipelines.demo import run_demo

    run_demo(out, family, seed, Screen(json))


@app.command(epilog=example("draft-opd collect --target embedded --prompts embedded:train --out data/train"))
def collect(
    target: TargetName,
    prompts: Annotated[str, typer.Option(help="JSONL; or embedded:train, embedded:heldout.")],
    out: Annotated[Path, typer.Option(help="Folder for trajectories.jsonl.")],
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
    thinking: Thinking = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Let the target answer prompts, here or on a server; go on where a killed run stopped."""
    for value, option in ((limit, "--limit"), (batch_size, "--batch-size"), (samples, "--samples"),
                          (max_new_tokens, "--max-new-tokens"),
                          (in_flight, "--in-flight")):  # fmt: skip
        at_least(value, 1, option)
    at_least(skip, 0, "--skip")
    from draft_opd.data.prompts import read_prompts

    screen = Screen(json)
    sampling = to_sampling(temperature, top_k, top_p)
    asked = read_prompts(prompts, limit + skip if limit else None)[skip:]
    if not asked:
        raise UserError(f"--skip {skip} leaves no prompts of '{prompts}'")
    check_models(target, *([drafter] if drafter else []), weights=not server)
    from draft_opd.data.collect import collect as run
    from draft_opd.data.collect import summary

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
        start = partial(gather_from, askers, text)
    else:
        model = to_target(target, device, dtype, trust_remote_code)
        helper = to_drafter(drafter, model) if drafter else None
        start = partial(run, model, batch_size=batch_size, drafter=helper)
    with screen.progress("collect", len(asked) * samples) as update:
        found = start(
            asked, out, samples=samples, thinking=thinking, **common,
            progress=lambda done, _, tokens: update(done, f"{tokens} tokens"),
        )  # fmt: skip
    value = summary(found.path if server else found)
    if server:
        value["dropped"] = dict(found.dropped)
        for reason, count in found.dropped.items():
            screen.say(f"{count} dropped: {reason}")
    screen.result(value, facts(value["path"], value))


def _train(stage: str, config: Path, overrides: list[str] | None, resume: bool, json: bool) -> None:
    from draft_opd.training.config import load_recipe
    from draft_opd.training.inputs import read_inputs

    recipe = load_recipe(config, overrides or [], stage)
    inputs = read_inputs(stage, recipe, resume)
    # Only now: these load torch, which takes seconds.
    from draft_opd.training.distributed import distributed_context
    from draft_opd.training.trainer import Run

    with distributed_context(recipe.parallel) as group:
        screen = Screen(json, silent=not group.is_main_process)
        seen: dict[str, str] = {}
        asked: list[bool] = []
        with screen.progress(stage, recipe.steps) as update, ending(lambda: asked.append(True)):

            def show(line: dict) -> None:
                names = {"loss": "loss", "tau": "held-out τ"}
                seen.update({n: f"{n} {line[k]:.3f}" for k, n in names.items() if k in line})
                update(line["step"], "  ".join(seen.values()))

            run = Run(
                stage, recipe, resume=resume, group=group, on_metrics=show,
                stop=lambda: bool(asked), inputs=inputs,
            )  # fmt: skip
            result = run.train()
        value = result.as_dict()
        screen.result(value, facts(f"{stage}: {result.out}", value))


@app.command(epilog=example("draft-opd sft --config recipes/smollm2-gsm8k.yaml steps=500 out=runs/mine/sft"))
def sft(config: Config, overrides: Overrides = None, resume: Resume = False, json: Json = False):
    """Stage 1: train a drafter on the target's own text."""
    _train("sft", config, overrides, resume, json)


@app.command(epilog=example("draft-opd opd --config recipes/smollm2-gsm8k.yaml drafter=runs/mine/sft/best"))
def opd(config: Config, overrides: Overrides = None, resume: Resume = False, json: Json = False):
    """Stage 2, Draft-OPD: train a drafter where verification rejects it."""
    _train("opd", config, overrides, resume, json)


@app.command(epilog=example("draft-opd ablate --config benchmarks/league.yaml --out runs/league"))
def ablate(
    config: Annotated[Path, typer.Option("--config", help="Variants and seeds, YAML.")],
    out: Annotated[Path, typer.Option(help="Folder for runs and ablation.json; resumable.")],
    seeds: Annotated[str | None, typer.Option(help="Only these, as 0,1,2.")] = None,
    only: Annotated[str | None, typer.Option(help="Only these variants, comma-separated.")] = None,
    json: Json = False,
) -> None:
    """Compare ways to train: variants × seeds at equal budget, paired by seed, in one table."""
    from draft_opd.pipelines.ablation import Ablation, load_plan, show

    screen = Screen(json)
    plan = load_plan(config).narrowed(seeds, only)
    value = Ablation(plan, out, screen.say).run()
    screen.result(value, show(value["table"], plan.baseline))


app.command(
    name="eval",
    epilog=example(
        "draft-opd eval --target embedded --drafter runs/demo/draft_opd/best"
        " --tasks embedded --limit 20 --out runs/eval"
    ),
)(evaluate)


app.command(
    epilog=example(
        "draft-opd analyze --target embedded --drafter runs/demo/sft/best"
        " --trajectories runs/demo/data/heldout --out runs/analysis"
    )
)(analyze)


app.command(epilog=example("draft-opd report runs/eval runs/analysis runs/demo/draft_opd --out runs/report"))(
    report
)


@app.command(
    epilog=example(
        "draft-opd generate --target embedded --drafter runs/demo/draft_opd/best"
        ' --prompt "A row begins with 16, 24, 32, 40. Which number is 2 places after 40?"'
    )
)
def generate(
    target: TargetName,
    drafter: DrafterName,
    prompt: Annotated[str | None, typer.Option(help="Default: standard input.")] = None,
    max_new_tokens: NewTokens = 512,
    draft_length: AutoLength = None,
    tree: Tree = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    draft: Annotated[str, typer.Option(help="'sample' or 'argmax', at temperature > 0.")] = "sample",
    thinking: Thinking = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    mark: Annotated[
        str, typer.Option(help="auto (colour; ⟦ ⟧ when not a terminal), brackets or none.")
    ] = "auto",
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Decode one prompt speculatively, streaming; accepted draft tokens are marked."""
    at_least(max_new_tokens, 1, "--max-new-tokens")
    if mark not in MARKS:
        raise UserError(f"--mark {mark}: choose one of {', '.join(MARKS)}")
    sampling, widths = to_sampling(temperature, top_k, top_p, draft), to_widths(tree)
    # Above temperature 0 the same seed should give the same text, whatever the clock says.
    usual = "auto" if sampling.greedy and not tree else None
    length = one_length(draft_length) or usual
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        raise UserError("the prompt is empty: give --prompt or text on standard input")
    check_models(target, drafter)
    from draft_opd.decoding.stream import stream

    screen = Screen(json)
    model = to_target(target, device, dtype, trust_remote_code)
    helper = to_drafter(drafter, model)
    value = stream(
        model, helper, text, screen, raw=raw, mark=mark, thinking=thinking,
        max_new_tokens=max_new_tokens, draft_length=length, tree=widths, sampling=sampling,
        seed=seed,
    )  # fmt: skip
    screen.result(value)


@app.command(
    epilog=example(
        "draft-opd export --target embedded --drafter runs/demo/draft_opd/best"
        " --format vllm --out runs/served"
    )
)
def export(
    target: TargetName,
    drafter: DrafterName,
    format: Annotated[str, typer.Option(help="z-lab, sglang, vllm or speculators.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "bfloat16",
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Write a drafter as a folder that an inference engine loads."""
    check_models(target, drafter, weights=False)
    from draft_opd.serving.export import export as run

    screen = Screen(json)
    value = run(target, drafter, format, out, dtype=dtype, trust_remote_code=trust_remote_code)
    shown = {k: v for k, v in value.items() if k != "serve"}  # a table would cut it
    screen.result(value, facts(value["path"], shown), f"Serve it with:\n{value['serve']}")


app.command(
    name="check-serving",
    epilog=example(
        "draft-opd check-serving --target embedded --drafter runs/demo/draft_opd/best"
        " --prompts embedded:heldout --limit 16"
    ),
)(check_serving)


app.command(epilog=example("draft-opd online --config recipes/online.yaml"))(online)


@app.command(epilog=example("draft-opd inspect runs/demo/sft"))
def inspect(
    path: Annotated[str, typer.Argument(help="Drafter, target, trajectories or run; 'embedded'.")],
    target: Annotated[str | None, typer.Option(help="Whose tokenizer shows a sample.")] = None,
    sample: Annotated[int, typer.Option(help="Which trajectory to show.")] = 0,
    json: Json = False,
) -> None:
    """What something is, in one screen; for data, one real sample with its loss mask coloured."""
    at_least(sample, 0, "--sample")
    from draft_opd.report.inspection import describe

    screen = Screen(json)
    value, shown = describe(path, target, sample)
    screen.result(value, *shown)


def main() -> None:
    """Entry point: 0 done, 2 the input is wrong (one line), 75 stopped on request with everything
    saved, 1 anything else."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit status."""
    warnings = logging.StreamHandler()
    warnings.setFormatter(logging.Formatter("warning: %(message)s"))
    logging.getLogger("draft_opd").addHandler(warnings)
    try:
        return app(arguments or ["--help"], standalone_mode=False) or 0
    except UserError as error:
        return _complain(str(error))
    except Failure as error:
        return _complain(str(error), error.status)
    except (KeyboardInterrupt, EOFError):
        sys.stderr.write("stopped\n")
        return 1
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001 - the last line of defence
        # Typer's own complaints (unknown option, missing value): one line instead of a box.
        if callable(getattr(error, "format_message", None)):
            return _complain(error.format_message() or "see --help")
        if type(error).__name__ == "Abort":
            sys.stderr.write("stopped\n")
            return 1
        traceback.print_exc()
        sys.stderr.write("this is a bug in draft-opd, or the machine ran out of something\n")
        return 1
    finally:
        logging.getLogger("draft_opd").removeHandler(warnings)


def _complain(message: str, status: int = 2) -> int:
    kind = "error: " if status < 3 else ""
    sys.stderr.write(f"{kind}{' '.join(message.split())}\n")
    return status


if __name__ == "__main__":
    main()
