"""The candidates for a launch's tile, and which of them the compiler rules out: those are never timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from triton.compiler.errors import CompilationError
from triton.runtime.errors import TritonError

from ..triton import launching
from ..triton.common import Launch, recording
from ..triton.compiled import Architecture, Compiled
from ..triton.tiles import Choice, session

Run = Callable[[], Any]
Compile = Callable[[Launch, Architecture], Compiled]
REFUSALS = (CompilationError, TritonError, RuntimeError, ValueError)
"""What the compiler raises for a tile that it cannot compile."""


class Candidate(NamedTuple):
    """A tile, and the launch that it makes of a call."""

    tile: Any
    launch: Launch


def choices(run: Run, architecture: str) -> list[Choice]:
    """The choices of a call's launches, each once; nothing is launched."""
    with session() as seen, _recorded(architecture):
        run()
    return list({(choice.tunable.name, choice.case): choice for choice in seen.choices}.values())


def candidates(run: Run, architecture: str, choice: Choice) -> Iterator[Candidate]:
    """The launches of one kernel of a call with each tile that may be tried, the tile chosen by hand first.

    Tiles of which the launcher makes the same launch count once; those that it refuses are left out.
    """
    name, seen = choice.tunable.name, set[tuple[Any, ...]]()
    for tile in choice.tunable.candidates(choice.by_hand):
        try:
            launch = described(run, architecture, choice, tile)
        except ValueError:
            continue
        same = (launch.grid, *launch.constants.values(), launch.num_warps, launch.num_stages)
        if same not in seen:
            seen.add(same)
            yield Candidate(tile, launch)
    if not seen:
        raise RuntimeError(f"{name} makes no launch with the tile that was chosen by hand, {choice.by_hand}")


def first(run: Run, architecture: str, choice: Choice, most: int) -> list[Candidate]:
    """The first `most` candidates."""
    return [*itertools.islice(candidates(run, architecture, choice), most)]


def described(run: Run, architecture: str, choice: Choice, tile: Any) -> Launch:
    """The first launch of `choice`'s kernel in a call, with this tile. Launches without a choice are passed over."""
    name, case = choice.tunable.name, choice.case
    with session({(name, case): tile}) as seen, _recorded(architecture) as launches:
        run()
    pairs = zip(seen.choices, (launch for launch in launches if launch.tile is not None), strict=True)
    return next(launch for made, launch in pairs if made.tunable.name == name and made.case == case)


def _recorded(architecture: str) -> Any:
    launching.forget()  # a launch that was kept ready would run
    return recording(architecture, all=True)


def fault(compiled: Compiled, architecture: Architecture) -> str:
    """Why a candidate is not timed, in words; "" where it is."""
    if compiled.spilled:
        return f"spills {compiled.spilled} bytes per thread"
    if compiled.shared > architecture.shared_block:
        return f"wants {compiled.shared} bytes of shared memory, a block may have {architecture.shared_block}"
    if compiled.serialised:
        return "waits for each wgmma before the next (ptxas C7515)"
    if compiled.products and not compiled.tensor_core:
        return "multiplies matrices without tensor-core instructions"
    return ""


def judged(
    found: list[Candidate],
    compile_one: Compile,
    architecture: Architecture,
    *,
    workers: int = 1,
    until: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Candidate, str]]:
    """Each candidate and why it is ruled out ("": it is not), as it is compiled.

    Those that were not begun when the time was up are left out.
    """

    def judge(candidate: Candidate) -> str:
        try:
            return fault(compile_one(candidate.launch, architecture), architecture)
        except REFUSALS as error:
            return f"does not compile: {first_line(error)}"

    todo, running = iter(found), dict[Future[str], Candidate]()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(running) < workers and not until() and (candidate := next(todo, None)) is not None:
                running[pool.submit(judge, candidate)] = candidate
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


def first_line(error: Exception) -> str:
    """What an error says first."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
