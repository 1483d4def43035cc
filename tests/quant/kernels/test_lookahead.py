"""Lookahead guesses what the coming routers will pick, and stops reading for guesses that turn out wrong."""

import torch

from quant.kernels.lookahead import DEPTH, FROM_EMBEDDING, FROM_OUTPUT, FROM_PARTIAL, Lookahead


def _made(
    layers: int = DEPTH + 2, experts: int = 8, hidden: int = 64, top_k: int = 1
) -> tuple[Lookahead, list[torch.Tensor]]:
    torch.manual_seed(0)
    routers = [torch.randn(experts, hidden) for _ in range(layers)]
    norms = [torch.rand(hidden) + 0.5 for _ in range(layers)]
    weighted = [router * norm for router, norm in zip(routers, norms, strict=True)]
    return Lookahead(routers, norms, top_k), weighted


def _chosen(router: torch.Tensor, x: torch.Tensor, top_k: int = 1) -> list[int]:
    return (router @ x[0]).topk(top_k).indices.tolist()


def test_a_hidden_state_that_does_not_change_is_guessed_right_nearest_layer_first() -> None:
    lookahead, weighted = _made(top_k=2)
    x = torch.randn(1, 64)
    for here in (-1, 0, 3):
        layers = range(here + 1, min(here + 1 + DEPTH, len(weighted)))
        expected = [(layer, expert) for layer in layers for expert in _chosen(weighted[layer], x, 2)]
        assert lookahead.guess(FROM_OUTPUT, here, x) == expected
    assert lookahead.guess(FROM_OUTPUT, DEPTH + 1, x) == []  # nothing follows the last layer


def test_biases_of_routers_count_as_much_as_beside_a_normed_state() -> None:
    torch.manual_seed(1)
    routers, norms = [torch.randn(8, 64) for _ in range(3)], [torch.rand(64) + 0.5 for _ in range(3)]
    biases = [torch.randn(8) * 6 for _ in range(3)]
    lookahead = Lookahead(routers, norms, 2, biases=biases)
    x = torch.randn(40, 64) * 30
    logits = [torch.nn.functional.rms_norm(x, (64,), norms[i]) @ routers[i].T + biases[i] for i in range(3)]
    plain = [torch.nn.functional.rms_norm(x, (64,), norms[i]) @ routers[i].T for i in range(3)]
    for row in range(40):
        expected = [(layer, e) for layer in (1, 2) for e in logits[layer][row].topk(2).indices.tolist()]
        assert lookahead.guess(FROM_OUTPUT, 0, x[row : row + 1]) == expected
    assert any(not torch.equal(a.argmax(1), b.argmax(1)) for a, b in zip(logits, plain, strict=True))
    wanted = logits[1].topk(2).indices.flatten().bincount(minlength=8)
    guessed = [expert for _, expert in lookahead.for_prompt(0, x)]
    assert [int(wanted[expert]) for expert in guessed] == sorted(wanted[wanted > 0].tolist(), reverse=True)


def test_every_expert_is_guessed_where_a_token_takes_them_all() -> None:
    lookahead, _ = _made(experts=3, top_k=3)
    guessed = lookahead.guess(FROM_OUTPUT, 0, torch.randn(1, 64))
    assert sorted(guessed) == [(layer, expert) for layer in range(1, 1 + DEPTH) for expert in range(3)]


def test_distances_that_are_guessed_wrong_are_no_longer_read_for() -> None:
    lookahead, weighted = _made()
    for _ in range(100):
        x = torch.randn(1, 64)
        lookahead.guess(FROM_OUTPUT, 0, x)
        lookahead.learn(1, _chosen(weighted[1], x))
        for layer in range(2, 1 + DEPTH):
            lookahead.learn(layer, [-1])
    asked = [layer for _ in range(20) for layer, _ in lookahead.guess(FROM_OUTPUT, 0, torch.randn(1, 64))]
    assert asked == [1] * 20


def test_kinds_of_guesses_are_judged_apart() -> None:
    lookahead, weighted = _made()
    x = torch.randn(1, 64)
    for kind in (FROM_EMBEDDING, FROM_PARTIAL):
        for _ in range(200):
            lookahead.guess(kind, -1, torch.randn(1, 64))
            for layer in range(DEPTH):
                lookahead.learn(layer, [-1])
        assert lookahead.guess(kind, -1, x) == []
    expected = [(layer, _chosen(weighted[layer], x)[0]) for layer in range(DEPTH)]
    assert lookahead.guess(FROM_OUTPUT, -1, x) == expected


def test_what_is_learned_is_the_share_of_right_guesses_by_margin() -> None:
    """Against the same sums in torch: one record per kind, distance and bin of margin, half of them right."""
    lookahead, weighted = _made(top_k=2)
    expected = lookahead.right.clone()
    edges = torch.tensor([0.05, 0.15, 0.3, 0.6])
    for step in range(60):
        x = torch.randn(1, 64)
        lookahead.guess(FROM_OUTPUT, 0, x)
        for layer in range(1, 1 + DEPTH):
            logits = weighted[layer] @ x[0]
            top = logits.topk(3)
            margin = (top.values[1] - top.values[2]) / logits.std(correction=0)
            chosen = [int(top.indices[step % 2]), -1]
            lookahead.learn(layer, chosen)
            record = expected[FROM_OUTPUT, layer - 1, int((margin > edges).sum())]
            record.copy_(0.98 * record + 0.02 * 0.5)
    assert torch.allclose(lookahead.right, expected, atol=1e-5)


def test_a_prompt_asks_for_the_next_layers_experts_the_most_wanted_first() -> None:
    lookahead, weighted = _made()
    x = torch.randn(50, 64)
    wanted = (x @ weighted[1].T).argmax(-1).bincount(minlength=8)
    guessed = lookahead.for_prompt(0, x)
    assert {layer for layer, _ in guessed} == {1}
    assert {expert for _, expert in guessed} == set(wanted.nonzero().flatten().tolist())
    assert wanted[guessed[0][1]] == wanted.max()
    assert lookahead.for_prompt(DEPTH + 1, x) == []
