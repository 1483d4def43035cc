"""What stock transformers makes of the input that a fuzzed command accepted, and whether the command's answer is that.

A spoiled input that runs has one right answer: the one of stock transformers on that very input. Where transformers
does not take it, what was spoiled must have had no meaning: the answer is the one of the input as it was.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Llama4ForConditionalGeneration

from offload.generate.batch import Batch
from offload.generate.sequence import Sequence as BatchRow
from tests import oracle

# Greatest difference of logits, as a part of the greatest logit: f32 sums in another order.
_TOLERANCE = 2e-3
# The same where transformers rounds what it dequantized to bf16, as it does for fused experts.
_TOLERANCE_BF16 = 2e-2
_ROUNDING = 0.25  # greatest error of a weight matrix in 4 bits, as a part of its norm


class StockRefusesError(Exception):
    """transformers does not take the input, or not all of it."""


@dataclass
class Answer:
    """What a run computed: after each step the tokens so far and the logits ``[vocab]`` that follow them."""

    steps: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """The token sequences that no other one continues."""
        all_of = {tokens for tokens, _ in self.steps}
        return [one for one in all_of if not any(len(two) > len(one) and two[: len(one)] == one for two in all_of)]

    def equals(self, other: "Answer") -> bool:
        """Whether the same prompt, and whatever was sampled alike after it, gave the same logits."""
        mine, theirs = dict(self.steps), dict(other.steps)
        both = mine.keys() & theirs.keys()
        prompts = [answer.steps[0][0] for answer in (self, other) if answer.steps]
        return len(both & set(prompts)) == 1 and all(_close(mine[tokens], theirs[tokens]) for tokens in both)


@contextmanager
def recorded() -> Iterator[Answer]:
    """What generators compute meanwhile."""
    answer, real = Answer(), Batch._try

    def seen(batch: Batch, rows: list[BatchRow], ends: list[int], drafts: list[list[int]], keep: list[int]) -> Tensor:
        logits = real(batch, rows, ends, drafts, keep)
        texts = [[*row.tokens[:end], *draft] for row, end, draft in zip(rows, ends, drafts, strict=True)]
        for text, its in zip(texts, logits.split(keep), strict=True):
            for back, row in enumerate(reversed(its.detach().float().clone())):
                answer.steps.append((tuple(text[: len(text) - back]), row))
        return logits

    Batch._try = seen  # type: ignore[method-assign]
    try:
        yield answer
    finally:
        Batch._try = real  # type: ignore[method-assign]


def stock_model(folder: Path) -> Any:
    """transformers' model of ``folder`` in f32, all of it from the files. Raises StockRefusesError."""
    with _refused():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        kind: Any = Llama4ForConditionalGeneration if config.model_type == "llama4" else AutoModelForCausalLM
        model, info = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    if info["missing_keys"] or info["mismatched_keys"] or info["error_msgs"]:
        raise StockRefusesError("not all weights are there")
    return model.eval()


def logits_differ(answer: Answer, model: Any) -> str:
    """Where ``answer`` is not what ``model`` gives; empty if nowhere. Raises StockRefusesError."""
    for sequence in answer.sequences:
        with _refused(), torch.inference_mode():
            theirs = model(torch.tensor([sequence]), use_cache=False).logits[0].float()
        for tokens, logits in answer.steps:
            if sequence[: len(tokens)] == tokens and not _close(logits, theirs[len(tokens) - 1]):
                by = (logits - theirs[len(tokens) - 1]).abs().max()
                return f"logits after {len(tokens)} tokens differ by {by:.3g} from transformers'"
    return ""


def prompt_ids(folder: Path, text: str, chat: bool) -> list[int]:
    """transformers' token ids of ``text``, or of a conversation that begins with it. Raises StockRefusesError."""
    with _refused():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if chat:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids: list[int] = tokenizer(text, add_special_tokens=not chat).input_ids
    return ids


def greedy_text(folder: Path, model: Any, ids: Sequence[int], count: int) -> str:
    """The text with which transformers continues ``ids``, as generation_config.json has it. Raises
    StockRefusesError."""
    with _refused(), torch.inference_mode():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        settings = model.generation_config
        settings.do_sample, settings.max_length, settings.use_cache = False, None, True
        made = model.generate(torch.tensor([list(ids)]), max_new_tokens=count)[0].tolist()
        text: str = tokenizer.decode(made[len(ids) :], skip_special_tokens=True)
    return text


def conversion_differs(source: Path, made: Path) -> str:
    """What of the checkpoint ``made`` is not ``source``, rounded; empty if nothing. Raises StockRefusesError."""
    before = {name: value.clone() for name, value in stock_model(source).named_parameters()}
    dequantized = oracle.stock(source, made)
    for name, value in dequantized.named_parameters():
        error = (value - before[name]).norm() / before[name].norm().clamp(min=1e-30)
        if not error <= _ROUNDING:
            return f"{name} is {float(error):.3g} off"
    loaded = stock_model(made)
    ids = torch.arange(1, 20)[None] % dequantized.config.get_text_config().vocab_size
    with torch.inference_mode():
        ours, theirs = (model(ids, use_cache=False).logits[0] for model in (loaded, dequantized))
    close = _close(ours, theirs, _TOLERANCE_BF16)
    return "" if close else f"logits of what was made differ by {(ours - theirs).abs().max():.3g}"


def planned_differs(folder: Path, planned: dict[str, int]) -> str:
    """Which of the bytes that were ``planned`` by role transformers' model does not have. Raises StockRefusesError."""
    with _refused(), torch.device("meta"):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config.get_text_config())
    found = {"embeddings": 0, "router": 0, "norm": 0}
    for name, value in model.named_parameters():
        *_, module, kind = name.split(".")
        if module == "embed_tokens":
            found["embeddings"] += 2 * value.numel()
        elif "norm" in module:
            found["norm"] += 2 * value.numel()
        elif module in ("router", "gate") and kind == "weight":
            found["router"] += 2 * value.numel()
    wrong = [
        f"{role} {planned.get(role, 0)} B for {size}" for role, size in found.items() if planned.get(role, 0) != size
    ]
    return ", ".join(wrong)


def _close(ours: Tensor, theirs: Tensor, tolerance: float = _TOLERANCE) -> bool:
    return bool(((ours - theirs).abs() <= tolerance * theirs.abs().max().clamp(min=1.0)).all())


@contextmanager
def _refused() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # whatever a library makes of hostile input
        raise StockRefusesError(f"{type(error).__name__}: {error}") from error
