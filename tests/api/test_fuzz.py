"""10,000 requests, most of them hostile, to a real engine through the real application.

None is answered 500, questions with known answers get them all the while, and afterwards nothing is left: no request,
no page, no thread. What each of the clients sends is the same at every run; how they interleave is not.
"""

import json
import logging
import math
import random
import threading
import time

import pytest
from werkzeug.test import EnvironBuilder

from slora_jax.api.app import create_app
from tests.helpers.engine_cases import FIXTURES, Case, compiled_fast

REQUESTS = 10_000
CLIENTS = 4
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PIN, UNPIN = "/v1/pin_lora_adapter", "/v1/unpin_lora_adapter"
ROUTES = [COMPLETIONS, CHAT, RESPONSES, LOAD, UNLOAD, PIN, UNPIN, "/tokenize", "/detokenize"]

HOSTILE = [
    None, True, False, 0, 1, 2, 5, 40, -1, 128, 129, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0,
    1.0, 0.5, 1e-46, 1e-4, 5e-324, 1e38, 1e308, math.nan, math.inf, -math.inf, "", "a", "1", "NaN", "\ud800", "\x00",
    "é😀", "x" * 3000, [], {}, [[]], [None], [1], [1.0], ["a"], ["\udfff"], [[1, 2], [3]], [["a"]], [2**31], [-1],
    ["e", "o", "\x00"], [0] * 300, ["a"] * 3000, {"a": 1}, {"include_usage": True}, {"type": "text"}, {"type":
    "json_object"}, [{"role": "user"}], [{"role": "user", "content": "hi"}], [{"role": "user", "content": [{"type":
    "text", "text": "a"}]}], [{"role": [], "content": {}}], [{"role": "system", "content": "\ud800"}], "auto", "none",
    "base", "qv-r8", {"format": {"type": "json_object"}}, [{"type": "function", "name": "f"}], {"type": "function",
    "name": "f"}, [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}], [{"type": []}], [{"type":
    "function_call_output", "call_id": "c", "output": "x"}], ["message.output_text.logprobs"],
]  # fmt: skip
LEGAL = {
    "max_tokens": (1, 2, 7, 20), "temperature": (0, 1e-46, 1e-4, 0.7, 1, 100), "top_k": (-1, 0, 1, 5, 2**31 - 1),
    "top_p": (1e-46, 0.5, 1), "min_p": (0, 1e-46, 0.1, 1), "repetition_penalty": (0.01, 1, 1.3, 100),
    "presence_penalty": (-2, 0, 2), "frequency_penalty": (-2, 0, 2), "seed": (0, -1, 2**64 - 1, -(2**63)), "n": (1, 2,
    5), "stop": ("e", ["o", "zz"]), "stop_token_ids": ([1], [287]), "ignore_eos": (True, False), "return_token_ids":
    (True,), "min_tokens": (0, 1), "logit_bias": ({"5": 2}, {}), "response_format": ({"type": "json_object"}, {"type":
    "text"}), "skip_special_tokens": (True, False), "include_stop_str_in_output": (True, False),
}  # fmt: skip
NOT_OF_RESPONSES = {"max_tokens", "n", "return_token_ids", "response_format"}
OTHERS = [
    "input", "instructions", "max_output_tokens", "text", "include", "metadata", "reasoning", "previous_response_id",
    "model", "prompt", "messages", "max_completion_tokens", "stream", "stream_options", "priority", "slo_ms",
    "logprobs", "prompt_logprobs", "top_logprobs", "echo", "best_of", "suffix", "tools", "store", "user", "nobody",
    "guided_grammar", "guided_regex", "guided_json", "guided_choice", "structured_outputs", "allowed_token_ids",
    "tool_choice", "truncate_prompt_tokens", "chat_template_kwargs", "continue_final_message",
    "bad_words",
]  # fmt: skip
BODIES = [
    b"", b"{", b"[" * 5000, b"\xff", b"null", b'{"a":1,"a":2}', b'{"n":' + b"9" * 5000 + b"}", b'{"temperature": NaN}',
]  # fmt: skip
PATHS = [
    "/health", "/v1/models", "/v1/models/qv-r8", "/v1/models/x%ff", "/v1//models",
    "/v1/capacity?prompt_tokens=9&max_tokens=9",
    "/v1/capacity?prompt_tokens=9&max_tokens=9&adapter=qv-r8", "/v1/capacity?prompt_tokens=999999999&max_tokens=1",
    "/v1/capacity?adapter=%00&prompt_tokens=1&max_tokens=1", "/v1/capacity?prompt_tokens=-1",
]  # fmt: skip


