"""Turns: nobody waits long for a prompt, and prompts begin in the order in which they came."""

from dataclasses import dataclass

from offload.batch.scheduler import Scheduler


@dataclass(eq=False)
class Item:
    number: int


def yes(item: Item) -> bool:
    return True


def test_between_two_chunks_of_a_prompt_every_other_sequence_gets_a_token() -> None:
    scheduler = Scheduler[Item](8)
    first, second, long = Item(0), Item(1), Item(2)
    for item in (first, second, long):
        scheduler.add(item)
    for item in (first, second):
        step = scheduler.next(yes)
        while step is not None and not step.prefill:
            step = scheduler.next(yes)
        assert step is not None and step.rows == [item]
        scheduler.prefilled()
    steps = [scheduler.next(yes) for _ in range(6)]
    assert [(step.prefill, step.rows) for step in steps if step] == [(False, [first, second]), (True, [long])] * 3


def test_prompts_begin_in_order_and_one_that_has_no_room_keeps_its_place() -> None:
    scheduler = Scheduler[Item](8)
    items = [Item(number) for number in range(3)]
    for item in items:
        scheduler.add(item)
    assert scheduler.next(lambda item: False) is None
    for item in items:
        step = scheduler.next(yes)
        while step is not None and not step.prefill:
            step = scheduler.next(yes)
        assert step is not None and step.rows == [item]
        scheduler.prefilled()


def test_no_more_run_at_once_than_there_are_rows() -> None:
    scheduler = Scheduler[Item](2)
    for number in range(3):
        scheduler.add(Item(number))
    for _ in range(8):
        step = scheduler.next(yes)
        if step is not None and step.prefill:
            scheduler.prefilled()
    assert len(scheduler.decoding) == 2 and len(scheduler.waiting) == 1


def test_who_came_last_gives_way_and_is_the_next_to_begin() -> None:
    scheduler = Scheduler[Item](8)
    items = [Item(number) for number in range(3)]
    for item in items:
        scheduler.add(item)
    for _ in range(5):
        step = scheduler.next(yes)
        if step is not None and step.prefill:
            scheduler.prefilled()
    assert scheduler.preempt() is items[2] and scheduler.waiting[0] is items[2]
    assert scheduler.preempt() is items[1] and list(scheduler.waiting) == [items[1], items[2]]
    assert scheduler.preempt() is None, "somebody goes on"
