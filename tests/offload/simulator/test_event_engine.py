"""The engine agrees with arithmetic: one flow, flows that share, flows that wait; nothing is lost."""

import random

import pytest

from offload.simulator.event_engine import EventEngine, Flow, Line, Process, share


def ended(engine: EventEngine, *flows: tuple[float, tuple[str, ...], float]) -> list[float]:
    """When each of (amount, resources, cap) ends, all begun now."""
    events = [engine.flow("x", amount, *through, cap=cap) for amount, through, cap in flows]
    engine.run(engine.join(*events))
    return [event.ended for event in events]


NO_CAP = float("inf")


def test_one_flow_takes_amount_over_rate_of_its_narrowest_resource() -> None:
    assert ended(EventEngine({"ram": 10.0, "pcie": 4.0}), (20.0, ("pcie", "ram"), NO_CAP)) == [5.0]
    assert ended(EventEngine({"ram": 10.0}), (20.0, ("ram",), 2.0)) == [10.0]


def test_flows_share_a_resource_and_the_last_has_it_alone() -> None:
    # 5 each of 10 until the smaller is through at 2, then 10 for the 10 that are left.
    assert ended(EventEngine({"ram": 10.0}), (10.0, ("ram",), NO_CAP), (20.0, ("ram",), NO_CAP)) == [2.0, 3.0]


def test_what_one_cannot_take_the_other_gets() -> None:
    # The bus takes its 2 of 10, the other flow the remaining 8.
    engine = EventEngine({"ram": 10.0, "pcie": 2.0})
    assert ended(engine, (10.0, ("pcie", "ram"), NO_CAP), (40.0, ("ram",), NO_CAP)) == [5.0, 5.0]


def test_rates_are_max_min_fair_on_random_networks() -> None:
    dice = random.Random(0)
    for _ in range(200):
        rates = {name: dice.uniform(1, 20) for name in "abc"}
        flows = [
            Flow("x", "", 1.0, dice.sample("abc", dice.randint(1, 3)), dice.choice([NO_CAP, 3.0]), 0.0)
            for _ in range(dice.randint(1, 6))
        ]
        share(flows, rates)
        used = {name: sum(flow.rate for flow in flows if name in flow.through) for name in rates}
        assert all(used[name] <= rates[name] * (1 + 1e-9) for name in rates)
        for flow in flows:  # held back by its cap, or by a full resource on which nobody has more
            full = [name for name in flow.through if used[name] >= rates[name] * (1 - 1e-9)]
            most = [max(other.rate for other in flows if name in other.through) for name in full]
            assert flow.rate == pytest.approx(flow.cap) or any(flow.rate >= m * (1 - 1e-9) for m in most)


def test_a_process_waits_for_one_thing_after_another_and_knows_for_what() -> None:
    engine = EventEngine({"vram": 10.0, "ram": 1.0})

    def expert() -> Process:
        yield engine.pause(1.0, "doorbell")
        yield engine.flow("expert", 4.0, "ram")

    def layer() -> Process:
        miss = engine.start(expert())
        yield engine.flow("shared", 20.0, "vram")  # 2 s beside the miss
        yield miss

    running = engine.start(layer())
    engine.run(running)
    assert engine.now == 5.0  # the miss alone: the shared expert hides behind it
    assert [(cause, end - start) for start, end, cause in running.log] == [("vram", 2.0), ("ram", 3.0)]


def test_every_second_of_a_process_has_a_cause() -> None:
    dice, engine = random.Random(1), EventEngine({"a": 3.0, "b": 2.0})

    def part() -> Process:
        for _ in range(3):
            yield engine.flow("x", dice.uniform(0, 5), *dice.sample("ab", dice.randint(1, 2)))
            yield engine.pause(dice.uniform(0, 1), "pause")

    def whole() -> Process:
        for _ in range(20):
            yield engine.join(engine.start(part()), engine.start(part()), engine.flow("y", 2.0, "a"))

    running = engine.start(whole())
    engine.run(running)
    assert sum(end - start for start, end, _ in running.log) == pytest.approx(engine.now)
    assert {cause for _, _, cause in running.log} <= {"a", "b", "pause"}


def test_no_byte_is_lost_and_no_resource_gives_more_than_it_has() -> None:
    dice, engine = random.Random(2), EventEngine({"a": 3.0, "b": 2.0})
    amounts = [dice.uniform(0, 5) for _ in range(30)]
    engine.run(engine.join(*(engine.flow("x", amount, "a", "b") for amount in amounts)))
    for name, rate in engine.rates.items():
        assert engine.moved[name] == pytest.approx(sum(amounts))
        assert engine.moved[name] <= engine.now * rate * (1 + 1e-9)


def test_a_line_serves_the_most_urgent_first_and_one_at_a_time() -> None:
    engine = EventEngine({"disk": 1.0})
    line = Line(engine)
    order: list[str] = []

    def asked(name: str, urgency: int) -> None:
        event = line.ask(urgency, lambda: engine.flow(name, 2.0, "disk"), "disk")
        event.then(lambda: order.append(f"{name} {engine.now:g}"))

    asked("guess", 1)
    asked("later", 2)
    asked("demand", 0)
    engine.run(engine.pause(7.0, ""))
    assert order == ["guess 2", "demand 4", "later 6"]  # what has begun is finished
