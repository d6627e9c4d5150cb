"""`python -m phi_fast.curate STEP INPUTS --out DIR`: filter documents between raw text and `phi_fast.prepare`.

Each step reads JSON lines or Parquet, and writes the documents that it keeps, a list of those that it drops and why,
and a report of all counts. A step that was interrupted goes on where it was when the same command is given again."""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.curate")

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from .curation.classifier import ForestScore, TrainingSettings, train
from .curation.contamination import ContaminationSettings, Decontamination
from .curation.documents import CurateError, Document
from .curation.embeddings import HASHING
from .curation.exact import ExactDuplicates
from .curation.hub_classifier import FINEWEB_EDU, HubScore
from .curation.near import NearDuplicates, NearSettings
from .curation.rules import Rules, RuleSettings
from .curation.run import Report, Running, run
from .curation.score_page import page
from .curation.score_samples import gather
from .curation.shards import MAX_DOCUMENT_BYTES, Malformed, Reading, cut, documents, find
from .curation.steps import Comparison, Judge
from .curation.threshold import Threshold
from .errors import PhiFastError
from .files import check_names, write_atomically, writing
from .startup import tolerate_encodings
from .terminal import console, printable


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every step reads."""

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files and folders of JSON lines (also .gz, .bz2, .xz, .zst) and Parquet; another step's --out, too."""
    text_field: str = "text"
    """Field or column that holds the text."""
    skip_malformed: bool = False
    """Skip, count and list records that are no documents, instead of stopping at the first."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """A record with a longer text or line is malformed; no more of it is ever in memory."""

    @property
    def reading(self) -> Reading:
        return Reading(self.text_field, self.skip_malformed, self.max_document_bytes)


@dataclass(frozen=True, kw_only=True)
class Step(Inputs):
    """What every step that writes documents has."""

    out: Path
    """Folder to write: part-*.jsonl.zst, dropped.log, malformed.log and report.json. It must not exist yet."""
    workers: int | None = None
    """Number of processes. None: one per core. The output does not depend on it."""
    shard_bytes: int = 2**24
    """Bytes of JSON lines that become one output file, and that an interruption loses at most."""
    dropped_texts: bool = False
    """Keep the texts of dropped documents in dropped.log."""
    memory_mb: int = 256
    """Buffers for comparing documents with each other, in MB."""

    def step(self) -> Judge | Comparison:
        """Make the step. Raises CurateError for options that it cannot work with."""
        raise NotImplementedError

    @property
    def running(self) -> Running:
        return Running(self.reading, self.shard_bytes, self.dropped_texts, self.workers, self.memory_mb * 10**6)


@dataclass(frozen=True, kw_only=True)
class ExactDedup(Step):
    """Drop documents that repeat an earlier one, but for case and white space."""

    def step(self) -> Comparison:
        return ExactDuplicates()


@dataclass(frozen=True, kw_only=True)
class NearDedup(Step):
    """Drop documents that nearly repeat an earlier one (MinHash of word n-grams)."""

    ngram: int = NearSettings.ngram
    """Words in a row that are one element of a document's set."""
    bands: int = NearSettings.bands
    """Bands of a signature; documents that agree in one are compared."""
    rows: int = NearSettings.rows
    """Hashes in a band."""
    threshold: float = NearSettings.threshold
    """Least estimated Jaccard similarity of duplicates."""
    seed: int = NearSettings.seed
    """Seed of the hash functions."""

    def step(self) -> Comparison:
        return NearDuplicates(NearSettings(self.ngram, self.bands, self.rows, self.threshold, self.seed))


