"""metrics.jsonl and TensorBoard, read with other tools than those that wrote them."""

import json
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dsvae.config import DataConfig, ModelConfig, RunConfig
from dsvae.data.order import Mixture
from dsvae.files import write_json
from dsvae.reports import training_log
from dsvae.reports.run_text import data_text, mixture_text
from dsvae.reports.table import result_table
from dsvae.reports.training_log import Reporter

VALUES = {
    "loss": 3.0,
    "rec": 2.0,
    "kl": 1.0,
    "beta": 0.5,
    "lr": 1e-3,
    "tokens_per_s": 100.0,
    "flops_per_s": 2.5e9,
    "peak_memory_gb": 1.5,
}
VALID = {"rec": 1.5, "rec_shuffled": 4.0, "kl_per_dim": [0.5, 0.0]}


def make(directory, enabled=True, **fields):
    return Reporter(RunConfig(output_dir=str(directory), **fields), enabled=enabled)


@pytest.fixture
def reporter(tmp_path):
    found = make(tmp_path)
    yield found
    found.close(None)


def log(reporter, steps, loss=3.0):
    for step in steps:
        reporter.scalars(step, 1, {**VALUES, "loss": loss}, [0.25, 0.75])


def rows(directory):
    return [
        json.loads(line)
        for line in (directory / "metrics.jsonl").read_bytes().decode().split("\n")[:-1]
    ]


def run(directory, first, steps, **kwargs):
    """One process: opens the log at step `first` and logs `steps`."""
    reporter = make(directory)
    reporter.open(first)
    log(reporter, steps, **kwargs)
    reporter.close(None)


def events(directory):
    found = EventAccumulator(
        str(directory / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    found.Reload()
    return found


def test_a_row_has_what_was_logged(tmp_path, reporter):
    reporter.open(1)
    log(reporter, [7])
    reporter.evaluation(8, 2, "valid", VALID | {"precision": "bf16"})
    train, valid = rows(tmp_path)
    assert train == {"step": 7, "phase": 1, "split": "train", **VALUES, "kl_per_dim": [0.25, 0.75]}
    assert valid == {
        "step": 8,
        "phase": 2,
        "split": "valid",
        **VALID,
        "precision": "bf16",
    }


def test_a_row_can_be_read_as_soon_as_it_is_logged(tmp_path, reporter):
    reporter.open(1)
    log(reporter, [1])
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_no_step_twice_after_a_resume(tmp_path):
    run(tmp_path, 1, [1, 2, 3, 4, 5], loss=1.0)
    run(tmp_path, 4, [4, 5, 6], loss=2.0)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]
    scalars = events(tmp_path).Scalars("main/loss")
    assert [(event.step, event.value) for event in scalars] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]


def test_the_final_evaluation_goes_when_a_run_goes_on(tmp_path):
    """Its step is that of the last checkpoint, so the step alone would not drop it."""
    reporter = make(tmp_path)
    reporter.open(1)
    log(reporter, [5])
    reporter.evaluation(5, 2, "valid", {"rec": 1.0, "kl_per_dim": []})
    reporter.evaluation(5, 2, "test", {"rec": 1.0, "kl_per_dim": []})
    reporter.close(None)
    run(tmp_path, 6, [])
    assert [row["split"] for row in rows(tmp_path)] == ["train", "valid"]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_row_that_was_cut_off_is_dropped(tmp_path, cut):
    run(tmp_path, 1, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -cut - 1])
    run(tmp_path, 9, [9])
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 9]


def test_a_row_that_was_cut_inside_a_character_is_dropped(tmp_path, reporter):
    reporter.open(1)
    log(reporter, [1])
    reporter.text(2, [("ü", "ü")], ["ü"])
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex("ü".encode()) + 1])
    run(tmp_path, 3, [3])
    assert [row["step"] for row in rows(tmp_path)] == [1, 3]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\r", "\n"])
