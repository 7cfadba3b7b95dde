"""The picture of a run: it shows the numbers of metrics.jsonl, and where the phases are."""

import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsvae.config import RunConfig
from dsvae.reports.run_plot import run_plot
from dsvae.reports.training_log import Reporter

SPEED = {"tokens_per_s": 1.0, "flops_per_s": 1.0, "peak_memory_gb": 1.0}


def train(step, kl_per_dim=(0.5,)):
    values = {"loss": 1.0, "rec": 20.0 - step, "kl": float(step), **SPEED}
    return step, 1 if step <= 3 else 2, values, list(kl_per_dim)


@pytest.fixture
def logged(tmp_path):
    """Three steps of phase 1 and two of phase 2, with a validation after each phase."""
    reporter = Reporter(RunConfig(output_dir=str(tmp_path)), enabled=True)
    reporter.open(1)
    for step in range(1, 6):
        reporter.scalars(*train(step))
        if step in (3, 5):
            valid = {"rec": 30.0 - step, "kl": 2.0 * step, "au": step, "rec_shuffled": 40.0}
            valid["kl_per_dim"] = [0.25, step, 1.5]
            reporter.evaluation(step, 1 if step == 3 else 2, "valid", valid)
    yield tmp_path, reporter
    reporter.close(None)


def test_it_shows_the_numbers_of_the_log(logged):
    figure = run_plot(logged[0] / "metrics.jsonl")
    losses, units, active, rate = figure.axes
    rec, kl = (line.get_xydata().tolist() for line in losses.lines[:2])
    assert rec == [[step, 20.0 - step] for step in range(1, 6)]
    assert kl == [[step, step] for step in range(1, 6)]
    assert set(losses.lines[2].get_xdata()) == {3}  # where phase 1 ends
    assert [text.get_text() for text in losses.texts] == ["phase 1", "phase 2"]
    assert [bar.get_height() for bar in units.patches] == [5.0, 1.5, 0.25]
    assert active.lines[0].get_xydata().tolist() == [[3, 3], [5, 5]]
    assert rate.lines[0].get_xydata().tolist() == [[6.0, 27.0], [10.0, 25.0]]


def test_a_number_that_is_not_finite_is_a_gap(tmp_path):
    row = {"step": 1, "phase": 1, "split": "train", "rec": None, "kl": 1.0}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    (axes,) = run_plot(tmp_path / "m.jsonl").axes  # a model without a latent, or too early
    assert np.isnan(axes.lines[0].get_ydata()).all()
    (tmp_path / "m.jsonl").write_text("")
    assert run_plot(tmp_path / "m.jsonl") is None


def test_it_lies_in_the_folder_of_the_run_and_in_tensorboard(logged):
    directory, reporter = logged
    reporter.close(None)
    with Image.open(directory / "run.png") as image:
        assert image.size > (1000, 600)
        assert np.asarray(image).std() > 0
    events = EventAccumulator(str(directory / "tensorboard"), {"images": 0}).Reload()
    (shown,) = events.Images("run")
    assert shown.step == 5
    assert (shown.width, shown.height) == image.size


def test_a_disk_that_takes_no_picture_does_not_end_the_run(logged, capsys):
    directory, reporter = logged
    (directory / "run.png").mkdir()
    (directory / "run.png" / "x").touch()
    reporter.close(None)
    assert f"warning: {directory / 'run.png'} was not written" in capsys.readouterr().out
    assert (directory / "metrics.jsonl").is_file()
