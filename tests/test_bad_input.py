"""Every kind of bad input: one clear line, exit status 2, no traceback, earlier results untouched.

docs/bad-input.md lists the lines; `pytest tests/test_bad_input.py --write-bad-input` writes it.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from draft_opd.cli.main import run
from draft_opd.models.hub import resolve_path
from draft_opd.serving.vllm_process import free_port

FAMILY = "dflash"
PAGE = Path(__file__).parent.parent / "docs" / "bad-input.md"
COLLECT = "collect --target embedded --out {new}"
SFT = "sft --config {recipe} out={new}"
OPD = "opd --config {recipe} out={new}"
EVAL = "eval --target embedded --tasks embedded --limit 1 --max-new-tokens 4"
PAIR = f"{EVAL} --drafter {{drafter}}"
HEADING = {
    "prompts": "Prompts",
    "data": "Trajectories",
    "target": "Targets",
    "drafter": "Drafters",
    "recipe": "Recipes",
    "run": "Runs",
    "place": "Places",
    "server": "Servers",
    "option": "Options",
}


# -- what is wrong: each makes files in a folder and returns the arguments' names ---------------

Make = Callable[["Shop"], dict[str, Path | str]]
CASES: dict[str, tuple[str, Make]] = {}


def case(name: str, command: str, make: Make | None = None) -> None:
    assert name not in CASES and name.split(":")[0] in HEADING
    CASES[name] = (command, make or (lambda shop: {}))


class Shop:
    """A folder with sound files to spoil: a recipe, trajectories, a drafter, a run."""

    def __init__(self, folder: Path, trained: Path, data: Path):
        self.folder, self.trained, self.data = folder, trained, data
        self.servers: list[HTTPServer] = []

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def tree(self) -> dict:
        return {
            "target": "embedded",
            "out": "runs/x",
            "steps": 2,
            "batch_size": 2,
            "data": {
                "trajectories": str(self.data / "train"),
                "limit": 8,
                "heldout_limit": 2,
                "heldout": str(self.data / "heldout"),
            },
            "drafter": str(self.trained),
            "evaluation": {"every": 2},
        }

    def recipe(self, **sections) -> Path:
        return self.file("recipe.yaml", yaml.safe_dump(self.tree() | sections))

    def rows(self, **changes) -> str:
        return json.dumps({"id": "1", "prompt_ids": [1, 2], "response_ids": [3, 4], **changes})

    def folder_of(self, source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, self.folder / name))

    def drafter(self, spoil: Callable[[Path], None]) -> dict:
        folder = self.folder_of(self.trained, "drafter")
        spoil(folder)
        return {"drafter": folder}

    def target(self, spoil: Callable[[Path], None]) -> dict:
        folder = self.folder_of(Path(resolve_path("embedded")), "target")
        spoil(folder)
        return {"target": folder}

    def serve(self, answer: Callable[[str], tuple[int, bytes]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, body = answer(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # clients that leave early
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"


def prompts(content: str | bytes) -> Make:
    return lambda shop: {"prompts": shop.file("prompts.jsonl", content)}


def trajectories(**changes) -> Make:
    return lambda shop: {"file": shop.file("t.jsonl", shop.rows(**changes))}


def recipe(**sections) -> Make:
    return lambda shop: {"recipe": shop.recipe(**sections)}


def edit(name: str, **changes) -> Callable[[Path], None]:
    """Sets keys of a folder's JSON file."""

    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:5000])


