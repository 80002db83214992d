"""A deployed drafter follows its users' traffic.

Round by round: collect what a server (running the current drafter) answers to the next prompts,
train on it, export, have the server take the export up. Every round is a folder of `out`; a loop
that was killed goes on where it stopped.

    out/round-0/trajectories.jsonl   what the server answered
    out/round-0/train.jsonl          that, and the rounds before it within `online.window`
    out/round-0/run                  the training run
    out/round-0/round.json           written when the round is done
    out/served                       what the server should run now
    out/served.json                  which drafter that is, written when the server has taken it up
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from draft_opd.data.conversation import read_row
from draft_opd.data.openai_client import Server
from draft_opd.data.prompts import Prompt, to_prompt, usable
from draft_opd.data.row_files import Row, rows_behind
from draft_opd.data.server_collect import gather_from
from draft_opd.data.skipped import Skipped
from draft_opd.data.trajectory import read_trajectories
from draft_opd.drafters import FAMILIES, Drafter
from draft_opd.models.hub import resolve_path
from draft_opd.models.target import Target
from draft_opd.serving.engines import serve_command
from draft_opd.serving.export import format_for_vllm, verifier_of
from draft_opd.serving.model_card import model_card
from draft_opd.training.config import Recipe
from draft_opd.training.inputs import check_online
from draft_opd.training.trainer import Run
from draft_opd.utils.errors import RowProblem, UserError
from draft_opd.utils.files import make_folder, read_json, write_json, write_text


class OnlineLoop:
    """See the module docstring; `run()` does the rounds that are missing."""

    def __init__(
        self,
        recipe: Recipe,
        say: Callable[[str], None] = lambda _: None,
        skipped: Skipped | None = None,
    ):
        """skipped: what to do with lines that cannot be used. Raises `UserError` for a recipe without
        `online`, or a drafter that does not fit."""
        self.skipped = skipped or Skipped()
        check_online(recipe)
        held_out = read_trajectories(recipe.data.heldout, limit=recipe.data.heldout_limit)
        self.recipe, self.say, self.options = recipe, say, recipe.online
        self.out = make_folder(Path(recipe.out))
        self.served = self.out / "served"
        self.target = Target.from_pretrained(recipe.target, trust_remote_code=recipe.trust_remote_code)
        drafter = Drafter.from_pretrained(recipe.drafter, device="cpu")
        drafter.bind(self.target)
        family = FAMILIES.get(recipe.model.family)
        if family and drafter.family in family.taken_from:
            raise UserError(
                f"the server drafts with a {drafter.family} drafter: train and serve one of {family.family} "
                "first (`draft-opd sft` begins it with that one)"
            )
        o = self.options
        self.server = Server(o.server, o.server_model, o.endpoint, o.in_flight, o.patience)
        self.held_out = {tuple(t.prompt_ids) for t in held_out}

    def run(self) -> dict:
        """All rounds, or as many as there are prompts for; returns what `out/online.json` holds."""
        done: list[dict] = []
        while len(done) < self.options.rounds:
            place = self.out / f"round-{len(done)}"
            about = place / "round.json"
            if not about.exists():
                before = done[-1] if done else {"drafter": self.recipe.drafter, "next_line": 0}
                value = self._round(len(done), place, before)
                if value is None:
                    break
                write_json(about, value)
            done.append(read_json(about))
            write_json(self.out / "online.json", {"kind": "online", "rounds": done})
        if not done:
            raise UserError(f"'{self.options.prompts}' has no usable prompts (held-out ones do not count)")
        return {"kind": "online", "path": str(self.out), "served": str(self.served), "rounds": done}

    def _prompts(self, first: int) -> tuple[list[Prompt], int, int]:
        """The next prompts behind the `first` lines (or rows, see `rows_behind`), the line that they end
        with, and how many lines were of no use: no prompt, too long, or held out."""
        found, passed, number = [], 0, first
        for number, row in rows_behind(self.options.prompts, first):
            prompt = self._usable(row, number)
            passed += prompt is None
            if prompt is not None:
                found.append(prompt)
            if len(found) == self.options.prompts_per_round:
                break
        return found, number, passed

    def _usable(self, row: Row, number: int) -> Prompt | None:
        """None for a held-out prompt, and for a row that cannot be used where those are skipped."""
        self.skipped.seen += 1
        try:
            if row.value is None:
                raise RowProblem(row.problem)
            prompt = to_prompt(read_row(row.value), str(number), row.file, row.line)
        except RowProblem as problem:
            self.skipped.add(row.file, row.line, str(problem))
            return None
        kept = usable([prompt], self.target, self.options.thinking, self.skipped, check=False)
        if not kept or tuple(kept[0][1]) in self.held_out:
            return None
        return replace(prompt, id=str(number))

    def _round(self, index: int, place: Path, before: dict) -> dict | None:
        """Returns what `round.json` holds; None where no prompts are left."""
        o, start = self.options, before["drafter"]
        prompts, line, passed = self._prompts(before["next_line"])
        self.skipped.check()
        self.skipped.write(self.out)
        if not prompts:
            self.say(f"round {index}: no usable prompts behind line {before['next_line']}")
            return None
        self._serve(start)
        self.server.wait()
        collected = gather_from(
            self.server,
            self.target,
            prompts,
            place,
            max_new_tokens=o.max_new_tokens,
            sampling=self.recipe.sampling,
            seed=self.recipe.seed + index,
            thinking=o.thinking,
        )
        parts = [self.out / f"round-{i}" for i in range(max(0, index - o.window + 1), index + 1)]
        rows = [
            {**json.loads(row), "id": f"{part.name}/{json.loads(row)['id']}"}
            for part in parts
            for row in (part / "trajectories.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        write_text(place / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        data = self.recipe.data.model_copy(update={"trajectories": str(place / "train.jsonl"), "limit": None})
        recipe = self.recipe.model_copy(
            update={"drafter": start, "out": str(place / "run"), "data": data, "online": None}
        )
        going_on = (place / "run").exists()
        result = Run("opd", recipe, target=self.target, resume=going_on).train()
        # τ may have fallen, as traffic is not the held-out text: then the server keeps what it has.
        better = result.best_tau > (result.start_tau or 0.0)
        drafter = str(result.best) if better else start
        self._serve(drafter)
        value = {
            "round": index,
            "trajectories": len(prompts) - collected.dropped.total(),
            "dropped": dict(collected.dropped),
            "passed_over": passed,
            "next_line": line,
            "tau_before": result.start_tau,
            "tau": result.best_tau if better else result.start_tau,
            "served": better,
            "drafter": drafter,
        }
        self.say(
            f"round {index}: {value['trajectories']} trajectories, held-out τ "
            f"{result.start_tau:.3f} -> {value['tau']:.3f}" + ("" if better else " (kept)")
        )
        return value

    def _serve(self, drafter: str) -> None:
        """Exports, runs the user's command and waits until the server answers, unless done."""
        o, marker = self.options, self.out / "served.json"
        if marker.exists() and read_json(marker)["drafter"] == drafter:
            return
        made = Drafter.from_pretrained(drafter, device="cpu")
        made.bind(self.target)
        path = resolve_path(self.recipe.target)
        speculators = format_for_vllm(made) == "speculators"
        verifier = verifier_of(path, self.target) if speculators else None
        card = model_card(made, drafter, path, serve_command(made, path, self.served, "vllm"))
        made.save_pretrained(self.served, getattr(torch, o.export_dtype), card=card, verifier=verifier)
        if o.reload:
            self._reload(o.reload.replace("{drafter}", shlex.quote(str(self.served.resolve()))))
            self.server.wait()
        write_json(marker, {"drafter": drafter})

    def _reload(self, command: str) -> None:
        log = self.out / "reload.log"
        with log.open("ab") as file:  # not a pipe: a server started in the background would keep it
            try:
                status = subprocess.run(
                    command,
                    shell=True,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=self.options.patience,
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"nothing in {self.options.patience:.0f} s (start servers with &)"
        if status:
            raise UserError(
                f"online.reload ended with status {status}, its output is in '{log}': mend the "
                "command and run again, the loop goes on from here"
            )
