import dataclasses
import json

import pytest
import torch

from blues.errors import ConfigError
from blues.kernels.attention import BACKENDS, attention_naive, dense_mask
from tuning.benchmarks.attention import GROUPS, SHAPES, Shape, benchmark, measure, shapes_of
from tuning.benchmarks.attention import shapes as shapes_module
from tuning.benchmarks.attention.shapes import Given
from tuning.benchmarks.bench import Bench
from tuning.benchmarks.record import Record

CPU = torch.device("cpu")
TINY = Shape(B=2, T=24, S=24, H=4, G=1, C=8)
WINDOW = dataclasses.replace(TINY, window=5)
DECODING = dataclasses.replace(TINY, T=1)


def run(tmp_path, *shapes, **changes):
    record = Record(tmp_path / "attention.json", {})
    measure(record, shapes, device=CPU, dtype=torch.float32, repeat=2, calls=2, **changes)
    return record


def test_every_backend_that_can_run_here_is_measured_and_the_others_say_why_not(tmp_path):
    record = run(tmp_path, TINY, WINDOW, DECODING)
    assert not record.failed
    for shape in (TINY, WINDOW, DECODING):
        own = {m.name: m for m in record.measurements if m.group == shape.name}
        assert set(own) == {"auto (sdpa)", *BACKENDS}
        assert len(own["sdpa_flash"].runs) == len(own["auto (sdpa)"].runs) == 2
        assert own["sdpa_cudnn"].skipped and "runs on CUDA, not on cpu" in own["sdpa_cudnn"].problem
        assert own["flex"].skipped == shape.trains
        assert ("ms with gradient" in own["naive"].runs[0]) == shape.trains
        assert ("growing ms" in own["naive"].runs[0]) != shape.trains and own["naive"].runs[0]["host ms"] > 0
        assert "growing ms" not in own["flex"].metrics, "it is compiled for every number of keys"
    saved = json.loads(record.path.read_text())
    assert len(saved["figures"]) == 3 and saved["groups"][TINY.name]["accelerator"] == "cpu"
    assert "auto (sdpa)" in record.table()


def test_a_backend_that_disagrees_or_fails_is_a_problem_and_not_a_figure(tmp_path, monkeypatch):
    wrong = lambda q, k, v, sight: attention_naive(q, k, v, sight) * 1.02
    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], attend=wrong))

    def failing(q, k, v, sight):
        raise RuntimeError("no kernel\nsecond line")

    monkeypatch.setitem(BACKENDS, "sdpa_math", dataclasses.replace(BACKENDS["sdpa_math"], attend=failing))
    record = run(tmp_path, TINY)
    problems = {m.name: m.problem for m in record.failed}
    assert set(problems) == {"sdpa_flash", "sdpa_math"}
    assert "disagrees with the naive backend" in problems["sdpa_flash"] and "0.02" in problems["sdpa_flash"]
    assert problems["sdpa_math"] == "RuntimeError: no kernel"


@pytest.mark.parametrize("shape", [TINY, WINDOW, DECODING])
def test_the_reference_in_pieces_is_the_whole_and_operations_are_counted_by_pairs(shape, monkeypatch):
    monkeypatch.setattr(shapes_module, "CHUNK", shape.scores // shape.T * 5)
    given = Given.draw(shape, CPU, torch.float32, seed=1)
    out = attention_naive(*given.inputs, shape.sight)
    expected = [out, *(torch.autograd.grad(out, given.inputs, given.dout_BTHC) if shape.trains else ())]
    for a, b in zip(given.expected, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    mask = dense_mask(shape.sight, shape.T, shape.S, CPU)
    pairs = shape.T * shape.S if mask is None else int(mask.sum())
    assert shape.flops == 4 * shape.B * shape.H * shape.C * pairs


def test_the_shapes_are_those_of_the_published_figures():
    assert [shape.name for shape in SHAPES] == [
        "causal, B=8 T=4096",
        "causal, B=1 T=32768",
        "window 1024, B=1 T=32768",
        "decoding, causal, B=1 T=1 after S=32768",
        "decoding, causal, B=64 T=1 after S=2048",
    ]


def test_growing_keys_are_new_to_every_backend(tmp_path, monkeypatch):
    seen = []

    def spy(q, k, v, sight):
        seen.append(k.shape[1])
        return attention_naive(q, k, v, sight)

    for name in ("naive", "sdpa_math"):
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], attend=spy))
    run(tmp_path, dataclasses.replace(DECODING, S=40))
    fresh = [keys for keys in seen if keys != 40]
    assert len(fresh) == len(set(fresh)) == 2 * 2 * 2, "rounds, backends, calls"


def test_groups_are_chosen_by_name():
    assert shapes_of(None) == list(SHAPES) and {shape.group for shape in SHAPES} == set(GROUPS)
    assert [shape.T for shape in shapes_of("decoding, window")] == [32768, 1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize(
    ("only", "calls", "said"),
    [
        (None, 20, "measured on a CUDA device, and torch finds none here"),
        ("decodng", 20, "unknown group 'decodng' in --only. Did you mean 'decoding'?"),
        (None, 0, "--calls must be at least 1, got 0"),
    ],
)
def test_what_a_person_gets_wrong_is_one_sentence(tmp_path, only, calls, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        benchmark(Bench(tmp_path, Record(tmp_path / "attention.json", {})), only, calls=calls)
