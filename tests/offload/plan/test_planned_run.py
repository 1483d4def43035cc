"""One function decides a run for every caller: what was asked wins, then the recipe, then what fits."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from offload.experts.storage.store import ExpertStore
from offload.hardware.gpu import Gpu
from offload.plan.cost_model import STOCK_LAYER_S
from offload.plan.planned_run import PlannedModel, planned_machine, planned_model, planned_run
from offload.records import RunOptions, Sampling
from offload.simulator.simulation import Simulation
from offload.simulator.workload import Work
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.quantize import quantize
from quant.errors import CheckpointError, SchemeError, UsageError
from quant.model.families import Role
from quant.model.known_shapes import load_shape
from quant.model.recipe import load_recipe
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from tests.family_checkpoints import COMMON, FAMILIES, make_family
from tests.machines import GIB, RTX_4090, machine


def test_what_was_asked_wins_over_the_recipe_and_the_recipe_over_defaults() -> None:
    recipe = load_recipe("scout-rtx4090")
    run = planned_run("scout", RunOptions(ram="40GiB", kv="int8"), recipe=recipe.name, machine=machine(gpu=RTX_4090))
    assert (run.options.ram, run.options.kv) == (40 * GIB, "int8")
    assert (run.options.vram, run.options.context) == (recipe.vram, recipe.context)
    assert (run.plan.ram, run.plan.vram, run.plan.context) == (40 * GIB, recipe.vram, recipe.context)
    assert run.plan.kv_bits == 8 and run.model.origin == "recipe scout-rtx4090"


def test_a_recipes_cache_is_left_aside_where_a_familys_own_attention_keeps_it_and_an_asked_one_is_refused(
    tmp_path: Path,
) -> None:
    config = {"model_type": "qwen3_next", **COMMON, **FAMILIES["qwen3_next"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    here = machine()
    run = planned_run(str(tmp_path), RunOptions(ram=4 * GIB), recipe="fast", machine=here)
    assert run.plan.kv_bits == 32 and load_recipe("fast").kv == "int8"
    with pytest.raises(UsageError, match="--kv int8 is for families"):
        planned_run(str(tmp_path), RunOptions(ram=4 * GIB, kv="int8"), recipe="fast", machine=here)
    assert run.plan.decode.seconds["overhead"] >= 3 * STOCK_LAYER_S, "three layers of Python"


def test_what_bounds_keys_has_room_and_is_refused_where_keys_cannot_be_bounded() -> None:
    here = machine()
    plain = planned_run("scout", RunOptions(ram=32 * GIB, kv="int8", context=262_144), machine=here)
    bounded = planned_run("scout", RunOptions(ram=32 * GIB, kv="int8", context=262_144, kv_epsilon=1e-3), machine=here)
    more = bounded.plan.total("ram", "kv_cache") - plain.plan.total("ram", "kv_cache")
    assert more == plain.model.shape.kv_pages(262_144) * 8 * 2 * 128 * 2, "two bf16 per head and channel of a page"
    asked = RunOptions(ram=32 * GIB, kv_epsilon=1e-3)
    with pytest.raises(UsageError, match="--kv-epsilon is for runs on the CPU"):
        planned_run("scout", asked, machine=machine(gpu=RTX_4090))
    with pytest.raises(UsageError, match=r"--kv-epsilon is for .* deepseek_v2 model keep keys and values compressed"):
        planned_run("deepseek-v2-lite", asked, machine=here)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="expected a share from 0"):
            RunOptions(kv_epsilon=wrong)


def test_options_without_a_recipe_stay_as_they_are() -> None:
    options = RunOptions(ram=GIB)
    assert options.over(None) is options
    assert options.over(load_recipe("quality")) == replace(options, kv=load_recipe("quality").kv)


@pytest.mark.parametrize(
    ("model", "origin"), [("mini-scout", "recipe mini-scout"), ("behemoth", "recipe fast"), ("demo", "as stored")]
)
def test_a_model_of_any_kind_says_what_its_weights_are_stored_as(model: str, origin: str, demo_model: Path) -> None:
    found = planned_model(demo_model if model == "demo" else model)
    assert found.origin.startswith(origin)
    by_hand = planned_model(demo_model if model == "demo" else model, schemes={"experts": Scheme("int8")})
    assert by_hand.schemes == {"experts": Scheme("int8")} and by_hand.recipe is None


def test_schemes_by_hand_lie_over_those_of_the_recipe() -> None:
    found = planned_model("scout", "fast", {"lm_head": Scheme("bf16")})
    assert found.schemes == {**load_recipe("fast").schemes, "lm_head": Scheme("bf16")}
    assert found.recipe == load_recipe("fast")


def test_a_directory_is_planned_by_the_tensors_that_are_there(tiny: Callable[..., Path], tmp_path: Path) -> None:
    narrow, wide = tiny("qwen3_moe"), tmp_path / "f32"
    shutil.copytree(narrow, wide)
    tensors = {key: tensor.float() for key, tensor in load_file(narrow / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    two, four = (planned_run(str(path), RunOptions(ram=4 * GIB), machine=machine()) for path in (narrow, wide))
    entries, names = Checkpoint.open(wide).entries, Checkpoint.open(wide).names
    for role in ("attention", "lm_head", "embeddings", "router"):
        there = sum(entry.nbytes for key, entry in entries.items() if names[key].role == role)
        assert four.plan.total("ram", role) == there == 2 * two.plan.total("ram", role), role
    beyond = ExpertStore(Checkpoint.open(wide)).slot_bytes - four.plan.slot_bytes
    assert beyond in (0, 4096), "a page where experts do not begin on one"
    assert four.model.file_nbytes == sum(entry.nbytes for entry in entries.values())


def test_what_a_recipe_leaves_wide_is_counted_as_it_will_be_stored(tiny: Callable[..., Path], tmp_path: Path) -> None:
    wide, made = tmp_path / "f32", tmp_path / "made"
    shutil.copytree(tiny("qwen3_moe"), wide)
    save_file(
        {key: tensor.float() for key, tensor in load_file(wide / "model.safetensors").items()},
        wide / "model.safetensors",
        {"format": "pt"},
    )
    schemes = {"experts": Scheme("int4", 32), "lm_head": Scheme("int8", 32)}
    before = planned_run(planned_model(wide, schemes=schemes), RunOptions(ram=4 * GIB), machine=machine())
    assert before.model.source_nbytes == sum(entry.nbytes for entry in Checkpoint.open(wide).entries.values())
    quantize(wide, made, experts=schemes["experts"], lm_head=schemes["lm_head"])
    after = planned_run(str(made), RunOptions(ram=4 * GIB), machine=machine())
    shapes = sum(entry.nbytes for key, entry in Checkpoint.open(made).entries.items() if key.endswith("weight_shape"))
    assert before.model.wider == after.model.wider and before.model.wider["attention"]
    assert before.plan.rows == after.plan.rows
    assert 0 <= before.model.file_nbytes - after.model.file_nbytes <= shapes
    on_simulator = [
        Simulation.of(run.model.shape, run.model.schemes, run.plan, run.machine, run.model.wider)
        for run in (before, after)
    ]
    load = on_simulator[0].footprint.load(filled=512, vram_hits=0, hits=1, resident=1)
    assert Work.of(on_simulator[0].footprint, 512).dense == pytest.approx(load.dense + load.kv, abs=100)
    assert on_simulator[0].decode(8) == on_simulator[1].decode(8)


def test_a_quantized_model_stays_as_it_is_under_a_recipe_and_takes_its_defaults(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    made, recipe = tmp_path / "made", load_recipe("scout-rtx4090")
    quantize(tiny("qwen3_moe"), made, experts="int4-g32")
    found = planned_model(made, recipe.name)
    assert found.is_stored and recipe.name in found.origin and found.recipe == recipe
    assert found.schemes == planned_model(made).schemes == planned_model(made / "config.json", recipe.name).schemes
    by_hand = planned_model(made, recipe.name, {"experts": Scheme("int8", 32)})
    assert not by_hand.is_stored and by_hand.schemes["experts"] == Scheme("int8", 32)


@pytest.mark.parametrize("spoil", ["cut", "lacking", "misshapen", "shards missing", "another name"])
def test_what_a_run_would_refuse_is_not_planned(spoil: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen3_moe"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.weight"))
    match spoil:
        case "cut":
            file.write_bytes(file.read_bytes()[:-10])
        case "lacking":
            save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
        case "misshapen":
            save_file(tensors | {key: tensors[key][:-1].clone()}, file)
        case "shards missing":
            file.unlink()
            index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case _:
            file.rename(folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError) as planned:
        planned_model(folder)
    with pytest.raises(CheckpointError) as opened:
        Checkpoint.open(folder)
    assert str(planned.value) == str(opened.value)


def test_a_name_that_is_nothing_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no such directory; expected a Hugging Face model directory"):
        planned_model("nowhere")
    with pytest.raises(UsageError, match="no recipe"):
        planned_model("scout", "nothing")


def test_the_cpu_alone_is_planned_without_a_card_and_says_so() -> None:
    run = planned_run("mini-scout", RunOptions(device="cpu", vram=GIB), machine=machine(gpu=RTX_4090))
    assert run.plan.vram == run.plan.vram_slots == 0
    assert run.plan.notes[-1].endswith("changes nothing: a budget for VRAM")


@pytest.mark.parametrize("there", [None, RTX_4090], ids=["no card", "a card that is left alone"])
def test_what_only_a_gpu_could_do_is_said_to_change_nothing_on_the_cpu(there: Gpu | None) -> None:
    asked = RunOptions(vram=0, graph=False, prefetch_bytes=2**20, regain=True)
    notes = planned_run("mini-scout", asked, machine=machine(gpu=there)).plan.notes
    assert notes[-1].endswith("changes nothing: --no-graph, --warm, --regain")
    assert not any(
        "changes nothing" in note for note in planned_run("mini-scout", machine=machine(gpu=there)).plan.notes
    )
    used = planned_run("mini-scout", RunOptions(graph=False, regain=True), machine=machine(gpu=RTX_4090)).plan.notes
    assert not any("changes nothing" in note for note in used)


def test_a_run_has_room_for_its_prompt() -> None:
    shape = ModelShape.from_config(load_shape("scout"))
    model = PlannedModel(shape, {}, "by hand")
    card = planned_machine("", "RTX 4090", ram=512 * GIB)
    assert planned_run(model, machine=card, prompt=9000).plan.context == 9000
    assert planned_run(model, machine=card, prompt=16).plan.context >= shape.context()
    assert planned_run(model, RunOptions(context=256), machine=card, prompt=9000).plan.filled == 256


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from offload.plan.planned_run import planned_machine, planned_run;"
        "planned_run('scout', machine=planned_machine('', 'RTX 4090'));"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sizes_and_paths_are_taken_as_people_write_them() -> None:
    options = RunOptions(vram="24GiB", ram="500MB", routing="profile.json")
    assert (options.vram, options.ram, options.routing) == (24 * GIB, 500 * 10**6, Path("profile.json"))
    with pytest.raises(UsageError, match="bad size"):
        RunOptions(ram="much")
    assert Sampling(stop="end").stop == ("end",)
    card = planned_run("mini-scout", machine="RTX 4090").machine
    assert card.gpu is not None and card.gpu.name == "RTX 4090"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RunOptions(kv="fp8"), "kv is 'fp8': expected 'bf16' or 'int8'"),
        (lambda: RunOptions(device="gpu"), "device is 'gpu'"),
        (lambda: Sampling(max_tokens=0), "max_tokens is 0: expected at least 1"),
        (lambda: Sampling(temperature=-0.5), "temperature is -0.5"),
    ],
)
def test_options_that_mean_nothing_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


def test_options_are_copied_compared_and_kept_like_any_frozen_dataclass() -> None:
    options = RunOptions(ram="64GiB", routing="profile.json")
    assert replace(options, vram=GIB) == RunOptions(vram="1GiB", ram=64 * GIB, routing=Path("profile.json"))
    assert hash(options) == hash(RunOptions(ram=64 * GIB, routing=Path("profile.json")))
    assert asdict(options)["ram"] == 64 * GIB and pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(FrozenInstanceError):
        options.ram = 1  # type: ignore[misc]


@pytest.mark.parametrize(("model", "group"), [("gpt-oss-20b", 128), ("glm-4.5-air", 128), ("deepseek-v2-lite", 256)])
def test_groups_that_do_not_divide_a_model_are_refused_as_quantize_refuses_them(model: str, group: int) -> None:
    roles: tuple[Role, ...] = ("experts", "dense_mlp", "attention", "lm_head", "shared_expert")
    with pytest.raises(SchemeError, match=r"groups of \d+ do not divide: use --group-size"):
        planned_model(model, schemes={role: Scheme("int4", group) for role in roles})


def test_what_nobody_asked_for_is_planned_in_groups_that_fit() -> None:
    model = planned_model("glm-4.5-air")
    assert model.schemes["dense_mlp"] == Scheme("int4", 64) and model.schemes["experts"] == Scheme("int4", 128)
    assert model.origin == "recipe fast, in smaller groups"
    with pytest.raises(SchemeError, match="do not divide"):
        planned_model("glm-4.5-air", "fast")


def test_sizes_count_the_biases_of_experts(tmp_path: Path) -> None:
    make_family("gpt_oss", tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "model", experts=Scheme("int4", 32))
    made = planned_model(tmp_path / "model")
    listed = sum(entry.file_nbytes for entry in Checkpoint.open(tmp_path / "model").entries.values())
    small = sum(e.file_nbytes for k, e in Checkpoint.open(tmp_path / "model").entries.items() if "weight_shape" in k)
    assert made.file_nbytes == listed - small
