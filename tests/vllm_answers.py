"""vLLM's own answers, by a Python that has vLLM: ``python -P tests/vllm_answers.py FOLDER…``.

For each folder one line of JSON: the greedy tokens that follow ``PROMPT`` and the log probability of each, or what vLLM
refuses it with. Names, schemes and bytes are read by vLLM's loader; a processor without AMX has no kernels of vLLM's
for int4 experts and int8 Linears, so those are multiplied here, by the weights that it loaded.
"""

import json
import os
import sys
from typing import Any

PROMPT = [5, 6, 7, 8, 9, 10, 3, 17, 90, 4]
TOKENS = 24


def main() -> None:
    """One model after another, in this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    multiply_by_torch()
    settings = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=1)
    kept = []  # one that is let go of takes what the next one needs with it
    for folder in sys.argv[1:]:
        try:
            kept.append(
                LLM(
                    folder,
                    dtype="float32",
                    enforce_eager=True,
                    max_model_len=64,
                    max_num_seqs=1,
                    skip_tokenizer_init=True,
                    moe_backend="emulation",
                )
            )
            made = kept[-1].generate([{"prompt_token_ids": PROMPT}], settings, use_tqdm=False)[0].outputs[0]
            chances = [step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)]
            answer: dict[str, Any] = {"tokens": list(made.token_ids), "logprobs": chances}
        except Exception as error:  # noqa: BLE001  whatever a loader raises: the test says whether it should have
            answer = {"refused": f"{type(error).__name__}: {error}"}
        print("ANSWER " + json.dumps(answer), flush=True)


def multiply_by_torch() -> None:
    """Have vLLM compute with int4 experts (``moe_backend="emulation"``) and packed Linears on any processor."""
    import torch
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.platforms import PlatformEnum

    def apply(experts: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, *rest: Any, **named: Any) -> None:
        """``w1`` [E, 2·I, H], gate above up; ``w2`` [E, H, I]."""
        weights, chosen = named["topk_weights"], named["topk_ids"]
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for token, slot in [(t, s) for t in range(chosen.shape[0]) for s in range(chosen.shape[1])]:
            expert = int(chosen[token, slot])
            gate, up = (w1[expert].float() @ hidden_states[token].float()).chunk(2)
            scale = 1.0 if named["apply_router_weight_on_input"] else float(weights[token, slot])
            total[token] += scale * (w2[expert].float() @ (torch.nn.functional.silu(gate) * up))
        output.copy_(total)

    class PlainLinear(linear.MPLinearKernel):  # type: ignore[misc]
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            kind = self.config.weight_type
            whole = unpack_quantized_values_into_int32(getattr(layer, self.w_q_name).data, kind, 1)
            scales = getattr(layer, self.w_s_name).data.float()
            layer.plain = (whole - kind.bias).float() * scales.repeat_interleave(whole.shape[1] // scales.shape[1], 1)

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return torch.nn.functional.linear(x, layer.plain.to(x.dtype), bias)

    Int4EmulationTritonExperts.apply = apply
    Int4EmulationTritonExperts._supports_current_device = staticmethod(lambda: True)
    linear._POSSIBLE_KERNELS[PlatformEnum.CPU] = [PlainLinear]


if __name__ == "__main__":
    main()
