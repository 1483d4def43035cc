"""The Linears of Llama 4's vision tower and projector: what ``--vision`` quantizes.

All but the patch embedding, a thousandth of the weights, whose 588 input features no group divides. Biases
and norms stay beside them.
"""

from collections.abc import Iterator

from quant.model.tensors import LinearSpec
from quant.model.text_config import VisionConfig

# Matches no norm: loaders take whatever an expression matches for a Linear.
VISION_PATTERN = r"re:.*(vision_model\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)|multi_modal_projector\.linear_1)$"
# Put before an expression for the text's modules: the tower's attention has the same names.
OUTSIDE_VISION = "(?!.*vision_model)"


def tower_linears(tower: VisionConfig, hidden: int) -> Iterator[LinearSpec]:
    """Every Linear by its name in transformers' ``Llama4ForConditionalGeneration``, in model order; ``hidden`` is the
    width of the language model."""
    width, inter = tower.hidden_size, tower.intermediate_size
    heads = width // tower.num_attention_heads * tower.num_attention_heads
    sizes = {
        "self_attn.q_proj": (heads, width),
        "self_attn.k_proj": (heads, width),
        "self_attn.v_proj": (heads, width),
        "self_attn.o_proj": (width, heads),
        "mlp.fc1": (inter, width),
        "mlp.fc2": (width, inter),
    }
    for layer in range(tower.num_hidden_layers):
        for name, (rows, columns) in sizes.items():
            yield LinearSpec(f"vision_model.model.layers.{layer}.{name}", "vision", rows, columns)
    adapter = "vision_model.vision_adapter.mlp."
    yield LinearSpec(f"{adapter}fc1", "vision", tower.projector_input_dim, inter)
    yield LinearSpec(f"{adapter}fc2", "vision", tower.projector_output_dim, tower.projector_output_dim)
    yield LinearSpec("multi_modal_projector.linear_1", "vision", hidden, tower.vision_output_dim)
