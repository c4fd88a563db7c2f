"""The oracle: Qwen3MoeForCausalLM of transformers, another implementation of the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blues import config as cfg
from blues.data.tokenizer import Tokenizer
from blues.errors import CheckpointError, ConfigError
from blues.model.huggingface import export_huggingface, from_huggingface, import_huggingface, to_huggingface
from blues.model.moe.routing import Router
from blues.model.rope import PlainRotary
from blues.model.transformer import Transformer
from tests.model.attention.patterns import ALL, name_of
from tests.model.examples import lively, small, tokens

TINY_TOKENIZER = Tokenizer(Tokenizer.Config(vocab_size=300))


UNIFORM = [{config.build().for_layer(layer).window() for layer in range(2)} for config in ALL]
WINDOWS = [config for config, windows in zip(ALL, UNIFORM, strict=True) if len(windows - {None}) == len(windows) == 1]


def oracle_of(model, **changes):
    """Qwen3MoeForCausalLM with the weights of `model`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config, state = to_huggingface(model.config, model.state_dict(), fused_experts=True)
    hf_config = Qwen3MoeConfig(**config, attn_implementation="eager", experts_implementation="eager", **changes)
    oracle = Qwen3MoeForCausalLM(hf_config)
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    oracle.tie_weights()
    return oracle.eval()


