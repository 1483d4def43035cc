"""A conversation with a model: its messages, its commands, and what of it the model still sees.

All messages are kept. When they no longer fit the context, the oldest turns are left out of what the model is
told, if the user agrees.
"""

import re
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.steps.conversation_file import save_conversation
from cli.steps.messages import Messages, with_parts
from cli.steps.texts import read_text
from cli.terminal.console import Console
from offload.records import Sampling, TokenRecord
from offload.vision.image_file import open_image
from quant.errors import BudgetError, ColdstreamError, UsageError

if TYPE_CHECKING:
    from offload.run.session import Session

HELP = (
    ("/file PATH [TEXT]", "say what is in the file, and TEXT after it"),
    ("/image PATH [TEXT]", "show it an image, and say TEXT about it; without TEXT, the next message is about it"),
    ("/video PATH [TEXT]", "show it pictures of a video, in the same way"),
    ("/reset", "forget the conversation"),
    ("/system TEXT", "tell the model TEXT first, and begin anew; without TEXT, tell it nothing"),
    ("/stats", "the run so far: speed, memory, expert hits"),
    ("/save [FILE]", "write the conversation as JSON; without FILE, where --resume keeps it"),
    ("/quit", "end (Ctrl-D too); Ctrl-C stops an answer"),
    ('"""', "begins and ends a message of several lines; what is pasted is one message"),
)
_FILE = re.compile(r"""(?:"(?P<double>[^"]+)"|'(?P<single>[^']+)'|(?P<bare>\S+))\s*(?P<text>.*)""", re.DOTALL)


