"""The configuration: what a command line, a recipe and a file give, and what is
refused."""

import ast
import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import yaml

import dsvae
from dsvae import config as configuration
from dsvae.config import (
    ALIASES,
    RECIPES,
    BetaConfig,
    DataConfig,
    RunConfig,
    build,
    difference,
    load_tree,
    parse_flags,
    read,
    to_yaml,
)
from dsvae.errors import UserError
from dsvae.modeling.families import FAMILIES
from dsvae.modeling.injection import INJECTIONS
from dsvae.modeling.settings import unread

DS = ["--ds_config", "ds_configs/zero2.json"]
RECIPE_FILES = sorted(RECIPES.glob("*.yaml"))


def leaves(tree, prefix=""):
    """dotted name -> value; `model.t5`, a free mapping, is one leaf."""
    for name, value in tree.items():
        if isinstance(value, dict) and prefix + name != "model.t5":
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def value_at(config, dotted):
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def file_with(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    path = file_with(
        tmp_path, "data: {batch_size: 7, max_tokens: 9}\nphase2: {beta: {max: 0.25}}\n"
    )
    config = read(
        [*DS, "--config", path, "--data.max_tokens", "11", "--phase2.beta.kind", "cyclic"]
    )
    assert (config.data.batch_size, config.data.max_tokens) == (7, 11)
    assert config.phase2.beta == BetaConfig(kind="cyclic", max=0.25)
    assert config.phase1 == RunConfig().phase1  # of the quickstart recipe nothing remains


def test_without_config_it_is_the_quickstart(tmp_path):
    assert read(DS) == read([*DS, "--config", "quickstart"])
    assert read(DS) != read([*DS, "--config", file_with(tmp_path, "")])


def test_output_dir_is_named_after_the_recipe_unless_given(tmp_path):
    assert read([*DS, "--config", "yelp_cpu"]).output_dir == "runs/yelp_cpu"
    assert read(DS).output_dir == "runs/quickstart"
    assert read([*DS, "--output_dir", "here"]).output_dir == "here"
    assert read([*DS, "--config", file_with(tmp_path, "output_dir: there")]).output_dir == "there"


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_an_alias_sets_its_field(alias):
    kind = configuration.field_types()[ALIASES[alias]]
    value = {"injection": "both", "pooling": "max"}.get(alias, "xyz")
    value = {int: "640", bool: "True"}.get(kind, value)
    # adapters need a pretrained model, and a long sentence needs room in a micro-batch
    flags = {"model": "t5-small", "batch_tokens": "640"} | {alias: value}
    if alias == "latent_vectors":
        flags["pooling"] = "queries"
    words = (f"--{name}={each}" for name, each in flags.items())
    config = read([*DS, "--config", "park2021", *words])
    assert str(value_at(config, ALIASES[alias])) == value


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--seed=4"], "seed", 4),
        (["--phase1.freeze_decoder"], "phase1.freeze_decoder", True),
        (["--phase1.freeze_decoder", "--seed", "1"], "phase1.freeze_decoder", True),
        (["--phase1.sample_latent", "false"], "phase1.sample_latent", False),
        (["--phase1.sample_latent=False"], "phase1.sample_latent", False),
        (["--phase2.lr", "3e-4"], "phase2.lr", 3e-4),
        (["--phase2.free-bits", "0.5"], "phase2.free_bits", 0.5),
        (["--data.train_file", "my file.txt"], "data.train_file", "my file.txt"),
        (["--data.train_file", "a=b'\"c.txt"], "data.train_file", "a=b'\"c.txt"),
        (["--data.train_file=a=b.txt"], "data.train_file", "a=b.txt"),
        (["--data.train_file=--odd.txt"], "data.train_file", "--odd.txt"),
        (["--data.train_file", "-"], "data.train_file", "-"),
        (["--data.train_file", "007"], "data.train_file", "007"),
        (["--model.dropout", "none"], "model.dropout", None),
        (["--model.dropout", "0.2"], "model.dropout", 0.2),
        (["--phase1.adam_betas", "[0.8, 1e-1]"], "phase1.adam_betas", [0.8, 0.1]),
        (
            ["--model.t5", "{d_model: 8, feed_forward_proj: relu}"],
            "model.t5",
            {"d_model": 8, "feed_forward_proj": "relu"},
        ),
        (["--phase", "1"], "phase", "1"),
        (["--local_rank=3", "--seed", "2"], "seed", 2),
    ],
)
def test_flags(argv, name, value):
    got = value_at(read([*DS, *argv]), name)
    assert got == value
    assert type(got) is type(value)


