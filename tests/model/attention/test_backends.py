from blues.kernels.attention import attention_naive, attention_sdpa
from blues.model.attention.backends import attention_function, resolve


def test_the_choice_follows_the_configuration():
    assert resolve("auto") == resolve("sdpa") == "sdpa"
    assert attention_function("auto") is attention_sdpa
    assert attention_function("naive") is attention_naive
