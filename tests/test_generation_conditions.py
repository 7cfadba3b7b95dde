"""Generation under conditions: against the model and the tokenizer used directly."""

import json

import pytest
import torch
from small_models import make_vae, small_tokenizer

from dsvae.cli import main
from dsvae.data.noise import LATENT, PRIOR, generator
from dsvae.data.records import Record
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE
from dsvae.generation.latents import Latents
from dsvae.generation.reading import Line, draw_sentences

TEXTS = [
    "a bad bee",
    "the cab had a bed",
    "abe",
    "he had the beach ball cab bad bed",
    "each ace bathed",
    "a tea",
    "dad had the bad tea the cab had",
]
CONDITIONS = [
    "bad bee",
    "cab bed cab bed",
    "tea",
    "a beach ball",
    "ace the dad",
    "tea",
    "had a bed",
]
FEW = {"max_new_tokens": 7}
FLAGS = ("--max_new_tokens", "7", "--device", "cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(TEXTS * 3, 60)


def conditional(tokenizer, batch_size=3, **latent):
    """A small conditional model, with a learned prior unless it says otherwise."""
    model = make_vae(**{"conditional": True, "prior": "learned", **latent})
    return SentenceVAE(model, tokenizer, batch_size=batch_size)


@pytest.fixture(scope="module")
def vae(tokenizer):
    return conditional(tokenizer)


def ids_of(vae, text):
    return vae.tokenizer(text, return_tensors="pt").input_ids


def posterior_of(vae, text, condition):
    """q(z|x,c) of one sentence: the encoder reads `c EOS x EOS`."""
    with torch.no_grad():
        return vae.model.encode(torch.cat([ids_of(vae, condition), ids_of(vae, text)], dim=1))


def prior_of(vae, condition):
    with torch.no_grad():
        return vae.model.prior(ids_of(vae, condition))


def decoded(vae, latent, condition, **kwargs):
    """One sentence from the model and the tokenizer themselves."""
    ids = vae.model.generate(
        latent=latent[None], condition_ids=ids_of(vae, condition), **{**FEW, **kwargs}
    )
    return vae.tokenizer.decode(ids[0], skip_special_tokens=True)


def noise(seed, purpose, number, width=6):
    return torch.from_numpy(
        generator(seed, purpose, 0, number).standard_normal(width, dtype="float32")
    )


# Samples


@pytest.mark.parametrize("prior", ["learned", "fixed"])
def test_samples_are_those_of_their_noise_and_of_the_prior_of_their_condition(tokenizer, prior):
    vae = conditional(tokenizer, prior=prior)
    condition = CONDITIONS[1]
    p = prior_of(vae, condition)  # one row of zeros, where it is fixed
    expected = [
        decoded(vae, p.mean[0] + torch.exp(0.5 * p.logvar[0]) * noise(11, PRIOR, i), condition)
        for i in range(8)
    ]
    assert vae.sample(8, condition=condition, seed=11, **FEW) == expected
    assert len(set(expected)) > 1  # the decoder listens to z,
    other = vae.sample(8, condition=CONDITIONS[2], seed=11, **FEW)
    assert other != expected  # and to the condition
    for size in (1, 8):
        again = SentenceVAE(vae.model, tokenizer, batch_size=size)
        assert again.sample(5, condition=f" {condition}\n", seed=11, **FEW) == expected[:5]


def test_samples_of_another_family_come_from_its_prior(tokenizer):
    vae = conditional(tokenizer, family="categorical", categories=4)
    rows = torch.stack([noise(3, PRIOR, i, vae.model.family.noise_width) for i in range(4)])
    expected = [
        decoded(vae, prior_of(vae, CONDITIONS[0]).sample(row[None])[0], CONDITIONS[0])
        for row in rows
    ]
    assert vae.sample(4, condition=CONDITIONS[0], seed=3, **FEW) == expected


def test_conditions_of_a_stream_are_sampled_as_single_ones(vae, tokenizer):
    stream = [f" {CONDITIONS[0]}\n", "\n", *CONDITIONS[1:5], "  "]
    numbers = [1, 3, 4, 5, 6]
    expected = [
        (Line(number, condition), text)
        for number, condition in zip(numbers, CONDITIONS[:5], strict=True)
        for text in vae.sample(4, condition=condition, seed=7, **FEW)
    ]
    for size in (1, 3, 64):
        again = SentenceVAE(vae.model, tokenizer, batch_size=size)
        assert list(again.conditional_stream(stream, 4, seed=7, **FEW)) == expected
        assert (again.counts.sentences, again.counts.blank) == (5, 2)


def test_long_conditions_of_streams_are_cut_and_counted(vae, tokenizer):
    short = SentenceVAE(vae.model, tokenizer, max_tokens=4)
    long = [len(tokenizer(text).input_ids) > 4 for text in CONDITIONS]
    list(short.conditional_stream(CONDITIONS, 1, seed=0, **FEW))
    assert (short.counts.conditions_truncated, short.counts.truncated) == (sum(long), 0)
    assert 0 < sum(long) < len(long)
    cut = SentenceVAE(vae.model, tokenizer, max_tokens=4)
    records = map(Record, TEXTS, CONDITIONS)
    assert sum(len(lines) for lines, _ in cut.encode_stream(records)) == len(TEXTS)
    assert cut.counts.conditions_truncated == sum(long)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_options_of_generate_reach_a_conditional_model(vae, options):
    latent = vae.encode(TEXTS[:3], CONDITIONS[:3]).mean
    batch = vae.tokenizer(CONDITIONS[:3], padding=True, return_tensors="pt")
    torch.manual_seed(4)
    expected = vae.model.generate(
        latent=latent,
        condition_ids=batch.input_ids,
        condition_mask=batch.attention_mask,
        **options,
        **FEW,
    )
    torch.manual_seed(4)
    found = vae.decode(latent, CONDITIONS[:3], **options, **FEW)
    assert found == vae.tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_samples_of_the_aggregate_posterior_keep_the_condition_of_their_sentence(vae, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"x": x, "c": c}) + "\n" for x, c in zip(TEXTS, CONDITIONS, strict=True))
    )
    lines = list(draw_sentences(str(path), "x", 9, 5, "c"))
    assert all((each.text, each.condition) in zip(TEXTS, CONDITIONS, strict=True) for each in lines)
    expected = []
    for i, line in enumerate(lines):
        q = posterior_of(vae, line.text, line.condition)
        z = q.mean[0] + torch.exp(0.5 * q.logvar[0]) * noise(5, LATENT, i)
        expected.append((line, decoded(vae, z, line.condition)))
    assert list(vae.posterior_stream(lines, seed=5, **FEW)) == expected
    found = vae.sample(3, texts=TEXTS[:1], conditions=CONDITIONS[:1], seed=5, **FEW)
    q = posterior_of(vae, TEXTS[0], CONDITIONS[0])
    latent = q.sample(torch.stack([noise(5, LATENT, i) for i in range(3)]))
    assert found == [decoded(vae, z, CONDITIONS[0]) for z in latent]


