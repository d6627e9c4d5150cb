"""phi_fast as a model for lm-eval: its command's arguments, chat templates, and the same results as lm-eval's class."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from samples import write_jsonl
from tokenizers import Tokenizer, processors

from phi_fast.convert import ConvertOptions, convert
from phi_fast.errors import UsageError
from phi_fast.evaluation import lm as module
from phi_fast.evaluation.lm import PhiFastLM

logging.getLogger("lm_eval").setLevel(logging.ERROR)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{{ '\n' if not loop.last or add_generation_prompt }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ mood }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def with_tokenizer(small_folder: Path, to: Path, template: str | dict | None = None, **special: str) -> Path:
    """A copy of the model's folder with its own beginning-of-text token, "<s>", and a chat template."""
    shutil.copytree(small_folder, to)
    tokenizer = Tokenizer.from_file(str(to / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(to / "tokenizer.json"))
    for name, more in (("tokenizer_config.json", special), ("special_tokens_map.json", {})):
        content = json.loads((to / name).read_text())
        (to / name).write_text(json.dumps(content | {"bos_token": "<s>"} | more))
    if isinstance(template, str):
        (to / "chat_template.jinja").write_text(template)
    elif template is not None:
        (to / "chat_template.jinja").write_text(template["default"])
        (to / "additional_chat_templates").mkdir()
        for name, text in template.items():
            if name != "default":
                (to / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    return to


@pytest.fixture(scope="module")
def chat_folder(small_folder, tmp_path_factory) -> Path:
    return with_tokenizer(small_folder, tmp_path_factory.mktemp("chat") / "model", TEMPLATE)


def both(folder: Path, **arguments: object) -> tuple[PhiFastLM, HFLM]:
    # lm-eval encodes a batch as its first text requires, with or without a beginning-of-text token.
    theirs = HFLM(str(folder), device="cpu", batch_size=1, **{"dtype": "float32", **arguments})
    return PhiFastLM(str(folder), device="cpu", **arguments), theirs


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


PAIRS = [("a context", " and more"), ("", "no context"), ("<s>begun", " already"), ("long " * 40, "end" * 20)]
UNTIL = {"until": ["zz"], "max_gen_toks": 8, "do_sample": False}
MORE: tuple[dict[str, float], ...] = ({}, {"repetition_penalty": 50.0})


def assert_same_results(ours: PhiFastLM, theirs: HFLM) -> None:
    found, expected = (lm.loglikelihood(requests("loglikelihood", PAIRS)) for lm in (ours, theirs))
    for (score, greedy), (their_score, their_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(their_score, abs=1e-3) and greedy == their_greedy
    texts = [("short",), ("a text that is longer than the context " * 8,)]
    rolling = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for lm in (ours, theirs)]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-2)
    prompts = [(text, dict(UNTIL)) for text in ("one", "<s>begun", "longer than it may be, " * 12)]
    generated = [lm.generate_until(requests("generate_until", prompts)) for lm in (ours, theirs)]
    assert generated[0] == generated[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_length": 64},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"prefix_token_id": 40},
        {"dtype": "float32", "trust_remote_code": False, "max_length": 100, "add_bos_token": True},
    ],
    ids=str,
)
def test_arguments_do_what_they_do_in_lm_evals_own_class(arguments: dict, chat_folder: Path) -> None:
    ours, theirs = both(chat_folder, **arguments)
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    for text in ("one", "<s>one", ""):
        for special in (None, True, False):
            assert ours.tok_encode(text, add_special_tokens=special) == theirs.tok_encode(text, special)
    assert_same_results(ours, theirs)