def test_sentences_with_odd_line_ends_survive_a_resume(tmp_path, reporter, mark):
    reporter.open(1)
    reporter.text(1, [(f"a{mark}b", "c")], [f"d{mark}"])
    log(reporter, [2])
    reporter.close(None)
    run(tmp_path, 3, [3])
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert rows(tmp_path)[0]["reconstruction"] == [[f"a{mark}b", "c"]]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_json_does_not_have_becomes_null(tmp_path, reporter, value):
    reporter.open(1)
    reporter.scalars(1, 1, {**VALUES, "grad_norm": value}, [value, 1.0])
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=pytest.fail)  # Infinity and NaN are Python's, not JSON's
    assert (row["grad_norm"], row["kl_per_dim"]) == (None, [None, 1.0])


def test_tensorboard_has_the_scalars_at_their_steps(tmp_path, reporter):
    reporter.open(1)
    reporter.start_phase(1, 4, 0)
    log(reporter, [2, 4])
    reporter.end_phase()
    measured = VALID | {"kl": 0.5, "mi": 0.25, "au": 1, "sentences": 7, "precision": "bf16"}
    reporter.evaluation(4, 1, "valid", measured)
    reporter.evaluation(4, 1, "test", measured)
    reporter.close(None)
    found = events(tmp_path)
    groups = {"main": ("loss", "rec", "kl", "beta"), "other": ("lr",)}
    groups["speed"] = ("tokens_per_s", "flops_per_s", "peak_memory_gb")
    for group, names in groups.items():
        for name in names:
            written = [(e.step, e.value) for e in found.Scalars(f"{group}/{name}")]
            assert written == [(step, pytest.approx(VALUES[name])) for step in (2, 4)]
    evaluated = {
        "main/mi": 0.25,
        "main/au": 1,
        "main/rec_shuffled_minus_rec": 2.5,
        "valid/rec": 1.5,
        "valid/rec_shuffled": 4,
        "valid/kl": 0.5,
        **{f"test/{name}": measured[name] for name in ("rec", "rec_shuffled", "kl", "mi", "au")},
    }
    for tag, value in evaluated.items():
        assert [(e.step, e.value) for e in found.Scalars(tag)] == [(4, value)], tag
    trained = {f"{group}/{name}" for group, names in groups.items() for name in names}
    # no counts, which never change, and no card for every dimension
    assert set(found.Tags()["scalars"]) == trained | set(evaluated)


def test_tensorboard_begins_with_what_matters(tmp_path, reporter):
    """It sorts tags by group and then by name, images and scalars together."""
    reporter.open(1)
    log(reporter, [1])
    reporter.evaluation(1, 1, "valid", VALID | {"mi": 0.25, "au": 1})
    reporter.close(None)
    found = events(tmp_path).Tags()
    first = sorted(found["scalars"] + found["images"])[:7]
    main = ("au", "beta", "kl", "loss", "mi", "rec", "rec_shuffled_minus_rec")
    assert first == [f"main/{name}" for name in main]


def layout_of(directory):
    """Category -> chart -> the tags that are drawn in it, as TensorBoard matches
    them."""
    found = events(directory)
    (event,) = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    tags = found.Tags()["scalars"]
    return {
        category.title: {
            chart.title: [t for each in chart.multiline.tag for t in tags if re.match(each, t)]
            for chart in category.chart
        }
        for category in layout.category
    }


def test_custom_scalars_put_together_what_belongs_together(tmp_path, reporter):
    reporter.open(1)
    log(reporter, [1])
    more = {"kl": 0.5, "mi": 0.25, "au": 1, "rec_prior": 3.0}
    reporter.evaluation(1, 1, "valid", VALID | more)
    reporter.close(None)
    layout = layout_of(tmp_path)
    assert list(layout) == ["training", "does z matter", "speed"]
    for category, charts in layout.items():
        for chart, tags in charts.items():
            assert tags, (category, chart)
    training, z = layout["training"], layout["does z matter"]
    assert training["rec, training and validation"] == ["main/rec", "valid/rec"]
    of_several_z = "rec by z: own, another's, prior's"
    assert z[of_several_z] == ["valid/rec", "valid/rec_shuffled", "valid/rec_prior"]


