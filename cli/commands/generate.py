"""``coldstream generate``: continue a prompt, the text on stdout as it comes."""

from contextlib import suppress
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
from offload.records import RunOptions, TokenRecord

MAX_TOKENS = 256
Prompt = Annotated[
    str, typer.Argument(metavar="PROMPT", callback=typed_text, help="The text to continue; - reads it from stdin.")
]
Image = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        parser=typed_path,
        metavar="FILE",
        help="An image, where PROMPT says <|image|> or before it; again for more.",
    ),
]
VideoFile = Annotated[
    list[Path] | None,
    typer.Option(
        "--video",
        parser=typed_path,
        metavar="FILE",
        help="A video, as pictures at even distances with their times; placed like an image, after those.",
    ),
]
Frames = Annotated[
    int | None,
    typer.Option("--frames", min=1, max=128, metavar="N", help="Pictures of each --video.", show_default="32"),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")]


@takes_console
@takes_run_and_prompt_options
@takes_sampling
def generate(
    model: Model,
    prompt: Prompt,
    sampling: AskedSampling,
    run: RunOptions,
    console: Console,
    image: Image = None,
    video: VideoFile = None,
    frames: Frames = None,
    chat: Chat = False,
    ignore_eos: IgnoreEos = False,
    report: Report = None,
) -> None:
    """Continue PROMPT with MODEL, streaming the text to stdout; the run report follows on stderr.

    Ctrl-C ends the text: the report is made of what there is, and the exit code is 130.
    """
    from cli.steps.finish import check_page, command_line, finish
    from cli.steps.messages import with_parts
    from cli.steps.open_model import find_model, open_session
    from cli.steps.texts import read_text
    from quant.errors import UsageError
    from quant.output_file import check_stdout

    check_stdout()
    check_page(report)
    path = find_model(model)
    settings, told = sampling.of(path, max_tokens=MAX_TOKENS)
    with seldom_collecting():
        from offload.batch.token_ids import packed_ids
        from offload.run.collect import account
        from offload.run.report import Message
        from offload.vision.video_file import FRAMES, Video

    text = read_text(Path("-")) if prompt == "-" else prompt
    if frames is not None and not video:
        raise UsageError("--frames says how many pictures a --video becomes, and none was given")
    videos = [Video(file, frames or FRAMES) for file in video or ()]
    with open_session(path, replace(run, images=bool(image or videos)), console) as session:
        if chat:
            question = {"role": "user", "content": text, "images": image or (), "videos": videos}
            ids = packed_ids(session.encode_chat(with_parts([question])))
        else:
            ids = packed_ids(session.encode(text, [*(image or ()), *videos]))
        console.step(told)
        records: list[TokenRecord] = []
        with interrupt.StopRequest() as stop, suppress(KeyboardInterrupt):
            for record in session.generate(ids, replace(settings, ignore_eos=ignore_eos)):
                records.append(record)
                console.write(record.text)
                if stop.asked:
                    break
        console.write("\n")
        if not records:
            raise KeyboardInterrupt
        answer = "".join(record.text for record in records)
        extra = {"prompt_tokens": len(ids), "text": answer, "finish_reason": records[-1].finish_reason}
        measured = account(
            session,
            [records],
            command="generate",
            command_line=command_line(),
            messages=(Message("user", text), Message("assistant", answer)),
            warmup=1,  # the first decode step meets cold code and caches
        )
        finish(measured, console, report, extra)
    if stop.asked:
        raise SystemExit(interrupt.INTERRUPTED)
