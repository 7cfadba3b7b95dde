"""RunConfig and its parts: the settings of a run, how they are read, checked and printed.

A value comes from the defaults here, from a recipe or a file (`--config`), or from the
command line; the later of these wins. Unknown names and wrong types are errors that name
the nearest known one.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dsvae.errors import UserError, did_you_mean, nearest

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "quickstart"


@dataclass
class DataConfig:
    """Where the sentences come from, and how they are batched."""

    train_file: str | None = None
    """Training sentences: .txt (one per line), .jsonl (one object per line), .csv, .tsv
    (without quoting) or .parquet. Without it and without `dataset`, the run uses the
    built-in corpus. With `data.weights`, several files, separated by commas."""
    weights: list[float] = field(default_factory=list)
    """Mix several training files: one weight per file. Each file's share of every step is
    its share of the weights, in expectation. Empty: `train_file` is one file."""
    valid_file: str | None = None
    """Validation sentences. Without it, 5% of the training sentences are held out, at
    most 5,000."""
    test_file: str | None = None
    """Test sentences. Without it, 5% of the training sentences are held out, at most
    5,000."""
    dataset: str | None = None
    """A hub data set instead of files: ID or ID:CONFIG. Its own train, validation and
    test splits are used."""
    streaming: bool = False
    """Read the hub data set from the network as a stream, and never download its files.
    Only what is read is tokenized and cached: see `max_sentences`."""
    max_sentences: int = 0
    """Read at most the first N sentences of every file or split of the source. 0: all."""
    text_column: str = "text"
    """The column that contains the sentence, in .jsonl, .csv, .tsv, .parquet and hub
    data sets."""
    condition_column: str | None = None
    """The column that contains the condition of each sentence: a text that the sentence
    is generated from. It needs a kind of file with columns, or a hub data set. Without
    it, sentences have no conditions."""
    label_column: str | None = None
    """The column that contains the label of each sentence: a text, a number, or true or
    false. Records may have none (null or empty)."""
    tags_column: str | None = None
    """The column that contains one tag per whitespace word: a list in .jsonl and
    .parquet, separated by white space in .csv and .tsv. Records may have none (null or
    empty). It needs a fast tokenizer, which ByT5 lacks."""
    deduplicate: bool = False
    """Drop the training sentences that are also validation or test sentences, with the same
    condition where they have one. Sentences that occur several times in one split stay:
    they say how common each is."""
    builtin_size: int = 20_000
    """Number of sentences of the built-in corpus: training, validation and test
    together."""
    builtin_seed: int = 0
    """Seed of the built-in corpus."""
    max_tokens: int = 64
    """Longest sentence (and longest condition) in tokens, EOS included. Longer ones are
    truncated, counted and reported."""
    batch_size: int = 128
    """Sentences per optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: int = 8192
    """Most padded tokens per forward pass on one rank. A step is cut into as many
    micro-batches as that takes. A smaller number means less padding, because sentences
    of similar length share a micro-batch, and more passes. 0: 1024 on a CPU, where less
    padding counts, and 8192 on a GPU, where fewer passes do."""
    cache_dir: str | None = None
    """Directory where tokenized corpora are cached by content. Without it, `dsvae`
    inside the cache directory of `datasets`."""


@dataclass
class LoraConfig:
    """Low-rank adapters of the T5 (LoRA, Hu et al. 2021). With them the T5 is frozen in both
    phases, and the adapters and the latent path train."""

    rank: int = 0
    """Rank r of the adapters. 0: no adapters, and the whole T5 trains."""
    alpha: float = 16.0
    """The change of a matrix is alpha / r times the product of its adapter."""
    targets: list[Literal["q", "k", "v", "o", "wi", "wo"]] = field(
        default_factory=lambda: ["q", "v"]
    )
    """The projections that have adapters: q, k, v and o of every attention, wi and wo of
    every feed-forward."""


