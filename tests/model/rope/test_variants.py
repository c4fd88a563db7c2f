"""What each variant promises, whatever its settings."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blues.config import FAMILIES, load
from blues.errors import ConfigError
from blues.model.rope import PlainRotary, Resonance, RotaryEmbedding, smallest_base

CPU = torch.device("cpu")
VARIANTS = sorted(FAMILIES["rope"].variants)
SCALED = ["linear", "ntk", "dynamic_ntk", "yarn", "longrope", "llama3"]
UNCHANGED_BELOW = ["dynamic_ntk", "longrope"]
LENGTHS = st.sampled_from([1, 2, 100, 511, 512, 513, 2048, 5000, 131_072])


def build(variant, head_dim=32, max_seq_len=2048, **fields) -> RotaryEmbedding:
    config = load(FAMILIES["rope"].Config, {"variant": variant, **fields})
    return config.build(head_dim=head_dim, max_seq_len=max_seq_len)


def plain(head_dim=32, theta=10_000.0, length=1):
    return PlainRotary.Config(theta=theta).build(head_dim=head_dim).frequencies(CPU, length)


few = settings(max_examples=25, deadline=None)
ropes = st.builds(
    lambda variant, head_dim, factor, theta: build(
        variant, head_dim, **({"factor": factor, "theta": theta} if variant in SCALED else {})
    ),
    st.sampled_from(VARIANTS),
    st.sampled_from([4, 8, 64, 128]),
    st.floats(1, 64),
    st.floats(500, 1e7),
)


@pytest.mark.parametrize("variant", SCALED)
@settings(max_examples=10, deadline=None)
@given(length=LENGTHS, theta=st.floats(500, 1e6))
def test_a_factor_of_one_changes_nothing(variant, length, theta):
    rope = build(variant, factor=1.0, theta=theta)
    if variant == "dynamic_ntk":  # which goes by the length: beyond the original it always changes something
        length = min(length, rope.original_length)
    torch.testing.assert_close(rope.frequencies(CPU, length), plain(theta=theta), atol=0, rtol=1e-6)
    assert rope.attention_factor == 1.0


@few
@given(ropes, LENGTHS)
def test_later_pairs_turn_no_faster_and_none_faster_than_a_radian(rope, length):
    frequencies_P = rope.frequencies(CPU, length)
    assert frequencies_P.dtype == torch.float32 and frequencies_P.shape == (rope.head_dim // 2,)
    assert (frequencies_P.diff() <= 1e-9).all()
    assert (frequencies_P >= 0).all() and frequencies_P[0] <= 1.05  # the shortest wavelength, 2 pi, may become 6


@few
@given(ropes, LENGTHS)
def test_rotations_are_finite_at_every_length(rope, length):
    rotation = rope.compute(torch.tensor([[0, length // 2, length - 1]]), length)
    for x_BTP in rotation:
        assert x_BTP.isfinite().all() and x_BTP.abs().max() <= rope.attention_factor + 1e-6
    assert (rotation.cos_BTP[0, 0] == rope.attention_factor).all() and not rotation.sin_BTP[0, 0].any()


@pytest.mark.parametrize("variant", UNCHANGED_BELOW)
@few
@given(length=st.integers(1, 512), factor=st.floats(1, 64))
def test_up_to_the_original_length_nothing_changes(variant, length, factor):
    rope = build(variant, factor=factor, original_length=512)
    assert torch.equal(rope.frequencies(CPU, length), plain())
    assert (rope.frequencies(CPU, 513) <= plain()).all()


@few
@given(st.floats(1.5, 64), st.sampled_from([8, 64, 128]))
def test_extensions_keep_the_fastest_pair_and_slow_the_slowest_by_the_factor(factor, head_dim):
    for variant in ("ntk", "yarn", "llama3", "longrope", "dynamic_ntk"):
        rope = build(variant, head_dim, max_seq_len=None, factor=factor, **_original(variant, 1024))
        # dynamic NTK reaches the base of the fixed one where the text is 1 + (s - 1) / s times as long: s l / L - s + 1
        length = round(1024 * (2 * factor - 1) / factor) if variant == "dynamic_ntk" else 10**6
        ratio_P = plain(head_dim) / rope.frequencies(CPU, length)
        assert ratio_P[0] == pytest.approx(1, abs=1e-6)
        assert ratio_P[-1] == pytest.approx(factor, rel=2e-3 if variant == "dynamic_ntk" else 1e-4)
        assert (ratio_P.diff() >= -1e-4).all()


def _original(variant, length):
    return {} if variant == "ntk" else {"original_length": length}


@few
@given(st.sampled_from([2, 5, 8, 31, 64]), st.floats(0.05, 1))
def test_p_rope_turns_the_fastest_pairs_alone(pairs, fraction):
    assume(int(fraction * pairs) > 0)
    turning = int(fraction * pairs)
    frequencies_P = build("p_rope", 2 * pairs, fraction=fraction).frequencies(CPU, 1)
    assert torch.equal(frequencies_P[:turning], plain(2 * pairs)[:turning]) and not frequencies_P[turning:].any()


@pytest.mark.parametrize("of", [name for name in VARIANTS if name not in ("nope", "resonance")])
@settings(max_examples=5, deadline=None)
@given(position=st.integers(0, 5000), turns=st.integers(1, 50))
def test_resonance_shows_at_any_distance_the_phases_of_the_first_turn(of, position, turns):
    rope = build("resonance", of=of, max_seq_len=16384)
    wavelengths_P = rope.wavelengths(CPU, 300)
    exact_P = 2 * math.pi / rope.of.frequencies(CPU, 300)
    rounded = exact_P < rope.original_length
    assert rounded.any() and torch.equal(wavelengths_P[rounded], exact_P[rounded].round())
    assert wavelengths_P[~rounded].isinf().all()
    assert torch.equal(rope.frequencies(CPU, 300)[~rounded], rope.of.frequencies(CPU, 300)[~rounded])
    assert rope.attention_factor == rope.of.attention_factor
    for pair in rounded.nonzero().flatten().tolist():
        period = int(wavelengths_P[pair])
        near, far = rope.angles(torch.tensor([position % period, position + turns * period]), 300)[:, pair]
        assert near == far and near < 2 * math.pi + 1e-5


def test_base_change_takes_the_base_that_the_context_needs():
    assert smallest_base(4096) == pytest.approx(0.0424 * 4096**1.628)
    assert build("base_change", max_seq_len=512).theta == 10_000
    assert build("base_change", max_seq_len=8192).theta == smallest_base(8192) > 90_000
    assert torch.equal(build("base_change", theta=10_000.0, max_seq_len=512).frequencies(CPU, 1), plain())
    with pytest.warns(UserWarning, match="a base of 10,000 is below the .* that a context of 8192 tokens needs"):
        build("base_change", theta=10_000.0, max_seq_len=8192)


def test_a_name_alone_extends_a_quarter_of_the_context():
    assert build("yarn", max_seq_len=2048).original_length == 512
    assert build("resonance", of="yarn", max_seq_len=2048).original_length == 512
    assert build("resonance", max_seq_len=2048).original_length == 2048


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        ("plain", {"theta": 0.0}, "theta: must be positive, got 0"),
        ("plain", {"theta": math.nan}, "theta: must be positive, got nan"),
        ("base_change", {"theta": -1.0}, "theta: must be positive"),
        ("linear", {"factor": 0.5}, "factor: .* 1 .* or more, got 0.5"),
        ("ntk", {"factor": math.inf}, "factor: .* got inf"),
        ("ntk", {"head_dim": 2}, "head_dim: NTK-aware scaling needs two pairs"),
        ("dynamic_ntk", {"original_length": 1}, "original_length: must be at least 2 tokens, got 1"),
        ("dynamic_ntk", {"original_length": 4096}, "original_length: 4096 .* more than the 2048 .*max_seq_len"),
        ("yarn", {"beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast: must be above beta_slow"),
        ("yarn", {"theta": 1.0}, "theta: .* above 1"),
        ("yarn", {"original_length": 2}, "original_length: within 2 tokens the pairs .* fewer times than beta_slow"),
        ("yarn", {"theta": 1.5}, "original_length: within 512 tokens the pairs of base 1.5 .* more than beta_fast"),
        ("yarn", {"mscale": 1.0}, "mscale: counts only together with mscale_all_dim"),
        ("yarn", {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}, "attention_factor: .* one of them"),
        ("yarn", {"attention_factor": 0.0}, "attention_factor: must be positive"),
        ("longrope", {"long_factor": [1.0] * 15}, "long_factor: .* 16 pairs .*head_dim 32.*, got 15"),
        ("longrope", {"short_factor": [0.0] * 16}, r"short_factor\[0\]: must be positive"),
        ("llama3", {"low_freq_factor": 4.0}, "high_freq_factor: must be above low_freq_factor"),
        ("p_rope", {"fraction": 0.0}, "fraction: must be above 0 and at most 1"),
        ("p_rope", {"fraction": 0.05}, "fraction: 0.05 of 16 pairs of channels is none"),
        ("resonance", {"of": "nope"}, "of: nope has no wavelengths"),
        ("resonance", {"of": "resonance"}, "of: resonance has no wavelengths"),
        ("resonance", {"original_length": 4096}, "original_length: 4096 tokens are more than the model ever sees"),
        ("resonance", {"max_seq_len": None}, "original_length: resonance needs it"),
        ("yarn", {"max_seq_len": None}, "original_length: yarn needs it where max_seq_len is unknown"),
        ("base_change", {"max_seq_len": None}, "theta: base_change needs it"),
        ("nope", {"head_dim": 7}, "head_dim.*got 7.*even"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(variant, fields, message):
    with pytest.raises(ConfigError, match=message):
        build(variant, **fields)


def test_resonance_is_the_only_rope_that_holds_another():
    assert Resonance.Config().of == PlainRotary.Config()