@dataclass(frozen=True, kw_only=True)
class Decontaminate(Step):
    """Drop documents that hold a part of a benchmark: by n-grams, by the syntax of Python functions, by embeddings."""

    benchmarks: tuple[Path, ...]
    """JSON lines or Parquet files of any layout, such as HumanEval's, MBPP's or GSM8K's."""
    benchmark_fields: tuple[str, ...] = ()
    """Fields of the benchmarks' records that count; none: all texts."""
    ngram: int = ContaminationSettings.ngram
    """Words in a row that a document must share with a benchmark. 0: n-grams do not count."""
    shortest: int = ContaminationSettings.shortest
    """A benchmark's text with fewer words than --ngram, but at least so many, counts as a whole."""
    match_rate: float = ContaminationSettings.match_rate
    """Least match rate of syntax trees (phi-1: 0.8 to 0.95). 0: syntax does not count."""
    least_nodes: int = ContaminationSettings.least_nodes
    """Functions with smaller syntax trees are not compared."""
    embedding: str = HASHING
    """"hashing", "model2vec:NAME" or "sentence-transformers:NAME"."""
    embedding_distance: float = 0.0
    """L2 distance of embeddings below which a part of a document counts. 0: embeddings do not count."""

    def step(self) -> Judge:
        names = ContaminationSettings.__dataclass_fields__
        return Decontamination(ContaminationSettings(**{name: getattr(self, name) for name in names}))


@dataclass(frozen=True, kw_only=True)
class ApplyRules(Step):
    """Apply rules of datatrove: quality, repetition, language, and replacing of e-mail and IP addresses."""

    rules: tuple[str, ...] = ("gopher-repetition", "gopher-quality")
    """Rules, in the order in which they apply."""
    languages: tuple[str, ...] = RuleSettings.languages
    """Languages that the rule "language" keeps."""
    language_threshold: float = RuleSettings.language_threshold
    """Least probability of one of them."""
    language_model: Path | None = None
    """fastText's lid.176.bin on this machine. None: datatrove downloads it once."""

    def step(self) -> Judge:
        names = RuleSettings.__dataclass_fields__
        return Rules(RuleSettings(**{name: getattr(self, name) for name in names}))


@dataclass(frozen=True, kw_only=True)
class TrainClassifier(Inputs):
    """Train a classifier on scored samples: documents with a number in --label."""

    out: Path
    """File of the classifier, NAME.skops."""
    label: str = "score"
    """Field of the label, or its name among the record's "scores"."""
    training: Annotated[TrainingSettings, tyro.conf.arg(name="")] = field(default_factory=TrainingSettings)


@dataclass(frozen=True, kw_only=True)
class AddScore(Step):
    """Add a score to every document: by a classifier of train-classifier, or by a published one."""

    classifier: str
    """A file of train-classifier; "fineweb-edu"; or any one-output sequence classifier: a folder, or its hub name."""
    score: str = "education"
    """Name of the score."""
    device: str = "cpu"
    """Where a published classifier runs: "cpu", "cuda"."""

    def step(self) -> Judge:
        if self.classifier.endswith(".skops"):
            return ForestScore(Path(self.classifier), self.score)
        return HubScore(
            FINEWEB_EDU if self.classifier == "fineweb-edu" else self.classifier, self.score, device=self.device
        )


@dataclass(frozen=True, kw_only=True)
class ApplyThreshold(Step):
    """Keep documents whose score is at least --at-least; `page` shows which these are."""

    at_least: float
    """Least score that is kept."""
    score: str = "education"
    """Name of the score."""

    def step(self) -> Judge:
        return Threshold(self.score, self.at_least)


@dataclass(frozen=True, kw_only=True)
class ScorePage(Inputs):
    """Write one HTML page: a score's histogram, and documents on both sides of a threshold, to choose it by."""

    at_least: float
    """Threshold to look at."""
    out: Path
    """File of the page."""
    score: str = "education"
    """Name of the score."""
    samples: int = 10
    """Documents of each kind: nearest to the threshold and at random, below it and above."""