# From sentences


def test_posteriors_and_reconstructions_read_the_condition(vae):
    singles = [posterior_of(vae, *pair) for pair in zip(TEXTS, CONDITIONS, strict=True)]
    means = torch.cat([q.mean for q in singles])
    found = vae.encode(TEXTS, CONDITIONS)
    torch.testing.assert_close(found.mean, means, **CLOSE)
    logvars = torch.cat([q.logvar for q in singles])
    torch.testing.assert_close(found.logvar, logvars, **CLOSE)
    expected = [decoded(vae, *pair) for pair in zip(means, CONDITIONS, strict=True)]
    assert vae.reconstruct(TEXTS, CONDITIONS, **FEW) == expected
    assert vae.decode(means, CONDITIONS, **FEW) == expected
    assert vae.decode(means, CONDITIONS[::-1], **FEW) != expected
    records = [Record(text, condition) for text, condition in zip(TEXTS, CONDITIONS, strict=True)]
    stream = [records[0], Record(" "), *records[1:]]
    pairs = list(vae.reconstruct_stream(stream, **FEW))
    assert [text for _, text in pairs] == expected
    assert pairs[1][0] == Line(3, TEXTS[1], CONDITIONS[1])


def test_paths_and_directions_stay_under_one_condition(vae):
    a, b, c = TEXTS[1], TEXTS[3], TEXTS[4]
    condition = CONDITIONS[3]
    z_a, z_b, z_c = (posterior_of(vae, text, condition).mean[0] for text in (a, b, c))
    found = vae.interpolate(a, b, steps=3, condition=condition, **FEW)
    expected = [decoded(vae, z, condition) for z in (z_a, (z_a + z_b) / 2, z_b)]
    assert found == expected
    assert vae.analogy(a, b, c, condition=condition, **FEW) == decoded(
        vae, z_b - z_a + z_c, condition
    )
    direction = torch.arange(6.0) - 2
    edited = vae.edit(c, direction, strength=0.7, condition=condition, **FEW)
    assert edited == decoded(vae, z_c + 0.7 * direction, condition)


