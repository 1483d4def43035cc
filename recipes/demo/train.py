#!/usr/bin/env python3
"""Train a small Llama 4 like the demo model, from the Python standard library alone.

Source text is the running interpreter's own standard library; chats are made of its docstrings ("What does
os.path.join do?"). The modules in held_out.txt beside this script are never seen in training, by name and by
content, and the loss on them is reported at the end, with the loss on chats about docstrings kept back.

``--begin MODEL`` trains a checkpoint on, with its tokenizer, instead of random weights; ``grow.py`` makes wider ones.

Usage: python train.py OUT [--minutes 26] [--hidden 256] [--begin MODEL]

transformers' Llama 4 runs every expert on every token; training runs only the chosen one (SparseMoe): the
same function, several times faster.

Legend: T tokens, E experts, H hidden size, I expert intermediate size.
"""

import argparse
import ast
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers import PreTrainedTokenizerFast as Tokenization
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

HELD_OUT = Path(__file__).with_name("held_out.txt")
HELD_OUT_MODULES = {
    "distutils/command/bdist_rpm.py",
    "opcode.py",
    "_osx_support.py",
    "encodings/mac_croatian.py",
    "http/server.py",
    "venv/__init__.py",
}
SEPARATOR = "<|document|>\n"
VOCAB_SIZE = 4096
BEGIN, END, HEADER_START, HEADER_END, EOT, PAD = SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|finetune_right_pad|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m['role'] }}<|header_end|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
CHAT_SHARE = 0.25  # of the sequences in a batch
KEPT_BACK = 50  # one docstring in so many is for evaluation
BALANCE = 0.01  # weight of the load-balancing loss


@dataclass(frozen=True)
class Training:
    """What ``training.json`` beside the checkpoint says: losses in nats per token."""

    held_out_text_loss: float
    held_out_chat_loss: float
    steps: int
    tokens: int
    minutes: float


class SparseMoe(nn.Module):
    """Llama4TextMoe under the same parameter names, running only the expert that each token chose.

    Keeps the load-balancing loss of the last forward in ``balance_loss`` (Switch Transformer, equation 4:
    E · Σ share of tokens · mean probability; 1 when even).
    """

    def __init__(self, stock: Llama4TextMoe) -> None:
        super().__init__()
        self.experts, self.router, self.shared_expert = stock.experts, stock.router, stock.shared_expert
        self.num_experts: int = stock.num_experts
        self.balance_loss = torch.zeros(())

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
        router_logits = F.linear(x, self.router.weight)  # [T, E]
        top_logit, chosen = router_logits.max(dim=-1)
        order = chosen.argsort()
        counts = chosen.bincount(minlength=self.num_experts)
        share = counts / len(x)
        self.balance_loss = self.num_experts * (share * router_logits.softmax(dim=-1).mean(dim=0)).sum()
        scaled = (x * top_logit.sigmoid().unsqueeze(-1))[order]  # scores scale an expert's input
        parts = []
        for expert, rows in enumerate(scaled.split(counts.tolist())):
            gate, up = (rows @ self.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            parts.append((up * F.silu(gate)) @ self.experts.down_proj[expert])
        routed = torch.empty_like(x).index_copy(0, order, torch.cat(parts))
        return self.shared_expert(x) + routed, router_logits


def sparse(model: Llama4ForCausalLM) -> Llama4ForCausalLM:
    """The model with every MoE block replaced by a SparseMoe over the same parameters."""
    for layer in model.model.layers:
        layer.feed_forward = SparseMoe(layer.feed_forward)
    return model


def sources(megabytes: float) -> Iterator[tuple[str, str]]:
    """(dotted module name, text) of the standard library's modules, held-out ones and tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    held_out = {text.strip() for text in HELD_OUT.read_text(encoding="utf-8").split(SEPARATOR)}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not {"site-packages", "test", "tests", "idle_test", "dist-packages"} & set(path.relative_to(root).parts)
    ]
    random.Random(0).shuffle(files)
    left = megabytes * 1e6
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if name in HELD_OUT_MODULES or text.strip() in held_out or not text.strip():
            continue
        yield name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), text
        left -= len(text)
        if left < 0:
            return


def questions(module: str, text: str) -> Iterator[tuple[str, str]]:
    """(question, answer) for each documented module, class and function: the docstring's first paragraph."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
                yield from described(child, f"{name}.{child.name}")
                yield from visit(child, f"{name}.{child.name}")

    def described(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[tuple[str, str]]:
        answer = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        if answer:
            asks = {ast.Module: "What is the module {}?", ast.ClassDef: "What is {}?"}
            yield asks.get(type(node), "What does {} do?").format(name), answer

    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # lib2to3's fixtures are Python 2
        return
    yield from described(tree, module)
    yield from visit(tree, module)


def train_tokenizer(texts: list[str]) -> Tokenization:
    """Byte-level BPE of 4,096 with Llama 4's chat tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BEGIN)  # every text the model sees begins with it
    tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", f"{BEGIN} $A $B:1", [(BEGIN, begin)])
    return Tokenization(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=EOT,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def config(hidden: int) -> Llama4TextConfig:
    """Scout's architecture in little: all layers MoE, three chunked and one NoPE, rows of ``hidden`` weights."""
    return Llama4TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden,
        intermediate_size_mlp=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=1024,
        num_local_experts=16,
        num_experts_per_tok=1,
        attention_chunk_size=256,
        floor_scale=256,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        bos_token_id=0,
        eos_token_id=[1, 4],
        pad_token_id=5,
    )


def stream(tokenizer: Tokenization, texts: list[str]) -> Tensor:
    """All texts as one row of token ids, int64 [T]."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for encoding in encoded for token in encoding.ids], dtype=torch.long)


def as_chat(pair: tuple[str, str]) -> str:
    turns = zip(("user", "assistant"), pair, strict=True)
    return BEGIN + "".join(f"{HEADER_START}{role}{HEADER_END}\n\n{text}{EOT}" for role, text in turns)


@torch.no_grad()
def loss_on(model: nn.Module, tokens: Tensor, length: int = 256) -> float:
    """Mean nats per token over consecutive windows, each seen without what came before it."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    losses = [
        F.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()) * len(rows)
        for rows in windows.split(4)
    ]
    return float(sum(losses) / len(windows))


