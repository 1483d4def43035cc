"""A run of layers in one call equals the same layers one by one, and stops where an expert is missing."""

import itertools
import math
import threading

import pytest
import torch

from quant.errors import SchemeError
from quant.kernels.attention import Attention, AttentionShape, KvPages
from quant.kernels.lookahead import FROM_EMBEDDING, Lookahead
from quant.kernels.moe import FAILED, READY, GatedMlp, Job, MoeBlock, mlp
from quant.kernels.routing import RouterKind
from quant.kernels.stack import MAX_ROWS, DenseBlock, Head, Segment, Stack, Stop
from quant.kernels.weight import Weight
from quant.pack import quantize_absmax
from quant.scheme import Scheme

HIDDEN, INTER, EXPERTS, LAYERS = 64, 96, 4, 3


def _weight(rows: int, columns: int) -> Weight:
    return Weight.from_tensors("f32", torch.randn(rows, columns) / columns**0.5)


def _gated() -> GatedMlp:
    return GatedMlp(_weight(INTER, HIDDEN), _weight(INTER, HIDDEN), _weight(HIDDEN, INTER))


def _layers() -> tuple[list[Attention], list[MoeBlock | DenseBlock], tuple[KvPages, torch.Tensor]]:
    torch.manual_seed(1)
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=16, rope="interleaved")
    attentions, blocks = [], []
    for index in range(LAYERS):
        q, k, v, o = _weight(64, HIDDEN), _weight(32, HIDDEN), _weight(32, HIDDEN), _weight(HIDDEN, 64)
        attentions.append(Attention(shape, q, k, v, o, torch.rand(HIDDEN)))
        if index == 1:
            blocks.append(DenseBlock(_gated(), torch.rand(HIDDEN), 1e-5))
            continue
        block = MoeBlock(_weight(EXPERTS, HIDDEN), 1, "sigmoid_input", _gated(), None, torch.rand(HIDDEN))
        for expert in range(EXPERTS):
            block.set_expert(expert, _gated())
        blocks.append(block)
    return attentions, blocks, _pages()


def _pages() -> tuple[KvPages, torch.Tensor]:
    """A page for each layer, and the tables that say so."""
    return KvPages.allocate(LAYERS, 2, 16, torch.float32), torch.arange(LAYERS, dtype=torch.int32)[:, None]


def test_a_stack_equals_its_layers_one_by_one() -> None:
    attentions, blocks, caches = _layers()
    stack = Stack(attentions, blocks, 16)
    own, tables = _pages()
    for position in range(5):
        x, cosine, sine = torch.randn(1, HIDDEN), torch.rand(1, 8), torch.rand(1, 8)
        expected = x.clone()
        for attention, block, table in zip(attentions, blocks, tables, strict=True):
            expected = attention.run(expected, position, own, table, cosine, sine, exact=True)
            if isinstance(block, DenseBlock):
                normed = torch.nn.functional.rms_norm(expected, (HIDDEN,), block.norm, 1e-5)
                expected = mlp([Job(block.mlp)], normed, expected.clone(), exact=True)
            else:
                result = block.run(expected, exact=True)
                assert result.out is not None
                expected = result.out
        stack.begin(x, [Segment(caches[1], position)], caches[0], cosine, sine, True)
        assert stack.go() is None
        assert torch.allclose(x, expected, atol=1e-5)
    assert torch.allclose(caches[0].keys[:, :, :5], own.keys[:, :, :5], atol=1e-5)


def _token() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(1, HIDDEN), torch.rand(1, 8), torch.rand(1, 8)


def test_a_stack_stops_where_an_expert_is_missing_and_goes_on_once_it_is_there() -> None:
    attentions, blocks, caches = _layers()
    stack = Stack(attentions, blocks, 16)
    x, cosine, sine = _token()
    whole = x.clone()
    stack.begin(whole, [Segment(caches[1], 0)], caches[0], cosine, sine, True)
    assert stack.go() is None
    assert stack.late_by_layer() == [0, 0]
    last = blocks[2]
    assert isinstance(last, MoeBlock)
    chosen = int(stack.chosen(2)[0, 0])
    kept = last._resident[chosen]
    last.clear_expert(chosen)
    stack.begin(x, [Segment(caches[1], 0)], caches[0], cosine, sine, True)
    assert stack.go() == Stop(2, 3, True, [chosen], [], [])
    assert stack.late_by_layer() == [0, 1]
    last.set_expert(chosen, kept)
    assert stack.go() is None
    assert torch.allclose(x, whole, atol=1e-5)


