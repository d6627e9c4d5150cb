"""Programs, exact match and the safety score, with answers from the tests instead of a model."""

from __future__ import annotations

import math

import pytest

from phi_fast.evaluation import generative, sandbox
from phi_fast.evaluation.questions import question
from phi_fast.evaluation.responses import Responses
from phi_fast.evaluation.sandbox import SandboxError


class Scripted:
    """Stands for the model: returns the given texts."""

    prefix_token_id, max_length = 0, 100

    def __init__(self, *texts: str) -> None:
        self.texts, self.requests = texts, []
        self.responses = Responses(None, "")

    def generate(self, requests):
        self.requests = list(requests)
        return list(self.texts)


@pytest.fixture(scope="module", name="sandboxed")
def _sandboxed() -> None:
    try:
        sandbox.check()
    except SandboxError:
        pytest.skip("this system allows no sandbox")


SOLUTIONS = {
    "add": ("a, b", "    return a + b\n", "(2, 3) == 5"),
    "absolute": ("x", "    return x if x > 0 else -x\n", "(-4) == 4"),
    "backwards": ("s", "    return s[::-1]\n", "('abc') == 'cba'"),
    "is_even": ("n", "    return n % 2 == 0\n", "(10)"),
    "largest": ("xs", "    return max(xs)\n", "([3, 9, 2]) == 9"),
    "vowels": ("s", "    return sum(c in 'aeiou' for c in s)\n", "('education') == 5"),
    "factorial": ("n", "    import math\n    return math.factorial(n)\n", "(5) == 120"),
    "unique": ("xs", "    return sorted(set(xs))\n", "([2, 1, 2]) == [1, 2]"),
    "flatten": ("xs", "    return [y for x in xs for y in x]\n", "([[1], [2, 3]]) == [1, 2, 3]"),
    "is_palindrome": ("s", "    return s == s[::-1]\n", "('level')"),
    "fibonacci": (
        "n",
        "    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
        "(10) == 55",
    ),
    "gcd": ("a, b", "    while b:\n        a, b = b, a % b\n    return a\n", "(12, 18) == 6"),
    "digits": ("n", "    return sum(map(int, str(n)))\n", "(1234) == 10"),
    "words": ("s", "    return len(s.split())\n", "('a b c') == 3"),
    "square_all": ("xs", "    return [x * x for x in xs]\n", "([1, 2]) == [1, 4]"),
    "title": ("s", "    return s.title()\n", "('a b') == 'A B'"),
    "count": ("xs", "    from collections import Counter\n    return Counter(xs)\n", "('aab')['a'] == 2"),
    "running": ("xs", "    from itertools import accumulate\n    return list(accumulate(xs))\n", "([1, 2]) == [1, 3]"),
    "parse": ("s", "    import json\n    return json.loads(s)\n", "('[1]') == [1]"),
    "median": ("xs", "    import statistics\n    return statistics.median(xs)\n", "([1, 9, 3]) == 3"),
}


def human_eval_rows() -> list[dict]:
    return [
        {
            "task_id": f"Test/{i}",
            "prompt": f'def {name}({arguments}):\n    """Write {name}."""\n',
            "entry_point": name,
            "canonical_solution": solution,
            "test": f"def check(candidate):\n    assert candidate{expectation}\n",
        }
        for i, (name, (arguments, solution, expectation)) in enumerate(SOLUTIONS.items())
    ]


@pytest.mark.slow
def test_canonical_solutions_pass_and_broken_ones_fail(sandboxed):
    rows = [question("humaneval", row, "row") for row in human_eval_rows()]
    model = Scripted(*(row["canonical_solution"] for row in rows))
    result = generative.run("humaneval", model, rows)
    assert (result.score, result.questions, result.metric) == (1.0, 20, "pass@1")
    assert model.requests[0] == (
        rows[0]["prompt"],
        {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 512, "do_sample": False},
    )
    broken = generative.run("humaneval", Scripted(*["    return None\n"] * 20), rows)
    assert broken.score == 0.0
    assert broken.samples[0].detail["outcome"] == "exit code 1"
    cheat = generative.run("humaneval", Scripted("    import os; os._exit(0)\n"), rows[:1])
    assert cheat.score == 0.0


def test_mbpp_runs_every_test(sandboxed):
    tests = ["assert double(2) == 4", "assert double(0) == 0"]
    row = question(
        "mbpp", {"text": "Double it.", "test_list": tests, "code": "", "test_setup_code": "import math"}, "row"
    )
    assert generative.mbpp_prompt(row) == f'"""\nDouble it.\n{tests[0]}\n{tests[1]}\n"""\n'
    model = Scripted("def double(x):\n    return 2 * x", "def double(x):\n    return x + 2")
    assert [s.score for s in generative.run("mbpp", model, [row, row]).samples] == [1.0, 0.0]


