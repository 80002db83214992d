"""A deployed drafter follows its users' traffic.

Round by round: collect what a server (running the current drafter) answers to the next prompts,
train on it, export, have the server take the export up. Every round is a folder of `out`; a loop
that was killed goes on where it stopped.

    out/round-0/trajectories.jsonl   what the server answered
    out/round-0/train.jsonl          that, and the rounds before it within `online.window`
    out/round-0/run                  the training run
    out/round-0/round.json           written when the round is done
    out/served                       what the server should run now
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from draft_opd.drafters import Drafter
from draft_opd.errors import UserError
from draft_opd.export.card import model_card
from draft_opd.files import make_folder, write_json, write_text
from draft_opd.rollout.prompts import Prompt, read_prompts
from draft_opd.rollout.server import Server, gather_from
from draft_opd.rollout.trajectory import read_trajectories
from draft_opd.target import Target
from draft_opd.training.config import Recipe
from draft_opd.training.loop import Run

POLL = 1.0  # seconds between looks at a server that is coming up


class OnlineLoop:
    """See the module docstring; `run()` does the rounds that are missing."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = lambda _: None):
        """Raises `UserError` for a recipe without `online`, or a drafter that does not fit."""
        if recipe.online is None:
            raise UserError("the recipe has no section `online`: it names server and prompts")
        if not recipe.drafter:
            raise UserError("the loop starts from a trained drafter: set `drafter` in the recipe")
        self.recipe, self.say, self.options = recipe, say, recipe.online
        self.out = make_folder(Path(recipe.out))
        self.served = self.out / "served"
        self.target = Target.from_pretrained(
            recipe.target, trust_remote_code=recipe.trust_remote_code
        )
        drafter = Drafter.from_pretrained(recipe.drafter, device="cpu")
        drafter.check_target(self.target)
        o = self.options
        self.server = Server(o.server, o.server_model, o.endpoint, o.in_flight, o.patience)
        held_out = read_trajectories(recipe.data.heldout, limit=recipe.data.heldout_limit)
        self.held_out = {tuple(t.prompt_ids) for t in held_out}
        self._last: Run | None = None

    def run(self) -> dict:
        """All rounds; returns what `out/online.json` holds."""
        done = []
        for index in range(self.options.rounds):
            place = self.out / f"round-{index}"
            if not (place / "round.json").exists() and not self._round(index, place):
                break
            done.append(json.loads((place / "round.json").read_text()))
            write_json(self.out / "online.json", {"kind": "online", "rounds": done})
        if not done:
            raise UserError(f"'{self.options.prompts}' has no prompts for a first round")
        return {"kind": "online", "path": str(self.out), "served": str(self.served), "rounds": done}

    def _drafter(self, index: int) -> str:
        """The drafter that round `index` begins with."""
        if index == 0:
            return self.recipe.drafter
        return json.loads((self.out / f"round-{index - 1}" / "round.json").read_text())["drafter"]

    def _prompts(self, index: int) -> list[Prompt]:
        """Read anew every round: the file may be the log of a server and grow."""
        count = self.options.prompts_per_round
        found = read_prompts(self.options.prompts, (index + 1) * count)[index * count :]
        return [
            p for p in found if tuple(p.ids(self.target, self.options.thinking))
            not in self.held_out
        ]  # fmt: skip

    def _round(self, index: int, place: Path) -> bool:
        """False where there are no prompts left."""
        o, start = self.options, self._drafter(index)
        prompts = self._prompts(index)
        if not prompts:
            self.say(f"round {index}: no prompts left in '{o.prompts}'")
            return False
        if index == 0 and not self.served.exists():
            self._serve(start)  # the loop begins with its own drafter in the server
        self.server.check()
        self.server.dropped.clear()
        gather_from(
            self.server, self.target, prompts, place, max_new_tokens=o.max_new_tokens,
            sampling=self.recipe.sampling, seed=self.recipe.seed + index, thinking=o.thinking,
        )  # fmt: skip
        parts = [self.out / f"round-{i}" for i in range(max(0, index - o.window + 1), index + 1)]
        lines = [
            json.dumps({**json.loads(line), "id": f"{part.name}/{json.loads(line)['id']}"})
            for part in parts
            for line in (part / "trajectories.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        write_text(place / "train.jsonl", "\n".join(lines) + "\n")
        data = self.recipe.data.model_copy(
            update={"trajectories": str(place / "train.jsonl"), "limit": None}
        )
        recipe = self.recipe.model_copy(
            update={"drafter": start, "out": str(place / "run"), "data": data, "online": None}
        )
        run = Run("opd", recipe, target=self.target, after=self._last, resume=True)
        result = run.train()
        # τ may have fallen, as traffic is not the held-out text: then the server keeps what it has.
        better = result.best_tau > (result.start_tau or 0.0)
        drafter = str(result.best) if better else start
        if better:
            self._serve(drafter)
        value = {
            "round": index,
            "trajectories": len(prompts) - sum(self.server.dropped.values()),
            "dropped": dict(self.server.dropped),
            "tau_before": result.start_tau,
            "tau": result.best_tau if better else result.start_tau,
            "served": better,
            "drafter": drafter,
        }
        self._last = run
        write_json(place / "round.json", value)
        self.say(
            f"round {index}: {value['trajectories']} trajectories, held-out τ "
            f"{result.start_tau:.3f} -> {value['tau']:.3f}" + ("" if better else " (kept)")
        )
        return True

    def _serve(self, drafter: str) -> None:
        """Exports, runs the user's command, and waits until the server answers again."""
        o = self.options
        made = Drafter.from_pretrained(drafter, device="cpu")
        made.check_target(self.target)
        engine = "vllm" if "vllm" in made.formats else made.formats[0]
        serve = made.serve_command(self.recipe.target, self.served, engine)
        card = model_card(made, drafter, self.recipe.target, serve)
        made.save_pretrained(self.served, getattr(torch, o.export_dtype), card=card)
        if not o.reload:
            return
        command = o.reload.replace("{drafter}", shlex.quote(str(self.served.resolve())))
        found = subprocess.run(command, shell=True, capture_output=True, text=True)
        if found.returncode:
            told = " ".join((found.stderr or found.stdout).split())[-200:]
            raise UserError(
                f"online.reload ended with status {found.returncode} ({told}): mend the command "
                "and run again, the loop goes on from here"
            )
        deadline = time.monotonic() + o.patience
        while True:
            try:
                self.server.check()
                return
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL)