def pickled(folder: Path) -> None:
    """A pickle offered in the place of safetensors; it must not even be opened."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


P = f"{COLLECT} --prompts {{prompts}}"
case("prompts: no such file", P, lambda shop: {"prompts": shop.folder / "none.jsonl"})
case("prompts: a folder", P, lambda shop: {"prompts": shop.data})
case("prompts: an empty file", P, prompts(""))
case("prompts: binary", P, prompts(bytes(range(256)) * 40))
case("prompts: UTF-16", P, prompts('{"prompt": "a"}\n'.encode("utf-16")))
case("prompts: Latin-1", P, prompts('{"prompt": "für"}\n'.encode("latin-1")))
case("prompts: truncated JSON", P, prompts('{"prompt": "a"}\n{"prompt": "b'))
case("prompts: a JSON array of numbers", P, prompts("[1]"))
case("prompts: one huge line", P, lambda shop: {"prompts": huge(shop.folder / "prompts.jsonl")})
case("prompts: no text", P, prompts('{"prompt": "a"}\n{"txt": "b"}'))
case("prompts: text of another type", P, prompts('{"prompt": 3}'))
case("prompts: messages without content", P, prompts('{"messages": [{"role": "user"}]}'))
IMAGE = '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'
case("prompts: an image", P, prompts(IMAGE))
case("prompts: too many skipped", f"{P} --skip-invalid", prompts('{"prompt": "a"}\n{"txt": "b"}'))
case("prompts: half a template argument", f"{P} --template-kwargs x", prompts('{"prompt": "a"}'))
case("prompts: stop tokens that are none", f"{P} --stop-ids a", prompts('{"prompt": "a"}'))
case("prompts: a share above 1", f"{P} --max-skip-share 2", prompts('{"prompt": "a"}'))
case("prompts: longer than the context", P, prompts(json.dumps({"prompt": "apples and " * 2000})))
case("prompts: deeply nested JSON", P, prompts("[" * 100_000))
case("prompts: half of a character", P, prompts('{"prompt": "a\\ud800"}'))
case("prompts: none left", f"{P} --skip 1", prompts('{"prompt": "a"}'))


def huge(path: Path) -> Path:
    with path.open("wb") as file:
        file.write(b'{"prompt": "' + b"apples " * (10 << 20) + b'"}')
    return path


T = f"{SFT} data.trajectories={{file}}"
case("data: no such file", T, lambda shop: {"file": shop.folder / "none.jsonl"})
case("data: a folder without trajectories", T, lambda shop: {"file": shop.folder})
case("data: an empty file", T, lambda shop: {"file": shop.file("t.jsonl", "\n\n")})
case("data: a field is missing", T, lambda shop: {"file": shop.file("t.jsonl", '{"id": "1"}')})
case("data: ids of another type", T, trajectories(response_ids=["3"]))
case("data: a negative id", T, trajectories(response_ids=[3, -1]))
case("data: an id that no target has", T, trajectories(response_ids=[3, 10**30]))
case("data: an empty response", T, trajectories(response_ids=[]))
case("data: a temperature in words", T, trajectories(temperature="hot"))
case(
    "data: the same id twice", T, lambda shop: {"file": shop.file("t.jsonl", f"{shop.rows()}\n{shop.rows()}")}
)
case("data: tokens of another target", T, trajectories(response_ids=[3, 5000]))
case("data: longer than the context", T, trajectories(response_ids=[5] * 5000))
case("data: sampled at another temperature", T, trajectories(temperature=0.7))
case(
    "data: held-out prompts among those trained on",
    "sft --config {recipe} out={new} data.trajectories={heldout}",
    lambda shop: {"heldout": shop.data / "heldout"},
)
case("data: nothing is left after max_length", f"{SFT} data.max_length=8")
case(
    "data: analysed with another target's drafter",
    "analyze --target embedded --drafter {drafter} --trajectories {file} --out {new}",
    trajectories(response_ids=[3, 5000]),
)

G = "generate --drafter {trained} --prompt Hi --target {target}"
case("target: no such folder", G, lambda shop: {"target": shop.folder / "none"})
case("target: a drafter in its place", G, lambda shop: {"target": shop.trained})
case("target: no config.json", G, lambda shop: shop.target(lambda f: (f / "config.json").unlink()))
case(
    "target: config.json is no JSON",
    G,
    lambda shop: shop.target(lambda f: (f / "config.json").write_text("{")),
)
case(
    "target: not a causal language model",
    G,
    lambda shop: shop.target(
        lambda f: (f / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    ),
)
case("target: no weights", G, lambda shop: shop.target(lambda f: (f / "model.safetensors").unlink()))
case("target: corrupt weights", G, lambda shop: shop.target(cut("model.safetensors")))
case("target: a pickle in their place", G, lambda shop: shop.target(pickled))
case("target: no tokenizer", G, lambda shop: shop.target(lambda f: [x.unlink() for x in f.glob("token*")]))
case("target: its tokenizer belongs to a larger model", G, lambda shop: shop.target(larger_tokenizer))
case("target: remote code required", G, lambda shop: shop.target(remote))
case(
    "target: a weight of another shape",
    G,
    lambda shop: shop.target(edit("config.json", intermediate_size=100)),
)


def remote(folder: Path) -> None:
    edit("config.json", model_type="mystery", auto_map={"AutoConfig": "code.Config"})(folder)
    (folder / "code.py").write_text("raise SystemExit('this must not run')")


def larger_tokenizer(folder: Path) -> None:
    """It gives the prompt an id that the model does not have."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["Hi"])
    tokenizer.save_pretrained(folder)


