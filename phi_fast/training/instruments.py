"""What looks inside of training steps: the profiler and the norms. Both are off by default, and then cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from rich.console import Console

from ..errors import UsageError
from .norms import NormLog
from .options import Options, profiled_steps
from .profile import Profile
from .trouble import Trouble
from .zero import Zero2


class StepWatch:
    """Surrounds the parts of a training step; this one does nothing."""

    def step(self) -> AbstractContextManager[None]:
        """Surround the whole step."""
        return nullcontext()

    def micro_batch(self) -> AbstractContextManager[None]:
        """Surround forward and backward of one micro-batch."""
        return nullcontext()

    def update(self) -> AbstractContextManager[None]:
        """Surround the optimizer step, from averaged gradients to updated weights."""
        return nullcontext()


UNWATCHED = StepWatch()


class Instruments:
    """The instruments that the options turn on; a context that ends a trace that still runs."""

    def __init__(self, options: Options, zero: Zero2, run: Path, done: int, trouble: Trouble, console: Console) -> None:
        """done: steps already taken. Raises UsageError if no step of --profile is left to take."""
        world = zero.world
        self._norms, self._profile = None, None
        if options.log_norms:
            self._norms = NormLog(run / "norms.jsonl", options.log_norms, zero, done, trouble)
        if options.profile is not None:
            steps = profiled_steps(options.profile)
            last = min(options.steps, done + options.stop_after) if options.stop_after else options.steps
            if steps[-1] <= done or steps[0] > last:
                raise UsageError(f"--profile {options.profile}: this start takes the steps {done + 1} to {last}")
            self._profile = Profile(run / "profile", steps, world, trouble)
            if world.device.type != "cuda":
                console.print("--profile: no memory snapshot and no NVTX ranges, which are for CUDA only")

    def at(self, step: int) -> StepWatch:
        """Return what surrounds the parts of step `step`, counted from 1."""
        return _Watch(step, self._profile, self._norms) if self._profile or self._norms else UNWATCHED

    def __enter__(self) -> Instruments:
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile:
            self._profile.stop()


class _Watch(StepWatch):
    def __init__(self, step: int, profile: Profile | None, norms: NormLog | None) -> None:
        self._step, self._profile, self._norms = step, profile, norms

    def step(self) -> AbstractContextManager[None]:
        return self._profile.step(self._step) if self._profile else nullcontext()

    def micro_batch(self) -> AbstractContextManager[None]:
        return self._profile.span("micro-batch") if self._profile else nullcontext()

    @contextmanager
    def update(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._profile:
                stack.enter_context(self._profile.span("update"))
            if self._norms:
                stack.enter_context(self._norms.update(self._step))
            yield