def test_a_stack_waits_for_an_expert_that_is_coming() -> None:
    attentions, blocks, caches = _layers()
    stack = Stack(attentions, blocks, 16)
    x, cosine, sine = _token()
    whole = x.clone()
    stack.begin(whole, [Segment(caches[1], 0)], caches[0], cosine, sine, True)
    assert stack.go() is None
    last = blocks[2]
    assert isinstance(last, MoeBlock)
    chosen = int(stack.chosen(2)[0, 0])
    last.set_expert(chosen, last._resident[chosen], ready=False)
    stack.begin(x, [Segment(caches[1], 0)], caches[0], cosine, sine, True)
    assert stack.go() == Stop(2, 3, False, [chosen], [], [])  # patience is over: Ctrl-C has its turn
    timer = threading.Timer(0.03, last.publish, (chosen, READY))
    timer.start()
    assert stack.go() is None
    timer.join()
    assert torch.allclose(x, whole, atol=1e-5)
    last.set_expert(chosen, last._resident[chosen], ready=False)
    stack.begin(whole, [Segment(caches[1], 0)], caches[0], cosine, sine, True)
    timer = threading.Timer(0.03, last.publish, (chosen, FAILED))
    timer.start()
    assert stack.go() == Stop(2, 3, True, [chosen], [], [])
    timer.join()


def test_sums_do_not_depend_on_which_experts_had_to_be_waited_for() -> None:
    """Bit for bit the same for every set of late experts, which arrive in the wrong order."""
    torch.manual_seed(3)
    attentions, _, caches = _layers()
    block = MoeBlock(_weight(EXPERTS, HIDDEN), 3, "softmax", _gated(), None, torch.rand(HIDDEN))
    experts = [_gated() for _ in range(EXPERTS)]
    stack = Stack(attentions[:1], [block], 16)
    x, cosine, sine = _token()
    sums = []
    for late in itertools.chain([()], *(itertools.combinations(range(EXPERTS), n) for n in (1, 2, 3, 4))):
        for expert in range(EXPERTS):
            block.set_expert(expert, experts[expert], ready=expert not in late)
        sums.append(x.clone())
        stack.begin(sums[-1], [Segment(caches[1], 0)], caches[0], cosine, sine, True)
        for expert in reversed(late):
            stop = stack.go()
            if stop is None:
                break
            assert not stop.missing
            block.publish(expert, READY)
        else:
            assert stack.go() is None
    assert all(torch.equal(sums[0], other) for other in sums[1:])


def test_a_stack_says_what_coming_layers_will_want() -> None:
    """Layer 0's output, or its embedding, is held against layer 2's router: it wants what is absent there."""
    attentions, blocks, caches = _layers()
    stack = Stack(attentions, blocks, 16)
    first, last = blocks[0], blocks[2]
    assert isinstance(first, MoeBlock)
    assert isinstance(last, MoeBlock)
    routers = [torch.randn(EXPERTS, HIDDEN) for _ in range(2)]
    lookahead = Lookahead(routers, [torch.ones(HIDDEN)] * 2, 1)
    x, cosine, sine = _token()
    embedded = [int((router @ x[0]).argmax()) for router in routers]
    last.clear_expert(embedded[1])
    stack.begin(x, [Segment(caches[1], 0)], caches[0], cosine, sine, True, lookahead)
    expected = [(0, embedded[0]), (2, embedded[1])]
    assert stack.go() == Stop(0, 0, False, [], expected, [])  # one of them is absent: all are named
    before = lookahead.right.clone()
    stop = stack.go()
    changed = (lookahead.right != before).nonzero().tolist()
    assert [row[:2] for row in changed] == [[FROM_EMBEDDING, 0]]  # of layer 0 alone
    assert stop is not None
    assert stop.finished in (1, 2)


def test_a_stack_ends_with_the_logits_of_its_head() -> None:
    attentions, blocks, caches = _layers()
    norm, weight = torch.rand(HIDDEN), torch.randn(50, HIDDEN)
    stack = Stack(attentions, blocks, 16, Head(norm, 1e-5, Weight.from_tensors("f32", weight)))
    x, cosine, sine = _token()
    stack.begin(x, [Segment(caches[1], 0)], caches[0], cosine, sine, True)
    assert stack.go() is None
    assert stack.token_logits is not None
    expected = torch.nn.functional.rms_norm(x[0], (HIDDEN,), norm, 1e-5) @ weight.T
    assert torch.allclose(stack.token_logits[0], expected, atol=1e-4)