@pytest.mark.parametrize("prior", ["learned", "fixed"])
def test_a_traversal_goes_over_the_prior_of_the_condition(tokenizer, prior):
    vae = conditional(tokenizer, prior=prior)
    text, condition = TEXTS[1], CONDITIONS[1]
    p = prior_of(vae, condition)
    offsets = torch.tensor([-2.0, 0.0, 2.0])
    expected = p.mean[0, 4] + torch.exp(0.5 * p.logvar[0, 4]) * offsets
    places, latent = vae.traversal(text, 4, steps=3, width=2.0, condition=condition)
    torch.testing.assert_close(latent[:, 4], expected, **CLOSE)
    own = posterior_of(vae, text, condition).mean[0]
    torch.testing.assert_close(latent[:, :4], own[:4].expand(3, -1), **CLOSE)
    texts = vae.traverse(text, 4, steps=3, width=2.0, condition=condition, **FEW)
    assert texts == [decoded(vae, z, condition) for z in latent]


def test_an_attribute_vector_is_made_of_records(vae):
    records = [Record(*pair) for pair in zip(TEXTS, CONDITIONS, strict=True)]
    means = torch.cat([posterior_of(vae, each.text, each.condition).mean for each in records])
    good = torch.tensor([True, False, True, True, False, False, True])
    labels = ["good" if each else "bad" for each in good.tolist()]
    found = vae.attribute_vector(iter(records), iter(labels), "good")
    torch.testing.assert_close(found, means[good].mean(0) - means[~good].mean(0), **CLOSE)


# Models without a latent, and those whose posterior reads the condition alone


def test_a_model_without_a_latent_samples_alone(tokenizer):
    plain = conditional(tokenizer, injection="none")
    expected = decoded(plain, torch.zeros(0), CONDITIONS[0])
    assert plain.sample(4, condition=CONDITIONS[0], seed=0, **FEW) == [expected] * 4
    torch.manual_seed(2)
    assert len(set(plain.sample(9, condition=CONDITIONS[0], seed=0, do_sample=True, **FEW))) > 1
    pair = [TEXTS[0]], [CONDITIONS[0]]
    for call in (
        lambda: plain.encode(*pair),
        lambda: plain.reconstruct(*pair),
        lambda: plain.interpolate("a", "b", condition="a"),
        lambda: plain.traverse("a", 0, condition="a"),
        lambda: plain.sample(1, texts=pair[0], conditions=pair[1]),
        lambda: list(plain.encode_stream([Record("a", "a")])),
    ):
        with pytest.raises(UserError, match=r"no latent .*only sample, with a condition"):
            call()