class ChatLoop:
    """The messages so far and the records of every answer."""

    def __init__(self, session: "Session", sampling: Sampling, console: Console, messages: Messages) -> None:
        self.session, self.sampling, self.console, self.input = session, sampling, console, messages
        self.runs: list[list[TokenRecord]] = []
        self.failed = False  # whether a message went without an answer
        self.file: Path | None = None  # where every answer is saved
        self.begin(None)

    @property
    def finish_reason(self) -> str | None:
        """Why the last answer ended; None if there is none, or it was broken off."""
        return self.runs[-1][-1].finish_reason if self.runs else None

    def begin(self, system: str | None) -> None:
        """Start anew; ``system`` is what the model is told first."""
        self.system = system
        self._first: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.messages = self._first
        self._shown: dict[str, list[str]] = {}  # paths of images and videos for the next message
        self._dropped = 0  # turns that the model no longer sees
        self.session.reset()

    def resume(self, messages: list[dict[str, Any]], file: Path) -> None:
        """Go on with ``messages``, if there are any, and save to ``file`` from now on."""
        self.file = file
        if messages:
            self.begin(messages[0]["content"] if messages[0]["role"] == "system" else None)
            self.messages = messages

    def loop(self) -> None:
        """Answer until the messages end or /quit comes. A user's error ends nothing."""
        while True:
            try:
                said = self.input.read()
                if said is None:
                    return
                line = "" if said.quoted else said.text.strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.command(line)
                elif said.text.strip():
                    self.answer(said.text)
            except KeyboardInterrupt:
                self.console.say("\n(Ctrl-D or /quit ends the chat)")
            except ColdstreamError as error:
                self.failed = True
                self.console.prose(f"coldstream: error: {' '.join(str(error).split())}")

    def answer(self, text: str) -> None:
        """Stream the model's answer to ``text``; Ctrl-C ends the answer, and what came of it stays.

        Raises BudgetError if the text does not fit the context, CheckpointError if the chat template refuses it.
        """
        question: dict[str, Any] = {"role": "user", "content": text, **self._shown}
        try:
            ids = self._fitted(question)
        except ColdstreamError:
            if self._shown:  # or no later message would get through either
                self._shown = {}
                self.console.prose("(nothing is shown any more: /image PATH or /video PATH shows it again)")
            raise
        if ids is None:
            return
        records: list[TokenRecord] = []
        stopped = False
        try:
            for record in self.session.generate(ids, self.sampling):
                records.append(record)
                self.console.write(record.text)
        except KeyboardInterrupt:
            stopped = True
        finally:  # what came of an answer that a signal ended stays, too
            self._keep(question, records)
        self.console.write("\n")
        if stopped:
            self.console.prose("(stopped)")
        elif records[-1].finish == "length":
            self.console.prose(f"(cut off after {len(records):,} tokens: --max-tokens allows no more)")
        elif records[-1].finish == "context":
            self.console.prose(
                f"(cut off: the context of {self.session.context:,} tokens is full; /reset forgets the "
                "conversation, and --context makes room for a longer one)"
            )
        if records and not self.console.quiet:
            self.console.prose(f"({_speed(records)})")

    def _keep(self, question: dict[str, Any], records: list[TokenRecord]) -> None:
        if not records:
            return
        self._shown = {}
        self.runs.append(records)
        reply = "".join(record.text for record in records)
        self.messages = [*self.messages, question, {"role": "assistant", "content": reply}]
        if self.file is not None:
            save_conversation(self.messages, self.file)

    def _turns(self) -> list[list[dict[str, Any]]]:
        """The messages after the first, cut before each of the user's."""
        turns: list[list[dict[str, Any]]] = []
        for message in self.messages[len(self._first) :]:
            if message["role"] == "user" or not turns:
                turns.append([])
            turns[-1].append(message)
        return turns

    def _fitted(self, question: dict[str, Any]) -> list[int] | None:
        """Token ids of what the model is told: without the oldest turns if it would not fit. None if the user
        would rather not."""
        turns, context = self._turns(), self.session.context

        def tell(dropped: int) -> list[int]:
            seen = [message for turn in turns[dropped:] for message in turn]
            return self.session.encode_chat(with_parts([*self._first, *seen, question]))

        ids = tell(self._dropped)
        if context - len(ids) >= min(context // 8, 256) or self._dropped == len(turns):
            return self._checked(ids)
        # Enough that the next few turns fit, too: what is told anew from its beginning takes time.
        goal = context - context // 4
        fewest = bisect_left(range(len(turns)), True, self._dropped, key=lambda count: len(tell(count)) <= goal)
        shorter = self._checked(tell(fewest))
        more = fewest - self._dropped
        what = "the oldest turn" if more == 1 else f"the {more:,} oldest turns"
        full = f"{len(ids):,} tokens to be told, and the context has {context:,}"
        if not self.input.terminal:
            self.console.prose(f"({full}: the model no longer sees {what}; --context makes room for more)")
        else:
            self.console.prose(f"({full})")
            if not self.input.agree(f"Go on without {what}?"):
                self.console.prose("(not sent: /reset forgets the conversation, /save keeps it)")
                return None
        self._dropped = fewest
        return shorter

    def _checked(self, ids: list[int]) -> list[int]:
        if len(ids) >= self.session.context:
            raise BudgetError(
                f"the message is {len(ids):,} tokens with what must come before it, and the context has "
                f"{self.session.context:,}: say less, or start again with --context {len(ids) + 256}"
            )
        return ids

    def command(self, line: str) -> None:
        """Do what a line beginning with a slash asks for. Raises OutputError if /save cannot write, InputError if
        /file cannot read."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "/help":
                self.console.rows(HELP)
            case "/file" if rest:
                self.answer(self._file(rest))
            case "/file":
                raise UsageError("/file needs a path: /file PATH, and what you want to say about it")
            case "/image" | "/video" if rest:
                self._show(word[1:], rest)
            case "/image" | "/video":
                raise UsageError(f"{word} needs a path: {word} PATH, and what you want to say about it")
            case "/reset":
                self.begin(self.system)
                self.console.prose("(the conversation is forgotten)")
            case "/system":
                self.begin(rest or None)
                self.console.prose("(begun anew)")
            case "/stats":
                self.stats()
            case "/save" if rest or self.file:
                file = Path(rest).expanduser() if rest else self.file
                assert file is not None
                save_conversation(self.messages, file)
                self.session.save_prompts()
                self.console.prose(f"({len(self.messages)} messages written to {file})")
            case "/save":
                raise UsageError("/save needs a file: /save FILE")
            case _:
                self.console.prose(f"{word} is no command; /help lists them")

    def _show(self, kind: str, rest: str) -> None:
        """Show the ``image`` or ``video`` that ``rest`` begins with; what follows there is said about it."""
        from offload.vision.images import check_looking  # it imports torch
        from offload.vision.video_file import TILE_SIDE, Video

        check_looking(self.session.shape, room=self.session.options.images)
        path, text = _path_and_text(rest)
        if kind == "video":  # what is wrong with it is said now, not with the next message
            Video(path).sampled(TILE_SIDE)
        else:
            open_image(path)
        self._shown = {**self._shown, f"{kind}s": [*self._shown.get(f"{kind}s", ()), str(path)]}
        if text:
            self.answer(text)
        else:
            self.console.prose(f"({path} is shown with the next message)")

    def _file(self, rest: str) -> str:
        """The text of the file that ``rest`` begins with, which may be quoted, and what follows it there."""
        path, text = _path_and_text(rest)
        content = read_text(path)
        self.console.prose(f"({path}: {len(content):,} characters)")
        return f"{content.rstrip()}\n\n{text}" if text else content

    def stats(self) -> None:
        """Say the report of the run so far."""
        from cli.terminal.run_summary import INDENT, summary_rows
        from offload.run.collect import account

        if not self.runs:
            self.console.prose("(nothing was generated yet)")
            return
        report = account(self.session, self.runs, command="chat", warmup=1)
        full = f"{self.session.cached_tokens:,} of {self.session.context:,} tokens"
        self.console.rows([*summary_rows(report, said=self.console.said), ("context", full)], INDENT)


def _path_and_text(rest: str) -> tuple[Path, str]:
    """The path that ``rest`` begins with, which may be quoted, and what follows it."""
    path, text = Path(rest).expanduser(), ""
    found = _FILE.fullmatch(rest)
    with suppress(OSError):  # a name that is too long
        if found is not None and not path.exists():
            path = Path(found["double"] or found["single"] or found["bare"]).expanduser()
            text = found["text"]
    return path, text


def _speed(records: list[TokenRecord]) -> str:
    """``84 tokens, 12.3 tokens/s, 96 % expert hits``: of what came after the prompt."""
    from cli.terminal.words import how_many, number, percent

    decoded = records[1:]
    seconds = sum(record.seconds for record in decoded)
    said = [how_many(len(records), "token")]
    if seconds > 0:
        said.append(f"{number(len(decoded) / seconds)} tokens/s")
    hits, misses = (sum(getattr(record, kind) for record in decoded or records) for kind in ("hits", "misses"))
    if hits + misses:
        said.append(f"{percent(hits / (hits + misses))} expert hits")
    return ", ".join(said)
