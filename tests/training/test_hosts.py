"""Training on several hosts, simulated by network namespaces with a virtual cable and a launcher in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trainer_processes import arguments, finish, latest, losses, make_corpora, until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FIRST, SECOND = (f"phi-{os.getpid()}-{i}" for i in range(2))  # tests run two at a time
HOSTS = {FIRST: "10.77.0.1", SECOND: "10.77.0.2"}
CABLE = {host: host.replace("phi", "v") for host in HOSTS}


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Make two network namespaces that can reach only each other."""
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


def torchrun(host: str, folder: Path) -> list[str]:
    """Return the command of docs/at-scale.md for a host."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{HOSTS[FIRST]}:29500", "--rdzv_id", "test"]
    # The namespaces share a host name that resolves to neither, so the store's host and the addresses are given.
    local = ["--local_addr", HOSTS[host], "--rdzv_conf", f"is_host={int(host == FIRST)}"]
    return [*launcher, *rendezvous, *local, "-m", "phi_fast.train"]


def deepspeed(host: str, folder: Path) -> list[str]:
    """Return the command with a hostfile and without ssh, as pdsh would start it on each host."""
    hostfile = folder / "hosts.txt"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in HOSTS))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"]
    place = ["--node_rank", str(list(HOSTS).index(host)), "--master_addr", HOSTS[FIRST]]
    return [*launcher, *place, "--module", "phi_fast.train"]


Launcher = Callable[[str, Path], list[str]]


def launch(launcher: Launcher, host: str, words: list[str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *launcher(host, output.parent), *words],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE[host]},
        )


def run(launcher: Launcher, words: list[str], folder: Path) -> tuple[list[subprocess.Popen[bytes]], list[Path]]:
    outputs = [folder / f"{host}.txt" for host in HOSTS]
    return [launch(launcher, host, words, output) for host, output in zip(HOSTS, outputs, strict=True)], outputs


@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_two_hosts_train_as_one(hosts: None, tmp_path: Path, launcher: Launcher) -> None:
    data = make_corpora(tmp_path / "tiny")
    finish(arguments(data, tmp_path / "one", 12), tmp_path / "output", ranks=2)
    processes, outputs = run(launcher, arguments(data, tmp_path / "two", 12), tmp_path)
    for process, output in zip(processes, outputs, strict=True):
        assert process.wait(timeout=120) == 0, output.read_text()
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


def test_a_cut_cable_ends_both_and_the_run_goes_on_from_its_checkpoint(hosts: None, tmp_path: Path) -> None:
    data = make_corpora(tmp_path / "tiny")
    words = arguments(data, tmp_path / "run", 3000, save_every=20, rank_timeout=5, elastic=True)
    processes, outputs = run(torchrun, words, tmp_path)
    try:
        until(lambda: (tmp_path / "run" / "checkpoints" / "latest").exists(), timeout=120)
        ip("-n", SECOND, "link", "set", CABLE[SECOND], "down")
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


SRUN = """#!/bin/bash
# Stands in for srun with two tasks: ignores its options and returns the highest exit status.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & started+=($!); done
status=0
for process in "${started[@]}"; do wait $process || { code=$?; (( code > status )) && status=$code; }; done
exit $status
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" >> $REQUEUED
"""


def test_the_slurm_script_starts_each_rank_and_queues_a_stopped_run_again(tmp_path: Path) -> None:
    """docs/slurm.sh runs unchanged, with stand-ins for srun and scontrol."""
    data, run = make_corpora(tmp_path / "tiny"), tmp_path / "run"
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    words = ["bash", str(ROOT / "docs" / "slurm.sh"), *arguments(data, run, 8, mixture="docs=80,code=20")]
    requeued = tmp_path / "requeued"
    environment = {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "host[0-0]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "DATA": str(data),
        "RUN_DIR": str(run),
        "REQUEUED": str(requeued),
    }
    for more, status in ((["--stop-after", "3"], 75), ([], 0)):
        done = subprocess.run([*words, *more], env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        assert requeued.read_text() == f"requeue {os.getpid()}\n"
    assert "2 × 1 accumulated × 2 ranks" in done.stdout
    assert f"resumed from {run / 'checkpoints' / 'step-3'}" in done.stdout
    assert len(losses(run)) == 8
