"""deploy/: every file is read, and names only metrics, settings and flags that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from moe_serve import __version__
from moe_serve.cli import parse
from moe_serve.cli.config_file import read_config
from moe_serve.config import EngineConfig, ParallelConfig, ServerConfig
from moe_serve.server.endpoints import probes

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
CONFIGS = (EngineConfig, ServerConfig, ParallelConfig)
CHART = DEPLOY / "helm" / "moe-serve"
TEMPLATES = "\n".join(path.read_text() for path in sorted((CHART / "templates").iterdir()))
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


def chart_file(name: str) -> Any:
    return yaml.safe_load((CHART / name).read_text())


def leaves(values: dict[str, Any], before: str = "") -> set[str]:
    """Dotted names of settings; `config` and other free parts count as one."""
    found = set()
    for name, value in values.items():
        is_part = isinstance(value, dict) and value and name not in ("config", "resources")
        found |= leaves(value, f"{before}{name}.") if is_part else {before + name}
    return found


def named_in_templates() -> set[str]:
    """Names after `.Values`, and those of a secret, which templates read through `with`."""
    direct = set(re.findall(r"\.Values\.([\w.]+)", TEMPLATES))
    parts = re.findall(
        r"with \.Values\.(apiKey|huggingFace) \}\}(.*?)\n            \{\{- end \}\}\n", TEMPLATES, re.DOTALL
    )
    return direct | {f"{part}.{name}" for part, body in parts for name in re.findall(r" \.(\w+)", body)}


def test_the_charts_templates_and_settings_name_one_another() -> None:
    values = chart_file("values.yaml")
    assert leaves(values) - named_in_templates() == set()
    assert named_in_templates() - leaves(values) == {"apiKey", "huggingFace"}


def test_the_charts_schema_takes_its_settings_and_no_others() -> None:
    schema, values = json.loads((CHART / "values.schema.json").read_text()), chart_file("values.yaml")
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    assert set(schema["properties"]) == {*values, "global"}
    for wrong in ({"replica": 2}, {"config": {"port": 1}}, {"model": 1}, {"autoscaling": {"targetWaiting": 0}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_the_charts_server_is_ours(tmp_path: Path) -> None:
    """Its version, flags, probes, settings and the metric that it scales by."""
    assert chart_file("Chart.yaml")["appVersion"] == __version__
    settings = tmp_path / "serve.yaml"
    settings.write_text(yaml.safe_dump(chart_file("values.yaml")["config"] | {"host": "0.0.0.0", "port": 8000}))
    read = read_config(str(settings), *CONFIGS)
    assert f"containerPort: {read['port']}" in TEMPLATES
    assert f'"shutdown-timeout-s" | default {read["shutdown_timeout_s"]:.0f})' in TEMPLATES
    paths = set(re.findall(r"path: (/(?:health|live|metrics)\w*)$", TEMPLATES, re.M))
    assert paths == {"/health", "/live", "/metrics"} <= {getattr(route, "path", "") for route in probes.router.routes}
    (metric,) = re.findall(r"name: moe_serve_(\w+)$", TEMPLATES, re.M)
    assert f"moe_serve:{metric}" in known_metrics()
    assert f"name: {{as: moe_serve_{metric}}}" in (DEPLOY / "README.md").read_text()


def test_the_image_runs_as_the_charts_user() -> None:
    (user,) = re.findall(r"^USER (\d+)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert f"--uid {user} " in (DEPLOY / "Dockerfile").read_text()
    assert f"runAsUser: {user}\n" in TEMPLATES


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed here")
@pytest.mark.parametrize("more", [[], ["autoscaling.enabled=true", "serviceMonitor.enabled=true"]])
def test_helm_accepts_the_chart(more: list[str]) -> None:
    flags = [f"--set={setting}" for setting in ["apiKey.secretName=moe-serve", *more]]
    done = subprocess.run(["helm", "lint", "--strict", *flags, CHART], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
