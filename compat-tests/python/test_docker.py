"""What of docker/ can be checked without a Docker engine."""

import json
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from conftest import ROOT, RVLLM, run_to_exit

DOCKER = ROOT / "docker"
#: Base image (distroless/cc-debian12) and static busybox, unpacked.
BASE_BYTES = 35_000_000
MAX_IMAGE_BYTES = 200_000_000


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", "\n".join(
        line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def manifests() -> list[dict]:
    documents = []
    for path in sorted((DOCKER / "kubernetes").glob("*.yaml")):
        documents += [d for d in yaml.safe_load_all(path.read_text()) if d]
    return documents


def manifest(kind: str) -> dict:
    (found,) = [d for d in manifests() if d["kind"] == kind]
    return found


def test_everything_copied_exists_and_is_not_ignored():
    kept = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = []
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            copied += [word for word in shlex.split(rest)[:-1] if not word.startswith("--")]
    assert "src" in copied and "docker/python3" in copied
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path in kept, f"{path} is not in Dockerfile.dockerignore"


def test_the_build_copies_what_the_sources_embed():
    """Paths that Rust code includes from outside src must be in the build stage."""
    copied = [p for name, rest in instructions() if name == "COPY" for p in shlex.split(rest)[:-1]]
    embedded = set()
    for source in (ROOT / "src").rglob("*.rs"):
        code = source.read_text().split("#[cfg(test)]")[0]
        if source.name == "tests.rs" or "tests" in source.parts or source.name.endswith("_tests.rs"):
            continue
        for match in re.finditer(r"include_(?:bytes|str)!\(concat!\(env!\(\"CARGO_MANIFEST_DIR\"\), \"/([^\"]+)\"", code):
            embedded.add(match.group(1))
    assert any("demo-model" in path for path in embedded)
    for path in embedded:
        assert any(path.startswith(c) for c in copied), f"{path} is embedded and not copied"


def entrypoint() -> list[str]:
    (text,) = [rest for name, rest in instructions() if name == "ENTRYPOINT"]
    return json.loads(text)


@pytest.mark.parametrize("arguments", [
    ["demo"],
    ["--model", "demo"],
    ["demo", "--max-model-len", "512", "--gpu_memory_utilization", "0.5", "--host", "0.0.0.0"],
])
def test_the_entrypoint_takes_vllms_arguments(arguments):
    program, *first = entrypoint()
    assert program == "rvllm"
    result = run_to_exit(*first, *arguments, "--dry-run=json", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["model"]["name"] == "demo"


def test_the_python_shim_starts_the_server(tmp_path):
    (tmp_path / "rvllm").symlink_to(RVLLM)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def shim(*arguments: str) -> subprocess.CompletedProcess:
        command = ["sh", str(DOCKER / "python3"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=30)

    server = shim("-m", "vllm.entrypoints.openai.api_server", "--model", "demo", "--dry-run=json", "--device", "cpu")
    assert json.loads(server.stdout)["model"]["name"] == "demo", server.stderr
    assert shim("-m", "vllm.entrypoints.cli.main", "--version").stdout == run_to_exit("--version").stdout
    other = shim("-c", "print(1)")
    assert other.returncode == 127 and "no Python" in other.stderr


def test_the_image_has_what_manifests_for_vllm_expect():
    text = (DOCKER / "Dockerfile").read_text()
    for name in ["vllm", "sh", "bash", "sleep", "env"]:
        assert re.search(rf"\b{name}\b", text), name
    passwd = [line.split(":") for line in (DOCKER / "passwd").read_text().splitlines()]
    assert ["vllm", "2000", "0"] in [[p[0], p[2], p[3]] for p in passwd]


def test_compose_is_consistent():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert (DOCKER / services["rvllm"]["build"]["context"] / services["rvllm"]["build"]["dockerfile"]).exists()
    command = services["rvllm"]["command"]
    drain = int(command[command.index("--shutdown-timeout") + 1])
    assert int(services["rvllm"]["stop_grace_period"].removesuffix("s")) > drain
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DOCKER / source).exists(), source
    targets = yaml.safe_load((DOCKER / "monitoring/prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert targets[0]["targets"] == ["rvllm:8000"]
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
    assert set(gpu["services"]) <= set(services)


def test_the_deployment_drains_and_probes():
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = int(next(a.split("=")[1] for a in container["args"] if a.startswith("--shutdown-timeout=")))
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > drain + sleep
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"]:
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {manifest("PersistentVolumeClaim")["metadata"]["name"]}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Service")["spec"]["selector"].items() <= labels.items()
    assert manifest("Service")["spec"]["ports"][0]["targetPort"] in {p["name"] for p in container["ports"]}


def test_the_deployments_command_line_is_taken():
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    program, subcommand = container["command"]
    _, *flags = container["args"]
    assert program == "vllm"
    result = run_to_exit(subcommand, "demo", *flags, "--dry-run=json", "--dry-run-device-memory", "80G")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["server"]["shutdown_timeout_s"] == 45
    assert {f["here"] for f in plan["flags"]} == {"honoured"}


def test_the_dashboard_asks_for_metrics_that_there_are(demo, client):
    client.completions.create(model="demo", prompt="Hello", max_tokens=2)
    there = set(re.findall(r"^# TYPE (\S+) ", demo.get("/metrics").text, re.M))
    there |= {name + suffix for name in there for suffix in ["_bucket", "_sum", "_count"]}
    dashboard = json.loads((DOCKER / "monitoring/grafana/dashboards/rvllm.json").read_text())
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"vllm:\w+", target["expr"]))
    assert len(asked) > 10
    assert asked <= there, asked - there


def test_the_binary_leaves_the_image_small():
    binary = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "dist" / "rvllm"
    if not binary.exists():
        pytest.skip("cargo build --profile dist has not been run")
    assert binary.stat().st_size + BASE_BYTES < MAX_IMAGE_BYTES