def test_a_language_model_has_no_charts_of_a_latent(tmp_path):
    reporter = make(tmp_path, model=ModelConfig(injection="none"))
    reporter.open(1)
    log(reporter, [1])
    reporter.evaluation(1, 1, "valid", {"rec": 1.5, "kl_per_dim": []})
    reporter.close(None)
    assert list(layout_of(tmp_path)) == ["training", "speed"]
    assert events(tmp_path).Tags()["images"] == ["run"]  # its losses alone


def test_labels_have_charts_of_their_own(tmp_path):
    reporter = make(tmp_path, data=DataConfig(label_column="label", tags_column="tags"))
    reporter.open(1)
    heads = {"class_nats": 0.5, "tag_nats": 0.25}
    reporter.scalars(1, 1, {**VALUES, **heads}, [0.25, 0.75])
    scores = {"class_accuracy": 0.75, "entity_f1": 0.5, "b3_f1": float("nan")}
    reporter.evaluation(1, 1, "valid", VALID | scores)
    reporter.close(None)
    charts = layout_of(tmp_path)["labels"]
    assert charts["-log p of labels and tags, training"] == ["main/class_nats", "main/tag_nats"]
    of_heads = charts["scores of heads, validation"]
    assert of_heads == ["main/class_accuracy", "main/entity_f1", "main/b3_f1"]
    (row,) = (row for row in rows(tmp_path) if row["split"] == "valid")
    assert (row["entity_f1"], row["b3_f1"]) == (0.5, None)


def test_one_image_per_evaluation_has_the_kl_of_every_dimension_so_far(tmp_path, monkeypatch):
    drawn = []
    original = training_log._kl_figure
    monkeypatch.setattr(
        training_log, "_kl_figure", lambda history: drawn.append(list(history)) or original(history)
    )
    first = make(tmp_path)
    first.open(1)
    for step, kl in ((2, [0.1, 0.2]), (4, [0.3, 0.4]), (6, [0.5, 0.6])):
        first.evaluation(step, 1, "valid", VALID | {"kl_per_dim": kl})
    first.close(None)
    again = make(tmp_path)  # cut after step 4
    again.open(5)
    again.evaluation(6, 2, "valid", VALID | {"kl_per_dim": [0.7, float("nan")]})
    again.evaluation(6, 2, "test", VALID)
    again.close(None)
    (last,) = drawn[3:]
    assert last[:2] == [(2, [0.1, 0.2]), (4, [0.3, 0.4])]
    assert last[2][0] == 6
    assert [event.step for event in events(tmp_path).Images("valid/kl_per_dim")] == [2, 4, 6]


def test_a_mixture_is_told_with_the_epochs_of_each_file():
    config = RunConfig()
    config.data.batch_size, config.phase1.steps, config.phase2.steps = 100, 40, 400
    files = [{"name": "a.txt", "sentences": 1000}, {"name": "b.txt", "sentences": 20_000}]
    told = mixture_text(files, Mixture.of([1000, 20_000], [3, 1]), config)
    # 4,000 sentences in phase 1: 3,000 of the 1,000
    assert told.splitlines() == [
        "      a.txt: 1,000 sentences, 0.75 of every step, epochs: 3 in phase 1 and 30 in phase 2",
        "      b.txt: 20,000 sentences, 0.25 of every step, epochs: 0.05 in phase 1 and 0.5 in "
        "phase 2",
    ]
    config.phase = "2"
    assert "phase 1" not in mixture_text(files, Mixture.of([1000, 20_000], [3, 1]), config)


def test_the_image_has_a_row_for_a_dimension_and_a_column_for_an_evaluation():
    figure = training_log._kl_figure([(2, [0.1, 1.0, 0.0]), (4, [0.3, 100.0, None])])
    image = figure.axes[0].images[0]
    expected = [[0.1, 0.3], [1.0, 10.0], [0.01, float("nan")]]  # cut to the ends of the scale
    np.testing.assert_allclose(np.asarray(image.get_array(), dtype=float), expected)
    assert image.get_clim() == (0.01, 10)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["2", "4"]