@dataclass
class ModelConfig:
    """Which T5, and which latent path is added to it."""

    name: str | None = None
    """A pretrained T5, mT5, umT5, ByT5 or T5VAE: a hub id or a directory. Without it, a
    new T5 is made from `t5`."""
    t5: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' T5 configuration for a new T5. `model_type` may be t5,
    mt5 or umt5."""
    vocab_size: int = 4256
    """Pieces of the tokenizer that is trained on the corpus for a new T5, at least 260.
    They include the 256 bytes that spell every character without a piece."""
    dropout: float | None = None
    """Dropout rate of the T5. Without it, the model's own."""
    family: Literal["gaussian", "spike_slab", "categorical"] = "gaussian"
    """What z is. gaussian: a diagonal Gaussian. spike_slab: a sparse vector (Prokhorov
    et al. 2021). categorical: variables of `categories` values each."""
    latent_dim: int = 32
    """Number of units of the latent: dimensions of z, or categorical variables."""
    categories: int = 16
    """Number of values of each variable, for the categorical family."""
    spike_prior: list[float] = field(default_factory=lambda: [4.0, 1.0])
    """The numbers a and b of the prior Beta(a, b) of the spike's weight, for the
    spike_slab family. With (4, 1), a unit is off in four of five sentences."""
    prior: Literal["learned", "fixed"] | None = None
    """What z is compared with. fixed: one p(z) for all sentences. learned: p(z|c) of the
    sentence's condition (Fang et al. 2021). Without it, learned where
    `data.condition_column` is given, and fixed otherwise."""
    pooling: Literal["mean", "max", "first", "attention"] = "mean"
    """How the encoder's states become one vector."""
    posterior_reads: Literal["both", "condition"] = "both"
    """What the encoder makes z of, where there are conditions. both: the condition and the
    sentence; the decoder reads the condition and z. condition: the condition alone; the
    decoder reads z alone, so that z has to say what of the condition the sentence needs.
    Without conditions z is made of the sentence."""
    clusters: int = 0
    """Number of clusters of sentences, through which the posterior reads a sentence
    (after Yuan & Eldardiry 2021). 0: none."""
    injection: Literal["memory", "embedding", "both", "cross", "none"] = "memory"
    """How z enters the decoder. memory: slots in self-attention. embedding: added to its
    input. both: these two. cross: vectors for its pretrained cross-attention, before the
    condition where there is one. With none, the model has no latent: it is a language
    model of the same decoder without encoder, or a plain T5 where sentences have
    conditions."""
    memory_slots: int = 1
    """Key/value slots per decoder layer, for injection by memory. Vectors that z becomes,
    for cross: with one, every position reads the same; with more it can choose."""
    gradient_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass. It saves memory and
    takes about a third more time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters that train in place of the T5."""


@dataclass
class BetaConfig:
    """Weight of the KL term by optimizer step of the phase (see
    `dsvae.objective.schedules`)."""

    kind: Literal["constant", "linear", "cyclic", "target"] = "linear"
    """How beta moves. constant: `max` throughout. linear: one rise over the phase.
    cyclic: `cycles` equal rises (Fu et al. 2019). target: beta moves until the KL is
    `target`."""
    max: float = 1.0
    """The largest value of beta."""
    target: float | None = None
    """The KL to hold in nats per sentence, for kind target."""
    gain: float = 1e-3
    """How much beta moves per step and per nat of distance from the target."""
    zero: float = 0.0
    """Share of the phase (or of each cycle) during which beta stays at 0 before it
    rises."""
    rise: float = 0.5
    """Share of the phase (or of each cycle) over which beta rises from 0 to `max`. It
    stays there for the rest."""
    cycles: int = 4
    """Number of cycles, for kind cyclic."""


@dataclass
class PhaseConfig:
    """Optimization of one phase: AdamW, gradient clipping, a learning-rate schedule, and
    the encoder's input noise."""

    steps: int = 1000
    """Number of optimizer steps."""
    lr: float = 1e-4
    """Peak learning rate."""
    lr_scale: Literal["none", "rms"] = "none"
    """What the learning rate of a tensor is multiplied by. none: nothing. rms: the root
    mean square of the tensor when the phase starts, at least 0.001, as in Adafactor, which
    trained T5. The rate is then a share of a tensor's size: 0.02 and not 0.003."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: it stays constant, or falls to
    zero along a line or a cosine. The step after the last one would have zero."""
    lr_decay: float = 1.0
    """Share of the steps after the warm-up, the last ones, in which a linear or cosine
    schedule falls. Before them the learning rate is constant."""
    warmup_steps: int = 0
    """Number of steps over which the learning rate rises linearly. The first step is
    already above 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices. Norms, biases, embeddings and position biases
    have none."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's beta1 and beta2."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip gradients to this global norm. 0: do not clip."""
    draws: int = 1
    """Draw z this many times per sentence and train on the draw with the best
    reconstruction (speculative sampling, Sato et al. 2021). The logged training rec is
    then too good by up to ln(draws). Evaluation always draws once."""
    skewness: float = 0.01
    """Weight of the mean entropy of a sentence's cluster in nats, where
    `model.clusters` is set: it wants each sentence decided."""
    dispersion: float = 0.02
    """Weight of the negative entropy of the mean cluster of the global batch in nats,
    where `model.clusters` is set: it wants all clusters used."""
    deletion: float = 0.0
    """Share of tokens that are deleted from the encoder's input during training: of the
    sentence, or of the condition where `model.posterior_reads` is condition. EOS is never
    deleted, and the decoder's side stays clean."""