def test_a_posterior_of_the_condition_alone_takes_it_as_the_sentence(tokenizer):
    relations = SentenceVAE(make_vae(posterior_reads="condition"), tokenizer)
    with torch.no_grad():
        means = [relations.model.encode(ids_of(relations, c)).mean for c in CONDITIONS]
    torch.testing.assert_close(relations.encode(CONDITIONS).mean, torch.cat(means), **CLOSE)
    with pytest.raises(UserError, match="give that as the sentence"):
        relations.encode(TEXTS, CONDITIONS)


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(["a"]), "no condition is given"),
        (lambda vae: vae.reconstruct(["a"]), "no condition is given"),
        (lambda vae: vae.decode(torch.zeros(1, 6)), "no condition is given"),
        (lambda vae: vae.sample(2), "no condition is given"),
        (lambda vae: vae.sample(2, texts=["a"]), "no condition is given"),
        (lambda vae: vae.prior(), "no condition is given"),
        (lambda vae: vae.interpolate("a", "b"), "no condition is given"),
        (lambda vae: vae.traverse("a", 0), "no condition is given"),
        (lambda vae: list(vae.encode_stream(["a"])), "no condition is given"),
        (lambda vae: list(vae.posterior_stream([Line(1, "a")], seed=0)), "no condition is given"),
        (lambda vae: vae.encode(["a", "b"], ["a"]), "1 conditions for 2 sentences"),
        (lambda vae: vae.decode(torch.zeros(1, 6), ["a", "b"]), "2 conditions for 1 sentences"),
        (lambda vae: vae.encode(["a"], [" "]), "a condition is blank"),
        (lambda vae: vae.sample(1, condition=""), "a condition is blank"),
        (lambda vae: vae.sample(1, condition="a \udce9"), "condition .* is not UTF-8"),
        (lambda vae: vae.sample(1, condition="a " * 600), "condition .*longer than max_tokens"),
        (lambda vae: vae.sample(1, conditions=["a"]), "give condition, or texts, too"),
        (lambda vae: vae.sample(1, condition="a", texts=["a"]), "give conditions for texts"),
    ],
)
def test_mistakes_are_told(vae, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(vae)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda vae: vae.encode(["a"], ["a"]),
        lambda vae: vae.decode(torch.zeros(1, 6), ["a"]),
        lambda vae: vae.sample(1, condition="a"),
        lambda vae: vae.analogy("a", "b", "c", condition="a"),
        lambda vae: list(vae.conditional_stream(["a"], 1, seed=0)),
        lambda vae: list(vae.reconstruct_stream([Record("a", "b")])),
    ],
)
def test_other_models_take_no_condition(tokenizer, call):
    with pytest.raises(UserError, match="not conditional, and a condition is given"):
        call(SentenceVAE(make_vae(), tokenizer))


def test_one_string_is_no_list_of_conditions(vae):
    with pytest.raises(TypeError, match="list of conditions"):
        vae.encode(["a"], "a")


# The command


@pytest.fixture(scope="module")
def model_dir(vae, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "model"
    vae.model.save_pretrained(directory)
    vae.tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    rows = [{"text": x, "condition": c} for x, c in zip(TEXTS, CONDITIONS, strict=True)]
    lines = [json.dumps(row) for row in [rows[0], {"text": " ", "condition": ""}, *rows[1:]]]
    (directory / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "c.txt").write_text(f"{CONDITIONS[0]}\n\n{CONDITIONS[1]}\n")
    (directory / "c.csv").write_text(f"n,ask\n1,{CONDITIONS[0]}\n2,{CONDITIONS[1]}\n")
    (directory / "text.txt").write_text("\n".join(TEXTS) + "\n")
    (directory / "blank.txt").write_text("\n \n")
    return directory


@pytest.fixture
def run(capsys):
    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@pytest.fixture
def fail(capsys):
    def call(*words):
        assert main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if not line.startswith("dsvae: seed")]
        assert (out, len(errors)) == ("", 1), err
        return errors[0]

    return call


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def test_sample_under_one_condition(run, vae, model_dir):
    words = ("sample", model_dir, "--condition", CONDITIONS[1], "-n", 3, "--seed", 4, *FLAGS)
    expected = vae.sample(3, condition=CONDITIONS[1], seed=4, **FEW)
    assert objects(run(*words, "--json")) == [
        {"sample": i, "condition": CONDITIONS[1], "sentence": text}
        for i, text in enumerate(expected, 1)
    ]
    assert run(*words) == "".join(f"{i}  {text}\n" for i, text in enumerate(expected, 1))


