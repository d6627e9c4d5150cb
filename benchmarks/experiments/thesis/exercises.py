"""Small Python exercises: programs that a model writes, run in the sandbox, and the log-probability of solutions."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from phi_fast.evaluation.sandbox import Judged, Limits, run_programs
from phi_fast.evaluation.scoring import Request, log_likelihoods
from phi_fast.generation.decode import Decoding
from phi_fast.generation.sampling import Sampling
from phi_fast.model.phi import Phi

FILE = Path(__file__).with_name("exercises.jsonl")
SAMPLES = 3
"""Programs per exercise: the greedy one, and others sampled at TEMPERATURE."""
TEMPERATURE = 0.6
TOKENS = 64
"""Tokens per program, at most."""
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Strings that end a function: lm-eval's of humaneval."""


@dataclass(frozen=True)
class Exercise:
    """A function to write."""

    name: str
    prompt: str
    """Signature and docstring."""
    reference: str
    """A solution: the body that follows the prompt."""
    tests: tuple[str, ...]
    """Expressions that are true of a right function."""

    def program(self, completion: str) -> Judged:
        """Make the program that the sandbox runs for a completion of the prompt."""
        tests = "".join(f"assert {test}\n" for test in self.tests)
        return Judged(f"{self.prompt}{completion}\n", (self.name,), tests)


@dataclass(frozen=True)
class Outcome:
    """What a model made of the exercises."""

    passed: int
    """Programs that passed their tests."""
    programs: int
    """Programs that were run: exercises × SAMPLES."""
    solved: int
    """Exercises of which at least one program passed."""
    bits_per_byte: float
    """Minus log2 of the probability of the reference solutions after their prompts, per byte of the solutions."""


def read(path: Path = FILE) -> list[Exercise]:
    """Read the exercises, in the file's order."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Exercise(row["name"], row["prompt"], row["reference"], tuple(row["tests"])) for row in rows]


def cut(text: str) -> str:
    """End a completion at the first of STOPS."""
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]


def measure(model: Phi, tokenizer: Tokenizer, exercises: Sequence[Exercise], *, seed: int) -> Outcome:
    """Let a model write SAMPLES programs per exercise, run them, and score the reference solutions.

    Raises SandboxError if the sandbox cannot be built.
    """
    prompts = [tokenizer.encode(exercise.prompt, add_special_tokens=False).ids for exercise in exercises]
    programs = []
    for sample in range(SAMPLES):
        sampling = Sampling(max_new_tokens=TOKENS, temperature=TEMPERATURE if sample else 0.0, seed=seed + sample)
        decoding = Decoding(model, prompts, sampling, end=model.config.eos_token_id)
        for _ in decoding:
            pass
        for exercise, prompt, ids in zip(exercises, prompts, decoding.texts, strict=True):
            programs.append(exercise.program(cut(tokenizer.decode(ids[len(prompt) :]))))
    results = run_programs(programs, Limits(wall_seconds=5.0, cpu_seconds=5))
    passed = [result.passed for result in results]
    solved = sum(any(passed[at :: len(exercises)]) for at in range(len(exercises)))
    return Outcome(sum(passed), len(passed), solved, solutions(model, tokenizer, exercises))


def solutions(model: Phi, tokenizer: Tokenizer, exercises: Sequence[Exercise]) -> float:
    """Return minus log2 of the probability of the reference solutions per byte, averaged over exercises."""
    requests = []
    for exercise in exercises:
        before, after = (
            tokenizer.encode(text, add_special_tokens=False).ids for text in (exercise.prompt, exercise.reference)
        )
        requests.append(Request(tuple(before), tuple(after)))
    scores = dict(log_likelihoods(model, requests))
    sizes = [len(exercise.reference.encode()) for exercise in exercises]
    return statistics.fmean(-scores[i][0] / math.log(2) / size for i, size in enumerate(sizes))
