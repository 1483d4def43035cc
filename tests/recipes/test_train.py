"""The training script makes the same kind of checkpoint as the one that ships, and training helps."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A checkpoint after a few steps on a small corpus; about ten seconds on two cores."""
    out = tmp_path_factory.mktemp("trained") / "model"
    options = ["--steps", str(STEPS), "--corpus-mb", "0.7", "--batch", "8", "--length", "64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # so little work that more threads only wait
    command = [sys.executable, demo_model / "train.py", out, *options]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return out


def tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (found.get_shape(), found.get_dtype()) for key, found in slices.items()}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_tensor_names_shapes_and_config_are_those_of_the_demo_model(trained: Path, demo_model: Path) -> None:
    assert tensors(trained) == tensors(demo_model)
    assert read(trained / "config.json") == read(demo_model / "config.json")


def test_tokenizer_has_the_demo_models_size_chat_tokens_and_template(trained: Path, demo_model: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (trained, demo_model))
    assert len(ours) == len(theirs) == 4096
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map
    chat = [{"role": "user", "content": "What does os.getcwd do?"}]
    text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"]
    assert ours.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]


def test_training_lowers_the_loss_on_modules_it_never_sees(trained: Path) -> None:
    result = read(trained / "training.json")
    assert result["steps"] == STEPS
    assert result["held_out_text_loss"] < math.log(4096) - 0.5  # an untrained model's loss


def test_running_only_the_chosen_expert_equals_the_stock_block(demo_model: Path) -> None:
    train = load_script(demo_model / "train.py")
    stock = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    hidden = torch.randn(2, 50, 128, generator=torch.Generator().manual_seed(0))
    for layer in stock.model.layers:
        with torch.no_grad():
            expected, router_logits = layer.feed_forward(hidden)
            found, found_logits = train.SparseMoe(layer.feed_forward)(hidden)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found_logits, router_logits)


def test_loss_by_parts_has_the_gradient_of_the_whole(demo_model: Path) -> None:
    train = load_script(demo_model / "train.py")
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 32, bias=False)
    hidden = torch.randn(6, 10, 16, generator=generator).requires_grad_()
    rows = torch.randint(32, (6, 10), generator=generator)
    logits = head(hidden)[:, :-1]
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    expected = torch.autograd.grad(whole, [hidden, head.weight])
    loss, gradient = train.head_loss(head, hidden, rows)
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected[0])
    torch.testing.assert_close(head.weight.grad, expected[1])


def test_held_out_modules_are_in_neither_training_nor_calibration(demo_model: Path) -> None:
    held_out = (demo_model / "held_out.txt").read_text().split("<|document|>\n")
    calibration, longer = ((demo_model / name).read_text() for name in ("calibration.txt", "calibration-long.txt"))
    assert longer.startswith(calibration.rstrip())
    seen = load_script(demo_model / "train.py").sources(math.inf)
    texts = {text.strip() for _, text in seen}
    assert len(held_out) == 6
    for text in held_out:
        assert text.strip() not in texts
        assert text[:300] not in longer


def load_script(path: Path) -> Any:
    """The script as a module, executed from its file: recipes/demo is data, not a package."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("demo_train", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["demo_train"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_a_grown_model_has_the_small_ones_function(demo_model: Path) -> None:
    spec = importlib.util.spec_from_file_location("grow", demo_model / "grow.py")
    assert spec is not None and spec.loader is not None
    grow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grow)
    small = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    large = grow.grown(small)
    ids = torch.randint(6, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(large(input_ids=ids).logits, small(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    gate_up = large.model.layers[0].feed_forward.experts.gate_up_proj
    assert gate_up.shape == (16, 256, 512) and not torch.equal(gate_up[:, :128], gate_up[:, 128:])
