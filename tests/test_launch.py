"""Forked ranks against processes of their own: the same to a script, and to who watches
it from outside."""

import json
import signal

import pytest
from launch import FORKS, start

SCRIPT = """
import json, os, signal, sys
seen = {
    "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "stdin": sys.stdin.read(),
    "environment": {k: v for k, v in os.environ.items() if k not in ("MASTER_PORT", "LC_CTYPE")},  # Python may set the latter
    "leads": os.getsid(0) == os.getpgid(0) == os.getpid(),
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD)],
}
print(json.dumps({"seen": seen, "loaded": "torch" in sys.modules}))
print("x" * 200_000, file=sys.stderr)  # more than a pipe holds
if sys.argv[1] == "raise":
    raise RuntimeError("as it was told")
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]))
"""


def outcome(launcher, end, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = start(
        end,
        "a b",
        "é",
        ranks=2,
        launcher=launcher,
        cwd=tmp_path,
        script=tmp_path / "script.py",
        MORE="of it",
    )
    run.wait(300)
    return run, [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.skipif(not FORKS, reason="nothing is forked here")
@pytest.mark.parametrize(
    ("end", "code"), [("0", 0), ("3", 3), ("raise", 1), ("killed", -signal.SIGKILL)]
)
def test_a_forked_rank_is_like_a_process_of_its_own(end, code, tmp_path):
    forked, apart = (outcome(launcher, end, tmp_path) for launcher in ("forked", "ranks"))
    assert forked[0].codes == apart[0].codes == [code, code]
    if end != "killed":  # what it had not flushed is lost
        assert [rank["seen"] for rank in forked[1]] == [rank["seen"] for rank in apart[1]]
        assert [rank["seen"]["environment"]["RANK"] for rank in forked[1]] == ["0", "1"]
        assert [rank["loaded"] for rank in forked[1] + apart[1]] == [True, True, False, False]
    for run in (forked[0], apart[0]):
        assert run.stderr.count("x" * 200_000) == 2
        assert run.stderr.count("RuntimeError: as it was told") == (2 if end == "raise" else 0)


@pytest.mark.skipif(not FORKS, reason="nothing is forked here")
def test_a_forked_rank_that_does_not_end_is_shown_and_killed(tmp_path):
    there = tmp_path / "there"
    (tmp_path / "script.py").write_text(
        f"import time\ndef waits():\n    open({str(there)!r}, 'w')\n    time.sleep(6000)\nwaits()\n"
    )
    run = start(script=tmp_path / "script.py")
    run.wait_for(there)
    with pytest.raises(AssertionError, match="in waits"):
        run.wait(2)
    assert run.processes[0].returncode == -signal.SIGABRT
