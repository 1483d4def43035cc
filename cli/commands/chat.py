"""``coldstream chat``: a conversation on the terminal, its KV cache kept from turn to turn."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options.output import Report, takes_console
from cli.options.run import Model, takes_run_options
from cli.options.sampling import takes_sampling
from cli.options.typed import typed_text
from cli.terminal import interrupt
from cli.terminal.console import Console
from cli.terminal.imports import seldom_collecting
from offload.documents import to_json
from offload.records import RunOptions, Sampling, TokenRecord
from quant.errors import ColdstreamError, OutputError

if TYPE_CHECKING:
    from offload.run.session import Session

System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", callback=typed_text, help="What the model is told first.")
]

HELP = """\
/reset        forget the conversation
/system TEXT  tell the model TEXT first, and begin anew; without TEXT, tell it nothing
/stats        the run so far: speed, memory, expert hits
/save FILE    write the conversation as JSON
/quit         end (Ctrl-D too); Ctrl-C stops an answer"""


@takes_console
@takes_run_options
@takes_sampling
def chat(
    model: Model, sampling: Sampling, run: RunOptions, console: Console, system: System = None, report: Report = None
) -> None:
    """Talk with MODEL. Answers go to stdout as they come; /help lists the commands.

    Ctrl-C stops an answer and keeps the session; Ctrl-D or /quit ends it with the run report.
    """
    from cli.steps.finish import check_page, command_line, finish
    from cli.steps.open_model import find_model, open_session

    check_page(report)
    path = find_model(model)
    with seldom_collecting():
        from offload.run.collect import account
        from offload.run.report import Message

    with open_session(path, run, console) as session:
        interrupt.keep_session()
        conversation = Conversation(session, sampling, console, system)
        session.encode_chat([{"role": "user", "content": "?"}])  # no template: say so before the first question
        conversation.loop(_line_reader(console))
        if conversation.runs:
            measured = account(
                session,
                conversation.runs,
                command="chat",
                command_line=command_line(),
                messages=[Message(**message) for message in conversation.messages],
                warmup=1,
            )
            extra = {"messages": conversation.messages, "finish_reason": conversation.finish_reason}
            finish(measured, console, report, extra)
        else:
            console.result({"command": "chat", "messages": [], "notes": session.notes})


class Conversation:
    """The messages so far and the records of every answer."""

    def __init__(self, session: "Session", sampling: Sampling, console: Console, system: str | None) -> None:
        self.session, self.sampling, self.console = session, sampling, console
        self.runs: list[list[TokenRecord]] = []
        self.messages: list[dict[str, str]] = []
        self.begin(system)

    @property
    def finish_reason(self) -> str | None:
        """Why the last answer ended; None if there is none, or it was broken off."""
        return self.runs[-1][-1].finish_reason if self.runs else None

    def begin(self, system: str | None) -> None:
        """Start anew; ``system`` is what the model is told first."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []
        self.session.reset()

    def loop(self, read_line: Callable[[], str | None]) -> None:
        """Answer line by line until ``read_line`` gives None or /quit comes. A user's error ends nothing."""
        while True:
            try:
                line = read_line()
            except KeyboardInterrupt:
                self.console.say("\n(Ctrl-D or /quit ends the chat)")
                continue
            if line is None or line.strip() == "/quit":
                return
            try:
                if line.lstrip().startswith("/"):
                    self.command(line.strip())
                elif line.strip():
                    self.answer(line)
            except ColdstreamError as error:
                self.console.say(f"coldstream: error: {error}")

    def answer(self, text: str) -> None:
        """Stream the model's answer to ``text``; Ctrl-C ends the answer, and what came of it stays."""
        said = [*self.messages, {"role": "user", "content": text}]
        ids = self.session.encode_chat(said)
        records: list[TokenRecord] = []
        stopped = False
        try:
            for record in self.session.generate(ids, self.sampling):
                records.append(record)
                self._print(record.text)
        except KeyboardInterrupt:
            stopped = True
        self._print("\n")
        if records:
            self.runs.append(records)
            reply = "".join(record.text for record in records)
            self.messages = [*said, {"role": "assistant", "content": reply}]
        if stopped:
            self.console.say("(stopped)")
        elif records[-1].finish == "length":
            self.console.say(f"(cut off after {len(records):,} tokens: --max-tokens allows no more)")
        elif records[-1].finish == "context":
            self.console.say(
                f"(cut off: the context of {self.session.context:,} tokens is full; /reset forgets the "
                "conversation, and --context makes room for a longer one)"
            )

    def command(self, line: str) -> None:
        """Do what a line beginning with a slash asks for. Raises OutputError if /save cannot write."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "/help":
                self.console.say(HELP)
            case "/reset":
                self.begin(self.system)
                self.console.say("(the conversation is forgotten)")
            case "/system":
                self.begin(rest or None)
                self.console.say("(begun anew)")
            case "/stats":
                self.stats()
            case "/save" if rest:
                save(self.messages, Path(rest).expanduser())
                self.console.say(f"({len(self.messages)} messages written to {rest})")
            case "/save":
                self.console.say("/save needs a file: /save FILE")
            case _:
                self.console.say(f"{word} is no command; /help lists them")

    def stats(self) -> None:
        """Say the report of the run so far."""
        from cli.terminal.run_summary import summary
        from offload.run.collect import account

        if not self.runs:
            self.console.say("(nothing was generated yet)")
            return
        self.console.say(summary(account(self.session, self.runs, command="chat", warmup=1)))
        cached, context = self.session.cached_tokens, self.session.context
        self.console.say(f"  {'context':<10}{cached:,} of {context:,} tokens")

    def _print(self, text: str) -> None:
        self.console.write(text)


def save(messages: list[dict[str, str]], path: Path) -> None:
    """Write the conversation as JSON. Raises OutputError."""
    try:
        path.write_text(to_json({"messages": messages}) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; name another file") from None


def _line_reader(console: Console) -> Callable[[], str | None]:
    """One line at a time from the terminal, with editing and history, or from a pipe; None at the end."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (importing it gives input() editing and history)

        console.say("Type a message; /help lists the commands.")

    def read() -> str | None:
        if not terminal:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        try:
            return input("> ")
        except EOFError:
            console.say()
            return None

    return read
