"""Latents in shards: against the model used directly, cut and continued, damaged, on two
ranks, and back to texts."""

import json

import datasets
import pytest
import torch
from launch import start
from safetensors.torch import save_file
from small_models import make_vae, small_tokenizer

from dsvae import cli
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE, latents
from dsvae.generation.latents import Latents, write_latents

TEXTS = [
    *("a bad bee", "the cab had a bed", "", "abe", "he had the beach ball cab bad bed"),
    *("each ace bathed", "a tea", "  ", "dad had the bad tea", "a bäd b\u2019ee"),
]
LINES = [1, 2, 4, 5, 6, 7, 9, 10]
FEW = {"max_new_tokens": 7}
K = 7
MODELS = {
    "one vector": {},
    "chunks": {"injection": "cross", "pooling": "chunks", "chunk": 3, "latent_vectors": K},
    "categorical": {"family": "categorical", "categories": 3},
    "spike_slab": {"family": "spike_slab"},
}


def made_in(directory, **latent):
    """A model directory, a file of texts, and the model itself."""
    model, file = directory / "model", directory / "texts.txt"
    make_vae(**latent).save_pretrained(model)
    small_tokenizer([*TEXTS] * 3, 60).save_pretrained(model)
    file.write_text("".join(f"{text}\n" for text in TEXTS))
    return model, file, SentenceVAE.from_pretrained(str(model), device="cpu")


@pytest.fixture(scope="module", params=MODELS)
def given(request, tmp_path_factory):
    return made_in(tmp_path_factory.mktemp("latents"), **MODELS[request.param])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encode(given, output, **options):
    model, file, _ = given
    options = {"shard_rows": 4, "batch_size": 2, "device": "cpu", **options}
    return write_latents(str(model), str(file), "text", None, output=str(output), **options)


