"""The sandbox for a user other than root, and on a system that refuses namespaces."""

from __future__ import annotations

import pytest
from hostile_programs import AGAINST_THE_SUPERVISOR, UNCOUNTED
from sandboxes import ALWAYS_EQUAL, AS_ROOT, refuse_unshare, results_as_a_user

from phi_fast.evaluation.sandbox import Judged

pytestmark = AS_ROOT
CHEAT = Judged(ALWAYS_EQUAL + "def double(x): return Yes()\n", ("double",), "assert double(2) == 4\n")
HONEST = Judged("def double(x): return 2 * x\n", ("double",), "assert double(2) == 4\n")
NO_PROGRAMS = ("x = '\ud800'", "#" + "x" * (40 << 20), "\0")


def test_without_root_the_supervisor_survives_the_program(tmp_path):
    """Program and supervisor run as one user. A program that kills its supervisor fails; other results are kept."""
    hostile = [*AGAINST_THE_SUPERVISOR, *NO_PROGRAMS, *UNCOUNTED.values(), CHEAT]
    results = results_as_a_user(tmp_path, ["assert 1", *hostile, HONEST])
    if isinstance(results, str):
        pytest.skip(results)
    assert [passed for passed, _, _ in results] == [True, *[False] * len(hostile), True], results
    assert all("supervisor" not in reason for _, reason, _ in results), results


def test_without_namespaces_nothing_runs_and_the_way_out_is_told(tmp_path):
    refused = results_as_a_user(tmp_path, ["assert 1", CHEAT, *NO_PROGRAMS], before=refuse_unshare)
    assert isinstance(refused, str), refused
    assert "unshare" in refused and "Enable unprivileged user namespaces" in refused
