"""Every case that was once a fault ends as it must, and so do some that are drawn, always the same ones."""

from pathlib import Path
from random import Random

import pytest

from tests.fuzz.cases import Case, draw
from tests.fuzz.ground import make_ground
from tests.fuzz.outcome import outcome

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))
SEED, DRAWN = 20261129, 100


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("fuzz") / "ground")


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_what_was_once_a_fault_is_answered_or_refused_in_one_line(file: Path, ground: Path, tmp_path: Path) -> None:
    found = outcome(Case.read(file.read_text()), ground, tmp_path / "case")
    assert not found.is_fault, found.said


def test_spoiled_inputs_are_answered_or_refused_in_one_line(ground: Path, tmp_path: Path) -> None:
    random = Random(SEED)
    for number in range(DRAWN):
        case = draw(random)
        found = outcome(case, ground, tmp_path / "case")
        assert not found.is_fault, f"case {number}: {found.kind} {found.sign}\n{found.said}\n{case}"
