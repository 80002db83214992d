"""Fixtures: the shipped target, a drafter that knows nothing and one that learned a little."""

from __future__ import annotations

import os

# One thread each: on a busy machine torch's threads wait for each other longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
import yaml
from forked import Forked, shared
from processes import metrics
from shapes import SHAPES

from draft_opd.data.collect import collect
from draft_opd.data.prompts import read_prompts
from draft_opd.data.trajectory import Trajectory, read_trajectories
from draft_opd.drafters import FAMILIES, Drafter
from draft_opd.models.target import Target
from draft_opd.serving.vllm_process import free_port
from draft_opd.training.config import load_recipe

torch.set_num_threads(1)
MAX_NEW_TOKENS = 320

# A busy machine is no failure.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")


pytest_plugins = ["cost"]


def pytest_addoption(parser):
    parser.addoption("--write-bad-input", action="store_true", help="write docs/bad-input.md")


def _family(item) -> str | None:
    return item.callspec.params.get("family") if hasattr(item, "callspec") else None


def _asks_for_family(item) -> bool:
    """Whether the test itself says which families it is for."""
    return any("family" in str(mark.args[0]) for mark in item.iter_markers("parametrize"))


def _for_every_family(item) -> bool:
    chosen = getattr(item.module, "EVERY_FAMILY", False)
    return chosen if isinstance(chosen, bool) else item.originalname in chosen


def pytest_itemcollected(item):
    """A family stays on one worker, which makes its session fixtures once."""
    if _family(item) and item.config.pluginmanager.hasplugin("xdist"):
        item.add_marker(pytest.mark.xdist_group(_family(item)))


def pytest_collection_modifyitems(config, items):
    """A module with `FAMILY = "dflash"` runs for that family only. Families that are a DFlash body with
    another head run where the head matters: in modules with `EVERY_FAMILY = True`, or tests named there."""
    wanted = {i: getattr(i.module, "FAMILY", None) for i in items}
    heads = [i for i in items if _family(i) in ("dspark", "dflash2") and not _asks_for_family(i)]
    unwanted = [i for i in items if _family(i) and wanted[i] not in (None, _family(i))]
    unwanted += [i for i in heads if not _for_every_family(i) and not wanted[i]]
    config.hook.pytest_deselected(items=unwanted)
    dropped = set(unwanted)
    items[:] = [i for i in items if i not in dropped]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def forked() -> Forked:
    return shared()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    if shared.cache_info().currsize:  # so that its children count in what the suite costs
        with contextlib.suppress(OSError):
            shared().close()


@pytest.fixture(scope="session")
def target() -> Target:
    return Target.from_pretrained("embedded", device="cpu")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder that `make(folder)` fills, made by the first worker that asks."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, unfinished = root / name, root / f"{name}.unfinished"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if not folder.exists():
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def answered(target, once):
    """answered(part, count): a folder with the target's answers to the first prompts of a part."""

    def get(part: str, count: int) -> Path:
        def make(folder: Path) -> None:
            prompts = read_prompts(f"embedded:{part}", count)
            collect(target, prompts, folder, max_new_tokens=MAX_NEW_TOKENS, batch_size=64)

        return once(f"{part}-{count}", make)

    return get


@pytest.fixture(scope="session")
def data(answered, once) -> Path:
    """Folder with train/ and heldout/ trajectories, the shortest first: for tests that take few."""

    def make(folder: Path) -> None:
        for part, count in (("train", 48), ("heldout", 64)):
            shutil.copytree(answered(part, count), folder / part)
            file = folder / part / "trajectories.jsonl"
            file.write_text("".join(sorted(file.open(), key=len)))

    return once("data", make)


@pytest.fixture(scope="session")
def heldout(data) -> list[Trajectory]:
    """Held-out prompts with the target's own greedy answers."""
    return read_trajectories(data / "heldout")


@pytest.fixture(scope="session")
def every_heldout(answered) -> list[Trajectory]:
    """All held-out prompts there are, for slow tests."""
    return read_trajectories(answered("heldout", 200))


@pytest.fixture(scope="session", params=sorted(SHAPES))
def family(request) -> str:
    """Every test that trains or takes a drafter runs for every family."""
    return request.param


@pytest.fixture(scope="session")
def recipe_for(data, family):
    """recipe_for(stage, out, "key=value", …) on the shared trajectories, small."""

    def make(stage: str, out: Path, *pairs: str):
        small = [
            f"data.trajectories={data / 'train'}",
            f"data.heldout={data / 'heldout'}",
            "data.heldout_limit=8",
            "batch_size=8",
            "steps=4",
            "evaluation.every=2",
            "opd.trace_every=1",
            f"model.options={SHAPES[family]}",
            "precision=float32",
            "optim.final_ratio=0",
            f"out={out}",
        ]
        return load_recipe(f"embedded:{family}", [*small, *pairs], stage)

    return make


@pytest.fixture(scope="session")
def trained_folder(family, tmp_path_factory) -> Path:
    """A drafter after a short SFT: right often enough to accept, wrong often enough to reject
    (scripts/build_test_drafters.py)."""
    out = tmp_path_factory.mktemp("trained") / "sft"
    shutil.copytree(Path(__file__).parent / "drafters" / family, out)
    shutil.copytree(out / "last", out / "best")
    return out / "last"


@pytest.fixture(scope="session")
def together(forked, recipe_for, trained_folder, tmp_path_factory):
    """together(count, stage, out, pairs): a run in `count` processes; how they ended."""

    def begin(count: int, stage: str, out: Path, *pairs: str) -> tuple[list[int], list[Path]]:
        drafter = [f"drafter={trained_folder}"] if stage == "opd" else []
        recipe = recipe_for(stage, out, *drafter, *pairs)
        folder = tmp_path_factory.mktemp("recipe")
        (folder / "r.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        env = {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        logs = [folder / f"{rank}.log" for rank in range(count)]
        return [
            forked.start(
                stage,
                "--config",
                folder / "r.yaml",
                "--resume",
                log=log,
                **env,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
            )
            for rank, log in enumerate(logs)
        ], logs

    def run(count: int, stage: str, out: Path, *pairs: str) -> list[dict]:
        processes, logs = begin(count, stage, out, *pairs)
        for process, log in zip(processes, logs, strict=True):
            assert forked.status(process) == 0, log.read_text()
        # One of them speaks.
        assert all("held-out" not in log.read_text() for log in logs[1:])
        return metrics(out)

    run.begin, run.forked = begin, forked
    return run


@pytest.fixture(scope="session")
def trained(trained_folder) -> Drafter:
    return Drafter.from_pretrained(str(trained_folder), device="cpu")


@pytest.fixture(scope="session")
def untrained(target, family) -> Drafter:
    torch.manual_seed(0)
    counts = torch.arange(target.vocab_size).flip(0)
    return FAMILIES[family].create(target, counts, **SHAPES[family]).eval()


@pytest.fixture(scope="session")
def drafters(trained, untrained) -> dict[str, Drafter]:
    return {"trained": trained, "untrained": untrained}