def head_loss(head: nn.Module, hidden: Tensor, rows: Tensor) -> tuple[float, Tensor]:
    """Mean loss and its gradient by ``hidden`` [batch, length, H]; the head's own is left in the head.

    A few sequences at a time: all logits at once are 100 MB, which the allocator gives back to the system and
    asks for anew at every step, for as much time as the rest of the step takes.
    """
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    for part, tokens in zip(leaf.split(4), rows.split(4), strict=True):
        loss = F.cross_entropy(head(part[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) * len(tokens) / len(rows)
        loss.backward()
        total += loss.item()
    assert leaf.grad is not None
    return total, leaf.grad


def train(
    model: Llama4ForCausalLM,
    text: Tensor,
    chats: Tensor,
    minutes: float,
    steps: int | None,
    batch: int,
    length: int,
    peak: float = 3e-3,
) -> int:
    """AdamW for ``minutes`` or ``steps``, learning rate up to ``peak``, then a cosine; returns steps done."""
    blocks = [module for module in model.modules() if isinstance(module, SparseMoe)]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    offsets = torch.arange(length)
    started = time.monotonic()
    recent = 0.0
    step = 0
    while True:
        elapsed = (time.monotonic() - started) / 60
        progress = step / steps if steps is not None else elapsed / minutes
        if progress >= 1:
            return step
        rate = peak * min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        of_chats = round(batch * CHAT_SHARE)
        rows = torch.cat(
            [
                source[torch.randint(len(source) - length, (count, 1)) + offsets]
                for source, count in ((text, batch - of_chats), (chats, of_chats))
            ]
        )
        hidden = model.model(rows, use_cache=False).last_hidden_state
        balance = torch.stack([block.balance_loss for block in blocks]).mean()
        loss, gradient = head_loss(model.lm_head, hidden, rows)
        torch.autograd.backward([hidden, BALANCE * balance], [gradient, None])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent = loss if step == 1 else 0.95 * recent + 0.05 * loss
        if step <= 3 or step % 50 == 0:
            print(f"{elapsed:5.1f} min  step {step:5d}  loss {recent:.3f}  balance {balance.item():.3f}", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Llama 4 on the Python standard library.")
    parser.add_argument("out", type=Path, help="folder for the checkpoint; must not exist or be empty")
    parser.add_argument("--minutes", type=float, default=26.0, help="training time, default 26")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--batch", type=int, default=24, help="sequences per step, default 24")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence, default 256")
    parser.add_argument("--corpus-mb", type=float, default=math.inf, help="read only so much source text")
    parser.add_argument(
        "--hidden", type=int, default=128, help="row width, default 128; 256 is what GGUF's blocks of 256 fill"
    )
    parser.add_argument("--begin", type=Path, metavar="MODEL", help="train this one on")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate, default 3e-3")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.out.exists() and any(options.out.iterdir()):
        sys.exit(f"{options.out} is not empty: name a folder that is")
    torch.manual_seed(options.seed)
    modules = list(sources(options.corpus_mb))
    pairs = [pair for name, text in modules for pair in questions(name, text)]
    kept_back, asked = pairs[::KEPT_BACK], [pair for i, pair in enumerate(pairs) if i % KEPT_BACK]
    begin = options.begin
    tokenizer = Tokenization.from_pretrained(begin) if begin else train_tokenizer([text for _, text in modules])
    text = stream(tokenizer, [f"{BEGIN}{text}{END}" for _, text in modules])
    chats = stream(tokenizer, [as_chat(pair) for pair in asked])
    print(f"{len(modules)} modules, {len(text):,} tokens; {len(asked)} chats, {len(chats):,} tokens", flush=True)

    fresh = None if begin else Llama4ForCausalLM(config(options.hidden))
    model = sparse(fresh or Llama4ForCausalLM.from_pretrained(begin, dtype=torch.float32))
    started = time.monotonic()
    steps = train(model, text, chats, options.minutes, options.steps, options.batch, options.length, options.rate)
    minutes = (time.monotonic() - started) / 60

    model.eval().to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    saved = sparse(Llama4ForCausalLM.from_pretrained(options.out, dtype=torch.float32))
    unseen = HELD_OUT.read_text(encoding="utf-8").split(SEPARATOR)
    result = Training(
        held_out_text_loss=loss_on(saved, stream(tokenizer, [f"{BEGIN}{text}{END}" for text in unseen])),
        held_out_chat_loss=loss_on(saved, stream(tokenizer, [as_chat(pair) for pair in kept_back])),
        steps=steps,
        tokens=steps * options.batch * options.length,
        minutes=round(minutes, 1),
    )
    (options.out / "training.json").write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main(sys.argv[1:])
