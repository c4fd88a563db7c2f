"""Offloaded activations: the same gradients to the last bit, fetched a block ahead, weights left where they are."""

from __future__ import annotations

import pytest
import torch

from blues.model.offload import Offload
from tests.model.examples import gradients, lively, small, tokens


def run(**changes):
    model = lively(small(**changes).build(seed=0)).train()
    ids = tokens(model, length=24)
    torch.manual_seed(5)
    output = model(ids[:, :-1], ids[:, 1:])
    output.losses.total.backward()
    return output.losses.total.detach(), gradients(model)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_are_the_same_to_the_last_bit(monkeypatch, gradient_checkpointing):
    monkeypatch.setattr("blues.model.offload.MIN_BYTES", 0)
    same = {"gradient_checkpointing": gradient_checkpointing}
    (loss, found), (expected_loss, expected) = (run(activation_offload=offload, **same) for offload in (True, False))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Recorder:
    """A transport that writes down what travels."""

    def __init__(self):
        self.events = []

    def store(self, x):
        self.events.append(("store", id(x)))
        return x.clone()

    def fetch(self, x):
        self.events.append(("fetch", id(x)))
        return x.clone(), None


def test_a_block_is_fetched_while_the_one_behind_it_computes():
    layers = [torch.nn.Linear(4, 4) for _ in range(4)]
    offload = Offload(torch.device("cpu"), min_bytes=0)
    offload._transport = recorder = Recorder()
    x = torch.randn(3, 4, requires_grad=True)
    y = x
    for layer in layers:
        with offload.block(layer):
            y = layer(y).tanh()
    stored = offload.counts().stored
    assert stored == len(recorder.events) == 8  # the input and the tanh of every layer: no weight among them
    y.sum().backward()
    counts = offload.counts()
    assert counts.prefetched + counts.late == stored, "everything travels back once"
    assert counts.late == 1, "only the first of all is waited for"
    assert counts.most_blocks == 2

    plain = x.detach().clone().requires_grad_()
    y = plain
    for layer in layers:
        y = layer(y).tanh()
    y.sum().backward()
    assert torch.equal(plain.grad, x.grad)


def test_a_graph_that_is_walked_twice_fetches_again():
    layer, offload = torch.nn.Linear(4, 4), Offload(torch.device("cpu"), min_bytes=0)
    x = torch.randn(3, 4, requires_grad=True)
    with offload.block(layer):
        y = layer(x).tanh().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x)[0], first)


def test_small_tensors_stay():
    layer, offload = torch.nn.Linear(4, 4), Offload(torch.device("cpu"))
    with offload.block(layer):
        layer(torch.randn(3, 4, requires_grad=True)).tanh()
    assert offload.counts().stored == 0


@pytest.mark.gpu
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_on_a_gpu_memory_falls_and_gradients_stay(gradient_checkpointing):
    from blues.training.memory import peak_bytes

    sizes = {"dim": 512, "num_layers": 8, "ffn_dim": 2048, "max_seq_len": 4096, "moe__ffn_dim": 1024}
    peaks, results = [], []
    for offload in (False, True):
        config = small(**sizes, gradient_checkpointing=gradient_checkpointing, activation_offload=offload)
        model = lively(config.build(seed=0), std=0.02).cuda().train()
        ids = tokens(model, length=4097).cuda()

        def step(model=model, ids=ids):
            model.zero_grad()
            torch.manual_seed(5)
            model(ids[:, :-1], ids[:, 1:]).losses.total.backward()

        step()
        peaks.append(peak_bytes(step, "cuda"))
        results.append(gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert peaks[1] < peaks[0] * (0.9 if gradient_checkpointing else 0.6)
