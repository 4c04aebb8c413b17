"""examples/serve.py answers clients of OpenAI, whatever they send and however they leave, and gives each the tokens of `generate`."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import pytest
import serve
import torch
from support.scripts import Script
from transformers import AutoModelForCausalLM, AutoTokenizer

import moba_flex
from moba_flex.models import upstream

pytest.importorskip("fastapi", reason='the packages of the server are missing: pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='the packages of the server are missing: pip install ".[serve]"')
openai = pytest.importorskip("openai", reason='the packages of the server are missing: pip install ".[serve]"')
pytestmark = pytest.mark.skipif(not upstream.BATCHES_CONTINUOUSLY, reason="this version of transformers hands MoBA too little")

ROOT = Path(__file__).parents[2]
FLAGS = ["--block-size", "32", "--top-k", "2", "--page-size", "64", "--num-pages", "40", "--max-batch-tokens", "128", "--device", "cpu"]
SECONDS = 120  # that anything may take; nothing waits for as long unless it fails
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class Server:
    """The script in a process of its own, and what it prints."""

    def __init__(self, model: Path, folder: Path, *flags: str) -> None:
        self._said = folder / "said"
        os.mkfifo(self._said)
        command = ["examples/serve.py", "--model", str(model), "--port", "0", *FLAGS, *flags]
        self.process = Script(command, dict(os.environ), self._said)
        self.lines: list[str] = []
        self._new: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.model = str(model)

    @cached_property
    def address(self) -> str:
        return self.line(r"on (http://127\.0\.0\.1:\d+/v1)")[1]

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.address, api_key="none", timeout=SECONDS, max_retries=0)

    def _read(self) -> None:
        with open(self._said) as said:
            for line in said:
                self.lines.append(line)
                self._new.put(line)

    def line(self, pattern: str) -> re.Match:
        """The next line that it prints with this in it."""
        deadline = time.monotonic() + SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                if found := re.search(pattern, self._new.get(timeout=left)):
                    return found
            except queue.Empty:
                break
        raise AssertionError(f"no line with {pattern!r} in {''.join(self.lines)}")

    def resident(self) -> int:
        """Its memory in bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def folder(byte_llama: Path, tmp_path_factory) -> Path:
    """A small random Llama that reads bytes, up to 1,024 of them, and never ends of itself."""
    folder = tmp_path_factory.mktemp("served")
    model = AutoModelForCausalLM.from_pretrained(byte_llama, dtype=torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)  # else attention is nearly uniform, whatever it reads
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(byte_llama)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers(folder: Path, tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    """Two, which start at the same time: one for Ctrl-C."""
    sparse, full = (
        Server(folder, tmp_path_factory.mktemp("server"), "--dtype", "float32", "--decode", decode) for decode in ("sparse", "full")
    )
    with sparse.process, full.process:
        yield sparse, full


@pytest.fixture
def server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def alone(folder: Path):
    """What `generate` gives a prompt for itself, as text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    moba_flex.patch(model, block_size=32, top_k=2, sink_blocks=1, decode="sparse")

    def of(prompt: str, new: int) -> str:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return of


def text(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return "".join(chr(97 + i) for i in torch.randint(26, (length,), generator=generator).tolist())


def complete(server: Server, prompt: str, new: int) -> str:
    return server.client.completions.create(model=server.model, prompt=prompt, max_tokens=new, temperature=0).choices[0].text


def test_long_and_short_prompts_at_once_get_the_tokens_that_they_get_alone(server, alone):
    prompts = [*(text(seed, 700) for seed in (1, 2)), *(text(seed, 20 + seed) for seed in range(3, 8))]
    with ThreadPoolExecutor(7) as threads:
        got = list(threads.map(lambda prompt: complete(server, prompt, 12), prompts))
    assert got == [alone(prompt, 12) for prompt in prompts]
    told = [server.line(r"([\d,]+) prompt tokens, 12 new in [\d.]+ s, [\d.]+ tokens/s, ([\d.]+)% of the keys read") for _ in prompts]
    assert sorted(int(found[1]) for found in told) == sorted(map(len, prompts))
    assert all((float(found[2]) < 20) == (found[1] == "700") for found in told)


def test_answers_are_streamed(server, alone):
    prompt = text(9, 90)
    chunks = server.client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": prompt}], max_tokens=10, temperature=0, stream=True
    )
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(parts) > 3 and "".join(parts) == alone(prompt, 10)


def test_a_client_that_goes_away_leaves_the_others_their_tokens(server, alone):
    stream = server.client.completions.create(model=server.model, prompt=text(10, 300), max_tokens=700, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    assert complete(server, text(11, 50), 8) == alone(text(11, 50), 8)
    assert int(server.line(r"(\d+) new in .* then the client went away")[1]) < 700


def test_a_prompt_that_is_too_long_is_an_error_of_the_request_alone(server, alone):
    with pytest.raises(
        openai.BadRequestError, match=r"the prompt has 1,024 tokens, but must have from 1 to 1,023: the model's context has room for"
    ):
        complete(server, text(12, 1024), 5)
    assert complete(server, text(12, 1020), 50) == alone(text(12, 1020), 4)  # which is all that there is room for
    assert complete(server, text(13, 30), 5) == alone(text(13, 30), 5)


def post(server: Server, path: str, body: bytes) -> tuple[int, str]:
    """The status and the message of the error."""
    response = server.client._client.post(f"{server.address}/{path}", content=body, headers={"content-type": "application/json"})
    error = json.loads(response.text)["error"]
    assert error["code"] == response.status_code and error["type"] == "invalid_request_error"
    return response.status_code, error["message"]


MALFORMED = {
    b"{": "the body of the request is not a JSON object: ",
    b"[]": "the body of the request is not a JSON object: ",
    b'{"model": "\xff\xfe"}': "the body of the request is not a JSON object: 'utf-8' codec",
    b"[" * 100_000: "the body of the request is not a JSON object: ",
    b"{}": "the request lacks 'messages'",
    b'{"messages": 3}': "the request cannot be understood: ",
    b'{"messages": [{}]}': "the request lacks 'role'",
    b'{"messages": []}': "messages must have at least one message, but is []",
    b'{"messages": [], "unknown": 1}': "Unexpected fields in the request: {'unknown'}",
}


@pytest.mark.parametrize(("body", "said"), MALFORMED.items(), ids=[repr(body[:40]) for body in MALFORMED])
def test_a_malformed_body_is_an_error_of_the_request_alone(server, body, said):
    status, message = post(server, "chat/completions", body)
    assert status == 422 and message.startswith(said)
    assert len(complete(server, "abc", 2)) > 0


OUT_OF_RANGE = [
    *[("max_tokens", value, "an int of at least 1") for value in (0, -1, "x", 2.5, True)],
    *[("temperature", value, "a finite number of at least 0") for value in (-1, "hot", float("nan"), float("inf"))],
    *[("top_p", value, "a number from 0 to 1") for value in (2, -1, "x")],
    *[("seed", value, "an int from 0 to 2**63 - 1") for value in ("x", -1, 1 << 64)],
    ("frequency_penalty", 99, "a number from -0.99 to 2"),
    ("generation_config", "zzz", "a JSON object in a string"),
    ("generation_config", "[1]", "a JSON object in a string"),
    ("generation_config", 5, "a JSON object in a string"),
]


@pytest.mark.parametrize(("name", "value", "must"), OUT_OF_RANGE, ids=str)
def test_a_number_that_generation_cannot_use_is_named(server, name, value, must):
    body = json.dumps({"prompt": "abc", "max_tokens": 2, name: value}).encode()
    assert post(server, "completions", body) == (422, f"{name} must be {must}, but is {value!r}")


def test_numbers_within_a_generation_config_are_checked_too(server):
    body = json.dumps({"prompt": "abc", "generation_config": json.dumps({"max_new_tokens": -5})}).encode()
    assert post(server, "completions", body) == (422, "max_new_tokens must be an int of at least 1, but is -5")
    for path, name in (("chat/completions", "max_completion_tokens"), ("responses", "max_output_tokens")):
        given = {"messages": [{"role": "user", "content": "a"}]} if path == "chat/completions" else {"input": "a"}
        assert post(server, path, json.dumps({**given, name: 0}).encode()) == (422, f"{name} must be an int of at least 1, but is 0")


def test_what_the_server_does_not_have_is_told_in_the_same_form(server):
    assert post(server, "audio/transcriptions", b"{}") == (400, "this server has a language model, which transcribes no audio")
    assert post(server, "nothing", b"{}") == (404, "Not Found")
    assert not [line for line in server.lines if "Traceback" in line], server.lines


def test_two_hundred_requests_leave_no_memory_behind(server):
    def ask(seed: int) -> None:
        complete(server, text(seed, 40), 3)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(100, 150)))
        before = server.resident()
        list(threads.map(ask, range(200, 400)))
    assert server.resident() - before < 16 << 20


def test_ctrl_c_ends_it_with_requests_under_way(servers):
    server, ends = servers[1], []

    def ask() -> None:
        try:
            ends.append(server.client.completions.create(model=server.model, prompt=text(2, 300), max_tokens=700, temperature=0))
        except openai.APIError as error:
            ends.append(error)

    stream = server.client.completions.create(model=server.model, prompt=text(1, 300), max_tokens=700, temperature=0, stream=True)
    other = threading.Thread(target=ask)
    other.start()
    next(iter(stream))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(SECONDS) == 130
    other.join(SECONDS)
    assert len(ends) == 1 and isinstance(ends[0], openai.APIError)
    with pytest.raises(openai.APIError):
        list(stream)
    assert not [line for line in server.lines if "Traceback" in line or "Error" in line], server.lines


def test_a_port_that_is_taken_and_wrong_settings_are_told_in_one_line(server, folder, capsys):
    port = server.address.split(":")[2].removesuffix("/v1")
    for flags, said in ((["--port", port], "in use"), (["--top-k", "1"], "--sink-blocks"), (["--block-size", "0"], "--block-size")):
        assert serve.main(["--model", str(folder), *FLAGS, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("serve.py: error: ") and said in line
