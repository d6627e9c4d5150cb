"""The training loop: steps, with validation, task scores, metrics and checkpoints between them."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..conversion.folder import chat_files
from ..data import Batch
from ..errors import INTERRUPTED, UsageError
from ..json_files import flatten
from ..terminal import printable
from . import cuda_graphs
from .corpora import Corpora
from .deferred_gradients import reduces_once
from .diagnosis import Diverged, explain, explain_broken, find_overflow
from .display import Display
from .instruments import Instruments
from .metrics import Meter, MetricsLog
from .options import Options
from .run_directory import Run
from .sample import as_phi, plan_sample, sample
from .signals import Signals
from .start import Setup, build_model, header
from .step import train_step
from .task_scores import TasksDuringTraining
from .trackers.opening import open_trackers
from .trouble import Trouble
from .validation import validate
from .zero import StepOutcome, Zero2


def train(options: Options, signals: Signals, console: Console) -> int:
    """Start or resume a run; every rank calls it. Returns 0 after the last step, INTERRUPTED if stopped before it."""
    setup = Setup.of(options, signals.world)
    with Run.open(options, signals.world, console) as run:
        signals.abandon = run.close
        trainer = Trainer(setup, run, signals, console)
        try:
            return trainer.train()
        except Exception:
            if trainer.log:  # what trackers have not sent yet shows why the run failed
                with suppress(UsageError):  # no room: the run's own error says more
                    trainer.log.close()
            raise


class Trainer:
    """Trains in an open run. Everything that it needs is created and checked before the first step."""

    def __init__(self, setup: Setup, run: Run, signals: Signals, console: Console) -> None:
        world = setup.world
        self.corpora = Corpora(setup.options, world, console)
        if setup.options.cuda_graphs and any(one.marked for one in self.corpora.manifests.values()):
            raise UsageError("--cuda-graphs takes corpora whose labels all count, and this data has conversations")
        if setup.options.val_every:
            self.corpora.need_validation()
        self.options = options = run.options = replace(
            setup.options, model=self.corpora.model, tokens=self.corpora.tokens, epochs=None
        )
        self.setup = setup = setup._replace(options=options)
        self.run, self.signals, self.console, self.trouble = run, signals, console, Trouble(world)
        initial = run.open_initial(self.corpora.tokenizer, console)
        self.model = build_model(setup, initial)
        self.zero = Zero2(
            self.model,
            options,
            world,
            precision=setup.precision,
            micro_batch_size=setup.micro_batch_size,
            accumulation=setup.accumulation,
            fused=options.zero_step == "fused",
            reduce_once=reduces_once(options, world, setup.accumulation),
            capture=cuda_graphs.capture if options.cuda_graphs else None,
        )
        self.sampling = None
        if options.sample_tokens:
            self.sampling = plan_sample(options, self.corpora.tokenizer, self.corpora.chat)
        self.loader = self.corpora.loader(setup.micro_batch_size)
        self.done = run.restore(self.zero, self.loader, console)
        self.tasks = TasksDuringTraining(options, self.corpora.tokenizer, world) if options.eval_every else None
        self.instruments = Instruments(options, self.zero, run.directory, self.done, self.trouble, console)
        chat = self.corpora.chat or (chat_files(initial) if initial is not None else None)
        run.create(self.corpora.tokenizer, self.zero.checkpoint_bytes(), chat)
        header(console, setup, run, self.corpora, self.done)
        self.log = None
        if world.is_main:
            trackers = open_trackers(options.track, run.directory, options.tracked(), console.print)
            self.log = MetricsLog(run.directory, self.done, flatten(options.recipe_fields()), trackers)
        self.meter = Meter(options, world)

    def train(self) -> int:
        """Take the remaining steps; returns the exit status."""
        options, signals, run = self.options, self.signals, self.run
        steps, first = options.steps, self.done
        last = min(steps, first + options.stop_after) if options.stop_after else steps
        batches = self.next_batches()
        signals.ready()
        with Display(self.console, steps, first, options.log_every) as display, self.instruments:
            if first == 0 and options.val_every:
                self.validate_before(display)
            started = time.perf_counter()
            while self.done < last and signals.go_on:
                tick = time.perf_counter()
                lr = options.learning_rate_at(self.done)
                outcome = train_step(self.zero, batches, lr, self.instruments.at(self.done + 1))
                self.done += 1
                waits = time.perf_counter()
                if self.done < last:  # the step just taken is still saved if the next batch cannot be read
                    with self.trouble.kept():
                        batches = self.next_batches()
                waited = time.perf_counter() - waits
                signals.agree(save=run.save_due, failed=run.save_failed, broken=outcome.broken, ended=self.trouble.here)
                seconds = time.perf_counter() - tick
                self.refuse_to_diverge(outcome, lr)
                validation = self.validate() if self.is_due(options.val_every) else {}
                scores = self.score() if self.is_due(options.eval_every) else None
                measured = {"data_wait_ms": 1000 * waited, "tasks": scores, **validation}
                record = self.meter.record(self.done, outcome, lr, seconds, **measured)
                if self.log:
                    with self.trouble.kept():
                        self.log.write(record)
                display.step(record, (time.perf_counter() - started) / (self.done - first) * (steps - self.done))
                if signals.save or (options.save_every and self.done % options.save_every == 0 and self.done < last):
                    run.save(self.zero, self.loader, self.done)
            with self.trouble.while_saving():
                saved = run.save(self.zero, self.loader, self.done)
                run.wait()
        return self.finish(saved, display)

    def next_batches(self) -> list[Batch]:
        """Load this rank's micro-batches for the next step."""
        return [next(self.loader) for _ in range(self.setup.accumulation)]

    def is_due(self, every: int) -> bool:
        """Return whether an action due every `every` steps (0: never) and after the last step is due now."""
        return bool(every) and (self.done % every == 0 or self.done == self.options.steps) and not self.signals.ended

    def refuse_to_diverge(self, outcome: StepOutcome, lr: float) -> None:
        """Raise Diverged if the step left non-finite values, or no later step can update the weights."""
        hopeless = outcome.hopeless or not math.isfinite(outcome.loss)
        if self.signals.failed:  # `wait` raises the failed save's error on every rank; another save follows at the end
            with self.trouble.kept():
                self.run.wait()
            self.signals.ended = True
            if hopeless:
                self.trouble.end()
        if self.signals.broken:
            raise Diverged(explain_broken(self.model, self.done, lr, self.run.last_checkpoint()))
        if hopeless:
            self.loader.seek(self.done * self.options.global_batch_size)
            found = find_overflow(
                self.model, self.loader, self.setup.accumulation, outcome.loss_scale, self.setup.world
            )
            kept = self.run.last_checkpoint()
            raise Diverged(explain(found, self.done, outcome.loss, outcome.loss_scale, self.setup.precision, kept))

    def validate(self) -> dict[str, Any]:
        """Measure the fields of StepRecord that a validation has; none if the run is about to stop."""
        rows, batch = self.options.val_rows, self.setup.micro_batch_size
        weights = self.options.mixture_at(max(0, self.done - 1))
        found = validate(self.model, self.corpora, rows, batch, self.signals, self.trouble)
        fields = {} if found is None else found.fields(weights)
        if found is not None and self.zero.average:
            with self.zero.averaged():
                averaged = validate(self.model, self.corpora, rows, batch, self.signals, self.trouble)
            fields |= {} if averaged is None else averaged.fields_of_average(weights)
        return fields

    def validate_before(self, display: Display) -> None:
        """Show and log the validation loss before the first step."""
        validation = self.validate()
        if not validation:
            return
        display.validation_before(validation["val_loss"], validation["val_bpb"])
        if self.log:
            with self.trouble.kept():
                self.log.validation_before(**validation)

    def score(self) -> dict[str, float] | None:
        """Score the model on --eval-tasks: accuracy by task, or None after an error, which every rank gets."""
        assert self.tasks is not None
        scores = None
        with self.trouble.kept():
            scores = self.tasks(as_phi(self.model, self.options))
        self.signals.ended |= self.trouble.here
        return scores

    def finish(self, saved: Path, display: Display) -> int:
        """Print where the run is saved, or raise its error; sample from a finished model. Returns the exit status."""
        steps, console = self.options.steps, self.console
        self.loader.close()
        if self.signals.ended or self.trouble.here:
            console.print(f"saved {saved}")
            self.trouble.end()
        if self.done == steps and self.sampling and self.setup.world.is_main:
            text = sample(self.model, self.corpora.tokenizer, self.options, self.sampling)
            console.rule("sample")
            console.print(printable(text))
            console.rule()
            if self.log:
                self.log.text("sample", text, self.done)
        if self.log:
            self.log.close()
        if self.done == steps:
            display.summary(saved, self.run.directory)
            return 0
        console.print(f"saved {saved}")
        go_on = f"--run-dir {self.run.directory} --resume"
        console.print(f"stopped at step {self.done} of {steps}; to go on, start it again with {go_on}")
        return INTERRUPTED
