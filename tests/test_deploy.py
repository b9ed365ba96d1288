"""deploy/: every file is read, and names only metrics, settings and flags that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_serve.cli import parse
from moe_serve.cli.config_file import read_config
from moe_serve.config import EngineConfig, ParallelConfig, ServerConfig

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
CONFIGS = (EngineConfig, ServerConfig, ParallelConfig)
METRIC = re.compile(r"\b(?:moe_serve:|process_)\w+")
SUFFIXES = r"_(?:total|bucket|sum|count)$"


def known_metrics() -> set[str]:
    """The names in docs/metrics.md, which tests/server/test_metrics.py compares with a server's answer."""
    rows = re.findall(r"^\| `(\w+)` \| (?:gauge|counter|histogram) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    return {name if name.startswith("process_") else f"moe_serve:{name}" for name in rows}


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((DEPLOY / "grafana/dashboards/moe-serve.json").read_text())
    known, asked = known_metrics(), set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = METRIC.findall(target["expr"])
            assert names, target
            asked |= set(names)
    assert len(asked) > 10
    assert {name for name in asked if name not in known and re.sub(SUFFIXES, "", name) not in known} == set()
    assert "moe_serve:nothing" not in known


def test_panels_do_not_lie_on_one_another() -> None:
    places = [p["gridPos"] for p in json.loads((DEPLOY / "grafana/dashboards/moe-serve.json").read_text())["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_the_settings_are_known() -> None:
    settings = read_config(str(DEPLOY / "serve.yaml"), *CONFIGS)
    assert ServerConfig.from_dict(settings).port == 8000


def test_compose_mounts_files_that_are_there() -> None:
    services: Any = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            assert not source.startswith(".") or (DEPLOY / source).exists(), source
    assert (DEPLOY / services["moe-serve"]["build"]["context"]).resolve() == ROOT
    words = shlex.split(re.sub(r"\$\{MODEL:-\}", "", services["moe-serve"]["command"]))
    assert parse(words).config == "/etc/moe-serve/serve.yaml"


def test_prometheus_asks_the_servers_port() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["moe-serve:8000"]


def test_grafana_finds_source_and_dashboard() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    board = json.loads((DEPLOY / "grafana/dashboards/moe-serve.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/moe-serve.yaml").read_text())["providers"]
    mounted = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounted


def test_the_images_command_is_one_of_ours() -> None:
    """And what it copies is there."""
    text = (DEPLOY / "Dockerfile").read_text()
    words = json.loads(re.findall(r"^CMD (\[.*\])$", text, re.M)[-1])
    assert parse(words).config == "/etc/moe-serve/serve.yaml"
    for source in re.findall(r"^COPY (?!--from)(\S+)", text, re.M):
        assert (ROOT / source).exists()


def test_the_units_command_is_one_of_ours() -> None:
    text = (DEPLOY / "moe-serve.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    assert parse(shlex.split(line)[1:]).config == "/etc/moe-serve/serve.yaml"
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert int(stop_s) > read_config(str(DEPLOY / "serve.yaml"), *CONFIGS)["shutdown_timeout_s"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """With an executable that exists, since verify looks for it."""
    unit = tmp_path / "moe-serve.service"
    text = (DEPLOY / "moe-serve.service").read_text()
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.M))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
