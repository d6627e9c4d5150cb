"""phi_fast as a model of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

Importing this module registers "phi_fast". lm-eval has no plug-ins, so its command line runs through here:

    python -m phi_fast.evaluation.lm --model phi_fast --model_args pretrained=RUN_OR_FOLDER --tasks arc_easy
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from ..conversion.load import load
from ..generation import complete
from ..model import Phi
from ..sampling import Sampling
from .responses import Responses
from .scoring import BATCH_TOKENS, Request, log_likelihoods

MAX_GEN_TOKS = 256  # lm-eval's default
LM_EVAL_DEVICE = "cuda:0"  # its command's default, also where there is none; its own models fall back as well


@register_model("phi_fast")
class PhiFastLM(TemplateLM):
    """Scores and continues text for lm-eval's tasks.

    pretrained: a run, a checkpoint, a folder or a hub name; or give `model` and `hf_tokenizer`. Batches hold
    `batch_tokens` tokens of neighbours in length (lm-eval's `batch_size` is accepted and not needed).
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        model: Phi | None = None,
        hf_tokenizer: Tokenizer | None = None,
        tokenizer: str | None = None,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_tokens: int = BATCH_TOKENS,
        generate_batch: int = 8,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        responses: Responses | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        if device == LM_EVAL_DEVICE and not torch.cuda.is_available():
            self.console.print(f"torch sees no {device}, which lm-eval asks for where --device is not given: auto")
            device = "auto"
        if model is None or hf_tokenizer is None:
            if pretrained is None:
                raise ValueError("phi_fast needs model_args pretrained=RUN_OR_FOLDER")
            model, hf_tokenizer = load(pretrained, device=device or "auto", dtype=dtype, tokenizer=tokenizer)
        self.model, self.hf_tokenizer = model, hf_tokenizer
        self.batch_tokens, self.generate_batch = int(batch_tokens), int(generate_batch)
        self.responses = responses or Responses(None, "")

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.model.config.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return "phi_fast"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.hf_tokenizer.encode(string, add_special_tokens=False).ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # one bar, below, instead of one for the tokenizer

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        keys = [Responses.key("score", context, continuation) for _, context, continuation in requests]
        # A request may occur twice: it is scored once.
        new = {
            key: Request(tuple(context), tuple(continuation))
            for key, (_, context, continuation) in zip(keys, requests, strict=True)
            if key not in self.responses
        }
        todo = list(new)
        with self.progress() as bar:
            task = bar.add_task("log-likelihoods", total=len(requests), completed=len(requests) - len(todo))
            done: dict[str, Any] = {}
            for index, score in log_likelihoods(self.model, list(new.values()), batch_tokens=self.batch_tokens):
                done[todo[index]] = list(score)
                if len(done) >= 256:
                    self.responses.add(done)
                    done = {}
                bar.advance(task)
            self.responses.add(done)
        return [(self.responses[key][0], self.responses[key][1]) for key in keys]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context; each token is predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        of_request: list[int] = []
        for index, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                of_request.append(index)
        sums = [0.0] * len(requests)
        for index, (score, _) in zip(of_request, self._loglikelihood_tokens(windows), strict=True):
            sums[index] += score
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self.generate([request.args for request in requests])

    def generate(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """(prompt, lm-eval's generation arguments) -> text up to the first stop string; batched by their arguments."""
        keys = [Responses.key("generate", prompt, arguments) for prompt, arguments in requests]
        batches: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {}
        for key, (prompt, arguments) in zip(keys, requests, strict=True):
            if key not in self.responses:
                batches.setdefault(Responses.key(arguments), {})[key] = (prompt, arguments)
        missing = sum(map(len, batches.values()))
        with self.progress() as bar:
            task = bar.add_task("continuations", total=len(requests), completed=len(requests) - missing)
            for batch in batches.values():
                names = list(batch)

                def keep(index: int, completion: Any, names: list[str] = names) -> None:
                    self.responses.add({names[index]: completion.text})
                    bar.advance(task)

                complete(
                    self.model,
                    self.hf_tokenizer,
                    [prompt for prompt, _ in batch.values()],
                    self._sampling(next(iter(batch.values()))[1]),
                    batch_size=self.generate_batch,
                    on_done=keep,
                )
        return [self.responses[key] for key in keys]

    def _sampling(self, arguments: dict[str, Any]) -> Sampling:
        """lm-eval's arguments as ours; greedy unless it asks for samples. Room is left for at least half a context."""
        given = dict(normalize_gen_kwargs(dict(arguments), MAX_GEN_TOKS))
        stop = handle_stop_sequences(given.get("until"), eos=None)
        return Sampling(
            max_new_tokens=min(int(given["max_gen_toks"]), self.max_length // 2),
            temperature=float(given.get("temperature", 0.0)) if given.get("do_sample") else 0.0,
            top_k=int(given.get("top_k") or 0),
            top_p=float(given.get("top_p", 1.0)),
            stop=tuple(filter(None, stop)),
        )

    def progress(self) -> Progress:
        """A bar with the time that is left."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
