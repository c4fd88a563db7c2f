import copy
import logging
import pickle

import pytest
import torch

from blues.kernels.attention import attention_naive
from blues.model.attention.backends import Attend
from blues.model.attention.layer import View
from blues.model.attention.precision import Precision, overflow_metrics

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CAUSAL = View(None, None, None, True)


def tensors(scale):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 9, heads, 8, generator=generator) * scale for heads in (4, 1)] + [torch.ones(1, 9, 1, 8)]


def test_automatic_is_the_format_of_the_activations_where_the_device_has_it():
    precision = Precision()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert precision.dtype(dtype, CPU) == dtype
    assert precision.dtype(torch.float16, CPU) == torch.float32
    assert precision.dtype(torch.float16, CUDA) == torch.float16


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_format_is_that_format_on_every_device(name):
    for device in (CPU, CUDA):
        assert Precision(name).dtype(torch.float32, device) == getattr(torch, name)


def test_a_device_without_bfloat16_computes_it_in_float32(monkeypatch):
    monkeypatch.setattr("blues.model.attention.precision.capability_of", lambda device: (7, 5))
    assert Precision().dtype(torch.bfloat16, CUDA) == torch.float32
    precision = Precision()
    precision.watch(torch.tensor([torch.inf], dtype=torch.float16))
    precision.poll()
    assert precision.dtype(torch.float16, CUDA) == torch.float32


def test_scores_that_overflow_float16_move_the_layer_to_a_wider_format(caplog):
    """Scores of some 1e5 are infinite in float16, and small against each other in bfloat16 and float32."""
    q, k, v = tensors(scale=200.0)
    attend = Attend("naive", "float16", head_dim=8, num_heads=4, num_kv_heads=1)
    assert not attend(q, k, v, CAUSAL).isfinite().all()
    assert attend.precision.overflows == 0, "nothing changes within a forward"
    assert attend.precision.dtype(torch.float32, CPU) == torch.float16
    with caplog.at_level(logging.WARNING, logger="blues"):
        assert attend.precision.poll("layer 3")
    assert caplog.messages == [
        "attention of layer 3 overflowed in float16; it is computed in a wider format from now on"
    ]
    assert attend.precision.overflows == 1 and not attend.precision.poll()
    wider = attend(q, k, v, CAUSAL)
    assert wider.isfinite().all()
    torch.testing.assert_close(wider, attention_naive(q.bfloat16(), k.bfloat16(), v.bfloat16(), CAUSAL).float())


def test_scores_that_fit_stay_in_float16(caplog):
    q, k, v = tensors(scale=1.0)
    attend = Attend("naive", "float16", head_dim=8, num_heads=4, num_kv_heads=1)
    out = attend(q, k, v, CAUSAL)
    assert not attend.precision.poll() and attend.precision.overflows == 0 and not caplog.messages
    assert torch.equal(out, attention_naive(q.half(), k.half(), v.half(), CAUSAL).float())


def test_overflows_are_a_metric_where_there_is_float16():
    layers = [Precision("float16"), Precision("float16"), Precision()]
    assert overflow_metrics(layers) == {}
    for layer, value in zip(layers, (torch.inf, torch.inf), strict=False):
        layer.watch(torch.tensor([value], dtype=torch.float16))
    assert overflow_metrics(layers) == {"attention/float16_overflows": 0.0}
    for layer in layers:
        layer.poll()
    assert overflow_metrics(layers) == {"attention/float16_overflows": 2.0}


def test_every_overflow_is_counted_and_logged_once(caplog):
    precision = Precision("float16")
    with caplog.at_level(logging.WARNING, logger="blues"):
        for value in (torch.inf, torch.nan, 1.0):
            precision.watch(torch.tensor([value], dtype=torch.float16))
        precision.poll()
        precision.watch(torch.tensor([torch.inf], dtype=torch.float16))
        precision.poll()
    assert precision.overflows == 3 and len(caplog.messages) == 1


def test_other_formats_are_not_watched():
    precision = Precision()
    precision.watch(torch.tensor([torch.inf]))
    assert not precision.poll()


def test_a_layer_can_be_copied_and_pickled_while_a_note_is_under_way():
    precision = Precision("float16")
    precision.watch(torch.tensor([torch.inf], dtype=torch.float16))
    for copied in (copy.deepcopy(precision), pickle.loads(pickle.dumps(precision))):
        assert not copied.poll() and copied.wanted == "float16"
    assert precision.poll()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_nothing_waits_for_the_note():
    attend = Attend("naive", "float16", head_dim=8, num_heads=4, num_kv_heads=1)
    q, k, v = (x.to(CUDA) for x in tensors(scale=200.0))
    attend(q, k, v, CAUSAL)  # the first run loads kernels
    torch.cuda.synchronize()
    attend.precision.poll()
    assert attend.precision.overflows == 1
    attend.precision.overflows = 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, CAUSAL)
        attend.precision.poll()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    attend.precision.poll()
    assert attend.precision.overflows == 1, "noted once, whether it was seen before or after the device was done"
    assert attend(q, k, v, CAUSAL).isfinite().all()
