"""Runs command lines in forked processes, which need not load torch again: for many short ones.

    python forked.py     one JSON object a line: {"arguments": [...], "log": FILE, "env": {...}}
                         answers with the process's id, {"wait": ID} with how it ended

With "script" it is that script that gets the arguments, else `draft-opd`; "folder" is where. They
are real processes, to be killed; `Forked` is the other side.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path


class Forked:
    """Command lines as processes that start at once."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def _ask(self, **what) -> int:
        self.process.stdin.write(f"{json.dumps(what)}\n")
        return int(self.process.stdout.readline())

    def start(
        self,
        *arguments,
        log: Path,
        script: Path | None = None,
        folder: Path | None = None,
        **env: str,
    ) -> int:
        asked = {"arguments": list(map(str, arguments)), "log": str(log), "env": env}
        return self._ask(**asked, script=script and str(script), folder=str(folder or Path.cwd()))

    def status(self, process: int) -> int:
        """Waits for it; negative: the signal that ended it."""
        return self._ask(wait=process)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@cache
def shared() -> Forked:
    """The one of this process, which closes it."""
    return Forked()


class Process:
    """A forked process with what subprocess.Popen has."""

    def __init__(self, *arguments, log: Path | str = os.devnull, **where: Path):
        self.pid = shared().start(*arguments, log=Path(log), **where)
        self._status: int | None = None

    def kill(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self._status is None:
            self._status = shared().status(self.pid)
        return self._status

    def poll(self) -> bool | None:
        """None while it runs."""
        stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return None if stat != "Z" else True


def child(arguments: list[str], log: str, env: dict[str, str], script: str | None, folder: str) -> None:
    os.chdir(folder)
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.environ.update(env)
    if script is None:
        os._exit(cli.run(arguments))
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    os._exit(0)


if __name__ == "__main__":
    # Loaded once for all. Nothing here may compute: threads do not survive a fork.
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    from draft_opd.cli import main as cli
    from draft_opd.training import trainer  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                child(**asked)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
