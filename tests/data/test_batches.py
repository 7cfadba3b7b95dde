"""From an epoch to micro-batches: nothing lost, nothing twice, and the same sentences
and noise however a step is split."""

import numpy as np
import pytest
import torch

from dsvae.data.batches import (
    TrainingBatches,
    cut_step,
    evaluation_batches,
    most_micro_batches,
)
from dsvae.data.order import Mixture, draw_step
from dsvae.errors import UserError
from dsvae.modeling.crf import IGNORE

PAD, EOS = 0, 1
WORLDS = (1, 2, 3, 5)
SPLITS = [
    (1, {}),
    (1, {"micro_batches": 3}),
    (2, {"token_budget": 10_000}),
    (3, {"token_budget": 20}),
    (5, {"token_budget": 20}),
    (5, {"micro_batches": 1}),
]
"""How a step can be cut: (ranks, options)."""


class Sentences:
    """As much of a TokenizedSplit as batches need; sentence i can be told by its
    tokens."""

    def conditions(self, indices):
        return None

    tags = class_labels_of = conditions

    def condition_lengths_of(self, indices=None):
        return None

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths, dtype=np.int32)

    def __len__(self):
        return len(self.lengths)

    def lengths_of(self, indices):
        return self.lengths[indices]

    def rows(self, indices):
        return [
            np.append(2 + (i * 31 + np.arange(self.lengths[i] - 1) * 7) % 997, EOS) for i in indices
        ]


def sentences(count, shortest=3, longest=20, seed=0):
    return Sentences(np.random.default_rng(seed).integers(shortest, longest + 1, count))


def batches(split, rank=0, world_size=1, **options):
    defaults = {
        "batch_size": 16,
        "token_budget": 64,
        "noise_width": 4,
        "deletion": 0.4,
        "seed": 3,
        "pad_id": PAD,
    }
    return TrainingBatches(split, rank=rank, world_size=world_size, **{**defaults, **options})


def all_ranks(split, index, world_size, **options):
    """Step `index` of every rank."""
    return [batches(split, rank, world_size, **options).step(index) for rank in range(world_size)]


def drawn(steps):
    """(sentence, noise, what the encoder sees) of one optimizer step of all ranks, in
    order."""
    return sorted(
        (
            index,
            tuple(micro.noise[row, 0].tolist()),
            tuple(micro.input_ids[row][micro.attention_mask[row].bool()].tolist()),
        )
        for step in steps
        for micro in step.micro_batches
        for row, index in enumerate(micro.indices.tolist())
        if micro.weight[row] == 1
    )


