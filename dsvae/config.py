"""RunConfig and its parts: the settings of a run, how they are read, checked and
printed.

A field is declared once, with its type, its rule, its flag and its meaning
(`dsvae.modeling.settings`). What must be true of several fields together is in the
`check` of the section that has them.

A value comes from the defaults here, from a recipe or a file (`--config`), or from the
command line; the later of these wins. Unknown names are errors that name the nearest
known one.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from dsvae.errors import UserError, nearest
from dsvae.modeling import settings
from dsvae.modeling.settings import (
    SHORT,
    Amount,
    Count,
    DenoiserConfig,
    LatentConfig,
    LoraConfig,
    Positive,
    Rule,
    Seed,
    Share,
    Weight,
    declared,
)

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "quickstart"

MAY_CHANGE = object()
"""Marks a field that a resumed run may change, because it does not affect what is
learned."""

Every = Annotated[
    int, Rule("at least 0 (0: only at the end of each phase)", lambda n: n >= 0), MAY_CHANGE
]


def names_reports(text: str) -> bool:
    """Returns whether a text is a valid `report_to`."""
    known = {"tensorboard", "wandb", "trackio", "mlflow"}
    return text == "none" or set(text.split(",")) <= known


FreeBitsMode = Literal["dimension", "total", "sentence"]

PHASES: dict[str, list[int]] = {
    "all": [1, 2],
    "1": [1],
    "2": [2],
    "prior": [3],
    "2+prior": [2, 3],
    "all+prior": [1, 2, 3],
}
"""The phases that each value of `phase` runs."""


def phase_name(number: int) -> str:
    """Returns `phase 1`, `phase 2` or `phase prior`."""
    return f"phase {'prior' if number == 3 else number}"


@dataclass
class DataConfig:
    """Where the sentences come from, and how they are batched."""

    train_file: Annotated[str | None, SHORT] = None
    """Training sentences: .txt (one per line), .jsonl (one object per line), .csv, .tsv
    (without quoting) or .parquet. Without it and without `dataset`, the run uses the
    built-in corpus. With `data.weights`, several files, separated by commas."""
    weights: list[Positive] = field(default_factory=list)
    """Mix several training files: one weight per file. Each file's share of every step is
    its share of the weights, in expectation. Empty: `train_file` is one file."""
    valid_file: Annotated[str | None, SHORT] = None
    """Validation sentences. Without it, 5% of the training sentences are held out, at
    most 5,000."""
    test_file: Annotated[str | None, SHORT] = None
    """Test sentences. Without it, 5% of the training sentences are held out, at most
    5,000."""
    dataset: Annotated[str | None, SHORT] = None
    """A hub data set instead of files: ID or ID:CONFIG. Its own train, validation and
    test splits are used."""
    streaming: bool = False
    """Read the hub data set from the network as a stream, and never download its files.
    Only what is read is tokenized and cached: see `max_sentences`."""
    max_sentences: Amount = 0
    """Read at most the first N sentences of every file or split of the source. 0: all."""
    text_column: Annotated[str, SHORT] = "text"
    """The column that contains the sentence, in .jsonl, .csv, .tsv, .parquet and hub
    data sets."""
    condition_column: Annotated[str | None, SHORT] = None
    """The column that contains the condition of each sentence: a text that the sentence
    is generated from. It needs a kind of file with columns, or a hub data set. Without
    it, sentences have no conditions."""
    label_column: Annotated[str | None, SHORT] = None
    """The column that contains the label of each sentence: a text, a number, or true or
    false. Records may have none (null or empty)."""
    tags_column: Annotated[str | None, SHORT] = None
    """The column that contains one tag per whitespace word: a list in .jsonl and
    .parquet, separated by white space in .csv and .tsv. Records may have none (null or
    empty). It needs a fast tokenizer, which ByT5 lacks."""
    deduplicate: bool = False
    """Drop the training sentences that are also validation or test sentences, with the same
    condition if they have one. Sentences that occur several times in one split stay:
    they say how common each is."""
    builtin_size: Count = 20_000
    """Number of sentences of the built-in corpus: training, validation and test
    together."""
    builtin_seed: Seed = 0
    """Seed of the built-in corpus."""
    max_tokens: Annotated[int, Rule("at least 2 (token and EOS)", lambda n: n >= 2), SHORT] = 64
    """Longest sentence (and longest condition) in tokens, EOS included. Longer ones are
    truncated, counted and reported."""
    batch_size: Annotated[Count, SHORT] = 128
    """Sentences per optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: Amount = 8192
    """Limit of padded tokens per forward pass on one rank. A step is cut into as many
    micro-batches as that takes. A smaller limit means less padding, because sentences of
    similar length share a micro-batch, and more passes. 0: 1024 on a CPU, which gains more
    from less padding, and 8192 on a GPU, which gains more from fewer passes. With
    `packing`, it is a limit of real tokens, and 0 is 8192 everywhere."""
    packing: bool = False
    """Compute nothing for padding: the sentences of a micro-batch lie one behind the other,
    and only attention pads groups of similar length. Losses are the same but for rounding
    and dropout. Not for T5Gemma, nor for umT5 with cross-attention."""
    cache_dir: Annotated[str | None, MAY_CHANGE] = None
    """Directory where tokenized corpora are cached by content. Without it, `dsvae`
    inside the cache directory of `datasets`."""

    def check(self) -> None:
        """Raises UserError if fields do not go together."""
        if 0 < self.micro_batch_tokens < self.max_tokens:
            raise UserError(
                f"data.micro_batch_tokens ({self.micro_batch_tokens}) is less than one sentence "
                f"of data.max_tokens ({self.max_tokens})"
            )
        if self.streaming and self.dataset is None:
            raise UserError("data.streaming reads a hub data set: name it with --dataset")
        files = len(self.train_file.split(",")) if self.train_file is not None else 0
        if self.weights and len(self.weights) != files:
            raise UserError(
                f"--train_file names {files} files and data.weights has {len(self.weights)}: "
                f"give one weight per file, and separate the files by commas"
            )