def test_a_waiting_layer_guesses_the_next_token_and_what_it_will_want() -> None:
    """The head on what there is of the output, the embedding of its best token, the first layers' routers."""
    attentions, blocks, caches = _layers()
    norm, head, embeddings = torch.rand(HIDDEN), torch.randn(50, HIDDEN), torch.randn(50, HIDDEN)
    stack = Stack(attentions, blocks, 16, Head(norm, 1e-5, Weight.from_tensors("f32", head)))
    stack.guess_tokens(embeddings, 1)
    routers = [torch.randn(EXPERTS, HIDDEN) for _ in range(2)]
    lookahead = Lookahead(routers, [torch.ones(HIDDEN)] * 2, 1)
    first, last = blocks[0], blocks[2]
    assert isinstance(first, MoeBlock)
    assert isinstance(last, MoeBlock)
    x, cosine, sine = _token()
    stack.begin(x.clone(), [Segment(caches[1], 0)], caches[0], cosine, sine, True)
    assert stack.go() is None
    chosen = [int(stack.chosen(layer)[0, 0]) for layer in (0, 2)]
    last.set_expert(chosen[1], last._resident[chosen[1]], ready=False)
    for expert in set(range(EXPERTS)) - {chosen[0]}:
        first.clear_expert(expert)
    partial = x.clone()
    stack.begin(partial, [Segment(caches[1], 0)], caches[0], cosine, sine, True, lookahead)
    stops = []
    while (stop := stack.go()) is not None and not (stop.wanted_next or len(stops) > 9):
        stops.append(stop)
    normed = torch.nn.functional.rms_norm(partial[0], (HIDDEN,), norm, 1e-5)
    token = int((normed @ head.T).argmax())
    expected = [
        (layer, int((router @ embeddings[token]).argmax())) for layer, router in zip((0, 2), routers, strict=True)
    ]
    assert stop is not None
    assert stop.finished == 2
    assert stop.wanted_next == expected
    last.publish(chosen[1], READY)
    assert stack.go() is None
    assert stack.token_logits is not None
    stack.begin(x.clone(), [Segment(caches[1], 0)], caches[0], cosine, sine, True, lookahead)
    again = stack.go()
    assert again is not None
    assert again.attended == 0  # whatever was guessed for it is to be looked at anew


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("router", ["sigmoid_input", "softmax"])
def test_rows_get_to_the_bit_what_each_gets_alone(exact: bool, router: RouterKind) -> None:
    """Sequences of different lengths, and several tokens of one; experts that are there and that come in any order."""
    torch.manual_seed(4)
    attentions, _, _ = _layers()
    block = MoeBlock(_weight(EXPERTS, HIDDEN), 2, router, _packed(), None, torch.rand(HIDDEN))
    for expert in range(EXPERTS):
        block.set_expert(expert, _packed())
    head = Head(torch.rand(HIDDEN), 1e-5, Weight.from_tensors("f32", torch.randn(50, HIDDEN)))
    stack = Stack(attentions[:1], [block], 16, head)
    pages = KvPages.allocate(4, 2, 16, torch.float32)
    seen = [3, 0, 40, 7]
    tables = [torch.tensor([[index]], dtype=torch.int32) for index in range(4)]

    def step(x: torch.Tensor, rows: list[tuple[int, int]]) -> torch.Tensor:
        segments = [Segment(tables[index], seen[index], count) for index, count in rows]
        places = [seen[index] + i for index, count in rows for i in range(count)]
        cosine = torch.tensor([[math.cos(place / (i + 1)) for i in range(8)] for place in places])
        x = x.clone()
        stack.begin(x, segments, pages, cosine, (1 - cosine**2).sqrt(), exact)
        while (stop := stack.go()) is not None:
            assert not stop.missing
            block.publish(stop.waiting[-1], READY)
        assert stack.token_logits is not None
        return torch.cat((x, stack.token_logits), 1)

    for index, count in enumerate(seen):
        for start in range(0, count, MAX_ROWS):
            seen[index] = start
            step(torch.randn(min(MAX_ROWS, count - start), HIDDEN), [(index, min(MAX_ROWS, count - start))])
        seen[index] = count
    x = torch.randn(6, HIDDEN)
    rows = [(0, 1), (1, 1), (2, 3), (3, 1)]
    alone = torch.cat([step(x[:1], rows[:1]), step(x[1:2], rows[1:2]), step(x[2:5], rows[2:3]), step(x[5:], rows[3:])])
    together = step(x, rows)
    assert torch.equal(alone, together)
    kept = block._resident.copy()
    for late in ((0,), (1, 3), (0, 1, 2, 3)):
        for expert, weights in kept.items():
            block.set_expert(expert, weights, ready=expert not in late)
        assert torch.equal(step(x, rows), together)


def _packed() -> GatedMlp:
    def packed(rows: int, columns: int) -> Weight:
        stored = quantize_absmax(torch.randn(rows, columns) / columns**0.5, Scheme("int4", 32))
        return Weight.from_tensors("int4", stored.packed, stored.scale)

    return GatedMlp(packed(INTER, HIDDEN), packed(INTER, HIDDEN), packed(HIDDEN, INTER))


def test_a_stack_takes_as_many_rows_as_it_has_room_for() -> None:
    attentions, blocks, (pages, tables) = _layers()
    stack = Stack(attentions, blocks, 16)
    many = MAX_ROWS + 1
    with pytest.raises(SchemeError, match=f"for {many} rows: expected 1 to {MAX_ROWS}"):
        stack.begin(torch.zeros(many, HIDDEN), [Segment(tables, 0, many)], pages, torch.zeros(1), torch.zeros(1), True)


def test_a_stack_wants_a_block_for_each_attention() -> None:
    attentions, blocks, _ = _layers()
    with pytest.raises(SchemeError, match="3 attentions and 2 blocks"):
        Stack(attentions, blocks[:2], 16)
