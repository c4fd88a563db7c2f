import torch
from hypothesis import given
from hypothesis import strategies as st

from blues.model.attention.patterns import AttentionPattern, Causal


def test_the_family_knows_its_members():
    assert AttentionPattern.variants["causal"] is Causal


@given(st.integers(1, 8), st.integers(0, 8))
def test_causal_sees_itself_and_the_past(length, past):
    mask = (
        Causal.Config().build().mask(torch.arange(past, past + length)[None], torch.arange(past + length)[None])[:, 0]
    )
    assert mask.shape == (1, length, past + length)
    for t in range(length):
        assert mask[0, t].tolist() == [s <= past + t for s in range(past + length)]


def test_rows_may_stand_at_different_positions():
    mask = Causal.Config().build().mask(torch.tensor([[0], [2]]), torch.arange(4)[None])[:, 0]
    assert mask[:, 0].tolist() == [[True, False, False, False], [True, True, True, False]]
