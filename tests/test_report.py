"""The report in a real browser: nothing overflows, nothing is loaded, nothing is executed."""

import html
import json
import shutil
from pathlib import Path

import pytest

import draft_opd as d
from draft_opd.cli.main import run
from draft_opd.decoding.generate import Generation
from draft_opd.evaluation.token_origin import pieces

sync_playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'draft-opd[test]'"
).sync_playwright
FAMILY = "dflash"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WINDOWS = {"wide": (1280, 900), "phone": (390, 844)}
HOSTILE = "</span><script>document.title='taken'</script><img src=x onerror=alert(1)>\" 'é漢🙂"
# Every box whose content is wider than itself and that neither scrolls nor wraps.
OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(e =>
    e.scrollWidth > e.clientWidth + 1 && e.clientWidth &&
    getComputedStyle(e).overflowX === 'visible' && getComputedStyle(e).display !== 'inline' &&
    !e.closest('svg')).map(e => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def folder(trained_folder, data, tmp_path_factory) -> Path:
    """Everything a report can hold, by the commands that make it."""
    out = tmp_path_factory.mktemp("report")
    prompts = out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (HOSTILE, "x", "Two?")))
    copy = out / "_other $x$ <b>name<b>$\\foo$"
    shutil.copytree(trained_folder, copy)
    pair = ("--target", "embedded", "--drafter", str(trained_folder))
    assert (
        run(
            [
                "eval",
                *pair,
                "--drafter",
                str(copy),
                "--draft-length",
                "4,15",
                "--tasks",
                "embedded",
                "--prompts",
                str(prompts),
                "--limit",
                "2",
                "--max-new-tokens",
                "12",
                "--advise",
                "--concurrency",
                "1,2",
                "--out",
                str(out / "eval"),
            ]
        )
        == 0
    )
    assert (
        run(
            [
                "analyze",
                *pair,
                "--trajectories",
                str(data / "heldout"),
                "--limit",
                "4",
                "--out",
                str(out / "analysis"),
            ]
        )
        == 0
    )
    paths = [str(out / "eval"), str(out / "analysis"), str(trained_folder.parent)]
    assert run(["report", *paths, "--out", str(out / "all")]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_loads_nothing(browser, folder, window, scheme, tmp_path):
    width, height = WINDOWS[window]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    requests, troubles = [], []
    page.on("request", lambda r: requests.append(r.url))
    page.on("console", lambda m: troubles.append(m.text))
    page.on("pageerror", lambda e: troubles.append(str(e)))
    page.on("dialog", lambda x: troubles.append(x.message))
    url = (folder / "all" / "report.html").as_uri()
    page.goto(url)
    for closed in page.query_selector_all("details:not([open])"):
        closed.evaluate("e => { e.open = true }")
    assert requests == [url] and troubles == []
    assert page.title() == "Draft-OPD" and not page.query_selector("script, img, link, iframe")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []
    # Every section is there, and every plot has a size.
    titles = [h.inner_text() for h in page.query_selector_all("h2")]
    for title in (
        "Tasks",
        "Where drafts are accepted",
        "Training",
        "Requests at a time",
        "Where the drafter fails",
        "Who wrote which token",
        "Configuration",
    ):
        assert title in titles
    boxes = [f.bounding_box() for f in page.query_selector_all("figure svg")]
    assert len(boxes) >= 10 and all(b["width"] > 200 and b["height"] > 100 for b in boxes)
    # Text can be read on what is behind it.
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{p}") for p in ("color", "backgroundColor"))
    assert abs(_light(ink) - _light(paper)) > 150 and (_light(paper) > 128) == (scheme == "light")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000
    context.close()


def _light(colour: str) -> float:
    parts = [float(x) for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(parts) / 3


def test_a_rejected_draft_is_shown_when_pointed_at(browser, folder):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((folder / "all" / "report.html").as_uri())
    token = page.query_selector("details[open] [data-tip]")
    shown = "e => getComputedStyle(e, '::after').content"
    assert token.evaluate(shown) in ("none", "normal")
    token.hover()
    assert token.get_attribute("data-tip").startswith("drafted: ")
    assert token.evaluate(shown).strip('"').startswith("drafted: ")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_whole_text_of_a_sample_is_on_the_page(browser, folder, target):
    page = browser.new_page()
    page.goto((folder / "all" / "report.html").as_uri())
    samples = json.loads((folder / "eval" / "samples.json").read_text())
    texts = [e.text_content() for e in page.query_selector_all("div.text")]
    wanted = [
        s["prompt"] + "".join(p.get("special") or p["text"] for p in side["pieces"])
        for s in samples
        for side in s["sides"]
    ]
    assert texts == wanted and any(HOSTILE in t for t in texts)
    page.close()


def test_what_users_write_is_text(folder):
    """Also where there is no browser to try it."""
    page = (folder / "all" / "report.html").read_text()
    assert "<script" not in page and "<img" not in page and "<b>name" not in page
    assert html.escape(HOSTILE, quote=False)[:30] in page.replace("&#39;", "'")


def test_each_plot_is_there_for_a_paper(folder):
    for page in ("eval", "analysis", "all"):
        plots = folder / page / "plots"
        names = sorted(p.stem for p in plots.glob("*.png"))
        assert names and names == sorted(p.stem for p in plots.glob("*.svg"))
        assert all(p.read_bytes().startswith(b"\x89PNG\r\n") for p in plots.glob("*.png"))


def test_tokens_that_are_part_of_a_character_make_whole_text(target):
    """A character of several tokens is shown by the token that completes it."""
    ids = target.tokenizer.encode("漢字 🙂 é", add_special_tokens=False)
    rounds = [d.Round(k, [], 0) for k in range(len(ids))]
    found = pieces(target.tokenizer, Generation([1], ids, rounds))
    assert "".join(p["text"] for p in found) == target.tokenizer.decode(ids)
    cut = pieces(target.tokenizer, Generation([1], ids[:1], rounds[:1]))
    assert "".join(p["text"] for p in cut) == target.tokenizer.decode(ids[:1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "holds nothing to report"),
        (lambda p: (p / "eval.json").write_text("{"), "is not readable JSON"),
        (lambda p: (p / "eval.json").write_text("[]"), "must hold a JSON object"),
        (lambda p: (p / "eval.json").write_text('{"target": "t"}'), "drafter: Field required"),
        (lambda p: (p / "analysis.json").write_text("{}"), "lacks anchors"),
        (lambda p: (p / "recipe.yaml").write_text("a: 1"), "is damaged"),
    ],
)
def test_a_folder_that_is_none_gets_one_line(capsys, tmp_path, make, message):
    make(tmp_path)
    assert run(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
