import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.faults.trials import build


def test_a_call_that_fails_or_ends_a_process_spoils_nothing_for_others(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.page_trials", str(tmp_path / "trials"), "4"]
    environment = {**os.environ, "LD_PRELOAD": str(build(tmp_path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["calls"] > 60 and found["trials"] >= found["calls"] // 2
    assert found["failures"] == [] and "Traceback" not in done.stderr