def test_sample_under_the_conditions_of_a_file(run, fail, vae, model_dir, corpus):
    words = ("sample", model_dir, "-n", 2, "--seed", 4, *FLAGS, "--conditions_file")
    expected = [
        {"sample": i, "line": number, "condition": condition, "sentence": text}
        for number, condition in ((1, CONDITIONS[0]), (3, CONDITIONS[1]))
        for i, text in enumerate(vae.sample(2, condition=condition, seed=4, **FEW), 1)
    ]
    assert objects(run(*words, corpus / "c.txt", "--json")) == expected
    first, second, third, fourth = (row["sentence"] for row in expected)
    assert run(*words, corpus / "c.txt") == (
        f"     1  {CONDITIONS[0]}\n        {first}\n        {second}\n"
        f"     3  {CONDITIONS[1]}\n        {third}\n        {fourth}\n"
    )
    csv = objects(run(*words, corpus / "c.csv", "--condition_column", "ask", "--json"))
    assert [row["sentence"] for row in csv] == [first, second, third, fourth]
    message = fail(*words, corpus / "c.csv")
    assert "no column 'condition', only 'n', 'ask'; choose one with --condition_column" in message
    assert "no sentences" in fail(*words, corpus / "blank.txt")
    found = objects(run(*words, corpus / "pairs.jsonl", "--json"))[:2]
    assert [row["sentence"] for row in found] == [first, second]


def test_commands_that_read_a_file_take_the_column_of_the_condition(
    run, vae, model_dir, corpus, tmp_path
):
    source = (corpus / "pairs.jsonl", "--condition_column", "condition")
    numbers = [1, *range(3, len(TEXTS) + 2)]
    made = vae.reconstruct(TEXTS, CONDITIONS, **FEW)
    assert objects(run("reconstruct", model_dir, *source, "--json", *FLAGS)) == [
        {"line": n, "condition": c, "sentence": x, "reconstruction": text}
        for n, c, x, text in zip(numbers, CONDITIONS, TEXTS, made, strict=True)
    ]
    run("encode", model_dir, *source, "-o", tmp_path / "z", "--device", "cpu")
    ((found, strings),) = Latents(tmp_path / "z").shards()
    assert strings == {"text": TEXTS, "condition": CONDITIONS}
    rows = objects(run("decode", model_dir, tmp_path / "z", "--json", *FLAGS))
    assert [(row["condition"], row["decoded"]) for row in rows] == [
        (c, text) for c, text in zip(CONDITIONS, made, strict=True)
    ]
    assert found["line"].tolist() == numbers
    torch.testing.assert_close(found["mean"], vae.encode(TEXTS, CONDITIONS).mean, **CLOSE)
    priors = [prior_of(vae, condition) for condition in CONDITIONS]
    mean, scale = (torch.cat([p.mean for p in priors]), torch.cat([p.logvar for p in priors]))
    torch.testing.assert_close(found["prior_mean"], mean, **CLOSE)
    torch.testing.assert_close(found["prior_logvar"], scale, **CLOSE)
    torch.testing.assert_close(found["prior_scale"], scale.exp().sqrt(), **CLOSE)
    rows = objects(
        run(
            *("sample", model_dir, "--source", "aggregate", "--file", *source),
            *("-n", 5, "--seed", 1, "--json", *FLAGS),
        )
    )
    lines = draw_sentences(str(corpus / "pairs.jsonl"), "text", 5, 1, "condition")
    drawn = vae.posterior_stream(lines, seed=1, **FEW)
    assert rows == [
        {
            "sample": i,
            "sentence": text,
            "line": line.line,
            "condition": line.condition,
            "from": line.text,
        }
        for i, (line, text) in enumerate(drawn, 1)
    ]


