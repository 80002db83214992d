"""The command line: one command a job. What commands do lives elsewhere; this asks and shows."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

# torch's threads spin while they wait, and on a machine with other work to do they wait for each
# other longer than they work. Short spinning costs little where it is idle
# (benchmarks/threads.py). It is read when torch is loaded: nothing above may load it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from draft_opd.cli.collecting import collect
from draft_opd.cli.evaluation import analyze, evaluate, evaluate_server, report
from draft_opd.cli.options import (
    MARKS,
    AutoLength,
    Compile,
    Device,
    DrafterName,
    Dtype,
    Json,
    NewTokens,
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
    to_confidences,
    to_drafter,
    to_sampling,
    to_target,
    to_widths,
)
from draft_opd.cli.serving import check_serving, online
from draft_opd.cli.training import ablate, opd, sft
from draft_opd.models.hub import check_models
from draft_opd.utils.console import Screen, facts
from draft_opd.utils.errors import Failure, UserError, is_out_of_memory, one_line

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
    confidence: Annotated[
        str | None,
        typer.Option(
            help="DSpark: end drafts before a token that is less likely to pass (0: never). The text's "
            "distribution stays the target's."
        ),
    ] = None,
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
    compile: Compile = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Decode one prompt speculatively, streaming; accepted draft tokens are marked."""
    at_least(max_new_tokens, 1, "--max-new-tokens")
    if mark not in MARKS:
        raise UserError(f"--mark {mark}: choose one of {', '.join(MARKS)}")
    sampling, widths = to_sampling(temperature, top_k, top_p, draft), to_widths(tree)
    # Above temperature 0 the same seed should give the same text, whatever the clock says.
    least, *more = to_confidences(confidence)
    if more:
        raise UserError(f"--confidence {confidence}: give one chance, as 0.5")
    usual = "auto" if sampling.greedy and not tree and least is None else None
    length = one_length(draft_length) or usual
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        raise UserError("the prompt is empty: give --prompt or text on standard input")
    check_models(target, drafter)
    from draft_opd.decoding.stream import stream

    screen = Screen(json)
    model = to_target(target, device, dtype, trust_remote_code, compile)
    helper = to_drafter(drafter, model)
    value = stream(
        model,
        helper,
        text,
        screen,
        raw=raw,
        mark=mark,
        thinking=thinking,
        max_new_tokens=max_new_tokens,
        draft_length=length,
        tree=widths,
        confidence=least,
        sampling=sampling,
        seed=seed,
    )
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
    format: Annotated[str, typer.Option(help="z-lab, sglang, vllm, speculators or deepspec.")],
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


@app.command(epilog=example("draft-opd convert downloads/EAGLE3-LLaMA3.1-8B drafters/eagle3-llama"))
def convert(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and pytorch_model.bin.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    json: Json = False,
) -> None:
    """Make safetensors of pickled weights, which no other command reads. Nothing in a pickle is run."""
    from draft_opd.models.pickles import convert as run
    from draft_opd.models.pickles import described

    screen = Screen(json)
    value = run(source, out)
    screen.result(value, facts(value["path"], described(value)))


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


# Commands of the files beside, each with its example.
OTHERS = (
    (collect, "collect", "--target embedded --prompts embedded:train --out data/train"),
    (sft, "sft", "--config recipes/smollm2-gsm8k.yaml steps=500 out=runs/mine/sft"),
    (opd, "opd", "--config recipes/smollm2-gsm8k.yaml drafter=runs/mine/sft/best"),
    (ablate, "ablate", "--config benchmarks/league.yaml --out runs/league"),
    (
        evaluate,
        "eval",
        "--target embedded --drafter runs/demo/draft_opd/best --tasks embedded --limit 20 --out runs/eval",
    ),
    (
        evaluate_server,
        "eval-server",
        "--target embedded --server http://localhost:8000 --baseline-server http://localhost:8001"
        " --tasks embedded --concurrency 1,4,16",
    ),
    (
        analyze,
        "analyze",
        "--target embedded --drafter runs/demo/sft/best --trajectories runs/demo/data/heldout"
        " --out runs/analysis",
    ),
    (report, "report", "runs/eval runs/analysis runs/demo/draft_opd --out runs/report"),
    (
        check_serving,
        "check-serving",
        "--target embedded --drafter runs/demo/draft_opd/best --prompts embedded:heldout --limit 16",
    ),
    (online, "online", "--config recipes/online.yaml"),
)
for function, name, arguments in OTHERS:
    app.command(name=name, epilog=example(f"draft-opd {name} {arguments}"))(function)


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
        if is_out_of_memory(error):
            hint = "lower --batch-size, --max-new-tokens, --concurrency or --limit, or take a smaller --dtype"
            return _complain(f"out of memory ({one_line(error, 120)}): {hint}", 1)
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