def assert_equals_oracle(model, ids):
    """Logits, loss and every gradient, in float32, to 1e-5 (absolutely, and relative to each gradient's length)."""
    model.eval()
    oracle = oracle_of(model)
    torch.testing.assert_close(model(ids).logits_BTV, oracle(ids).logits, atol=1e-5, rtol=1e-5)
    unweighted = {"moe.load_balancing_weight": 0.0, "moe.router_z_weight": 0.0} if model.config.moe else {}
    plain = Transformer(model.config.override(unweighted)).eval()
    plain.load_state_dict(model.state_dict())
    loss, oracle_loss = plain(ids[:, :-1], ids[:, 1:]).losses.total, oracle(ids, labels=ids).loss
    torch.testing.assert_close(loss, oracle_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    oracle_loss.backward()
    grads = {name: p.grad for name, p in plain.named_parameters() if "noise_weight" not in name}
    _, ours = to_huggingface(plain.config, grads, fused_experts=True)
    theirs = {name: p.grad for name, p in oracle.named_parameters()}
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert (ours[name] - expected).norm() <= 1e-5 * expected.norm(), name


SHAPES = {
    "alternating": {},
    "every_layer": {"moe__every": 1},
    "untied": {"tie_embeddings": False},
    "gqa": {"attention__num_kv_heads": 2, "attention__rope__theta": 777.0},
    "switch": {"moe__top_k": 1, "moe__router": "softmax_top_k"},
    "probabilities": {"moe__router": {"variant": "softmax_top_k", "renormalize": False}},
    "dense": {"moe": None},
    "window": {"attention__pattern": {"variant": "sliding_window", "window": 5}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_those_of_qwen3_moe(shape):
    model = lively(small(**SHAPES[shape]).build())
    assert_equals_oracle(model, tokens(model, batch=3, length=20))


def test_they_are_equal_when_experts_receive_no_token():
    model = lively(small(moe__num_experts=8).build())
    with torch.no_grad():  # channel 0 is positive in every token, no layer writes to it, and expert 5 hates it
        model.embedding.weight[:, 0] = 3.0
        for name, parameter in model.named_parameters():
            if name.endswith(("output.weight", "down.weight")):
                parameter[0] = 0.0
            elif name.endswith("down_EDF"):
                parameter[:, 0] = 0.0
            elif name.endswith("feed_forward_norm.weight"):
                parameter[0] = 3.0
            elif name.endswith("router.weight"):
                parameter[5] = 0.0
                parameter[5, 0] = -9.0
    ids = tokens(model, batch=3, length=20)
    for routing in model.eval()(ids).routing:
        assert 5 not in routing.ids_TK
    assert_equals_oracle(model, ids)


def test_they_are_equal_when_most_experts_receive_no_token():
    """Two tokens of two experts each: at least four of the eight experts are idle."""
    model = lively(small(moe__num_experts=8).build())
    assert_equals_oracle(model, tokens(model, batch=1, length=2))


def test_our_fast_and_naive_paths_face_the_same_oracle():
    for dispatch in ("naive", "grouped_mm"):
        model = lively(small(moe__dispatch=dispatch, attention__backend="naive", cross_entropy="naive").build())
        assert_equals_oracle(model, tokens(model))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_gives_the_same_model(shape, fused):
    model = lively(small(**SHAPES[shape]).build()).eval()
    config, state = from_huggingface(*to_huggingface(model.config, model.state_dict(), fused_experts=fused))
    again = Transformer(config).eval()
    again.load_state_dict(state)
    ids = tokens(model)
    assert torch.equal(again(ids).logits_BTV, model(ids).logits_BTV)
    if config.moe is not None:
        config = config.override({"moe.router": cfg.dump(model.config.moe.router)})
    assert config == model.config


ROPES = {
    "linear": {"variant": "linear", "factor": 4.0},
    "ntk": {"variant": "ntk", "factor": 4.0},
    "dynamic_ntk": {"variant": "dynamic_ntk", "factor": 4.0, "original_length": 16},
    "yarn": {"variant": "yarn", "factor": 4.0, "original_length": 16},
    "longrope": {"variant": "longrope", "factor": 4.0, "original_length": 16, "long_factor": [1.0, 1.5, 2.5, 4.0]},
    "llama3": {"variant": "llama3", "factor": 4.0, "original_length": 16},
    "base_change": {"variant": "base_change", "theta": 50_000.0},
    "p_rope": {"variant": "p_rope", "fraction": 0.5},
}


@pytest.mark.parametrize("length", [12, 24])
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_that_transformers_knows_gives_the_same_logits_there_and_back(rope, length):
    """At a length within the original context, and beyond it."""
    model = lively(small(attention__rope=ROPES[rope]).build()).eval()
    ids = tokens(model, length=length)
    logits = model(ids).logits_BTV
    torch.testing.assert_close(logits, oracle_of(model)(ids).logits, atol=1e-5, rtol=1e-5)
    plain = Transformer(model.config.replace(attention=model.config.attention.replace(rope=PlainRotary.Config())))
    plain.load_state_dict(model.state_dict())
    if length > 16:
        assert not torch.allclose(plain.eval()(ids).logits_BTV, logits, atol=1e-2), "the rope makes no difference"
    config, state = from_huggingface(*to_huggingface(model.config, model.state_dict()))
    assert config.max_seq_len == model.config.max_seq_len
    again = Transformer(config).eval()
    again.load_state_dict(state)
    torch.testing.assert_close(again(ids).logits_BTV, logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention__rope": "nope"}, "attention.rope=nope"),
        ({"attention__rope": {"variant": "resonance", "of": "yarn"}}, "attention.rope=resonance"),
        ({"attention__rope_layers": "RRRN"}, "attention.rope_layers=RRRN"),
    ],
)
def test_rotations_that_qwen3_moe_does_not_know_are_refused(changes, message):
    model = small(**changes).build()
    with pytest.raises(ConfigError, match=f"{message}: Qwen3-MoE cannot express it"):
        to_huggingface(model.config, model.state_dict())


def exported(tmp_path, dtype=torch.float32, **changes):
    model = lively(small(vocab_size=320, **changes).build()).to(dtype).eval()
    return model, export_huggingface(model, TINY_TOKENIZER, tmp_path / "hf")


@pytest.mark.parametrize("shape", ["alternating", "untied", "dense"])
def test_auto_classes_load_the_export_with_the_same_logits_and_ids(tmp_path, shape):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, directory = exported(tmp_path, **SHAPES[shape])
    loaded, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert type(loaded).__name__ == "Qwen3MoeForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "def f(x):\n    return 'naïve 你好 🙂'  # 12345\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == TINY_TOKENIZER.encode(text) and tokenizer.decode(ids[0]) == text
    assert tokenizer.eos_token_id == TINY_TOKENIZER.eot_id == loaded.generation_config.eos_token_id
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits_BTV, atol=1e-5, rtol=1e-5)
    greedy = loaded.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, model(expected).logits_BTV[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy, expected)


def test_an_export_is_read_back_exactly_with_its_tokenizer(tmp_path):
    model, directory = exported(tmp_path, dtype=torch.bfloat16)
    imported = import_huggingface(directory)
    assert imported.tokenizer == TINY_TOKENIZER.config
    assert imported.state["embedding.weight"].dtype == torch.bfloat16
    ours = {name: tensor for name, tensor in model.state_dict().items() if "noise_weight" not in name}
    assert set(ours) == set(imported.state)
    assert all(torch.equal(ours[name], imported.state[name]) for name in ours)
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_transformers_saves_is_read_too(tmp_path):
    """Written by another program, in several files."""
    model = lively(small().build()).eval()
    oracle_of(model).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    imported = import_huggingface(tmp_path)
    again = Transformer(imported.config).eval()
    again.load_state_dict(imported.state)
    ids = tokens(model)
    torch.testing.assert_close(again(ids).logits_BTV, model(ids).logits_BTV)
    assert imported.tokenizer is None


def test_files_name_one_matrix_per_expert_as_serving_engines_expect(tmp_path):
    _, directory = exported(tmp_path)
    state = load_file(directory / "model.safetensors")
    assert state["model.layers.1.mlp.experts.3.gate_proj.weight"].shape == (24, 32)
    assert state["model.layers.1.mlp.gate.weight"].shape == (4, 32)
    assert "lm_head.weight" not in state and not any("noise" in name for name in state)


def test_an_export_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model, directory = exported(tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        export_huggingface(model, TINY_TOKENIZER, directory)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("blues.model.huggingface.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_huggingface(model, TINY_TOKENIZER, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_qwen3_moe_cannot_express_is_refused_with_the_reason(tmp_path):
    model = small(attention__qk_norm=False, vocab_size=320).build()
    with pytest.raises(ConfigError, match="attention.qk_norm=false.*cannot express"):
        export_huggingface(model, TINY_TOKENIZER, tmp_path / "hf")
    with pytest.raises(ConfigError, match="vocab_size: 97 rows are too few for a tokenizer of 300"):
        export_huggingface(small().build(), TINY_TOKENIZER, tmp_path / "hf")


@pytest.mark.parametrize("variant", sorted({*Router.variants} - {"noisy_top_k", "softmax_top_k"}))
@pytest.mark.filterwarnings("ignore:moe.router=expert_choice")
def test_routers_that_qwen3_moe_does_not_know_are_refused(variant):
    model = small(moe__router=variant).build()
    with pytest.raises(ConfigError, match=f"moe.router={variant}: Qwen3-MoE cannot express it"):
        to_huggingface(model.config, model.state_dict())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("moe.shared_experts", "plain"),
        ("moe.null_experts", "zero_copy_constant"),
        ("moe.rules", ["skip_light"]),
        ("depth", "early_exit"),
        ("depth", "mixture_of_depths"),
    ],
)
def test_options_that_qwen3_moe_does_not_know_are_refused(path, value):
    config = small().override({path: value})
    with pytest.raises(ConfigError, match=f"{path}.*: Qwen3-MoE cannot express it"):
        to_huggingface(config, config.build().state_dict())


@pytest.mark.parametrize("config", [config for config in ALL if config not in WINDOWS], ids=name_of)
def test_patterns_that_qwen3_moe_does_not_know_are_refused(config):
    config = small().replace(attention=small().attention.replace(pattern=config))
    with pytest.raises(ConfigError, match=f"attention.pattern={config.attention.pattern._variant}: Qwen3-MoE cannot"):
        to_huggingface(config, config.build().state_dict())


@pytest.mark.parametrize("config", WINDOWS, ids=name_of)
def test_windows_survive_the_journey(config):
    config = small().replace(attention=small().attention.replace(pattern=config))
    model = lively(config.build()).eval()
    back, state = from_huggingface(*to_huggingface(config, model.state_dict()))
    other = back.build().eval()
    other.load_state_dict(state)
    assert torch.equal(other(tokens(model)).logits_BTV, model(tokens(model)).logits_BTV)


def test_layers_of_different_numbers_of_experts_are_refused():
    model = small(experts_per_layer=[4, 3]).build()
    with pytest.raises(ConfigError, match=r"experts_per_layer=\[4, 3\]: Qwen3-MoE cannot express it"):
        to_huggingface(model.config, model.state_dict())


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("renormalize", [True, False])
def test_probabilities_that_are_not_renormalized_survive_the_journey(top_k, renormalize):
    router = {"variant": "softmax_top_k", "renormalize": renormalize, "jitter": 0.1}
    model = lively(small(moe__top_k=top_k, moe__router=router).build()).eval()
    config, state = to_huggingface(model.config, model.state_dict())
    assert config["norm_topk_prob"] == (renormalize and top_k > 1)
    back = from_huggingface(config, state)[0].build()
    back.load_state_dict(from_huggingface(config, state)[1])
    ids = tokens(model)
    assert torch.equal(back.eval()(ids).logits_BTV, model(ids).logits_BTV)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob=True"),
        ({"rope_parameters": {"rope_type": "axial", "factor": 2.0}}, "rope_type='axial'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, "factor: .* 1 .* or more, got 0.5"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"hidden_size": None}, "dim"),
    ],
)
def test_configurations_of_another_kind_are_refused(change, message):
    config, state = to_huggingface(small().build().config, small().build().state_dict())
    with pytest.raises(ConfigError, match=message):
        from_huggingface(config | change, state)
    del config["vocab_size"]
    with pytest.raises(ConfigError, match="lacks 'vocab_size'"):
        from_huggingface(config, state)


def test_damaged_directories_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        import_huggingface(tmp_path)
    _, directory = exported(tmp_path)
    weights = directory / "model.safetensors"
    state = load_file(weights)
    for change, message in (
        ({"model.norm.weight": None}, "lack 'model.norm.weight'"),
        ({"model.norm.weight": torch.zeros(5)}, r"norm.weight.*\(5,\).*\(32,\)"),
        ({"extra": torch.zeros(5)}, "'extra'"),
    ):
        changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        save_file(changed, weights)
        with pytest.raises(CheckpointError, match=message):
            import_huggingface(directory)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        import_huggingface(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        import_huggingface(directory)
