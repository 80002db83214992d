"""The shipped target behind the part of vLLM's HTTP API that collecting uses; a process of its own.

    python small_server.py PORT [PLANTED ...]

PLANTED, what servers do to their clients: no-ids, template-twice, other-tokenizer, one-fails,
one-hangs, slow, breaks-down (after 3); every third time: busy, rate-limit, garbage, no-choices,
cut-off; sglang (its names), breaks (off in the middle of a stream), error-event (in the middle of
one), no-usage, thinks (as with a reasoning parser); drafter=FOLDER decodes with it and counts its
rounds under vLLM's names. `pytest -m slow` uses vLLM itself.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from draft_opd.decoding.generate import speculate
from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters import Drafter
from draft_opd.models.target import Target
from draft_opd.serving.vllm_process import DRAFTS, PER_POSITION, REQUESTS

torch.set_num_threads(1)
PLANTED = set(sys.argv[2:])
TARGET = Target.from_pretrained("embedded", device="cpu")
ONE_AT_A_TIME = threading.Lock()
SEEN: list[dict] = []
FOLDER = next((p.partition("=")[2] for p in PLANTED if p.startswith("drafter=")), None)
DRAFTER = Drafter.from_pretrained(FOLDER, device="cpu") if FOLDER else None
ROUNDS: list = []
REQUEST_COUNT = [0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, value: dict, status: int = 200, headers: dict | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def metrics(self) -> None:
        lines = [f'{DRAFTS}{{model_name="small"}} {len(ROUNDS)}.0']
        lines += [
            f'{PER_POSITION}{{position="{k}"}} {sum(r.accepted > k for r in ROUNDS)}.0'
            for k in range(DRAFTER.draft_length)
        ]
        lines.append(f'{REQUESTS}{{finished_reason="stop"}} {REQUEST_COUNT[0]}.0')
        body = "\n".join(["# HELP", *lines, ""]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, text: str, count: int) -> None:
        """Server-sent events, a few characters each; the last one has the usage."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        parts = [text[i : i + 7] for i in range(0, len(text), 7)]
        events = [{"choices": [{"delta": {"content": p}}]} for p in parts]
        if "thinks" in PLANTED:  # some servers fill both names
            thought = {"reasoning": "hm", "reasoning_content": "hm"}
            events.insert(0, {"choices": [{"delta": thought}]})
        if "error-event" in PLANTED:
            events[2:] = [{"error": {"message": "the engine ran out of memory"}}]
        if "no-usage" not in PLANTED:
            events.append({"choices": [], "usage": {"completion_tokens": count}})
        for i, event in enumerate(events):
            if "breaks" in PLANTED and i == 2:
                self.connection.close()
                return
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def do_GET(self):
        if self.path == "/v1/models":
            self.reply({"data": [{"id": "small"}]})
        elif self.path == "/metrics" and DRAFTER and "sglang" not in PLANTED:
            self.metrics()
        elif self.path == "/get_server_info" and "sglang" in PLANTED and ROUNDS:
            length = 1 + sum(r.accepted for r in ROUNDS) / len(ROUNDS)
            self.reply({"internal_states": [{"avg_spec_accept_length": length}]})
        elif self.path in ("/metrics", "/get_server_info", "/server_info"):
            self.reply({}, 404)
        else:
            self.reply({"seen": SEEN})

    def fail(self) -> bool:
        """What is planted for this time; whether there is anything."""
        if "busy" in PLANTED:
            self.reply({"error": {"message": "queue is full"}}, 503)
        elif "rate-limit" in PLANTED:
            self.reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.3"})
        elif "garbage" in PLANTED:
            self.send_response(200)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"<html>")
        elif "no-choices" in PLANTED:
            self.reply({"choices": []})
        elif "cut-off" in PLANTED:
            self.send_response(200)
            self.send_header("Content-Length", "500")
            self.end_headers()
            self.wfile.write(b'{"choices": [{')
            self.close_connection = True
        else:
            return False
        return True

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        SEEN.append(asked)
        if len(SEEN) % 3 == 1 and self.fail():
            return
        if "breaks-down" in PLANTED and len(SEEN) > 3:
            self.reply({"error": {"message": "the engine is dead"}}, 500)
            return
        tokenizer = TARGET.tokenizer
        if "messages" in asked:
            prompt = TARGET.chat_ids(asked["messages"])
            if "template-twice" in PLANTED:
                again = [{"role": "user", "content": tokenizer.decode(prompt)}]
                prompt = TARGET.chat_ids(again)
        else:
            prompt = asked["prompt"]
        if "one-fails" in PLANTED and "word word" in tokenizer.decode(prompt):
            self.reply({"error": {"message": "out of memory"}}, 500)
            return
        if "one-hangs" in PLANTED and "word word" in tokenizer.decode(prompt):
            time.sleep(3)
        if "slow" in PLANTED:
            time.sleep(0.6)
        if len(prompt) > 400:
            self.reply({"error": {"message": "the prompt is too long"}}, 400)
            return
        sampling = Sampling(temperature=asked["temperature"])
        with ONE_AT_A_TIME:
            made = speculate(
                TARGET,
                DRAFTER,
                [prompt],
                max_new_tokens=asked["max_tokens"],
                sampling=sampling,
                seed=asked["seed"],
            )[0]
            ROUNDS.extend(made.rounds)
            REQUEST_COUNT[0] += 1
        shown = made.token_ids[:-1] if made.finish_reason == "stop" else made.token_ids
        if "other-tokenizer" in PLANTED:  # half of a word: two tokens where ours has one
            shown = [i for t in shown for i in (t, t)]
        text = tokenizer.decode(shown, skip_special_tokens=False)
        if asked.get("stream"):
            self.stream(text, len(made.token_ids))
            return
        choice = {"finish_reason": made.finish_reason, "stop_reason": None}
        if "messages" in asked:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        answer = {
            "choices": [choice],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(made.token_ids)},
        }
        if "no-ids" not in PLANTED:
            name = "response_token_ids" if "sglang" in PLANTED else "token_ids"
            choice[name], choice["prompt_token_ids"] = made.token_ids, prompt
        self.reply(answer)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
