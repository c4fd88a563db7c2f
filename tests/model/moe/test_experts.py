import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.experts import Experts
from blues.model.moe.routing import choose


def make(dispatch):
    sizes = {"dim": 8, "ffn_dim": 16, "num_experts": 4, "std": 0.3, "output_std": 0.3}
    return Experts(dispatch=dispatch, generator=torch.Generator().manual_seed(0), **sizes)


def test_the_dispatch_of_the_configuration_is_the_one_that_runs():
    logits, x = torch.randn(6, 4), torch.randn(6, 8)
    routing = choose(logits, logits, 2)
    outputs = [make(dispatch)(x, routing) for dispatch in ("auto", "naive", "sorted", "grouped_mm")]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    with pytest.raises(ConfigError, match="dispatch"):
        make("grouped_mm").double()(x.double(), routing)
