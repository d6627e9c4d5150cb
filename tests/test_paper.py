from __future__ import annotations

import pytest

from phi_fast import paper


def test_figures_are_fractions_and_doubt_is_marked():
    assert paper.score("phi-1.5", "winogrande") == paper.Score(0.734)
    assert paper.score("phi-1.5", "gsm8k").value == pytest.approx(0.402)
    assert str(paper.score("phi-1.5", "squad")) == "0.72"
    assert str(paper.score("phi-1.5-web-only", "gsm8k")) == "<0.03 ?"
    assert str(paper.score("Vicuna-13B v1.1", "boolq")) == "0.835 ?"
    assert paper.score("phi-1.5-web-only", "squad") is None
    assert paper.score("Llama-65B", "winogrande") is None
    assert paper.score("GPT-2", "winogrande") is None


def test_every_cell_is_a_fraction_with_a_source():
    cells = [cell for table in paper.TABLES for row in table.rows.values() for cell in row.values()]
    assert all(0 < cell.value < 1 for cell in cells)
    assert sum(not cell.certain for cell in cells) == 15
    assert all(table.source == paper.SOURCE for table in paper.TABLES)
    for name in ("phi-1.5", "phi-1.5-web", "phi-1.5-web-only", "Llama2-7B", "Llama-65B"):
        assert name in paper.models()
    assert {task for table in paper.TABLES for task in table.tasks} == set(paper.TASKS)
    assert all(paper.score("phi-1.5", task).certain for task in paper.TASKS)
