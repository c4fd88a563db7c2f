import torch

from blues.model.attention.layer import make_view
from blues.model.context import Context
from tests.model.examples import lively, small


def test_a_block_adds_attention_then_its_feed_forward_to_the_residual_stream():
    model = lively(small().build()).double().eval()
    view = make_view(model.rope, model.pattern, length=5, device=torch.device("cpu"))
    context = Context(torch.zeros(2, 5, dtype=torch.int64))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for block, mixture in zip(model.blocks, [False, True, False, True], strict=True):
        middle = x + block.attention(block.attention_norm(x), view)
        hidden = block.feed_forward_norm(middle)
        added = block.feed_forward(hidden, context) if mixture else block.feed_forward(hidden)
        y, routing = block(x, view, context)
        torch.testing.assert_close(y, middle + (added[0] if mixture else added))
        assert (routing is not None) == mixture
