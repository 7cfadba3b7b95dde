"""The scripts that measure speed, with shapes that a CPU does in a moment."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from traceback import walk_stack

import pytest
import torch
from benchmarks import gpu, long_texts, sides
from launch import CONFIGS
from small_models import make_t5, small_tokenizer

from dsvae import T5VAE
from dsvae.parallel.world import World


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


def test_the_figures_are_found_whatever_is_printed_after_them():
    worker = gpu.Worker.__new__(gpu.Worker)
    lines = '{"tokens_per_s": 1.5}', "7", "late: a warning"
    script = f"for line in {lines!r}: print(line)"
    worker.process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.result(60) == {"tokens_per_s": 1.5}


@pytest.mark.skipif(not find_spec("accelerate"), reason="needs accelerate")
def test_every_trainer_computes_in_bf16_and_without_ddp(monkeypatch):
    """Also the second one on the same model, and between variables of a rank."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    job = gpu.job_of(gpu.cases(gpu.SMALL_ORDER, ["trainer", "bf16"])[0])
    model, encode, seen = T5VAE(job.model()), T5VAE._encode, []

    def observed(self, *args):
        modules = {type(each.f_locals.get("self")).__name__ for each, _ in walk_stack(None)}
        seen.append((torch.is_autocast_enabled("cpu"), "DistributedDataParallel" in modules))
        return encode(self, *args)

    monkeypatch.setattr(T5VAE, "_encode", observed)
    world = World(0, 0, 1, torch.device("cpu"))
    side = sides.make_side(job, model, sides.random_split(job, 64), world)
    for first in (0, 1):
        tokens, _, skipped = side(first, 1)
        assert tokens > 0
        assert skipped == 0
    assert set(seen) == {(True, False)}
    assert os.environ["RANK"] == "0"


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


def test_long_texts_are_the_joined_lines_and_each_case_is_measured(tmp_path):
    ids = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
    found = long_texts.joined(iter(ids), 5, 2, 1)
    assert found.tolist() == [[5, 6, 7, 8, 1], [10, 11, 12, 13, 1]]
    with pytest.raises(SystemExit, match="only 0 texts of 99 tokens: 1 are needed"):
        long_texts.joined(iter(ids), 99, 1, 1)
    lines = ["the cat sees a dog", "a dog", "the dogs see the cats and a dog", "cats"] * 9
    small_tokenizer(lines).save_pretrained(make_t5("t5 v1.1", tmp_path))
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    given = (str(tmp_path), str(tmp_path / "texts.txt"), 10, 20, 1)
    cases = [long_texts.worker(*given, saving) for saving in long_texts.CASES]
    assert all(case["seconds"] > 0 and case["peak"] > case["activations"] for case in cases)
    table = long_texts.report({"cases": cases}).splitlines()
    assert [row.split(" | ")[:2] for row in table[2:]] == [["| 10", "no"], ["| 10", "yes"]]
