"""Steps on shapes hold what real ones hold: attention by backend and length, what is remembered."""

import pytest
import torch

from library.models.attention import BACKENDS
from library.training.memory.live_bytes import LiveBytes
from library.training.memory.meta_run import LiveShapes, fused_attention

BATCH, HEADS, CHANNELS = 2, 2, 64


def held(device, backend, tokens, words):
    """Bytes after forward, and the peaks of forward and of backward, of an attention between products."""

    def made(*shape):
        return torch.zeros(*shape, device=device, requires_grad=True)

    x_BLC, text_BTC, weight = made(BATCH, tokens, CHANNELS), made(BATCH, words, CHANNELS), made(CHANNELS, CHANNELS)
    with LiveShapes() if device == "meta" else LiveBytes() as live:
        heads = ((one @ weight).unflatten(-1, (HEADS, -1)) for one in (x_BLC, text_BTC, text_BTC))
        out = BACKENDS[backend].run(*heads).flatten(-2) @ weight
        after, forward = live.bytes, live.peak
        live.peak = 0
        out.sum().backward()
    return after, forward, live.peak


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize(("tokens", "words"), [(64, 64), (256, 77), (576, 576), (1024, 77)])
def test_attention_holds_what_it_really_holds(backend, tokens, words):
    real = held("cpu", backend, tokens, words)
    with fused_attention():
        for _ in range(2):  # the second time from what is remembered
            assert held("meta", backend, tokens, words) == pytest.approx(real, rel=0.005)


def test_a_remembered_result_is_a_new_tensor_of_the_same_form_and_a_view_is_no_result():
    x = torch.empty(3, 4, device="meta")
    with LiveShapes() as live:
        live.hold([x])
        first, second = (x.t().double() for _ in range(2))
        assert live.bytes == 48 + 2 * 96
        assert (second.shape, second.stride(), second.dtype) == (first.shape, first.stride(), first.dtype)
        assert x.t()._base is x and live.bytes == 48 + 2 * 96
        assert (x * 2).dtype == torch.float32 and (x.int() * 2).dtype == torch.int32
        assert (x.int() * 2.0).dtype == torch.float32
