"""Experts as they lie in slots: random weights, some scales negative, at any alignment."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels.cuda.layout import ExpertLayout
from quant.pack import Packed, dequantize, quantize_absmax
from quant.scheme import Scheme

KEYS = [
    (name, suffix) for name in ("gate_proj", "up_proj", "down_proj") for suffix in ("weight_packed", "weight_scale")
]


def packed(rows: int, columns: int, scheme: Scheme, generator: torch.Generator) -> Packed:
    """A random weight with outliers, a third of its scales negative and some of them zero."""
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    weight[torch.rand(rows, columns, generator=generator) < 0.01] *= 20
    made = quantize_absmax(weight, scheme)
    chance = torch.rand(made.scale.shape, generator=generator)
    scale = torch.where(chance < 0.3, -made.scale, torch.where(chance > 0.97, 0.0, made.scale))
    return Packed(scheme, made.packed, scale.bfloat16())


@dataclass(frozen=True)
class Images:
    """``addresses`` int64 ``[E]`` on ``device`` of experts with ``layout``; ``dense`` are their weights, f32
    (gate, up, down), on the CPU."""

    layout: ExpertLayout
    addresses: Tensor
    dense: list[tuple[Tensor, ...]]
    host_addresses: Tensor
    memory: list[Tensor]


def images(
    experts: int, hidden: int, inter: int, gate_up: Scheme, down: Scheme, device: torch.device, alignment: int = 16
) -> Images:
    """Random experts on ``device``, their tensors at odd multiples of ``alignment``."""
    generator = torch.Generator().manual_seed(hidden + inter)
    memory, dense, addresses, host_addresses = [], [], [], []
    offsets: list[int] = []
    for _ in range(experts):
        weights = [
            packed(inter, hidden, gate_up, generator),
            packed(inter, hidden, gate_up, generator),
            packed(hidden, inter, down, generator),
        ]
        tensors = [tensor for weight in weights for tensor in (weight.packed, weight.scale)]
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.nbytes // alignment) * alignment
            end += alignment if end // alignment % 2 == 0 else 0
        host = torch.zeros(end + 64, dtype=torch.uint8)
        base = -host.data_ptr() % 64 + alignment
        for offset, tensor in zip(offsets, tensors, strict=True):
            host[base + offset : base + offset + tensor.nbytes] = tensor.view(torch.uint8).flatten()
        placed = host.to(device)  # a card's allocations begin at multiples of 512
        if device.type == "cuda":
            placed = torch.cat((placed.new_zeros(alignment), placed[base:]))
            addresses.append(placed.data_ptr() + alignment)
        else:
            addresses.append(host.data_ptr() + base)
        host_addresses.append(host.data_ptr() + base)
        memory += [host, placed]
        dense.append(tuple(dequantize(weight) for weight in weights))
    schemes = {"gate_proj": gate_up, "up_proj": gate_up, "down_proj": down}
    layout = ExpertLayout.from_offsets(hidden, inter, schemes, dict(zip(KEYS, offsets, strict=True)), alignment)
    return Images(layout, torch.tensor(addresses, device=device), dense, torch.tensor(host_addresses), memory)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Every element is right within ``tolerance`` of the largest of its row."""
    ours, theirs = ours.cpu().float(), theirs.cpu().float()
    assert ours.shape == theirs.shape
    scale = theirs.abs().amax(-1, keepdim=True).clamp_min(1e-6)
    worst = ((ours - theirs).abs() / scale).max()
    assert worst <= tolerance, f"off by {worst:.2e} of the row's largest"