def test_a_negative_number_is_a_value_and_no_flag():
    assert parse_flags(["--phase1.lr", "-1e-3", "--seed", "-1"]) == {
        "phase1.lr": "-1e-3",
        "seed": "-1",
    }
    with pytest.raises(UserError, match=r"phase1\.lr must be positive"):
        read([*DS, "--phase1.lr", "-1e-3"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--phase1.stepz", "3"], r"unknown flag --phase1.stepz; did you mean phase1\.steps\?"),
        (["--free_bits", "3"], r"did you mean phase2\.free_bits\?"),
        (["--latentdim", "3"], r"did you mean latent_dim\?"),
        (["--model.t5.d_model", "3"], "unknown flag"),
        (["--data", "3"], "unknown flag --data"),
        (["--qqqqqqqq", "3"], "unknown flag --qqqqqqqq$"),
        (["seed", "3"], "'seed' on the command line is not a flag"),
        (["--seed", "1", "2"], "'2' on the command line is not a flag"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--phase", "1"], "--seed needs a value"),
        (["--seed", "1", "--seed=2"], "--seed is given twice"),
        (["--seed", "x"], "seed must be a whole number, not 'x'"),
        (["--seed", "1.5"], "seed must be a whole number"),
        (["--phase2.lr", "fast"], r"phase2\.lr must be a number, not 'fast'"),
        (["--phase2.lr", "nan"], r"phase2\.lr must be a number"),
        (["--phase2.lr", "inf"], r"phase2\.lr must be a number"),
        (["--phase1.freeze_decoder", "maybe"], r"phase1\.freeze_decoder must be true or false"),
        (
            ["--pooling", "median"],
            r"model\.pooling is 'median', not one of mean, max, first, attention",
        ),
        (["--phase1.adam_betas", "0.9"], r"phase1\.adam_betas must be a list"),
        (["--phase1.adam_betas", "[a, b]"], r"phase1\.adam_betas must be a number"),
        (["--model.t5", "{d_model"], r"model\.t5 is not valid YAML"),
        (["--eval.noise_sentences", "9"], r"eval\.noise_sentences \(9\).*reconstructions \(0\)"),
        (["--injection", "none", "--eval.reconstructions", "1"], "reconstructions needs a latent"),
        (
            ["--model.family", "categorical", "--eval.reconstructions", "9"]
            + ["--eval.noise_sentences", "9"],
            "model.family has categories",
        ),
        (
            ["--config", "quickstrat"],
            "quickstrat: no such file, and not one of the recipes .*quickstart",
        ),
    ],
)
def test_bad_flags_are_named(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        read([*DS, *argv])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phase1: {stepz: 3}", r"unknown field phase1\.stepz; did you mean phase1\.steps\?"),
        ("steps: 3", r"unknown field steps; did you mean phase1\.steps\?"),
        ("phase1: 3", "phase1 must hold fields"),
        ("phase1:", "phase1 must hold fields"),
        ("seed: two", "seed must be a whole number, not 'two'"),
        ("seed: true", "seed must be a whole number"),
        ("seed:", "seed must be a whole number"),
        ("phase1: {freeze_decoder: 1}", r"phase1\.freeze_decoder must be true or false"),
        ("phase1: {adam_betas: {a: 1}}", r"phase1\.adam_betas must be a list"),
        ("model: {t5: [1]}", r"model\.t5 must be a dict"),
        ("- 1\n- 2", "must hold a mapping"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_faults_of_a_file_name_file_and_field(tmp_path, text, message):
    path = file_with(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        read([*DS, "--config", path])
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"output_dir: \xff\xfe")
    with pytest.raises(UserError, match="run.yaml: not valid YAML"):
        read([*DS, "--config", str(tmp_path / "run.yaml")])


def test_numbers_as_people_write_them_in_yaml(tmp_path):
    """YAML 1.1 takes 1e-4 for a string."""
    assert yaml.safe_load("1e-4") == "1e-4"
    config = read(
        [
            *DS,
            "--config",
            file_with(
                tmp_path, "phase1: {lr: 1e-4, steps: 20.0, adam_eps: 1E-6}\nphase2: {lr: 1}\n"
            ),
        ]
    )
    assert (config.phase1.lr, config.phase1.steps, config.phase1.adam_eps, config.phase2.lr) == (
        1e-4,
        20,
        1e-6,
        1.0,
    )
    assert isinstance(config.phase1.steps, int)
    assert isinstance(config.phase2.lr, float)


def test_config_yaml_gives_the_same_run_again(tmp_path):
    argv = [
        *DS,
        "--output_dir",
        "out: x",
        "--phase",
        "2",
        "--train_file",
        "a 'b' \"ü\".txt",
        "--phase2.lr",
        "1e-05",
        "--phase1.adam_betas",
        "[0.5, 0.6]",
        "--phase1.freeze_decoder",
        "--model.dropout",
        "0.1",
        "--text_column",
        "no",
    ]
    config = read(argv)
    again = read(["--config", file_with(tmp_path, to_yaml(config))])
    assert again == config
    assert again.phase == "2"
    assert again.data.text_column == "no"


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_all_that_it_says_arrives(path):
    config = read([*DS, "--config", path.stem])
    said = dict(leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert said
    for name, value in said.items():
        assert value_at(config, name) == value, name
    assert read([*DS, "--config", str(path)]) == config  # by its path, too


def test_recipes_are_shipped():
    assert {path.stem for path in RECIPE_FILES} >= {"quickstart", "park2021", "optimus"}


def test_the_recipes_that_are_compared_differ_in_what_they_are_compared_for():
    """The pages of docs/results read the effect of one change off them."""

    def recipe(name):
        return dict(leaves(load_tree(name)))

    free_bits = {"phase2.free_bits": 0.5}
    assert recipe("one_phase_free_bits") == recipe("vanilla") | free_bits
    assert recipe("yelp_cpu") == recipe("two_phases_plain") | free_bits
    both, one = recipe("yelp_cpu"), recipe("vanilla")
    assert both["phase1.steps"] + both["phase2.steps"] == one["phase2.steps"]

    def before(name):
        """With the T5 and the rates that sparse.md and draws.md were measured with."""
        found = recipe(name)
        for phase in ("phase1", "phase2"):
            found[f"{phase}.lr"] = 1e-3
            del found[f"{phase}.warmup_steps"]
        found |= {"phase1.steps": 700, "phase2.steps": 1300}
        del found["phase2.lr_schedule"], found["phase2.lr_decay"]
        new = ("feed_forward_proj", "tie_word_embeddings")
        found["model.t5"] = {k: v for k, v in found["model.t5"].items() if k not in new}
        return found

    assert recipe("speculative") == before("two_phases_plain") | {"phase2.draws": 5}
    sparse = {"model.family": "spike_slab", "model.spike_prior": [4.0, 1.0]}
    weak = {"phase2.beta.max": 0.01, "phase2.free_bits": 0.0}
    assert recipe("sparse") == before("yelp_cpu") | sparse | weak
    codes = {"model.family": "categorical", "model.latent_dim": 12, "model.categories": 16}
    assert recipe("discrete") == recipe("quickstart") | codes
    columns = {"data.condition_column": "context", "data.text_column": "response"}
    assert recipe("dialogue") == recipe("conditional") | columns | {"phase2.draws": 5}
    model = [name for name in both if not name.startswith("phase")]
    assert all(both[name] == one[name] for name in model)
    assert both["phase1.lr"] == both["phase2.lr"] == one["phase2.lr"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ds_config": None}, "--ds_config is missing"),
        ({"log_every": 0}, "log_every"),
        ({"eval_every": -1}, "eval_every"),
        ({"checkpoint_every": -1}, "checkpoint_every"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"data": {"batch_size": 0}}, r"data\.batch_size"),
        ({"data": {"max_tokens": 1}}, r"data\.max_tokens"),
        (
            {"data": {"max_tokens": 100, "micro_batch_tokens": 99}},
            r"data\.micro_batch_tokens \(99\)",
        ),
        ({"data": {"max_sentences": -1}}, r"data\.max_sentences must be at least 0, not -1"),
        ({"data": {"streaming": True}}, r"data\.streaming .* --dataset"),
        (
            {"data": {"train_file": "a.txt,b.txt", "weights": [1]}},
            r"names 2 files and data\.weights has 1: give one weight",
        ),
        ({"data": {"weights": [1, 1]}}, r"names 0 files and data\.weights has 2"),
        (
            {"data": {"train_file": "a.txt,b.txt", "weights": [2, -1]}},
            r"data\.weights must be positive",
        ),
        ({"model": {"latent_dim": 0}}, r"model\.latent_dim"),
        ({"model": {"memory_slots": 0}}, r"model\.memory_slots"),
        ({"model": {"dropout": 1.0}}, r"model\.dropout"),
        (
            {"model": {"name": "t5-small", "t5": {"d_model": 3}}},
            r"model\.name \(t5-small\) and model\.t5",
        ),
        ({"eval": {"samples": 0}}, r"eval\.samples"),
        ({"eval": {"shown": -1}}, r"eval\.shown"),
        ({"phase1": {"steps": 0}}, r"phase1\.steps"),
        ({"phase2": {"lr": 0}}, r"phase2\.lr"),
        ({"phase2": {"steps": 3, "warmup_steps": 4}}, r"phase2\.warmup_steps"),
        ({"phase1": {"deletion": 1.0}}, r"phase1\.deletion"),
        ({"phase1": {"adam_betas": [0.9]}}, r"phase1\.adam_betas"),
        ({"phase1": {"adam_betas": [0.9, 1.0]}}, r"phase1\.adam_betas"),
        ({"phase1": {"max_grad_norm": -1}}, r"phase1\.max_grad_norm"),
        ({"phase2": {"beta": {"max": -1}}}, r"phase2\.beta\.max"),
        ({"phase2": {"free_bits": -1}}, r"phase2\.free_bits"),
        ({"phase2": {"free_bits": 1, "release": 1.0}}, r"phase2\.release must be"),
        ({"phase1": {"lr_schedule": "linear", "lr_decay": 0}}, r"phase1\.lr_decay must be"),
        ({"phase2": {"lr_decay": 0.5}}, r"phase2\.lr_decay needs phase2\.lr_schedule"),
        ({"phase2": {"release": 0.2}}, r"phase2\.release turns phase2\.free_bits off"),
        ({"phase2": {"beta": {"zero": 0.6, "rise": 0.5}}}, r"phase2\.beta\.zero"),
        ({"phase2": {"beta": {"cycles": 0}}}, r"phase2\.beta\.cycles"),
    ],
)
def test_values_that_make_no_sense(change, message):
    build({"ds_config": "x.json"}, where="test").check()  # the rest is in order
    with pytest.raises(UserError, match=message):
        build({"ds_config": "x.json", **change}, where="test").check()


@pytest.mark.parametrize("zero", range(101))
def test_shares_that_sum_to_1_in_decimals_are_allowed(zero):
    beta = {"zero": zero / 100, "rise": (100 - zero) / 100}
    build({"ds_config": "x.json", "phase2": {"beta": beta}}, where="test").check()


def test_a_resumed_run_may_change_what_says_nothing_about_learning():
    old = RunConfig(ds_config="a.json")
    new = RunConfig(
        ds_config="b.json",
        output_dir="x",
        resume="y",
        phase="1",
        log_every=1,
        eval_every=1,
        checkpoint_every=1,
        keep_checkpoints=1,
        precision="fp32",
        data=DataConfig(cache_dir="z"),
    )
    assert difference(old, new) == []


def test_difference_names_what_may_not_change():
    old = build({"model": {"t5": {"d_model": 8}}}, where="old")
    new = build(
        {"seed": 1, "phase2": {"beta": {"max": 0.5}}, "model": {"t5": {"d_model": 16, "d_ff": 4}}},
        where="new",
    )
    assert sorted(difference(old, new)) == [
        "model.t5.d_ff: None -> 4",
        "model.t5.d_model: 8 -> 16",
        "phase2.beta.max: 1.0 -> 0.5",
        "seed: 0 -> 1",
    ]


def test_names_of_families_and_injections_have_a_class_each():
    types = configuration.field_types()
    assert set(FAMILIES) == set(get_args(types["model.family"]))
    assert set(INJECTIONS) == set(get_args(types["model.injection"]))


def test_a_field_that_only_some_choices_read():
    poolings = {"chunk", "query_layers"}

    def unread_of(**fields):
        return set(unread(configuration.ModelConfig(**fields))) - poolings

    assert unread(configuration.ModelConfig(pooling="queries")) == [
        "categories",
        "spike_prior",
        "chunk",
    ]
    assert unread_of() == {"categories", "spike_prior"}
    assert unread_of(family="categorical", injection="embedding") == {"spike_prior", "memory_slots"}
    assert unread_of(family="spike_slab", injection="cross") == {"categories"}


def test_every_field_is_read_somewhere():
    """No option without an effect: each name is an attribute or a parameter (or in a list of
    names) outside of config.py."""
    used = set()
    for path in Path(dsvae.__file__).parent.rglob("*.py"):
        if path.name != "config.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    used.add(node.attr)
                elif isinstance(node, ast.arg):
                    used.add(node.arg)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    used.add(node.value)
    names = {name.rsplit(".", 1)[-1] for name in configuration.field_types()}
    assert names - used == set()


def test_defaults_are_not_shared_between_configurations():
    first, second = RunConfig(), RunConfig()
    first.phase1.adam_betas.append(1.0)
    first.model.t5["d_model"] = 3
    assert second == RunConfig()
    assert all(
        dataclasses.is_dataclass(getattr(second, part))
        for part in ("data", "model", "phase1", "phase2", "eval")
    )


def test_loading_a_recipe_twice_gives_trees_of_their_own():
    load_tree("quickstart")["model"]["latent_dim"] = -1
    assert load_tree("quickstart")["model"]["latent_dim"] > 0


def test_a_pretrained_model_takes_the_place_of_a_recipes_new_t5():
    config = read(["--ds_config", "x.json", "--model", "google-t5/t5-small"])
    assert (config.model.name, config.model.t5) == ("google-t5/t5-small", {})
    with pytest.raises(UserError, match=r"model\.name .* and model\.t5 are both given"):
        read(
            ["--ds_config", "x.json", "--model", "google-t5/t5-small", "--model.t5", "{d_model: 8}"]
        )


def test_a_warm_up_longer_than_the_phase_is_told_with_both_numbers():
    with pytest.raises(
        UserError, match=r"phase1\.warmup_steps \(20\) must lie between 0 and phase1\.steps \(10\)"
    ):
        read(["--ds_config", "x.json", "--phase1.steps", "10"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", ""], "output_dir must be .*, not ''"),
        (["--hang_timeout", "0"], "hang_timeout must be positive, not 0"),
        (["--phase1.adam_eps", "-1"], r"phase1\.adam_eps"),
        (
            ["--config", "park2021", "--injection", "none"],
            r"phase1\.freeze_decoder leaves nothing to train.*--phase 2",
        ),
        (["--model.lora.rank", "8"], r"model\.lora\.rank freezes the T5.*--model"),
        (
            ["--model", "t5-small", "--model.lora.targets", "[]"],
            r"model\.lora\.targets must be not empty",
        ),
        (["--model", "t5-small", "--model.lora.targets", "[q, x]"], r"targets is 'x', not one of"),
    ],
)
def test_values_that_leave_nothing_to_run(flags, message):
    with pytest.raises(UserError, match=message):
        read([*DS, *flags])
    read([*DS, "--config", "park2021", "--injection", "none", "--phase", "2"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--injection", "none", "--model.family", "categorical"), "model.family"),
        (("--phase1.draws", "2", "--phase1.sample_latent", "false"), "phase1.draws"),
        (("--model.prior", "learned"), "model.prior learned needs conditions"),
        (("--heads.align_weight", "1"), "heads.align_weight .* --model"),
        (("--injection", "none", "--phase2.latent_noise", "0.1"), "phase2.latent_noise.*no latent"),
        (
            ("--model.family", "categorical", "--phase1.latent_dropout", "0.1"),
            "phase1.latent_dropout.*categories",
        ),
        (("--latent_vectors", "8", "--injection", "cross"), "pooling mean"),
        (("--latent_vectors", "16", "--pooling", "chunks"), "injection both"),
        (
            ("--latent_vectors", "8", "--pooling", "chunks", "--injection", "cross"),
            "model.latent_vectors to 16",
        ),
        (
            ("--injection", "none", "--phase2.beta.kind", "target", "--phase2.beta.target", "3"),
            "phase2.beta.kind",
        ),
    ],
)
def test_what_the_latent_does_not_have_is_refused(words, told):
    with pytest.raises(UserError, match=told):
        configuration.read([*DS, "--phase2.free_bits", "0", *words])


@pytest.mark.parametrize(
    ("flags", "device", "tokens"),
    [
        ((), "cpu", 1024),
        ((), "cuda", 8192),
        (("--data.packing", "true"), "cpu", 8192),
        (("--data.micro_batch_tokens", "99"), "cuda", 99),
        (("--data.max_tokens", "2000"), "cpu", 2000),
        (("--data.max_tokens", "2000", "--condition_column", "c"), "cpu", 4000),
    ],
)
def test_micro_batches_that_are_left_open_depend_on_the_device(flags, device, tokens):
    read = configuration.read(["--config", "yelp_cpu", "--ds_config", "x.json", *flags])
    configuration.choose_micro_batches(read, device)
    assert read.data.micro_batch_tokens == tokens
