import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blues.model.context import History


@settings(max_examples=20, deadline=None)
@given(pieces=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_sums_in_pieces_are_the_sums_of_the_whole(pieces, seed):
    history, owner, other = History(), nn.Identity(), nn.Identity()
    x_BTE = torch.randn(2, sum(pieces), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts, start = [], 0
    for piece_BTE in x_BTE.split(pieces, dim=1):
        slots_BT = torch.arange(start, start + piece_BTE.shape[1]).expand(2, -1)
        parts.append(history.running_sum(owner, piece_BTE, slots_BT))
        history.running_sum(other, torch.ones_like(piece_BTE), slots_BT)
        start += piece_BTE.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), x_BTE.cumsum(dim=1))


def test_tokens_take_the_place_of_padding_and_rows_may_leave():
    history, owner = History(), nn.Identity()
    ones_BTE = torch.ones(2, 4, 1)
    history.running_sum(owner, ones_BTE, torch.arange(4).expand(2, 4))
    # Row 0 holds four tokens; of row 1 the last two were padding.
    sums = history.running_sum(owner, ones_BTE[:, :1] * 10, torch.tensor([[4], [2]]))
    assert sums.flatten().tolist() == [14.0, 12.0]
    history.select([1])
    assert history.running_sum(owner, ones_BTE[:1, :1], torch.tensor([[3]])).item() == 13.0


def test_a_row_may_go_back():
    history, owner = History(), nn.Identity()
    history.running_sum(owner, torch.arange(1.0, 6.0)[None, :, None], torch.arange(5)[None])
    again = history.running_sum(owner, torch.tensor([[[100.0], [1.0]]]), torch.tensor([[2, 3]]))
    assert again.flatten().tolist() == [103.0, 104.0]
