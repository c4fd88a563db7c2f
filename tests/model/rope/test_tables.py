"""Tables of cosines and sines: what is looked up equals what is computed, and little is kept."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.model.rope.tables import Tables
from tests.model.rope.test_variants import CPU, VARIANTS, build


def counted(rope):
    """The lengths for which `rope` computes a rotation from now on."""
    made, compute = [], rope.compute

    def count(positions_BT, length=None):
        made.append((positions_BT.shape[-1], length))
        return compute(positions_BT, length)

    rope.compute = count
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6), first=st.integers(0, 50))
def test_a_table_that_grew_equals_the_computation_bit_for_bit(variant, lengths, first):
    rope = build(variant, max_seq_len=256, head_dim=16)
    for length in lengths:
        positions_BT = torch.arange(min(first, length - 1), length)[None].expand(2, -1)
        for got, expected in zip(rope(positions_BT, length), rope.compute(positions_BT, length), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, expected)


@pytest.mark.parametrize("variant", ["plain", "yarn", "resonance"])
def test_a_table_is_made_once_and_doubled(variant):
    rope = build(variant)
    made = counted(rope)
    for length in range(100, 900):
        rope(torch.tensor([[length - 1]]), length)
    assert [rows for rows, _ in made] == [100, 200, 400, 800, 1600]
    assert len(rope.tables) == 1 and rope.tables.num_bytes == 2 * 1600 * 16 * 4


def test_longrope_has_a_table_for_short_and_one_for_long_texts():
    rope = build("longrope", original_length=512)
    made = counted(rope)
    for length in (100, 500, 600, 512, 513, 1000, 64):
        rope(torch.arange(length)[None], length)
    assert made == [(100, 100), (500, 500), (600, 600), (1000, 512), (1200, 1000)] and len(rope.tables) == 2


def test_tables_of_many_lengths_do_not_pile_up():
    rope = build("dynamic_ntk", original_length=64)
    made = counted(rope)
    for length in range(1, 300):
        rope(torch.tensor([[length - 1]]), length)
    assert len(rope.tables) <= 4 and rope.tables.num_bytes <= 4 * 2 * 300 * 16 * 4
    assert len([length for _, length in made if length <= 64]) == 7, "one table, doubled, up to the original length"


def test_devices_have_their_own_tables_and_few_stay():
    rope = build("plain")
    for device in ("cpu", "meta"):
        rotation = rope(torch.arange(9, device=device)[None], 9)
        assert rotation.cos_BTP.device.type == device
    assert len(rope.tables) == 2
    tables = Tables(entries=1)
    tables.get(rope, CPU, 5)
    tables.get(rope, torch.device("meta"), 5)
    assert len(tables) == 1


def test_training_may_use_what_generation_has_made():
    rope = build("plain")
    with torch.inference_mode():
        rope(torch.arange(9)[None], 9)
    x = torch.ones(16, requires_grad=True)
    (rope(torch.arange(9)[None], 9).cos_BTP * x).sum().backward()
    assert x.grad is not None


def test_copies_and_pickles_start_empty():
    rope = build("yarn")
    rope(torch.arange(9)[None], 9)
    for again in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert len(again.tables) == 0 and len(rope.tables) == 1
        assert torch.equal(again(torch.arange(9)[None], 9).cos_BTP, rope(torch.arange(9)[None], 9).cos_BTP)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_known_length_the_last_position_tells(variant):
    rope = build(variant, max_seq_len=64)
    positions_BT = torch.tensor([[3, 90, 17], [0, 1, 2]])
    assert all(torch.equal(a, b) for a, b in zip(rope(positions_BT), rope.compute(positions_BT, 91), strict=True))
    assert len(rope.tables) == 0