def test_tensorboard_has_hparams_and_final_metrics_in_the_one_run(tmp_path, reporter):
    config = reporter.config
    config.seed, config.phase2.beta.max = 17, 0.25
    reporter.open(1)
    final = {"rec": 4.5, "au": 7, "sentences": 7, "kl_per_dim": [1.0], "precision": "fp32"}
    reporter.evaluation(9, 2, "test", final)
    reporter.close(final)
    found = events(tmp_path)
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["seed"].number_value == 17
    assert given["phase2.beta.max"].number_value == 0.25
    assert given["phase2.beta.kind"].string_value == "linear"
    assert given["phase1.freeze_decoder"].bool_value is False
    # what one tunes, and not where the files are or how often something is written
    assert not {"output_dir", "log_every", "data.train_file", "model.name"} & set(given)
    experiment = HParamsPluginData.FromString(
        found.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {"test/rec", "test/au"}
    assert [[(e.step, e.value) for e in found.Scalars(tag)] for tag in sorted(metrics)] == [
        [(9, 7)],
        [(9, 4.5)],
    ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_has_the_text(tmp_path, reporter):
    reporter.open(1)
    reporter.text(3, [("a | b", "c"), ("ü", "d")], ["from the prior"])
    reporter.close(None)
    found = events(tmp_path)
    (event,) = found.Tensors("reconstruction/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 3
    # a bar in a sentence ends no cell
    assert text.splitlines()[2:] == ["| a \\| b | c |", "| ü | d |"]
    assert b"from the prior" in found.Tensors("prior/text_summary")[0].tensor_proto.string_val[0]


def test_the_sentence_of_a_language_model_stands_alone(tmp_path, reporter):
    reporter.open(1)
    reporter.text(3, [], ["the likeliest"])
    reporter.close(None)
    assert rows(tmp_path) == [
        {"step": 3, "split": "text", "reconstruction": [], "prior": ["the likeliest"]}
    ]
    found = events(tmp_path).Tags()["tensors"]
    assert [tag for tag in found if "text_summary" in tag] == ["prior/text_summary"]


def test_other_ranks_write_nothing(tmp_path, capsys):
    reporter = make(tmp_path, enabled=False, verbose=True)
    reporter.open(1)
    reporter.start_phase(1, 3, 0)
    log(reporter, [1])
    reporter.advance()
    reporter.evaluation(1, 1, "valid", {"kl_per_dim": []})
    reporter.text(1, [("a", "b")], ["c"])
    reporter.say("hello")
    reporter.detail("hello")
    reporter.end_phase()
    reporter.close({"rec": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_console_gets_the_lines(tmp_path, capsys, reporter):
    reporter.say("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize("verbose", [False, True])
def test_details_are_for_those_who_ask(tmp_path, capsys, verbose):
    make(tmp_path, verbose=verbose).detail("a detail")
    assert capsys.readouterr().out == ("a detail\n" if verbose else "")


def test_the_progress_line_has_losses_speed_and_memory(tmp_path, reporter, capsys):
    reporter.open(1)
    reporter.start_phase(1, 10, 0)
    log(reporter, [3])
    reporter.end_phase()
    line = capsys.readouterr().err
    assert "loss 3 rec 2 kl 1 beta 0.5 | 100 tok/s 2.5 GFLOP/s 1.50 GB" in line


@pytest.mark.parametrize(
    ("more", "expected"),
    [({"flops_per_s": 3.25e14}, "325.0 TFLOP/s"), ({"mfu": 0.3856}, "MFU 39%")],
)
def test_the_progress_line_of_a_gpu(more, expected):
    assert expected in training_log._postfix(VALUES | more)


def test_the_data_in_lines_for_people():
    def split(sentences, held_out, **counts):
        zero = {
            "repeated": 0,
            "skipped_blank": 0,
            "truncated": 0,
            "unk": 0,
            "tokens": 10 * sentences,
        }
        return {"sentences": sentences, "held_out": held_out, **zero, **counts}

    report = {
        "source": "train.txt",
        "vocab_size": 32100,
        "max_tokens": 64,
        "splits": {
            "train": split(12345, False, skipped_blank=3, truncated=1000, repeated=7),
            "valid": split(650, True, truncated=35, unk=2),
            "test": split(99, False),
        },
    }
    lines = data_text(report, 2).splitlines()
    assert [line.strip() for line in lines] == [
        "data: train.txt; 2 ranks",
        "sentences: train 12,345, valid 650 (held out), test 99; 123,450 tokens to train on, of "
        "32,100 pieces",
        "3 blank lines skipped, 1,035 sentences truncated to 64 tokens, 2 unknown tokens, "
        "7 repeated sentences",
    ]
    report["splits"]["train"]["dropped"] = 1200
    report["splits"]["valid"]["in_train"] = 5
    more = data_text(report, 2).splitlines()[len(lines) :]
    assert [line.strip() for line in more] == [
        "1,200 training sentences dropped that are also validation or test sentences",
        "warning: 5 of the 650 valid sentences are also training sentences; --data.deduplicate "
        "drops those from training",
    ]


NAMES = (
    "rec",
    "kl",
    "elbo",
    "ppl_token",
    "ppl_word",
    "bits_per_byte",
    "mi",
    "mi_cap",
    "rec_shuffled",
    "rec_prior",
)
MEASURED = {name: 10.125 + i for i, name in enumerate(NAMES)} | {
    "au": 9,
    "sentences": 12345,
    "kl_per_dim": [1.0],
}


def lines_of(metrics):
    """The first line, and name -> line for the others."""
    first, *lines = result_table("test", metrics).splitlines()
    return first, {line.split()[0]: line for line in lines}


def test_the_table_of_results_has_every_number_with_its_unit():
    first, lines = lines_of(MEASURED)
    assert first == "test (12,345 sentences)"
    assert set(lines) == {*NAMES, "au"}
    for i, name in enumerate(NAMES):
        assert lines[name].split()[1] == f"{10.125 + i:.3f}"
    assert "nats/sentence" in lines["elbo"]
    assert "an upper bound" in lines["ppl_token"]
    assert lines["au"].split()[1:3] == ["9", "units"]


def test_the_table_sets_the_entropy_of_the_corpus_beside_what_the_model_needs():
    _, lines = lines_of(MEASURED | {"entropy": 15.0794, "above_entropy": 1.25})
    names = list(lines)
    assert names[names.index("elbo") + 1 :][:2] == ["entropy", "above_entropy"]
    assert lines["entropy"].split()[1:3] == ["15.079", "nats/sentence"]
    assert lines["above_entropy"].split()[1:3] == ["1.250", "nats/sentence"]
    assert "rec + kl - entropy" in lines["above_entropy"]
    of_a_language_model = MEASURED | {"kl_per_dim": [], "entropy": 15.0794, "above_entropy": 1.25}
    assert "rec - entropy" in lines_of(of_a_language_model)[1]["above_entropy"]


def test_the_table_of_a_language_model_calls_nothing_a_bound_and_shows_no_latent():
    _, lines = lines_of(MEASURED | {"kl_per_dim": []})
    assert set(lines) == {"rec", "ppl_token", "ppl_word", "bits_per_byte"}
    assert lines["rec"].split()[1] == "10.125"
    assert "log p(x), exact" in lines["rec"]
    assert "bound" not in "".join(lines.values())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["rec", "ppl_token", "mi"])
def test_the_table_shows_a_dash_for_what_is_not_finite_before_and_after_json(tmp_path, name, value):
    metrics = MEASURED | {name: value}
    write_json(tmp_path / "metrics.json", metrics)
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again[name] is None
    assert result_table("test", metrics) == result_table("test", again)
    _, lines = lines_of(again)
    assert lines[name].split()[1] == "-"
    assert lines["kl"].split()[1] == "11.125"
