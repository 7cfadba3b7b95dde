"""The scripts that measure speed, with shapes that a CPU does in a moment."""

import json
from importlib.util import find_spec

import torch
from benchmarks import gpu
from launch import CONFIGS


def test_cases_are_measured_one_after_the_other_and_a_failed_one_does_not_stop_them(
    tmp_path, capsys
):
    path = tmp_path / "gpu.json"
    broken = gpu.cases(gpu.SMALL_ORDER, ["zero1"])[0]
    broken |= {"name": "broken", "ds_config": "nowhere"}
    names = ["zero1", "bare", *(["trainer"] if find_spec("accelerate") else [])]
    chosen = [broken, *(gpu.cases(gpu.SMALL_ORDER, [name])[0] for name in names)]
    gpu.run(chosen, 60, path, patience=10)
    found = json.loads(path.read_text())
    first, *others = found["cases"]
    assert "nowhere.json: No such file" in first["error"]
    assert found["versions"]["torch"] == torch.__version__
    for case in others:
        assert case["tokens_per_s"] > 0
        assert case["parameters"] == others[0]["parameters"]
    assert others[0]["planned_gb"] > 0
    gpu.main(["--table", str(path)])
    printed = capsys.readouterr().out
    assert all(f"| {case['name']} " in printed for case in found["cases"])


def test_the_time_is_kept(tmp_path):
    path = tmp_path / "gpu.json"
    gpu.run(gpu.cases(gpu.SMALL_ORDER, []), 0, path)
    found = json.loads(path.read_text())["cases"]
    assert len(found) == len(gpu.SMALL_ORDER.split("\n")) - 2
    assert {case["error"] for case in found} == {"no time left"}


def test_every_case_has_a_size_and_a_configuration():
    for case in gpu.cases(gpu.ORDER, []) + gpu.cases(gpu.SMALL_ORDER, []):
        job = gpu.job_of(case)
        assert job.side in ("dsvae", "bare", "trainer", "trainer_grouped")
        assert job.t5["d_model"] >= 32
        assert (CONFIGS / f"{job.ds_config}.json").is_file()