D = f"{EVAL} --drafter {{drafter}}"
case("drafter: no such folder", D, lambda shop: {"drafter": shop.folder / "none"})
case("drafter: a run folder", D, lambda shop: {"drafter": shop.trained.parent})
case("drafter: a target in its place", D, lambda shop: {"drafter": resolve_path("embedded")})
case(
    "drafter: config.json is no JSON",
    D,
    lambda shop: shop.drafter(lambda f: (f / "config.json").write_text("not")),
)
case(
    "drafter: config.json describes none",
    D,
    lambda shop: shop.drafter(edit("config.json", hidden_size="wide")),
)
case("drafter: no safetensors", D, lambda shop: shop.drafter(lambda f: (f / "model.safetensors").unlink()))
case("drafter: a pickle in their place", D, lambda shop: shop.drafter(pickled))
case("drafter: corrupt safetensors", D, lambda shop: shop.drafter(cut("model.safetensors")))
case("drafter: a tensor is missing", D, lambda shop: shop.drafter(tensors(lambda t: t.pop("fc.weight"))))
case(
    "drafter: a misnamed tensor",
    D,
    lambda shop: shop.drafter(tensors(lambda t: t.update(fc2=t["fc.weight"].clone()))),
)
case(
    "drafter: a tensor of another shape",
    D,
    lambda shop: shop.drafter(tensors(lambda t: t.update({"norm.weight": t["norm.weight"][:-1].clone()}))),
)
case("drafter: another vocabulary", D, lambda shop: shop.drafter(edit("config.json", vocab_size=1000)))
case("drafter: another hidden size", D, lambda shop: {"drafter": of_other_width(shop.folder / "wide")})
case("drafter: layers that the target does not have", D, lambda shop: shop.drafter(layers([1, 2, 3, 4, 99])))


def layers(ids: list[int]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["dflash_config"]["target_layer_ids"] = ids
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def of_other_width(folder: Path) -> Path:
    from transformers import Qwen3Config

    from draft_opd.drafters.dflash import DFlashDrafter

    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=839,
    )
    config.block_size, config.num_target_layers = 16, 8
    config.dflash_config = {"mask_token_id": 3, "target_layer_ids": [1, 2]}
    DFlashDrafter(config).save_pretrained(folder)
    return folder


case("recipe: no such file", "sft --config {file}", lambda shop: {"file": shop.folder / "no.yaml"})
case("recipe: not YAML", "sft --config {file}", lambda shop: {"file": shop.file("r.yaml", "a: [")})
case("recipe: binary", "sft --config {file}", lambda shop: {"file": shop.file("r.yaml", b"\xff\x00" * 99)})
case("recipe: a list", "sft --config {file}", lambda shop: {"file": shop.file("r.yaml", "- a\n")})
case("recipe: an unknown key", SFT, recipe(stepz=3))
case("recipe: an unknown key in a section", SFT, recipe(optim={"learnin_rate": 1e-3}))
case(
    "recipe: a missing key",
    "sft --config {file}",
    lambda shop: {"file": shop.file("r.yaml", "target: embedded\n")},
)
case("recipe: another type", SFT, recipe(steps="many"))
case("recipe: a section that is a value", SFT, recipe(optim=3))
case("recipe: out of range", SFT, recipe(optim={"learning_rate": -1}))
case("recipe: infinite", SFT, recipe(optim={"learning_rate": float("inf")}))
case("recipe: contradictory values", SFT, recipe(data={"trajectories": "a", "heldout": "b", "features": "f"}))
case(
    "recipe: an estimator of another divergence",
    OPD,
    recipe(opd={"objective": {"kind": "total_variation", "estimator": "k3"}}),
)
case("recipe: a number out of range in a list", SFT, recipe(optim={"betas": [2, 3]}))
case("recipe: a wrong choice", SFT, recipe(precision="float8"))
case("recipe: a pair on the command line without a value", f"{SFT} steps")
case("recipe: an unknown pair on the command line", f"{SFT} stepz=3")
case("recipe: a value out of range on the command line", f"{SFT} batch_size=0")
case("recipe: a pair inside a value", f"{SFT} steps.x=1")
case("recipe: a pair that is not YAML", f"{SFT} model=[{{close}}", lambda shop: {"close": "}"})
case("recipe: an unknown family", f"{SFT} drafter=null model.family=gpt")
case("recipe: an unknown option of the family", f"{SFT} drafter=null model.options.depth=3")
case("recipe: a drafter that is too long", f"{OPD} draft_length=99")
case("recipe: opd without a drafter", f"{OPD} drafter=null")
case("recipe: a tracker that is not installed", f"{SFT} tracker=wandb")
case("recipe: a seed out of range", f"{SFT} seed=99999999999")


