"""Mixtures: invalid ones, the content of the hash, and the plan of epochs."""

from __future__ import annotations

import pytest
from token_files import draw_tokens, write_corpus

from phi_fast.data import Component, Mixture, Stage, plan_mixture


def two(**changes):
    return Mixture.of({"a": ("x", 4), "b": ("y", 1)}, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(()), "at least one corpus"),
        (lambda: Mixture.of({"a": ("x", 0)}), "all weights from row 0 are 0"),
        (lambda: Mixture.of({"a": ("x", 1), "b": ("y", 0)}), "weight of 'b' is 0 throughout"),
        (lambda: Mixture.of({"a": ("x", -1)}), "weight of 'a' from row 0 is -1, expected an integer >= 0"),
        (lambda: Mixture.of({"a": ("x", 0.8)}), r"weight of 'a' from row 0 is 0\.8"),
        (lambda: Mixture.of({"a": ("x", True)}), "weight of 'a' from row 0 is True"),
        (lambda: Mixture((Component("a", "x"), Component("a", "y"))), r"must be unique, found \['a', 'a'\]"),
        (lambda: two(stages=[(0, {"a": 1})]), "stage start_row=0 must be greater than 0"),
        (lambda: two(stages=[(9, {"a": 1}), (9, {"a": 2})]), "stage start_row=9 must be greater than 9"),
        (lambda: two(stages=[(9, {"c": 1})]), r"stage at row 9 weighs \['c'\], the mixture has \['a', 'b'\]"),
        (lambda: two(stages=[(9, {"a": 0})]), "all weights from row 9 are 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_hash_covers_what_orders_rows_and_not_where_files_lie():
    base = two().hash
    assert Mixture.of({"a": ("elsewhere", 80), "b": ("y", 20)}).hash == base
    others = [
        Mixture.of({"a": ("x", 5), "b": ("y", 1)}),
        Mixture.of({"a": ("x", 4), "c": ("y", 1)}),
        Mixture.of({"b": ("y", 1), "a": ("x", 4)}),
        two(split="validation"),
        two(stages=[(9, {"a": 1})]),
        two(stages=[(10, {"a": 1})]),
    ]
    assert len({base, *(other.hash for other in others)}) == 7


def test_schedule():
    mixture = Mixture((Component("a", "x", 4), Component("b", "y", 1)), (Stage(9, {"b": 2}),))
    assert mixture.schedule() == [(0, [4, 1]), (9, [0, 2])]


def test_plan_of_the_papers_mixture():
    """phi-1.5: 150 B tokens, 20% from phi-1's 7 B and 80% from about 20 B synthetic ones (arXiv 2309.05463)."""
    plan = plan_mixture({"phi-1": (7 * 10**9, 20), "synthetic": (20 * 10**9, 80)}, 150 * 10**9)
    assert [(row.name, row.seen, round(row.epochs, 2)) for row in plan.rows] == [
        ("phi-1", 30 * 10**9, 4.29),
        ("synthetic", 120 * 10**9, 6.0),
    ]
    assert len(plan.warnings) == 2
    assert "phi-1 is read 4.3 times: beyond 4 epochs" in plan.warnings[0]
    lines = str(plan).splitlines()
    assert lines[0].split() == ["corpus", "share", "tokens", "seen", "epochs"]
    assert lines[2].split() == ["synthetic", "80.0%", "20,000,000,000", "120,000,000,000", "6.00"]
    assert lines[3].startswith("warning: phi-1 is read")


def test_no_warning_up_to_4_epochs():
    assert plan_mixture({"a": (100, 1)}, 400).warnings == []
    assert len(plan_mixture({"a": (100, 1)}, 401).warnings) == 1


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"a": (0, 1)}, "'a' has 0 tokens and weight 1: expected at least 1"),
        ({"a": (10, -1), "b": (10, 1)}, "'a' has 10 tokens and weight -1"),
        ({"a": (10, 0), "b": (10, 0)}, r"the weights of \['a', 'b'\] are all 0; give at least one"),
    ],
)
def test_plans_that_cannot_be(mixture, message):
    with pytest.raises(ValueError, match=message):
        plan_mixture(mixture, 100)


def test_plan_of_stages_reads_the_corpora(tmp_path):
    paths = {name: write_corpus(tmp_path / name, draw_tokens(1000)) for name in "ab"}
    mixture = Mixture.of({"a": (paths["a"], 1), "b": (paths["b"], 1)}, stages=[(10, {"b": 1}), (500, {"a": 1})])
    plan = plan_mixture(mixture, 3000, sequence_length=100)
    assert [(row.tokens, row.seen, row.epochs) for row in plan.rows] == [(1000, 500, 0.5), (1000, 2500, 2.5)]
    with pytest.raises(ValueError, match="tokens=0: must be at least 1"):
        plan_mixture(mixture, 0)
