"""Each place of a command that takes a path, with one wrong kind of file, another one for each; `python -m
tests.fuzz.paths` tries all of all."""

import subprocess
import sys

from tests.commands import ROOT
from tests.fuzz.paths import KINDS


def test_a_path_to_anything_is_refused_in_a_line_or_of_use() -> None:
    part = f"4/{len(KINDS) + 1}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.paths", "--part", part],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
