"""The prompt cache of a session: where it is, what its files are named by, and why there may be none."""

import hashlib
import os
from pathlib import Path
from typing import Protocol

import torch

from offload.generate.prompt_cache import PromptCache
from offload.model.page_pool import PagePool
from offload.prompts.block_keys import Content
from offload.prompts.page_file import FILE_VERSION
from offload.prompts.page_folder import PageFolder
from offload.records import RunOptions
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.identity import weights_id
from quant.model.shape import ModelShape

SIZE = 50 * 2**30
_NOT_KEPT = "the prompt cache is not used: "


class Opened(Protocol):
    """What a prompt cache is for: a session."""

    checkpoint: Checkpoint
    shape: ModelShape
    options: RunOptions
    device: torch.device
    kernel: str


def prompt_cache_of(
    session: Opened, pool: PagePool, content: Content, notes: list[str], *, shared: bool
) -> PromptCache | None:
    """The cache that the session's options ask for; None without, and where a note says why. ``shared``: sequences
    have pages of ``pool``.

    Its files are of these weights, this form of the KV cache and these kernels alone: what others compute differs, if
    only in the last bits.
    """
    options, shape = session.options, session.shape
    if options.prompt_cache is None:
        return None
    if not shape.keeps_pages:
        notes.append(f"{_NOT_KEPT}what attention keeps of a {shape.family.name} model does not lie in pages")
        return None
    if not shared or session.device.type != "cpu":
        notes.append(f"{_NOT_KEPT}beside a GPU the KV cache is not kept on disk")
        return None
    refusal = _refusal(options.prompt_cache)
    if refusal:
        notes.append(refusal)
        return None
    kv = str(pool.dtype).removeprefix("torch.")
    form = (
        f"{FILE_VERSION} {kv} {session.kernel} {options.exact} {shape.num_kv_heads} {shape.head_dim} {shape.num_layers}"
    )
    chunks = f"{shape.attention_chunk_size} {sorted(shape.chunked_layers)}"
    if options.kv_epsilon:  # what comes after tokens that were not computed from everything is not exact
        chunks += f" {options.kv_epsilon}"
    origin = hashlib.sha256(f"{weights_id(session.checkpoint)} {form} {chunks}".encode()).hexdigest()[:16]
    folder = PageFolder(options.prompt_cache.absolute(), origin, options.prompt_cache_size or SIZE)
    about = {
        "model": session.checkpoint.path.resolve().name,
        "origin": origin,
        "kernel": session.kernel,
        "kv": kv,
        "kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
    }
    return PromptCache(pool, folder, content, about, notes, direct=not options.page_cache)


def _refusal(folder: Path) -> str:
    """Why ``folder`` cannot be used at all, or only be read; empty if nothing speaks against it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.listdir(folder)
    except (OSError, ValueError) as error:
        return f"{_NOT_KEPT}{folder} is no folder that can be read ({getattr(error, 'strerror', error)})"
    return ""
