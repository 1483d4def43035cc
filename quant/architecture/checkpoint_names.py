"""What a checkpoint calls the parameters of a transformers model: its own conversion mapping, both ways.

Forwards, a key of a file becomes a place in the model, as it does when transformers loads it. Backwards, a
parameter becomes the key that transformers saves it under. Three forms of routed experts are told apart: one
tensor per expert that transformers merges while loading, one tensor for all experts, and one Linear per expert
under the module's own name, which is how quantizers store families whose experts are fused on disk.

Legend: E experts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant.model.families import PROJECTIONS, Fused, Projection

SUFFIX = re.compile(r"\.(weight_packed|weight_scale|weight_shape|weight_zero_point|weight_g_idx|weight(?:\..+)?|bias)$")
_ONE_EXPERT = re.compile(r"^(.+)\.(\d+)\.(gate_proj|up_proj|down_proj)$")
_FUSED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Place:
    """Where in the model a tensor belongs: ``parameter`` of ``module``, by the module's own name; of an expert,
    ``module`` is the experts module. ``converted`` for what transformers makes parameters of by other means than
    renaming."""

    module: str
    parameter: str
    expert: int | None = None
    projection: Projection | None = None
    fused: Fused = ""
    converted: bool = False


class CheckpointNames:
    """The names of one model on the meta device; ``experts`` are the names of its experts modules."""

    def __init__(self, model: Any, experts: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        loading = get_model_conversion_mapping(model)
        self._renamings = [one for one in loading if isinstance(one, WeightRenaming)]
        self._converters = [one for one in loading if isinstance(one, WeightConverter)]
        saving = [
            one.reverse_transform()
            for one in reversed(get_model_conversion_mapping(model, add_legacy=False))
            if not isinstance(one, PrefixChange)  # whether a prefix was there is not to be known backwards
        ]
        self._back_renamings = [one for one in saving if isinstance(one, WeightRenaming)]
        self._back_converters = [one for one in saving if isinstance(one, WeightConverter)]
        self._base = model.base_model_prefix
        self.parameters: Mapping[str, Any] = model.state_dict()
        self.experts = frozenset(experts)
        self._places: dict[str, Place | None] = {}

    def place(self, key: str) -> Place | None:
        """Where in the model the tensor that a file calls ``key`` belongs; None for one with no place in it."""
        match = SUFFIX.search(key)
        module, suffix = (key[: match.start()], match[1]) if match else (key, "")
        if suffix in ("", "bias"):
            return self._place(key, "")
        found = self._place(f"{module}.weight", suffix)
        return found

    def _place(self, key: str, suffix: str) -> Place | None:
        if key not in self._places:
            self._places[key] = self._find(key)
        found = self._places[key]
        if found is None or found.parameter != "weight" or not suffix:
            return found
        return Place(found.module, suffix, found.expert, found.projection, found.fused, found.converted)

    def _find(self, key: str) -> Place | None:
        from transformers.core_model_loading import apply_renamings, rename_source_key

        renamed, pattern = rename_source_key(
            key, self._renamings, self._converters, self._base, dict.fromkeys(self.parameters, True)
        )
        if renamed not in self.parameters and key in self.parameters:
            renamed, pattern = key, None
        module, _, last = renamed.rpartition(".")
        if pattern is not None and module in self.experts and last in _FUSED and "*" in pattern:
            return self._merged(apply_renamings(key, self._renamings), module, last, pattern)
        if module in self.experts:
            fused: Any = last if last.removesuffix("_bias") in _FUSED else ""
            return Place(module, last, fused=fused) if renamed in self.parameters else None
        if pattern is None and (one := _ONE_EXPERT.match(module)) and one[1] in self.experts:
            projection: Any = one[3]
            return Place(one[1], last, int(one[2]), projection)
        if renamed not in self.parameters:
            return None
        return Place(module, last, converted=pattern is not None)

    def _merged(self, key: str, module: str, target: str, pattern: str) -> Place | None:
        """One expert's tensor that transformers merges into ``target``: gate_proj comes before up_proj."""
        converter = next(one for one in self._converters if pattern in one.source_patterns)
        number = re.search(pattern.replace("*.", r"(\d+)\."), key)
        if number is None:
            return None
        if target == "down_proj":
            return Place(module, "weight", int(number[1]), "down_proj")
        if len(converter.source_patterns) != 2:
            return None
        projection: Projection = "gate_proj" if converter.source_patterns.index(pattern) == 0 else "up_proj"
        return Place(module, "weight", int(number[1]), projection)

    def saved(self, parameter: str) -> str:
        """The key that transformers saves ``parameter`` under; that of the first where it makes several of it."""
        from transformers.core_model_loading import apply_converters, apply_renamings

        renamed, _ = apply_converters(parameter, self._back_converters)
        made: str = apply_renamings(renamed, self._back_renamings)
        return made

    def is_converted(self, parameter: str) -> bool:
        """Whether transformers saves ``parameter`` otherwise than under another name."""
        from transformers.core_model_loading import apply_converters

        return apply_converters(parameter, self._back_converters)[1] is not None

    def merged_experts(self, module: str) -> dict[Projection, str] | None:
        """What a file calls the Linears of experts module ``module``, ``*`` for the expert's number, where
        transformers merges them while loading; None where it does not."""
        from transformers.core_model_loading import apply_converters, apply_renamings

        found: list[str] = []
        for target in _FUSED:
            renamed, pattern = apply_converters(f"{module}.{target}", self._back_converters)
            if pattern is None or "*" not in renamed:
                return None
            converter = next(one for one in self._back_converters if pattern in one.source_patterns)
            first = converter.target_patterns[0]
            for name in converter.target_patterns:
                made = apply_renamings(renamed.replace(first, name), self._back_renamings)
                found.append(made.removesuffix(".weight"))
        return dict(zip(PROJECTIONS, found, strict=True)) if len(found) == len(PROJECTIONS) else None
