"""`python -m phi_fast.train`: one loop, read from top to bottom.

python -m phi_fast.train                                        one process, no launcher
torchrun --nproc_per_node 8 -m phi_fast.train --recipe phi-1.5   one node
deepspeed --module phi_fast.train --recipe phi-1.5               DeepSpeed's launcher
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.terminal import announce, end_on_signals

    announce("phi_fast.train", "PyTorch and DeepSpeed")
    end_on_signals("phi_fast.train")

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from .data.loader import CorpusError
from .errors import UsageError
from .generation import Sampling, complete
from .json_files import flatten
from .kernels import BackendUnavailable
from .model.merged import to_merged
from .model.phi import Phi
from .precision import Precision, auto_precision
from .terminal import console as screen
from .terminal import printable, tolerate_encodings
from .training.checkpoint import CheckpointError
from .training.corpora import Corpora
from .training.diagnosis import Diverged, explain, explain_broken, find_overflow
from .training.display import Display
from .training.distributed import LostRank, join, leave, lost_rank
from .training.metrics import MetricsLog, StepRecord, peak_flops
from .training.options import Options, plan_batch
from .training.resuming import parse_command
from .training.run_directory import Run
from .training.signals import Signals, StoppedEarly
from .training.start import build_model, choose_kernels, header, plan_sample
from .training.task_scores import TasksDuringTraining
from .training.trouble import Trouble
from .training.zero import Zero2

INTERRUPTED = 75
"""Exit status of a run that was stopped and saved, or lost a rank (EX_TEMPFAIL): start it again with --resume."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train by the command line; returns the exit status: 0 done, INTERRUPTED saved, 2 an error that was explained,
    130 Ctrl-C before the first step, or a second one."""
    tolerate_encodings()
    rank = os.environ.get("RANK", "0")
    is_main = rank == "0"
    try:
        with Signals() as signals:
            options = parse_command(sys.argv[1:] if arguments is None else arguments)
            options.check()
            signals.world = join(options.device, options.rank_timeout)
            return train(options, signals, screen(quiet=not is_main, soft_wrap=True))
    except (ValueError, OSError, RuntimeError) as raised:
        error = lost_rank(raised) or raised
        if not expected(error):
            raise
        # Those that every rank raises alike are told by one; what is wrong on one machine by its ranks.
        if is_main or isinstance(error, CorpusError) or not isinstance(error, UsageError | CheckpointError | Diverged):
            where = "" if is_main or isinstance(error, LostRank) else f" on rank {rank}"
            tell(f"error{where}: {error}")
        return INTERRUPTED if isinstance(error, LostRank) else 2
    except StoppedEarly as stopped:
        if is_main:
            tell(str(stopped))
        return stopped.status
    except KeyboardInterrupt:
        if is_main:
            tell("ended at once: what was not saved is lost; --resume goes on from the newest checkpoint")
        return 130


def tell(text: str) -> None:
    """Why a run ends early, where errors belong."""
    screen(stderr=True, soft_wrap=True).print(text, style="red")


def train(options: Options, signals: Signals, console: Console) -> int:
    """One run, or the rest of one; every rank calls it. Returns 0 at the last step, INTERRUPTED at a stop."""
    world = signals.world
    micro_batch_size, accumulation = plan_batch(options, world.size)
    choose_kernels(options.kernels, world)
    precision = auto_precision(world.device) if options.precision == "auto" else options.precision
    with Run.open(options, world, console) as run:
        signals.abandon = run.close
        return go(run, signals, console, precision, micro_batch_size, accumulation)


def go(
    run: Run, signals: Signals, console: Console, precision: Precision, micro_batch_size: int, accumulation: int
) -> int:
    """The run that `train` opened."""
    options, world = run.options, run.world
    corpora = Corpora(options, world, console)
    if options.val_every:
        corpora.need_validation()
    options = run.options = replace(options, model=corpora.model)
    model = build_model(options, world, precision)
    zero = Zero2(
        model,
        options,
        world,
        precision=precision,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        fused=options.zero_step == "fused",
    )
    sampling = plan_sample(options, corpora.tokenizer) if options.sample_tokens else None
    loader = corpora.loader(micro_batch_size)
    done = run.restore(zero, loader, console)
    tasks = TasksDuringTraining(options, corpora.tokenizer, world) if options.eval_every else None
    run.create(corpora.tokenizer)
    header(console, options, world, run, corpora, precision, micro_batch_size, accumulation, done)
    log = MetricsLog(run.directory, done, flatten(options.recipe_fields())) if world.is_main else None
    peak = peak_flops(world.device)
    flops_per_token = options.model.flops_per_token(options.sequence_length, causal=False)
    trouble = Trouble(world)
    batches = [next(loader) for _ in range(accumulation)]
    steps = options.steps
    last = min(steps, done + options.stop_after) if options.stop_after else steps

    signals.ready()
    started, first = time.perf_counter(), done
    with Display(console, steps, done, options.log_every) as display:
        if done == 0 and options.val_every:
            losses = validate(model, corpora, options.val_rows, micro_batch_size, signals, trouble)
            if losses:
                display.validation_before(corpora.weighted(losses))
                if log:
                    with trouble.kept():
                        log.validation_before(corpora.weighted(losses), losses)
        while done < last and not signals.stop and not signals.ended:
            tick = time.perf_counter()
            lr = options.learning_rate_at(done)
            loss = torch.zeros((), device=world.device)
            for micro_step, batch in enumerate(batches):
                micro_loss = zero.loss(batch.input_ids.to(world.device), batch.labels.to(world.device))
                zero.backward(micro_loss)
                loss += micro_loss.detach() / accumulation
                outcome = zero.step(lr, last_micro_batch=micro_step == accumulation - 1)
            assert outcome is not None
            done += 1
            if done < last:  # the next step's rows, all of them: one that cannot be read does not break a step off
                with trouble.kept():
                    batches = [next(loader) for _ in range(accumulation)]
            mean_loss = signals.agree(
                loss, save=run.save_due, failed=run.save_failed, broken=outcome.broken, ended=trouble.here
            )
            seconds = time.perf_counter() - tick
            if signals.failed:  # on every rank, the save raises what went wrong in it; another is tried below
                with trouble.kept():
                    run.wait()
                signals.ended = True
                if outcome.hopeless or not math.isfinite(mean_loss):
                    trouble.end()
            if signals.broken:
                raise Diverged(explain_broken(model, done, lr, run.last_checkpoint()))
            if outcome.hopeless or not math.isfinite(mean_loss):
                loader.seek(done * options.global_batch_size)
                found = find_overflow(model, loader, accumulation, outcome.loss_scale, world)
                raise Diverged(explain(found, done, mean_loss, outcome.loss_scale, precision, run.last_checkpoint()))
            val_losses = None
            if options.val_every and (done % options.val_every == 0 or done == steps) and not signals.ended:
                val_losses = validate(model, corpora, options.val_rows, micro_batch_size, signals, trouble)
            scores = None
            if tasks and (done % options.eval_every == 0 or done == steps) and not signals.ended:
                with trouble.kept():  # on every rank
                    scores = tasks(as_phi(model, options))
                signals.ended |= trouble.here
            tokens_per_s = options.tokens_per_step / seconds
            record = StepRecord(
                step=done,
                tokens=done * options.tokens_per_step,
                loss=mean_loss,
                lr=lr,
                grad_norm=outcome.grad_norm,
                loss_scale=outcome.loss_scale,
                skipped=outcome.skipped,
                tokens_per_s=tokens_per_s,
                step_ms=1000 * seconds,
                mfu=None if peak is None else tokens_per_s * flops_per_token / (peak * world.size),
                val_loss=corpora.weighted(val_losses) if val_losses else None,
                val_losses=val_losses or None,
                tasks=scores,
            )
            if log:
                with trouble.kept():
                    log.write(record)
            display.step(record, (time.perf_counter() - started) / (done - first) * (steps - done))
            if signals.save or (options.save_every and done % options.save_every == 0 and done < last):
                run.save(zero, loader, done)
        with trouble.while_saving():
            saved = run.save(zero, loader, done)
            run.wait()
    loader.close()
    if signals.ended or trouble.here:
        console.print(f"saved {saved}")
        trouble.end()
    if done == steps and sampling and world.is_main:
        text = sample(model, corpora, options, sampling)
        console.rule("sample")
        console.print(printable(text))
        console.rule()
        if log:
            log.text("sample", text, done)
    if log:
        log.close()
    if done < steps:
        console.print(f"saved {saved}")
        console.print(
            f"stopped at step {done} of {steps}; to go on, give the same options and --run-dir {run.directory} --resume"
        )
        return INTERRUPTED
    display.summary(saved, run.directory)
    return 0


@torch.no_grad()
def validate(
    model: nn.Module, corpora: Corpora, rows: int, batch: int, signals: Signals, trouble: Trouble
) -> dict[str, float]:
    """Mean loss over the first `rows` validation rows of each corpus, in nats a token; the ranks share the rows.

    Empty where a rank was asked to stop meanwhile, or could not read its rows; `signals.stop` or `ended` is then set on
    all.
    """
    world = signals.world
    model.eval()
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in corpora.paths}
    with trouble.kept():
        for name, input_ids, labels in corpora.validation(rows, batch):
            if signals.stop_received:
                break
            loss = model(input_ids.to(world.device), labels.to(world.device)).loss
            sums[name] += torch.tensor([float(loss) * labels.numel(), labels.numel()])
    model.train()
    asked = torch.tensor([float(signals.stop_received), float(trouble.here)], dtype=torch.float64)
    table = torch.stack([asked, *sums.values()]).to(world.device)  # (1 + corpora, [loss sum, labels])
    if world.size > 1:
        dist.all_reduce(table)
    signals.stop |= bool(table[0, 0] > 0)
    signals.ended |= bool(table[0, 1] > 0)
    if signals.stop or signals.ended:
        return {}
    means = (table[1:, 0] / table[1:, 1]).tolist()
    return {name: mean for name, mean in zip(sums, means, strict=True) if mean == mean}  # NaN: no validation rows


def sample(model: nn.Module, corpora: Corpora, options: Options, sampling: Sampling) -> str:
    """Text that goes on from --sample-prompt, the same for the same seed."""
    [completion] = complete(as_phi(model, options), corpora.tokenizer, [options.sample_prompt], sampling)
    return options.sample_prompt + completion.text


def as_phi(model: nn.Module, options: Options) -> Phi:
    """The model itself, or a copy of the reference's weights."""
    if isinstance(model, Phi):
        return model
    phi = Phi(options.model).to(next(model.parameters()))
    phi.load_state_dict(to_merged(model.state_dict()))
    return phi


def expected(error: Exception) -> bool:
    """True for errors whose message is meant for the user; others keep their traceback."""
    return isinstance(error, UsageError | CheckpointError | BackendUnavailable | Diverged | LostRank | OSError)


if __name__ == "__main__":
    status = main()
    leave()
    sys.exit(status)
