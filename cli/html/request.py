"""What was run, first on the page: the command to copy, the model and how it is stored, the budgets, and what
was asked and answered."""

import re
from collections.abc import Sequence

from cli.html.document import facts, section, text
from cli.terminal.words import number, size
from offload.run.report import Message, RunReport
from offload.tiers import role_name

_SPEAKERS = {"user": "Prompt", "assistant": "Answer", "system": "System prompt"}


def request_section(report: RunReport) -> str:
    """The card of what was asked."""
    request = report.request
    said = _conversation(request.messages)
    about = command(request.command_line) + facts(_about(report))
    body = f'<div class="pair plain-pair"><div>{about}</div>{said}</div>' if said else about
    return section("What was run", body, css="request")


def command(line: str) -> str:
    """A command line with a button that copies it."""
    if not line:
        return ""
    # A word stays on one line if it fits, lest --ram becomes - and -ram; a path that does not breaks at its slashes.
    words = " ".join(f"<span>{_breakable(word)}</span>" for word in line.split(" "))
    return (
        f'<div class="command"><pre tabindex="0" id="command">{words}</pre>'
        '<button type="button" data-copy="command">Copy</button></div>'
    )


def _breakable(word: str) -> str:
    parts = re.findall(r"[^/=]*[/=]+|[^/=]+", word)
    return text(word) if len(parts) < 2 else "".join(f"<span>{text(part)}</span>" for part in parts)


def _about(report: RunReport) -> dict[str, str]:
    subject, request = report.subject, report.request
    stored = ", ".join(f"{role_name(role)} {scheme}" for role, scheme in request.schemes.items())
    budgets = [
        f"{size(count)} of {tier}"
        for tier, count in (("VRAM", request.vram_bytes), ("RAM", request.ram_bytes))
        if count
    ]
    layers = len(report.expert_map.moe_layers)
    experts = f"{layers} MoE layers of {subject.num_experts} experts, {subject.top_k} per token"
    return {
        "Model": f"{subject.family}, {experts if layers else 'no experts'}",
        "Stored as": stored,
        "Budgets": f"{' and '.join(budgets)}, Python and its libraries included" if budgets else "",
        "Context": f"{subject.context:,} tokens",
        "Machine": ", ".join(filter(None, (report.environment.gpu, report.environment.cpu))),
        "Loaded in": f"{number(subject.load_seconds)} s",
    }


def _conversation(messages: Sequence[Message]) -> str:
    if not messages:
        return ""
    turns = "".join(
        f"<h3>{text(_SPEAKERS.get(message.role, message.role))}</h3>"
        f'<pre class="said {"answer" if message.role == "assistant" else ""}" dir="auto" tabindex="0">'
        f"{text(message.content) or '<i>(nothing)</i>'}</pre>"
        for message in messages
    )
    return f'<div class="conversation">{turns}</div>'
