"""The oracle: ROPE_INIT_FUNCTIONS of transformers."""

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blues.config import FAMILIES, load
from blues.model.rope import RotaryEmbedding
from blues.model.rope.huggingface import from_rope_parameters, to_rope_parameters

CPU = torch.device("cpu")
PAIRS = 16
LISTS = {"short_factor": tuple(1 + i / 40 for i in range(PAIRS)), "long_factor": tuple(1 + i / 3 for i in range(PAIRS))}
CASES = {
    "linear": {"variant": "linear", "factor": 3.0},
    "dynamic": {"variant": "dynamic_ntk", "factor": 2.0, "original_length": 64},
    "dynamic_theta": {"variant": "dynamic_ntk", "factor": 8.0, "original_length": 64, "theta": 500_000.0},
    "yarn": {"variant": "yarn", "factor": 4.0, "original_length": 256},
    "yarn_not_truncated": {"variant": "yarn", "factor": 16.0, "original_length": 2048, "truncate": False},
    "yarn_ramp": {"variant": "yarn", "factor": 40.0, "original_length": 64, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn_mscale": {"variant": "yarn", "factor": 40.0, "original_length": 512, "mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn_attention": {"variant": "yarn", "factor": 8.0, "original_length": 512, "attention_factor": 1.3},
    "yarn_tiny": {"variant": "yarn", "factor": 2.0, "original_length": 4},
    "longrope": {"variant": "longrope", "factor": 8.0, "original_length": 128, **LISTS},
    "longrope_attention": {"variant": "longrope", "original_length": 128, **LISTS, "attention_factor": 1.1},
    "llama3": {"variant": "llama3", "factor": 8.0, "original_length": 256, "theta": 500_000.0},
    "llama3_bounds": {"variant": "llama3", "original_length": 64, "low_freq_factor": 2.0, "high_freq_factor": 16.0},
    "proportional": {"variant": "p_rope", "fraction": 0.3},
    "proportional_whole": {"variant": "p_rope", "fraction": 1.0},
}


def built(case, max_seq_len=4096) -> RotaryEmbedding:
    config = load(FAMILIES["rope"].Config, CASES[case])
    return config.build(head_dim=2 * PAIRS, max_seq_len=max_seq_len)


def oracle(rope, length):
    parameters = to_rope_parameters(rope)
    shown = rope.original_length if parameters["rope_type"] == "dynamic" else rope.max_seq_len
    config = Qwen3MoeConfig(
        rope_parameters=dict(parameters),
        rope_theta=parameters["rope_theta"],
        head_dim=rope.head_dim,
        max_position_embeddings=shown,
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU, seq_len=length)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 1000, 4096])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_attention_factor_equal_those_of_transformers(case, length):
    rope = built(case)
    expected_P, attention_factor = oracle(rope, length)
    torch.testing.assert_close(rope.frequencies(CPU, length), expected_P, atol=1e-6, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(attention_factor, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_transformers_parameters_are_read_back_alike(case):
    rope = built(case)
    parameters = to_rope_parameters(rope)
    shown = rope.original_length if parameters["rope_type"] == "dynamic" else rope.max_seq_len
    for key in ("rope_parameters", "rope_scaling"):
        values = {key: parameters, "rope_theta": parameters["rope_theta"], "max_position_embeddings": shown}
        config, max_seq_len = from_rope_parameters(values)
        again = config.build(head_dim=rope.head_dim, max_seq_len=max_seq_len)
        assert type(again) is type(rope) and again.attention_factor == rope.attention_factor
        for length in (32, 300):
            assert torch.equal(again.frequencies(CPU, length), rope.frequencies(CPU, length))
