"""A model of any family that transformers knows, built on the meta device: its structure without its weights.

No code of a checkpoint's own is ever run: a family that this transformers does not have is refused.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from quant.errors import LIBRARY_ERRORS, CheckpointError, UnknownFamilyError
from quant.input_file import short
from quant.model.config import put_right

# Bounds within which building the structure takes seconds; no published model comes near them.
_BOUNDS = {
    "num_hidden_layers": 1024,
    "n_layer": 1024,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "n_routed_experts": 2**14,
    "moe_num_experts": 2**14,
    "hidden_size": 2**22,
    "intermediate_size": 2**22,
    "vocab_size": 2**26,
}


def model_config(config: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json's dict, without what it says of quantization.

    Raises UnknownFamilyError for a family that transformers has no causal language model of, CheckpointError for
    a config that it rejects.
    """
    return _model_config(json.dumps(put_right(config), sort_keys=True))


@lru_cache(maxsize=4)
def _model_config(text: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    said = json.loads(text)
    kind = said.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UnknownFamilyError(
            f"model_type {short(kind)} is not a family Coldstream knows: expected one that this transformers has "
            "(code that comes with a checkpoint is never run)"
        )
    for part in _sections(said):
        part.pop("quantization_config", None)
        for key, most in _BOUNDS.items():
            value = part.get(key)
            if isinstance(value, bool) or (value is not None and not (isinstance(value, int) and 0 <= value <= most)):
                raise CheckpointError(f"config.json: {key} is {short(value)}: expected a number from 0 to {most:,}")
    try:
        made = CONFIG_MAPPING[kind].from_dict(said)
        made.get_text_config()
    except (*LIBRARY_ERRORS, StrictDataclassError) as error:
        raise CheckpointError(f"config.json is rejected by transformers: {' '.join(str(error).split())}") from None
    return made


def _sections(config: Any) -> Iterator[dict[str, Any]]:
    """A config's dict and those nested in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _sections(value)


def model_class(config: Any) -> Any:
    """transformers' class of language models with ``config``, one that sees images too where there is no other.

    Raises UnknownFamilyError if there is none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    mappings: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UnknownFamilyError(
        f"model_type {short(config.model_type)} is not a family Coldstream knows: transformers has no causal language "
        "model of that name"
    )


def decoder_of(model: Any) -> Any:
    """The part of transformers' ``model`` that has the layers."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else getattr(model, "model", found)


def attention_implementation(kind: Any) -> str:
    """What computes the attention of transformers' model class ``kind``: one that its layers agree with."""
    return "sdpa" if kind._supports_sdpa else "eager"


def meta_model(config: Mapping[str, Any]) -> Any:
    """transformers' model of a config.json's dict, on the meta device, ready to run there.

    Raises UnknownFamilyError or CheckpointError, as ``model_config`` and ``model_class`` do.
    """
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    made = model_config(config)
    kind = model_class(made)
    try:
        with torch.device("meta"):
            model = kind._from_config(made, dtype=torch.bfloat16, attn_implementation=attention_implementation(kind))
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"config.json describes no {made.model_type} model that transformers can build: "
            f"{' '.join(str(error).split())}"
        ) from None
    return model.eval()
