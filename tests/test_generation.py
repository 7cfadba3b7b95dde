"""Sentences to latents and back: against the model and the tokenizer used directly, and
against arithmetic by hand."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from small_models import make_vae, small_tokenizer
from transformers import GenerationConfig

from dsvae.data.noise import LATENT, PRIOR, generator
from dsvae.data.record_tokens import tokenize
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE, geometry, options
from dsvae.generation.options import PathKind
from dsvae.generation.reading import WINDOW, Line, draw_sentences, windows

TEXTS = [
    "a bad bee",
    "the cab had a bed",
    "abe",
    "he had the beach ball cab bad bed",
    "each ace bathed",
    "a tea",
    "dad had the bad tea the cab had",
]
FEW = {"max_new_tokens": 7}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(TEXTS * 3, 60)


@pytest.fixture(scope="module")
def vae(tokenizer):
    return SentenceVAE(make_vae(), tokenizer, batch_size=3)


def posterior_of(vae, text):
    """q(z|x) of one sentence from the model and the tokenizer themselves."""
    ids = vae.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return vae.model.encode(ids)


def decoded(vae, latent, **kwargs):
    """One sentence from the model and the tokenizer themselves."""
    ids = vae.model.generate(latent=latent[None], **{**FEW, **kwargs})[0]
    return vae.tokenizer.decode(ids, skip_special_tokens=True)


def with_deviation(vae, logvar):
    """The same with a posterior of this log-variance everywhere."""
    model = make_vae()
    head = model.posterior.head
    with torch.no_grad():
        head.weight[model.config.latent_dim :] = 0
        head.bias[model.config.latent_dim :] = logvar
    return SentenceVAE(model, vae.tokenizer, batch_size=3)


# Encoding and decoding


def test_batches_encode_and_reconstruct_as_single_sentences_do_in_the_order_given(vae):
    posterior = vae.encode(TEXTS)
    singles = [posterior_of(vae, text) for text in TEXTS]
    assert posterior.mean.shape == (len(TEXTS), 6)
    torch.testing.assert_close(
        posterior.mean, torch.cat([q.mean for q in singles]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        posterior.logvar, torch.cat([q.logvar for q in singles]), rtol=1e-4, atol=1e-5
    )
    expected = [decoded(vae, q.mean[0]) for q in singles]
    assert vae.reconstruct(TEXTS, **FEW) == expected
    # the decoder listens, so an order gone wrong would show
    assert len(set(expected)) > len(TEXTS) // 2
    assert vae.decode(posterior.mean, **FEW) == expected


def test_sentences_are_tokenized_as_in_training(vae):
    texts = [*TEXTS, "</s> a <pad> b", "zebra"]
    split, _, _ = tokenize(texts, vae.tokenizer, 6, "test")
    short = SentenceVAE(vae.model, vae.tokenizer, max_tokens=6)
    found = short.inputs.of_lines([Line(i + 1, text) for i, text in enumerate(texts)])
    assert found.ids == [split.ids(i).tolist() for i in range(len(texts))]
    assert short.counts.truncated == sum(split.truncated)
    assert any(split.truncated)
    assert not all(split.truncated)


def test_streams_skip_blank_sentences_truncate_long_ones_and_count_both(vae):
    short = SentenceVAE(vae.model, vae.tokenizer, batch_size=2, max_tokens=6)
    long = [len(vae.tokenizer(text).input_ids) > 6 for text in TEXTS]
    texts = [" " + TEXTS[0] + "\n", "\n", *TEXTS[1:], "  "]
    lines, posteriors = zip(*short.encode_stream(texts), strict=True)
    lines = [line for window in lines for line in window]
    assert lines == [Line(1, TEXTS[0])] + [Line(i + 2, text) for i, text in enumerate(TEXTS) if i]
    assert (short.counts.sentences, short.counts.blank, short.counts.truncated) == (
        len(TEXTS),
        2,
        sum(long),
    )
    means = torch.cat([q.mean for q in posteriors])
    untruncated = [i for i, cut in enumerate(long) if not cut]
    torch.testing.assert_close(
        means[untruncated], vae.encode(TEXTS).mean[untruncated], rtol=1e-4, atol=1e-5
    )


def test_a_stream_is_read_as_it_is_needed(vae):
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield TEXTS[i % len(TEXTS)]

    pairs = list(itertools.islice(vae.reconstruct_stream(endless(), **FEW), 5))
    assert [line.text for line, _ in pairs] == TEXTS[:5]
    assert [text for _, text in pairs] == vae.reconstruct(TEXTS[:5], **FEW)
    assert len(taken) <= 3 + 6  # a batch, then a window of two


def test_windows_grow_from_one_batch_to_a_bound():
    sizes = [len(window) for window in windows(range(1000), 3)]
    assert sizes[:4] == [3, 6, 12, 24]
    assert max(sizes) == WINDOW * 3
    assert sum(sizes) == 1000


def test_cut_sentences_are_counted_and_finished_ones_are_not(vae, tokenizer):
    mine = SentenceVAE(vae.model, tokenizer)
    latent = mine.encode(TEXTS).mean
    ids = mine.model.generate(latent=latent, max_new_tokens=4)
    cut = sum(tokenizer.eos_token_id not in row[1:] for row in ids.tolist())
    mine.decode(latent, max_new_tokens=4)
    assert mine.counts.unfinished == cut
    assert cut > 0
    mine.decode(latent, max_new_tokens=4, forced_eos_token_id=tokenizer.eos_token_id)
    assert mine.counts.unfinished == cut


def test_generate_options_reach_the_model(vae):
    latent = vae.encode(TEXTS[:3]).mean
    beams = vae.model.generate(latent=latent, num_beams=3, **FEW)
    assert vae.decode(latent, num_beams=3, **FEW) == vae.tokenizer.batch_decode(
        beams, skip_special_tokens=True
    )
    torch.manual_seed(4)
    drawn = vae.tokenizer.batch_decode(
        vae.model.generate(latent=latent, do_sample=True, **FEW), skip_special_tokens=True
    )
    torch.manual_seed(4)
    assert vae.decode(latent, do_sample=True, **FEW) == drawn


# Samples


def test_prior_samples_are_those_of_their_noise_whatever_the_batch(vae, tokenizer):
    noise = [generator(11, PRIOR, 0, i).standard_normal(6, dtype=np.float32) for i in range(8)]
    expected = [decoded(vae, torch.from_numpy(row)) for row in noise]
    assert vae.sample(8, seed=11, **FEW) == expected
    assert SentenceVAE(vae.model, tokenizer, batch_size=8).sample(5, seed=11, **FEW) == expected[:5]
    assert vae.sample(8, seed=12, **FEW) != expected


def test_without_a_seed_samples_follow_torch(vae):
    def draw():
        torch.manual_seed(3)
        return vae.sample(4, **FEW)

    assert draw() == draw()
    assert vae.sample(4, **FEW) != draw()


def test_aggregate_samples_are_draws_of_the_posteriors_of_the_sentences(vae):
    # With no deviation a draw is the mean: the sample is the reconstruction of the
    # sentence that it says it is from.
    sharp = with_deviation(vae, -60.0)
    lines = [Line(i + 1, TEXTS[i]) for i in (4, 0, 4, 2, 6, 1, 1)]
    drawn = list(sharp.posterior_stream(lines, seed=0, **FEW))
    assert [line for line, _ in drawn] == lines
    assert [text for _, text in drawn] == sharp.reconstruct([line.text for line in lines], **FEW)
    assert set(sharp.sample(40, texts=TEXTS[:3], seed=0, **FEW)) == set(
        sharp.reconstruct(TEXTS[:3], **FEW)
    )
    # With a deviation of one the noise is added to the mean.
    wide = with_deviation(vae, 0.0)
    noise = [
        torch.from_numpy(generator(5, LATENT, 0, i).standard_normal(6, dtype=np.float32))
        for i in range(len(lines))
    ]
    expected = [
        decoded(wide, posterior_of(wide, line.text).mean[0] + e)
        for line, e in zip(lines, noise, strict=True)
    ]
    assert [text for _, text in wide.posterior_stream(lines, seed=5, **FEW)] == expected


def test_sentences_are_drawn_uniformly_with_replacement_from_those_that_are_not_blank(tmp_path):
    path = tmp_path / "five.txt"
    path.write_text("a\n\nb\nc\n  \nd\ne\n")
    drawn = list(draw_sentences(str(path), "text", 5000, seed=1))
    assert len(drawn) == 5000
    assert set(drawn) == {Line(1, "a"), Line(3, "b"), Line(4, "c"), Line(6, "d"), Line(7, "e")}
    counts = np.unique([line.line for line in drawn], return_counts=True)[1]
    # chi-square with 4 degrees of freedom: once in a thousand
    assert ((counts - 1000) ** 2 / 1000).sum() < 18.5
    assert drawn == list(draw_sentences(str(path), "text", 5000, seed=1))
    assert drawn != list(draw_sentences(str(path), "text", 5000, seed=2))


# Paths and directions


@pytest.mark.parametrize("path", get_args(PathKind))
def test_an_interpolation_begins_and_ends_with_the_reconstructions(vae, path):
    a, b = TEXTS[1], TEXTS[3]
    found = vae.interpolate(a, b, steps=5, path=path, **FEW)
    assert len(found) == 5
    assert [found[0], found[-1]] == vae.reconstruct([a, b], **FEW)


def test_a_linear_path_is_a_straight_line():
    a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 4.0, -1.5])
    found = geometry.interpolate(a, b, 3, "linear")
    torch.testing.assert_close(found, torch.stack([a, (a + b) / 2, b]))


def test_slerp_turns_at_constant_speed_and_its_norm_goes_linearly():
    torch.manual_seed(0)
    a, b = torch.randn(16), 3 * torch.randn(16)
    found = geometry.interpolate(a, b, 9, "slerp").double()
    torch.testing.assert_close(found[0].float(), a)
    torch.testing.assert_close(found[-1].float(), b)
    norms = found.norm(dim=1)
    torch.testing.assert_close(
        norms, torch.linspace(float(norms[0]), float(norms[-1]), 9).double(), rtol=1e-5, atol=1e-5
    )
    units = found / norms[:, None]
    angles = torch.arccos((units[:-1] * units[1:]).sum(1))
    whole = math.acos(float(units[0] @ units[-1]))
    torch.testing.assert_close(angles, torch.full((8,), whole / 8).double(), rtol=1e-4, atol=1e-5)
    # In the plane of both, and between them: a rotation of the first by a part of the
    # angle.
    side = units[-1] - (units[-1] @ units[0]) * units[0]
    side /= side.norm()
    quarter = math.cos(whole / 4) * units[0] + math.sin(whole / 4) * side
    torch.testing.assert_close(units[2], quarter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("b", [[2.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
def test_slerp_is_a_straight_line_where_there_is_no_great_circle(b):
    a, b = torch.tensor([1.0, 0.0]), torch.tensor(b)
    torch.testing.assert_close(
        geometry.interpolate(a, b, 3, "slerp"), geometry.interpolate(a, b, 3, "linear")
    )


def test_an_analogy_and_an_edit_are_the_arithmetic_of_the_means(vae):
    a, b, c = TEXTS[0], TEXTS[3], TEXTS[4]
    z_a, z_b, z_c = (posterior_of(vae, text).mean[0] for text in (a, b, c))
    assert vae.analogy(a, b, c, **FEW) == decoded(vae, z_b - z_a + z_c)
    assert vae.analogy(a, a, c, **FEW) == decoded(vae, z_c)
    direction = torch.arange(6.0) - 2
    assert vae.edit(c, direction, strength=0.7, **FEW) == decoded(vae, z_c + 0.7 * direction)
    assert vae.edit(c, direction, strength=0.0, **FEW) == decoded(vae, z_c)


def test_an_attribute_vector_is_the_difference_of_two_means(vae):
    texts = [TEXTS[0], "", *TEXTS[1:], " "]
    labels = ["good", "bad", *("bad", "good", "other", "bad", "good", "bad"), "good"]
    means = {text: posterior_of(vae, text).mean[0].double() for text in TEXTS}
    good = torch.stack(
        [means[t] for t, label in zip(texts, labels, strict=True) if t.strip() and label == "good"]
    )
    rest = torch.stack(
        [means[t] for t, label in zip(texts, labels, strict=True) if t.strip() and label != "good"]
    )
    found = vae.attribute_vector(iter(texts), iter(labels), "good")
    torch.testing.assert_close(found.double(), good.mean(0) - rest.mean(0), rtol=1e-4, atol=1e-5)
    for bad in (labels[:-1], [*labels, "x"]):
        with pytest.raises(UserError, match="one label per line"):
            vae.attribute_vector(iter(texts), iter(bad), "good")
    with pytest.raises(UserError, match="0 sentences are labelled excellent"):
        vae.attribute_vector(iter(texts), iter(labels), "excellent")


def test_a_traversal_moves_one_dimension(vae):
    posterior = posterior_of(vae, TEXTS[1])
    places, latent = vae.traversal(TEXTS[1], 4, steps=5, width=2.0)
    offsets = [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert [place["offset"] for place in places] == offsets
    assert [place["value"] for place in places] == latent[:, 4].tolist()
    others = [0, 1, 2, 3, 5]
    torch.testing.assert_close(
        latent[:, others], posterior.mean[:, others].expand(5, -1), rtol=1e-4, atol=1e-5
    )
    assert latent[:, 4].tolist() == offsets  # the prior has mean 0 and deviation 1
    _, around = vae.traversal(TEXTS[1], 4, steps=5, width=2.0, scale="posterior")
    torch.testing.assert_close(around[:, others], latent[:, others])
    deviation = float(torch.exp(0.5 * posterior.logvar[0, 4]))
    expected = float(posterior.mean[0, 4]) + deviation * torch.tensor(offsets)
    torch.testing.assert_close(around[:, 4], expected, rtol=1e-4, atol=1e-5)
    assert vae.traverse(TEXTS[1], 4, steps=5, width=2.0, **FEW) == [decoded(vae, z) for z in latent]


# Categories


@pytest.fixture(scope="module")
def coded(tokenizer):
    """A model of 6 variables with 4 categories each."""
    model = make_vae(family="categorical", categories=4)
    return SentenceVAE(model, tokenizer, batch_size=3)


def one_hots(categories):
    """z of a category per variable, (24,)."""
    return torch.nn.functional.one_hot(torch.tensor(categories), 4).float().flatten()


def categories_of(vae, text):
    return posterior_of(vae, text).probabilities[0].argmax(-1).tolist()


def test_a_traversal_goes_over_all_categories_of_a_variable(coded):
    own = categories_of(coded, TEXTS[1])
    places, latent = coded.traversal(TEXTS[1], 2)
    assert places == [{"category": i} for i in range(4)]
    expected = torch.stack([one_hots([*own[:2], i, *own[3:]]) for i in range(4)])
    assert latent.tolist() == expected.tolist()
    texts = coded.traverse(TEXTS[1], 2, **FEW)
    assert texts == [decoded(coded, z) for z in expected]
    assert texts[own[2]] == coded.reconstruct([TEXTS[1]], **FEW)[0]


def test_categories_that_are_set_replace_those_of_the_sentence(coded):
    own = categories_of(coded, TEXTS[1])
    wanted = [own[0], 3, *own[2:5], 0]
    point = coded.encode([TEXTS[1]]).point
    before = point.clone()
    assert coded.with_categories(point, {1: 3, 5: 0}).tolist() == [one_hots(wanted).tolist()]
    assert torch.equal(point, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.traverse("a", 6), "variable 6: .* variables 0 to 5"),
        (lambda vae: vae.traverse("a", 0, steps=3), "steps is for dimensions"),
        (lambda vae: vae.traverse("a", 0, width=1.0), "width is for dimensions"),
        (lambda vae: vae.traverse("a", 0, scale="prior"), "scale is for dimensions"),
        (lambda vae: vae.with_categories(torch.zeros(1, 24), {6: 0}), "variables 0 to 5"),
        (lambda vae: vae.with_categories(torch.zeros(1, 24), {0: 4}), "categories 0 to 3"),
        (lambda vae: vae.interpolate("a", "b"), "continuous latent.*--set"),
        (lambda vae: vae.analogy("a", "b", "c"), "continuous latent"),
        (lambda vae: vae.attribute_vector(["a"], ["b"], "b"), "continuous latent"),
    ],
)
def test_mistakes_with_categories_are_told(coded, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(coded)
    assert "\n" not in str(caught.value)


def test_a_continuous_latent_has_no_categories_to_set(vae):
    with pytest.raises(UserError, match="this model's latent is gaussian"):
        vae.with_categories(torch.zeros(1, 6), {0: 1})


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode([]), "no sentences"),
        (lambda vae: vae.encode(["a", "  "]), "blank"),
        (lambda vae: vae.encode(["a \udce9"]), "not UTF-8"),
        (lambda vae: vae.encode(["a " * 600]), r"longer than max_tokens \(512\)"),
        (lambda vae: vae.interpolate("a", "b", steps=1), "at least 2"),
        (lambda vae: vae.traverse("a", 6), "dimensions 0 to 5"),
        (lambda vae: vae.traverse("a", -1), "dimensions 0 to 5"),
        (lambda vae: vae.traverse("a", 0, steps=1), "at least 2"),
        (lambda vae: vae.traverse("a", 0, width=0.0), "positive"),
        (lambda vae: vae.traverse("a", 0, scale="posteriors"), "not one of"),
        (lambda vae: vae.sample(0), "at least 1"),
        (lambda vae: vae.sample(1, seed=-1), "seed"),
        (lambda vae: vae.reconstruct(["a"], do_sample=True, temperature=0.0), "temperature"),
        (lambda vae: SentenceVAE(make_vae(injection="none"), vae.tokenizer), "without a latent"),
        (lambda vae: SentenceVAE(vae.model, vae.tokenizer, batch_size=0), "batch_size"),
        (lambda vae: SentenceVAE(vae.model, vae.tokenizer, max_tokens=1), "max_tokens"),
    ],
)
def test_mistakes_are_told(vae, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(vae)
    assert "\n" not in str(caught.value)


def test_one_string_is_no_list_of_sentences_and_a_latent_has_two_axes(vae):
    with pytest.raises(TypeError, match="list of sentences"):
        vae.encode("a bad bee")
    with pytest.raises(ValueError, match=r"not \(N, 6\)"):
        vae.decode(torch.zeros(6))


def test_options_are_those_of_transformers():
    known = vars(GenerationConfig())
    assert not set(options.OPTIONS) - set(known)
    options.check(
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": 2, "length_penalty": 0.5}
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.7}, "--temperature has no effect without --do_sample"),
        ({"do_sample": False, "top_p": 0.7}, "--top_p has no effect without --do_sample"),
        ({"length_penalty": 0.7}, "--length_penalty has no effect without beams"),
        ({"num_beams": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "must be greater than 0"),
    ],
)
def test_options_without_effect_are_told(given, message):
    with pytest.raises(UserError, match=message):
        options.check(given)
