"""The script that runs transformers' own tests, on a small tree in their place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers_suite
from transformers_suite import Comparison, Outcome

TESTS = """
import os
import unittest
from pathlib import Path

from transformers import PhiConfig, PhiForCausalLM, PhiModel


class PhiModelTest(unittest.TestCase):
    def setUp(self):
        config = PhiConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        self.models = PhiForCausalLM(config), PhiModel(config)
        self.accelerated = [any("_phi_fast_base" in vars(type(m)) for m in model.modules()) for model in self.models]

    def test_fails_both_ways(self):
        self.fail("as ever")

    def test_is_skipped(self):
        self.skipTest("no")

    def test_all_or_none_is_accelerated(self):
        self.assertIn(sum(self.accelerated), (0, len(self.models)))
        type(self.models[0])(self.models[0].config)

    def test_fails_accelerated(self):
        self.assertEqual(sum(self.accelerated), 0)

    def test_fails_accelerated_once(self):
        seen = Path(os.environ["SEEN"])
        if all(self.accelerated) and not seen.exists():
            seen.touch()
            self.fail("by chance")
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tests/ as in transformers, with the tests of Phi alone."""
    monkeypatch.delenv(transformers_suite.VARIABLE, raising=False)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    folder = tmp_path / "tests" / "models" / "phi"
    folder.mkdir(parents=True)
    (folder / "test_modeling_phi.py").write_text(TESTS, encoding="utf-8")
    return tmp_path / "tests"


@pytest.mark.slow
def test_new_failures_are_named(tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv(transformers_suite.VARIABLE, str(tree))
    assert transformers_suite.main(["--family", "phi"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "phi: 5 tests, 3 pass without accelerate, 2 with, 1 new failures",
        "  PhiModelTest::test_fails_accelerated: failure: AssertionError: 2 != 0",
        "new failures in all: 1",
    ]
    assert (tree.parent / "seen").exists()
    assert transformers_suite.main(["--family", "phi", "-k", "all_or_none"]) == 0


def test_only_what_passed_can_fail_anew() -> None:
    passed, failed, skipped = Outcome(True, ""), Outcome(False, "failure: x"), Outcome(False, "skipped: y")
    plain = {"both": passed, "never": failed, "skipped": skipped, "new": passed, "hidden": passed, "gone": passed}
    after = {"both": passed, "never": failed, "skipped": failed, "new": failed, "hidden": skipped, "more": failed}
    assert Comparison(plain, after).new_failures == {
        "new": "failure: x",
        "hidden": "skipped: y",
        "gone": "was not run",
    }


@pytest.mark.parametrize("again", ["fails", "passes", "fails both ways"])
def test_what_differs_is_run_again(again: str, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(file: Path, tests: Path, *, accelerated: bool, options: list[str]) -> dict[str, Outcome]:
        calls.append(options)
        first = len(calls) <= 2
        failed = (accelerated and (first or again == "fails")) or (not first and again == "fails both ways")
        return {"Case::test_a": Outcome(not failed, "failure: a" if failed else "")}

    monkeypatch.setattr(transformers_suite, "run", run)
    [family] = [family for family in transformers_suite.FAMILIES if family.name == "phi"]
    found = transformers_suite.compare(tree, family, []).new_failures
    assert found == ({"Case::test_a": "failure: a"} if again == "fails" else {})
    assert calls == [[], [], ["-k", "test_a"], ["-k", "test_a"]]


def test_without_the_tests_it_says_how_to_get_them(
    tree: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert transformers_suite.main([]) == 2
    assert f"--tests or {transformers_suite.VARIABLE}" in (text := capsys.readouterr().err)
    assert "git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers" in text
    assert transformers_suite.main(["--tests", str(tree), "--family", "llama"]) == 2
    assert "test_modeling_llama.py does not exist" in capsys.readouterr().err


def test_a_run_that_does_not_get_through_is_no_success(
    tree: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "models" / "phi" / "test_modeling_phi.py").write_text("import no_such_module\n", encoding="utf-8")
    assert transformers_suite.main(["--tests", str(tree), "--family", "phi"]) == 2
    assert "No module named 'no_such_module'" in capsys.readouterr().err

    monkeypatch.setattr(transformers_suite, "run", lambda *a, **k: {"Case::test_a": Outcome(False, "skipped: no")})
    assert transformers_suite.main(["--tests", str(tree), "--family", "phi"]) == 2
    assert "no test passed even without accelerate" in capsys.readouterr().err


def test_nothing_is_fetched(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}

    class Done:
        returncode, stdout, stderr = 2, "", ""

    monkeypatch.setattr(transformers_suite.subprocess, "run", lambda command, **k: seen.update(k) or Done)
    with pytest.raises(transformers_suite.CannotRun):
        transformers_suite.run(tree / "x.py", tree, accelerated=True, options=[])
    assert {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} <= seen["env"].keys()
    assert str(transformers_suite.HERE) in seen["env"]["PYTHONPATH"].split(os.pathsep)
