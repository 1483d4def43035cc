"""How often experts are asked for lately."""

import numpy as np
import pytest

from offload.routing.frequency import ExpertFrequency


def test_heat_decays_by_tokens_and_starts_from_a_profile() -> None:
    heat = ExpertFrequency([0, 2], 4, {(0, 1): 30.0, (0, 2): 10.0}, half_life=2)
    whole = 1 / (1 - 2**-0.5)
    assert heat.score((0, 1)) == pytest.approx(0.75 * whole) and heat.score((2, 1)) == 0
    heat.count(0, np.array([3]), 1)
    heat.count(0, np.array([-1]), 1)
    assert heat.score((0, 3)) == pytest.approx(2**-0.5)
    assert heat.score((0, 1)) == pytest.approx(0.75 * whole / 2)
    assert heat.ordered([(2, 0), (0, 0), (0, 1)]) == [(0, 1), (0, 0), (2, 0)]
    everything = np.ones((2, 4), dtype=bool)
    assert heat.hottest(everything) == (0, 1) and heat.coldest(everything) == (2, 3)
    assert heat.hottest(~everything) is None


def test_a_prompts_tokens_count_as_much_as_those_of_as_many_steps_on_average() -> None:
    together, alone = ExpertFrequency([0], 2, half_life=8), ExpertFrequency([0], 2, half_life=8)
    together.count(0, np.array([0] * 10 + [1] * 10), 20)
    for expert in [0, 1] * 10:
        alone.count(0, np.array([expert]), 1)
    assert sum(together._scores[0]) == pytest.approx(sum(alone._scores[0]))
    assert together.score((0, 0)) == pytest.approx(together.score((0, 1)))


def test_experts_are_likely_in_a_large_chunk_only() -> None:
    heat = ExpertFrequency([0], 4, {(0, 0): 1.0, (0, 1): 1.0, (0, 2): 1.0})
    assert heat.likely(0, 1) == []
    assert set(heat.likely(0, 64)) == {0, 1, 2}
    assert set(heat.likely(0, 4096)) == {0, 1, 2, 3}
