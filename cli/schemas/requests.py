"""What clients may ask of ``coldstream serve``: the body of each request. The server takes none that is otherwise."""

from cli.schemas.types import ANY, OBJECT, Schema, const, either, flag, many, maybe, number, one_of, text, typed


def asked(*required: str, **keys: Schema) -> Schema:
    """An object of a request: keys may be null, or missing but for the ``required``, and others may be beside them."""
    given = {key: value if key in required or "type" not in value else maybe(value) for key, value in keys.items()}
    return typed("object", properties=given, required=list(required))


NAME = typed("string", pattern=r"^[\w.:-]{1,128}$")
ASKED_MODEL = text("any name: the one model answers")
STREAM = flag("as server-sent events")
TOOLS_AT_MOST = 256
FORMATS = ("text", "json_object", "json_schema")
MESSAGES = typed("array", "the conversation, each with a role and a content", minItems=1, items=OBJECT)
EFFORT = text("a switch of templates that know it")
SAMPLING: dict[str, Schema] = {
    "model": ASKED_MODEL,
    "stream": STREAM,
    "stream_options": asked(include_usage=flag("a last event with the usage")),
    "temperature": number("0: greedy"),
    "top_p": number(),
    "top_k": typed("integer", "0 or -1: all"),
    "min_p": number(),
    "repetition_penalty": number(),
    "presence_penalty": number(),
    "frequency_penalty": number(),
    "logit_bias": typed("object", patternProperties={r"^[0-9]{1,9}$": number()}, additionalProperties=False),
    "seed": typed("integer", minimum=-(2**63), maximum=2**64 - 1),
    "stop": either(text(), typed("array", items=text(), maxItems=64), typed("null")),
    "n": typed("integer", "answers", minimum=1),
    "max_tokens": typed("integer"),
    "ignore_eos": flag("go on where the model would end"),
    "user": text("of no effect"),
}
FUNCTION: dict[str, Schema] = {"name": NAME, "description": text(), "parameters": OBJECT}
CHAT = asked(
    "messages",
    **SAMPLING,
    messages=MESSAGES,
    max_completion_tokens=typed("integer"),
    logprobs=flag("of each token"),
    top_logprobs=typed("integer", minimum=0, maximum=20),
    response_format=asked(type=one_of("", *FORMATS), json_schema=asked(schema=OBJECT)),
    tools=typed(
        "array",
        maxItems=TOOLS_AT_MOST,
        items=asked("type", "function", type=const("function"), function=asked("name", **FUNCTION)),
    ),
    tool_choice=either(
        one_of("", "auto", "none", "required"),
        asked("type", "function", type=const("function"), function=asked("name", name=text())),
        typed("null"),
    ),
    parallel_tool_calls=flag("more than one call"),
    chat_template_kwargs=typed("object", "values of the template's own"),
    reasoning_effort=EFFORT,
)
COMPLETIONS = asked(
    "prompt",
    **SAMPLING,
    prompt=typed("array", "a text, its token ids, or several of either", minItems=1, maxItems=1 << 18)
    | {"type": ["string", "array"]},
    logprobs=typed("integer", minimum=0, maximum=20),
    echo=flag("refused"),
    suffix=text("refused"),
    best_of=typed("integer", "as many as n"),
)
ANTHROPIC_TOOL = asked("name", name=NAME, description=text(), input_schema=OBJECT, type=text())
COUNTED: dict[str, Schema] = {
    "model": ASKED_MODEL,
    "messages": MESSAGES,
    "system": either(text(), many(OBJECT), typed("null")),
    "tools": typed("array", maxItems=TOOLS_AT_MOST, items=ANTHROPIC_TOOL),
    "tool_choice": asked(
        "type", type=one_of("", "auto", "any", "tool", "none"), name=text(), disable_parallel_tool_use=flag("")
    ),
    "thinking": asked(type=text("disabled: without")),
    "output_config": asked(format=asked("type", "schema", type=const("json_schema"), schema=OBJECT)),
}
COUNT = asked("messages", **COUNTED)
MESSAGE_ASKED = asked(
    "messages",
    "max_tokens",
    **COUNTED,
    max_tokens=typed("integer"),
    stream=STREAM,
    temperature=number(),
    top_p=number(),
    top_k=typed("integer"),
    stop_sequences=typed("array", items=text(), maxItems=64),
    metadata=typed("object", "of no effect"),
)
RESPONSES_TOOL = asked("type", **{**FUNCTION, "name": typed("string", pattern=r"^[\w.:-]{0,128}$")}, type=text())
RESPONSES = asked(
    "input",
    model=ASKED_MODEL,
    stream=STREAM,
    input={"type": ["string", "array"], "items": OBJECT},
    instructions=text(),
    previous_response_id=text("refused"),
    conversation=ANY,
    background=flag("refused"),
    temperature=number(),
    top_p=number(),
    max_output_tokens=typed("integer"),
    tools=typed("array", maxItems=TOOLS_AT_MOST, items=RESPONSES_TOOL),
    tool_choice=either(
        one_of("", "auto", "none", "required"),
        asked("type", "name", type=const("function"), name=text()),
        typed("null"),
    ),
    parallel_tool_calls=flag("more than one call"),
    text=asked(format=asked(type=one_of("", *FORMATS), schema=OBJECT)),
    reasoning=asked(effort=EFFORT),
    store=flag("nothing is"),
    metadata=OBJECT,
)
TOKENIZE = asked(
    "content", content=text(), add_special=flag("with those that begin and end a text"), with_pieces=flag("")
)
DETOKENIZE = asked("tokens", tokens=typed("array", maxItems=1 << 18, items=typed("integer", minimum=0)))
