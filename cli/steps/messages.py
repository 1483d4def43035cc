"""What a user says in a chat: messages typed and pasted on a terminal, or lines from a pipe.

On a terminal, what is pasted is one message, whatever lines it has, and there is editing and a history that
outlives the chat. Everywhere, what stands between two lines of three quotes is one message.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cli.steps.texts import decoded
from cli.terminal.visible import visible
from quant.errors import InputError

if TYPE_CHECKING:
    from prompt_toolkit.history import History

QUOTES = '"""'
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Said:
    """A message. One that was ``quoted`` is no command, whatever it looks like."""

    text: str
    quoted: bool = False


class Messages:
    """One message after another. ``terminal`` says whether there is a person, who can be asked.

    What is shown while typing goes to stdout if that is a terminal, else, and if ``aside``, to stderr.
    """

    def __init__(self, *, aside: bool = False) -> None:
        screen = sys.stdout if sys.stdout.isatty() and not aside else sys.stderr
        self.terminal = sys.stdin.isatty() and screen.isatty()
        editor = _Editor(screen) if self.terminal and _can_edit() else None
        self._line: Callable[[str], str | None] = editor.line if editor else self._plain_line
        self._answer: Callable[[str], str | None] = editor.answer if editor else self._plain_line
        self._screen = screen if self.terminal else None

    def read(self) -> Said | None:
        """The next message; None at the end.

        Raises InputError for a line that is not UTF-8 and KeyboardInterrupt for Ctrl-C.
        """
        first = self._line("> ")
        if first is None:
            return None
        if not first.lstrip().startswith(QUOTES):
            return Said(first, quoted="\n" in first.strip())
        lines = [first.strip()[len(QUOTES) :]]
        pasted = "\n" in lines[0]
        while not lines[-1].rstrip().endswith(QUOTES):
            line = None if pasted else self._line("… ")
            if line is None:
                return Said(first if pasted else "\n".join(lines).strip("\n"), quoted=True)
            lines.append(line)
        return Said("\n".join(lines).rstrip()[: -len(QUOTES)].strip("\n"), quoted=True)

    def agree(self, question: str) -> bool:
        """Whether the person says yes, as Enter alone does; no if there is none. What is neither is asked again: it
        was typed as a message."""
        asked = f"{question} [Y/n] "
        with suppress(KeyboardInterrupt):
            while self.terminal and (answer := self._answer(asked)) is not None:
                match answer.strip().lower():
                    case "" | "y" | "yes":
                        return True
                    case "n" | "no":
                        return False
                asked = "Enter for yes, n for no: "
        return False

    def _plain_line(self, prompt: str) -> str | None:
        """A line from a pipe, or from a terminal that cannot move its cursor."""
        if self._screen:
            print(visible(prompt), end="", file=self._screen, flush=True)
        data = sys.stdin.buffer.readline(_MOST_BYTES)
        if len(data) == _MOST_BYTES:
            raise InputError(f"a line of stdin has {_MOST_BYTES >> 20} MiB and more: expected a message on each")
        return decoded(data, "a message").rstrip("\n") if data else None


def with_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` as a session takes them: of one with ``images`` or ``videos``, paths or Videos, these are parts
    before its text."""
    return [{"role": message["role"], "content": _content(message)} for message in messages]


def _content(message: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    text: str = message["content"]
    shown = [{"type": kind, kind: path} for kind in ("image", "video") for path in message.get(f"{kind}s", ())]
    return [*shown, {"type": "text", "text": text}] if shown else text


def _can_edit() -> bool:
    return os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


class _Editor:
    """A terminal whose lines can be edited."""

    def __init__(self, screen: TextIO) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output.vt100 import Vt100_Output

        output = Vt100_Output.from_pty(screen, os.environ.get("TERM"))
        output.enable_cpr = False  # asked where its cursor is, not every terminal answers
        self._messages: PromptSession[str] = PromptSession(history=_history(), output=output)
        self._answers: PromptSession[str] = PromptSession(output=output)

    def line(self, prompt: str) -> str | None:
        """What is typed or pasted up to Enter; None for Ctrl-D."""
        try:
            return self._messages.prompt([("ansicyan", prompt)])
        except EOFError:
            return None

    def answer(self, question: str) -> str | None:
        """The same for a question, which no history keeps."""
        try:
            return self._answers.prompt([("ansicyan", question)])
        except EOFError:
            return None


def history_file() -> Path:
    """Where what was typed is kept: the user's state folder, by the XDG convention."""
    folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(folder) / "coldstream" / "chat-history"


def _history() -> "History":
    """For this user's eyes only; of this chat alone where no file can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk is no reason to end a chat
                super().store_string(string)

    try:
        file = history_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600))
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return InMemoryHistory()
    return Kept(file)