@dataclass
class Phase1Config(PhaseConfig):
    """Phase 1: a plain autoencoder, no KL term."""

    sample_latent: bool = True
    """Decode a sample of q(z|x) (true) or its mean (false)."""
    freeze_decoder: bool = False
    """Train only the encoder and the latent path (posterior and injection)."""


@dataclass
class Phase2Config(PhaseConfig):
    """Phase 2: everything trains, with the KL term."""

    beta: BetaConfig = field(default_factory=BetaConfig)
    """Weight of the KL term."""
    length_weighted: bool = False
    """Divide the reconstruction of each sentence by its predicted tokens, EOS included, as
    the published command of Optimus does. A beta of 1 is then about as strong as a beta
    of one sentence's length without it. The logged rec stays in nats per sentence."""
    free_bits: float = 0.0
    """KL threshold in nats. Below it, the KL has no gradient. 0: no threshold."""
    release: float = 0.0
    """Share of the phase at its end in which `free_bits` is off. The KL then falls to what
    the decoder has use for."""
    total_correlation: float = 0.0
    """Weight of the pairwise total correlation of the variables, for the categorical
    family. It adds to the share that is already part of the KL."""
    free_bits_mode: Literal["dimension", "total", "sentence"] = "dimension"
    """What `free_bits` applies to. dimension: the mean KL of each unit over the global
    batch. total: the mean of their sum. sentence: the KL of each unit of each sentence,
    as in the code of Optimus and of Park & Lee."""


@dataclass
class HeadsConfig:
    """Weights of the heads that label sentences, in both phases. Their losses are in nats
    per sentence, and sentences without labels count with 0."""

    class_weight: float = 1.0
    """Weight of -log p of the label of a sentence, where `data.label_column` is given. 0:
    no head, and the labels only measure what the model found without them."""
    tag_weight: float = 1.0
    """Weight of -log p of the tags of a sentence, where `data.tags_column` is given. 0: no
    head."""


@dataclass
class EvalConfig:
    """Evaluation on validation text while training, and on test text at the end."""

    samples: int = 1
    """Samples of z per sentence for `rec`."""
    iw_samples: int = 10
    """Samples of z per sentence for the importance-weighted bound `nll_iw` of the final
    evaluation. 0: do not measure it."""
    batch_tokens: int = 16384
    """Most padded tokens per forward pass on one rank."""
    sentences: int = 5000
    """Use at most this many validation sentences during training. The final evaluation
    uses all."""
    shown: int = 8
    """Number of reconstructions and prior samples written as text at every
    evaluation."""


