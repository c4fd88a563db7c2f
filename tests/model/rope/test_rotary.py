import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.errors import ConfigError
from blues.model.rope import PlainRotary, rotate

ROPE = PlainRotary.Config().build(head_dim=16)


def vectors(n, seed=0):
    return torch.randn(1, n, 1, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_scores_depend_on_the_distance_alone(first, second, shift):
    q, k = vectors(2).split(1, dim=1)
    score = lambda a, b: (rotate(q, ROPE(torch.tensor([[a]]))) * rotate(k, ROPE(torch.tensor([[b]])))).sum()
    torch.testing.assert_close(score(first, second), score(first + shift, second + shift), atol=5e-4, rtol=0)


def test_rotation_keeps_lengths_and_position_zero_is_the_identity():
    x = vectors(5)
    turned = rotate(x, ROPE(torch.arange(5)[None]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-6, rtol=0)
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1], x[:, 1])


def test_pairs_turn_at_geometric_speeds_like_complex_numbers():
    x = vectors(1)[0, 0, 0]
    turned = rotate(x.view(1, 1, 1, 16), ROPE(torch.tensor([[7]])))[0, 0, 0]
    for i in range(8):
        expected = torch.complex(x[i], x[i + 8]) * torch.exp(torch.tensor(7j) * 10_000 ** (-2 * i / 16))
        assert abs(torch.complex(turned[i], turned[i + 8]) - expected) < 1e-5


def test_angles_of_a_bfloat16_model_are_float32():
    rotation = ROPE(torch.tensor([[2001]]))
    assert rotation.cos_BTP.dtype == torch.float32
    assert rotate(vectors(1).bfloat16(), rotation).dtype == torch.bfloat16
    assert rotation.cos_BTP[0, 0, 0].item() == pytest.approx(torch.tensor(2001.0).cos().item(), abs=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="theta"):
        PlainRotary.Config(theta=0)
    with pytest.raises(ConfigError, match="head_dim.*got 7.*even"):
        PlainRotary.Config().build(head_dim=7)