def test_commands_that_read_sentences_take_one_condition(run, vae, model_dir, corpus, tmp_path):
    a, b, c = TEXTS[1], TEXTS[3], TEXTS[4]
    given = {"condition": CONDITIONS[3]}
    flags = ("--condition", CONDITIONS[3], "--json", *FLAGS)
    rows = objects(run("interpolate", model_dir, a, b, "--steps", 3, *flags))
    expected = vae.interpolate(a, b, steps=3, **given, **FEW)
    assert [row["sentence"] for row in rows] == expected
    (row,) = objects(run("analogy", model_dir, a, b, c, *flags))
    assert row["sentence"] == vae.analogy(a, b, c, **given, **FEW)
    rows = objects(run("traverse", model_dir, a, "--dim", 2, "--steps", 3, *flags))
    assert [row["sentence"] for row in rows] == vae.traverse(a, 2, steps=3, **given, **FEW)
    labels = ["pos", "neg", "pos", "neg", "pos", "neg", "pos"]
    (tmp_path / "labels.txt").write_text("\n".join([labels[0], "", *labels[1:]]) + "\n")
    (row,) = objects(
        run(
            *("edit", model_dir, a, "--toward", "neg", "--labels_file", tmp_path / "labels.txt"),
            *("--text_file", corpus / "pairs.jsonl", "--condition_column", "condition"),
            *("--strength", 2, *flags),
        )
    )
    vector = vae.attribute_vector(map(Record, TEXTS, CONDITIONS), labels, "neg")
    assert row["edited"] == vae.edit(a, vector, strength=2.0, **given, **FEW)
    assert row["reconstruction"] == vae.reconstruct([a], [CONDITIONS[3]], **FEW)[0]


def test_mistakes_of_the_command_are_one_line(fail, tokenizer, model_dir, corpus, tmp_path):
    for name, latent in (
        ("plain", {}),
        ("none", {"injection": "none", "conditional": True}),
        ("relations", {"posterior_reads": "condition"}),
    ):
        make_vae(**latent).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pairs, output = corpus / "pairs.jsonl", ("-o", tmp_path / "z")
    column = ("--condition_column", "condition")
    for words in (
        ("sample", model_dir),
        ("sample", model_dir, "--source", "aggregate", "--file", pairs),
        ("reconstruct", model_dir, pairs),
        ("encode", model_dir, pairs, *output),
        ("interpolate", model_dir, "a", "b"),
        ("analogy", model_dir, "a", "b", "c"),
        ("traverse", model_dir, "a", "--dim", 0),
        ("edit", model_dir, "a", "--set", "0=1"),
    ):
        assert "no condition is given: give --condition" in fail(*words)
    for words in (
        ("sample", tmp_path / "plain", "--condition", "a"),
        ("sample", tmp_path / "plain", "--conditions_file", corpus / "c.txt"),
        ("reconstruct", tmp_path / "plain", pairs, *column),
        ("encode", tmp_path / "plain", pairs, *output, *column),
        ("interpolate", tmp_path / "plain", "a", "b", "--condition", "a"),
    ):
        assert "not conditional, and a condition is given" in fail(*words)
    assert "give that as the sentence" in fail(
        "reconstruct", tmp_path / "relations", pairs, *column
    )
    assert "it can only sample" in fail("reconstruct", tmp_path / "none", pairs, *column)
    assert "has no columns, and --condition_column is given" in fail(
        "reconstruct", model_dir, corpus / "text.txt", *column
    )
    assert "stdin has none: give FILE" in fail("reconstruct", model_dir, *column)
    for given in (
        ("--condition", "a", "--conditions_file", corpus / "c.txt"),
        ("--condition", "a", "--source", "aggregate", "--file", pairs),
    ):
        assert "use one of them" in fail("sample", model_dir, *given)
    for given in ((), ("--condition", "a")):
        assert "is for --conditions_file" in fail("sample", model_dir, *given, *column)
    assert "no such file" in fail("sample", model_dir, "--conditions_file", tmp_path / "none.txt")
    labelled = ("--toward", "a", "--labels_file", pairs, "--text_file", pairs)
    message = fail("edit", model_dir, "a", "--condition", "a", *labelled)
    assert "give --condition_column, too" in message
    assert "beside --condition" in fail("edit", model_dir, "a", *labelled, *column)
    assert list(output[1].parent.glob("*.safetensors")) == []


def test_a_model_without_a_latent_says_that_its_samples_repeat(tokenizer, tmp_path, capsys):
    conditional(tokenizer, injection="none").model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["sample", str(tmp_path), "--condition", "a bed", "-n", "2", *FLAGS]
    assert main(words) == 0
    out, err = capsys.readouterr()
    first, second = (line[3:] for line in out.splitlines())
    assert first == second
    assert "no latent: without --do_sample, a condition has one sentence" in err
    assert main([*words, "--do_sample"]) == 0
    assert "no latent" not in capsys.readouterr().err
