"""Foresight guesses what the coming routers will pick, and stops reading for guesses that turn out wrong."""

import torch

from offload.foresight import DEPTH, Foresight


def _made(
    layers: int = DEPTH + 2, experts: int = 8, hidden: int = 64
) -> tuple[Foresight, list[torch.Tensor]]:
    torch.manual_seed(0)
    routers = [torch.randn(experts, hidden) for _ in range(layers)]
    norms = [torch.rand(hidden) + 0.5 for _ in range(layers)]
    weighted = [router * norm for router, norm in zip(routers, norms, strict=True)]
    return Foresight(range(layers), routers, norms, 1), weighted


def test_a_hidden_state_that_does_not_change_is_guessed_right_nearest_layer_first() -> None:
    foresight, weighted = _made()
    x = torch.randn(1, 64)
    expected = [(layer, int((weighted[layer] @ x[0]).argmax())) for layer in range(1, 1 + DEPTH)]
    assert foresight.guess(0, x) == expected
    assert foresight.guess(DEPTH + 1, x) == []  # nothing follows the last layer


def test_distances_that_are_guessed_wrong_are_no_longer_read_for() -> None:
    foresight, _ = _made()
    for _ in range(100):
        x = torch.randn(1, 64)
        near = dict(foresight.guess(0, x))
        foresight.learn(1, frozenset({near.get(1, 0)}))
        for layer in range(2, 1 + DEPTH):
            foresight.learn(layer, frozenset({-1}))
    assert {layer for layer, _ in foresight.guess(0, torch.randn(1, 64))} <= {1}
    sure = [layer for _ in range(20) for layer, _ in foresight.guess(0, torch.randn(1, 64))]
    assert sure.count(1) >= 10


def test_a_prompt_asks_for_the_next_layers_experts_the_most_wanted_first() -> None:
    foresight, weighted = _made()
    x = torch.randn(50, 64)
    wanted = (x @ weighted[1].T).argmax(-1).bincount(minlength=8)
    guessed = foresight.guess(0, x)
    assert {layer for layer, _ in guessed} == {1}
    assert {expert for _, expert in guessed} == set(wanted.nonzero().flatten().tolist())
    assert wanted[guessed[0][1]] == wanted.max()


def test_a_tokens_embedding_alone_guesses_the_first_layers_and_is_judged_apart() -> None:
    foresight, weighted = _made()
    x = torch.randn(1, 64)
    expected = [(layer, int((weighted[layer] @ x[0]).argmax())) for layer in range(DEPTH)]
    assert foresight.guess(-1, x) == expected
    for _ in range(200):
        foresight.guess(-1, torch.randn(1, 64))
        for layer in range(DEPTH):
            foresight.learn(layer, frozenset({-1}))
    assert foresight.guess(-1, torch.randn(1, 64)) == []
    assert foresight.guess(0, torch.randn(1, 64)) != []
