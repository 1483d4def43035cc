#!/usr/bin/env python3
"""A model of twice the width with the function of a small one, for ``train.py --begin`` to train on.

Usage: python grow.py SMALL OUT
"""

import sys
from pathlib import Path

import torch
from transformers import Llama4ForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenization

_WIDTHS = ("hidden_size", "intermediate_size", "intermediate_size_mlp", "num_attention_heads", "num_key_value_heads")


@torch.no_grad()
def grown(small: Llama4ForCausalLM) -> Llama4ForCausalLM:
    """Every channel, head and intermediate feature of ``small`` twice (T. Chen et al., "Net2Net", 2016).

    What reads a pair adds halves of the old weight, plus and minus the same noise of half its size, which a pair of
    equal channels cancels: no two columns are equal, so that training parts them.
    """
    config = type(small.config)(**{**small.config.to_dict(), **{n: 2 * getattr(small.config, n) for n in _WIDTHS}})
    large = Llama4ForCausalLM(config)
    sources = dict(small.named_parameters())
    for name, target in large.named_parameters():
        weight = sources[name].data
        for axis in range(weight.ndim):
            if weight.shape[axis] == target.shape[axis]:
                continue
            if axis == 1 and "embed" not in name:  # [N, K], or experts' [E, K, N]
                noise = 0.5 * weight.std() * torch.randn_like(weight)
                weight = torch.cat([weight / 2 + noise, weight / 2 - noise], axis)
            elif name.endswith("gate_up_proj"):
                gate, up = weight.chunk(2, axis)
                weight = torch.cat([gate, gate, up, up], axis)
            else:
                weight = torch.cat([weight, weight], axis)
        target.copy_(weight)
    return large


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        sys.exit(__doc__)
    source, out = map(Path, arguments)
    torch.manual_seed(0)
    grown(Llama4ForCausalLM.from_pretrained(source, dtype=torch.float32)).save_pretrained(out)
    Tokenization.from_pretrained(source).save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1:])
