"""Expert parallelism changes no token: ranks under both launchers against transformers' `generate`.

One launch runs every combination of family, mode and placement, because starting ranks is what takes time.
As many ranks as MOE_SERVE_TEST_RANKS says, 2 by default.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve.hf.config_file import read_config
from moe_serve.spec import ModelSpec
from placement.cost import Layout
from placement.plan import make_plan, save_plan
from placement.problem import PlacementProblem
from placement.topology import Topology

from .references import NEW_TOKENS, Reference
from .serving import SMALL_ENGINE
from .tiny_configs import CASES

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]

PROGRAM = Path(__file__).with_name("rank_program.py")
ROOT = PROGRAM.parents[2]
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss")
"""Two and three choices, shared experts and a dense first layer, latent attention, sinks and windows."""
CONVENTIONAL, COHERENT = ({"ep_mode": mode} for mode in ("conventional", "coherent"))
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
RANKS = int(os.environ.get("MOE_SERVE_TEST_RANKS", "2"))
LAUNCH_S = 400 * RANKS


def launch(command: list[str], cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run the cases on all ranks; what rank 0 wrote."""
    job = folder / "job.json"
    job.write_text(json.dumps({"cases": cases, "output": str(folder / "out.json")}))
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_WAIT_POLICY": "passive"}
    environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1")
    subprocess.run([*command, str(PROGRAM), str(job)], env=environ, timeout=LAUNCH_S, check=True)
    results: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return results


def deepspeed(port: int) -> list[str]:
    """The DeepSpeed launcher for local ranks."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: distributed)")
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--master_port={port}", "--master_addr=127.0.0.1"]
    import base64

    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(RANKS))}).encode()).decode()
    return [*launcher, f"--world_info={world}", "--node_rank=0"]


def torchrun(port: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", f"--master-port={port}"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_plan(folder: Path, checkpoint: Path, seed: int, num_replicas: int) -> str:
    """A random uneven placement, with replicas if asked for."""
    spec = ModelSpec.from_hf(read_config(str(checkpoint)))
    dense = getattr(read_config(str(checkpoint)), "first_k_dense_replace", 0)
    layers = read_config(str(checkpoint)).num_hidden_layers - dense
    rng = np.random.default_rng(seed)
    shares = np.arange(RANKS + 1, 1, -1)
    device_of = rng.choice(RANKS, (layers, spec.num_experts), p=shares / shares.sum())
    replicas = [
        (layer, expert, (device_of[layer, expert] + 1) % RANKS)
        for layer in range(layers)
        for expert in rng.permutation(spec.num_experts)[:num_replicas]
    ]
    layout = Layout(device_of, np.array(replicas, np.int64).reshape(-1, 3))
    problem = PlacementProblem(
        np.ones((layers, spec.num_experts)),
        np.ones((layers - 1, spec.num_experts, spec.num_experts)),
        Topology.even(RANKS),
        slots=np.full(RANKS, spec.num_experts),
        spare_slots=num_replicas,
    )
    facts = {"solver": "random", "seed": seed, "seconds": 0.0}
    path = folder / f"{checkpoint.name}-{seed}-{num_replicas}.json"
    save_plan(make_plan(problem, layout, 0.0, "none", **facts), path)
    return str(path)


def variants(folder: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """Every mode and kind of placement; groups; a predictor that knows nothing; a cache smaller than the share."""
    planned = write_plan(folder, checkpoint, 0, 0)
    replicated = write_plan(folder, checkpoint, 1, 2)
    modes = (CONVENTIONAL, COHERENT)
    found: list[dict[str, Any]] = [
        {"parallel": {**mode, "expert_plan": plan}} for plan in (replicated, planned) for mode in modes
    ]
    found += [{"parallel": mode} for mode in (*modes, {**COHERENT, "ep_groups": 2})]
    found.append({"parallel": {**COHERENT, "expert_plan": planned}, "predictor_seed": 3})
    found.append({"parallel": {**CONVENTIONAL, "expert_plan": planned}, "predictor_seed": 4})
    found.append({"parallel": {**CONVENTIONAL, "expert_plan": planned}, "engine": {"moe_cache_mib": 1}})
    found.append({"parallel": {**COHERENT, "expert_plan": replicated}, "engine": {"moe_cache_mib": 1}})
    found.append({"parallel": CONVENTIONAL, "engine": {"num_kv_pages": 22, "block_size": 8}})
    return found


@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
@pytest.mark.slow
@pytest.mark.timeout(LAUNCH_S + 60)
def test_tokens_identical(
    launcher: Callable[[int], list[str]], checkpoint: Checkpoint, reference: References, tmp_path: Path
) -> None:
    cases = []
    for family in FAMILIES:
        chosen = variants(tmp_path, checkpoint(family))
        if launcher is torchrun:
            chosen = chosen[1:2]
        elif family != FAMILIES[0]:
            chosen = chosen[:4]
        for variant in chosen:
            engine = {**SMALL_ENGINE, "max_num_batched_tokens": 48, **variant.get("engine", {})}
            experts = ModelSpec.from_hf(read_config(str(checkpoint(family)))).num_experts
            settings: dict[str, Any] = {
                "folder": str(checkpoint(family)),
                "prompts": reference(family).prompts,
                "params": GREEDY,
            }
            settings["num_experts"] = experts
            cases.append({**settings, **variant, "engine": engine, "family": family})
    results = launch(launcher(free_port()), cases, tmp_path)
    wrong = [
        case
        for case, result in zip(cases, results, strict=True)
        if result["tokens"] != [list(tokens) for tokens in reference(case["family"]).outputs]
    ]
    assert not wrong, [{k: v for k, v in case.items() if k != "prompts"} for case in wrong]
    for case, result in zip(cases, results, strict=True):
        is_divided = case["parallel"].get("ep_groups", 1) < RANKS  # groups of one rank have nothing to say
        assert all((rank["combine_bytes"] > 0) == is_divided for rank in result["traffic"]), case["parallel"]


def test_cases_are_known() -> None:
    assert set(FAMILIES) <= set(CASES)