@dataclass
class RunConfig:
    """A whole run."""

    ds_config: str | None = None
    """DeepSpeed configuration file (JSON). Values that are `auto` are filled in from
    this configuration."""
    output_dir: str = "runs/dsvae"
    """Directory that the run writes everything to."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in output_dir, if there is
    one. never: start afresh, and refuse an output_dir with a checkpoint. DIR: start
    from the newest complete checkpoint of that run; once output_dir contains
    checkpoints of its own run, behave like auto."""
    phase: Literal["all", "1", "2"] = "all"
    """Which phases to run. 2 alone starts from output_dir/phase1/model if it exists,
    otherwise from the model itself."""
    seed: int = 0
    """Seed of everything random, 0 to 2^53: initialization, order of the sentences,
    deletion noise, z, dropout."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Fills `bf16.enabled`, `fp16.enabled` and `torch_autocast.enabled` where the
    ds_config says auto. auto: bf16."""
    compile: bool = False
    """Compile the training passes (torch.compile). It takes half a minute to a few minutes
    at the start of each phase, and makes steps faster. Not at ZeRO 3."""
    log_every: int = 10
    """Log every N optimizer steps."""
    verbose: bool = False
    """Print the resolved DeepSpeed configuration of each phase. Either way it is
    written to output_dir/ds_config.phase1.json and ds_config.phase2.json."""
    eval_every: int = 500
    """Evaluate on validation text every N optimizer steps. 0: only at the end of each
    phase."""
    checkpoint_every: int = 500
    """Save a checkpoint every N optimizer steps. 0: only at the end of each phase."""
    keep_checkpoints: int = 2
    """Keep the newest N complete checkpoints."""
    keep_best: bool = True
    """Also keep the best checkpoint of the running phase: the one with the smallest rec
    (phase 1) or rec + kl (phase 2) on validation text, among those saved at a step with
    an evaluation."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written (disk full, over quota). stop:
    stop with exit code 74. continue: print a warning and train on until the next
    one."""
    max_skipped_steps: int = 10
    """Stop with exit code 65 after this many skipped optimizer steps in a row, and save
    the batch. A step is skipped when its loss or gradients are not finite. Steps in
    which fp16 is still searching for its loss scale do not count."""
    hang_timeout: float = 600.0
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
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    """The heads that label sentences and words."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured."""

    @property
    def conditional(self) -> bool:
        """Whether the decoder reads a condition."""
        return self.data.condition_column is not None and self.model.posterior_reads == "both"

    @property
    def learned_prior(self) -> bool:
        """Whether the model has a learned prior."""
        has_latent = self.model.injection != "none"
        return self.conditional and has_latent and self.model.prior != "fixed"


ALIASES = {
    "model": "model.name",
    "injection": "model.injection",
    "latent_dim": "model.latent_dim",
    "pooling": "model.pooling",
    "train_file": "data.train_file",
    "valid_file": "data.valid_file",
    "test_file": "data.test_file",
    "dataset": "data.dataset",
    "text_column": "data.text_column",
    "condition_column": "data.condition_column",
    "label_column": "data.label_column",
    "tags_column": "data.tags_column",
}
"""Short command-line flags and the fields they set."""

RESUMABLE = (
    "output_dir",
    "resume",
    "phase",
    "log_every",
    "verbose",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "on_save_error",
    "max_skipped_steps",
    "hang_timeout",
    "data.cache_dir",
    "precision",
    "compile",
)
"""Fields that a resumed run may change, because they do not affect what is learned.
`ds_config` may change, too. It decides the precision where `precision` is auto."""


def read(argv: Sequence[str]) -> RunConfig:
    """The configuration that a command line asks for.

    Args:
        argv: `--name value` or `--name=value` pairs; `--name` alone sets a boolean.
            Names are dotted fields of `RunConfig` or `ALIASES`; `--config` takes a
            recipe's name or a YAML file; `--local_rank` (from launchers) is ignored.

    Raises:
        UserError: unknown name, wrong type, unreadable file, or values that make no
            sense together.
    """
    config = merge(parse_flags(argv))
    check(config)
    return config


