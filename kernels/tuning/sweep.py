"""A sweep under a budget: the time that kernels take of a step decides how much of it each gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from triton.runtime.errors import TritonError

from ..triton.compiled import ARCHITECTURES
from ..triton.tiles import Choice
from .candidates import Compile, choices, described, first, judged
from .race import race, winner
from .subjects import Call
from .timing import Timer

SURVEY = 0.4
"""The share of the seconds after which no further op is looked at: each compiles the tiles chosen by hand."""
COMPILING = 0.6
"""The share of a kernel's time after which no further candidate is compiled."""


@dataclass(frozen=True)
class Tools:
    """What a sweep works with: on a GPU, its compiler and timer; in tests, stand-ins."""

    architecture: str
    compile_one: Compile
    timer: Callable[[], Timer]
    """Makes a timer for one kernel's contenders."""
    clock: Callable[[], float]
    """Seconds."""
    on_stream: Callable[[Timer], AbstractContextManager[Any]] = field(default=lambda _: nullcontext())
    """Makes current the stream on which the timer's runs must be prepared and measured."""
    workers: int = 1
    """Threads that compile."""
    most: int = 48
    """Candidates per kernel."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call, for the case that the call's shapes make."""

    call: Call
    choice: Choice
    seconds: float
    """Seconds per launch with the tile that was chosen by hand."""

    @property
    def weight(self) -> float:
        """Seconds of a micro-batch."""
        return self.seconds * self.call.count


def sweep(
    calls: Iterable[Call],
    tools: Tools,
    seconds: float,
    keep: Callable[[dict[str, Any]], None],
    tell: Callable[[str], None],
) -> None:
    """Time every kernel of `calls`, the most important first, for about `seconds`; `keep` gets each result at once.

    First each kernel is timed with the tile that was chosen by hand: its share of their sum is its share of the budget.
    """
    begun = tools.clock()
    end = begun + seconds
    kernels = sorted(survey(calls, tools, begun + SURVEY * seconds, tell), key=lambda kernel: -kernel.weight)
    for i, kernel in enumerate(kernels):
        left = end - tools.clock()
        if left <= 0:
            tell(f"the time was up: {len(kernels) - i} kernels keep the tile that was chosen by hand")
            return
        share = kernel.weight / sum(other.weight for other in kernels[i:])
        result = tune(kernel, tools, tools.clock() + left * share)
        keep(result)
        tell(_line(result))


def survey(calls: Iterable[Call], tools: Tools, end: float, tell: Callable[[str], None]) -> Iterator[Kernel]:
    """Time each kernel of `calls` once it is warm, with the tile chosen by hand; each case once, until `end`."""
    known = set[tuple[str, Any]]()
    for call in calls:
        if known and tools.clock() >= end:
            tell(f"the time was up: {call.op} and what follows keep the tiles that were chosen by hand")
            return
        measure = tools.timer()
        with tools.on_stream(measure):
            run = call.prepare()
            run()
            for choice in choices(run, tools.architecture):
                key = choice.tunable.name, choice.case
                if key not in known:
                    known.add(key)
                    launch = described(run, tools.architecture, choice, choice.by_hand)
                    yield Kernel(call, choice, median(measure(launch) for _ in range(4)))


def tune(kernel: Kernel, tools: Tools, deadline: float) -> dict[str, Any]:
    """The table's entry for one kernel: its fastest tile, and what was and was not timed."""
    choice, begun = kernel.choice, tools.clock()
    compiling = begun + COMPILING * (deadline - begun)
    dropped = Counter[str]()
    measure = tools.timer()
    with tools.on_stream(measure):
        run = kernel.call.prepare()
        run()
        found = first(run, tools.architecture, choice, tools.most)
        good = {found[0].tile: found[0].launch}
        for candidate, why in judged(
            found,
            tools.compile_one,
            ARCHITECTURES[tools.architecture],
            workers=tools.workers,
            until=lambda: tools.clock() >= compiling,
        ):
            if candidate is found[0]:
                continue
            if why:
                dropped[_kind(why)] += 1
            else:
                good[candidate.tile] = candidate.launch
        seconds = race(
            good,
            measure,
            until=lambda: tools.clock() >= deadline,
            refused=lambda tile, error: dropped.update([_kind(str(error))]),
            refusals=(TritonError,),  # a block that has no room on this GPU
        )
    best, by_hand = winner(seconds), choice.by_hand
    return {
        "kernel": choice.tunable.name,
        "case": choice.case._asdict(),
        "tile": best._asdict(),
        "milliseconds": milliseconds(seconds[best]),
        "by_hand": by_hand._asdict(),
        "by_hand_milliseconds": milliseconds(seconds[by_hand]),
        "timed": len(seconds),
        "dropped": dict(dropped),
        "not_compiled": len(found) - len(good) - sum(dropped.values()),
    }


def _kind(why: str) -> str:
    """The reason without its figures, by which dropped candidates are counted."""
    return " ".join(word for word in why.split(":")[0].split() if not word.isdigit())


def milliseconds(seconds: list[float]) -> float:
    """The median, in four digits."""
    return float(f"{1000 * median(seconds):.4g}")


def _line(result: dict[str, Any]) -> str:
    gain = result["by_hand_milliseconds"] / result["milliseconds"]
    tile = ", ".join(f"{name} {value}" for name, value in result["tile"].items())
    what = "as chosen by hand" if result["tile"] == result["by_hand"] else f"{gain:.2f}× as fast as chosen by hand"
    return f"{result['kernel']}: {result['milliseconds']:g} ms, {what} ({tile}); {result['timed']} tiles timed"
