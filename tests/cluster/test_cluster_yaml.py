"""cluster.yaml is what `ray up` accepts, after Ray has filled in its own defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.util import fill_node_type_min_max_workers, prepare_config, validate_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(config):
    prepared = prepare_config(config)
    validate_config(prepared)
    fill_node_type_min_max_workers(prepared)
    assert prepared["head_node_type"] == "head"


def test_a_misspelt_key_would_be_refused(config):
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config({**config, "idle_timeout_minute": 5}))


def test_workers_are_spot_first_and_on_demand_otherwise_and_come_and_go(config):
    types = config["available_node_types"]
    spot, on_demand = types["gpu_spot"], types["gpu_on_demand"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in on_demand["node_config"]
    assert spot["node_config"]["InstanceType"] == on_demand["node_config"]["InstanceType"]
    assert spot["priority"] > on_demand["priority"]
    assert {kind["min_workers"] for kind in types.values()} == {0} and config["idle_timeout_minutes"] <= 15
    assert types["head"]["max_workers"] == 0


def test_the_dashboard_is_reached_through_a_tunnel_and_a_token_alone(config):
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "RAY_AUTH_MODE=token" in start
    assert "RAY_AUTH_MODE=token" in " ".join(config["worker_start_ray_commands"])
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_one_ray_everywhere_and_it_is_a_release_that_blues_supports(config):
    pinned = set(re.findall(r"ray(?::|\[[^\]]*\]==)(\d+\.\d+\.\d+)", yaml.safe_dump(config)))
    assert len(pinned) == 1 and "latest" not in " ".join(config["setup_commands"])
    (version,) = pinned
    assert tuple(map(int, version.split(".")))[:2] >= (2, 59)
    assert version.rpartition(".")[0] == ray.__version__.rpartition(".")[0]
