"""What README.md and docs/ tell people to type: the first command as it stands, the
others' flags, the Python, the links."""

import json
import re
import shlex
from itertools import product

import pytest
from launch import CONFIGS, ROOT, train
from small_models import make_vae, small_tokenizer

from dsvae import cli
from dsvae import config as configuration
from dsvae.data import grammar
from dsvae.generation import SentenceVAE

README = (ROOT / "README.md").read_text()
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}
COMMANDS = [
    block.replace("\\\n", " ").strip()
    for text in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    if "dsvae/train.py" in block
]


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHOWN = re.findall(
    r"```bash\ndsvae ([^\n]*runs/quickstart/model[^\n]*)\n```\n+```text\n(.*?)```",
    README,
    re.DOTALL,
)
"""Commands on the quickstart's model, and what they print."""


@pytest.mark.timeout(1800)
def test_the_quickstart(tmp_path, cache_dir, monkeypatch, capsys):
    """The README's first command, with another place to write to: it must end with a
    latent that is alive and used. Then the commands that use its model.

    Their output depends on the machine and on the release of torch, so it is compared
    by its shape.
    """
    install, command = COMMANDS[0].split(" && ")
    assert install == "pip install -e ."
    words = shlex.split(command)
    assert words[:2] == ["deepspeed", "dsvae/train.py"]
    run = train(
        *words[2:],
        "--output_dir",
        tmp_path / "runs" / "quickstart",
        "--data.cache_dir",
        cache_dir,
        launcher="deepspeed",
        timeout=1700,
        cwd=ROOT,
    )
    metrics = json.loads((tmp_path / "runs" / "quickstart" / "metrics.json").read_text())["test"]
    # Six runs (three seeds, two tokenizers) gave 16 units, 1.77 to 1.86 nats above the
    # entropy, 39 to 41 nats between the own and another sentence's z, and 95.8 to 99.0%
    # exact reconstructions.
    assert metrics["au"] == 16
    assert metrics["above_entropy"] < 2.3
    assert metrics["rec_shuffled"] - metrics["rec"] > 25
    vae = SentenceVAE.from_pretrained(str(tmp_path / "runs" / "quickstart" / "model"))
    fresh = [drawn.text for drawn in grammar.generate(200, seed=1)]
    back = vae.reconstruct(fresh)
    assert sum(a == b for a, b in zip(fresh, back, strict=True)) > 0.9 * len(fresh)
    for shown in (" sentences)\n  rec ", "model ", "metrics ", "TensorBoard "):
        assert shown in run.stdout
    monkeypatch.chdir(tmp_path)
    assert SHOWN
    for command, output in SHOWN:
        assert cli.main(shlex.split(command)) == 0
        printed = capsys.readouterr().out
        assert [line.split()[0] for line in printed.splitlines()] == [
            line.split()[0] for line in output.splitlines()
        ]


def in_the_corpus(text):
    """Whether some choice of factors gives this sentence: only choices whose words can
    be in it are tried."""
    forms = {
        "subject": grammar._SUBJECTS.items(),
        "verb": ((verb, " ".join(rest)) for verb, rest in grammar._VERBS.items()),
        "adjective": ((each, each) for each in grammar._ADJECTIVES),
        "object": grammar._OBJECTS.items(),
    }
    words = set(re.findall(r"[a-z]+", text.lower()))
    possible = {
        name: [base for base, more in pairs if words & {base, *more.split()}]
        for name, pairs in forms.items()
    }
    values = [possible.get(name, choices) for name, choices in grammar.FACTORS.items()]
    return any(
        grammar.sentence(dict(zip(grammar.FACTORS, choice, strict=True))) == text
        for choice in product(*values)
    )


def test_the_examples_are_sentences_of_the_corpus_that_the_quickstart_trains_on():
    """To others the model answers with the sentences it knows, and not with those that
    the user typed."""
    blocks = [*EXAMPLES, *(command for command, _ in SHOWN)]
    quoted = {text for block in blocks for text in re.findall(r'"([A-Z][^"]* [^"]*)"', block)}
    assert len(quoted) >= 2
    assert not any(" cats " in block for block in blocks)
    assert not in_the_corpus("The cats see a dog.")
    for text in quoted:
        assert in_the_corpus(text), text


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_the_flags_of_other_commands_are_known(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    # A block may have other commands on other lines.
    (line,) = (each for each in command.splitlines() if "dsvae/train.py" in each)
    words = shlex.split(line)
    arguments = words[words.index("dsvae/train.py") + 1 :]
    config = configuration.read(arguments)
    assert config.ds_config is not None
    assert (CONFIGS / config.ds_config.rsplit("/", 1)[-1]).exists()


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_python_examples(example, tmp_path, monkeypatch, capsys):
    model = make_vae()
    tokenizer = small_tokenizer([drawn.text for drawn in grammar.generate(60, seed=0)], 60)
    directory = tmp_path / "runs" / "quickstart" / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.startswith("['")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", PAGES[page]):
        assert (page.parent / link).exists(), link


def test_the_readme_is_short_and_the_index_has_every_page():
    assert len(README.splitlines()) <= 150
    index = {(ROOT / "docs" / link).resolve() for link in linked(ROOT / "docs" / "README.md")}
    index |= {
        (ROOT / "docs" / "results" / link).resolve()
        for link in linked(ROOT / "docs" / "results" / "README.md")
    }
    missing = set((ROOT / "docs").rglob("*.md")) - index - {ROOT / "docs" / "README.md"}
    assert {page.name for page in missing if page.name != "README.md"} == set()


def linked(page):
    return re.findall(r"\]\(([^):#\s]+)", PAGES[page])
