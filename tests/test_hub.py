"""Packaged models give what the originals give, where dsvae cannot be imported; and what
arrives on the hub is the package."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import fake_hub
from huggingface_hub import constants
from launch import environment, free_port
from safetensors.torch import load_file, save_file
from small_models import make_vae, small_tokenizer
from without_dsvae import TEXTS, outputs

from dsvae import hub, pretrained
from dsvae.cli import main

MODELS = {
    "memory": {},
    "embedding": {"kind": "mt5", "injection": "embedding", "pooling": "attention"},
    "learned": {"kind": "t5 v1.1", "conditional": True, "prior": "learned"},
    "categorical": {"kind": "umt5", "family": "categorical", "latent_dim": 3, "categories": 4},
    "t5gemma": {"kind": "t5gemma"},
    "tagger": {"tags": ("O", "B-x", "I-x"), "classes": ("a", "b"), "injection": "both"},
}
CARD = "# A sentence VAE\n\n## Measured\n\nrec 3.337\n\n## Use\n\nthe rest\n"
COMMIT = "1" * 40


def save(directory, **latent):
    make_vae(**latent).save_pretrained(directory)
    small_tokenizer(TEXTS * 9).save_pretrained(directory)
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


def test_packages_give_the_same_without_dsvae(tmp_path):
    wanted, names = {}, []
    for name, latent in MODELS.items():
        save(tmp_path / name, **latent)
        model, tokenizer = pretrained.load(tmp_path / name)
        wanted[name] = outputs(model, tokenizer)
        names.append(str(hub.package(str(tmp_path / name), tmp_path / f"{name}-1.0")))
        assert pretrained.load(names[-1])  # with dsvae, too
    # a download from the hub
    below = tmp_path / "cache" / "models--me--model"
    shutil.copytree(names[0], below / "snapshots" / COMMIT)
    (below / "refs").mkdir()
    (below / "refs" / "main").write_text(COMMIT)
    output = tmp_path / "found.safetensors"
    subprocess.run(
        [sys.executable, Path(__file__).with_name("without_dsvae.py"), output, "me/model", *names],
        check=True,
        timeout=400,
        cwd=tmp_path,
        env=environment(
            HF_HUB_CACHE=str(tmp_path / "cache"),
            HF_MODULES_CACHE=str(tmp_path / "modules"),
            HF_HUB_OFFLINE="1",
        ),
    )
    found = load_file(output)
    originals = ["memory", *MODELS, "tagger"]
    for name, original in zip(["me/model", *names, "saved"], originals, strict=True):
        for key, value in wanted[original].items():
            torch.testing.assert_close(found.pop(f"{name} {key}"), value, rtol=0, atol=0)
    assert not found
    assert all(torch.equal(each["greedy"], each["no cache"]) for each in wanted.values())


def test_the_code_refuses_other_releases_of_transformers(monkeypatch):
    monkeypatch.setattr(hub, "requirement", lambda library: f"{library}>=99")
    with pytest.raises(ImportError, match=r"transformers>=99 is required"):
        exec(compile(hub.code()["t5_vae.py"], "t5_vae.py", "exec"), {"__name__": "copy"})


def test_what_a_package_consists_of(model_dir, tmp_path):
    (model_dir / "evaluation").mkdir(exist_ok=True)
    (model_dir / "notes.json").write_text("{}")
    (model_dir / "fitted_prior.safetensors").write_bytes(b"")
    main(["package", str(model_dir), "-o", str(tmp_path / "package")])
    made = {path.name: path for path in (tmp_path / "package").iterdir()}
    code = {name for name in made if name.endswith(".py")}
    assert set(made) - code == {
        "LICENSE",
        "README.md",
        "config.json",
        "fitted_prior.safetensors",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert made["model.safetensors"].samefile(model_dir / "model.safetensors")
    for name in code:
        assert "dsvae." not in "".join(
            ast.unparse(n)
            for n in ast.walk(ast.parse(made[name].read_text()))
            if isinstance(n, (ast.Import, ast.ImportFrom))
        )
    card = made["README.md"].read_text()
    assert card.index("rec 3.337") < card.index("## Without dsvae") < card.index("## Use")
    assert "transformers<5" in card
    hub.package(str(tmp_path / "package"), tmp_path / "again")  # changes nothing
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again == {name: path.read_bytes() for name, path in made.items()}


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "a-token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with fake_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        yield found


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_push_uploads_the_package(server, model_dir, tmp_path, capsys, revision):
    branch = revision or "main"
    server.files |= {
        ("me/model", branch, "model-00001-of-00002.safetensors"): b"old",
        ("me/model", branch, "model.safetensors"): b"old",
        ("me/model", branch, "plot.png"): b"kept",
    }
    words = ["push", str(model_dir), "me/model", "--private"]
    assert main(words + (["--revision", revision] if revision else [])) == 0
    end = f"/tree/{revision}" if revision else ""
    assert capsys.readouterr().out.strip() == f"{server.address}/me/model{end}"
    assert server.private == {"me/model": True}
    # the card names the model as the directory of the package is called
    package = hub.package(str(model_dir), tmp_path / "MODEL")
    expected = {path.name: path.read_bytes() for path in package.iterdir()}
    expected["README.md"] = expected["README.md"].replace(b'"MODEL"', b'"me/model"')
    wanted = {("me/model", branch, name): content for name, content in expected.items()}
    assert server.files == wanted | {("me/model", branch, "plot.png"): b"kept"}


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("offline", "HF_HUB_OFFLINE is set"),
        ("no token", "no token for the hub"),
        ("wrong token", "the token is not valid"),
        ("no permission", "the token has no permission"),
        ("no network", "check the name and the network"),
        ("public", "me/model exists and is public"),
        ("name", "write USER/NAME"),
        ("no model", "has no config.json"),
        ("no weights", "its model cannot be loaded"),
        ("no tokenizer", "its tokenizer cannot be loaded"),
    ],
)
def test_what_stops_a_push_is_one_line(
    server, model_dir, monkeypatch, tmp_path, capsys, trouble, message
):
    repo, copy = "me/model", shutil.copytree(model_dir, tmp_path / "copy")
    if trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif trouble == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "another")
    elif trouble == "no permission":
        server.denied = True
    elif trouble == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    elif trouble == "public":
        server.private["me/model"] = False
    elif trouble == "name":
        repo = "model"
    elif trouble == "no model":
        (copy / "config.json").unlink()
    elif trouble == "no weights":
        save_file({"shared.weight": torch.zeros(60, 32)}, copy / "model.safetensors")
    elif trouble == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    assert main(["push", str(copy), repo, "--private"]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not server.files


def test_an_output_that_exists_is_refused(model_dir, capsys):
    assert main(["package", str(model_dir), "-o", str(model_dir)]) == 2
    assert "already exists" in capsys.readouterr().err
