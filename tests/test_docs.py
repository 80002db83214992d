"""What the documentation says is so: commands parse, links lead somewhere, examples run."""

import base64
import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from forked import Process

import draft_opd as d
from draft_opd.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
RECIPES = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("benchmarks/*.yaml")])
MODULES = [m.name for m in pkgutil.walk_packages(d.__path__, "draft_opd.")]


def blocks(page: Path) -> list[str]:
    """The shell blocks of a page."""
    return re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def command_lines(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [x.strip() for x in joined.splitlines() if x.strip().startswith("draft-opd ")]


@pytest.mark.parametrize("path", [*PAGES, *RECIPES], ids=lambda p: p.name)
def test_every_command_shown_parses(path):
    text = path.read_text(encoding="utf-8")
    shown = "\n".join(blocks(path)) if path.suffix == ".md" else re.sub(r"(?m)^#\s*", "", text)
    for line in command_lines(shown):
        words = shlex.split(line, comments=True)[1:]
        command = COMMANDS[words[0]]
        command.make_context(words[0], words[1:], resilient_parsing=False).close()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(place), f"{page.name}: {target}"
    for name in re.findall(r"`((?:tests|benchmarks|scripts|recipes|docs|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("name", ["recipe.md", "commands.md"])
def test_the_reference_is_that_of_the_code(name):
    path = ROOT / "scripts" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    made = reference.PAGES[name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made, (
        "docs are behind: python scripts/reference.py"
    )


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_public_names_have_examples_or_at_least_words():
    shown = 0
    for name in d.__all__:
        thing = getattr(d, name)
        assert inspect.getdoc(thing), name
        shown += ">>>" in inspect.getdoc(thing)
    assert shown >= 6


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    zensical = Path(sys.executable).with_name("zensical")
    if not zensical.exists():
        pytest.skip("zensical is not installed (pip install 'draft-opd[docs]')")
    done = subprocess.run([zensical, "build"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index", *(p.stem for p in PAGES if p.parent.name == "docs" and p.name != "index.md")):
        folder = tmp_path / "site" / ("" if page == "index" else page)
        html = (folder / "index.html").read_text(encoding="utf-8")
        assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="?https?://', html), page


SMALL = [  # the walk through docs/your-model.md, with the shipped target and small sizes
    (r"T=\S+ Q=\S+ E=\S+", "T=embedded Q=q.jsonl E=e.jsonl"),
    (r"--skip \d+", "--skip 6"),
    (r"--limit \d+", "--limit 6"),
    (r"--max-new-tokens \d+", "--max-new-tokens 30"),
    (r"\bevery: \d+", "every: 2"),
    (r"trace_every: \d+", "trace_every: 2"),
    (r"(?<!_)steps(: |=)\d+", r"steps\g<1>2"),
    (r"block_size: 16", "block_size: 4"),
]


def test_the_walk_through_runs_as_it_is_written(tmp_path):
    """Block by block in one shell; only what needs an inference engine is left out."""
    lines = []
    for block in blocks(ROOT / "docs" / "your-model.md"):
        if "check-serving" in block or "--server" in block:
            continue
        for pattern, small in SMALL:
            block = re.sub(pattern, small, block)
        lines.append(block)
    assert len(lines) == 6
    for name, part in (("q.jsonl", "train"), ("e.jsonl", "heldout")):
        prompts = (ROOT / "src" / "draft_opd" / "embedded" / f"{part}.jsonl").read_text()
        (tmp_path / name).write_text(prompts)
    # The shell hands its commands over to forked processes, which need not load torch again.
    shell = 'draft-opd() { words=$(printf "%s\\0" "$@" | base64 -w0); echo "draft-opd $words"; }'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([shell, *lines])],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log, commands = tmp_path / "log", 0
    for line in done.stdout.splitlines():
        assert line.startswith("draft-opd "), line
        words = base64.b64decode(line.split()[1]).decode().split("\0")[:-1]
        assert Process(*words, log=log, folder=tmp_path).wait() == 0, (words, log.read_text())
        commands += 1
    made = tmp_path / "runs" / "mine"
    assert commands > 8 and (made / "report" / "report.html").exists()
    assert (made / "served" / "model.safetensors").exists() and "vllm serve" in log.read_text()