@dataclass
class ModelConfig(LatentConfig):
    """Which T5, and which latent path is added to it."""

    name: str | None = None
    """A pretrained T5, mT5, umT5, ByT5 or T5VAE: a hub id or a directory. Without it, a
    new T5 is made from `t5`."""
    t5: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' T5 configuration for a new T5. `model_type` may be t5,
    mt5 or umt5."""
    vocab_size: Count = 4256
    """Pieces of the tokenizer that is trained on the corpus for a new T5, at least 260.
    They include the 256 bytes that spell every character without a piece."""
    dropout: Share | None = None
    """Dropout rate of the T5. Without it, the model's own."""
    gradient_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass. It saves memory and
    takes about a third more time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters that train in place of the T5."""

    def check(self) -> None:
        """Raises UserError if fields do not go together."""
        if self.name is not None and self.t5:
            raise UserError(
                f"model.name ({self.name}) and model.t5 are both given: a pretrained T5 has its "
                f"own configuration"
            )
        if self.name is None and self.lora.rank:
            raise UserError(
                "model.lora.rank freezes the T5, and a new one would learn nothing: name a "
                "pretrained one with --model"
            )
        if not self.has_latent and self.family != "gaussian":
            raise UserError(
                f"model.family {self.family} needs a latent, and model.injection none has no latent"
            )


@dataclass
class BetaConfig:
    """Weight of the KL term by optimizer step of the phase (see
    `dsvae.objective.schedules`)."""

    kind: Literal["constant", "linear", "cyclic", "target"] = "linear"
    """How beta moves. constant: `max` throughout. linear: one rise over the phase.
    cyclic: `cycles` equal rises (Fu et al. 2019). target: beta moves until the KL is
    `target`."""
    max: Weight = 1.0
    """The largest value of beta."""
    target: Positive | None = None
    """The KL to hold in nats per sentence, for kind target."""
    gain: Positive = 1e-3
    """How much beta moves per step and per nat of distance from the target."""
    zero: Weight = 0.0
    """Share of the phase (or of each cycle) during which beta stays at 0 before it
    rises."""
    rise: Weight = 0.5
    """Share of the phase (or of each cycle) over which beta rises from 0 to `max`. It
    stays there for the rest."""
    cycles: Count = 4
    """Number of cycles, for kind cyclic."""

    def check(self) -> None:
        """Raises UserError if fields do not go together."""
        if self.zero + self.rise > 1:
            raise UserError(
                "phase2.beta.zero and phase2.beta.rise are shares, and more than 1 together"
            )
        if (self.kind == "target") != (self.target is not None):
            raise UserError(
                "phase2.beta.kind target and phase2.beta.target (nats per sentence) go together"
            )


@dataclass
class OptimizerConfig:
    """Optimization of one phase: AdamW, gradient clipping, and a learning-rate
    schedule."""

    steps: Annotated[
        int, Rule("at least 1 (to leave a phase out: --phase 1 or 2)", lambda n: n >= 1)
    ] = 1000
    """Number of optimizer steps."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    lr_scale: Literal["none", "rms"] = "none"
    """What the learning rate of a tensor is multiplied by. none: nothing. rms: the root
    mean square of the tensor when the phase starts, at least 0.001, as in Adafactor, which
    trained T5. The rate is then a share of a tensor's size."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: it stays constant, or falls to
    zero along a line or a cosine. The step after the last one would have zero."""
    lr_decay: Annotated[float, Rule("in (0, 1]", lambda share: 0 < share <= 1)] = 1.0
    """Share of the steps after the warm-up, the last ones, in which a linear or cosine
    schedule falls. Before them the learning rate is constant."""
    warmup_steps: Amount = 0
    """Number of steps over which the learning rate rises linearly. The first step is
    already above 0."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay of matrices. Norms, biases, embeddings and position biases
    have none."""
    adam_betas: Annotated[list[Share], Rule("two numbers", lambda pair: len(pair) == 2)] = field(
        default_factory=lambda: [0.9, 0.999]
    )
    """AdamW's beta1 and beta2."""
    adam_eps: Weight = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Weight = 1.0
    """Clip gradients to this global norm. 0: do not clip."""

    def check(self, name: str) -> None:
        """Raises UserError if fields of the phase `name` do not go together."""
        if self.warmup_steps > self.steps:
            raise UserError(
                f"{name}.warmup_steps ({self.warmup_steps}) must lie between 0 and {name}.steps "
                f"({self.steps})"
            )
        if self.lr_decay < 1 and self.lr_schedule == "constant":
            raise UserError(f"{name}.lr_decay needs {name}.lr_schedule linear or cosine")