def facts(directory):
    """The manifest, and the rows of all shards. safetensors puts its metadata in any order,
    so that the same numbers have other digests."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for shard in manifest["shards"]:
        assert len(shard.pop("sha256")) == 64
    tensors, texts = joined(directory)
    return manifest, texts, {name: each.tolist() for name, each in tensors.items()}


def joined(directory):
    """The rows of all shards."""
    shards = list(Latents(directory).shards())
    tensors = {name: torch.cat([each[name] for each, _ in shards]) for name in shards[0][0]}
    return tensors, [text for _, strings in shards for text in strings["text"]]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("safetensors", "float32"),
        ("safetensors", "bf16"),
        ("parquet", "fp16"),
        ("parquet", "float32"),
    ],
)
def test_shards_hold_the_posteriors_beside_their_texts(given, kind, dtype, tmp_path):
    _, file, vae = given
    manifest = encode(given, tmp_path / "z", kind=kind, dtype=dtype)
    names = {f"0000{i}.{kind}" for i in range(3)} | {"manifest.json"}
    assert {path.name for path in (tmp_path / "z").iterdir()} == names
    assert {path.stat().st_mode for path in (tmp_path / "z").iterdir()} == {file.stat().st_mode}
    found, texts = joined(tmp_path / "z")
    q = vae.encode([text for text in TEXTS if text.strip()])
    assert texts == [text for text in TEXTS if text.strip()]
    assert found["line"].tolist() == LINES
    assert (manifest["rows"], manifest["counts"]["blank"]) == (8, 2)
    assert [each["rows"] for each in manifest["shards"]] == [3, 3, 2]
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == "float32" else {"atol": 0.02, "rtol": 0.01}
    for name, expected in q.tensors().items():
        assert found[name].dtype == (torch.bool if name == "valid" else latents.DTYPES[dtype])
        torch.testing.assert_close(found[name].float(), expected.float(), **close)
        assert list(expected.shape[1:]) == manifest["tensors"][name]
    mean, variance = (each.double() for each in q.moments())
    torch.testing.assert_close(found["scale"].flatten(1).double(), variance.sqrt(), **close)
    # the law of total variance, of each number over the texts that have it
    valid = q.tensors().get("valid", torch.ones(8, 1)).bool()
    valid = valid.repeat_interleave(mean.shape[1] // valid.shape[1], 1)
    normalizer = {
        name: torch.tensor(each).flatten() for name, each in manifest["normalizer"].items()
    }
    for unit in range(mean.shape[1]):
        own, spread = mean[valid[:, unit], unit], variance[valid[:, unit], unit]
        if len(own):
            expected = float((spread.mean() + own.var(correction=0)).sqrt())
            assert float(normalizer["mean"][unit]) == pytest.approx(
                float(own.mean()), rel=1e-5, abs=1e-5
            )
            assert float(normalizer["std"][unit]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    rows = Latents(tmp_path / "z").dataset()
    assert rows["text"][:] == texts
    for name, whole in found.items():
        plain = whole.float() if whole.is_floating_point() else whole
        assert torch.equal(torch.stack([rows[i][name] for i in range(8)]).to(plain), plain)


def test_a_cut_run_continues_and_a_finished_one_stays(given, tmp_path, monkeypatch):
    encode(given, tmp_path / "whole")
    write, made = latents.write_shard, []

    def full(place, *rest):
        if len(made) == 1:
            raise UserError(f"cannot write {place}: No space left on device")
        made.append(place.name)
        write(place, *rest)

    monkeypatch.setattr(latents, "write_shard", full)
    with pytest.raises(UserError, match="No space left"):
        encode(given, tmp_path / "cut")
    with pytest.raises(UserError, match="no manifest.json: repeat dsvae encode"):
        Latents(tmp_path / "cut")
    monkeypatch.setattr(
        latents, "write_shard", lambda place, *_: write(place, *_) or made.append(place.name)
    )
    for _ in range(2):  # the second time there is nothing to do
        encode(given, tmp_path / "cut")
        assert made == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")
    for options, word in (({"dtype": "bf16"}, "setting"), ({"shard_rows": 5}, "setting")):
        with pytest.raises(UserError, match=f"latents of another {word}"):
            encode(given, tmp_path / "cut", **options)
    file = tmp_path / "other.txt"
    file.write_text("a bee\n")
    with pytest.raises(UserError, match="latents of another file"):
        encode((given[0], file, None), tmp_path / "cut")


def test_missing_and_damaged_shards_are_one_line(given, tmp_path):
    encode(given, tmp_path)
    shard = tmp_path / "00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="00001.safetensors is damaged"):
        list(Latents(tmp_path).shards())
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match="00001.safetensors has .* bytes, not"):
        Latents(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="00001.safetensors is missing"):
        Latents(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        Latents(tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "parquet", "dtype": "bf16"}, "parquet has no bf16"),
        ({"output": "z.safetensors"}, "leave .safetensors out"),
        ({"output": __file__}, "it is a file"),
    ],
)
def test_places_and_formats_that_cannot_be(given, options, told, tmp_path):
    with pytest.raises(UserError, match=told):
        encode(given, **{"output": tmp_path, **options})


def test_decode_is_the_way_back(given, tmp_path, capsys):
    model, _, vae = given
    manifest = encode(given, tmp_path / "z")
    q = vae.encode([text for text in TEXTS if text.strip()])
    expected = vae.decode(q.point, **FEW)

    def run(*words, code=0):
        assert (
            cli.main(["decode", *map(str, words), "--max_new_tokens", "7", "--device", "cpu"])
            == code
        )
        printed = capsys.readouterr()
        return printed.err if code else [json.loads(line) for line in printed.out.splitlines()]

    rows = run(model, tmp_path / "z", "--json")
    assert [row["decoded"] for row in rows] == expected
    assert [row["line"] for row in rows] == LINES
    assert [row["text"] for row in rows] == [text for text in TEXTS if text.strip()]
    mean, std = (torch.tensor(manifest["normalizer"][each]) + 0.5 for each in ("mean", "std"))
    z = q.point.view(8, *mean.shape)
    own = {"z": (z - mean) / std, "normalizer_mean": mean, "normalizer_std": std}
    if "valid" in q.tensors():
        own["valid"] = q.valid
    save_file({name: each.contiguous() for name, each in own.items()}, tmp_path / "u.safetensors")
    rows = run(model, tmp_path / "u.safetensors", "--normalized", "--json")
    if vae.model.family.continuous:
        assert [row["decoded"] for row in rows] == expected
    assert [row["line"] for row in rows] == list(range(1, 9))

    assert "has raw latents" in run(model, tmp_path / "z", "--normalized", code=2)
    save_file({"z": torch.zeros(2, 5)}, tmp_path / "five.safetensors")
    assert "has 5 numbers per text" in run(model, tmp_path / "five.safetensors", code=2)
    other = tmp_path / "other"
    make_vae(seed=1).save_pretrained(other)
    vae.tokenizer.save_pretrained(other)
    assert "latents of another model" in run(other, tmp_path / "z", code=2)
    assert "no such file" in run(model, tmp_path / "nowhere", code=2)


def test_two_ranks_write_what_one_does(tmp_path):
    given = model, file, _ = made_in(tmp_path)
    script = tmp_path / "encode.py"
    script.write_text("import sys\nfrom dsvae.cli import main\nsys.exit(main())\n")
    encode(given, tmp_path / "one")
    run = start(
        *("encode", model, file, "-o", tmp_path / "two", "--shard_rows", 4, "--batch_size", 2),
        ranks=2,
        script=script,
    )
    run.wait(120)
    assert run.codes == [0, 0], run.stderr
    assert run.stderr.count("8 sentences in") == 1
    assert facts(tmp_path / "two") == facts(tmp_path / "one")
