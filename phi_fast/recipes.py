"""The hyperparameters of a run: the paper's three recipes, two of them on open data, and `tiny`, which trains anywhere.

Source of the paper's figures: "Textbooks Are All You Need II: phi-1.5 technical report" (arXiv 2309.05463), section 2.
Hyperparameters that the report does not state are fields too, and their docstrings say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .config import LORA_TARGETS, LoraConfig, PhiConfig
from .errors import UsageError
from .open_data import OPEN_DATA
from .option_types import Count, Mixture, Names, Stages


def _shape(preset: str) -> PhiConfig:
    """Return a preset without special tokens, which the tokenizer provides later."""
    return PhiConfig.preset(preset).replace(bos_token_id=None, eos_token_id=None)


def decays(decay: str, dims: int) -> bool:
    """Return whether a parameter with `dims` dimensions has weight decay, under `Recipe.decay`."""
    return decay == "all" or dims >= 2


@dataclass(frozen=True)
class Recipe:
    """Model, data and hyperparameters of a run: everything that determines the losses, nothing about the machine."""

    model: PhiConfig = field(default_factory=lambda: _shape("phi-1.5"))
    """Shape of the model. Its special tokens come from the tokenizer; a given one must agree with it."""
    init_from: str | None = None
    """Start from these weights instead of random ones: a run directory, a checkpoint, a model folder in any layout, or
    OWNER/NAME on the Hugging Face hub. The model has their shape, and the optimizer starts anew."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank beside frozen weights (LoRA, arXiv 2106.09685), which --init-from names,
    instead of the weights themselves. None: train all weights."""
    lora_alpha: float | None = None
    """The adapters' output is multiplied by this ÷ rank. Default: twice the rank."""
    lora_targets: Names = LORA_TARGETS
    """Projections with adapters, by the names that PEFT takes for phi."""
    data: Path = Path("data")
    """Directory with one prepared corpus (`phi_fast.prepare`) per mixture entry, under the entry's name."""
    mixture: Mixture = field(default_factory=dict)
    """Corpus -> integer weight, in rows; the shares are weight ÷ sum of weights."""
    mixture_stages: Stages = ()
    """Weights that replace those of --mixture from a step on, such as 1000:docs=50,code=50. A corpus that a stage does
    not name is not read in that stage, and continues later where it stopped. A corpus that is only read in a later
    stage has weight 0 in --mixture."""
    document_isolation: bool = False
    """Let no token attend to another document of its row. The report does not state it; rows are documents joined end
    to end, as in GPT-3 (arXiv 2005.14165), separated only by the delimiter."""
    tokenizer: str = "phi-1.5"
    """"phi-1.5" (50295 ids), "stdlib" (the 8192-id BPE made with the default corpus), "data" (the one that the corpora
    were prepared with; the default with --init-from), or a path to a tokenizer."""
    tokens: Count | None = None
    """Tokens to train on, rounded up to whole steps; 0: measure the validation loss, and train no step."""
    epochs: float | None = None
    """Passes over the corpora in place of --tokens, rounded up to whole steps; of a mixture, over the corpus that is
    read least."""
    sequence_length: int = 2048
    """Tokens per row: section 2.1, "context length 2048"."""
    global_batch_size: int = 2048
    """Rows per step over all ranks and micro-batches: section 2.3, "batch size 2048" (× 2048 tokens: 4.19 M tokens)."""
    learning_rate: float = 2e-4
    """Peak learning rate: section 2.3, "constant learning rate 2e-4"."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Learning rate after the warmup: section 2.3, "constant"; the others fall to `final_learning_rate`: "linear" and
    "cosine" from the warmup on, "wsd" (warmup-stable-decay, arXiv 2404.06395) linearly in the last `decay_steps`."""
    decay_steps: int = 0
    """Steps at the end of "wsd" in which the learning rate falls; 0 for the other schedules."""
    final_learning_rate: float = 0.0
    """Final learning rate of "linear", "cosine" and "wsd"; not used by "constant"."""
    warmup_steps: int = 0
    """Steps of linear warmup: section 2.3, "no warm up"."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: the report's. muon: Muon (docs/optimizers.md) for the matrices of the layers, AdamW for embeddings, head,
    biases and LayerNorms, both with the same learning rate and weight decay (arXiv 2502.16982)."""
    muon_momentum: float = 0.95
    """Momentum of "muon", in Nesterov's form; not used by "adamw"."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's momentum: section 2.3, "momentum 0.9, 0.98"."""
    eps: float = 1e-7
    """Adam's epsilon: section 2.3, "epsilon 1e-7"."""
    weight_decay: float = 0.1
    """Decoupled weight decay (AdamW): section 2.3, "weight decay 0.1"."""
    decay: Literal["matrices", "all"] = "matrices"
    """Parameters that decay. NOT STATED by the report; "matrices" excludes biases and LayerNorms, as nanoGPT does."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0: no clipping. NOT STATED by the report; 1.0 as in GPT-3 (arXiv 2005.14165)."""
    initial_loss_scale: float = 65536.0
    """First dynamic loss scale in fp16. NOT STATED by the report; DeepSpeed's own 2^16."""
    loss_scale_window: int = 1000
    """Steps without overflow before the fp16 loss scale doubles. NOT STATED by the report; DeepSpeed's default."""
    loss_scale_hysteresis: int = 2
    """Overflows tolerated before the fp16 loss scale halves. NOT STATED by the report; DeepSpeed's default."""
    min_loss_scale: float = 1.0
    """Smallest fp16 loss scale. NOT STATED by the report; DeepSpeed's default."""
    z_loss: float = 0.0
    """Factor z of an auxiliary loss z · log²(sum of exp(logits)) per token, which keeps the logits from growing (PaLM,
    arXiv 2204.02311, has 1e-4). The training loss includes it, the validation loss does not. 0: none, as in the
    report."""
    skip_spikes: float | None = None
    """Skip the update of a step whose loss lies more than this many standard deviations above the running mean (of
    about the last 64 steps). None: skip no step, as in the report."""
    skip_norm_spikes: float | None = None
    """The same for the gradient norm before clipping."""
    ema_decay: float | None = None
    """Also keep an exponential moving average of the weights, which keeps this share of itself in each step, as 0.999;
    validations and checkpoints have it beside the weights. None: no average, as in the report."""
    seed: int = 1337
    """Seed of the initialisation and of the data order. NOT STATED by the report."""

    @property
    def lora(self) -> LoraConfig | None:
        """Shape of the adapters; None if all weights are trained."""
        if self.lora_rank is None:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return LoraConfig(self.lora_rank, alpha, tuple(self.lora_targets))

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that the optimizer updates."""
        return self.lora.num_parameters(self.model) if self.lora else self.model.num_parameters()

    def flops_per_token(self, *, causal: bool) -> int:
        """Count forward and backward FLOPs per token, as the model does; frozen weights have no gradient."""
        whole = self.model.flops_per_token(self.sequence_length, causal=causal)
        saved = 2 * self.model.matmul_parameters() - 6 * self.trained_parameters
        return whole if self.lora is None else whole - saved

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Number of optimizer steps for `tokens`. Raises UsageError if `tokens` is None."""
        if self.tokens is None:
            why = (
                "the report does not state it for this recipe"
                if self.epochs is None
                else "--epochs counts rows of data"
            )
            raise UsageError(f"tokens is not set, and {why}: give --tokens N")
        return math.ceil(self.tokens / self.tokens_per_step)

    def learning_rate_at(self, step: int) -> float:
        """Compute the learning rate of step `step` (counted from 0)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        begin = self.steps - self.decay_steps if self.schedule == "wsd" else self.warmup_steps
        if self.schedule == "constant" or (self.schedule == "wsd" and step <= begin):
            return self.learning_rate
        done = min(1.0, (step - begin) / max(1, self.steps - begin))
        share = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.final_learning_rate + share * (self.learning_rate - self.final_learning_rate)

    @property
    def mixture_schedule(self) -> list[tuple[int, dict[str, int]]]:
        """(first step, weights) of the mixture and each stage."""
        return [(0, self.mixture), *self.mixture_stages]

    def mixture_at(self, step: int) -> dict[str, int]:
        """Return the corpora with positive weights, and these weights, in step `step` (counted from 0)."""
        weights = [weights for start, weights in self.mixture_schedule if start <= step][-1]
        return {name: weight for name, weight in weights.items() if weight}

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def check(self) -> None:
        """Raise UsageError, naming the field, its value and the way out, for a recipe that cannot be trained."""
        if self.sequence_length > self.model.max_position_embeddings:
            raise UsageError(
                f"sequence_length={self.sequence_length} is longer than the model's context of "
                f"{self.model.max_position_embeddings} tokens; lower --sequence-length or raise "
                f"--model.max-position-embeddings"
            )
        for name in ("sequence_length", "global_batch_size", "loss_scale_window", "loss_scale_hysteresis"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UsageError(f"epochs={self.epochs}: must be greater than 0, and finite")
        if self.epochs is not None and self.mixture_stages:
            raise UsageError(
                "--epochs cannot be counted over a mixture that changes with --mixture-stages: give --tokens"
            )
        if (self.tokens is not None or self.epochs is None) and min(self.steps, self.tokens or 0) < 0:
            raise UsageError(f"tokens={self.tokens}: must be at least 1, or 0 for the validation loss alone")
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: must be greater than 0, and finite")
        for name in ("skip_spikes", "skip_norm_spikes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)}: must be greater than 0")
        for name in ("weight_decay", "gradient_clipping", "warmup_steps", "final_learning_rate"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name}={getattr(self, name)}: must not be negative")
        if not 0 <= self.z_loss < math.inf:
            raise UsageError(f"z_loss={self.z_loss}: must not be negative, and finite")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UsageError(f"ema_decay={self.ema_decay}: must be greater than 0, and less than 1")
        self._check_decay()
        self._check_lora()
        if self.initial_loss_scale < 1 or math.frexp(self.initial_loss_scale)[0] != 0.5:
            raise UsageError(f"initial_loss_scale={self.initial_loss_scale}: must be a power of two, as 65536")
        if not 0 < self.min_loss_scale <= self.initial_loss_scale:
            raise UsageError(
                f"min_loss_scale={self.min_loss_scale}: must be greater than 0, and at most "
                f"initial_loss_scale={self.initial_loss_scale}"
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed={self.seed}: must not be negative, and fit in 63 bits")
        if not 0 <= self.muon_momentum < 1:
            raise UsageError(f"muon_momentum={self.muon_momentum}: must be in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas={self.betas}: each must be in [0, 1)")
        self._check_mixture()

    def _check_lora(self) -> None:
        if self.lora is None:
            if self.lora_alpha is not None or tuple(self.lora_targets) != LORA_TARGETS:
                raise UsageError("lora_alpha and lora_targets are for adapters: add --lora-rank, or leave them out")
            return
        try:
            self.lora.check(self.model)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if self.init_from is None:
            raise UsageError(f"lora_rank={self.lora_rank}: adapters need trained weights; name them with --init-from")

    def _check_decay(self) -> None:
        if self.schedule != "wsd":
            if self.decay_steps:
                raise UsageError(
                    f"decay_steps={self.decay_steps} is for --schedule wsd, and schedule is {self.schedule!r}: leave "
                    "one out"
                )
            return
        most = self.steps - self.warmup_steps
        if not 1 <= self.decay_steps <= most:
            raise UsageError(
                f"decay_steps={self.decay_steps}: --schedule wsd needs --decay-steps from 1 to {most}, the run's "
                f"{self.steps} steps less {self.warmup_steps} of warmup"
            )

    def _check_mixture(self) -> None:
        starts = [start for start, _ in self.mixture_stages]
        if any(start <= before for before, start in zip([0, *starts], starts, strict=False)):
            raise UsageError(f"mixture_stages start at steps {starts}: each must be above the one before, and above 0")
        for start, mixture in self.mixture_schedule:
            where = f"mixture_stages: from step {start} on, {mixture}" if start else f"mixture={mixture}"
            weights = mixture.values()
            if unknown := ", ".join(sorted(set(mixture) - set(self.mixture))):
                raise UsageError(f"{where}: --mixture does not name {unknown}; give it weight 0 there")
            if not any(weights) or min(weights) < 0:
                raise UsageError(f"{where}: give at least one corpus a positive integer weight, none a negative one")
            if sum(weights) // math.gcd(*weights) > 2**20:
                raise UsageError(
                    f"{where}: the weights, divided by their greatest common divisor, add up to more than 2^20; round "
                    "them"
                )
        read = {name for _, mixture in self.mixture_schedule for name, weight in mixture.items() if weight}
        if idle := ", ".join(sorted(set(self.mixture) - read)):
            raise UsageError(f"mixture={self.mixture}: {idle} has weight 0 throughout; leave it out")


def _open(name: str, tokens: int) -> Recipe:
    """Return the report's recipe with the weights and the place of open data."""
    return _PHI_1_5.replace(data=Path("data") / name, mixture=dict(OPEN_DATA[name].weights), tokens=tokens)


