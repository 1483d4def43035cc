"""One step, one waking of the event loop; nothing is lost, whoever says it and when."""

import asyncio
import threading
from functools import partial
from typing import Any

import pytest

from cli.serve.mailbox import Mailbox


def test_a_step_wakes_the_loop_once_and_other_threads_do_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[list[int], int]:
        loop, mailbox, found, woken = asyncio.get_running_loop(), Mailbox(), list[int](), list[int]()
        call = loop.call_soon_threadsafe

        def counted(*given: Any) -> Any:
            woken.append(1)
            return call(*given)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)

        def steps() -> None:
            mailbox.wake()
            for step in range(3):
                for row in range(8):
                    mailbox.put(partial(found.append, 8 * step + row))
                mailbox.wake()

        thread = threading.Thread(target=steps)
        thread.start()
        await asyncio.to_thread(thread.join)
        before = len([*woken])
        mailbox.put(partial(found.append, -1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert found[-1] == -1
        return found, before

    found, woken = asyncio.run(run())
    assert found == [*range(24), -1]
    assert woken <= 3 + 1  # and once that the thread is over


def test_a_loop_that_is_closed_hears_nothing_and_hurts_nobody() -> None:
    async def make() -> Mailbox:
        return Mailbox()

    mailbox = asyncio.run(make())
    mailbox.put(print)
    mailbox.wake()
