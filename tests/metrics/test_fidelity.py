"""How reconstructions and what noise on z leaves of them are scored, against sacrebleu,
numbers by hand, and a decoder that reads its answers from z."""

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU
from small_models import make_vae, small_tokenizer

from dsvae.data.grammar import generate
from dsvae.data.noise import ROOM, normal
from dsvae.data.record_tokens import tokenize
from dsvae.inference.passes import Passes
from dsvae.metrics import reconstruction
from dsvae.metrics.evaluate import evaluate, measure
from dsvae.metrics.information import participation_ratio
from dsvae.metrics.reconstruction import NOISE, Recovered, corpus_bleu, fidelity

TEXTS = [drawn.text for drawn in generate(80, seed=5)]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(TEXTS)


def damaged(texts, share, seed):
    """The texts with that share of their words changed, dropped or doubled."""
    rng = np.random.default_rng(seed)
    found = []
    for text in texts:
        words = []
        for word in text.split():
            kind = rng.integers(3) if rng.random() < share else 3
            words += {0: ["other"], 1: [], 2: [word, word], 3: [word]}[int(kind)]
        found.append(" ".join(words))
    return found


def recovered(tokenizer, references, texts):
    """`Recovered` of texts that a decoder could have written."""
    split = tokenize(references, tokenizer, 64, "test")[0]
    decoded = [np.array(tokenizer(text).input_ids) for text in texts]
    return Recovered.of(split, references, decoded, texts, torch.zeros(len(texts)))


@pytest.mark.parametrize(
    "change",
    [
        lambda texts: damaged(texts, 0.3, 0),
        lambda texts: [" ".join(text.split()[:3]) for text in texts],  # shorter
        lambda texts: ["the king"] * len(texts),  # no 3-gram matches
        lambda texts: ["nothing matches at all"] * len(texts),
        lambda texts: [""] * len(texts),
    ],
)
def test_corpus_bleu_is_that_of_sacrebleu(tokenizer, change):
    texts = change(TEXTS)
    found = recovered(tokenizer, TEXTS, texts)
    expected = BLEU(force=True).corpus_score(texts, [TEXTS]).score
    score, influence = corpus_bleu(found.ngrams)
    assert score == pytest.approx(expected, abs=1e-9)
    assert influence.sum() == pytest.approx(0, abs=1e-9)

    def weighed(row, weight):
        """log BLEU of 10,000 copies of the texts, and `weight` more of one."""
        sums = (10_000 * found.ngrams.sum(0) + weight * found.ngrams[row]).tolist()
        return np.log(BLEU.compute_bleu(sums[:4], sums[4:8], *sums[8:], smooth_method="exp").score)

    for row in (0, 7, 33) if expected else ():
        slope = (weighed(row, 1) - weighed(row, -1)) / 2e-4
        assert influence[row] == pytest.approx(expected * slope, rel=1e-4, abs=1e-9)


def test_the_error_of_bleu_is_that_of_the_bootstrap(tokenizer):
    texts = damaged(TEXTS, 0.4, 1)
    found = recovered(tokenizer, TEXTS, texts)
    _, se = found.scores()
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(400):
        rows = rng.integers(len(TEXTS), size=len(TEXTS))
        sums = found.ngrams[rows].sum(0).tolist()
        scores.append(BLEU.compute_bleu(sums[:4], sums[4:8], *sums[8:], smooth_method="exp").score)
    assert se["bleu"] == pytest.approx(np.std(scores), rel=0.15)


def test_groups_of_lengths_by_hand():
    lengths = np.array([1, 8, 9, 16, 17, 2, 33, 64, 65])
    found = reconstruction._by_length(lengths)
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "1-8": [0, 1, 5],
        "9-16": [2, 3],
        "17-32": [4],
        "33-64": [6, 7],
        "65-128": [8],
    }


def test_a_group_has_the_scores_of_its_sentences_alone(tokenizer):
    texts = damaged(TEXTS, 0.2, 2)
    split = tokenize(TEXTS, tokenizer, 64, "test")[0]
    decoded = [np.array(tokenizer(text).input_ids) for text in texts]
    right = torch.from_numpy(split.lengths - 1)
    found = reconstruction.compare(split, TEXTS, decoded, tokenizer, right)
    groups = found["by_length"]["sentences"]
    assert len(groups) > 1
    assert sum(groups.values()) == len(TEXTS)
    for name in groups:
        low, high = map(int, name.split("-"))
        rows = [i for i, length in enumerate(split.lengths) if low <= length <= high]
        assert groups[name] == len(rows)
        alone = reconstruction.compare(
            split.select(rows),
            [TEXTS[i] for i in rows],
            [decoded[i] for i in rows],
            tokenizer,
            right[rows],
        )
        for score in ("exact_match", "token_accuracy_free", "bleu"):
            assert found["by_length"][score][name] == pytest.approx(alone[score])
            assert found["se"]["by_length"][score][name] == pytest.approx(
                alone["se"][score], nan_ok=True
            )
        tokens = split.lengths[rows].sum()
        forced = found["by_length"]["token_accuracy_forced"][name]
        assert forced == pytest.approx((tokens - len(rows)) / tokens)


