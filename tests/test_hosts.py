"""Several hosts: network namespaces joined by a cable of their own, a torchrun in each, as on several machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer_processes import arguments, finish, latest, losses, make_corpora, until

pytestmark = pytest.mark.slow
HOSTS = {"phi-host0": "10.77.0.1", "phi-host1": "10.77.0.2"}
CABLE = {"phi-host0": "phi-veth0", "phi-host1": "phi-veth1"}


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces that see each other and nothing else."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2's ip")
    names, ends = list(HOSTS), list(CABLE.values())
    try:
        for host in names:
            ip("netns", "add", host)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", CABLE[host])
            ip("-n", host, "link", "set", CABLE[host], "up")
            ip("-n", host, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for host in names:
            ip("netns", "delete", host, check=False)
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.decode().strip()}")
    yield
    for host in names:
        ip("netns", "delete", host)


def launch(host: str, words: list[str], output: Path) -> subprocess.Popen[bytes]:
    """torchrun on a host, by the command that docs/at-scale.md gives."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{HOSTS['phi-host0']}:29500", "--rdzv_id", "test"]
    # The namespaces share a host name, which resolves to neither: who keeps the store and where a host is, is told.
    local = ["--local_addr", HOSTS[host], "--rdzv_conf", f"is_host={int(host == 'phi-host0')}"]
    with output.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *launcher, *rendezvous, *local, "-m", "phi_fast.train", *words],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE[host]},
        )


def run(words: list[str], folder: Path) -> tuple[list[subprocess.Popen[bytes]], list[Path]]:
    outputs = [folder / f"{host}.txt" for host in HOSTS]
    return [launch(host, words, output) for host, output in zip(HOSTS, outputs, strict=True)], outputs


def test_two_hosts_train_as_one(hosts: None, tmp_path: Path) -> None:
    data = make_corpora(tmp_path / "tiny")
    finish(arguments(data, tmp_path / "one", 12), tmp_path / "output", ranks=2)
    processes, outputs = run(arguments(data, tmp_path / "two", 12), tmp_path)
    for process, output in zip(processes, outputs, strict=True):
        assert process.wait(timeout=120) == 0, output.read_text()
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


def test_a_cut_cable_ends_both_and_the_run_goes_on_from_its_checkpoint(hosts: None, tmp_path: Path) -> None:
    data = make_corpora(tmp_path / "tiny")
    words = arguments(data, tmp_path / "run", 3000, save_every=20, rank_timeout=5, elastic=True)
    processes, outputs = run(words, tmp_path)
    try:
        until(lambda: (tmp_path / "run" / "checkpoints" / "latest").exists(), timeout=120)
        ip("-n", "phi-host1", "link", "set", CABLE["phi-host1"], "down")
        began = time.monotonic()
        assert processes[0].wait(timeout=120) != 0, outputs[0].read_text()
        assert time.monotonic() - began < 60
        assert "error: rank 0 of 2 lost the others (" in outputs[0].read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    step = int(latest(tmp_path / "run").name.removeprefix("step-"))
    short = arguments(data, tmp_path / "run", 3000, rank_timeout=5, elastic=True, stop_after=3)
    output = finish(short, tmp_path / "output", ranks=2, expect=75)
    assert f"resumed from {tmp_path / 'run' / 'checkpoints'}" in output
    assert latest(tmp_path / "run").name == f"step-{step + 3}"
