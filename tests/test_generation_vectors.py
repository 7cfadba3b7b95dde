"""Several vectors per text, from strings and back: against the model used directly."""

import pytest
import torch
from small_models import make_vae, small_tokenizer

from dsvae.errors import UserError
from dsvae.generation import SentenceVAE, fitted_prior

TEXTS = ["a bad bee", "abe", "he had the beach ball cab bad bed", "each ace bathed", "a tea"]
K, D, CHUNK = 7, 6, 3
FEW = {"max_new_tokens": 7}


@pytest.fixture(scope="module")
def vae():
    model = make_vae(
        injection="cross", pooling="chunks", chunk=CHUNK, latent_vectors=K, memory_slots=1
    )
    return SentenceVAE(model, small_tokenizer(TEXTS * 3, 60), batch_size=3)


def numbers_of(vae, texts):
    """How many vectors texts have."""
    return [-(-len(vae.tokenizer(text).input_ids) // CHUNK) for text in texts]


def test_encode_and_decode_by_vectors(vae):
    q = vae.encode(TEXTS)
    numbers = numbers_of(vae, TEXTS)
    assert len(set(numbers)) > 1
    assert q.vectors.shape == q.tensors()["mean"].shape == (5, K, D)
    assert q.valid.sum(1).tolist() == numbers
    together = vae.reconstruct(TEXTS, **FEW)
    assert together == vae.decode(q.point, **FEW) == vae.decode(q.vectors, **FEW)
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            own = vae.model.encode(vae.tokenizer(text, return_tensors="pt").input_ids)
        torch.testing.assert_close(q.vectors[row], own.vectors[0], atol=2e-5, rtol=1e-4)
    filled = torch.where(q.valid[..., None], q.vectors, 3.0)
    assert vae.decode(filled, valid=q.valid, **FEW) == together
    assert vae.decode(filled, **FEW) != together
    with pytest.raises(ValueError, match="valid"):
        vae.decode(filled, valid=q.valid[:, :2])


def test_a_text_with_more_tokens_than_the_vectors_hold_is_refused(vae):
    with pytest.raises(UserError, match=f"max_tokens .{K * CHUNK}.*no more vectors"):
        vae.encode(["bad " * 40])
    (found,) = list(vae.encode_stream(["bad " * 40]))
    assert found[1].valid.all()
    assert vae.counts.truncated == 1


def test_a_path_begins_and_ends_with_the_number_of_vectors_of_its_ends(vae):
    a, b = TEXTS[1:3]
    path = vae.interpolate(a, b, steps=3, **FEW)
    point = vae.encode([a, b]).point
    middle = vae.decode((point[:1] + point[1:]) / 2, **FEW)
    assert path == [*vae.reconstruct([a], **FEW), *middle, *vae.reconstruct([b], **FEW)]


def test_a_move_keeps_the_number_of_vectors(vae):
    q = vae.encode(TEXTS)
    moved = vae.move(q.point, torch.ones(K * D)).view(5, K, D)
    torch.testing.assert_close(moved, (q.vectors + 1) * q.valid[..., None])


def test_a_direction_is_the_difference_of_the_means_of_each_vector(vae):
    labels = ["x", "y", "x", "y", "y"]
    found = vae.attribute_vector(TEXTS, labels, "x").view(K, D)
    q = vae.encode(TEXTS)
    for vector in range(K):
        means = []
        for label in "xy":
            rows = [i for i, each in enumerate(labels) if each == label and q.valid[i, vector]]
            means.append(q.vectors[rows, vector].mean(0) if rows else torch.zeros(D))
        torch.testing.assert_close(found[vector], means[0] - means[1], atol=1e-5, rtol=1e-4)


def test_a_traversal_moves_a_number_of_a_vector(vae):
    (number,) = numbers_of(vae, TEXTS[:1])
    places, latent = vae.traversal(TEXTS[0], 4, vector=number - 1, steps=3, width=2.0)
    vectors, own = latent.view(3, K, D), vae.encode(TEXTS[:1]).vectors[0]
    assert [place["value"] for place in places] == pytest.approx([-2, 0, 2])
    assert vectors[:, number - 1, 4].tolist() == pytest.approx([-2, 0, 2])
    vectors[:, number - 1, 4] = own[number - 1, 4]
    torch.testing.assert_close(vectors, own.expand(3, -1, -1), atol=1e-5, rtol=1e-4)
    for unit, vector, told in ((0, number, "too short"), (D, 0, "0 to 5"), (0, K, "0 to 6")):
        with pytest.raises(UserError, match=told):
            vae.traversal(TEXTS[0], unit, vector=vector)


def test_samples_come_with_several_numbers_of_vectors(vae):
    assert len(vae.sample(4, seed=0, **FEW)) == 4
    assert len(vae.sample(4, seed=0, texts=TEXTS, **FEW)) == 4


def test_one_density_for_texts_of_several_lengths_is_refused(vae):
    with pytest.raises(UserError, match="numbers of vectors"):
        fitted_prior.check(vae)