@pytest.mark.parametrize(
    ("variances", "expected"),
    [([1, 1, 1], 3), ([4, 1], 25 / 17), ([1, 0, 0], 1), ([2, 2, 1e-9, 0], 2)],
)
def test_participation_ratio_in_closed_form(variances, expected):
    """Rows at plus and minus one deviation of each axis, in a rotated space."""
    axes = torch.tensor(variances, dtype=torch.float64).sqrt().diag()
    rotation, _ = torch.linalg.qr(
        torch.randn(len(axes), len(axes), generator=torch.Generator().manual_seed(0)).double()
    )
    rows = torch.cat([axes, -axes]) @ rotation + 7
    assert participation_ratio(rows)[0] == pytest.approx(expected)


def test_without_variance_there_is_no_participation_ratio():
    assert np.isnan(participation_ratio(torch.ones(5, 3))[0])
    assert np.isnan(participation_ratio(torch.ones(1, 3))).all()


def test_the_error_of_the_participation_ratio_is_how_much_samples_differ():
    rng = torch.Generator().manual_seed(0)
    scale = torch.tensor([2.0, 1.0, 1.0, 0.5])
    found = [
        participation_ratio(torch.randn(500, 4, generator=rng) * scale + 3) for _ in range(400)
    ]
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.12)
    variance = scale.square()
    exact = float(variance.sum() ** 2 / variance.square().sum())
    assert values.mean() == pytest.approx(exact, rel=0.02)


VECTORS = {"pooling": "chunks", "chunk": 8, "latent_vectors": 8, "latent_dim": 3}


def vectors_of(latent, split):
    """Which numbers of z each sentence has, (N, Z)."""
    if "latent_vectors" not in latent:
        return np.ones((len(split), 6), dtype=bool)
    has = np.arange(8) * 8 < split.lengths[:, None]
    return has.repeat(3, axis=1)


@pytest.mark.parametrize("latent", [{}, {**VECTORS, "injection": "cross"}], ids=["one", "several"])
def test_noise_is_a_share_of_the_deviation_of_z_and_keyed_by_sentence(
    latent, tokenizer, monkeypatch
):
    """What is decoded at each length of the noise, and how it is scored."""
    model = make_vae(**latent)
    passes = Passes(model, token_budget=512)
    split = tokenize(TEXTS, tokenizer, 64, "test")[0]
    measured = measure(passes, split, samples=1, seed=0)
    decoded, plain = [], reconstruction.generate

    def recorded(passes, latent, max_tokens, split):
        decoded.append((latent, plain(passes, latent, max_tokens, split)))
        return decoded[-1][1]

    monkeypatch.setattr(reconstruction, "generate", recorded)
    found = fidelity(
        passes, split, measured, np.arange(80), TEXTS, tokenizer, 12, noise_sentences=30, seed=4
    )
    assert len(decoded) == 1 + len(NOISE) == 8
    assert found["noise_sentences"] == 30
    rows = sorted(sorted(range(80), key=lambda i: split.content_keys[i])[:30])
    keys = [(0, int(split.content_keys[i])) for i in rows]
    has = vectors_of(latent, split)
    assert latent == {} or not has.all()
    draws = np.where(has, measured.draws.double().numpy(), np.nan)
    deviation = np.nan_to_num(np.nanstd(draws, axis=0))
    noise = normal(4, ROOM, keys, has.shape[1]) * deviation * has[rows]
    scores = []
    for s, (z, ids) in zip((0, 0.1, 0.2, 0.3, 0.5, 0.7, 1), decoded[1:], strict=True):
        expected = measured.posterior.point[rows] + s * torch.from_numpy(noise)
        torch.testing.assert_close(z, expected.float())
        texts = reconstruction.texts_of(ids, tokenizer)
        references = [TEXTS[i] for i in rows]
        scores.append(BLEU(force=True).corpus_score(texts, [references]).score)
        assert found["noise"]["bleu"][f"{s:g}"] == pytest.approx(scores[-1])
        right = 0
        with torch.no_grad():
            for i, own in zip(rows, z, strict=True):
                labels = torch.from_numpy(split.ids(i))[None]
                logits = model(labels=labels, latent=own[None]).logits
                right += int((logits.argmax(-1) == labels).sum())
        tokens = sum(len(split.ids(i)) for i in rows)
        assert found["noise"]["token_accuracy_forced"][f"{s:g}"] == pytest.approx(right / tokens)
    assert len(set(scores)) > 3
    area = 0.05 * (scores[0] + scores[3]) + 0.1 * (scores[1] + scores[2])
    area += 0.1 * (scores[3] + 2 * scores[4] + scores[5]) + 0.15 * (scores[5] + scores[6])
    assert found["bleu_area"] == pytest.approx(area)


