"""Chat templates: rendered as transformers renders them; broken, endless and enormous ones end soon."""

import os
import resource
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from offload.text import chat_template
from offload.text.chat_template import render_chat
from quant.errors import CheckpointError
from tests.tokenizers import byte_level

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi <b> é 😀\n"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "{{ bos_token }} {% raw %}"},
]
TEMPLATES = {
    "roles": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}",
    "prompt": "{{ bos_token }}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "blocks": "  {% for m in messages -%}\n  {{ m.content }}\n  {%- endfor %}\n\n",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}{{ '<é>' | tojson(ensure_ascii=true) }}",
    "namespace": "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
    "dict": "{% set d = dict(a=1, **messages[0]) %}{{ d.role }}{{ dict.fromkeys(['x'], 2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "macro": "{% macro say(m) %}{{ m.role | upper }}{% endmacro %}{{ say(messages[0]) }}",
    "absent": "{{ nothing }}{{ tools is none }}{{ documents is defined }}{{ nothing is defined }}",
    "time": "{{ strftime_now('%Y') }}",
    "map": "{{ messages | map(attribute='role') | join(', ') }}",
    "strings": "{{ messages[1].content.strip().split(' ')[0] }}{{ 'a' * 3 }}{{ messages[0].content[::-1] }}",
    "special": "{{ eos_token }}{{ pad_token }}",
}


def stock(template: str, messages: list[dict[str, Any]]) -> str:
    tokenizer = tokenizer_of(template)
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    return byte_level(bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=template)


def render(template: str, messages: list[dict[str, Any]] = TALK) -> str:
    return render_chat(template, messages, tokenizer_of(template).special_tokens_map)


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_what_transformers_makes_of_it(name: str) -> None:
    assert render(TEMPLATES[name]) == stock(TEMPLATES[name], TALK)


def test_the_demo_models_template_is_too(demo_model: Path) -> None:
    template = (demo_model / "chat_template.jinja").read_text()
    assert render(template) == stock(template, TALK)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Only user and assistant roles are supported!') }}", "Only user and assistant"),
        ("a\n{{ messages.foo.bar }}", "line 2: 'list object' has no attribute 'foo'"),
        ("a\n\n{% if %}", "line 3: "),
        ("{% for m in messages %}", "line 1: "),
        ("{{ unknown() }}", "'unknown' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | nosuchfilter }}", "nosuchfilter"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x'.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(_a=1) %}", "underscore"),
        ("{{ range(10000000) | length }}", "Range too big"),
        ("{% include 'evil.py' %}", "no loader"),
        ("{{ raise_exception() }}", "missing 1 required"),
        ("{{ raise_exception('long ' * 100000) }}", "long long"),
    ],
)
def test_a_template_that_fails_is_one_short_line(template: str, said: str) -> None:
    with pytest.raises(CheckpointError, match="the model's chat template cannot put this conversation") as error:
        render(template)
    assert said in str(error.value)
    assert len(str(error.value)) < 700


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        NESTED + ENDS,
        NESTED + "x" + ENDS,
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ '%010000000000d' % 1 }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{{ ('x' * 4000000) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ [[0] * 9999] * 9999999 }}",
    ],
)
def test_endless_and_enormous_templates_end_with_one_line(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"takes|makes"):
        render(template)
    assert time.perf_counter() - started < chat_template.WALL_SECONDS + 5


def test_a_template_that_sleeps_on_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "WALL_SECONDS", 0.5)
    with pytest.raises(CheckpointError, match="longer than"):
        render(NESTED + ENDS)


def test_a_long_conversation_is_no_enormous_one() -> None:
    talk = [{"role": "user", "content": "word " * 400_000}, {"role": "assistant", "content": "é" * 400_000}]
    assert len(render(TEMPLATES["roles"], talk)) > 2_399_000


def test_half_a_character_passes_through_as_it_is() -> None:
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "caf\udce9"}]) == "caf\udce9"


def process() -> subprocess.Popen[bytes] | None:
    return chat_template._worker._process


def test_the_process_is_kept_and_one_that_failed_is_not() -> None:
    render(TEMPLATES["roles"])
    kept = process()
    assert kept is not None
    started = time.perf_counter()
    for _ in range(20):
        render(TEMPLATES["roles"])
    assert process() is kept and time.perf_counter() - started < 0.5, "a new process takes a tenth of a second each"
    with pytest.raises(CheckpointError):
        render("{{ 'x' * 10 ** 10 }}")
    assert kept.poll() is not None
    assert render(TEMPLATES["roles"]) == stock(TEMPLATES["roles"], TALK)


def test_a_process_that_somebody_ended_is_replaced() -> None:
    render(TEMPLATES["roles"])
    kept = process()
    assert kept is not None
    kept.kill()
    kept.wait()
    assert render(TEMPLATES["roles"]) == stock(TEMPLATES["roles"], TALK)


def test_nothing_of_a_conversation_is_there_for_the_next() -> None:
    keeps = "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ dict.x is defined }}"
    assert [render(keeps) for _ in range(3)] == ["1False"] * 3


def test_threads_get_their_own_conversations() -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: render(TEMPLATES["roles"], [{"role": "user", "content": f"n{n}"}]), range(64)))
    assert texts == [f"[user] n{n}\n" for n in range(64)]


def test_an_interrupt_ends_the_process_that_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    render(TEMPLATES["roles"])
    kept = process()

    class Interrupted:
        def register(self, *asked: object) -> None: ...

        def poll(self, *asked: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("select.poll", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        render(NESTED + ENDS)
    assert kept is not None and kept.poll() is not None


def test_a_template_is_rendered_where_over_a_thousand_files_are_open() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 2048:
        pytest.skip("no so many files can be opened here")
    chat_template._worker._end()  # so that its pipes come after
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, before[1]))
    try:
        opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        try:
            assert render_chat("{{ 1 }}", TALK, {}) == "1"
        finally:
            for descriptor in opened:
                os.close(descriptor)
    finally:
        chat_template._worker._end()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