def begun(shop: Shop, **changes) -> dict:
    """A finished run, and a recipe that differs from its."""
    from draft_opd.training.config import load_recipe
    from draft_opd.training.trainer import Run

    out = shop.folder / "run"
    Run("sft", load_recipe(shop.recipe(out=str(out))), resume=True).train()
    return {"run": out, "recipe": shop.recipe(out=str(out), **changes)}


def damaged(shop: Shop, name: str, content: bytes) -> dict:
    found = begun(shop)
    (found["run"] / name).write_bytes(content)
    shutil.rmtree(found["run"] / "checkpoints", ignore_errors=True)
    return found


R = "sft --config {recipe} --resume"
case("run: into a drafter's folder", OPD, lambda shop: {"new": shop.folder_of(shop.trained, "drafter")})
case("run: its recipe is missing", R, lambda shop: without(shop, "recipe.yaml"))
case("run: its checkpoints are missing", R, lambda shop: without(shop, "last", "checkpoints"))
case("run: already there", "sft --config {recipe}", begun)
case("run: resumed with another recipe", f"{R} batch_size=3 optim.learning_rate=1e-2", begun)
case("run: resumed on other data", R, lambda shop: other_data(shop))
case("run: no sound checkpoint", R, lambda shop: damaged(shop, "last/model.safetensors", b"torn"))
case("run: its recipe is damaged", R, lambda shop: damaged(shop, "recipe.yaml", b"\xff[1"))
case("run: inspected when damaged", "inspect {run}", lambda shop: damaged(shop, "run.json", b"{"))
case("run: a report of nothing", "report {new} --out {new}")
case(
    "run: a demo in a folder of other things",
    "demo --out {folder}",
    lambda shop: {"folder": shop.file("notes.txt", "mine").parent},
)
case(
    "run: collected otherwise before",
    f"{COLLECT} --prompts embedded:train --limit 2 --seed 5",
    lambda shop: {"new": collected(shop)},
)
case(
    "run: collected of other prompts before",
    f"{COLLECT} --prompts embedded:heldout --limit 2 --max-new-tokens 4",
    lambda shop: {"new": collected(shop)},
)
case(
    "run: its collect.json is damaged",
    f"{COLLECT} --prompts embedded:train --limit 2 --max-new-tokens 4",
    lambda shop: {"new": collected(shop, b"{")},
)
case(
    "run: its trajectories are damaged",
    f"{COLLECT} --prompts embedded:train --limit 2 --max-new-tokens 4",
    lambda shop: {"new": collected(shop, None, b"\xff\n")},
)


def without(shop: Shop, *names: str) -> dict:
    found = begun(shop)
    for name in names:
        path = found["run"] / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def other_data(shop: Shop) -> dict:
    rows = (shop.data / "train" / "trajectories.jsonl").read_text().splitlines()
    path = shop.file("t.jsonl", "\n".join(rows[:6]))
    data = {**shop.tree()["data"], "trajectories": str(path)}
    found = begun_with(shop, data)
    shop.file("t.jsonl", "\n".join(rows[:7]))
    return found


def begun_with(shop: Shop, data: dict) -> dict:
    tree = shop.tree

    def changed() -> dict:
        return {**tree(), "data": data}

    shop.tree = changed
    return begun(shop)


def collected(shop: Shop, about: bytes | None = None, rows: bytes | None = None) -> Path:
    from draft_opd.data.collect import collect
    from draft_opd.data.prompts import read_prompts
    from draft_opd.models.target import Target

    out = shop.folder / "collected"
    target = Target.from_pretrained("embedded", device="cpu")
    collect(target, read_prompts("embedded:train", 2), out, max_new_tokens=4)
    for name, content in (("collect.json", about), ("trajectories.jsonl", rows)):
        if content is not None:
            (out / name).write_bytes(content)
    return out


