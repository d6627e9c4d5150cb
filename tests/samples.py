"""A model folder and question files for the tests of evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from phi_fast.conversion.hf_config import phi_config
from phi_fast.convert import ConvertOptions, convert
from phi_fast.model import Phi


def make_folder(path: Path, model: Phi, tokenizer: Tokenizer) -> Path:
    merged = path / "merged"
    merged.mkdir()
    save_file({name: p.detach() for name, p in model.named_parameters()}, merged / "model.safetensors")
    (merged / "config.json").write_text(json.dumps(phi_config(model.config, torch.float32)))
    tokenizer.save(str(merged / "tokenizer.json"))
    return convert(ConvertOptions(str(merged), path / "small"))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def compact_questions() -> dict[str, list[dict]]:
    """A few questions of every task in the compact form."""
    words = ["red", "a dog", "seven", "under the bridge", "sand and glass", "no", "yes, often", "Paris"]

    def choices(i: int, n: int) -> list[str]:
        return [words[(i + j * 3) % len(words)] for j in range(n)]

    def plain(prefix: str, n: int, count: int = 6) -> list[dict]:
        return [
            {"query": f"{prefix}What is item {i} of the list?", "choices": choices(i, n), "gold": i % n}
            for i in range(count)
        ]

    siqa = "Context: Kim left {0}.\nQuestion: Why did Kim leave?\nChoices:\nA. it was {0}\nB. a dog came\nAnswer:"
    mmlu = "Question: What is {0} squared?\n(A) {0} (B) 1 (C) {0}{0} (D) none of these\n"
    who = ["Ann met Eve so Ann", "Ann met Eve so Eve"]
    return {
        "arc_easy": plain("Question: ", 4),
        "arc_challenge": plain("Question: ", 3),
        "openbook_qa": plain("", 4),
        "piqa": [{**row, "query": row["query"] + "\n"} for row in plain("Question: ", 2)],
        "hellaswag": plain("Cooking: ", 4),
        "boolq": [
            {"query": f"Passage: Item {i} is old.\nQuestion: is item {i} old?", "choices": ["no", "yes"], "gold": 1}
            for i in range(4)
        ],
        "winogrande": [
            {"context_options": who, "continuation": f"was {w}.", "gold": i % 2} for i, w in enumerate(words)
        ],
        "siqa": [{"query": siqa.format(word), "choices": ["A", "B"], "gold": 0} for word in words[:4]],
        "mmlu": [
            {
                "query": mmlu.format(i),
                "choices": list("ABCD"),
                "gold": 0,
                "category": "abstract_algebra",
                "split": split,
            }
            for i, split in enumerate(["dev", "dev", "test", "test", "test"])
        ],
    }