@dataclass
class PhaseConfig(OptimizerConfig):
    """Phase 1 or 2: the optimization, and the encoder's input noise."""

    draws: Count = 1
    """Draw z this many times per sentence and train on the draw with the best
    reconstruction (speculative sampling, Sato et al. 2021). The logged training rec is
    then too good by up to ln(draws). Evaluation always draws once."""
    skewness: Weight = 0.01
    """Weight of the mean entropy of a sentence's cluster in nats, if `model.clusters` is
    not 0. It makes the cluster of each sentence certain."""
    dispersion: Weight = 0.02
    """Weight of the negative entropy of the mean cluster of the global batch in nats, if
    `model.clusters` is not 0. It makes the clusters equally common."""
    deletion: Share = 0.0
    """Share of tokens that are deleted from the encoder's input during training: of the
    sentence, or of the condition if `model.posterior_reads` is condition. EOS is never
    deleted, and the decoder's side stays clean."""
    token_mask: Share = 0.0
    """Share of tokens of the same text that are replaced in training: by the tokenizer's
    mask token, the first sentinel of a T5, or the unknown piece of a tokenizer without
    them. EOS is never replaced."""
    latent_noise: Weight = 0.0
    """Standard deviation of normal noise that is added to z in training before it is
    decoded, as a multiple of the standard deviation of each number of z in the last steps
    (about 100). The first step of a phase has none."""
    latent_dropout: Share = 0.0
    """Share of the numbers of z that are 0 in training when z is decoded. The others are
    divided by 1 - share."""