case(
    "place: a folder under a file",
    f"{COLLECT} --prompts embedded:train --limit 1",
    lambda shop: {"new": shop.file("file", "x") / "out"},
)
case("place: a folder that is a file", SFT, lambda shop: {"new": shop.file("file", "x")})
# A disk is full for files beyond so many bytes: what fits is written, as it is there.
case(
    "place: the disk is full while collecting",
    f"{COLLECT} --prompts embedded:train --limit 9 --batch-size 1 --max-new-tokens 40",
    lambda shop: {"room": 2000},
)
case("place: the disk is full for a checkpoint", SFT, lambda shop: {"room": 100_000})
case("place: the disk is full while evaluating", f"{PAIR} --out {{new}}", lambda shop: {"room": 300})
case(
    "place: the disk is full while exporting",
    "export --target embedded --drafter {drafter} --format vllm --out {new}",
    lambda shop: {"room": 100_000},
)
case(
    "place: an export to a file",
    "export --target embedded --drafter {drafter} --format vllm --out {new}/out",
    lambda shop: {"new": shop.file("file", "x")},
)

S = f"{COLLECT} --prompts embedded:train --limit 2 --max-new-tokens 4 --patience 0.2 --server"
MODELS = (200, b'{"data": [{"id": "small"}]}')
case("server: nobody there", f"{S} http://127.0.0.1:{{port}}", lambda shop: {"port": free_port()})
case("server: no such host", f"{S} http://no-such-host.invalid:8000")
case("server: no URL", f"{S} localhost:8000")
case(
    "server: TLS where none is spoken",
    f"{S} {{url}}",
    lambda shop: {"url": shop.serve(lambda _: MODELS).replace("http:", "https:")},
)
case("server: something else", f"{S} {{url}}", lambda shop: {"url": shop.serve(lambda _: (200, b"<html>"))})
case("server: no such route", f"{S} {{url}}", lambda shop: {"url": shop.serve(lambda _: (404, b"not found"))})
case(
    "server: a key is wanted",
    f"{S} {{url}}",
    lambda shop: {"url": shop.serve(lambda _: (401, b'{"error": {"message": "no key"}}'))},
)
case(
    "server: another model",
    f"{S} {{url}} --server-model big",
    lambda shop: {"url": shop.serve(lambda _: MODELS)},
)
case(
    "server: several models",
    f"{S} {{url}}",
    lambda shop: {"url": shop.serve(lambda _: (200, b'{"data": [{"id": "a"}, {"id": "b"}]}'))},
)
case(
    "server: an unknown endpoint",
    f"{S} {{url}} --endpoint responses",
    lambda shop: {"url": shop.serve(lambda _: MODELS)},
)
case(
    "server: answers that are garbage",
    f"{S} {{url}}",
    lambda shop: {"url": shop.serve(lambda path: MODELS if path == "/v1/models" else (200, b"\x00\xff"))},
)
case(
    "server: answers of another shape",
    f"{S} {{url}}",
    lambda shop: {
        "url": shop.serve(lambda path: MODELS if path == "/v1/models" else (200, b'{"choices": []}'))
    },
)
case(
    "server: it only fails",
    f"{S} {{url}}",
    lambda shop: {"url": shop.serve(lambda path: MODELS if path == "/v1/models" else (503, b"overloaded"))},
)
case("server: --endpoint without one", f"{COLLECT} --prompts embedded:train --limit 1 --endpoint chat")

case("option: an unknown command", "frobnicate")
case("option: an unknown option", "sft --konfig r.yaml")
case("option: a required one is missing", "eval --target embedded")
case("option: no tasks", "eval --target embedded --drafter {drafter}")
case("option: an unknown task", "eval --target embedded --drafter {drafter} --tasks gsm")
case("option: no task at all", "eval --target embedded --drafter {drafter} --tasks ,")
case("option: a task's file is missing", "eval --target embedded --drafter {drafter} --tasks a=/no.jsonl")
case(
    "option: an analysis of longer drafts than trained",
    "analyze --target embedded --drafter {drafter} --trajectories {held} --draft-length 99 --out {new}",
    lambda shop: {"held": shop.data / "heldout"},
)
case("option: a plan that is not there", "ablate --config /no.yaml --out {new}")
case("option: a tree for a drafter of blocks", f"{PAIR} --tree 4,2")
case("option: nothing to inspect", "inspect /nowhere")
case(
    "option: a folder of nothing known",
    "inspect {empty}",
    lambda shop: {"empty": shop.file("empty.txt", "").parent / "other"},
)
case("option: a limit of nothing", f"{PAIR} --limit 0")
case("option: a negative temperature", f"{PAIR} --temperature -1")
case("option: a seed out of range", f"{PAIR} --seed 99999999999999999999999")
case("option: drafts longer than trained", f"{PAIR} --draft-length 99")
case("option: a device that is not there", f"{PAIR} --device cuda:9")
case("option: a confidence that is none", f"{PAIR} --confidence 0.5,2")
case("option: a confidence of a drafter that has none", f"{PAIR} --confidence 0.5")
case("option: an unknown dtype", f"{PAIR} --dtype float8")
case("option: an unknown format", "export --target embedded --drafter {drafter} --format gguf --out {new}")
case("option: an unknown family", "demo --out {new} --family gpt")
case(
    "option: an empty prompt",
    "generate --target embedded --drafter {drafter} --prompt {blank}",
    lambda shop: {"blank": " "},
)
case("option: equal samples", f"{COLLECT} --prompts embedded:train --samples 2 --limit 1")
case(
    "option: an analysis into a file",
    "analyze --target embedded --drafter {drafter} --trajectories {held} --out {drafter}/config.json",
    lambda shop: {"held": shop.data / "heldout"},
)


