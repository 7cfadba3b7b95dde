"""Model cards describe their model correctly, and their code and commands work."""

import re
import shlex

import pytest
import torch
from small_models import SMALL, make_vae, small_tokenizer

from dsvae.cli import main
from dsvae.config import RunConfig
from dsvae.data.grammar import generate
from dsvae.data.tokenization import tokenize
from dsvae.metrics.evaluate import evaluate
from dsvae.metrics.text import samples
from dsvae.parallel.world import World
from dsvae.reports.card import write_card, write_checkpoint_card

ALONE = World(0, 0, 1, torch.device("cpu"))
TEXTS = [drawn.text for drawn in generate(40, seed=3)]


@pytest.fixture(params=["memory", "none"])
def card(request, tmp_path, monkeypatch):
    """(injection, card, greedy sentence) of a model directory in the current directory,
    with files of sentences beside it."""
    monkeypatch.chdir(tmp_path)
    # what evaluate sets is taken back
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    tokenizer = small_tokenizer(TEXTS, SMALL["vocab_size"])
    split = tokenize(TEXTS, tokenizer, 64, "test")[0]
    model = make_vae(injection=request.param)
    metrics = evaluate(model, split, ALONE, samples=1, token_budget=4096) | {"precision": "fp32"}
    config = RunConfig()
    config.model.injection = request.param
    pairs, prior = samples(model, split, tokenizer, ALONE, 3, 12)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    write_card(tmp_path / "model" / "README.md", config, metrics, pairs, prior)
    write_checkpoint_card(tmp_path / "checkpoint.md", config, 2, 7, 41.5)
    for name in ("test.txt", "sentences.txt"):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in TEXTS))
    greedy = tokenizer.decode(
        model.generate(
            latent=torch.zeros(1, model.config.latent_dim), max_new_tokens=12, do_sample=False
        )[0],
        skip_special_tokens=True,
    )
    return request.param, (tmp_path / "model" / "README.md").read_text(), greedy


def test_code_and_commands_of_a_card_work(card, capsys):
    _, text, _ = card
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code.replace("DIR", '"model"'), {})
    assert capsys.readouterr().out
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [shlex.split(line, comments=True) for line in commands.splitlines()]
    assert all(words[0] == "dsvae" for words in lines)
    for words in lines:
        more = [] if words[1] == "evaluate" else ["--device", "cpu", "--max_new_tokens", "5"]
        assert main([word.replace("DIR", "model") for word in words[1:]] + more) == 0, (
            capsys.readouterr().err
        )
        assert capsys.readouterr().out


def test_a_card_says_what_the_model_is(card, tmp_path):
    injection, text, greedy = card
    for card_text in (text, (tmp_path / "checkpoint.md").read_text()):
        assert ("variational-autoencoder" in card_text) == (injection != "none")
        assert ("latent dimensions" in card_text) == (injection != "none")
        assert ("no latent" in card_text) == (injection == "none")
    assert (
        ("upper bound" in text)
        == ("rec_shuffled" in text)
        == ("sample(s) of z" in text)
        == (injection != "none")
    )
    shown = text[text.index("## Samples") :]
    if injection == "none":
        assert shown.split("\n")[2:] == [
            "The sentence that it decodes greedily:",
            "",
            f"- `{greedy}`",
            "",
        ]
    else:
        assert shown.count("\n- `") == 6
        assert all(sentence in shown for sentence in TEXTS[:3])
