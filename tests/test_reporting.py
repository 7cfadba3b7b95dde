"""metrics.jsonl and TensorBoard, read back with other tools than wrote them."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dsvae.config import RunConfig
from dsvae.files import write_json
from dsvae.reporting import Reporter, result_table

VALUES = {"loss": 3.0, "rec": 2.0, "kl": 1.0, "beta": 0.5, "tokens_per_s": 100.0}


@pytest.fixture
def reporter(tmp_path):
    found = Reporter(tmp_path, enabled=True)
    yield found
    found.close(RunConfig(), None)


def log(reporter, steps, loss=3.0):
    for step in steps:
        reporter.scalars(step, 1, {**VALUES, "loss": loss}, [0.25, 0.75])


def rows(directory):
    return [
        json.loads(line)
        for line in (directory / "metrics.jsonl").read_bytes().decode().split("\n")[:-1]
    ]


def run(directory, first, steps, **kwargs):
    """One process's life: opens at step `first` and logs `steps`."""
    reporter = Reporter(directory, enabled=True)
    reporter.open(first)
    log(reporter, steps, **kwargs)
    reporter.close(RunConfig(), None)


def events(directory):
    found = EventAccumulator(
        str(directory / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    found.Reload()
    return found


def test_a_row_has_what_was_logged(tmp_path, reporter):
    reporter.open(1)
    log(reporter, [7])
    reporter.evaluation(8, 2, "valid", {"rec": 1.5, "kl_per_dim": [0.5], "precision": "bf16"})
    train, valid = rows(tmp_path)
    assert train == {"step": 7, "phase": 1, "split": "train", **VALUES, "kl_per_dim": [0.25, 0.75]}
    assert valid == {
        "step": 8,
        "phase": 2,
        "split": "valid",
        "rec": 1.5,
        "kl_per_dim": [0.5],
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
    scalars = events(tmp_path).Scalars("train/loss")
    assert [(event.step, event.value) for event in scalars] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]


def test_the_final_evaluation_goes_when_a_run_goes_on(tmp_path):
    """It has the step of the last checkpoint, so its step alone would keep it."""
    reporter = Reporter(tmp_path, enabled=True)
    reporter.open(1)
    log(reporter, [5])
    reporter.evaluation(5, 2, "valid", {"rec": 1.0, "kl_per_dim": []})
    reporter.evaluation(5, 2, "test", {"rec": 1.0, "kl_per_dim": []})
    reporter.close(RunConfig(), None)
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
    reporter.close(RunConfig(), None)
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
    reporter.evaluation(
        4, 1, "valid", {"rec": 1.5, "au": 2, "kl_per_dim": [0.5], "precision": "bf16"}
    )
    reporter.close(RunConfig(), None)
    found = events(tmp_path)
    for name, value in VALUES.items():
        assert [(e.step, e.value) for e in found.Scalars(f"train/{name}")] == [
            (2, value),
            (4, value),
        ]
    assert [(e.step, e.value) for e in found.Scalars("kl_per_dim_train/001")] == [
        (2, 0.75),
        (4, 0.75),
    ]
    assert [(e.step, e.value) for e in found.Scalars("valid/rec")] == [(4, 1.5)]
    assert [(e.step, e.value) for e in found.Scalars("valid/au")] == [(4, 2)]
    assert [(e.step, e.value) for e in found.Scalars("kl_per_dim_valid/000")] == [(4, 0.5)]
    assert "valid/precision" not in found.Tags()["scalars"]


def test_tensorboard_has_hparams_and_final_metrics_in_the_one_run(tmp_path, reporter):
    config = RunConfig(seed=17)
    config.phase2.beta.max = 0.25
    reporter.open(1)
    final = {"rec": 4.5, "sentences": 7, "kl_per_dim": [1.0], "precision": "fp32"}
    reporter.evaluation(9, 2, "test", final)
    reporter.close(config, final)
    found = events(tmp_path)
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["seed"].number_value == 17
    assert given["phase2.beta.max"].number_value == 0.25
    assert given["phase2.beta.kind"].string_value == "linear"
    assert given["phase1.freeze_decoder"].bool_value is False
    experiment = HParamsPluginData.FromString(
        found.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {"test/rec", "test/sentences"}
    assert [[(e.step, e.value) for e in found.Scalars(tag)] for tag in sorted(metrics)] == [
        [(9, 4.5)],
        [(9, 7)],
    ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_has_the_text(tmp_path, reporter):
    reporter.open(1)
    reporter.text(3, [("a | b", "c"), ("ü", "d")], ["from the prior"])
    reporter.close(RunConfig(), None)
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
    reporter.close(RunConfig(), None)
    assert rows(tmp_path) == [
        {"step": 3, "split": "text", "reconstruction": [], "prior": ["the likeliest"]}
    ]
    assert events(tmp_path).Tags()["tensors"] == ["prior/text_summary"]


def test_other_ranks_write_nothing(tmp_path, capsys):
    reporter = Reporter(tmp_path, enabled=False)
    reporter.open(1)
    reporter.start_phase(1, 3, 0)
    log(reporter, [1])
    reporter.advance()
    reporter.evaluation(1, 1, "valid", {"kl_per_dim": []})
    reporter.text(1, [("a", "b")], ["c"])
    reporter.say("hello")
    reporter.end_phase()
    reporter.close(RunConfig(), {"rec": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_console_gets_the_lines(tmp_path, capsys, reporter):
    reporter.say("a line")
    assert capsys.readouterr().out == "a line\n"


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
    """First line; name -> line of the others."""
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