def test_numbers_and_directions_of_several_vectors(tokenizer):
    """By a loop over the vectors that each sentence has."""
    model = make_vae(**VECTORS, injection="cross")
    split = tokenize(TEXTS, tokenizer, 64, "test")[0]
    found = evaluate(Passes(model, token_budget=4096), split, samples=1)[0]
    vectors = np.ceil(split.lengths / 8)
    tokens = split.lengths.sum()
    assert found["tokens_per_vector"] == pytest.approx(tokens / vectors.sum())
    assert found["numbers_per_token"] == pytest.approx(3 * vectors.sum() / tokens)
    whole, rows, texts = np.zeros((80, 24)), [], []
    with torch.no_grad():
        for i in range(80):
            mean = model.encode(torch.from_numpy(split.ids(i))[None]).point[0].double().numpy()
            whole[i] = mean
            rows += list(mean.reshape(8, 3)[: int(vectors[i])])
            texts += [i] * int(vectors[i])
    has = vectors_of(VECTORS, split)
    for d in range(24):
        whole[has[:, d], d] -= whole[has[:, d], d].mean() if has[:, d].any() else 0
    for name, each in (("", whole), ("_vector", np.array(rows))):
        roots = np.linalg.eigvalsh(np.cov(each.T, ddof=0))
        ratio = roots.sum() ** 2 / np.square(roots).sum()
        assert found[f"participation_ratio{name}"] == pytest.approx(ratio, rel=1e-3)

    def without(text):
        roots = np.linalg.eigvalsh(np.cov(np.array(rows)[np.array(texts) != text].T, ddof=0))
        return roots.sum() ** 2 / np.square(roots).sum()

    left = np.array([without(text) for text in range(80)])
    jackknife = np.sqrt(79 / 80 * np.square(left - left.mean()).sum())
    assert found["se"]["participation_ratio_vector"] == pytest.approx(jackknife, rel=0.1)


def test_the_error_of_the_area_is_that_of_the_jackknife(tokenizer, monkeypatch):
    """A sentence is damaged more as the noise grows, so its scores go together."""
    split = tokenize(TEXTS, tokenizer, 64, "test")[0]
    levels = {s: damaged(TEXTS, s * 0.5, 3) for s in NOISE}
    passes = Passes(make_vae(), token_budget=4096)

    def answers(passes, latent, *_):
        texts = levels[min(NOISE, key=lambda s: abs(s - float(latent[0, 0])))]
        return [np.array([*map(ord, text), 1]) for text in texts]

    monkeypatch.setattr(reconstruction, "generate", answers)
    monkeypatch.setattr(
        reconstruction, "texts_of", lambda rows, _: ["".join(map(chr, row[:-1])) for row in rows]
    )
    z, one = torch.zeros(80, 6), torch.ones(80, 6)
    found = reconstruction.noise_curve(passes, split, z, one, TEXTS, tokenizer, 12, "x")
    ngrams = [recovered(tokenizer, TEXTS, levels[s]).ngrams for s in NOISE]

    def area(rows):
        scores = [corpus_bleu(each[rows])[0] for each in ngrams]
        pairs = zip(scores, scores[1:], np.diff(NOISE), strict=False)
        return sum((a + b) / 2 * step for a, b, step in pairs)

    assert found["bleu_area"] == pytest.approx(area(np.arange(80)))
    left = np.array([area(np.delete(np.arange(80), i)) for i in range(80)])
    jackknife = np.sqrt(79 / 80 * np.square(left - left.mean()).sum())
    assert found["se"]["bleu_area"] == pytest.approx(jackknife, rel=0.05)
