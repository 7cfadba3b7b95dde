"""Sentences and tokenizers for the tests of data; nothing from the network."""

import pytest
from transformers import ByT5Tokenizer, T5Tokenizer

from dsvae.data.grammar import generate
from dsvae.data.tokenization import load_tokenizer
from dsvae.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def texts():
    """1,500 sentences of the built-in corpus."""
    return [item.text for item in generate(1500, seed=1)]


@pytest.fixture(scope="session")
def trained(texts):
    """A tokenizer that was trained on `texts`."""
    return train_tokenizer(texts, 376)


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A directory with a tokenizer of transformers' T5 class: letters, with T5's
    normalization. "</s>" is a piece of its vocabulary, as of every T5's."""
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz.?!<>/"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    vocab = [*special, *letters, ("▁the", -1.0), ("▁not", -1.0), *sentinels]
    path = tmp_path_factory.mktemp("t5")
    T5Tokenizer(vocab=vocab).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def t5_tokenizer(t5):
    return load_tokenizer(t5)


@pytest.fixture(scope="session")
def byt5(tmp_path_factory):
    """A directory with a ByT5 tokenizer: an id per byte."""
    path = tmp_path_factory.mktemp("byt5")
    ByT5Tokenizer().save_pretrained(path)
    return str(path)
