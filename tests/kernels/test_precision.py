import pytest
import torch

from blues.kernels.precision import at_least_float32, matmul_dtype


@pytest.mark.parametrize(
    ("given", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_at_least_float32_widens_and_never_narrows(given, wide):
    assert at_least_float32(torch.ones(2, dtype=given)).dtype == wide


def test_matmul_dtype_follows_autocast():
    x = torch.ones(2)
    assert matmul_dtype(x) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul_dtype(x) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert matmul_dtype(x) == torch.float32
