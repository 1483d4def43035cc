"""What ``coldstream serve`` answers: whole documents, and the events of streams."""

from cli.schemas.types import ANY, OBJECT, Schema, const, count, either, flag, many, maybe, number, one_of, text, typed


def closed(about: str = "", /, optional: dict[str, Schema] | None = None, **keys: Schema) -> Schema:
    """An object that has all ``keys``, perhaps the ``optional`` ones, and no others."""
    properties = {**keys, **(optional or {})}
    return typed("object", about, properties=properties, required=list(keys), additionalProperties=False)


FINISH = one_of("why it ended", "stop", "length", "tool_calls")
ERROR = closed(error=closed(message=text(), type=text(), optional={"param": maybe(text()), "code": ANY}))
ANTHROPIC_ERROR = closed(type=const("error"), error=closed(type=text(), message=text()), request_id=text())
TIMINGS = closed(
    "as llama.cpp's",
    **{name: count() for name in ("cache_n", "prompt_n", "predicted_n")},
    **{name: number() for name in ("prompt_ms", "prompt_per_second", "predicted_ms")},
    **{name: number() for name in ("predicted_per_token_ms", "predicted_per_second")},
)
USAGE = closed(
    prompt_tokens=count(),
    completion_tokens=count(),
    total_tokens=count(),
    prompt_tokens_details=closed(cached_tokens=count("that were not computed again")),
    completion_tokens_details=closed(reasoning_tokens=count()),
)
LOGPROB: dict[str, Schema] = {"token": text(), "logprob": number(), "bytes": maybe(many(count()))}
LOGPROBS = maybe(closed(content=many(closed(**LOGPROB, top_logprobs=many(closed(**LOGPROB))))))
CALLED = closed(name=text(), arguments=text("JSON"))
CHAT_HEAD: dict[str, Schema] = {"id": text(), "created": count(), "model": text()}
CHAT_ANSWER = closed(
    **CHAT_HEAD,
    object=const("chat.completion"),
    choices=many(
        closed(
            index=count(),
            message=closed(
                role=const("assistant"),
                content=maybe(text()),
                optional={
                    "reasoning_content": text("thoughts"),
                    "tool_calls": many(closed(id=text(), type=const("function"), function=CALLED)),
                },
            ),
            logprobs=LOGPROBS,
            finish_reason=FINISH,
        )
    ),
    usage=USAGE,
    timings=TIMINGS,
)
DELTA = closed(
    optional={
        "role": const("assistant"),
        "content": text(),
        "reasoning_content": text(),
        "tool_calls": many(
            closed(
                index=count(),
                function=closed(arguments=text(), optional={"name": text()}),
                optional={"id": text(), "type": const("function")},
            )
        ),
    }
)
CHAT_CHUNK = closed(
    **CHAT_HEAD,
    object=const("chat.completion.chunk"),
    choices=many(closed(index=count(), delta=DELTA, logprobs=LOGPROBS, finish_reason=maybe(FINISH))),
    optional={"usage": maybe(USAGE), "timings": TIMINGS},
)
TEXT_LOGPROBS = closed(
    tokens=many(text()), token_logprobs=many(number()), top_logprobs=many(OBJECT), text_offset=many(count())
)
COMPLETION = closed(
    **CHAT_HEAD,
    object=const("text_completion"),
    choices=many(closed(index=count(), text=text(), logprobs=maybe(TEXT_LOGPROBS), finish_reason=maybe(FINISH))),
    optional={"usage": maybe(USAGE), "timings": TIMINGS},
)
ANTHROPIC_USAGE = closed(
    input_tokens=count(),
    cache_creation_input_tokens=count(),
    cache_read_input_tokens=count("that were not computed again"),
    output_tokens=count(),
)
BLOCK = either(
    closed(type=const("text"), text=text()),
    closed(type=const("thinking"), thinking=text(), signature=text()),
    closed(type=const("tool_use"), id=text(), name=text(), input=OBJECT),
)
STOPPED: dict[str, Schema] = {
    "stop_reason": maybe(one_of("", "end_turn", "max_tokens", "stop_sequence", "tool_use")),
    "stop_sequence": maybe(text()),
}
ANTHROPIC_MESSAGE = closed(
    id=text(),
    type=const("message"),
    role=const("assistant"),
    model=text(),
    content=many(BLOCK),
    **STOPPED,
    usage=ANTHROPIC_USAGE,
)
MESSAGE_EVENT = either(
    closed(type=const("message_start"), message=ANTHROPIC_MESSAGE),
    closed(type=const("ping")),
    closed(type=const("content_block_start"), index=count(), content_block=BLOCK),
    closed(
        type=const("content_block_delta"),
        index=count(),
        delta=either(
            closed(type=const("text_delta"), text=text()),
            closed(type=const("thinking_delta"), thinking=text()),
            closed(type=const("input_json_delta"), partial_json=text()),
        ),
    ),
    closed(type=const("content_block_stop"), index=count()),
    closed(type=const("message_delta"), delta=closed(**STOPPED), usage=ANTHROPIC_USAGE),
    closed(type=const("message_stop")),
    ANTHROPIC_ERROR,
)
OUTPUT_TEXT = closed(type=const("output_text"), text=text(), annotations=many(ANY))
REASONING_TEXT = closed(type=const("reasoning_text"), text=text())
STATUS = one_of("", "in_progress", "completed", "incomplete")
ITEM = either(
    closed(type=const("message"), id=text(), role=const("assistant"), status=STATUS, content=many(OUTPUT_TEXT)),
    closed(type=const("function_call"), id=text(), call_id=text(), name=text(), arguments=text(), status=STATUS),
    closed(type=const("reasoning"), id=text(), summary=many(ANY), content=many(REASONING_TEXT)),
)
RESPONSE = closed(
    id=text(),
    object=const("response"),
    created_at=count(),
    status=STATUS,
    model=text(),
    output=many(ITEM),
    error=typed("null"),
    incomplete_details=maybe(closed(reason=text())),
    instructions=maybe(text()),
    metadata=OBJECT,
    parallel_tool_calls=flag(""),
    previous_response_id=typed("null"),
    store=const(False),
    temperature=maybe(number()),
    top_p=maybe(number()),
    max_output_tokens=maybe(count()),
    tool_choice={"type": ["string", "object"]},
    tools=many(OBJECT),
    usage=maybe(
        closed(
            input_tokens=count(),
            input_tokens_details=closed(cached_tokens=count()),
            output_tokens=count(),
            output_tokens_details=closed(reasoning_tokens=count()),
            total_tokens=count(),
        )
    ),
)
_PLACE: dict[str, Schema] = {"item_id": text(), "output_index": count(), "content_index": count()}
_NUMBERED: dict[str, Schema] = {"sequence_number": count()}
_LOGPROBS: dict[str, Schema] = {"logprobs": many(ANY)}
RESPONSE_EVENT = either(
    closed(
        type=one_of("", *(f"response.{kind}" for kind in ("created", "in_progress", "completed", "incomplete"))),
        response=RESPONSE,
        **_NUMBERED,
    ),
    closed(
        type=one_of("", "response.output_item.added", "response.output_item.done"),
        output_index=count(),
        item=ITEM,
        **_NUMBERED,
    ),
    closed(
        type=one_of("", "response.content_part.added", "response.content_part.done"),
        part=either(OUTPUT_TEXT, REASONING_TEXT),
        **_PLACE,
        **_NUMBERED,
    ),
    closed(
        type=one_of("", "response.output_text.delta", "response.reasoning_text.delta"),
        delta=text(),
        optional=_LOGPROBS,
        **_PLACE,
        **_NUMBERED,
    ),
    closed(
        type=one_of("", "response.output_text.done", "response.reasoning_text.done"),
        text=text(),
        optional=_LOGPROBS,
        **_PLACE,
        **_NUMBERED,
    ),
    closed(
        type=const("response.function_call_arguments.delta"),
        item_id=text(),
        output_index=count(),
        delta=text(),
        **_NUMBERED,
    ),
    closed(
        type=const("response.function_call_arguments.done"),
        item_id=text(),
        output_index=count(),
        name=text(),
        arguments=text("JSON"),
        **_NUMBERED,
    ),
    closed(type=const("error"), code=text(), message=text(), param=maybe(text()), **_NUMBERED),
)
LISTED = closed(
    id=text(),
    object=const("model"),
    created=count(),
    owned_by=text(),
    type=const("model"),
    display_name=text(),
    created_at=text("RFC 3339"),
    context_length=count("tokens that prompt and answer may have together"),
    max_model_len=count("the same"),
    meta=closed(n_ctx=count(), n_vocab=count()),
)
MODELS = closed(object=const("list"), data=many(LISTED), has_more=flag(""), first_id=text(), last_id=text())
PROPS = closed(
    default_generation_settings=closed(n_ctx=count("what one request may have"), params=OBJECT),
    total_slots=count("answers at once"),
    model_alias=text(),
    chat_template=text(),
    modalities=closed(vision=flag(""), audio=flag("")),
    build_info=text(),
)
SLOT = closed(
    id=count(),
    is_processing=flag("false: it waits"),
    n_ctx=count(),
    n_prompt_tokens=count(),
    n_cached_tokens=count(),
    n_decoded=count(),
    seconds=number(),
)
LIVE = closed(
    model=text(),
    tokens_per_s=maybe(number()),
    hit_rate=maybe(number()),
    limited_by=text(),
    running=count(),
    waiting=count(),
    memory=typed("object", "by tier", additionalProperties=many(closed(name=text(), bytes=count()))),
    experts=closed(layers=many(count()), counts=many(many(count())), tiers=many(many(text()))),
)
