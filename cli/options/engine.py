"""The option that names another engine, which is to load a checkpoint as well."""

from typing import Annotated, Literal

import typer

EngineName = Literal["vllm", "sglang", "transformers"]
Engine = Annotated[EngineName, typer.Option("--for", help="The engine that is to load it.", show_default=False)]
ForEngine = Annotated[
    EngineName | None, typer.Option("--for", help="Refuse what this engine could not load: vllm, sglang, transformers.")
]