_Command = tyro.conf.subcommand
Options = (
    Annotated[ExactDedup, _Command("exact-dedup")]
    | Annotated[NearDedup, _Command("near-dedup")]
    | Annotated[Decontaminate, _Command("decontaminate")]
    | Annotated[ApplyRules, _Command("rules")]
    | Annotated[TrainClassifier, _Command("train-classifier")]
    | Annotated[AddScore, _Command("score")]
    | Annotated[ApplyThreshold, _Command("threshold")]
    | Annotated[ScorePage, _Command("page")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 after an error, 130 after Ctrl-C."""
    tolerate_encodings()
    options: Any = tyro.cli(
        Options,
        args=arguments,
        prog="python -m phi_fast.curate",
        description=__doc__,
    )
    try:
        carry_out(options, console(soft_wrap=True))
    except (PhiFastError, OSError) as error:
        print(f"phi_fast.curate: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nphi_fast.curate: stopped. The same command takes up where this one was.", file=sys.stderr)
        return 130
    return 0


def carry_out(options: Step | TrainClassifier | ScorePage, output: Console) -> None:
    """Run one subcommand. Raises CurateError, PrepareError and OSError."""
    check_names(options)
    if isinstance(options, TrainClassifier):
        _train(options, output)
    elif isinstance(options, ScorePage):
        _page(options, output)
    else:
        step = options.step()
        if summary := getattr(step, "summary", ""):
            output.print(f"looking for {summary}")
        show(run(step, list(options.inputs), options.out, options.running, output), options.out, output)


def show(report: Report, out: Path, output: Console) -> None:
    """Print what a step did."""
    counts = report.counts
    output.print(
        f"{counts.documents_in:,} documents in, {counts.documents_out:,} out; "
        f"{counts.bytes_in / 1e6:,.1f} MB of text in, {counts.bytes_out / 1e6:,.1f} MB out"
    )
    for reason, count in counts.dropped.items():
        output.print(f"dropped {count:,}: {printable(reason)}")
    for name, count in report.notes.items():
        output.print(f"{name.replace('_', ' ')}: {count:,}")
    if counts.malformed:
        output.print(
            f"left out {counts.malformed:,} malformed records, all in {printable(str(out / 'malformed.log'))}:"
        )
        for place, why in counts.malformed_examples[:3]:
            output.print(printable(f"  {place}: {why}"))
    output.print(f"written: {printable(str(out))}")


def _read(options: Inputs, malformed: Malformed) -> Iterator[Document]:
    for shard in cut(find(list(options.inputs)), options.reading):
        yield from documents(shard, options.reading, malformed)


def _train(options: TrainClassifier, output: Console) -> None:
    if options.out.suffix != ".skops":
        raise CurateError(f"{options.out}: a classifier's file is named NAME.skops")
    options.training.check()
    malformed = Malformed(options.skip_malformed)
    texts, labels = [], []
    for document in _read(options, malformed):
        label = document.scores.get(options.label, document.metadata.get(options.label))
        if isinstance(label, bool) or not isinstance(label, int | float) or not abs(label) < 1e300:
            malformed.add(
                document.id, f"{options.label!r} is {str(label)[:80]!r}, expected a number; name it with --label"
            )
        else:
            texts.append(document.text)
            labels.append(float(label))
    made, results = train(texts, labels, options.training)
    made.save(options.out)
    for name, value in results.items():
        output.print(f"{name.replace('_', ' ')}: {value}")
    if malformed.found:
        first = printable(": ".join(malformed.found[0]))
        output.print(f"left out {len(malformed.found):,} malformed records, the first: {first}")
    output.print(f"written: {printable(str(options.out))}")


def _page(options: ScorePage, output: Console) -> None:
    if options.samples < 0:
        raise CurateError(f"--samples {options.samples}: expected 0 or more")
    malformed = Malformed(options.skip_malformed)
    scores = gather(_read(options, malformed), options.score, options.at_least, options.samples)
    if not len(scores.values):
        raise CurateError(
            f"none of {scores.missing:,} documents has a score {options.score!r}: add one with `curate score`"
        )
    source = f"{len(scores.values) + scores.missing:,} documents of {', '.join(map(str, options.inputs))}"
    with writing(options.out, "free some space, or name another --out"):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, page(scores, source).encode("utf-8", "backslashreplace"))
    output.print(f"written: {printable(str(options.out))}")


if __name__ == "__main__":
    sys.exit(main())