def merge(given: Mapping[str, str]) -> RunConfig:
    """The configuration of flags from `parse_flags` and their `--config`, not yet
    checked."""
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
    """`--name value` pairs of a command line, with values as the strings they are."""
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
    """Replaces a `data.micro_batch_tokens` of 0 by the number for a type of device, which
    holds at least one sentence with its condition."""
    data = config.data
    if data.micro_batch_tokens == 0:
        longest = data.max_tokens * (2 if config.conditional else 1)
        data.micro_batch_tokens = max(1024 if device == "cpu" else 8192, longest)


def load_tree(source: str) -> dict[str, Any]:
    """The mapping in a recipe (by name) or in a YAML file (by path)."""
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
    """The configuration in a config.yaml, not yet checked."""
    return build(load_tree(str(path)), where=str(path))


def build(tree: Mapping[str, Any], *, where: str) -> RunConfig:
    """A RunConfig of a mapping; `where` names its source in errors."""
    return _build(RunConfig, tree, "", where)


def to_tree(config: Any) -> dict[str, Any]:
    """The plain nested mapping of a configuration."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML; `--config` of it repeats the run."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """`field: old -> new` for every changed field that a resumed run may not change."""
    before, after = flatten(to_tree(old)), flatten(to_tree(new))
    names = [name for name in before | after if name not in RESUMABLE and name != "ds_config"]
    pairs = ((name, before.get(name), after.get(name)) for name in names)
    return [f"{name}: {a} -> {b}" for name, a, b in pairs if a != b]


_LEAST = {
    "log_every keep_checkpoints data.batch_size data.builtin_size": 1,
    "model.latent_dim model.memory_slots model.vocab_size": 1,
    "eval.samples eval.batch_tokens eval.sentences": 1,
    "phase1.draws phase2.draws phase2.beta.cycles": 1,
    "model.categories": 2,
    "eval_every checkpoint_every eval.iw_samples eval.shown": 0,
    "phase1.max_grad_norm phase1.weight_decay phase1.adam_eps": 0,
    "phase2.max_grad_norm phase2.weight_decay phase2.adam_eps": 0,
    "phase2.beta.max phase2.free_bits phase2.total_correlation model.clusters": 0,
    "model.lora.rank data.max_sentences data.micro_batch_tokens": 0,
    "heads.class_weight heads.tag_weight": 0,
    "phase1.skewness phase1.dispersion phase2.skewness phase2.dispersion": 0,
}
"""Fields, separated by spaces, and their least value."""


def check(config: RunConfig) -> None:
    """Raises UserError where values make no sense, alone or together."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    data, model, beta = config.data, config.model, config.phase2.beta
    latent = model.injection != "none"
    need(
        config.ds_config is not None,
        "--ds_config is missing: for example --ds_config ds_configs/zero2.json",
    )
    values = flatten(to_tree(config))
    for names, least in _LEAST.items():
        bound = f"be at least {least}" if least else "not be negative"
        for name in names.split():
            every = " (0: only at the end of each phase)" if name.endswith("_every") else ""
            need(values[name] >= least, f"{name} must {bound}{'' if least else every}")
    # Two phases and a purpose are packed with the seed into 64 bits.
    for name in ("seed", "data.builtin_seed"):
        need(0 <= values[name] <= 2**53, f"{name} must lie between 0 and 2^53, not {values[name]}")
    need(bool(config.output_dir.strip()), "output_dir is empty: name a directory")
    need(config.hang_timeout > 0, f"hang_timeout must be positive, not {config.hang_timeout:g}")
    need(data.max_tokens >= 2, "data.max_tokens must be at least 2: one token and EOS")
    need(
        data.micro_batch_tokens >= data.max_tokens or data.micro_batch_tokens == 0,
        f"data.micro_batch_tokens ({data.micro_batch_tokens}) is less than one sentence of "
        f"data.max_tokens ({data.max_tokens})",
    )
    need(
        data.condition_column is None
        or model.posterior_reads != "both"
        or data.micro_batch_tokens >= 2 * data.max_tokens
        or data.micro_batch_tokens == 0,
        f"data.micro_batch_tokens ({data.micro_batch_tokens}) is less than one condition "
        f"and its sentence of data.max_tokens ({data.max_tokens}) each",
    )
    need(
        data.tags_column is None
        or data.condition_column is None
        or model.posterior_reads == "both",
        "data.tags_column needs an encoder that reads the sentence: set model.posterior_reads to "
        "both",
    )
    need(
        not data.streaming or data.dataset is not None,
        "data.streaming reads a hub data set: name it with --dataset",
    )
    files = [] if data.train_file is None else data.train_file.split(",")
    need(
        not data.weights or len(data.weights) == len(files),
        f"--train_file names {len(files)} files and data.weights has {len(data.weights)}: give one "
        f"weight per file, and separate the files by commas",
    )
    need(all(weight > 0 for weight in data.weights), "data.weights must be positive")
    labelled = data.label_column is not None or data.tags_column is not None
    need(
        latent or not (labelled or model.clusters),
        "labels, tags and clusters need an encoder that reads the sentence: choose a "
        "model.injection other than none",
    )
    need(
        model.posterior_reads == "both" or latent and data.condition_column is not None,
        "model.posterior_reads condition needs data.condition_column, and a latent",
    )
    need(
        model.lora.rank == 0 or model.name is not None,
        "model.lora.rank freezes the T5, and a new one would learn nothing: name a pretrained "
        "one with --model",
    )
    need(
        model.lora.alpha > 0 and bool(model.lora.targets),
        "model.lora.alpha must be positive, and model.lora.targets not empty",
    )
    need(model.clusters != 1, "model.clusters must be 0 (none) or at least 2")
    need(
        len(model.spike_prior) == 2 and all(0.5 < each <= 100 for each in model.spike_prior),
        "model.spike_prior must be two numbers above 0.5 and at most 100",
    )
    need(
        latent or model.family == "gaussian",
        f"model.family {model.family} needs a latent, and model.injection none has no latent",
    )
    need(
        config.phase1.draws == 1 or config.phase1.sample_latent,
        "phase1.draws needs phase1.sample_latent: without it nothing is drawn",
    )
    need(
        model.prior != "learned" or config.learned_prior,
        "model.prior learned needs conditions, and a latent: set data.condition_column, and a "
        "model.injection other than none",
    )
    need(
        latent or config.phase1.draws == config.phase2.draws == 1 and beta.kind != "target",
        "phase2.beta.kind target and several draws need a latent, and model.injection is none",
    )
    need(
        config.phase2.total_correlation == 0 or model.family == "categorical",
        "phase2.total_correlation needs model.family categorical",
    )
    need(
        model.name is None or not model.t5,
        f"model.name ({model.name}) and model.t5 are both given: a pretrained T5 has its own "
        f"configuration",
    )
    need(model.dropout is None or 0 <= model.dropout < 1, "model.dropout must be in [0, 1)")
    for name, phase in (("phase1", config.phase1), ("phase2", config.phase2)):
        need(
            phase.steps >= 1,
            f"{name}.steps must be at least 1 (to leave a phase out: --phase 1 or --phase 2)",
        )
        need(phase.lr > 0, f"{name}.lr must be positive")
        need(
            0 <= phase.warmup_steps <= phase.steps,
            f"{name}.warmup_steps ({phase.warmup_steps}) must lie between 0 and {name}.steps "
            f"({phase.steps})",
        )
        need(0 < phase.lr_decay <= 1, f"{name}.lr_decay is a share of the steps, in (0, 1]")
        need(
            phase.lr_decay == 1 or phase.lr_schedule != "constant",
            f"{name}.lr_decay needs {name}.lr_schedule linear or cosine",
        )
        need(
            0 <= phase.deletion < 1,
            f"{name}.deletion is a share of the tokens and must be in [0, 1)",
        )
        need(
            len(phase.adam_betas) == 2 and all(0 <= beta < 1 for beta in phase.adam_betas),
            f"{name}.adam_betas must be two numbers in [0, 1)",
        )
    need(
        latent or config.conditional or not config.phase1.freeze_decoder or config.phase == "2",
        "phase1.freeze_decoder leaves nothing to train where model.injection is none: set it to "
        "false, or take --phase 2",
    )
    need(
        beta.zero >= 0 and beta.rise >= 0 and beta.zero + beta.rise <= 1,
        "phase2.beta.zero and phase2.beta.rise are shares: not negative, and at most 1 together",
    )
    need(
        (beta.kind == "target") == (beta.target is not None),
        "phase2.beta.kind target and phase2.beta.target (nats per sentence) go together",
    )
    need(
        beta.target is None or beta.target > 0 and beta.gain > 0,
        "phase2.beta.target and phase2.beta.gain must be positive",
    )
    need(
        beta.kind != "target" or config.phase2.free_bits == 0,
        "phase2.free_bits holds the KL up, and phase2.beta.kind target holds it at a value: "
        "use one of them",
    )
    need(0 <= config.phase2.release < 1, "phase2.release is a share of the steps, in [0, 1)")
    need(
        config.phase2.release == 0 or config.phase2.free_bits > 0,
        "phase2.release turns phase2.free_bits off, which is 0: set both, or neither",
    )
    need(
        beta.kind != "cyclic" or beta.cycles <= config.phase2.steps,
        f"phase2.beta.cycles ({beta.cycles}) must not exceed phase2.steps ({config.phase2.steps})",
    )


