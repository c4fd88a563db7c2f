"""Devices, process groups, arithmetic, and what DeepSpeed is told."""

import pytest
import torch
import torch.distributed as dist

from blues.errors import ConfigError
from blues.training.optim import AdamW
from blues.training.parallel import Parallel, arithmetic, deepspeed_config
from blues.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("field", ["num_workers", "zero_stage", "cpus_per_worker"])
def test_bad_values_name_the_field(field):
    with pytest.raises(ConfigError, match=field):
        Parallel.Config(**{field: -1})


def test_a_batch_that_does_not_divide_names_one_that_does():
    with pytest.raises(ConfigError, match="global_batch_size 10 .* micro_batch_size 2 x parallel.num_workers 2.*: 8"):
        Trainer.Config(global_batch_size=10, micro_batch_size=2, parallel=Parallel.Config(num_workers=2))


def test_accumulation_is_what_is_left_of_the_batch():
    config = Trainer.Config(global_batch_size=24, micro_batch_size=2, parallel=Parallel.Config(num_workers=3))
    assert config.accumulation == 4 and isinstance(config.optimizer, AdamW.Config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without CUDA")
def test_cuda_that_is_not_there():
    with pytest.raises(ConfigError, match="finds 0 CUDA devices; use training.parallel.device=cpu"):
        Parallel.Config(device="cuda").build().device()
    assert Parallel.Config(device="auto").build().device() == CPU


def test_one_process_makes_its_own_group_and_leaves_it():
    with Parallel.Config(device="cpu", cpus_per_worker=1).build().join() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.device) == (0, 1, CPU)
        assert dist.is_initialized() and torch.get_num_threads() == 1
        assert ranks.any(True) and not ranks.any(False)
        assert ranks.from_first("step") == "step"
    assert not dist.is_initialized()


def test_another_number_of_processes_than_configured():
    with (
        pytest.raises(ConfigError, match="num_workers is 2 but 1 processes"),
        Parallel.Config(device="cpu", num_workers=2).build().join(),
    ):
        pass
    assert not dist.is_initialized()


def test_arithmetic_on_a_cpu():
    assert arithmetic("auto", 1, CPU) == torch.float32
    assert arithmetic("fp32", 0, CPU) == torch.float32
    assert arithmetic("bf16", 1, CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match="zero_stage=1"):
        arithmetic("bf16", 0, CPU)


def test_deepspeed_is_told_the_run():
    settings = deepspeed_config(
        zero_stage=2,
        dtype=torch.bfloat16,
        micro_batch_size=4,
        accumulation=3,
        gradient_clipping=0.5,
        num_parameters=1000,
    )
    assert settings["train_micro_batch_size_per_gpu"] == 4 and settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 2 and settings["zero_optimization"]["reduce_bucket_size"] == 1024
    assert settings["bf16"] == {"enabled": True} and settings["data_types"] == {"grad_accum_dtype": "fp32"}