@dataclass
class Phase1Config(PhaseConfig):
    """Phase 1: a plain autoencoder, no KL term."""

    sample_latent: bool = True
    """Decode a sample of q(z|x) (true) or its mean (false)."""
    freeze_decoder: Annotated[bool, SHORT] = False
    """Train only the encoder and the latent path (posterior and injection)."""

    def check(self, name: str = "phase1") -> None:
        """Raises UserError if fields do not go together."""
        super().check(name)
        if self.draws > 1 and not self.sample_latent:
            raise UserError("phase1.draws needs phase1.sample_latent: without it nothing is drawn")


@dataclass
class Phase2Config(PhaseConfig):
    """Phase 2: everything trains, with the KL term."""

    beta: BetaConfig = field(default_factory=BetaConfig)
    """Weight of the KL term."""
    length_weighted: bool = False
    """Divide the reconstruction of each sentence by its predicted tokens, EOS included, as
    the published command of Optimus does. A beta of 1 is then about as strong as a beta
    of one sentence's length without it. The logged rec stays in nats per sentence."""
    free_bits: Weight = 0.0
    """KL threshold in nats. Below it, the KL has no gradient. 0: no threshold."""
    release: Share = 0.0
    """Share of the phase at its end in which `free_bits` is off. The KL then falls to what
    the decoder has use for."""
    total_correlation: Weight = 0.0
    """Weight of the pairwise total correlation of the variables, for the categorical
    family. It adds to the share that is already part of the KL."""
    free_bits_mode: FreeBitsMode = "dimension"
    """What `free_bits` applies to. dimension: the mean KL of each unit over the global
    batch. total: the mean of their sum. sentence: the KL of each unit of each sentence,
    as in the code of Optimus and of Park & Lee."""

    def check(self, name: str = "phase2") -> None:
        """Raises UserError if fields do not go together."""
        super().check(name)
        self.beta.check()
        if self.beta.kind == "target" and self.free_bits:
            raise UserError(
                "phase2.free_bits holds the KL up, and phase2.beta.kind target holds it at a "
                "value: use one of them"
            )
        if self.release and not self.free_bits:
            raise UserError(
                "phase2.release turns phase2.free_bits off, which is 0: set both, or neither"
            )
        if self.beta.kind == "cyclic" and self.beta.cycles > self.steps:
            raise UserError(
                f"phase2.beta.cycles ({self.beta.cycles}) must not exceed phase2.steps "
                f"({self.steps})"
            )