# -- what is said ----------------------------------------------------------------------------


def listed() -> dict[str, str]:
    """The page's table: case -> line."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    rows = re.findall(r"(?m)^\| ([^|]+?) \| `` (.+) `` \|$", text)
    return dict(rows)


def plain(line: str, shop: Shop, names: dict) -> str:
    """The line without what differs between machines."""
    places = {
        shop.folder: "…",
        shop.trained.parent.parent: "…",
        shop.data: "data",
        resolve_path("embedded"): "…/embedded",
    }
    for path, short in sorted(places.items(), key=lambda x: -len(str(x[0]))):
        line = line.replace(str(path), short)
    line = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:8000", line)
    line = re.sub(r" \(_ssl\.c:\d+\)", "", line)
    return line.replace("|", "¦")


@pytest.fixture(scope="session")
def page(request):
    """Lines as they are listed; with --write-bad-input they are written at the end."""
    if not request.config.getoption("--write-bad-input"):
        yield listed()
        return
    found: dict[str, str] = {}
    yield found
    write(found)


@pytest.mark.parametrize("name", sorted(CASES))
def test_one_line(capsys, monkeypatch, trained_folder, data, tmp_path, request, page, name):
    command, make = CASES[name]
    shop = Shop(tmp_path, trained_folder, data)
    defaults = {
        "new": tmp_path / "new",
        "recipe": tmp_path / "recipe.yaml",
        "trained": trained_folder,
        "drafter": trained_folder,
    }
    shop.recipe()
    names = defaults | make(shop)
    before = snapshot(tmp_path, trained_folder)
    words = command.split(" ")
    with room(names.get("room")):
        status = run([w.format(**names) for w in words])
    for server in shop.servers:
        server.shutdown()
    out, err = capsys.readouterr()
    lines = [x for x in err.splitlines() if x.startswith("error: ")]
    assert status == 2 and out == "" and "Traceback" not in err, err
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0], err
    assert len(lines[0]) < 500
    assert before == snapshot(tmp_path, trained_folder, only=before)
    line = plain(lines[0].removeprefix("error: "), shop, names)
    if request.config.getoption("--write-bad-input"):
        page[name] = line
    # What Python and the system say in brackets is theirs.
    told, listed_line = (re.sub(r"\([^()]*\)", "()", x) for x in (line, page.get(name, "")))
    assert told == listed_line


@contextmanager
def room(size: int | None):
    """No file may grow beyond `size` bytes."""
    if size is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def snapshot(*folders: Path, only: dict | None = None) -> dict[Path, bytes]:
    """Files and what they hold."""
    found = {p: p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file()}
    return found if only is None else {p: found.get(p) for p in only}


def test_the_page_lists_every_case_and_no_other():
    assert listed().keys() == CASES.keys() and len(CASES) > 100


def write(lines: dict[str, str]) -> None:
    text = [
        "# Bad input",
        "",
        "Whatever is wrong with what a command is given, it says so in one line (what, where, how",
        "to mend it) and ends with status 2; nothing that was there before is touched. These are",
        "all the cases that `tests/test_bad_input.py` tries, with the line each gets. Exit",
        "statuses: 0 done, 1 a failure that is not the input's, 2 bad input, 75 stopped on request",
        "with everything saved.",
        "",
    ]
    for key, title in HEADING.items():
        text += [f"## {title}", "", "| what is wrong | what is said |", "|---|---|"]
        text += [f"| {n} | `` {x} `` |" for n, x in sorted(lines.items()) if n.startswith(f"{key}:")]
        text.append("")
    PAGE.write_text("\n".join(text), encoding="utf-8")
