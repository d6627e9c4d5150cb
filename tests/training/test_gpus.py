"""Ranks and the GPUs of a machine, counted by a stand-in for torch.cuda."""

from __future__ import annotations

import pytest
import torch

from phi_fast.errors import UsageError
from phi_fast.training import distributed


@pytest.mark.parametrize(("local_rank", "named"), [(0, True), (1, True), (1, False)])
def test_more_ranks_than_gpus_are_refused_on_every_rank(
    local_rank: int, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """named: the launcher says how many ranks the machine has."""

    def set_device(index: int) -> None:
        pytest.fail("a device was set")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    environment = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 2}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1} | ({"LOCAL_WORLD_SIZE": 2} if named else {})
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match=r"2 ranks on this machine, and torch sees 1 GPU here.*--device cpu"):
        distributed.join("auto")