@dataclass
class PriorConfig(OptimizerConfig, DenoiserConfig):
    """Phase `prior`: a denoiser learns the distribution of z by flow matching, and nothing
    else trains. With `data.label_column` it can be asked for a class, and if the decoder
    reads a condition, for texts of a condition."""

    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay of matrices."""
    times: Literal["uniform", "logit_normal"] = "uniform"
    """How the times of training are drawn. logit_normal: the logistic function of a
    standard normal number, which leaves out the ends."""
    condition_drop: Share = 0.1
    """Share of the texts whose class or condition is hidden in training, so that samples
    can be guided."""
    average: Share = 0.999
    """Share of the averaged weights that stays at each step. The samples, and the exported
    model, come from the averaged weights. In the first steps it is smaller."""

    def check(self, name: str = "prior") -> None:
        """Raises UserError if fields do not go together."""
        super().check(name)


@dataclass
class HeadsConfig:
    """Weights of the heads beside the decoder, in both phases. The losses of those that
    label sentences are in nats per sentence, and sentences without labels count with 0."""

    class_weight: Weight = 1.0
    """Weight of -log p of the label of a sentence, if `data.label_column` is given. 0: no
    head, and the labels only measure what the model found without them."""
    tag_weight: Weight = 1.0
    """Weight of -log p of the tags of a sentence, if `data.tags_column` is given. 0: no
    head."""
    align_weight: Weight = 0.0
    """Weight of 1 - cos(P z, h), which keeps z near the states h of the encoder as it was
    at the start of the run, and needs `model.name`. With pooling chunks it is the mean over
    the vectors of a text, and h the mean of the states of a chunk. Otherwise P reads all of
    z, and h is the mean of all states. P is linear and trains. 0: no such head."""


@dataclass
class EvalConfig:
    """Evaluation on validation text while training, and on test text at the end."""

    samples: Count = 1
    """Samples of z per sentence for `rec`."""
    iw_samples: Amount = 10
    """Samples of z per sentence for the importance-weighted bound `nll_iw` of the final
    evaluation. 0: do not measure it."""
    batch_tokens: Count = 16384
    """Limit of padded tokens per forward pass on one rank."""
    sentences: Count = 5000
    """Use at most this many validation sentences during training. The final evaluation
    uses all."""
    reconstructions: Amount = 0
    """Decode this many test sentences greedily in the final evaluation, for exact match,
    token accuracy and BLEU. They are chosen by hash. 0: none."""
    noise_sentences: Amount = 0
    """Decode this many of those `reconstructions` seven more times, from z with noise of up
    to one standard deviation of z. 0: none."""
    shown: Amount = 8
    """Number of reconstructions and prior samples written as text at every
    evaluation."""


@dataclass
class RunConfig:
    """A whole run."""

    ds_config: str | None = None
    """DeepSpeed configuration file (JSON), or the name of a shipped one. Values that are
    `auto` are filled in from this configuration."""
    output_dir: Annotated[str, Rule("the name of a directory", str.strip), MAY_CHANGE] = (
        "runs/dsvae"
    )
    """Directory that the run writes everything to."""
    resume: Annotated[str, MAY_CHANGE] = "auto"
    """auto: continue from the newest complete checkpoint in output_dir, if there is
    one. never: start afresh, and refuse an output_dir with a checkpoint. DIR: start
    from the newest complete checkpoint of that run; once output_dir contains
    checkpoints of its own run, behave like auto."""
    phase: Annotated[Literal["all", "1", "2", "prior", "2+prior", "all+prior"], MAY_CHANGE] = "all"
    """Which phases to run. all: 1 and 2. 2 alone starts from output_dir/phase1/model if it
    exists, otherwise from the model itself. prior alone starts from a finished model
    (--model), whose latent path it takes."""
    seed: Seed = 0
    """Seed of everything random: initialization, order of the sentences,
    deletion noise, z, dropout."""
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], MAY_CHANGE] = "auto"
    """Fills `bf16.enabled`, `fp16.enabled` and `torch_autocast.enabled` if the
    ds_config says auto. auto: bf16, but fp32 on a CPU without AVX-512, where bf16 is
    slow."""
    compile: Annotated[bool, MAY_CHANGE] = False
    """Compile the training passes (torch.compile). It takes half a minute to a few minutes
    at the start of each phase, and makes steps faster. Not at ZeRO 3."""
    log_every: Annotated[Count, MAY_CHANGE] = 10
    """Log every N optimizer steps."""
    report_to: Annotated[
        str,
        Rule(
            "none, or some of tensorboard, wandb, trackio and mlflow with commas between them",
            names_reports,
        ),
        MAY_CHANGE,
    ] = "tensorboard"
    """Where the run reports to besides metrics.jsonl: tensorboard, wandb, trackio, mlflow,
    with commas between them, or none. A resumed run continues its records."""
    verbose: Annotated[bool, MAY_CHANGE] = False
    """Print the resolved DeepSpeed configuration of each phase. Either way it is
    written to output_dir/ds_config.phase1.json and ds_config.phase2.json."""
    eval_every: Every = 500
    """Evaluate on validation text every N optimizer steps. 0: only at the end of each
    phase."""
    checkpoint_every: Every = 500
    """Save a checkpoint every N optimizer steps. 0: only at the end of each phase."""
    keep_checkpoints: Annotated[Count, MAY_CHANGE] = 2
    """Keep the newest N complete checkpoints."""
    keep_best: Annotated[bool, MAY_CHANGE] = True
    """Also keep the best checkpoint of the running phase: the one with the smallest rec
    (phase 1) or rec + kl (phase 2) on validation text, among those saved at a step with
    an evaluation."""
    on_save_error: Annotated[Literal["stop", "continue"], MAY_CHANGE] = "stop"
    """What to do when a checkpoint cannot be written (disk full, over quota). stop:
    stop with exit code 74. continue: print a warning and train on until the next
    one."""
    max_skipped_steps: Annotated[int, MAY_CHANGE] = 10
    """Stop with exit code 65 after this many skipped optimizer steps in a row, and save
    the batch. A step is skipped when its loss or gradients are not finite. Steps in
    which fp16 is still searching for its loss scale do not count."""
    hang_timeout: Annotated[Positive, MAY_CHANGE] = 600.0
    """Seconds without progress (a micro-batch, an evaluation batch, a part of a
    checkpoint) after which a rank counts as lost. The other ranks name it and stop with
    exit code 69."""
    data: DataConfig = field(default_factory=DataConfig)
    """The sentences."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The T5 and its latent path."""
    phase1: Phase1Config = field(default_factory=Phase1Config)
    """The autoencoder phase."""
    phase2: Phase2Config = field(default_factory=Phase2Config)
    """The VAE phase."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """The prior by flow matching."""
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    """The heads that label sentences and words."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured."""

    @property
    def conditional(self) -> bool:
        """Whether the decoder reads a condition."""
        return self.data.condition_column is not None and self.model.posterior_reads == "both"

    @property
    def phases(self) -> list[int]:
        """The phases to run; 3 is `prior`."""
        return PHASES[self.phase]

    @property
    def learned_prior(self) -> bool:
        """Whether the model has a learned prior."""
        return self.model.has_learned_prior(self.conditional)

    def check(self) -> None:
        """Raises UserError if values make no sense together."""
        data, model, latent = self.data, self.model, self.model.has_latent
        has_conditions = data.condition_column is not None
        if self.ds_config is None:
            raise UserError("--ds_config is missing: for example --ds_config zero2")
        for section in (data, model, self.phase1, self.phase2, self.prior):
            section.check()
        if 3 in self.phases and (not latent or model.discrete):
            what = f"model.family is {model.family}" if latent else "model.injection is none"
            raise UserError(f"phase {self.phase} needs a continuous latent, and {what}")
        if self.conditional and 0 < data.micro_batch_tokens < 2 * data.max_tokens:
            raise UserError(
                f"data.micro_batch_tokens ({data.micro_batch_tokens}) is less than one condition "
                f"and its sentence of data.max_tokens ({data.max_tokens}) each"
            )
        if data.tags_column is not None and has_conditions and model.posterior_reads != "both":
            raise UserError(
                "data.tags_column needs an encoder that reads the sentence: set "
                "model.posterior_reads to both"
            )
        try:
            model.check_latent(self.conditional, bool(data.label_column or data.tags_column))
        except ValueError as error:
            raise UserError(f"model.{error}") from None
        read = data.max_tokens * (2 if self.conditional else 1)
        if model.pooling == "chunks" and model.latent_vectors * model.chunk < read:
            raise UserError(
                f"{model.latent_vectors} chunks of {model.chunk} tokens are less than a text of "
                f"{read}: set model.latent_vectors to {-(-read // model.chunk)}, or less "
                f"data.max_tokens"
            )
        if model.posterior_reads != "both" and not (latent and has_conditions):
            raise UserError(
                "model.posterior_reads condition needs data.condition_column, and a latent"
            )
        draws = max(self.phase1.draws, self.phase2.draws)
        if not latent and (draws > 1 or self.phase2.beta.kind == "target"):
            raise UserError(
                "phase2.beta.kind target and several draws need a latent, and model.injection is "
                "none"
            )
        if self.eval.reconstructions and not latent:
            raise UserError(
                "eval.reconstructions needs a latent to decode, and model.injection is none"
            )
        if self.eval.noise_sentences > self.eval.reconstructions:
            raise UserError(
                f"eval.noise_sentences ({self.eval.noise_sentences}) are some of the "
                f"eval.reconstructions ({self.eval.reconstructions}): raise these"
            )
        if self.eval.noise_sentences and model.discrete:
            raise UserError("eval.noise_sentences adds noise to z, and model.family has categories")
        if self.heads.align_weight and (model.name is None or not latent):
            raise UserError(
                "heads.align_weight aligns a latent with a pretrained encoder: name a model with "
                "--model, and choose an injection other than none"
            )
        for name, phase in (("phase1", self.phase1), ("phase2", self.phase2)):
            if (phase.latent_noise or phase.latent_dropout) and (model.discrete or not latent):
                raise UserError(
                    f"{name}.latent_noise and {name}.latent_dropout change the numbers of z, and "
                    f"this model has {'categories' if latent else 'no latent'}"
                )
        if self.phase2.total_correlation and not model.discrete:
            raise UserError("phase2.total_correlation needs categories: set model.family")
        nothing_trains = not latent and not self.conditional and self.phase1.freeze_decoder
        if nothing_trains and 1 in self.phases:
            raise UserError(
                "phase1.freeze_decoder leaves nothing to train if model.injection is none: set it "
                "to false, or take --phase 2"
            )


