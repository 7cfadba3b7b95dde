"""When a checkpoint is loaded as it lies, and when it is converted."""

import pytest

from dsvae.engine.reshape_checkpoint import CONVERTED, SCRATCH, clean, fits

SHAPE = {
    "world_size": 2,
    "zero_stage": 2,
    "dtype": "bfloat16",
    "optimizer": "DeepSpeedZeroOptimizer",
    "layout": {"sub_group_size": None, "round_robin": False, "alignment": 0},
}


def test_the_same_shape_fits_whatever_else_was_recorded():
    assert fits({**SHAPE, "valid": 3.0}, SHAPE)


@pytest.mark.parametrize(
    "change",
    [
        {"world_size": 1},
        {"zero_stage": 1},
        {"dtype": "float32"},
        {"optimizer": "BF16_Optimizer"},
        {"layout": {**SHAPE["layout"], "round_robin": True}},
    ],
)
def test_another_shape_does_not(change):
    assert not fits({**SHAPE, **change}, SHAPE)
    assert not fits(SHAPE, {**SHAPE, **change})


def test_at_zero_0_any_number_of_ranks_fits():
    shape = {**SHAPE, "zero_stage": 0, "optimizer": "AdamW", "dtype": "float32"}
    assert fits(shape, {**shape, "world_size": 7})
    assert not fits(shape, {**shape, "world_size": 7, "zero_stage": 1})
    assert not fits({**shape, "dtype": "bfloat16"}, shape)


def test_a_checkpoint_that_recorded_ranks_and_stage_only():
    meta = {"world_size": 2, "zero_stage": 2}
    assert fits(meta, SHAPE)
    assert not fits({**meta, "world_size": 1}, SHAPE)


def test_only_the_leftovers_of_a_conversion_are_removed(tmp_path):
    (tmp_path / SCRATCH / CONVERTED / "zero").mkdir(parents=True)
    (tmp_path / "phase1-step00000004").mkdir()
    clean(tmp_path)
    clean(tmp_path)
    clean(tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["phase1-step00000004"]
