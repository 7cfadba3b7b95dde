"""What many tests share; nothing from the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from small_models import INJECTIONS, POOLINGS, T5_CONFIGS, make_t5


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers alone and after any other."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=list(T5_CONFIGS))
def t5_dir(request, tmp_path_factory):
    return make_t5(request.param, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def t5_v11_dir(tmp_path_factory):
    return make_t5("t5 v1.1", tmp_path_factory.mktemp("t5"))


@pytest.fixture(params=list(T5_CONFIGS))
def kind(request):
    return request.param


@pytest.fixture(params=INJECTIONS)
def injection(request):
    return request.param


@pytest.fixture(params=POOLINGS)
def pooling(request):
    return request.param


@pytest.fixture
def batch():
    """Five sentences of different lengths, padded: input_ids, attention_mask,
    labels."""
    rng = torch.Generator().manual_seed(3)
    lengths = [9, 4, 7, 1, 6]
    ids = torch.zeros(5, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 60, (length,), generator=rng)
        ids[row, length - 1] = 1
    mask = (ids != 0).long()
    return ids, mask, ids.masked_fill(ids == 0, -100)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache of tokenized corpora for all runs of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, cache_dir):
    """A configuration file of a whole run in a few seconds."""
    import yaml
    from launch import TINY

    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "cache_dir": str(cache_dir)}}))
    return path


@pytest.fixture(scope="session")
def pretrained_t5(tmp_path_factory):
    """A random T5 v1.1 as the hub has it, with a tokenizer for the built-in corpus."""
    from small_models import small_tokenizer

    from dsvae.config import DataConfig
    from dsvae.data.corpora import load_corpus
    from dsvae.data.sources import source_of

    directory = make_t5("t5 v1.1", tmp_path_factory.mktemp("pretrained"))
    source = source_of(DataConfig(builtin_size=300))
    texts = load_corpus(source, 0, directory).splits["train"]["text"]
    small_tokenizer(texts).save_pretrained(directory)
    return directory
