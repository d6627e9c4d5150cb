"""Asks the server through OpenAI's own client, on a small model whose texts `complete` gives, too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest
import torch
from model_folders import make_source, random_weights, speaking_phi, tiny_tokenizer

from phi_fast.data.chat import ChatFiles
from phi_fast.errors import UsageError
from phi_fast.generate import GenerateOptions, check
from phi_fast.generation import Sampling, complete
from phi_fast.generation.engine import Engine, Request

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from phi_fast.serving import server  # noqa: E402
from phi_fast.serving.app import Served, make_app  # noqa: E402

PROMPTS = ["def f(x):", "x", "The module", "a b c d e f g h i j k", "naïve 猫", "0123456789" * 3]
NAME = "runs/tiny"
SLOTS, QUEUE = 4, 6


class Running:
    """A server in a thread, with a client for it."""

    def __init__(self, template: ChatFiles | None = None) -> None:
        self.model, self.tokenizer = speaking_phi(), tiny_tokenizer()
        self.engine = Engine(self.model, self.tokenizer, slots=SLOTS, queue=QUEUE)
        chat_prompt, stop = server._chat(template, self.tokenizer, ("Alice", "Bob"))
        app = make_app(Served(self.engine, NAME, Sampling(max_new_tokens=30), chat_prompt, stop, 123))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
        socket = server.listen("127.0.0.1", 0)
        self.port = socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [socket]}, daemon=True)
        self.thread.start()
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60
        )

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)

    def complete(self, prompt: str, **settings) -> str:
        settings = {"model": NAME, "temperature": 0, **settings}
        return self.client.completions.create(prompt=prompt, **settings).choices[0].text

    def alone(self, prompt: str, **settings):
        (result,) = complete(self.model, self.tokenizer, [prompt], Sampling(**{"max_new_tokens": 30, **settings}))
        return result


@pytest.fixture(scope="module")
def running():
    result = Running()
    yield result
    result.stop()
    assert not result.thread.is_alive()


def test_models(running):
    (model,) = running.client.models.list().data
    assert (model.id, model.created, model.owned_by) == (NAME, 123, "phi_fast")


def test_a_completion_is_the_text_of_generate(running):
    reply = running.client.completions.create(model=NAME, prompt=PROMPTS[0], temperature=0)
    alone = running.alone(PROMPTS[0])
    (choice,) = reply.choices
    assert choice.text == alone.text
    assert choice.finish_reason == {"length": "length", "end": "stop"}[alone.reason]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(PROMPTS[0]), len(alone.tokens))
    assert reply.usage.total_tokens == len(PROMPTS[0]) + len(alone.tokens)
    assert (reply.object, reply.model) == ("text_completion", NAME)


def test_concurrent_requests_share_a_batch_and_give_the_same_texts_as_alone(running):
    running.engine.largest_batch = 0
    expected = [running.alone(prompt, max_new_tokens=20 + 5 * i).text for i, prompt in enumerate(PROMPTS)]
    assert len(set(expected)) == len(expected)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(3):
            got = list(pool.map(lambda i: running.complete(PROMPTS[i], max_tokens=20 + 5 * i), range(len(PROMPTS))))
            assert got == expected
    assert running.engine.largest_batch > 1


def test_a_list_of_prompts_and_token_ids(running):
    texts = [choice.text for choice in running.client.completions.create(
        model=NAME, prompt=PROMPTS[:2], temperature=0, n=2
    ).choices]  # fmt: skip
    assert texts == [running.alone(prompt).text for prompt in PROMPTS[:2] for _ in range(2)]
    ids = running.tokenizer.encode(PROMPTS[0]).ids
    assert running.complete(ids) == running.complete([ids]) == texts[0]


def test_a_stream_joins_to_the_whole_text(running):
    for prompt in PROMPTS:
        chunks = list(running.client.completions.create(
            model=NAME, prompt=prompt, temperature=0, stream=True, stream_options={"include_usage": True}
        ))  # fmt: skip
        alone = running.alone(prompt)
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == alone.text
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
        assert chunks[-2].choices[0].finish_reason == {"length": "length", "end": "stop"}[alone.reason]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == len(alone.tokens)
        assert len(chunks) > 3


def test_stop_strings(running):
    whole = running.alone(PROMPTS[0]).text
    stop = whole[7:9]
    reply = running.client.completions.create(model=NAME, prompt=PROMPTS[0], temperature=0, stop=["absent", stop])
    assert reply.choices[0].text == whole[: whole.find(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_seeds(running):
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    text = running.complete(PROMPTS[0], **settings)
    assert text == running.complete(PROMPTS[0], **settings) == running.alone(PROMPTS[0], **settings).text
    assert text != running.complete(PROMPTS[0], **settings | {"seed": 8})
    unseeded = {running.complete(PROMPTS[0], temperature=1.0) for _ in range(3)}
    assert len(unseeded) > 1
    choices = running.client.completions.create(model=NAME, prompt=PROMPTS[0], n=3, **settings).choices
    assert choices[0].text == text
    assert len({choice.text for choice in choices}) == 3


def logprobs_of(running, prompt: str, new: list[int]) -> torch.Tensor:
    """(new tokens, vocabulary), by one forward over the whole text."""
    ids = running.tokenizer.encode(prompt).ids
    with torch.no_grad():
        logits = running.model(torch.tensor([ids + new])).logits[0].float()
    return logits.log_softmax(-1)[len(ids) - 1 : -1]


def test_log_probabilities(running):
    alone = running.alone(PROMPTS[0], max_new_tokens=6)
    expected = logprobs_of(running, PROMPTS[0], alone.tokens)
    found = running.client.completions.create(
        model=NAME, prompt=PROMPTS[0], temperature=0, max_tokens=6, logprobs=3
    ).choices[0].logprobs  # fmt: skip
    chosen = [float(row[token]) for row, token in zip(expected, alone.tokens, strict=True)]
    assert found.token_logprobs == pytest.approx(chosen, abs=1e-4)
    texts = [running.tokenizer.decode(alone.tokens[:i]) for i in range(len(alone.tokens))]
    assert found.text_offset == [len(text.rstrip("\ufffd")) for text in texts]
    for row, top in zip(expected, found.top_logprobs, strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)

    chat = running.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}], temperature=0, max_tokens=4, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens == 4
    for entry in content:  # greedy: the token is the likeliest one
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


def test_chat_without_a_template_is_the_dialogue_of_generate(running):
    messages = [
        {"role": "system", "content": "Two people talk."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": " Hi"},
        {"role": "user", "content": [{"type": "text", "text": "W"}, {"type": "text", "text": "hy?"}]},
    ]
    prompt = "Two people talk.\nAlice: Hello\nBob: Hi\nAlice: Why?\nBob:"
    expected = running.alone(prompt, stop=("\nAlice:", "\nBob:")).text
    settings = {"model": NAME, "messages": messages, "temperature": 0}
    reply = running.client.chat.completions.create(**settings)
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage.prompt_tokens == len(prompt)
    chunks = list(running.client.chat.completions.create(stream=True, **settings))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    with pytest.raises(openai.BadRequestError, match="the role 'tool'"):
        running.client.chat.completions.create(
            model=NAME, messages=[{"role": "tool", "content": "x", "name": "y"}], max_tokens=1
        )


def test_chat_by_the_models_template():
    pytest.importorskip("transformers")
    template = (
        "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}<{{ m.role }}>"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    )
    running = Running(ChatFiles(template, {"eos_token": "<|endoftext|>"}))
    try:
        settings = {"model": NAME, "temperature": 0}
        reply = running.client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], **settings)
        assert reply.choices[0].message.content == running.alone("<user>Hi<answer>").text
        with pytest.raises(openai.BadRequestError, match="no x"):
            running.client.chat.completions.create(messages=[{"role": "x", "content": "Hi"}], **settings)
    finally:
        running.stop()


WRONG = {
    "a temperature": ({"temperature": -1}, "temperature: "),
    "a kind": ({"max_tokens": "many"}, "max_tokens: "),
    "no tokens": ({"max_tokens": 0}, "max_tokens: "),
    "a penalty that is not carried out": ({"presence_penalty": 0.5}, "presence_penalty: "),
    "an echo": ({"echo": True}, "echo: "),
    "an unknown field": ({"extra_body": {"tempratur": 1}}, "tempratur: "),
    "an empty stop": ({"stop": [""]}, "no empty string"),
    "too much context": (
        {"max_tokens": 96},
        "context length is 96 tokens, and the request has 1 tokens and 96",
    ),
    "too long a prompt": ({"prompt": "x" * 96}, "has 96 tokens: shorten it"),
    "a token id": ({"prompt": [5, 300]}, "token id 300: the model has 300 ids"),
    "no prompt": ({"prompt": []}, "expected a text"),
    "too many choices": ({"prompt": ["x"] * 40, "n": 2}, "at most 64"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_request_is_refused_with_its_reason(running, kind):
    fields, message = WRONG[kind]
    with pytest.raises(openai.BadRequestError) as error:
        running.client.completions.create(**{"model": NAME, "prompt": "x", **fields})
    assert message in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"
    if "context length" in message:
        assert error.value.body["code"] == "context_length_exceeded"


def test_harmless_fields_are_accepted(running):
    fields = {"presence_penalty": 0, "frequency_penalty": 0.0, "echo": False, "best_of": 1, "user": "me", "n": 1}
    assert running.complete("x", **fields, extra_body={"top_k": 1}) == running.alone("x").text


def test_another_model_and_another_path(running):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served, 'runs/tiny' is"):
        running.client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        running.client.embeddings.create(model=NAME, input="x")


def post(running, body: bytes, content_type: str) -> tuple[int, dict]:
    connection = HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request("POST", "/v1/completions", body, {"Content-Type": content_type})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_a_body_must_be_json_and_short(running):
    assert post(running, b'{"prompt": "x", "max_tokens": 1}', "application/json; charset=utf-8")[0] == 200
    assert post(running, b'{"prompt": "x"}', "text/plain")[0] == 415
    assert post(running, b"{", "application/json")[0] == 400
    assert post(running, b'{"prompt": "\\ud800"}', "application/json")[0] == 400
    assert post(running, b" " * (4 * 2**20 + 1), "application/json")[0] == 413


@pytest.fixture
def held(running):
    """Holds the engine's thread between two steps until the test lets it go."""
    gate = threading.Event()
    entered = threading.Event()
    step = running.engine._step

    def wait() -> None:
        entered.set()
        assert gate.wait(60)
        step()

    running.engine._step = wait
    yield gate, entered
    running.engine._step = step
    gate.set()


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_is_429_and_what_was_taken_is_completed(running, held):
    gate, entered = held
    with ThreadPoolExecutor(1 + QUEUE) as pool:
        first = pool.submit(running.client.completions.create, model=NAME, prompt=["x"] * SLOTS, temperature=0)
        assert entered.wait(60)
        wait_until(lambda: len(running.engine._rows) == SLOTS)
        second = pool.submit(running.client.completions.create, model=NAME, prompt=["x"] * QUEUE, temperature=0)
        wait_until(lambda: len(running.engine._waiting) == QUEUE)
        with pytest.raises(openai.RateLimitError, match="the queue is full"):
            running.complete("x")
        gate.set()
        expected = running.alone("x").text
        assert [choice.text for choice in first.result().choices] == [expected] * SLOTS
        assert [choice.text for choice in second.result().choices] == [expected] * QUEUE


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_text(running, held, stream):
    gate, entered = held
    connection = HTTPConnection("127.0.0.1", running.port, timeout=60)
    body = json.dumps({"prompt": "x", "max_tokens": 90, "temperature": 0, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert entered.wait(60)
    (row,) = running.engine._rows
    connection.sock.close()
    wait_until(lambda: row.request.cancelled)
    gate.set()
    wait_until(lambda: not running.engine._rows)
    assert len(row.ids) < 10
    assert running.complete("x") == running.alone("x").text


def test_a_step_that_fails_ends_its_texts_with_an_error_and_the_server_goes_on(running, monkeypatch, caplog):
    def fail(tokens):
        raise RuntimeError("the device is lost")

    decode = running.engine._cache.decode
    monkeypatch.setattr(running.engine._cache, "decode", fail)
    with pytest.raises(openai.InternalServerError, match="the device is lost"):
        running.complete("x")
    stream = running.client.completions.create(model=NAME, prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="the device is lost"):
        list(stream)
    assert caplog.text.count("RuntimeError: the device is lost") == 2
    monkeypatch.setattr(running.engine._cache, "decode", decode)
    assert running.complete("x") == running.alone("x").text


def test_a_closing_engine_ends_what_waits():
    engine = Engine(speaking_phi(), tiny_tokenizer(), slots=1)
    pieces = []
    engine.submit([Request([1, 2], Sampling(max_new_tokens=90), pieces.append, i) for i in range(3)])
    engine.close()
    assert sum(piece.error is not None or piece.reason is not None for piece in pieces) == 3


def test_the_command_serves_and_ends_at_sigterm(tmp_path):
    folder = make_source(tmp_path / "model", "hf", random_weights())
    command = [sys.executable, "-m", "phi_fast.generate", "--model", str(folder), "--serve", "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = next(line for line in process.stderr if line.startswith("serving"))
            assert line.startswith(f"serving {folder} at http://127.0.0.1:")
            url = line.split(" at ")[1].split(";")[0]
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
            (model,) = client.models.list().data
            stream = client.completions.create(model=model.id, prompt="x", max_tokens=50, temperature=0, stream=True)
            first = next(iter(stream)).choices[0]
            process.send_signal(signal.SIGTERM)
            rest = [chunk.choices[0] for chunk in stream]
            assert [first, *rest][-1].finish_reason is not None  # what ran was completed
            assert process.wait(60) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_an_address_in_use_and_wrong_options():
    with server.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port} cannot be listened on: Address already in use"):
            server.listen("127.0.0.1", port)
    for host, port, message in (
        ("127.0.0.1", 70000, "--port 70000: expected 0"),
        ("no such host", 0, "--host no such host --port 0 cannot be listened on"),
    ):
        with pytest.raises(UsageError, match=message):
            server.listen(host, port)
    for fields, message in (
        ({"chat": True}, "--serve exclude each other"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"queue": -1}, "--queue -1"),
        ({"n": 2}, "--n is for prompts"),
        ({"out": "x"}, "--out is for the results of --file"),
    ):
        with pytest.raises(UsageError, match=message):
            check(GenerateOptions("model", serve=True, **fields))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs starlette, uvicorn: pip install 'phi-fast\[serve\]'"):
        server.listen("127.0.0.1", 0)
