"""Runs against a server of this machine that completes, fails, is slow, and repeats itself."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from openai_server import Server, body_of, text_of

pytest.importorskip("openai")
pytest.importorskip("rensa")

from phi_fast.errors import UsageError
from phi_fast.synthesis import client, run
from phi_fast.synthesis.client import Request, ServerError
from phi_fast.synthesis.journal import read_journal
from phi_fast.synthesis.prompts import Prompts
from phi_fast.synthesis.run import Limits, synthesize
from phi_fast.synthesis.state import DOCUMENTS, JOURNAL, PLAN, REPORT

TOPICS = Prompts(["tides", "bread", "prime numbers"], styles=("story", "textbook"), audiences=("researchers",))
PLENTY = Limits(10**9, 4)


def go(folder: Path, server: Server, prompts: Prompts = TOPICS, limits: Limits = PLENTY, **options: Any) -> dict:
    said = options.pop("said", [])
    similarity = options.pop("similarity", 0.7)
    request = Request(server.url, "m", **{"max_tokens": 64, "timeout": 20, **options})
    return synthesize(folder, prompts, request, limits, similarity=similarity, tell=said.append)


def documents(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / DOCUMENTS).read_text("utf-8").splitlines()]


def test_every_prompt_becomes_a_document_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    with Server() as server:
        report = go(tmp_path, server)
    assert [record["text"] for record in documents(tmp_path)] == [text_of(prompt.text) for prompt in TOPICS]
    assert [record["id"] for record in documents(tmp_path)] == [f"0000000{i}" for i in range(6)]
    assert {(record["topic"], record["style"]) for record in documents(tmp_path)} == {
        (topic, style) for topic in TOPICS.topics for style in TOPICS.styles
    }
    assert report == json.loads((tmp_path / REPORT).read_text("utf-8"))
    assert report["ended"] == "all prompts are answered"
    assert report["prompts"] | {"all": 6, "completed": 6, "refused": 0} == report["prompts"]
    assert report["documents"]["by_style"] == {"story": 3, "textbook": 3}
    assert report["tokens"]["completion"] == 6 * 60
    assert report["tokens"]["prompt"] == sum(len(prompt.text.split()) for prompt in TOPICS)
    assert "api_key" not in report["settings"]
    assert server.most_at_once <= 4
    assert {request["seed"] for request in server.requests} == {prompt.seed for prompt in TOPICS}
    assert all(request["max_tokens"] == 64 and request["model"] == "m" for request in server.requests)


def test_the_completions_of_a_base_model(tmp_path: Path) -> None:
    with Server() as server:
        go(tmp_path, server, api="completions")
    assert [record["text"] for record in documents(tmp_path)] == [text_of(prompt.text + "\n\n") for prompt in TOPICS]


def test_a_second_call_asks_for_nothing(tmp_path: Path) -> None:
    with Server() as server:
        go(tmp_path, server)
        before = (tmp_path / DOCUMENTS).read_bytes()
        said: list[str] = []
        go(tmp_path, server, said=said)
        assert len(server.requests) == 6
    assert (tmp_path / DOCUMENTS).read_bytes() == before
    assert "6 completions of 6 prompts" in said[0]


def similar(prompt: str) -> str:
    """Half of the prompts get one text, but for its last words."""
    if "story" in prompt:
        return text_of("the same", 90) + " and " + text_of(prompt, 4)
    return text_of(prompt)


def test_whatever_the_kill_left_of_the_journal_the_documents_are_the_same(tmp_path: Path) -> None:
    """The journal is cut at bytes of a first, a middle and a last line, and its lines are reordered."""
    with Server(text=similar) as server:
        go(tmp_path / "whole", server)
        whole = (tmp_path / "whole" / DOCUMENTS).read_bytes()
        journal = (tmp_path / "whole" / JOURNAL).read_bytes()
        lines = journal.splitlines(keepends=True)
        ends = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
        reordered = b"".join(lines[::-1])
        for source, size in [
            (journal, 0),
            (journal, 7),
            (journal, ends[0]),
            (journal, ends[2] - 1),
            (journal, ends[2] + 5),
            (reordered, len(reordered) - 1),
            (reordered, len(lines[-1]) + 3),
        ]:
            folder = tmp_path / f"cut-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            (folder / PLAN).write_bytes((tmp_path / "whole" / PLAN).read_bytes())
            (folder / JOURNAL).write_bytes(source[:size])
            asked = len(server.requests)
            go(folder, server)
            assert len(server.requests) - asked == 6 - source[:size].count(b"\n")
            assert (folder / DOCUMENTS).read_bytes() == whole
            assert sum(1 for _ in read_journal(folder / JOURNAL)) == 6
    assert len(whole.splitlines()) == 4  # one of the three stories is kept


def test_near_duplicates_are_dropped_and_listed(tmp_path: Path) -> None:
    with Server(text=similar) as server:
        report = go(tmp_path, server)
    stories = [prompt.number for prompt in TOPICS if prompt.style == "story"]
    assert report["documents"]["kept"] == 4
    assert report["documents"]["dropped"] == {"near-duplicate": 2}
    assert report["documents"]["near_duplicates"] == [
        {"number": number, "resembles": stories[0]} for number in stories[1:]
    ]
    with Server(text=similar) as server:
        assert go(tmp_path / "exact", server, similarity=1.0)["documents"]["kept"] == 6


def test_the_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    """The prompt that comes first is answered last; its text is kept, and not that of its near-duplicates."""
    first = TOPICS[0].text

    def late(handler: Any, prompt: str, attempt: int) -> bool:
        if prompt == first:
            time.sleep(0.3)
        return False

    with Server(late, text=lambda prompt: text_of("one text")) as server:
        report = go(tmp_path, server, limits=Limits(10**9, 6))
        assert server.answered[-1] == first
    assert [record["id"] for record in documents(tmp_path)] == ["00000000"]
    assert report["documents"]["dropped"] == {"near-duplicate": 5}


def test_texts_that_are_no_text_are_dropped(tmp_path: Path) -> None:
    texts = iter(["", " \n", "half a pair \ud800", "...", None, "a text of words"])
    lock = threading.Lock()

    def text(handler: Any, prompt: str, attempt: int) -> bool:
        with lock:
            handler.reply(json.loads(json.dumps(body_of(prompt, "", finish="length")).replace('""', "null")) if (
                value := next(texts)) is None else body_of(prompt, value, finish="length"))  # fmt: skip
        return True

    with Server(text) as server:
        report = go(tmp_path, server)
    assert [record["text"] for record in documents(tmp_path)] == ["a text of words"]
    assert report["documents"]["dropped"] == {"without a word": 4, "not Unicode": 1}
    assert report["documents"]["cut_at_max_tokens"] == 6


def test_the_budget_stops_the_run_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    cost = [len(prompt.text.split()) + 60 for prompt in TOPICS]
    with Server() as server:
        report = go(tmp_path, server, limits=Limits(cost[0] + cost[1] + 1, 1))
        assert report["ended"] == "the budget is spent"
        assert report["tokens"]["total"] == sum(cost[:3])
        assert report["tokens"]["over_budget"] == cost[2] - 1
        assert len(server.requests) == 3
        again = go(tmp_path, server, limits=Limits(cost[0] + cost[1] + 1, 1))
        assert (again["tokens"], len(server.requests)) == (report["tokens"], 3)
        assert go(tmp_path, server)["prompts"]["completed"] == len(server.requests) == 6
    assert [record["text"] for record in documents(tmp_path)] == [text_of(prompt.text) for prompt in TOPICS]


def test_requests_in_flight_count_with_their_most_tokens(tmp_path: Path) -> None:
    """Room for two: never more than two are asked at once, although four may be."""
    room = sum(64 + len(TOPICS[i].text) // 4 for i in range(2))

    def slow(handler: Any, prompt: str, attempt: int) -> bool:
        time.sleep(0.1)
        return False

    with Server(slow) as server:
        go(tmp_path, server, limits=Limits(room, 4))
    assert server.most_at_once == 2


def test_enough_documents_stop_the_run(tmp_path: Path) -> None:
    with Server() as server:
        report = go(tmp_path, server, limits=Limits(10**9, 4, documents=3))
        assert report["ended"] == "the documents asked for are there"
        assert len(server.requests) == 3
    assert [record["id"] for record in documents(tmp_path)] == ["00000000", "00000001", "00000002"]


def test_answers_that_wait_for_an_earlier_one_count_as_documents(tmp_path: Path) -> None:
    """While the first prompt takes long, no more are asked than the documents may need; also when resumed."""

    def late(handler: Any, prompt: str, attempt: int) -> bool:
        if prompt == TOPICS[0].text:
            time.sleep(0.5)
        return False

    with Server(late) as server:
        go(tmp_path, server, limits=Limits(10**9, 2, documents=3))
        assert len(server.requests) == 3
        lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
        (tmp_path / JOURNAL).write_bytes(b"".join(line for line in lines if json.loads(line)["number"]))
        go(tmp_path, server, limits=Limits(10**9, 2, documents=2))
        assert len(server.requests) == 4
    assert [record["id"] for record in documents(tmp_path)] == ["00000000", "00000001"]


def test_a_server_that_asks_for_a_long_pause_is_not_waited_for(tmp_path: Path) -> None:
    def behave(handler: Any, prompt: str, attempt: int) -> bool:
        handler.reply({"error": {"message": "the quota is spent"}}, 429, Retry_After="7200")
        return True

    with Server(behave) as server, pytest.raises(ServerError, match=r"quota is spent.*or wait \(Retry-After: 7200\)"):
        go(tmp_path, server, limits=Limits(10**9, 1))
    assert len(server.requests) == 1


def fail_first(handler: Any, prompt: str, attempt: int) -> bool:
    """Each prompt fails once in one of six ways."""
    if attempt > 1:
        return False
    kind = [p.text for p in TOPICS].index(prompt)
    if kind == 0:
        handler.reply({"error": {"message": "overloaded"}}, 500, retry_after_ms="10")
    elif kind == 1:
        handler.drop()
    elif kind == 2:
        handler.reply(b'{"choices": [', 200)
    elif kind == 3:
        handler.reply({"error": {"message": "slow down"}}, 429, Retry_After="1")
    elif kind == 4:
        handler.drop(part=True)
    else:
        handler.reply({"object": "chat.completion", "choices": []}, 200)
    return True


def test_failures_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    with Server(fail_first) as server:
        report = go(tmp_path, server, limits=Limits(10**9, 6))
        times = [moment for prompt, moment in server.times if prompt == TOPICS[3].text]
    assert set(server.attempts.values()) == {2}
    assert report["prompts"]["completed"] == 6
    assert [record["text"] for record in documents(tmp_path)] == [text_of(prompt.text) for prompt in TOPICS]
    assert times[1] - times[0] >= 1  # Retry-After: 1


DEAD = {
    "500": (lambda handler: handler.reply({"error": {"message": "out of memory"}}, 500, retry_after_ms="5"),
            "answered with status 500, 2 times .*out of memory.*: see the server's log"),
    "429": (lambda handler: handler.reply({"error": {"message": "slow down"}}, 429, retry_after_ms="5"),
            "status 429, 2 times .*lower --concurrency"),
    "401": (lambda handler: handler.reply({"error": {"message": "no key"}}, 401), "--api-key-env"),
    "404": (lambda handler: handler.reply({"error": {"message": "no model"}}, 404), "whether --base-url ends in /v1"),
    "not JSON": (lambda handler: handler.reply(b"<html>", 200), "4 times with a body that is not JSON"),
    "text": (lambda handler: handler.reply(b"hello", 200, Content_Type="text/plain"), "4 times with a body without"),
    "no choice": (lambda handler: handler.reply({"choices": []}, 200), "4 times with a body without exactly one"),
    "no text": (lambda handler: handler.reply({"choices": [{"index": 0}]}, 200), "4 times with a choice without"),
    "no usage": (lambda handler: handler.reply({"choices": [{"message": {"content": "x"}}]}, 200),
                 "does not report `usage`"),
    "negative usage": (lambda handler: handler.reply(
        {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": -1, "completion_tokens": 1}}, 200),
        "does not report `usage`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEAD)
def test_a_server_that_fails_for_good_stops_the_run_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    fail, message = DEAD[kind]

    def behave(handler: Any, prompt: str, attempt: int) -> bool:
        if prompt in (TOPICS[0].text, TOPICS[1].text):
            return False
        fail(handler)
        return True

    with Server(behave) as server:
        with pytest.raises(ServerError, match=message):
            go(tmp_path, server, limits=Limits(10**9, 1), retries=1)
        asked = len(server.requests)
        report = json.loads((tmp_path / REPORT).read_text("utf-8"))
        assert report["ended"] == "the server failed"
        assert len(documents(tmp_path)) == report["prompts"]["completed"] == 2
        server.behave = lambda *_: False
        go(tmp_path, server)
        assert len(server.requests) == asked + 4
    assert [record["text"] for record in documents(tmp_path)] == [text_of(prompt.text) for prompt in TOPICS]


def test_what_is_in_flight_when_the_server_fails_is_kept(tmp_path: Path) -> None:
    def behave(handler: Any, prompt: str, attempt: int) -> bool:
        if prompt == TOPICS[0].text:
            time.sleep(0.1)
            handler.reply({"error": {"message": "x"}}, 500)
            return True
        time.sleep(0.4)
        return False

    with Server(behave) as server, pytest.raises(ServerError, match="status 500"):
        go(tmp_path, server, limits=Limits(10**9, 3), retries=0)
    assert [record["id"] for record in documents(tmp_path)] == []  # the first prompt has no answer yet
    assert sorted(answer.number for _, answer in read_journal(tmp_path / JOURNAL)) == [1, 2]


def test_a_server_that_does_not_answer_in_time(tmp_path: Path) -> None:
    def behave(handler: Any, prompt: str, attempt: int) -> bool:
        time.sleep(0.6)
        return False

    with Server(behave) as server, pytest.raises(ServerError, match=r"within 0.2 s, 1 times: raise --timeout"):
        go(tmp_path, server, timeout=0.2, retries=0)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with Server() as server:
        pass
    with pytest.raises(ServerError, match=r"cannot be reached .*see whether the server runs"):
        go(tmp_path, server, retries=0)


def test_a_refused_prompt_is_counted_and_not_asked_again(tmp_path: Path) -> None:
    def behave(handler: Any, prompt: str, attempt: int) -> bool:
        if "bread" not in prompt:
            return False
        handler.reply({"error": {"message": "the prompt is too long"}}, 400)
        return True

    with Server(behave) as server:
        report = go(tmp_path, server)
        assert report["prompts"]["refused"] == 2
        assert "the prompt is too long" in report["prompts"]["first_refusal"]
        go(tmp_path, server)
        assert len(server.requests) == 6
    assert len(documents(tmp_path)) == 4


def test_a_server_that_refuses_everything_stops_the_run(tmp_path: Path) -> None:
    def behave(handler: Any, prompt: str, attempt: int) -> bool:
        handler.reply({"error": {"message": "seed: unknown field"}}, 422)
        return True

    many = Prompts([f"topic {i}" for i in range(50)])
    with Server(behave) as server, pytest.raises(ServerError, match=r"refused the first .*seed: unknown field"):
        go(tmp_path, server, many)
    assert len(server.requests) < run.REFUSED_AT_FIRST + 8
    with Server(behave) as server, pytest.raises(ServerError, match="refused the first 6 prompts"):
        go(tmp_path / "few", server)


def test_another_plan_or_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    with Server() as server:
        go(tmp_path, server)
        other = Prompts(TOPICS.topics, styles=("story",), audiences=("researchers",), seed=1)
        with pytest.raises(UsageError, match="begun with other styles, seed, wording: give"):
            go(tmp_path, server, other)
        with pytest.raises(UsageError, match="begun with other max_tokens: give"):
            go(tmp_path, server, max_tokens=65)
        line = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)[0]
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(line)
        with pytest.raises(UsageError, match="is answered twice"):
            go(tmp_path, server)
        (tmp_path / JOURNAL).write_bytes(b'{"number": 1}\n')
        with pytest.raises(UsageError, match=r"completions.log:1: kind is missing.*name another --out"):
            go(tmp_path, server)
        (tmp_path / PLAN).unlink()
        with pytest.raises(UsageError, match=r"a journal without plan\.json"):
            go(tmp_path, server)
        assert len(server.requests) == 6


@pytest.mark.parametrize("limits", [Limits(0), Limits(1, 0), Limits(1, 1, 0)])
def test_limits_out_of_range(tmp_path: Path, limits: Limits) -> None:
    with Server() as server, pytest.raises(UsageError, match=r"--[a-z-]+ 0: expected at least 1"):
        go(tmp_path / "new", server, limits=limits)
    assert not (tmp_path / "new").exists()
