"""What a rounding error costs, seen from a Linear's inputs, and rounding that makes up for errors by it.

For inputs X [S, K] the error E = Ŵ - W of a row costs E H Eᵀ with H = XᵀX / S. H is taken in blocks of 128
columns, which keeps the work per weight small whatever K is, and damped strongly, because a sample and not
the inputs themselves gave it. Within a block values are rounded as GPTQ does (Frantar et al., 2022: by
falling diagonal, each error made up for by the columns still to come), then once more, each given all others.
Scales are found before and stay: the format is that of plain rounding.

Both passes have one form, q_i = round((w_i + Σ_j M_ij e_j) / s_i) with e_j the error of column j. In the
first M_ij = -U_ji / U_jj for j < i, U the upper Cholesky factor of H⁻¹, and errors are counted from what was
to be rounded; in the second M_ij = H_ij / H_ii for j ≠ i, and errors are counted from the weight.

Legend: N out features, K in features, S samples, C blocks of columns, B their width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.rounding.scales import value_range
from quant.scheme import Scheme

BLOCK = 128
_DAMPING = 0.5  # of the mean diagonal of a block


@dataclass(frozen=True)
class Curvature:
    """``order`` int32 ``[K]``: when each block's columns come, as positions in it; ``first`` and ``again``
    f32 ``[C, B, B]``: both passes' M by that order, zero beyond the width of a last block."""

    order: Tensor
    first: Tensor
    again: Tensor

    @classmethod
    def of(cls, inputs: Tensor, damping: float = _DAMPING) -> "Curvature | None":
        """From ``inputs`` f32 ``[S, K]``; None if they are zero, or overflow."""
        power = inputs.square().mean()
        if not (0 < float(power) < float("inf")):
            return None
        count = -(-inputs.shape[1] // BLOCK)
        first, again = torch.zeros(2, count, BLOCK, BLOCK)
        orders = []
        for block, columns in enumerate(inputs.split(BLOCK, 1)):
            width = columns.shape[1]
            hessian = (columns.t() @ columns).double() / len(columns)
            least = damping * float(torch.diagonal(hessian).mean()) + 1e-6 * float(power)
            hessian += least * torch.eye(width, dtype=torch.float64)
            order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
            hessian = hessian[order][:, order]
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            upper = torch.linalg.cholesky(inverse, upper=True)
            feedback = -(upper / torch.diagonal(upper).unsqueeze(1)).t().tril(-1)
            given = hessian / torch.diagonal(hessian).unsqueeze(1)
            first[block, :width, :width] = feedback.float()
            again[block, :width, :width] = (given - torch.eye(width, dtype=torch.float64)).float()
            orders.append(order.to(torch.int32))
        return cls(torch.cat(orders), first, again)


def round_by(weight: Tensor, scale: Tensor, scheme: Scheme, curvature: Curvature) -> Tensor:
    """The torch reference: int8 values ``[N, K]`` of ``weight`` f32 ``[N, K]`` for bf16 ``scale``
    ``[N, G]``."""
    low, high = value_range(scheme)
    values = torch.empty_like(weight)
    scales = scale.float().repeat_interleave(scheme.group_size, 1)
    for block, start in enumerate(range(0, weight.shape[1], BLOCK)):
        columns = start + curvature.order[start : start + BLOCK].long()
        dense, step = weight[:, columns].t(), scales[:, columns].t()  # [B, N]: a column is a row
        errors, chosen = torch.zeros_like(dense), torch.zeros_like(dense)
        first, again = curvature.first[block], curvature.again[block]
        for i in range(len(columns)):
            target = dense[i] + first[i, : len(columns)] @ errors
            chosen[i] = (target / step[i]).round().clamp(low, high)
            errors[i] = target - chosen[i] * step[i]
        errors = dense - chosen * step
        for i in range(len(columns)):
            target = dense[i] + again[i, : len(columns)] @ errors
            chosen[i] = (target / step[i]).round().clamp(low, high)
            errors[i] = dense[i] - chosen[i] * step[i]
        values[:, columns] = chosen.t()
    return values.to(torch.int8)
