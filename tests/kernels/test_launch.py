"""A Triton launch and the GPU it runs on."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from phi_fast.kernels.triton.common import Launch


def test_runs_on_the_tensors_gpu_whichever_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            events.append(self.device)

        def __exit__(self, *_: object) -> None:
            events.append("left")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    with FakeTensorMode():
        second = torch.empty(4, device="cuda:1")
    kernel = {(2,): lambda **arguments: events.append(arguments["n"])}
    Launch(kernel, (2,), {"absent": None, "n": 4, "x": second}, {})()
    assert events == [torch.device("cuda", 1), 4, "left"]
    Launch(kernel, (2,), {"x": torch.empty(4), "n": 5}, {})()
    assert events[3:] == [5]
