"""Session: a loaded model with its plan, caches and counts, ready to generate. What the commands talk to."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.decode.select import select_decoder
from offload.experts.cache.mapped_cache import MappedCache
from offload.experts.cache.placed import expert_cache_of
from offload.experts.storage.arena import Arena
from offload.experts.storage.reader import Reader
from offload.experts.storage.store import ExpertStore
from offload.generate.batch import Batch
from offload.generate.drafts import drafts_of
from offload.generate.engine import Engine
from offload.generate.generator import Generator
from offload.generate.kept_prompts import prompt_cache_of
from offload.generate.runner import ModelParts, Runner, end_tokens
from offload.generate.stream import Stream, Told
from offload.hardware.cuda_driver import gpu_errors
from offload.hardware.ledger import MemoryLedger, resident_bytes
from offload.hardware.probe import Say
from offload.hardware.vram_limit import Allowance, VramMeter
from offload.model.kv_cache import STORAGES
from offload.model.load import check_rope, load_model, move_to_arena, text_config
from offload.model.moe import ExpertRunner
from offload.model.page_pool import PagePool
from offload.model.stock_cache import cache_of
from offload.plan.planned_run import PlannedModel, PlannedRun, planned_run
from offload.records import RunOptions, Sampling, TokenRecord
from offload.routing.stats import RoutingStats
from offload.run.collect import account
from offload.run.device import choose_compute, choose_device, measured_machine
from offload.run.draft_model import begin_drafting
from offload.run.report import RunReport
from offload.text.own_tokens import OwnTokens
from offload.text.tokenizer import encode, encode_chat, load_tokenizer, text_files
from offload.tiers import Key, Tier
from offload.vision.images import Images, Message, Shown, check_looking, has_images
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.identity import model_id
from quant.checkpoint.inventory import schemes_of_tensors, wider_bytes
from quant.errors import BudgetError
from quant.kernels import native
from quant.model.hub import resolve_model
from quant.model.recipe import load_recipe
from quant.progress import Progress, nobody


class Session:
    """One model, loaded. ``Session.open`` makes one; use it as a context manager, or call ``close``.

    ``store`` are the checkpoint's experts and ``run`` is the run that was planned for it on ``device``.
    """

    def __init__(
        self,
        store: ExpertStore,
        run: PlannedRun,
        device: torch.device,
        allowance: Allowance | None = None,
        loading: Progress = nobody,
    ) -> None:
        started = time.perf_counter()
        self.store, self.checkpoint, self.shape = store, store.checkpoint, store.shape
        self.schemes, self.options, self.machine, self.plan = run.model.schemes, run.options, run.machine, run.plan
        self.device, self.context = device, run.plan.context
        self.vram: VramMeter | None = None
        if device.type == "cuda":
            self.vram = VramMeter(device, allowance or Allowance.claim(device, self.options.vram))
        self.ledger = MemoryLedger(baseline_rss=resident_bytes())
        self.routing = RoutingStats(model_id(self.checkpoint), self.shape)
        if run.routing is not None:
            run.routing.check(self.routing.model_id)
        self.reader = Reader(
            self.checkpoint.files,
            self.checkpoint.states,
            direct=not self.options.page_cache,
            page_cached=self.plan.ram_slots + self.plan.vram_slots >= store.count,
        )
        self.experts = expert_cache_of(store, self.reader, run, device)
        self._enter_experts()
        compute = choose_compute(self.options, device)
        runner = ExpertRunner(self.experts, self.routing, compute, self.shape.family.scales_input)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        check_rope(text_config(self.checkpoint), self.context)
        self.model = load_model(self.checkpoint, runner, compute, dtype, device, loading, self._read_dense)
        in_place = device.type != "cpu" or isinstance(self.experts, MappedCache)
        self._dense: Arena | None = None if in_place else move_to_arena(self.model, loading)
        storage = STORAGES[self.plan.kv_bits]
        kv = cache_of(self.shape, self.model.config, self.context, storage)
        tiers, folder = self.plan.kv_tiers, self.options.kv_disk or Path()
        sequences, epsilon = self.plan.kv_sequences, self.options.kv_epsilon
        self.kv_pool = PagePool(self.shape, self.context, storage, device, dtype, sequences, tiers, folder, epsilon)
        self.decoder, notes = select_decoder(self.model, self.plan, runner, kv, device, graph=self.options.graph)
        self.kernel, self._dtype = self.decoder.name, dtype
        self.kv_pool.check_reader(self.decoder.reads_disk_pages)
        said = [*self.reader.notes, *(store.notes if self.reader.direct else ())]
        self.notes = [*said, *(self.vram.allowance.notes if self.vram is not None else ()), *notes]
        self.notes += [*self.kv_pool.notes, *filter(None, [native.thread_note()])]
        self.tokenizer = load_tokenizer(self.checkpoint.path)
        self._images: Images | None = None
        self.checkpoint.check_unchanged(*text_files(self.checkpoint.path))
        parts = ModelParts(
            self.decoder,
            self.tokenizer,
            self.experts,
            dense_bytes=self._enter_dense(),
            prompt_chunk=self.plan.prompt_chunk,
            context=self.context,
            limit=self.shape.max_position_embeddings,
            vocab_size=self.shape.vocab_size,
            known_ids=lambda: self.shape.vocab_size if self._images is None else self._images.tokens.end,
            eos=end_tokens(self.checkpoint, self.tokenizer),
            home="vram" if device.type == "cuda" else "ram",
            own=OwnTokens(self.tokenizer),
            vram=self.vram,
            after_first=self._finish_load,
        )
        bound = self.decoder.bound
        drafts = drafts_of(self.options, self.shape, self.machine, parts.dense_bytes)
        self.prompts = prompt_cache_of(self, self.kv_pool, self._image_content, self.notes, shared=bound is None)
        self.runner: Runner = (
            Batch(parts, self.kv_pool, self.notes, self.prompts, drafts)
            if bound is None
            else Generator(parts, bound, self.notes, drafts)
        )
        self.engine = Engine(self.runner)
        self.draft: Session | None = None  # that of the draft model
        if run.routing is not None and self.plan.fills and not self.experts.holds_all:
            self.experts.fill()
        self.load_seconds = time.perf_counter() - started

    @classmethod
    def open(
        cls,
        model: str | Path,
        options: RunOptions | None = None,
        *,
        recipe: str | None = None,
        progress: Say | None = None,
        loading: Progress = nobody,
        filled: int | None = None,
        **asked: Any,
    ) -> "Session":
        """Plan the run of ``model`` (a directory or a Hub id) on this machine and load it.

        ``asked`` are fields of RunOptions, over those of ``options``; what neither says is the ``recipe``'s.
        ``progress`` is told what takes time, ``loading`` how many bytes are where they will stay; speeds are predicted
        for ``filled`` tokens in the KV cache (512). Raises
        CheckpointError, BudgetError, MachineError, ProfileError, RecipeError, UsageError, each with one clear line.
        """
        say = progress or (lambda text: None)
        options = replace(options or RunOptions(), **asked).over(load_recipe(recipe) if recipe else None)
        store = ExpertStore(Checkpoint.open(resolve_model(model)))
        device = choose_device(options)
        # Before anything else is on the GPU: then the driver's figures tell what CUDA itself takes.
        allowance = Allowance.claim(device, options.vram) if device.type == "cuda" else None
        machine = measured_machine(store.checkpoint.path, options, device, say)
        stored = schemes_of_tensors(store.checkpoint)
        planned = PlannedModel(store.shape, stored, "as stored", wider=wider_bytes(store.checkpoint))
        options = replace(options, device="cpu" if allowance is None else "cuda")
        if allowance is not None:
            options = replace(options, vram=allowance.planned)
        try:
            run = planned_run(planned, options, machine=machine, slot_bytes=store.slot_bytes, prompt=filled)
        except BudgetError as error:
            raise (allowance.explain(error) if allowance is not None else error) from None
        say("loading the model")
        with gpu_errors():
            session = cls(store, run, device, allowance, loading)
        session.draft = begin_drafting(session, run, cls)
        return session

    def _enter_experts(self) -> None:
        """Enter the slots and files of routed experts in the ledger."""
        self.ledger.add("ram", "experts", self.experts.arena.nbytes)
        self.ledger.add("vram", "experts", self.plan.vram_slots * self.store.slot_bytes)
        self.ledger.add("disk", "experts", self.store.nbytes)

    def _read_dense(self, key: str) -> Tensor:
        """Tensor ``key`` for the model. Where experts are mapped at first, matrices are, too, and move with them;
        a vector may be a buffer, which never moves."""
        entry, cache = self.checkpoint.entries[key], self.experts
        files = cache.files if isinstance(cache, MappedCache) and self.device.type == "cpu" else None
        mapped = files.tensor(entry) if files is not None and len(entry.shape) > 1 else None
        return self.checkpoint.read(key) if mapped is None else mapped

    def _finish_load(self) -> None:
        """Move the dense weights to where they are read fastest, and begin to fill the experts' slots. Both
        take memory that is new to the process, whose first use is slow, so a first token comes before."""
        started = time.perf_counter()
        if self.device.type == "cpu" and isinstance(self.experts, MappedCache):
            if self._dense is None:
                self._dense = move_to_arena(self.model)
            for file in self.checkpoint.files:
                self.reader.check(file)
            self.decoder.weights_moved()
        if self.plan.fills:
            self.experts.fill()
        self.load_seconds += time.perf_counter() - started

    def _enter_dense(self) -> int:
        """Enter the dense weights in the ledger; returns the bytes of them that every forward pass reads."""
        home: Tier = "vram" if self.device.type == "cuda" else "ram"
        read = 0
        for key, name in self.checkpoint.names.items():
            if name.role in ("experts", "vision"):
                continue
            nbytes = self.checkpoint.entries[key].nbytes
            self.ledger.add("ram" if name.role == "embeddings" else home, name.role, nbytes)
            read += 0 if name.role == "embeddings" and not self.shape.tie_word_embeddings else nbytes
        self.ledger.add(home, "kv_cache", self.kv_pool.nbytes)
        return read

    @property
    def cached_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.engine.call(lambda: self.runner.cached_tokens)

    def encode(self, text: str, images: Sequence[Shown] = ()) -> list[int]:
        """Token ids of ``text``, as the tokenizer itself begins and ends one, and of ``images`` (paths, bytes of files
        or Pillow's, and Videos), which stand where the text says ``<|image|>``, or before it.
        Raises InputError for no text, and what is no image; UsageError where no images can be looked at.
        """
        return self._looking().encode(text, images) if images else encode(self.tokenizer, text)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers: see ``tokenizer.encode_chat``, for images in
        it ``Images.encode_chat``, and for answers that this session has given ``OwnTokens``."""
        if has_images(messages):
            ids = self._looking().encode_chat(messages, tools, switches)
        else:
            ids = encode_chat(self.tokenizer, messages, tools, switches)
        return self.runner.parts.own.as_said(ids, self.context - 1)

    def _looking(self) -> Images:
        """What looks at images, made when the first comes."""
        check_looking(self.shape, room=self.options.images)
        if self._images is None:
            self._images = Images(self.checkpoint, self.model, self.tokenizer, self.device, self._dtype)
        return self._images

    def _image_content(self, token: int) -> tuple[bytes, int]:
        assert self._images is not None, "a token of an image was made by those who look at it"
        return self._images.tokens.content(token)

    def submit(
        self, prompt: str | Sequence[int], sampling: Sampling | None = None, told: Told | None = None, **asked: Any
    ) -> Stream:
        """Queue ``prompt``, a text or its token ids, and return at once: the stream gives a record for each token
        that follows, as it comes, or ``told`` gets them. Callable from any thread.

        ``asked`` are fields of Sampling, over those of ``sampling``. What the KV cache holds of the prompt from
        prompts before is not run again. Raises UsageError for an empty prompt and BudgetError for one that does
        not fit the context; the stream raises CheckpointError if the disk fails and MachineError if the GPU does.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        return self.engine.submit(ids, replace(sampling or Sampling(), **asked), told)

    def after_steps(self, call: Callable[[], None]) -> None:
        """Have ``call`` called after every step, by the thread that runs the model."""
        self.engine.after_step = call

    def generate(
        self, prompt: str | Sequence[int], sampling: Sampling | None = None, **asked: Any
    ) -> Iterator[TokenRecord]:
        """The records of ``submit``, which is called with the first one asked for; the sequence ends when the
        iterator is closed or let go of."""
        stream, prompt = self.submit(prompt, sampling, **asked), ""  # ten million tokens in a list are many bytes
        try:
            yield from stream
        finally:
            stream.cancel()

    def chat(
        self, messages: Sequence[Message], sampling: Sampling | None = None, **asked: Any
    ) -> Iterator[TokenRecord]:
        """The assistant's answer to ``messages``, each with a ``role`` and a ``content``; see ``generate``, and
        ``encode_chat`` for contents with images.

        Raises UsageError if the model has no chat template, too.
        """
        return self.generate(self.encode_chat(messages), sampling, **asked)

    def report(self, *, command: str = "session", warmup: int = 1) -> RunReport:
        """What the latest runs did, at most 16 of them: speeds, memory by tier and role, expert hits, beside
        what was predicted. The first ``warmup`` decode steps, which meet cold caches, do not count as speed."""
        runs = self.engine.call(lambda: [list(run) for run in self.runner.runs])
        return account(self, runs, command=command, warmup=warmup)

    def prefill(self, prompt: Sequence[int]) -> TokenRecord:
        """See ``Runner.prefill``."""
        return self.engine.call(lambda: self.runner.prefill(prompt))

    def finish_filling(self) -> None:
        """Wait until every expert that has a slot is in it. Raises CheckpointError if the disk fails."""
        self.engine.call(self._fill)

    def save_prompts(self) -> None:
        """Write all that the KV cache holds of sequences that are over to the prompt cache, if there is one: by itself
        only whole blocks are, the rest when the session is closed."""
        prompts, runner = self.prompts, self.runner
        if prompts is not None and isinstance(runner, Batch):
            self.engine.call(lambda: prompts.save_tails(runner.prefixes))
            self.engine.call(prompts.flush)

    def _fill(self) -> None:
        self.runner.finish_load(now=True)
        self.decoder.synchronize()
        self.experts.fill()
        self.experts.wait()

    def reset(self) -> None:
        """Forget the conversation; the experts stay where they are."""
        self.engine.call(self.runner.reset)

    def expert_tiers(self) -> dict[Key, Tier]:
        """Where each expert is now."""
        return self.engine.call(self._tiers)

    def _tiers(self) -> dict[Key, Tier]:
        self.decoder.synchronize()
        return {key: self.experts.tier_of(key) for key in self.store.experts()}

    def close(self) -> None:
        """End every sequence, write what the prompt cache is to keep of them, stop reading and close the files."""
        self.engine.close()
        self.save_prompts()
        if self.prompts is not None:
            self.prompts.close()
        for owned in (self.draft, self.decoder, self.reader, self.experts, self.kv_pool):
            if owned is not None:
                owned.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
