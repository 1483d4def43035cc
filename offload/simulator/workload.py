"""What a decode step or a prompt asks of a machine, layer by layer, and what the machine gives.

Bytes of weights are counted from the model's shape, so that they cannot disagree with the plan; rates are the
machine's measured ones, reduced by the same constants as in ``offload/plan/cost_model.py``.
"""

from dataclasses import dataclass, replace

from offload.hardware.probe import Machine
from offload.plan import cost_model as cost
from offload.plan.footprint import Footprint
from quant.model.mixed_precision import scheme_of
from quant.scheme import BF16


@dataclass(frozen=True)
class LayerWork:
    """Bytes that every token reads of one layer, and the weights behind them: ``attention`` with its norms
    and the router, ``kv`` of the cache, ``mlp`` the shared expert or the dense MLP. ``routes``: has
    experts."""

    attention: int
    kv: int
    mlp: int
    attention_weights: int
    mlp_weights: int
    attended: int
    routes: bool


@dataclass(frozen=True)
class Work:
    """One model at a given length of its KV cache. ``expert`` are bytes, ``*_weights`` counts of weights;
    ``attention_width`` query values per layer."""

    layers: tuple[LayerWork, ...]
    head: int
    head_weights: int
    expert: int
    expert_weights: int
    experts: int
    top_k: int
    attention_width: int
    nf4: bool
    stock: bool = False
    stock_on_gpu: bool = False

    @classmethod
    def of(cls, footprint: Footprint, filled: int) -> "Work":
        """Of ``footprint``'s model with ``filled`` tokens in the KV cache."""
        shape, schemes = footprint.shape, footprint.schemes
        nbytes = {role: [0] * shape.num_layers for role in ("attention", "mlp")}
        weights = {role: [0] * shape.num_layers for role in ("attention", "mlp")}
        head = head_weights = 0
        plain, roles = shape.role_nbytes(schemes), footprint.roles()
        for linear in shape.dense_linears():
            size = scheme_of(schemes, linear).nbytes(linear.out_features, linear.in_features)
            size = size * roles[linear.role] // plain[linear.role]  # more where some are kept in f32
            if linear.layer is None:
                head, head_weights = size, linear.weights
                continue
            name = "attention" if linear.role == "attention" else "mlp"
            nbytes[name][linear.layer] += size
            weights[name][linear.layer] += linear.weights
        for tensor in shape.plain_tensors():
            size = 2 * tensor.elements * roles[tensor.role] // plain[tensor.role]
            if tensor.layer is not None:
                nbytes["attention"][tensor.layer] += size
            elif tensor.role != "embeddings" or shape.tie_word_embeddings:
                head += size
        held = dict(shape.kv_layers(filled))
        whole = footprint.kv_at(filled)
        tokens = sum(held.values())
        layers = tuple(
            LayerWork(
                attention=nbytes["attention"][layer],
                kv=whole * held[layer] // max(1, tokens),
                mlp=nbytes["mlp"][layer],
                attention_weights=weights["attention"][layer],
                mlp_weights=weights["mlp"][layer],
                attended=held[layer],
                routes=layer in shape.moe_layers,
            )
            for layer in range(shape.num_layers)
        )
        return cls(
            layers=layers,
            head=head,
            head_weights=head_weights or shape.vocab_size * shape.hidden_size,
            expert=footprint.expert_bytes,
            expert_weights=shape.expert_weights,
            experts=shape.num_experts,
            top_k=shape.top_k,
            attention_width=shape.num_heads * shape.head_dim,
            nf4=schemes.get("experts", BF16).kind == "nf4",
            stock=not shape.layers_on_cpu,
            stock_on_gpu=not shape.is_native,
        )

    @property
    def dense(self) -> int:
        """Bytes that every token reads, the KV cache included."""
        return self.head + sum(layer.attention + layer.kv + layer.mlp for layer in self.layers)


@dataclass(frozen=True)
class Rates:
    """What resources give, in bytes per second (``gpu`` and ``cpu_ops``: operations), and fixed prices in
    seconds: ``layer`` and ``step`` per layer and token, ``ring`` from the GPU to the host and back.

    ``dimm`` is the host's memory for everybody together, ``cpu`` what its kernels take of it at most. Rates
    of a card that is not there are 0. ``prefetch_bytes`` of a coming miss fit into the CPU's caches, which it
    reads at ``cached``.
    """

    dimm: float
    cpu: float
    cpu_ops: float
    disk: float
    layer: float
    step: float
    ring: float = 0.0
    vram: float = 0.0
    pcie: float = 0.0
    gpu: float = 0.0
    nf4: float = 0.0
    prefetch_bytes: float = 0.0
    cached: float = 0.0

    @classmethod
    def of(cls, machine: Machine, *, nf4: bool = False, stock: bool = False, stock_on_gpu: bool = False) -> "Rates":
        """Of ``machine``; ``stock`` where transformers' own modules compute what is not an expert, on the CPU or beside
        a GPU."""
        rates = cls(
            dimm=machine.ram_gb_s * 1e9 * cost.OF_RAM,
            cpu=machine.ram_gb_s * 1e9 * cost.OF_RAM,
            cpu_ops=machine.int8_gops * 1e9,
            disk=machine.disk_gb_s * 1e9 * cost.OF_DISK,
            layer=cost.layer_s(on_gpu=False, stock=stock),
            step=cost.STEP_S,
            nf4=cost.NF4_GB_S_PER_CORE * machine.cores * 1e9 if nf4 else 0.0,
        )
        if machine.gpu is None:
            return rates
        gpu = machine.gpu
        return replace(
            rates,
            dimm=cost.dimm_rate(machine),
            layer=cost.layer_s(on_gpu=True, stock=stock_on_gpu),
            step=cost.GPU_STEP_S,
            ring=cost.BELL_S,
            vram=gpu.vram_gb_s * 1e9 * cost.OF_VRAM,
            pcie=gpu.h2d_gb_s * 1e9 * cost.OF_PCIE,
            gpu=gpu.bf16_tflops * 1e12 * cost.OF_GPU_COMPUTE,
            prefetch_bytes=0 if nf4 else cost.prefetch_bytes(machine),
            cached=cost.CACHED_GB_S_PER_CORE * machine.cores * 1e9,
        )

    def table(self) -> dict[str, float]:
        """The resources of an EventEngine; what is not there is left out."""
        named = {
            "vram": self.vram,
            "pcie": self.pcie,
            "ram": self.dimm,
            "cpu": self.cpu,
            "disk": self.disk,
            "gpu": self.gpu,
            "cpu compute": self.cpu_ops * cost.OF_GEMM,
        }
        return {name: rate for name, rate in named.items() if rate}

    def cpu_read(self, nbytes: float, weights: float) -> float:
        """The most bytes per second at which CPU kernels get through ``nbytes`` of ``weights`` for one
        token."""
        seconds = nbytes / self.cpu + cost.EXPOSED * 2 * weights / self.cpu_ops
        return nbytes / (seconds + (nbytes / self.nf4 if self.nf4 else 0.0))