_PHI_1_5 = Recipe(
    data=Path("data/phi-1.5"),
    mixture={"synthetic": 80, "phi-1": 20},  # section 2.2: 20% phi-1's 7 B tokens, 80% the ~20 B synthetic ones
    tokens=150_000_000_000,  # section 2.3
)

RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        model=_shape("phi-tiny"),
        data=Path("data/stdlib"),
        mixture={"docs": 80, "code": 20},  # phi-1.5's shares of text and code
        tokenizer="stdlib",
        tokens=340 * 8 * 256,
        sequence_length=256,
        global_batch_size=8,
        learning_rate=1.5e-3,
        loss_scale_window=100,
    ),
    "phi-1.5": _PHI_1_5,
    # Section 2.4: 40% filtered web, 20% code, 40% synthetic, 300 B tokens (table 1).
    "phi-1.5-web": _PHI_1_5.replace(
        data=Path("data/phi-1.5-web"), mixture={"web": 40, "code": 20, "synthetic": 40}, tokens=300_000_000_000
    ),
    # Section 2.4: web data only, about 80% text and 20% code. The number of tokens is not reported.
    "phi-1.5-web-only": _PHI_1_5.replace(
        data=Path("data/phi-1.5-web-only"), mixture={"web": 80, "code": 20}, tokens=None
    ),
    # The first two on data that anyone can get (open_data.py): `python -m phi_fast.prepare --recipe phi-1.5-open`.
    "phi-1.5-open": _open("phi-1.5-open", 150_000_000_000),
    "phi-1.5-web-open": _open("phi-1.5-web-open", 300_000_000_000),
    # Fine-tuning on conversations, with the hyperparameters of phi-1's on CodeExercises: "Textbooks Are All You Need"
    # (arXiv 2306.11644), section 2.3. Its steps (6,000) are of its own data, so the length is in epochs here.
    "sft": Recipe(
        model=_shape("phi-1.5"),
        data=Path("data/sft"),
        mixture={"chat": 1},
        document_isolation=True,
        tokenizer="data",
        epochs=3,
        global_batch_size=256,
        learning_rate=1e-4,
        schedule="linear",
        warmup_steps=50,
        weight_decay=0.01,
    ),
}
"""The recipes by name."""

RecipeName = Literal["tiny", "phi-1.5", "phi-1.5-web", "phi-1.5-web-only", "phi-1.5-open", "phi-1.5-web-open", "sft"]
