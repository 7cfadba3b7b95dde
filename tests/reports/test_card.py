"""Model cards describe their model correctly, and their code and commands work."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from small_models import SMALL, make_vae, small_tokenizer

from dsvae.cli import COMMANDS, main
from dsvae.config import RunConfig
from dsvae.data.grammar import generate
from dsvae.data.grammar_variants import draw_lines
from dsvae.data.record_tokens import Names, tokenize
from dsvae.data.records import Columns, record_of
from dsvae.inference.passes import Passes
from dsvae.metrics.evaluate import evaluate
from dsvae.metrics.reconstruction import samples
from dsvae.reports.card import write_card, write_checkpoint_card

TEXTS = [drawn.text for drawn in generate(40, seed=3)]


MODELS = {
    "memory": {},
    "cross": {"injection": "cross"},
    "none": {"injection": "none"},
    "spike_slab": {"family": "spike_slab"},
    "categorical": {"family": "categorical", "categories": 4},
    "conditional": {"conditional": True, "prior": "learned"},
    "conditional none": {"conditional": True, "injection": "none"},
    "clusters": {"posterior_reads": "condition", "clusters": 4},
    "heads": {"classes": ["none", "occupation"], "tags": ["B-OBJ", "B-PROF", "I-OBJ", "O"]},
}
KINDS = {"conditional": "paired", "conditional none": "paired", "clusters": "relations"}


@pytest.fixture(params=MODELS)
def card(request, tmp_path, monkeypatch):
    """(name, card, model, tokenizer) of a model directory in the current directory, with
    files of sentences beside it."""
    monkeypatch.chdir(tmp_path)
    # what evaluate sets is taken back
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    kind = KINDS.get(request.param, "tagged" if request.param == "heads" else "plain")
    drawn = [each.text for each in draw_lines(kind, 40, 3)]
    rows = [{"text": text} if kind == "plain" else json.loads(text) for text in drawn]
    pieces = [str(value) for row in rows for value in row.values()]
    tokenizer = small_tokenizer([*TEXTS, *pieces], SMALL["vocab_size"])
    model = make_vae(**MODELS[request.param])
    config = RunConfig()
    config.model.injection = model.config.injection
    given = {name: name if name in rows[0] else None for name in ("condition", "label", "tags")}
    for name, column in given.items():
        setattr(config.data, f"{name}_column", column)
    records = [record_of(row, Columns.of(config.data), "test") for row in rows]
    names = Names(tuple(sorted({r.label for r in records if r.label})), tuple(model.config.tags))
    columns = Columns.of(config.data)
    split = tokenize(records, tokenizer, 64, "test", columns, names)[0]
    passes = Passes(model, token_budget=4096)
    metrics, measured = evaluate(passes, split, samples=1)
    metrics["precision"] = "fp32"
    pairs, prior = samples(passes, split, measured.encoded, tokenizer, np.arange(3), 12)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    write_card(tmp_path / "model" / "README.md", config, model.config, metrics, pairs, prior)
    write_checkpoint_card(tmp_path / "checkpoint.md", config, model.config, 2, 7, 41.5)
    for name in ("test.txt", "sentences.txt"):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in TEXTS))
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    card_text = (tmp_path / "model" / "README.md").read_text()
    return request.param, card_text, model, tokenizer


def test_code_and_commands_of_a_card_work(card, capsys):
    name, text, *_ = card
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code.replace("DIR", '"model"'), {})
    assert capsys.readouterr().out
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [shlex.split(line, comments=True) for line in commands.splitlines()]
    assert all(words[0] == "dsvae" for words in lines)
    assert sorted(words[1] for words in lines) == sorted(SHOWN[name])
    for words in lines:
        more = {} if words[1] == "evaluate" else {"device": "cpu"}
        if "max_new_tokens" in COMMANDS[words[1]].parameters:
            more["max_new_tokens"] = "5"
        more = [word for name, value in more.items() for word in (f"--{name}", value)]
        assert main([word.replace("DIR", "model") for word in words[1:]] + more) == 0, (
            capsys.readouterr().err
        )
        assert capsys.readouterr().out


SHOWN = dict.fromkeys(MODELS, ["evaluate", "sample", "reconstruct", "interpolate"])
SHOWN |= {"none": ["evaluate"], "conditional none": ["evaluate"]}
SHOWN["categorical"] = ["evaluate", "sample", "reconstruct"]  # no way between categories
SHOWN["clusters"] = [*SHOWN["clusters"], "cluster"]
SHOWN["heads"] = [*SHOWN["heads"], "classify", "tag"]
SAID = {
    "memory": ["latent: 6 dimensions, Gaussian;"],
    "cross": ["pooling mean, injection cross"],
    "none": ["no latent (injection none)"],
    "spike_slab": ["latent: 6 dimensions, spike and slab, prior Beta(4, 1);"],
    "categorical": ["latent: 6 categorical variables of 4 values;"],
    "conditional": [
        "prior: learned, p(z|c)",
        "the decoder reads it; the encoder reads the condition and the sentence",
        "--condition_column condition",
        '--condition "a condition"',
        "each after its condition",
        "differs by sentence",
    ],
    "conditional none": ["no latent (injection none)", "the encoder reads the condition"],
    "clusters": ["- clusters: 4\n", "the decoder reads z alone", "b3_f1_random"],
    "heads": [
        "- classes: none, occupation\n- tags: B-OBJ, B-PROF, I-OBJ, O\n",
        "--label_column label --tags_column tags",
        "class_majority",
        "entity_f1",
    ],
}


def test_a_card_says_what_the_model_is(card, tmp_path):
    name, text, model, tokenizer = card
    latent = bool(model.config.latent_dim)
    for said in SAID[name]:
        assert said in text
    for card_text in (text, (tmp_path / "checkpoint.md").read_text()):
        assert ("variational-autoencoder" in card_text) == latent
        assert ("no latent" in card_text) != latent
    assert (
        ("upper bound" in text) == ("rec_shuffled" in text) == ("sample(s) of z" in text) == latent
    )
    shown = text[text.index("## Samples") :]
    if name == "none":
        greedy = tokenizer.decode(
            model.generate(latent=torch.zeros(1, 0), max_new_tokens=12, do_sample=False)[0],
            skip_special_tokens=True,
        )
        expected = ["The sentence that it decodes greedily:", "", f"- `{greedy}`", ""]
        assert shown.split("\n")[2:] == expected
    else:
        assert shown.count("\n- `") == (6 if latent else 3)