_EXAMPLES = {list: "a list such as [1, 2]", dict: "a dict such as {a: 1}"}


def field_types(cls: Any = RunConfig, prefix: str = "") -> dict[str, Any]:
    """The type of every field by its dotted name, nested configurations left out."""
    types_by_name: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            types_by_name |= field_types(kind, f"{prefix}{name}.")
        else:
            types_by_name[prefix + name] = kind
    return types_by_name


def _build(cls: type, tree: Any, prefix: str, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.')} must hold fields, not {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        if name not in hints:
            known = field_types()
            raise UserError(
                f"{where}: unknown field {prefix}{name}"
                f"{did_you_mean_field(f'{prefix}{name}', known)}"
            )
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(typing.cast(type, hints[name]), value, f"{prefix}{name}.", where)
        else:
            values[name] = convert(value, hints[name], f"{where}: {prefix}{name}")
    return cls(**values)


def without_none(kind: Any) -> Any:
    """X of an annotation `X | None`; any other as it is."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(each for each in typing.get_args(kind) if each is not type(None))
    return kind


def convert(value: Any, kind: Any, where: str) -> Any:
    """`value` (of YAML or a command line) as `kind`; `where` names its place in the
    UserError of a value that does not fit."""
    if kind != without_none(kind):
        if value is None or isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        return convert(value, without_none(kind), where)
    arguments, container = typing.get_args(kind), typing.get_origin(kind) or kind
    if container is Literal:
        if str(value) not in arguments:
            raise UserError(
                f"{where} is {value!r}, not one of {', '.join(arguments)}"
                f"{did_you_mean(str(value), arguments)}"
            )
        return str(value)
    if container in _EXAMPLES:
        if isinstance(value, str):
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError:
                raise UserError(f"{where} is not valid YAML: {value!r}") from None
        if not isinstance(value, container):
            raise UserError(f"{where} must be {_EXAMPLES[container]}, not {value!r}")
        if container is list and arguments:
            return [convert(each, arguments[0], where) for each in value]
        return value
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false, not {value!r}")
        return value
    if kind is str:
        if value is None or isinstance(value, (dict, list)):
            raise UserError(f"{where} must be text, not {value!r}")
        return str(value)
    try:
        number = kind(float(value))
        if isinstance(value, bool) or number != float(value) or not math.isfinite(number):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{where} must be {'a whole' if kind is int else 'a'} number, not {value!r}"
        ) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def did_you_mean_field(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean X?` for an unknown dotted name, or nothing; by the last part
    first."""
    known, last = sorted(known), name.rsplit(".", 1)[-1]
    by_last_part = {each.rsplit(".", 1)[-1]: each for each in reversed(known)}
    close = by_last_part.get(last) or nearest(name, known)
    close = close or by_last_part.get(nearest(last, by_last_part) or "")
    return f"; did you mean {close}?" if close else ""
