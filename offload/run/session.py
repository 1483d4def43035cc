"""Session: a loaded model with its plan, caches and counts, ready to generate. What the commands talk to."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from offload.decode.cpu import NativeDecoder, head_fits_a_wait
from offload.decode.gpu import GraphDecoder, missed_share, refusal
from offload.decode.native_moe import is_native
from offload.experts.cache.host_cache import ExpertCache
from offload.experts.cache.mapped_cache import MappedCache
from offload.experts.cache.oom import with_room
from offload.experts.cache.tiered_cache import TieredCache
from offload.experts.storage.reader import Reader
from offload.experts.storage.store import ExpertStore
from offload.experts.storage.transfer import CudaTransfer, HostTransfer, Transfer
from offload.hardware.cuda_driver import gpu_errors
from offload.hardware.ledger import MemoryLedger, forget_peak, resident_bytes
from offload.hardware.probe import Machine, probe
from offload.hardware.vram_limit import Allowance, VramMeter
from offload.model.kv_cache import KVCache, Storage
from offload.model.load import check_rope, load_model, settle, text_config
from offload.model.moe import ExpertRunner
from offload.model.tokenizer import load_tokenizer
from offload.plan.cost_model import warm_bytes, with_warm_bytes
from offload.plan.plan import Plan
from offload.records import RunOptions, Sampling, TokenRecord
from offload.routing.eviction import Policy, make_policy
from offload.routing.frequency import ExpertFrequency
from offload.routing.stats import RoutingStats
from offload.run.device import choose_compute, choose_device
from offload.run.generate import Decoder, Generator
from offload.run.plan_run import Placement, plan_run
from offload.tiers import Key, Tier
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.identity import model_id
from quant.errors import BudgetError, UsageError
from quant.sizes import format_size


class Session:
    """One model, loaded. Use as a context manager, or call ``close``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: RunOptions,
        placement: Placement,
        device: torch.device,
        allowance: Allowance | None = None,
    ) -> None:
        started = time.perf_counter()
        self.vram: VramMeter | None = None
        if device.type == "cuda":
            self.vram = VramMeter(device, allowance or Allowance.claim(device, options.vram))
        self.checkpoint, self.options, self.placement, self.device = checkpoint, options, placement, device
        self.plan: Plan | None = None
        self.machine: Machine | None = None
        self.ledger = MemoryLedger(baseline_rss=resident_bytes())
        self.shape = checkpoint.shape
        self.context = self.shape.context(options.context)
        self.compute = choose_compute(options, device)
        self.kernel = self.compute.name
        self.routing = RoutingStats(model_id(checkpoint), self.shape)
        self.seed_routing = RoutingStats.load(options.routing, self.shape) if options.routing else None
        if self.seed_routing is not None:
            self.seed_routing.check(self.routing.model_id)
        self.store = ExpertStore(checkpoint)
        self.reader = Reader(
            [entry.file for entry in checkpoint.entries.values()],
            direct=not options.page_cache,
            warm=placement.ram_slots + placement.vram_slots >= self.store.count,
        )
        self.experts = self._expert_cache()
        runner = ExpertRunner(self.experts, self.routing, self.compute, self.shape.family.scales_input)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        check_rope(text_config(checkpoint), self.context)
        self.model = load_model(checkpoint, runner, self.compute, dtype, device)
        self._in_arena = device.type != "cpu"
        if not self._in_arena and not self._can_finish_later():
            self._dense, self._in_arena = settle(self.model), True
        self.notes = [*self.reader.notes, *(self.vram.allowance.notes if self.vram is not None else ())]
        self.tokenizer = load_tokenizer(checkpoint.path)
        storage: Storage = "plain" if options.exact else options.kv or "bf16"
        cache = KVCache(self.shape, self.context, storage)
        self.decoder: Decoder | None = self._native_decoder() or self._graph_decoder(cache, dtype)
        self.generator = Generator(
            self.model,
            self.tokenizer,
            cache,
            self.experts,
            dense_bytes=self._count(),
            prompt_chunk=placement.prompt_chunk,
            eos=self._eos(),
            device=device,
            native=self.decoder,
            vram=self.vram,
            after_first=self._settle_in,
        )
        if self.decoder is None and device.type == "cpu":
            self.kernel = "torch, dequantized weights"
            self.notes.append(
                "experts stored like these are dequantized by torch or bitsandbytes before each use, many "
                "times slower than the native kernels on int4 and int8: the prediction does not count that"
            )
        if self.seed_routing is not None and placement.fills and not self.experts.holds_all:
            self.experts.fill()
        self.load_seconds = time.perf_counter() - started

    @classmethod
    def open(cls, model: Path, options: RunOptions, *, progress: Callable[[str], None] | None = None) -> "Session":
        """Plan the run on this machine and load the model.

        Raises CheckpointError, BudgetError, MachineError, ProfileError, each with one clear line.
        """
        say = progress or (lambda text: None)
        checkpoint = Checkpoint.open(model)
        device = choose_device(options)
        # Before anything else is on the GPU: then the driver's figures tell what CUDA itself takes.
        allowance = Allowance.claim(device, options.vram) if device.type == "cuda" else None
        if allowance is not None:
            options = replace(options, vram=allowance.budget)
        try:
            machine = probe(model, say=say)
        except torch.OutOfMemoryError:
            raise BudgetError(
                f"--vram {format_size(options.vram or 0)} is too little to measure the GPU with: run "
                "`coldstream probe` first, which keeps what it finds"
            ) from None
        if options.warm is not None:
            machine = with_warm_bytes(machine, options.warm)
        forget_peak()  # measuring takes memory that the run does not
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        routing = RoutingStats.load(options.routing, checkpoint.shape) if options.routing else None
        try:
            room = options if allowance is None else replace(options, vram=allowance.planned)
            plan = plan_run(checkpoint, room, machine, device, routing)
        except BudgetError as error:
            raise (allowance.explain(error) if allowance is not None else error) from None
        say("loading the model")
        placement = Placement(
            plan.ram_slots,
            plan.vram_slots,
            plan.vram_seeds,
            plan.prompt_chunk,
            share=missed_share(ExpertStore(checkpoint), machine, plan.decode.cpu_share),
            guess_tokens=head_fits_a_wait(ExpertStore(checkpoint), machine),
            warm=warm_bytes(machine),
        )
        with gpu_errors():
            session = cls(checkpoint, options, placement, device, allowance)
        session.plan, session.machine = plan, machine
        if options.vram and device.type == "cpu":
            session.notes.append("--vram has no meaning here: the run is on the CPU")
        return session

    def _expert_cache(self) -> ExpertCache:
        counts = (
            None
            if self.seed_routing is None
            else dict(zip(self.store.experts(), self.seed_routing.counts.ravel().tolist(), strict=True))
        )

        def policy() -> Policy:
            return make_policy(self.options.policy, seed_counts=counts)

        ram_slots, vram_slots = self.placement.ram_slots, self.placement.vram_slots
        frequency = None
        if counts is not None or vram_slots:
            frequency = ExpertFrequency(self.shape.moe_layers, self.shape.num_experts, counts)
        if frequency is not None and vram_slots:
            transfer: Transfer = CudaTransfer(self.device) if self.device.type == "cuda" else HostTransfer()
            cache: ExpertCache = TieredCache(
                self.store,
                self.reader,
                policy,
                ram_slots=ram_slots,
                vram_slots=vram_slots,
                transfer=transfer,
                frequency=frequency,
                seeds=self.placement.vram_seeds or frequency.ordered(self.store.experts()),
            )
        elif self.reader.direct and self.reader.warm and ram_slots >= self.store.count:
            cache = MappedCache(self.store, self.reader, policy, ram_slots=ram_slots)
        else:
            cache = ExpertCache(self.store, self.reader, policy, ram_slots=ram_slots, frequency=frequency)
        self.ledger.add("ram", "experts", cache.arena.nbytes)
        self.ledger.add("vram", "experts", vram_slots * self.store.slot_bytes)
        self.ledger.add("disk", "experts", self.store.nbytes)
        return cache

    def _can_finish_later(self) -> bool:
        """Whether the files that the dense weights are mapped from will stay as they are."""
        names, cache = self.checkpoint.names, self.experts
        if not isinstance(cache, MappedCache) or cache.loans is None:
            return False
        dense = {
            self.checkpoint.entries[key].file for key, name in names.items() if name.role not in ("experts", "vision")
        }
        return all(cache.loans.hold(file) for file in dense)

    def _settle_in(self) -> None:
        """Move the dense weights to where they are read fastest, and begin to fill the experts' slots. Both
        take memory that is new to the process, whose first use is slow, so a first token comes before."""
        started = time.perf_counter()
        if not self._in_arena:
            self._dense, self._in_arena = settle(self.model), True
            if self.decoder is not None:
                self.decoder = self.generator.native = self._native_decoder()
        if self.placement.fills:
            self.experts.fill()
        self.load_seconds += time.perf_counter() - started

    def _native_decoder(self) -> NativeDecoder | None:
        """The fast path, where weights are stored and the architecture is as the native kernels know them."""
        record = self.store.record(*self.store.experts()[0])
        readable = is_native(record.view(torch.empty(record.slot_bytes, dtype=torch.uint8)))
        if not (self.compute.native and readable and NativeDecoder.knows(self.model.config)):
            return None
        if self.placement.vram_slots:
            return None
        return NativeDecoder(
            self.model,
            self.shape,
            self.experts,
            self.routing,
            self.compute.exact,
            guess_tokens=self.placement.guess_tokens,
        )

    def _graph_decoder(self, cache: KVCache, dtype: torch.dtype) -> GraphDecoder | None:
        """Decode steps as one launch, where a device's kernels can; a note says where they cannot."""
        if not (self.options.graph and isinstance(self.experts, TieredCache)):
            return None
        reason = refusal(self.model.config, self.store)
        if reason is not None:
            self.notes.append(
                f"decoding waits for the host in every layer instead of running as one CUDA graph: {reason}"
            )
            return None
        experts = self.experts
        decoder = with_room(
            lambda: GraphDecoder(
                self.model,
                experts,
                cache,
                self.routing,
                share=self.placement.share,
                dtype=dtype,
                device=self.device,
                exact=self.options.exact,
                warm=self.placement.warm,
            ),
            experts,
        )
        self.kernel = decoder.name
        return decoder

    def _count(self) -> int:
        """Enter the dense weights in the ledger; returns the bytes of them that every forward pass reads."""
        home: Tier = "vram" if self.device.type == "cuda" else "ram"
        read = 0
        for key, name in self.checkpoint.names.items():
            if name.role in ("experts", "vision"):
                continue
            nbytes = self.checkpoint.entries[key].nbytes
            self.ledger.add("ram" if name.role == "embeddings" else home, name.role, nbytes)
            read += 0 if name.role == "embeddings" and not self.shape.tie_word_embeddings else nbytes
        self.ledger.add(home, "kv_cache", self.shape.kv_nbytes(self.context, 4 if self.options.exact else 2))
        return read

    def _eos(self) -> frozenset[int]:
        found = self.model.generation_config.eos_token_id if self.model.generation_config else None
        found = found if found is not None else self.tokenizer.eos_token_id
        return frozenset([found] if isinstance(found, int) else found or [])

    @property
    def cached_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return len(self.generator.tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with the beginning-of-text token where the tokenizer adds one or the model
        has one."""
        ids: list[int] = self.tokenizer.encode(text)
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, by the model's chat template, up to where the assistant answers.

        Raises UsageError if the model has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UsageError("this model has no chat template: use `coldstream generate` instead of chat")
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[TokenRecord]:
        """See ``Generator.generate``."""
        return self.generator.generate(prompt, sampling)

    def prefill(self, prompt: Sequence[int]) -> TokenRecord:
        """See ``Generator.prefill``."""
        return self.generator.prefill(prompt)

    def finish_filling(self) -> None:
        """Wait until every expert that has a slot is in it. Raises CheckpointError if the disk fails."""
        self.generator.finish_load(now=True)
        self.generator.synchronize()
        self.experts.fill()
        self.experts.wait()

    def reset(self) -> None:
        """Forget the conversation; the experts stay where they are."""
        self.generator.reset()

    def expert_tiers(self) -> dict[Key, Tier]:
        """Where each expert is now."""
        self.generator.synchronize()
        return self.experts.tiers()

    def close(self) -> None:
        """Stop reading and close the files."""
        if isinstance(self.decoder, GraphDecoder):
            self.decoder.close()
        self.reader.close()
        self.experts.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
