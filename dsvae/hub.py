"""A model with its own code, for those who do not have dsvae: as a directory, and on the
hub.

transformers loads such a directory with `trust_remote_code=True`. The code is that of
`dsvae.modeling`, file by file; only its imports of one another are made relative, which
transformers follows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from dsvae import modeling
from dsvae.data.tokenization import load_tokenizer
from dsvae.errors import UserError, first_line
from dsvae.files import make_place, whole_directory
from dsvae.generation.fitted_prior import NAME as FITTED_PRIOR
from dsvae.modeling.t5_vae import T5VAE
from dsvae.pretrained import find_model
from dsvae.private_names import requirement

AUTO_MAP = {"AutoConfig": "t5_vae.T5VAEConfig", "AutoModel": "t5_vae.T5VAE"}

WEIGHTS = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME, FITTED_PRIOR)
"""Files of which an older version must not stay beside newer ones."""

ADVICE = {
    401: "the token is not valid: log in again with hf auth login",
    403: "the token has no permission to write there: use one with the write role, or another name",
}
"""What to do about a status of the hub."""

_IMPORT = re.compile(r"^(\s*)from dsvae\.modeling\.(\w+) import", re.MULTILINE)
_FUTURE = "from __future__ import annotations\n"


def package(model_dir: str, output: str | Path) -> Path:
    """Writes a directory that `AutoModel.from_pretrained(..., trust_remote_code=True)`
    loads without dsvae, and returns it. It appears whole or not at all.

    Args:
        model_dir: a directory, or a hub id.
        output: the directory. Weights are hard links if that is possible.

    Raises:
        UserError: no sound T5VAE there; an output that exists or cannot be written to.
    """
    source, directory = _checked(model_dir), Path(output).expanduser().absolute()
    make_place(directory)
    with whole_directory(directory) as temporary:
        _write(source, temporary, directory.name, _link)
    return directory


def push(model_dir: str, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads what `package` writes to a repository on the hub, and returns its
    address. The repository and the branch are made if they do not exist.

    Args:
        repo: `USER/NAME` or `ORGANIZATION/NAME`.
        private: make a private repository; a public one that exists is refused.
        revision: the branch; main by default.

    Raises:
        UserError: no sound T5VAE there; no token, permission or network.
    """
    if repo.count("/") != 1:
        raise UserError(f"{repo} is not the name of a repository: write USER/NAME")
    source = _checked(model_dir)
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and nothing can be uploaded: unset it")
    if get_token() is None:
        raise UserError("there is no token for the hub: log in with hf auth login, or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as temporary:
        _write(source, Path(temporary), repo, os.symlink)
        try:
            return _upload(Path(temporary), repo, private, revision)
        except UserError:
            raise
        except Exception as error:  # the hub's client and the network each raise their own
            status = getattr(getattr(error, "response", None), "status_code", 0)
            advice = ADVICE.get(status, "check the name and the network, and repeat the command")
            raise UserError(f"{repo} was not uploaded ({first_line(error)}); {advice}") from error


def _upload(directory: Path, repo: str, private: bool, revision: str | None) -> str:
    api = HfApi()
    address = str(api.create_repo(repo, private=private or None, exist_ok=True))
    if private and not api.model_info(repo).private:
        raise UserError(f"{repo} exists and is public: leave --private out, or choose another name")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
        address = f"{address}/tree/{revision}"
    api.upload_folder(
        repo_id=repo,
        folder_path=directory,
        revision=revision,
        commit_message=f"A model by dsvae {version('dsvae')}",
        delete_patterns=list(WEIGHTS),
    )
    return address


def code() -> dict[str, str]:
    """Returns the source of T5VAE and of all that it imports of dsvae, by the names of
    the files."""
    license_line = f"# From dsvae {version('dsvae')}, Apache License 2.0 (see LICENSE).\n"
    files: dict[str, str] = {}
    missing = ["t5_vae"]
    while missing:
        name = missing.pop()
        text = (Path(modeling.__path__[0]) / f"{name}.py").read_text(encoding="utf-8")
        files[f"{name}.py"] = license_line + _IMPORT.sub(r"\1from .\2 import", text)
        missing += [each for _, each in _IMPORT.findall(text) if f"{each}.py" not in files]
    # In a release that renames what the code relies on, the decoder may not see z, and no
    # error says so.
    check = (
        f"from transformers.utils.versions import require_version\n\n"
        f'require_version("{requirement("transformers")}")\n'
    )
    files["t5_vae.py"] = files["t5_vae.py"].replace(_FUTURE, f"{_FUTURE}\n{check}", 1)
    return files


def _checked(model_dir: str) -> Path:
    """Finds the directory of a model, and checks that its weights and tokenizer are
    there, and fit."""
    directory = find_model(model_dir)
    logging.set_verbosity_error()
    try:
        T5VAE.origin_in(str(directory))
    except Exception as error:  # transformers, safetensors and json each raise their own
        raise UserError(
            f"{directory}: its model cannot be loaded ({first_line(error)}); export it again, or "
            f"copy the whole directory"
        ) from error
    return directory


def _write(source: Path, target: Path, name: str, put: Callable[[Path, Path], Any]) -> None:
    """Fills an empty directory.

    Args:
        name: of the model in its card.
        put: makes a file of the weights, from the original.
    """
    own = load_tokenizer(str(source)).vocab_files_names.values()
    any_has = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for pattern in WEIGHTS:
        for path in source.glob(pattern):
            put(path.resolve(), target / path.name)
    for name_of_file in {"generation_config.json", "added_tokens.json", *any_has, *own}:
        if (source / name_of_file).is_file():
            shutil.copyfile(source / name_of_file, target / name_of_file)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "auto_map": AUTO_MAP}, indent=2, sort_keys=True)
    texts = {"config.json": f"{text}\n", "README.md": _card(source / "README.md", name), **code()}
    texts["LICENSE"] = distribution("dsvae").read_text("licenses/LICENSE") or ""
    for file, text in texts.items():
        (target / file).write_text(text, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _card(path: Path, name: str) -> str:
    """Writes the model's card, with a section on its use without dsvae before that with
    dsvae."""
    title = "## Without dsvae"
    card = f"---\nlibrary_name: transformers\ntags:\n- dsvae\n---\n\n# {name}\n"
    if path.is_file():
        card = path.read_text(encoding="utf-8")
    if title in card:  # it is that of a package
        return card
    section = f"""{title}

The repository contains the code of the model (Apache License 2.0, see LICENSE), which
`trust_remote_code=True` runs. It needs no dsvae:

```bash
pip install "{requirement("torch")}" "{requirement("transformers")}"
```

```python
from transformers import AutoModel, AutoTokenizer

DIR = "{name}"
model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(DIR)
```
"""
    before, use, after = card.partition("\n## Use\n")
    return f"{before.rstrip()}\n\n{section}{use}{after}"