def field_types(plain: bool = True, cls: Any = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Returns the type of every field by its dotted name, with rules and marks unless
    `plain`; sections are left out."""
    found: dict[str, Any] = {}
    for name, kind in declared(cls, plain).items():
        dotted = prefix + name
        is_section = dataclasses.is_dataclass(kind)
        found |= field_types(plain, kind, f"{dotted}.") if is_section else {dotted: kind}
    return found


def run_flags() -> dict[str, type]:
    """Returns the flags of a run, dotted and short, for a command that passes their
    values on as text: bool, which may stand without a value, or str."""
    types = field_types()
    names = {name: name for name in types} | ALIASES
    return {flag: bool if types[name] is bool else str for flag, name in names.items()}


def _marked(mark: object) -> list[str]:
    """Returns the dotted names of the fields with a mark."""
    types = field_types(plain=False)
    return [name for name, kind in types.items() if mark in typing.get_args(kind)]


ALIASES = {
    "model": "model.name",
    "batch_tokens": "data.micro_batch_tokens",
    "eval_batch_tokens": "eval.batch_tokens",
    "lora_rank": "model.lora.rank",
} | {name.rpartition(".")[2]: name for name in _marked(SHORT)}
"""Short command-line flags and the fields they set."""

RESUMABLE = _marked(MAY_CHANGE)
"""The fields that a resumed run may change. `ds_config` may change, too. It decides the
precision if `precision` is auto."""


def read(argv: Sequence[str]) -> RunConfig:
    """Returns the configuration that a command line asks for.

    Args:
        argv: `--name value` or `--name=value` pairs; `--name` alone sets a boolean.
            Names are dotted fields of `RunConfig` or `ALIASES`; `--config` takes a
            recipe's name or a YAML file; `--local_rank` (from launchers) is ignored.

    Raises:
        UserError: unknown name, wrong type, unreadable file, or values that make no
            sense together.
    """
    given = parse_flags(argv)
    config = merge(given)
    if config.phase == "prior":
        _take_latent_path(config, given)
    config.check()
    return config


def _take_latent_path(config: RunConfig, given: Iterable[str]) -> None:
    """Replaces the latent path, and the longest text, by those of the T5VAE that a prior
    is trained for, if it is in a directory. What is in the flags `given` stays."""
    path = Path(config.model.name or "", "config.json")
    if not config.model.name or not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if found.get("model_type") != "t5_vae":
        return
    for name, kind in declared(LatentConfig).items():
        if name in found and f"model.{name}" not in given:
            setattr(config.model, name, convert(found[name], kind, f"{path}: {name}"))
    if found.get("max_tokens") and "data.max_tokens" not in given:
        config.data.max_tokens = found["max_tokens"]


def merge(given: Mapping[str, str]) -> RunConfig:
    """Returns the configuration of flags from `parse_flags` and their `--config`, not
    yet checked."""
    given = dict(given)
    source = given.pop("config", DEFAULT_RECIPE)
    tree = load_tree(source)
    if "model.name" in given and "model.t5" not in given:
        # the new T5 of a recipe gives way to the pretrained one
        tree.get("model", {}).pop("t5", None)
    for name, value in given.items():
        part = tree
        *parents, last = name.split(".")
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    config = build(tree, where="command line" if given else f"--config {source}")
    if "output_dir" not in tree:
        config.output_dir = f"runs/{Path(source).stem}"
    return config


def parse_flags(argv: Sequence[str]) -> dict[str, str]:
    """Returns `--name value` pairs of a command line, with values as the strings they
    are."""
    known = set(field_types()) | set(ALIASES) | {"config", "local_rank"}
    given: dict[str, str] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"{flag!r} on the command line is not a flag: write --name value")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise UserError(f"unknown flag --{name}{did_you_mean_field(name, known)}")
        if not equals:
            if rest and (rest[0] == "--" or not rest[0].startswith("--")):  # -1 is a value
                value = rest.pop(0)
            elif field_types().get(name) is bool:
                value = "true"
            else:
                raise UserError(f"--{name} needs a value")
        name = ALIASES.get(name, name)
        if name in given:
            raise UserError(f"--{name} is given twice")
        given[name] = value
    given.pop("local_rank", None)
    return given


def choose_micro_batches(config: RunConfig, device: str) -> None:
    """Replaces a `data.micro_batch_tokens` of 0 by the number for a type of device,
    which holds at least one sentence with its condition."""
    data = config.data
    if data.micro_batch_tokens == 0:
        longest = data.max_tokens * (2 if config.conditional else 1)
        tokens = 1024 if device == "cpu" and not data.packing else 8192
        data.micro_batch_tokens = max(tokens, longest)


def load_tree(source: str) -> dict[str, Any]:
    """Returns the mapping in a recipe (by name) or in a YAML file (by path)."""
    path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        path = Path(source)
        if not path.is_file():
            names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
            raise UserError(
                f"--config {source}: no such file, and not one of the recipes {', '.join(names)}"
            )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold a mapping of fields to values")
    build(tree, where=str(path))
    return tree


def load(path: Path) -> RunConfig:
    """Returns the configuration in a config.yaml, not yet checked."""
    return build(load_tree(str(path)), where=str(path))


def build(tree: Mapping[str, Any], *, where: str) -> RunConfig:
    """Returns a RunConfig of a mapping; `where` names its source in errors."""
    return _build(RunConfig, tree, "", where)


def to_tree(config: Any) -> dict[str, Any]:
    """Returns the plain nested mapping of a configuration."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """Returns the configuration as YAML; `--config` of it repeats the run."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """Returns `field: old -> new` for every changed field that a resumed run may not
    change."""
    before, after = flatten(to_tree(old)), flatten(to_tree(new))
    names = [name for name in before | after if name not in RESUMABLE and name != "ds_config"]
    pairs = ((name, before.get(name), after.get(name)) for name in names)
    return [f"{name}: {a} -> {b}" for name, a, b in pairs if a != b]


def _build(cls: type, tree: Any, prefix: str, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.')} must hold fields, not {tree!r}")
    kinds = declared(cls)
    values = {}
    for name, value in tree.items():
        kind = kinds.get(name)
        if kind is None:
            unknown = f"{prefix}{name}"
            raise UserError(
                f"{where}: unknown field {unknown}{did_you_mean_field(unknown, field_types())}"
            )
        if dataclasses.is_dataclass(kind):
            values[name] = _build(typing.cast(type, kind), value, f"{prefix}{name}.", where)
        else:
            values[name] = convert(value, kind, f"{where}: {prefix}{name}")
    return cls(**values)


def convert(value: Any, kind: Any, where: str) -> Any:
    """Returns `value` (of YAML or a command line) as `kind`; `where` names its place in
    the UserError of a value that does not fit."""
    try:
        return settings.convert(value, kind, where)
    except ValueError as error:
        raise UserError(str(error)) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a nested mapping by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def did_you_mean_field(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean X?` for an unknown dotted name, or nothing; by the last
    part first."""
    known, last = sorted(known), name.rsplit(".", 1)[-1]
    by_last_part = {each.rsplit(".", 1)[-1]: each for each in reversed(known)}
    close = by_last_part.get(last) or nearest(name, known)
    close = close or by_last_part.get(nearest(last, by_last_part) or "")
    return f"; did you mean {close}?" if close else ""
