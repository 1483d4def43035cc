"""Structure: the parts of a transformers model by what they are, whatever its family calls them.

Found on the meta device: the experts modules by transformers' experts interface, their routers and shared experts
beside them, the Linears by class, embeddings and head by the model's own account. What is none of these is a
tensor that stays as it is. A part that nobody here knows is refused by name.

Legend: E experts, H hidden, I expert intermediate size, N out features, K in features.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from quant.architecture.checkpoint_names import CheckpointNames
from quant.architecture.meta_model import decoder_of, meta_model
from quant.architecture.meta_step import MetaStep, watch_step
from quant.errors import CheckpointError
from quant.model.families import Role
from quant.model.tensors import LinearSpec, TensorSpec

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_GROUP = 32  # the least group: what is no multiple of it cannot be packed
_GATES = 16  # a Linear narrower than the hidden size by this makes gates of a layer, and is next to nothing in bytes
_MLP = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe", "shared_mlp", "mlp_layer")


@dataclass(frozen=True)
class Experts:
    """One layer's experts module: ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]`` or, ``transposed``,
    ``[E, H, 2I]`` and ``[E, I, H]``; gate_proj and up_proj one after the other, or row by row in turn."""

    module: str
    layer: int
    count: int
    hidden: int
    intermediate: int
    transposed: bool
    interleaved: bool
    has_bias: bool


@dataclass(frozen=True)
class Structure:
    """Every part of the language model. ``linears`` are the quantizable ones beside the experts, by the names that
    transformers saves them under; ``plain`` what stays as it is; ``other`` the keys' modules of towers that a run of
    text leaves out. ``runtime`` gives each linear's name in the model, ``layers`` the modules' prefix."""

    linears: tuple[LinearSpec, ...]
    plain: tuple[TensorSpec, ...]
    vision: tuple[TensorSpec, ...]
    experts: Mapping[int, Experts]
    merged: Mapping[int, Mapping[Any, str] | None]
    runtime: Mapping[str, str]
    roles: Mapping[str, Role]
    layers: str
    embedding: str
    names: CheckpointNames
    step: MetaStep
    ignored: tuple[re.Pattern[str], ...]
    tied: bool
    text: Any
    towers: tuple[str, ...]

    def number(self, parameter: str) -> int | None:
        """The decoder layer that ``parameter`` of the model is in."""
        found = re.match(rf"{re.escape(self.layers)}\.(\d+)\.", parameter)
        return int(found[1]) if found else None


def structure_of(config: Mapping[str, Any]) -> Structure:
    """The structure of a config.json's dict. Raises UnknownFamilyError or CheckpointError, naming the part that is
    not understood."""
    model = meta_model(config)
    return _Reader(model).read()


class _Reader:
    def __init__(self, model: Any) -> None:
        self.model, self.text = model, model.config.get_text_config()
        self.family = model.config.model_type
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.layers = self._layers()
        self.decoder = self.layers.rpartition(".")[0]
        self._layer = re.compile(rf"^{re.escape(self.layers)}\.(\d+)\.(\w+)")
        self.experts = {one.module: one for one in self._experts()}
        self.names = CheckpointNames(model, self.experts)
        self.embedding, self.head = self._name_of("get_input_embeddings"), self._name_of("get_output_embeddings")
        self.blocks = {module.rpartition(".")[0] for module in self.experts}
        found = (self._layer.match(block) for block in self.blocks)
        self.mlps = {*_MLP, *(match[2] for match in found if match)}

    def read(self) -> Structure:
        names = self.names
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        roles, sizes, kinds = self._roles(tied)
        step = watch_step(self.model, list(self.experts))  # the model is of no use after this
        linears: list[LinearSpec] = []
        plain: list[TensorSpec] = []
        vision: list[TensorSpec] = []
        runtime: dict[str, str] = {}
        for parameter, size in sizes.items():
            module, _, last = parameter.rpartition(".")
            key, layer, role = names.saved(parameter), self._number(parameter), roles[parameter]
            if last == "weight" and kinds[parameter] and module in step.called and not names.is_converted(parameter):
                canonical = key.removesuffix(".weight")
                linears.append(LinearSpec(canonical, role, size[0], size[1], layer))
                runtime[canonical] = module
            else:
                into = vision if role == "vision" else plain
                into.append(TensorSpec(key, role, size, layer))
        experts = {one.layer: one for one in self.experts.values()}
        if missing := [one.module for one in experts.values() if one.module not in step.top_k]:
            raise CheckpointError(f"transformers' {self.family} model never runs {missing[0]}: expected experts in use")
        linears.sort(key=lambda linear: (linear.layer is None, linear.layer or 0))
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return Structure(
            linears=tuple(linears),
            plain=tuple(plain),
            vision=tuple(vision),
            experts=dict(sorted(experts.items())),
            merged={layer: names.merged_experts(one.module) for layer, one in experts.items()},
            runtime=runtime,
            roles=roles,
            layers=self.layers,
            embedding=names.saved(f"{self.embedding}.weight"),
            names=names,
            step=step,
            ignored=tuple(re.compile(pattern) for pattern in patterns),
            tied=bool(tied),
            text=self.text,
            towers=self._towers(roles),
        )

    def _layers(self) -> str:
        """The name of the list of decoder layers."""
        decoder = decoder_of(self.model)
        prefix = next(name for name, module in self.modules.items() if module is decoder)
        count = self.text.num_hidden_layers
        for name, module in decoder.named_children():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return f"{prefix}.{name}" if prefix else name
        raise CheckpointError(f"transformers' {self.family} model has no list of its {count} layers: not supported")

    def _towers(self, roles: Mapping[str, Role]) -> tuple[str, ...]:
        """The modules that see or hear: what stands beside the decoder's way down from the model."""
        found: dict[str, None] = {}
        for parameter in (name for name, role in roles.items() if role == "vision"):
            path = parameter.split(".")
            depth = next(
                i for i in range(len(path)) if not f"{self.decoder}.".startswith(".".join(path[: i + 1]) + ".")
            )
            found[".".join(path[: depth + 1])] = None
        return tuple(found)

    def _name_of(self, getter: str) -> str:
        wanted = getattr(self.model, getter)()
        return next((name for name, module in self.modules.items() if module is wanted), "")

    def _number(self, parameter: str) -> int | None:
        found = self._layer.match(parameter)
        return int(found[1]) if found else None

    def _experts(self) -> Iterator[Experts]:
        seen: set[int] = set()
        for name, module in self.modules.items():
            if not all(hasattr(module, flag) for flag in _INTERFACE):
                continue
            layer = self._number(name)
            if layer is None or layer in seen:
                raise CheckpointError(
                    f"transformers' {self.family} model has experts in {name}: expected one experts module in a "
                    "decoder layer"
                )
            seen.add(layer)
            yield self._experts_of(name, module, layer)

    def _experts_of(self, name: str, module: Any, layer: int) -> Experts:
        unknown = {
            "experts without a gate projection": not module.has_gate,
            "a norm after each expert": getattr(module, "has_post_expert_norm", False),
        }
        parameters = {key: tuple(value.shape) for key, value in module.named_parameters()}
        expected = {"gate_up_proj", "down_proj"}
        expected |= {"gate_up_proj_bias", "down_proj_bias"} if module.has_bias else set()
        if extra := sorted(set(parameters) ^ expected):
            unknown[f"{extra[0]} in its experts"] = True
        for what, found in unknown.items():
            if found:
                raise CheckpointError(f"a {self.family} model has {what} ({name}), which is not supported")
        down = parameters["down_proj"]
        count, hidden, inter = (down[0], down[2], down[1]) if module.is_transposed else down
        return Experts(
            name, layer, count, hidden, inter, module.is_transposed, not module.is_concatenated, module.has_bias
        )

    def _roles(self, tied: set[str]) -> tuple[dict[str, Role], dict[str, tuple[int, ...]], dict[str, bool]]:
        """By parameter: its role, its shape, and whether it is the weight of a Linear that can be packed."""
        roles: dict[str, Role] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        kinds: dict[str, bool] = {}
        for parameter, value in self.names.parameters.items():
            module = parameter.rpartition(".")[0]
            if module in self.experts or parameter in tied:
                continue
            owner = self.modules[module]
            linear = type(owner) is nn.Linear
            roles[parameter] = self._role(parameter, module, owner)
            sizes[parameter] = tuple(value.shape)
            narrow = linear and owner.out_features * _GATES < self.text.hidden_size
            kinds[parameter] = linear and owner.in_features % _GROUP == 0 and not narrow
            kinds[parameter] &= roles[parameter] not in ("router", "vision", "norm", "embeddings")
        return roles, sizes, kinds

    def _role(self, parameter: str, module: str, owner: Any) -> Role:
        if module == self.embedding:
            return "embeddings"
        if module == self.head:
            return "lm_head"
        if self.decoder and not parameter.startswith(f"{self.decoder}."):
            return "vision"
        found = self._layer.match(parameter)
        if found is None or (
            len(self.names.parameters[parameter].shape) == 1 and "norm" in type(owner).__name__.lower()
        ):
            return "norm"
        block = next((one for one in self.blocks if parameter.startswith(f"{one}.")), None)
        if block is not None:
            return "shared_expert" if self._is_mlp(module) else "router"
        if found[2] in self.mlps:
            return "dense_mlp"
        return "attention"

    def _is_mlp(self, module: str) -> bool:
        """Whether Linear ``module`` is of an MLP: one beside it, or itself, leads back to the hidden size."""
        parent, hidden = self.modules[module.rpartition(".")[0]], self.text.hidden_size
        linears = [child for child in parent.children() if type(child) is nn.Linear]
        return len(linears) > 1 and any(child.out_features == hidden for child in linears)
