"""Scores on some of the report's tasks during a run (`--eval-every`)."""

from __future__ import annotations

import logging

from tokenizers import Tokenizer

from ..errors import UsageError
from ..evaluation import multiple_choice
from ..evaluation.local_data import find_file, read_rows
from ..model.phi import Phi
from ..terminal import console
from .distributed import World
from .options import Options


class TasksDuringTraining:
    """Scores the model on --eval-tasks during training; rank 0 computes the scores, and the others wait for them.

    Scoring does not change the run: it draws no random numbers and does not write to the weights.
    """

    def __init__(self, options: Options, tokenizer: Tokenizer, world: World) -> None:
        """Raises UsageError, before any step, if a task is unknown or has no questions, or lm-eval is missing."""
        unknown = [task for task in options.eval_tasks if task not in multiple_choice.TASKS]
        if unknown:
            raise UsageError(f"--eval-tasks {' '.join(unknown)}: expected some of {', '.join(multiple_choice.TASKS)}")
        if options.eval_data is not None:
            for task in options.eval_tasks:
                path = find_file(options.eval_data, task)
                if path is None:
                    raise UsageError(f"--eval-data {options.eval_data} has no {task}.jsonl")
                read_rows(path, task)
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise UsageError(f"--eval-every needs lm-eval: pip install 'phi-fast[eval]' ({error})") from error
        self.options, self.tokenizer, self.world = options, tokenizer, world
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if options.eval_data is None:
            problem = world.broadcast(self._fetch() if world.is_main else None)
            if problem is not None:
                raise UsageError(problem)

    def _fetch(self) -> str | None:
        """Download the hub's data sets into its cache, for all later scores; returns an error message or None."""
        for task in self.options.eval_tasks:
            try:
                multiple_choice.fetch(task)
            except Exception as error:  # the hub, the network and the cache raise many kinds
                reason = " ".join(str(error).split())[:300]
                return (
                    f"--eval-tasks {task}: its questions cannot be fetched from the hub ({type(error).__name__}: "
                    f"{reason}). Name a folder with {task}.jsonl with --eval-data, or --eval-every 0"
                )
        return None

    def __call__(self, model: Phi) -> dict[str, float]:
        """Return the accuracy by task on the first --eval-limit questions of each; the same on every rank."""
        scores: dict[str, float] | str = {}
        if self.world.is_main:
            try:
                scores = self._score(model)
            except Exception as error:  # lm-eval raises many kinds: every rank is informed, and saves
                scores = f"the model could not be scored on --eval-tasks: {type(error).__name__}: {error}"
        scores = self.world.broadcast(scores)
        if isinstance(scores, str):
            raise UsageError(scores)
        return scores

    def _score(self, model: Phi) -> dict[str, float]:
        from ..evaluation.lm import PhiFastLM

        model.eval()
        lm = PhiFastLM(model=model, hf_tokenizer=self.tokenizer, console=console(quiet=True))
        scores = {
            task: multiple_choice.run(task, lm, self.options.eval_data, self.options.eval_limit).score
            for task in self.options.eval_tasks
        }
        model.train()
        return scores
