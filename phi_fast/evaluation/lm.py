"""phi_fast as a model for EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

Importing this module registers the model "phi_fast". lm-eval has no plug-ins, so run its command line through this
module:

    python -m phi_fast.evaluation.lm --model phi_fast --model_args pretrained=RUN_OR_FOLDER --tasks arc_easy
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.evaluation.lm", "PyTorch and lm-eval", lm_eval=True)

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from .. import terminal
from ..conversion.load import load
from ..conversion.source import Source
from ..data.chat import described
from ..data.vocabulary import TokenizerError
from ..errors import UsageError
from ..generation import Sampling, complete
from ..model.phi import Phi
from ..startup import tolerate_encodings
from . import chat
from .responses import Responses
from .scoring import BATCH_TOKENS, Request, log_likelihoods

MAX_GEN_TOKS = 256  # lm-eval's default
IN_PYTHON = ("model", "hf_tokenizer", "responses", "console")  # arguments that a command line cannot give
LM_EVAL_DEVICE = "cuda:0"  # lm-eval's default even without a GPU; its own models fall back to the CPU as well

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "half": "fp16"}
"""torch's and lm-eval's dtype names -> phi_fast's, which are accepted too."""


@register_model("phi_fast")
class PhiFastLM(TemplateLM):
    """Scores and continues text for lm-eval's tasks; the results equal those of its own `hf` class on the same weights.

    pretrained: a run, a checkpoint, a folder or a hub name; or pass `model` and `hf_tokenizer` instead.
    tokenizer: a folder, a tokenizer.json or a hub name with another tokenizer and chat template.
    dtype: auto, float32, float16 or bfloat16 (or fp32, fp16, bf16). auto: float16 on CUDA, float32 on a CPU.
    max_length: context in tokens, at most and by default the model's.
    add_bos_token: put the beginning-of-text token before each prompt that has none. Default: what the tokenizer does.
    prefix_token_id: first token of empty contexts and rolling windows. Default: the tokenizer's beginning-of-text
    token, else its end-of-text token.
    chat_template_args: values for the chat template, which --apply_chat_template turns on.
    batch_tokens: tokens per batch; requests of similar length share one (lm-eval's `batch_size` is accepted, unused).
    trust_remote_code: must be False; no code that comes with a model is ever run.

    Raises UsageError for unknown arguments and for invalid values.
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
        dtype: str | torch.dtype | None = "auto",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        trust_remote_code: bool | None = False,
        batch_tokens: int = BATCH_TOKENS,
        generate_batch: int = 8,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        responses: Responses | None = None,
        console: Console | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _check_arguments(unknown, trust_remote_code)
        self.console = console or terminal.console(stderr=True)
        if device == LM_EVAL_DEVICE and not torch.cuda.is_available():
            self.console.print(f"torch sees no {device}, lm-eval's default without --device: auto is used instead")
            device = "auto"
        folders: list[Path | None] = []
        if model is None or hf_tokenizer is None:
            if pretrained is None:
                raise UsageError("phi_fast needs model_args pretrained=RUN_OR_FOLDER")
            source = Source.open(pretrained)
            folders = [source.folder, source.run] if tokenizer is None else [_folder(tokenizer)]
            model, hf_tokenizer = load(source, device=device or "auto", dtype=_dtype(dtype), tokenizer=tokenizer)
        self.model, self.hf_tokenizer = model, hf_tokenizer
        self.tokenizer = described(hf_tokenizer, folders)
        self.template: str | None = None
        self.name = str(tokenizer or pretrained or "phi_fast")
        self._max_length = _length(max_length, model.config.max_position_embeddings)
        self.add_bos_token, self.custom_prefix_token_id = add_bos_token, prefix_token_id
        self.chat_template_args = chat_template_args or {}
        self.batch_tokens, self.generate_batch = int(batch_tokens), int(generate_batch)
        self.responses = responses or Responses(None, "")

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def eot_token_id(self) -> int:
        id = self.model.config.eos_token_id
        if id is None:
            raise UsageError("the model's tokenizer has no end-of-text token, which lm-eval puts before texts")
        return id

    @property
    def prefix_token_id(self) -> int:
        if self.custom_prefix_token_id is not None:
            return self.custom_prefix_token_id
        for begin in (self.tokenizer.bos_token_id, self.model.config.bos_token_id):
            if begin is not None:
                return begin
        return self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return chat.fingerprint(self.name, self.hf_tokenizer, self.template or self.tokenizer.chat_template)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Select the template for `--apply_chat_template` (True) or `--apply_chat_template NAME`, and return it."""
        self.template = super().chat_template(chat_template)
        return self.template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat.prompt(
            self.tokenizer,
            chat_history,
            template=self.template,
            add_generation_prompt=add_generation_prompt,
            arguments=self.chat_template_args,
            console=self.console,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text. Unless `add_special_tokens` decides it, `add_bos_token` decides about the
        beginning-of-text token; a text that already has it, as chat templates may give, gets no second one."""
        begin = self.prefix_token_id
        if add_special_tokens is None:
            has_one = has_bos_prefix(string, self.hf_tokenizer.decode([begin], skip_special_tokens=False))
            add_special_tokens = False if has_one else self.add_bos_token
        ids = self.hf_tokenizer.encode(string, add_special_tokens=add_special_tokens is not False).ids
        if not self.add_bos_token or add_special_tokens is False:
            return ids
        added = ids != self.hf_tokenizer.encode(string, add_special_tokens=False).ids  # by the tokenizer itself
        return ids if added else [begin, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # hides the tokenizer's bar: ours is enough

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        keys = [Responses.key("score", context, continuation) for _, context, continuation in requests]
        new = {  # a request that occurs twice is scored once
            key: Request(tuple(context), tuple(continuation))
            for key, (_, context, continuation) in zip(keys, requests, strict=True)
            if key not in self.responses
        }
        todo = list(new)
        with self.progress() as bar:
            task = bar.add_task("log-likelihoods", total=len(requests), completed=len(requests) - len(todo))
            done: dict[str, Any] = {}
            options = {"batch_tokens": self.batch_tokens, "max_length": self.max_length}
            for index, score in log_likelihoods(self.model, list(new.values()), **options):
                done[todo[index]] = list(score)
                if len(done) >= 256:
                    self.responses.add(done)
                    done = {}
                bar.advance(task)
            self.responses.add(done)
        return [(self.responses[key][0], self.responses[key][1]) for key in keys]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of entire texts, in windows of the context length; each token is predicted once."""
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
        """The continuation of each (prompt, lm-eval's generation arguments), up to the first stop string."""
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

                sampling = self._sampling(next(iter(batch.values()))[1])
                room = self.max_length - sampling.max_new_tokens
                complete(
                    self.model,
                    self.hf_tokenizer,
                    [self.tok_encode(prompt)[-room:] for prompt, _ in batch.values()],
                    sampling,
                    batch_size=self.generate_batch,
                    on_done=keep,
                )
        return [self.responses[key] for key in keys]

    def _sampling(self, arguments: dict[str, Any]) -> Sampling:
        """Convert lm-eval's generation arguments. Greedy unless do_sample; half of the context stays for the prompt."""
        given = dict(normalize_gen_kwargs(dict(arguments), MAX_GEN_TOKS))
        stop = handle_stop_sequences(given.get("until"), eos=None)
        return Sampling(
            max_new_tokens=min(int(given["max_gen_toks"]), self.max_length // 2),
            temperature=float(given.get("temperature", 0.0)) if given.get("do_sample") else 0.0,
            top_k=int(given.get("top_k") or 0),
            top_p=float(given.get("top_p", 1.0)),
            min_p=float(given.get("min_p") or 0.0),
            repetition_penalty=float(given.get("repetition_penalty") or 1.0),
            stop=tuple(filter(None, stop)),
        )

    def progress(self) -> Progress:
        """A progress bar with the estimated time left."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)


def _check_arguments(unknown: dict[str, Any], trust_remote_code: bool | None) -> None:
    if trust_remote_code:
        raise UsageError(
            "trust_remote_code=True: no code that comes with a model is ever run; leave it out, phi's layouts need none"
        )
    if unknown:
        known = inspect.signature(PhiFastLM).parameters.values()
        named = ", ".join(p.name for p in known if p.kind is not p.VAR_KEYWORD and p.name not in IN_PYTHON)
        raise UsageError(f"phi_fast has no model argument {', '.join(sorted(unknown))}; it has {named}")


def _dtype(dtype: str | torch.dtype | None) -> str:
    name = str(dtype or "auto").removeprefix("torch.")
    return DTYPES.get(name, name)


def _length(max_length: int | None, context: int) -> int:
    if max_length is None:
        return context
    if not isinstance(max_length, int) or not 2 <= max_length <= context:
        raise UsageError(f"max_length={max_length}: expected 2 to {context} tokens, the model's context")
    return max_length


def _folder(tokenizer: str) -> Path | None:
    """The folder with a tokenizer's chat template: the template lies beside the tokenizer's file."""
    path = Path(tokenizer)
    return path if path.is_dir() else path.parent if path.is_file() else None


def main() -> int:
    """Run lm-eval's command and return the exit status."""
    from lm_eval.__main__ import cli_evaluate

    tolerate_encodings()
    try:
        cli_evaluate()
    except (UsageError, TokenizerError) as error:
        terminal.console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
