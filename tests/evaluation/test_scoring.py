from __future__ import annotations

import pytest
import torch

from phi_fast.errors import UsageError
from phi_fast.evaluation.responses import Responses
from phi_fast.evaluation.scoring import Request, log_likelihoods


def requests(context_length: int) -> list[Request]:
    """Questions with 1 to 4 continuations; some are longer than the model's context."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(0, 300, (length,), generator=generator).tolist())

    result = []
    for longest in (8, 30, 60, 60, context_length, context_length + 20, context_length + 50):
        for _ in range(4):
            context = ids(longest // 2, longest)
            result += [Request(context, ids(1, 12)) for _ in range(len(context) % 4 + 1)]
    return result


def plainly(model, request: Request) -> tuple[float, bool]:
    """The definition: one full forward per request, cut on the left as in lm-eval."""
    limit = model.config.max_position_embeddings + 1
    ids = torch.tensor([(request.context + request.continuation)[-limit:]])
    target = torch.tensor(request.continuation)
    with torch.no_grad():
        log_probabilities = model(ids[:, :-1]).logits.double().log_softmax(-1)[0, -len(target) :]
    score = log_probabilities.gather(-1, target[:, None]).sum()
    return float(score), bool((log_probabilities.argmax(-1) == target).all())


def test_scores_are_those_of_plain_forwards_for_any_batch_size(small_phi):
    todo = requests(small_phi.config.max_position_embeddings)
    expected = [plainly(small_phi, request) for request in todo]
    for batch_tokens in (1, 300, 2000, 100_000):
        found = dict(log_likelihoods(small_phi, todo, batch_tokens=batch_tokens))
        assert sorted(found) == list(range(len(todo)))
        for i, (score, greedy) in enumerate(expected):
            assert found[i][0] == pytest.approx(score, abs=1e-3)
            assert found[i][1] == greedy


def test_greedy_continuations_are_recognised(small_phi):
    from phi_fast.generation import Sampling, generate

    context = [5, 6, 7, 8]
    (best,) = generate(small_phi, [context], Sampling(max_new_tokens=6), end=-1)
    other = [*best[:-1], (best[-1] + 1) % 300]
    scores = dict(log_likelihoods(small_phi, [Request(tuple(context), tuple(c)) for c in (best, other, best[:2])]))
    assert [scores[i][1] for i in range(3)] == [True, False, True]


def test_a_continuation_longer_than_the_context_is_scored_in_parts(small_phi):
    """Each token is scored once, after at least half a context: 96 of 192 tokens."""
    context, tokens = (1, 2, 3), tuple(i % 290 for i in range(500))
    parts = [Request(context + tokens[:at], tokens[at : at + 96]) for at in range(0, 500, 96)]
    expected = sum(plainly(small_phi, part)[0] for part in parts)
    both = dict(log_likelihoods(small_phi, [Request(context, tokens), Request(context, (4, 5))], batch_tokens=400))
    assert both[0] == (pytest.approx(expected, abs=1e-3), False)
    assert both[1][0] == pytest.approx(plainly(small_phi, Request(context, (4, 5)))[0], abs=1e-3)


def test_empty_requests_are_refused(small_phi):
    with pytest.raises(ValueError, match="request 1: a context of 0 tokens"):
        list(log_likelihoods(small_phi, [Request((1,), (2,)), Request((), (2,))]))


def test_responses_survive_a_torn_line_and_refuse_another_model(tmp_path):
    path = tmp_path / "out" / "responses.jsonl"
    responses = Responses(path, "model A")
    responses.add({"x": [1.5, True]})
    responses.add({"y": "text\n"})
    with path.open("a") as file:
        file.write('["z", [1')
    again = Responses(path, "model A")
    assert again.known == {"x": [1.5, True], "y": "text\n"}
    again.add({"w": "more"})
    assert Responses(path, "model A").known == {"x": [1.5, True], "y": "text\n", "w": "more"}
    with pytest.raises(ValueError, match="another model"):
        Responses(path, "model B")
    for beginning in ("", '{"mod', "[]\n"):
        path.write_text(beginning)
        with pytest.raises(ValueError, match="is not a file of answers"):
            Responses(path, "model A")


@pytest.mark.parametrize(
    "line", ['["z"', "7", '["z", 3]', '[["z"], "t"]', '["z", [1.0]]', '["z", {"passed": true}]', "\0"]
)
def test_a_kept_line_that_is_no_answer_is_named(tmp_path, line):
    """Only an incomplete last line, which a kill leaves, is ignored."""
    path = tmp_path / "responses.jsonl"
    path.write_text(f'{{"model": "m"}}\n["x", "text"]\n{line}\n["y", [-1.5, false]]\n')
    with pytest.raises(UsageError, match=r"responses.jsonl:3 is (not an answer|not JSON)"):
        Responses(path, "m")


def test_what_is_kept_after_a_torn_line_is_whole_lines(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text('{"model": "m"}\n["x", "text"]\n["y", [-1.')
    Responses(path, "m").add({"z": [-2.0, True]})
    assert path.read_text() == '{"model": "m"}\n["x", "text"]\n["z", [-2.0, true]]\n'