def by_sentence(steps):
    """sentence -> (noise, what the encoder sees); a sentence that comes twice fails."""
    rows = drawn(steps)
    found = {index: rest for index, *rest in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize(
    ("count", "batch_size"), [(1, 1), (1, 16), (5, 16), (16, 16), (17, 5), (127, 1), (1000, 16)]
)
def test_every_epoch_has_every_sentence_once_and_every_step_is_full(count, batch_size):
    """The line of all steps, cut again where the epochs end."""
    epochs = 3
    steps = [
        draw_step(count, batch_size, seed=1, index=index)
        for index in range(-(-epochs * count // batch_size))
    ]
    assert {len(sentences) for sentences, _ in steps} == {batch_size}
    line, of = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    for epoch in range(epochs):
        found = line[epoch * count : (epoch + 1) * count]
        np.testing.assert_array_equal(np.sort(found), np.arange(count))
        assert (of[epoch * count : (epoch + 1) * count] == epoch).all()


def test_a_step_does_not_prefer_a_length():
    """A step is a random sample: its mean length varies as that of 128 random sentences
    does. Steps of one length would make it vary 11 times as much."""
    lengths = sentences(128 * 200).lengths
    means = [lengths[draw_step(len(lengths), 128, 0, i)[0]].mean() for i in range(200)]
    expected = lengths.std() / np.sqrt(128)
    # the standard error of a standard deviation from 200 values is 5% of it
    assert abs(np.std(means) - expected) < 0.25 * expected


def test_micro_batches_are_sorted_the_longest_first():
    for micro in batches(sentences(100), token_budget=10**6).step(3).micro_batches:
        assert ((micro.labels != IGNORE).sum(1).diff() <= 0).all()


def test_padding_is_small_where_micro_batches_are():
    """Steps of 128 sentences of 3 to 20 tokens: micro-batches of a quarter of what the
    step takes when all are padded to 20 leave at most half of the padding."""
    lengths = sentences(1280).lengths

    def padding(budget):
        padded = 0
        for index in range(10):
            step = draw_step(len(lengths), 128, 0, index)[0]
            step = step[np.argsort(-lengths[step])]
            for part in cut_step(lengths[step], 1, budget):
                padded += len(step[part]) * int(lengths[step][part].max())
        return 1 - lengths.sum() / padded

    assert 0.38 < padding(128 * 20) < 0.48  # one micro-batch: the mean is 11.5 of 20
    assert padding(32 * 20) < padding(128 * 20) / 2


@pytest.mark.parametrize(("world_size", "options"), SPLITS)
def test_three_epochs_of_all_ranks_have_every_sentence_three_times(world_size, options):
    split = sentences(48)
    seen = [
        row for index in range(9) for row in drawn(all_ranks(split, index, world_size, **options))
    ]
    assert [index for index, *_ in sorted(seen)] == np.repeat(np.arange(48), 3).tolist()
    assert len({noise for _, noise, _ in seen}) == len(seen)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_sentence_that_comes_twice_in_a_step_is_drawn_twice(world_size):
    """5 sentences, 16 in each step: every copy has its own noise."""
    split = sentences(5, shortest=15)
    assert batches(split, world_size=world_size).steps_per_epoch == 5 / 16
    rows = drawn(all_ranks(split, 1, world_size))
    assert len(rows) == len({noise for _, noise, _ in rows}) == 16
    # places 16 to 31 of the line: an end, two whole epochs, and a beginning
    counts = np.bincount([index for index, *_ in rows], minlength=5)
    assert counts.sum() == 16
    assert 2 <= counts.min() <= counts.max() <= 4
    assert len({(index, seen) for index, _, seen in rows}) >= 14


@pytest.mark.parametrize(("world_size", "options"), SPLITS)
def test_sentences_noise_and_deletion_of_a_step_do_not_depend_on_the_split(world_size, options):
    split = sentences(53)
    for index in (0, 3, 6):  # 6: in the second epoch
        one = drawn(all_ranks(split, index, 1, token_budget=10_000))
        assert drawn(all_ranks(split, index, world_size, **options)) == one


@pytest.mark.parametrize(
    ("world_size", "budget"), [(1, 20), (1, 64), (2, 33), (3, 10_000), (5, 20), (5, 33)]
)
def test_ranks_keep_step_within_the_budget(world_size, budget):
    split = sentences(97)
    most = most_micro_batches(split.lengths, 16, world_size, budget)
    for index in range(7):
        steps = all_ranks(split, index, world_size, token_budget=budget)
        counts = {len(step.micro_batches) for step in steps}
        assert len(counts) == 1
        assert counts.pop() <= most
        for step in steps:
            assert all(
                max(micro.labels.numel(), micro.input_ids.numel()) <= budget
                for micro in step.micro_batches
            )


def test_the_budget_is_used():
    """As many rows as fit: 12 sentences of 10 tokens on 2 ranks are 3 micro-batches of
    2 at 29 tokens, 2 of 3 at 30."""
    lengths = np.full(12, 10, dtype=np.int32)
    assert [(s.start, s.stop) for s in cut_step(lengths, 2, 29)] == [(0, 4), (4, 8), (8, 12)]
    assert [(s.start, s.stop) for s in cut_step(lengths, 2, 30)] == [(0, 6), (6, 12)]


@pytest.mark.parametrize(("world_size", "budget"), [(1, 33), (2, 40), (3, 10_000), (5, 20)])
def test_packed_ranks_keep_step_within_a_budget_of_real_tokens(world_size, budget):
    split = sentences(97)
    most = most_micro_batches(split.lengths, 16, world_size, budget, packing=True)
    for index in range(7):
        options = {"token_budget": budget, "packing": True}
        steps = all_ranks(split, index, world_size, **options)
        one = drawn(all_ranks(split, index, 1, token_budget=10_000))
        assert drawn(steps) == one
        counts = {len(step.micro_batches) for step in steps}
        assert len(counts) == 1
        assert counts.pop() <= most
        for step in steps:
            for micro in step.micro_batches:
                assert len(micro.packed.labels.rows) == (micro.labels >= 0).sum() <= budget
                assert len(micro.packed.input.rows) == micro.attention_mask.sum()
                tokens = micro.packed.input.pack(micro.input_ids)[:, 0]
                assert torch.equal(tokens, micro.input_ids[micro.attention_mask.bool()])


def test_a_packed_step_is_one_pass_if_it_fits_with_equal_tokens_per_rank():
    """The ranks differ by at most one sentence. The last pass has at most one sentence
    less for each pass."""
    split = sentences(500, longest=40)
    options = {"batch_size": 100, "packing": True}
    for index in range(3):
        steps = all_ranks(split, index, 2, token_budget=5000, **options)
        (first,), (second,) = (step.micro_batches for step in steps)
        tokens = [int((each.labels >= 0).sum()) for each in (first, second)]
        assert sum(tokens) == steps[0].tokens
        assert 0 <= tokens[0] - tokens[1] <= 40
        (step,) = all_ranks(split, index, 1, token_budget=900, **options)
        each = [int((micro.labels >= 0).sum()) for micro in step.micro_batches]
        assert len(each) == -(-step.tokens // 900)
        assert max(each) - min(each) <= 3 * 40


def test_draws_are_packed_too():
    (step,) = all_ranks(sentences(40), 0, 1, token_budget=10_000, packing=True, draws=3)
    (micro,) = step.micro_batches
    expected = micro.labels.repeat_interleave(3, 0)
    tokens = micro.packed_draws.labels.pack(expected)[:, 0]
    assert torch.equal(tokens, expected[expected >= 0])
    assert torch.equal(micro.packed_draws.input.rows, micro.packed.input.rows)


def test_a_given_number_of_micro_batches_cuts_into_equal_parts():
    cut = cut_step(np.full(10, 7, dtype=np.int32), 1, 1, micro_batches=4)
    assert sorted(s.stop - s.start for s in cut) == [2, 2, 3, 3]
    assert len(cut_step(np.full(3, 7, dtype=np.int32), 1, 1, micro_batches=4)) == 3  # no empty ones


@pytest.mark.parametrize("world_size", WORLDS)
def test_weights_sum_to_the_sentences_of_the_step(world_size):
    split = sentences(7)
    for index in range(2):
        steps = all_ranks(split, index, world_size, batch_size=5)
        expected, _ = draw_step(7, 5, seed=3, index=index)
        weights = [micro.weight.sum() for step in steps for micro in step.micro_batches]
        assert sum(map(float, weights)) == 5
        assert {(step.sentences, step.tokens) for step in steps} == {
            (5, split.lengths[expected].sum())
        }


def test_a_rank_without_a_sentence_gets_a_filler_of_weight_0():
    split = Sentences([4, 4, 4, 4, 4, 4, 4])
    # micro-batches of one sentence per rank: the 7 of a step leave 3 ranks without one
    steps = all_ranks(split, 1, 5, batch_size=7, token_budget=4)
    weights = [micro.weight.tolist() for step in steps for micro in step.micro_batches]
    assert sorted(weights) == [[0.0]] * 3 + [[1.0]] * 7
    # it runs like any other
    assert all((micro.labels != IGNORE).any() for step in steps for micro in step.micro_batches)


def test_the_encoder_sees_noise_and_the_labels_are_clean():
    split = sentences(64, shortest=10)
    shorter = 0
    for micro in batches(split, token_budget=10_000).step(0).micro_batches:
        for row, clean in enumerate(split.rows(micro.indices)):
            assert micro.labels[row][micro.labels[row] != IGNORE].tolist() == clean.tolist()
            seen = micro.input_ids[row][micro.attention_mask[row].bool()].tolist()
            rest = iter(clean.tolist())
            assert all(token in rest for token in seen)  # a subsequence, in order
            assert seen[-1] == EOS
            shorter += len(seen) < len(clean)
        assert (micro.input_ids[micro.attention_mask == 0] == PAD).all()
        assert (micro.attention_mask.diff(dim=1) <= 0).all()  # padding is on the right
    # of 16 sentences, none of which keeps its 9 or more tokens with a chance above 1%
    assert shorter >= 12


def test_without_deletion_encoder_and_labels_agree():
    for micro in batches(sentences(40), deletion=0.0).step(1).micro_batches:
        assert torch.equal(
            micro.input_ids.masked_fill(micro.attention_mask == 0, IGNORE), micro.labels
        )


def test_noise_is_standard_normal_and_new_at_every_step():
    split = sentences(64)
    first, second = (
        {
            i: noise
            for i, (noise, _) in by_sentence([batches(split, noise_width=64).step(s)]).items()
        }
        for s in (0, 4)
    )
    second_epoch = by_sentence([batches(split, noise_width=64, batch_size=64).step(1)])
    assert all(noise != second_epoch[i][0] for i, noise in first.items())
    values = np.array([*first.values(), *second.values()])  # (32, 64)
    assert abs(values.mean()) < 5 / np.sqrt(values.size)
    assert abs(values.std() - 1) < 5 / np.sqrt(2 * values.size)
    assert len(np.unique(values)) == values.size


def test_deletion_is_new_at_every_step():
    split = sentences(16, shortest=15)
    # an epoch has one step
    first, second = (by_sentence([batches(split).step(index)]) for index in (0, 1))
    assert sum(first[i][1] != second[i][1] for i in range(16)) >= 15


def test_epochs_have_orders_of_their_own_and_a_seed_repeats_them():
    def epoch(seed, number):
        return [draw_step(320, 16, seed, number * 20 + i)[0].tolist() for i in range(20)]

    first = epoch(0, 0)
    for other in (epoch(0, 1), epoch(1, 0)):
        # other company, not only another order of steps
        assert sorted(map(sorted, first)) != sorted(map(sorted, other))
    assert epoch(0, 0) == first


def test_any_step_may_be_asked_for_at_any_time():
    split = sentences(50)
    in_order = batches(split)
    expected = [drawn([in_order.step(i)]) for i in range(12)]  # more than three epochs
    other = batches(split)
    for index in np.random.default_rng(0).permutation(12):
        assert drawn([other.step(int(index))]) == expected[index]


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_mixture_does_not_depend_on_the_split_and_stays_within_its_bound(world_size):
    """A file of 3 sentences has a third of every step: they come several times in each."""
    split, mixture = sentences(53), Mixture.of([50, 3], [2, 1])
    most = most_micro_batches(split.lengths, 16, world_size, 33, mixed=True)
    for index in (0, 3, 6):
        one = drawn(all_ranks(split, index, 1, token_budget=10_000, mixture=mixture))
        steps = all_ranks(split, index, world_size, token_budget=33, mixture=mixture)
        assert drawn(steps) == one
        assert len({noise for _, noise, _ in one}) == 16
        assert {len(step.micro_batches) for step in steps} <= set(range(1, most + 1))


def test_training_does_not_follow_the_order_of_the_file():
    """The paper's code does not shuffle."""
    order = np.concatenate([draw_step(4000, 16, 0, i)[0] for i in range(250)])
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parametrize(
    ("count", "world_size"), [(1, 1), (1, 5), (4, 3), (53, 1), (53, 2), (53, 5)]
)
def test_evaluation_takes_every_sentence_once(count, world_size):
    lengths = sentences(count).lengths
    ranks = [
        list(evaluation_batches(lengths, token_budget=40, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(found) for found in ranks}) == 1
    real = [
        int(i)
        for found in ranks
        for indices, weights in found
        for i, w in zip(indices, weights, strict=True)
        if w == 1
    ]
    assert sorted(real) == list(range(count))
    for indices, weights in (batch for found in ranks for batch in found):
        assert len(indices) >= 1
        assert set(weights.tolist()) <= {0.0, 1.0}
        assert len(indices) * lengths[indices].max() <= 40


def test_more_ranks_than_sentences_is_an_error():
    with pytest.raises(UserError, match="5 ranks for 4 training sentences"):
        batches(sentences(4), world_size=5)


def test_a_batch_smaller_than_the_ranks_is_an_error():
    with pytest.raises(UserError, match=r"data\.batch_size 4 is less than the 5 ranks"):
        batches(sentences(50), world_size=5, batch_size=4)


def test_the_first_of_several_draws_is_the_only_one_of_one():
    split = sentences(64)
    (one,), (five,) = (batches(split, draws=k).step(3).micro_batches[:1] for k in (1, 5))
    assert five.noise.shape == (len(one.noise), 5, 4)
    assert torch.equal(one.noise[:, 0], five.noise[:, 0])
    assert five.noise.unique().numel() == five.noise.numel()


def test_masked_tokens_are_those_of_the_sentence_on_any_number_of_ranks():
    split, options = sentences(40), {"deletion": 0.0, "token_mask": 0.5, "mask_id": 7}
    alone = drawn(all_ranks(split, 2, 1, **options))
    assert drawn(all_ranks(split, 2, 2, **options)) == alone
    clean = drawn(all_ranks(split, 2, 1, deletion=0.0))
    hidden = 0
    for (*_, noisy), (*_, row) in zip(alone, clean, strict=True):
        assert len(noisy) == len(row)
        assert all(a in (b, 7) for a, b in zip(noisy, row, strict=True))
        hidden += sum(a == 7 for a in noisy)
    assert hidden


def test_what_disturbs_z_is_that_of_the_sentence_on_any_number_of_ranks():
    split, width = sentences(40), 5000
    options = {"latent_noise": 0.5, "latent_dropout": 0.2, "latent_width": width}

    def found(ranks):
        micros = [
            micro for step in all_ranks(split, 1, ranks, **options) for micro in step.micro_batches
        ]
        return {
            int(index): (micro.noise[row], micro.added[row], micro.factor[row])
            for micro in micros
            for row, index in enumerate(micro.indices)
            if micro.weight[row]
        }

    alone, shared = found(1), found(2)
    assert alone.keys() == shared.keys()
    assert len(alone) == 16
    for index, own in alone.items():
        assert all(torch.equal(*pair) for pair in zip(own, shared[index], strict=True))
        _, added, factor = own
        assert factor.unique().tolist() == pytest.approx([0.0, 1.25])
        # Six deviations of 5,000 numbers each.
        assert float(factor.mean()) == pytest.approx(1.0, abs=6 * 0.5 / width**0.5)
        assert float(added.std()) == pytest.approx(0.5, rel=6 / (2 * width) ** 0.5)
    assert len({float(added[0]) for _, added, _ in alone.values()}) == 16
    plain = batches(split).step(2).micro_batches[0]
    assert plain.added is plain.factor is None
