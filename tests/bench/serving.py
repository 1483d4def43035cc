"""What `coldstream serve` bears, by trial; the figures of docs/serve.md. The tests hold a sample of each.

    coldstream quantize recipes/demo MODEL --recipe demo
    python -m tests.bench.serving MODEL schemas agent chaos load together overhead [--seconds 600]

schemas   200 random schemas: JSON by each, temperature 1; every finished answer is valid
agent     40 turns with tools, up to 8,000 tokens: what is computed of all prompts beside what is new in them
chaos     500 requests as no client should make them, a good one after every ten
load      8 clients, mixed lengths: errors, tokens/s, memory, descriptors
together  8 clients with as many requests each, in turn with the same requests by 8 threads of a process without a
          server: the seconds of both
steady    8 clients whose answers are all under way, in turn with the steps that `bench --sequences 8` counts: the
          tokens per second of both, and the processor's time that a token takes the server and the clients
overhead  one client: the time between streamed tokens beside that of the same steps without a server

The last line is one JSON document.
"""

import argparse
import http.client
import json
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai

from offload.records import Sampling
from offload.run.session import Session
from tests.cli.serve.running import KEY, Running
from tests.cli.serve.test_safety import ASK, PATH, idle, misbehave

WORDS = [
    "import",
    "os",
    "sys",
    "json",
    "def",
    "return",
    "self",
    "class",
    "for",
    "while",
    "with",
    "open",
    "path",
    "name",
    "value",
    "data",
    "list",
    "dict",
]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a part of a file",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"enum": ["a.py", "b.py"]},
                "line": {"type": "integer", "minimum": 1, "maximum": 99},
            },
            "required": ["path", "line"],
            "additionalProperties": False,
        },
    },
}


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the keywords that clients use."""
    kind = chance.choice(
        ["string", "integer", "boolean", "enum", "number", *["object", "array", "anyOf"] * (depth < 3)]
    )
    match kind:
        case "enum":
            return {"enum": chance.sample([*WORDS, 1, 2.5, True, None], chance.randint(1, 4))}
        case "object":
            names = chance.sample(WORDS, chance.randint(1, 4))
            keys = {name: random_schema(chance, depth + 1) for name in names}
            required = names[: chance.randint(1, len(names))]
            return {"type": "object", "properties": keys, "required": required, "additionalProperties": False}
        case "array":
            bounds = {"minItems": chance.randint(0, 2), "maxItems": chance.randint(2, 4)}
            return {"type": "array", "items": random_schema(chance, depth + 1), **bounds}
        case "anyOf":
            return {"anyOf": [random_schema(chance, depth + 1) for _ in range(chance.randint(2, 3))]}
        case "string":
            return {
                "type": "string",
                **chance.choice([{"maxLength": 12}, {"pattern": "^[a-f]{2,6}$"}, {"format": "date"}]),
            }
        case "integer":
            return {"type": "integer", "minimum": chance.randint(-9, 0), "maximum": chance.randint(1, 999)}
    return {"type": kind}


def schemas(server: Running, client: openai.OpenAI, count: int = 200) -> dict[str, Any]:
    """JSON by ``count`` random schemas: how many finished, of which all were valid."""
    chance = random.Random(0)
    finished = 0
    for number in range(count):
        schema = {"type": "object", "properties": {"value": random_schema(chance)}, "required": ["value"]}
        schema["additionalProperties"] = False
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        asked: Any = {"messages": ASK["messages"], "response_format": form, "temperature": 1, "seed": number}
        [choice] = client.chat.completions.create(model="any", max_tokens=200, **asked).choices
        if choice.finish_reason == "stop":
            finished += 1
            jsonschema.validate(json.loads(choice.message.content or ""), schema)
    return {"schemas": count, "finished": finished, "valid": finished}


def agent(server: Running, client: openai.OpenAI, turns: int = 40, tokens: int = 8000) -> dict[str, Any]:
    """A conversation that calls a tool at each turn: tokens of its last prompt, how many of all prompts were neither of
    the prompt before nor of the answer to it, and how many were computed."""
    chance = random.Random(0)
    messages: list[Any] = [{"role": "system", "content": "You edit files."}, {"role": "user", "content": "Go on."}]
    computed = new = before = prompt = 0
    for _ in range(turns):
        asked: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
        done = client.chat.completions.create(model="any", messages=messages, max_tokens=120, **asked)
        message, usage = done.choices[0].message, done.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        prompt = usage.prompt_tokens
        computed += prompt - (usage.prompt_tokens_details.cached_tokens or 0)
        new, before = new + prompt - before, usage.total_tokens
        messages.append(message.model_dump(exclude_none=True))
        said = " ".join(chance.choices(WORDS, k=tokens // turns * 2 // 3))
        messages += [{"role": "tool", "tool_call_id": call.id, "content": said} for call in message.tool_calls or ()]
    return {"turns": turns, "prompt_tokens": prompt, "new_in_all": new, "computed_in_all": computed}


def chaos(server: Running, client: openai.OpenAI, count: int = 500) -> dict[str, Any]:
    """``count`` wrongs: memory from the hundredth on, descriptors."""
    chance, descriptors, rss = random.Random(1), server.descriptors, 0
    for number in range(count):
        misbehave(server, chance)
        if number % 10 == 9:
            idle(server)
            assert server.ask("POST", PATH, ASK)[0] == 200
        if number == min(99, count // 3):
            rss = server.rss_bytes
    grown = server.rss_bytes / rss - 1
    return {"requests": count, "memory_growth": round(grown, 4), "descriptors": server.descriptors - descriptors}


def load(server: Running, client: openai.OpenAI, seconds: float = 60.0, clients: int = 8) -> dict[str, Any]:
    """``clients`` that ask without a pause for ``seconds``."""
    failed: list[str] = []
    tokens = [0] * clients
    readings: list[tuple[int, int]] = []
    end = time.monotonic() + seconds

    def ask(place: int) -> None:
        chance = random.Random(place)
        while time.monotonic() < end and not failed:
            talk: Any = [{"role": "user", "content": " ".join(chance.choices(WORDS, k=chance.randint(1, 60)))}]
            length = chance.randint(8, 160)
            try:
                body = {"messages": talk, "max_tokens": length, "ignore_eos": True, "stream": True}
                *_, end_of_text, done = stream(server, body)
                assert done == "data: [DONE]\n" and '"finish_reason":"length"' in end_of_text
                tokens[place] += length
            except Exception as error:  # noqa: BLE001 - told at the end
                failed.append(repr(error))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(5.0, seconds / 10))
        readings.append((server.rss_bytes, server.descriptors))
    half = readings[len(readings) // 4 :]  # after it has warmed up
    last = half[len(half) // 2 :]
    return {
        "clients": clients,
        "seconds": seconds,
        "errors": failed,
        "tokens_per_s": round(sum(tokens) / seconds, 1),
        "memory_growth": round(max(rss for rss, _ in half) / half[0][0] - 1, 4),
        # Most at once: a client between two requests has none.
        "descriptors": max(count for _, count in last) - max(count for _, count in half[: len(half) // 2]),
    }


def together(
    server: Running, client: openai.OpenAI, model: Path, rounds: int = 3, each: int = 2, clients: int = 8
) -> dict[str, Any]:
    """``clients`` at once with ``each`` requests one after another, by the server and without it, in turn."""
    chance = random.Random(0)
    asked = [
        [(" ".join(chance.choices(WORDS, k=chance.randint(1, 60))), chance.randint(8, 160)) for _ in range(each)]
        for _ in range(clients)
    ]

    def through(text: str, length: int) -> None:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": length, "ignore_eos": True}
        *_, end_of_text, done = stream(server, {**body, "stream": True, "temperature": 0})
        assert done == "data: [DONE]\n" and '"finish_reason":"length"' in end_of_text

    with Session.open(model, context=1024, sequences=clients) as session:

        def without(text: str, length: int) -> None:
            prompt = session.encode_chat([{"role": "user", "content": text}])
            assert sum(1 for _ in session.generate(prompt, max_tokens=length, ignore_eos=True)) == length

        def timed(answer: Callable[[str, int], None]) -> float:
            def work(mine: list[tuple[str, int]]) -> None:
                for text, length in mine:
                    answer(text, length)

            began = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(work, asked))
            return round(time.perf_counter() - began, 3)

        timed(through), timed(without)  # what is loaded later is not counted
        pairs = [(timed(through), timed(without)) for _ in range(rounds)]
    tokens = sum(length for mine in asked for _, length in mine)
    shares = [round(alone / served, 3) for served, alone in pairs]
    return {"tokens": tokens, "seconds": pairs, "shares": shares, "share": statistics.median(shares)}


def steady(
    server: Running, client: openai.OpenAI, model: Path, rounds: int = 5, length: int = 400, clients: int = 8
) -> dict[str, Any]:
    """``clients`` with an answer each, while all of them have begun and none is over, in turn with the steps of as many
    sequences that one thread asks for and reads, as the bench does."""
    asked = [" ".join(random.Random(place).choices(WORDS, k=40)) for place in range(clients)]

    def times(text: str) -> list[tuple[float, float]]:
        """When what came, in tokens: an event may have several, and their text tells how many, nearly."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": length, "ignore_eos": True}
        lines = stream(server, {**body, "stream": True, "temperature": 0})
        came = [(time.perf_counter(), line) for line in lines if '"content":"' in line][1:]
        sizes = [len(json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"]) for _, line in came]
        return [(at, size * length / sum(sizes)) for (at, _), size in zip(came, sizes, strict=True)]

    def through() -> tuple[float, float, float]:
        own, served = time.process_time(), server.cpu_seconds
        with ThreadPoolExecutor(clients) as pool:
            runs = list(pool.map(times, asked))
        own, served = time.process_time() - own, server.cpu_seconds - served
        first, last = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
        tokens = sum(count for run in runs for at, count in run if first < at <= last)
        each = 1e6 / (clients * length)
        return tokens / (last - first), served * each, own * each

    with Session.open(model, context=1024, sequences=clients) as session:

        def without() -> float:
            talks = [session.encode_chat([{"role": "user", "content": text}]) for text in asked]
            streams = [session.submit(talk, Sampling(max_tokens=length, ignore_eos=True)) for talk in talks]
            steps = [r.seconds for run in [*map(list, streams)] for r in run[1:] if r.sequences == clients]
            return clients / statistics.mean(steps)

        through(), without()  # what is loaded later is not counted
        pairs = [(through(), without()) for _ in range(rounds)]
    shares = [round(served[0] / alone, 3) for served, alone in pairs]
    return {
        "tokens_per_s": [(round(served[0]), round(alone)) for served, alone in pairs],
        "shares": shares,
        "share": statistics.median(shares),
        "server_us_per_token": round(statistics.median(served[1] for served, _ in pairs)),
        "clients_us_per_token": round(statistics.median(served[2] for served, _ in pairs)),
    }


def overhead(server: Running, client: openai.OpenAI, rounds: int = 12, length: int = 300) -> dict[str, Any]:
    """The time between tokens as a client has them, and the step's by the server's own timings."""
    parts = []
    body = {**ASK, "max_tokens": length, "ignore_eos": True, "stream": True, "temperature": 0}
    for _ in range(rounds):
        times, steps = [], 0.0
        for line in stream(server, body):
            times.append(time.perf_counter())
            if '"timings"' in line:
                steps = json.loads(line.removeprefix("data: "))["timings"]["predicted_per_token_ms"]
        parts.append((1e3 * (times[-2] - times[1]) / (length - 1), steps))  # from the first token to the last
    between, step = (statistics.median(values) for values in zip(*parts, strict=True))
    return {"ms_between_tokens": round(between, 3), "ms_of_a_step": round(step, 3)}


def stream(server: Running, body: object) -> Iterator[str]:
    """The events of an answer, by a client that costs little itself."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", PATH, json.dumps(body).encode(), {"Authorization": f"Bearer {KEY}"})
    with connection.getresponse() as answer:
        for line in answer:
            if line.startswith(b"data: "):
                yield line.decode()
    connection.close()


def alone(model: Path, rounds: int = 12, length: int = 300) -> float:
    """Milliseconds of the same steps in this process, without a server."""
    means = []
    with Session.open(model, context=1024) as session:
        prompt = session.encode_chat(ASK["messages"])
        for _ in range(rounds):
            records = session.generate(prompt, max_tokens=length, ignore_eos=True)
            next(records)
            began = time.perf_counter()
            count = sum(1 for _ in records)
            means.append(1e3 * (time.perf_counter() - began) / count)
    return round(statistics.median(means), 3)


TRIALS: dict[str, Callable[..., dict[str, Any]]] = {
    trial.__name__: trial for trial in (schemas, agent, chaos, load, together, steady, overhead)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("trials", nargs="+", choices=TRIALS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round of together")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.trials:
            model, context = asked.model, 1024
            if name == "agent":  # the demo model was made for 1,024 tokens; how it writes does not matter here
                model, context = Path(shutil.copytree(asked.model, Path(folder) / "long")), 20_000
                config = json.loads((model / "config.json").read_text())
                (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
            several = ("--parallel", "8") if name in ("together", "steady") else ()
            server = Running(model, "--api-key", KEY, "--context", str(context), *several)
            try:
                with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=600) as client:
                    options: dict[str, Any] = {
                        "load": {"seconds": asked.seconds},
                        "together": {"model": model, "each": asked.requests},
                        "steady": {"model": model},
                    }.get(name, {})
                    found[name] = TRIALS[name](server, client, **options)
                    print(f"{name}: {found[name]}", flush=True)
            finally:
                server.end()
            if name == "overhead":
                found[name]["ms_of_a_step_alone"] = alone(model)
                print(found[name])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