def test_mbpp_candidates_are_judged_on_plain_data_where_the_task_allows(sandboxed):
    cheat = "class Yes:\n    def __eq__(self, other): return True\n\ndef double(x):\n    return Yes()"
    row = {"text": "Double it.", "test_list": ["assert math.isclose(double(2), 4)", "assert double(1) == 2"]}
    row = question("mbpp", row | {"code": "def double(x): return 2 * x", "test_setup_code": "import math"}, "row")
    assert generative.mbpp_program(row, "").functions == ("double",)
    plain = generative.run("mbpp", Scripted(cheat, "def double(x):\n    return 2 * x"), [row, row])
    assert [sample.score for sample in plain.samples] == [0.0, 1.0]
    assert plain.notes == []
    classes = row | {"code": "class Pair:\n    pass\n", "test_list": ["assert double(1) == 2"]}
    shared = generative.run("mbpp", Scripted(cheat), [classes])
    assert shared.notes == ["1 of 1 programs share their process with the tests"]


def test_outcomes_are_kept_and_not_run_again(sandboxed, monkeypatch):
    rows = [question("humaneval", row, "row") for row in human_eval_rows()[:2]]
    model = Scripted(*(row["canonical_solution"] for row in rows))
    first = generative.run("humaneval", model, rows)
    assert len(model.responses.known) == 2
    monkeypatch.setattr(sandbox, "run_program", None)
    assert generative.run("humaneval", model, rows) == first


def test_an_evaluation_that_dies_goes_on_from_the_outcomes_that_were_written(sandboxed, monkeypatch, tmp_path):
    rows = [question("humaneval", row, "row") for row in human_eval_rows()[:2]]
    path, real, started = tmp_path / "responses.jsonl", sandbox.run_program, []

    def die_at_the_second(program, *arguments, **keywords):
        started.append(program)
        if len(started) == 2:
            raise KeyboardInterrupt
        return real(program, *arguments, **keywords)

    def again() -> Scripted:
        model = Scripted(*(row["canonical_solution"] for row in rows))
        model.responses = Responses(path, "m")
        return model

    monkeypatch.setattr(sandbox.os, "cpu_count", lambda: 2)  # one program at a time
    monkeypatch.setattr(sandbox, "run_program", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        generative.run("humaneval", again(), rows)
    assert len(Responses(path, "m").known) == 1
    result = generative.run("humaneval", again(), rows)
    assert [sample.score for sample in result.samples] == [1.0, 1.0]
    assert started == [started[0], started[1], started[1]]


def test_gsm8k_compares_the_number_that_the_program_prints(sandboxed):
    hub = question("gsm8k", {"question": "How many?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"}, "row")
    compact = question("gsm8k", {"context": "How many?", "chain_of_thought": "…", "answer": "1200"}, "row")
    assert hub == compact == {"question": "How many?", "answer": "1200"}
    bodies = (
        "    return 2 * 600",
        "    return '1200'",
        "    return 1201",
        "    print(1200)",
        "    x = 'no'\n    return x",
    )
    result = generative.run("gsm8k", Scripted(*bodies), [hub] * 5)
    assert [sample.score for sample in result.samples] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert generative.gsm8k_prompt(hub) == 'def solution():\n    """How many?"""\n'


def test_squad_is_exact_match_after_normalisation():
    hub = {"context": "C.", "question": "Q?", "answers": {"text": ["The Eiffel Tower", "tower"], "answer_start": [0]}}
    row = question("squad", hub, "row")
    assert row["prompt"] == "Background: C.\n\nQuestion: Q?\n\nAnswer:"
    result = generative.run("squad", Scripted(" eiffel tower.", " the Eiffel"), [row, row])
    assert [sample.score for sample in result.samples] == [1.0, 0.0]
    completion = question("squad", {"text": "Paris is in ", "value": " France"}, "row")
    assert completion == {"prompt": "Paris is in", "answers": ["France"]}


def test_pairs_above_is_mann_whitney():
    assert generative.pairs_above([3, 4], [1, 2]) == 1.0
    assert generative.pairs_above([1, 2], [3, 4]) == 0.0
    assert generative.pairs_above([1, 2, 2], [2, 1]) == pytest.approx((0.5 + 0 + 1 + 0.5 + 1 + 0.5) / 6)


def test_the_safety_score_by_demographic():
    class Losses(Scripted):
        def tok_encode(self, text):
            return [1, 2, 3]

        def _loglikelihood_tokens(self, requests):
            assert all(context == [1] and continuation == [2, 3] for _, context, continuation in requests)
            perplexities = [8.0, 4.0, 9.0, 2.0, 1.0]
            return [(-2 * math.log(p), False) for p in perplexities]

    def row(group, ai, human, label):
        return question(
            "toxigen",
            {"text": "t", "target_group": group, "toxicity_ai": ai, "toxicity_human": human, "label": label},
            "row",
        )

    rows = [
        row("women", 4.0, 2.0, "hate"),  # 8 / 4 = 2
        row("women", 1.0, 1.0, "neutral"),  # 4 / 1 = 4
        row("asian", 3.0, 3.0, None),  # 9 / 3 = 3; 6 > 5.5: harmful
        row("asian", 2.0, 2.0, None),  # 2 / 2 = 1
        row("latino", 1.0, 1.0, "neutral"),
    ]
    result = generative.run("toxigen", Losses(), rows)
    assert result.groups == {"asian": 1.0, "women": 0.0}
    assert result.score == 0.5
    assert result.notes == ["no pairs for latino"]
