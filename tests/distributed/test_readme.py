"""What README.md tells people to type: the first command as it stands, the others'
flags, the Python."""

import json
import re
import shlex

import pytest
from launch import CONFIGS, ROOT, train
from small_models import make_vae

from dsvae import config as configuration
from dsvae.data.tokenization import train_tokenizer

README = (ROOT / "README.md").read_text()
COMMANDS = [
    block.replace("\\\n", " ").strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    if "train.py" in block
]


def test_the_quickstart(tmp_path, cache_dir):
    """The README's first command, with another place to write to: it must end with a
    latent that is alive and used."""
    install, command = COMMANDS[0].split(" && ")
    assert install == "pip install -e ."
    words = shlex.split(command)
    assert words[:2] == ["deepspeed", "dsvae/train.py"]
    run = train(
        *words[2:],
        "--output_dir",
        tmp_path / "run",
        "--data.cache_dir",
        cache_dir,
        launcher="deepspeed",
        timeout=570,
        cwd=ROOT,
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert metrics["au"] >= 10
    assert metrics["rec_shuffled"] - metrics["rec"] > 6
    assert metrics["mi"] > 3
    for shown in ("test (1,000 sentences)", "model ", "metrics ", "TensorBoard "):
        assert shown in run.stdout


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_the_flags_of_other_commands_are_known(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    arguments = words[words.index("dsvae/train.py") + 1 :]
    config = configuration.read(arguments)
    assert config.ds_config is not None
    assert (CONFIGS / config.ds_config.rsplit("/", 1)[-1]).exists()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_python_examples(example, tmp_path, monkeypatch, capsys):
    model = make_vae()
    tokenizer = train_tokenizer(["the cats see a dog", "a dog sees the cats"] * 4, 60)
    directory = tmp_path / "runs" / "dsvae" / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.startswith("['")