def test_the_penalty_for_repetition_is_passed_on(chat_folder: Path) -> None:
    texts = [
        [lm.generate_until(requests("generate_until", [("one one one", {**UNTIL, **more})])) for more in MORE]
        for lm in both(chat_folder)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_a_tokenizer_that_begins_texts_by_itself(small_folder: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(small_folder, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    for arguments in ({}, {"add_bos_token": False}):
        ours, theirs = both(folder, **arguments)
        assert ours.tok_encode("one") == theirs.tok_encode("one")
        assert_same_results(ours, theirs)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("fp32", torch.float32),
        ("auto", torch.float32),
        (None, torch.float32),
    ],
    ids=str,
)
def test_dtypes(name: str | torch.dtype | None, dtype: torch.dtype, small_folder: Path) -> None:
    assert PhiFastLM(small_folder, device="cpu", dtype=name).model.lm_head.weight.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=True: no code that comes with a model is ever run"),
        (
            {"parallelize": True, "peft": "x"},
            r"no model argument parallelize, peft; it has pretrained, tokenizer, ",
        ),
        ({"dtype": "int8"}, "dtype 'int8': expected auto, fp32, fp16, bf16"),
        ({"max_length": 193}, "max_length=193: expected 2 to 192 tokens"),
        ({"max_length": 1}, "max_length=1: expected 2 to 192 tokens"),
        ({"max_length": "long"}, "max_length=long: expected 2 to 192 tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(arguments: dict, message: str, small_folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        PhiFastLM(small_folder, device="cpu", **arguments)


def test_the_list_of_arguments_is_what_a_command_line_can_give(small_folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        PhiFastLM(small_folder, paralelize=True)
    named = str(caught.value).partition("; it has ")[2].split(", ")
    assert {"pretrained", "dtype", "max_length", "add_bos_token", "trust_remote_code", "batch_size"} <= set(named)
    assert not {"model", "hf_tokenizer", "unknown", "self", "console"} & set(named)
    with pytest.raises(UsageError, match="needs model_args pretrained"):
        PhiFastLM()


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"chat_template_args": {"mood": " gladly"}}], ids=str)
@pytest.mark.parametrize(
    "template", [TEMPLATE, NO_SYSTEM, {"default": TEMPLATE, "other": "{{ messages }}"}], ids=range(3)
)
def test_chat_templates(
    template: str | dict, arguments: dict, add_generation_prompt: bool, small_folder: Path, tmp_path: Path
) -> None:
    ours, theirs = both(with_tokenizer(small_folder, tmp_path / "model", template), **arguments)
    assert (
        ours.chat_template(True) == theirs.chat_template(True) == (template if isinstance(template, str) else TEMPLATE)
    )
    for messages in (CHAT, [{"role": "system", "content": "be brief"}, *CHAT]):
        text = ours.apply_chat_template(messages, add_generation_prompt)
        assert text == theirs.apply_chat_template(messages, add_generation_prompt)
        assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_a_chat_template_by_its_name(small_folder: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(
        small_folder, tmp_path / "model", {"default": TEMPLATE, "short": "{{ messages[-1].content }}"}
    )
    ours = PhiFastLM(folder, device="cpu")
    default = ours.tokenizer_name
    assert ours.chat_template("short") == "{{ messages[-1].content }}"
    assert ours.apply_chat_template(CHAT) == "three"
    assert ours.tokenizer_name != default
    with pytest.raises(ValueError, match="'none' is not available"):
        ours.chat_template("none")


def test_prompts_are_kept_by_tokenizer_and_template(chat_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    """lm-eval caches requests under this name, which begins like that of its own class."""
    ours, theirs = both(chat_folder)
    assert ours.tokenizer_name.startswith(theirs.tokenizer_name + "-") and "/" not in ours.tokenizer_name
    assert PhiFastLM(chat_folder, device="cpu").tokenizer_name == ours.tokenizer_name
    moved = shutil.copytree(chat_folder, tmp_path / "model")
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    assert ours.tokenizer_name[-12:] != PhiFastLM(moved, device="cpu").tokenizer_name[-12:]


def test_another_tokenizers_template(small_folder: Path, chat_folder: Path) -> None:
    for tokenizer in (chat_folder, chat_folder / "tokenizer.json"):
        ours = PhiFastLM(small_folder, device="cpu", tokenizer=str(tokenizer))
        assert ours.apply_chat_template(CHAT).startswith("<s><user> one")


def test_a_converted_folder_keeps_its_template(chat_folder: Path, tmp_path: Path) -> None:
    ours = PhiFastLM(convert(ConvertOptions(str(chat_folder), tmp_path / "converted", to="merged")), device="cpu")
    assert ours.apply_chat_template(CHAT).startswith("<s><user> one")


def test_no_template_and_one_that_refuses(small_folder, small_phi, byte_tokenizer, tmp_path) -> None:
    for ours in (PhiFastLM(small_folder, device="cpu"), PhiFastLM(model=small_phi, hf_tokenizer=byte_tokenizer)):
        assert ours.chat_template(True) is None
        with pytest.raises(UsageError, match=r"no chat template: .* Leave out --apply_chat_template"):
            ours.apply_chat_template(CHAT)
    strict = with_tokenizer(small_folder, tmp_path / "model", "{{ raise_exception('never') }}")
    with pytest.raises(UsageError, match="rejects messages with the roles user, assistant, user: never"):
        PhiFastLM(strict, device="cpu").apply_chat_template(CHAT)


def test_no_code_of_the_folders_is_run(small_folder: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(
        small_folder,
        tmp_path / "model",
        TEMPLATE,
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Own", "own.Own"]},
    )
    (folder / "own.py").write_text("raise SystemExit('run')\n")
    assert PhiFastLM(folder, device="cpu").apply_chat_template(CHAT).startswith("<s><user> one")
    hostile = with_tokenizer(small_folder, tmp_path / "hostile", "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UsageError, match="rejects messages"):
        PhiFastLM(hostile, device="cpu").apply_chat_template(CHAT)


def evaluated(
    folder: Path, tmp_path: Path, model: str, *options: str, arguments: str = ""
) -> subprocess.CompletedProcess:
    write_jsonl(tmp_path / "rows.jsonl", [{"q": "one", "a": ["two", "a dog"], "gold": i % 2} for i in range(4)])
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    task = {"task": "mini", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "a", "doc_to_target": "gold"}
    (tmp_path / "mini.yaml").write_text(json.dumps(task | {"metric_list": [{"metric": "acc"}]}))
    command = [sys.executable, "-m", "phi_fast.evaluation.lm", "--model", model, "--tasks", "mini"]
    command += ["--model_args", f"pretrained={folder}{arguments}", "--include_path", str(tmp_path), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_the_command_with_a_chat_template(chat_folder: Path, tmp_path: Path) -> None:
    """Every question has the same prompt and log-likelihoods as with `--model hf`."""
    found = []
    for model in ("phi_fast", "hf"):
        out = tmp_path / model
        options = ["--apply_chat_template", "--log_samples", "--output_path", str(out), "--device", "cpu"]
        done = evaluated(chat_folder, tmp_path, model, *options, arguments=",dtype=float32,trust_remote_code=False")
        assert done.returncode == 0, done.stderr
        [samples] = out.rglob("samples_mini_*.jsonl")
        found.append([json.loads(line) for line in samples.read_text().splitlines()])
    for mine, other in zip(*found, strict=True):
        assert mine["arguments"] == other["arguments"]
        assert mine["arguments"]["gen_args_0"]["arg_0"] == "<s><user> one\n<assistant>"
        scores = [[float(response[0][0]) for response in sample["resps"]] for sample in (mine, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_the_command_says_what_is_wrong_in_one_line(monkeypatch, capsys, small_folder) -> None:
    from lm_eval import __main__

    for argument, message in (("trust_remote_code=True", "is ever run"), ("paralelize=True", "has no model argument")):
        text = f"pretrained={small_folder},{argument}"
        monkeypatch.setattr(__main__, "cli_evaluate", lambda text=text: PhiFastLM.create_from_arg_string(text))
        assert module.main() == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


@pytest.mark.slow
def test_a_wrong_argument_ends_the_real_command(small_folder, tmp_path) -> None:
    done = evaluated(small_folder, tmp_path, "phi_fast", "--device", "cpu", arguments=",trust_remote_code=True")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: trust_remote_code=True")