class Client:
    """One of the clients, and what it saw."""

    def __init__(self, app, case: Case, seed: int):
        self._app = app
        self._case = case
        self._choose = random.Random(seed)
        self._http = app.test_client()
        self._own = f"client-{seed}"
        self.statuses: dict[int, int] = {}
        self.wrong: list[str] = []

    def run(self, count: int) -> None:
        actions = (self.hostile, self.legal, self.known, self.hang_up, self.adapters, self.body, self.look)
        for _ in range(count):
            (action,) = self._choose.choices(actions, weights=(60, 10, 4, 8, 10, 4, 4))
            try:
                action()
            except Exception as e:
                self.wrong.append(f"{action.__name__}: {type(e).__name__}: {e}")

    def hostile(self) -> None:
        path, body = self._base()
        for _ in range(self._choose.randint(1, 3)):
            body[self._choose.choice([*LEGAL, *OTHERS])] = self._choose.choice(HOSTILE)
        self._check(self._http.post(path, data=json.dumps(body).encode()), body)

    def legal(self) -> None:
        path, body = self._legal()
        body["stream"] = self._choose.random() < 0.5
        response = self._http.post(path, data=json.dumps(body).encode())
        self._check(response, body)
        if response.status_code != 200:
            self.wrong.append(f"refused though it is legal: {body}: {response.text}")

    def known(self) -> None:
        """A question whose answer PyTorch and PEFT gave."""
        request = self._choose.choice(self._case.requests[:2])
        body = {
            "model": request["adapter"] or "model", "prompt": request["prompt"], "temperature": 0, "max_tokens": 12,
            "return_token_ids": True, "ignore_eos": True,
        }  # fmt: skip
        response = self._http.post(COMPLETIONS, json=body)
        self._check(response, body)
        if response.get_json()["choices"][0]["token_ids"] != request["tokens"][:12]:
            self.wrong.append(f"another answer than PyTorch's: {response.text}")

    def hang_up(self) -> None:
        """Goes away in the middle of a stream, or before the answer of a request without."""
        path, body = self._legal()
        most = "max_output_tokens" if path == RESPONSES else "max_tokens"
        body |= {most: 50, "stream": self._choose.random() < 0.7, "ignore_eos": True}
        looks = iter(range(self._choose.randint(0, 3)))
        environ = EnvironBuilder(path, method="POST", json=body).get_environ()
        environ["waitress.client_disconnected"] = lambda: next(looks, None) is None
        events = self._app.wsgi_app(environ, lambda status, headers: None)
        for _, _ in zip(range(self._choose.randint(0, 5)), events, strict=False):
            pass
        events.close()

    def adapters(self) -> None:
        folder = str(self._case.adapters / self._choose.choice(["qv-r8", "mlp-r3"]))
        names = [
            self._own,
            self._own,
            f"model:{self._own}",
            "model",
            "model:x",
            "",
            "a b",
            "\x00",
            "é",
            "n" * 500,
            5,
            None,
        ]
        folders = [
            folder,
            folder,
            folder,
            "/",
            "/nowhere",
            "/\x00",
            "/" + "x" * 5000,
            str(self._case.model),
            5,
            None,
            "",
        ]
        name = self._choose.choice(names)
        if self._choose.random() < 0.5:
            body = {"lora_name": name, "lora_path": self._choose.choice(folders)}
            if self._choose.random() < 0.3:
                body["pinned"] = self._choose.choice([True, False, "x", 1, None])
            body["load_inplace"] = self._choose.choice([True, True, False, "x", None])
            self._check(self._http.post(LOAD, json=body), body)
        else:
            self._check(self._http.post(self._choose.choice([UNLOAD, PIN, UNPIN]), json={"lora_name": name}), name)

    def body(self) -> None:
        body = self._choose.choice(BODIES)
        self._check(self._http.post(self._choose.choice(ROUTES), data=body, content_type="application/json"), body)

    def look(self) -> None:
        path = self._choose.choice(PATHS)
        self._check(self._http.get(path), path)

    def _base(self) -> tuple[str, dict]:
        body = {"model": self._choose.choice(["model", "qv-r8", "mlp-r3", "model:qv-r8", self._own])}
        if self._choose.random() < 0.2:
            return RESPONSES, body | {"input": "hello", "max_output_tokens": 4}
        body["max_tokens"] = 4
        if self._choose.random() < 0.6:
            return COMPLETIONS, body | {"prompt": "hello world"[: self._choose.randint(1, 11)]}
        return CHAT, body | {"messages": [{"role": "user", "content": "hello"}]}

    def _legal(self) -> tuple[str, dict]:
        path, body = self._base()
        body["model"] = self._choose.choice(["model", "qv-r8", "model:mlp-r3"])
        allowed = [name for name in LEGAL if path != RESPONSES or name not in NOT_OF_RESPONSES]
        for name in self._choose.sample(allowed, 4):
            body[name] = self._choose.choice(LEGAL[name])
        return path, body

    def _check(self, response, sent) -> None:
        """An answer, or a refusal that is not the server's fault, in JSON without a NaN."""

        def refuse(name):
            raise AssertionError(f"{name} in an answer")

        status, text = response.status_code, response.get_data(as_text=True)
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if response.content_type.startswith("text/event-stream"):
            payloads = [event.split("\n")[-1].removeprefix("data: ") for event in text.split("\n\n")[:-1]]
            is_response = text.startswith("event: response.created\n")
            values = [json.loads(payload, parse_constant=refuse) for payload in payloads if payload != "[DONE]"]
            ends = ("response.completed", "response.incomplete")
            good = values[-1]["type"] in ends if is_response else payloads[-1] == "[DONE]"
        else:
            values = [json.loads(text, parse_constant=refuse)]
            good = status == 200 or (400 <= status < 500 and values[0]["error"]["message"])
        if not good:
            self.wrong.append(f"{status} for {str(sent)[:300]}: {text[-300:]}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_requests(caplog):
    case = Case(FIXTURES / "smollm_gqa3")
    with compiled_fast():
        engine = case.engine(max_model_len=192, pages=120)
        engine.start()
        app = create_app(engine, allow_adapter_loading=True)
        clients = [Client(app, case, seed) for seed in range(CLIENTS)]
        threads = [threading.Thread(target=client.run, args=(REQUESTS // CLIENTS,)) for client in clients]
        with caplog.at_level(logging.ERROR):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    try:
        assert not [wrong for client in clients for wrong in client.wrong]
        assert not caplog.records
        statuses = {status: sum(client.statuses.get(status, 0) for client in clients) for status in (200, 400, 404)}
        assert min(statuses.values()) > REQUESTS // 50, "it reaches the engine, and is refused, often"
        clients[0].known()
        assert not clients[0].wrong
        for name in engine.adapters():
            engine.unpin_adapter(name)
        deadline = time.monotonic() + 10
        while engine.stats()["pages_used"]:
            assert time.monotonic() < deadline, "pages are used, and nobody uses them"
            time.sleep(0.01)
    finally:
        engine.close()
    engine.check_integrity()
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0)
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
