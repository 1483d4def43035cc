"""``coldstream chat``: a conversation on the terminal, its KV cache kept from turn to turn."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cli.options.output import Report, takes_console
from cli.options.run import Model, takes_run_and_prompt_options
from cli.options.sampling import AskedSampling, takes_sampling
from cli.options.typed import typed_path, typed_text
from cli.terminal import interrupt
from cli.terminal.console import Console
from cli.terminal.imports import seldom_collecting
from offload.records import RunOptions

System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", callback=typed_text, help="What the model is told first.")
]

Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        parser=typed_path,
        metavar="FILE",
        help="Go on with the conversation in FILE, and save every answer to it.",
    ),
]
NoImages = Annotated[bool, typer.Option("--no-images", help="Keep no memory free to look at images with (/image).")]


@takes_console
@takes_run_and_prompt_options
@takes_sampling
def chat(
    model: Model,
    sampling: AskedSampling,
    run: RunOptions,
    console: Console,
    system: System = None,
    no_images: NoImages = False,
    resume: Resume = None,
    report: Report = None,
) -> None:
    """Talk with MODEL. Answers go to stdout as they come; /help lists the commands.

    Ctrl-C stops an answer and keeps the session; Ctrl-D or /quit ends it with the run report. With --resume a
    conversation goes on another day; with --prompt-cache, too, nothing of it is computed twice.
    """
    from cli.steps.chat_loop import ChatLoop
    from cli.steps.conversation_file import read_conversation
    from cli.steps.finish import check_page, command_line, finish
    from cli.steps.messages import Messages
    from cli.steps.open_model import find_model, open_session
    from quant.errors import CheckpointError, UsageError
    from quant.output_file import check_stdout

    check_stdout()
    check_page(report)
    before = [] if resume is None else read_conversation(resume)
    if before and system is not None:
        raise UsageError("--system and --resume contradict each other: the conversation has begun; give one")
    path = find_model(model)
    sampling.of(path, max_tokens=1)  # a broken generation_config.json is said before the model is loaded
    with seldom_collecting():
        from offload.run.collect import account
        from offload.run.report import Message

    with open_session(path, replace(run, images=not no_images), console) as session:
        interrupt.keep_session()
        interrupt.end_on_signals()
        settings, told = sampling.of(path, max_tokens=session.context)
        console.step(told)
        messages = Messages(aside=console.json)
        conversation = ChatLoop(session, settings, console, messages)
        conversation.begin(system)
        if resume is not None:
            conversation.resume(before, resume)
            told = f"{len(before)} messages" if before else "nothing yet"
            console.prose(f"({resume}: {told}; every answer is saved there)")
        try:  # what is wrong with the template is said before the first question
            session.encode_chat([*conversation.messages, {"role": "user", "content": "?"}])
        except CheckpointError as error:
            console.prose(f"coldstream: error: {error}")
        if messages.terminal:
            console.say("Type a message; /help lists the commands.")
        conversation.loop()
        if conversation.runs:
            measured = account(
                session,
                conversation.runs,
                command="chat",
                command_line=command_line(),
                messages=[Message(message["role"], message["content"]) for message in conversation.messages],
                warmup=1,
            )
            extra = {"messages": conversation.messages, "finish_reason": conversation.finish_reason}
            finish(measured, console, report, extra)
        else:
            console.result({"command": "chat", "messages": [], "notes": session.notes})
    if conversation.failed and not conversation.runs:
        raise SystemExit(1)
