"""The cluster files say what their systems understand, and a typo in them would be found."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT.parent / "shared" / "data" / "schemas"
CLUSTER = ROOT / "cluster"
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=Loader)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


# --- KubeRay


def strict(schema: Any) -> Any:
    """A CRD's openAPIV3Schema as a JSON Schema that refuses unknown fields, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {
        key: strict(value)
        for key, value in schema.items()
        if key not in ("description", "default", "format") and not key.startswith("x-kubernetes-")
    }
    if "properties" in schema and isinstance(schema["properties"], Mapping):
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


def crd(name: str, version: str) -> Any:
    path = SCHEMAS / name
    if not path.exists():
        pytest.skip(f"no CRD schemas at {SCHEMAS}")
    versions = {v["name"]: v["schema"]["openAPIV3Schema"] for v in read(path)["spec"]["versions"]}
    # Checking the schema itself, as jsonschema.validate does at every call, takes seconds for 30,000 lines of it.
    return jsonschema.Draft202012Validator(strict(versions[version]))


@pytest.fixture(scope="module")
def ray_jobs() -> Any:
    return crd("ray.io_rayjobs.yaml", "v1")


@pytest.fixture
def ray_job() -> Any:
    return read(CLUSTER / "kuberay.yaml")


def test_the_ray_job_is_one_that_kuberay_accepts(ray_job: Any, ray_jobs: Any) -> None:
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    ray_jobs.validate(ray_job)


def test_its_cluster_is_one_that_kuberay_accepts_alone(ray_job: Any) -> None:
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "x"},
        "spec": ray_job["spec"]["rayClusterSpec"],
    }
    crd("ray.io_rayclusters.yaml", "v1").validate(cluster)


def rename(tree: Any, path: list[Any], new: str) -> Any:
    """A copy with the last key of `path` renamed."""
    tree = copy.deepcopy(tree)
    place = tree
    for part in path[:-1]:
        place = place[part]
    place[new] = place.pop(path[-1])
    return tree


@pytest.mark.parametrize(
    ("path", "typo"),
    [
        (["spec", "entrypoint"], "entryPoint"),
        (["spec", "rayClusterSpec", "authOptions"], "authOption"),
        (["spec", "rayClusterSpec", "headGroupSpec", "template"], "templates"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"], "replica"),
        (
            ["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMounts"],
            "volumeMount",
        ),
        (
            [
                "spec",
                "rayClusterSpec",
                "workerGroupSpecs",
                0,
                "template",
                "spec",
                "containers",
                0,
                "resources",
                "limits",
            ],
            "limit",
        ),
    ],
)
def test_a_planted_typo_is_found(ray_job: Any, ray_jobs: Any, path: list[Any], typo: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=typo):
        ray_jobs.validate(rename(ray_job, path, typo))


def test_a_value_of_the_wrong_type_is_found(ray_job: Any, ray_jobs: Any) -> None:
    ray_job["spec"]["backoffLimit"] = "2"
    with pytest.raises(jsonschema.ValidationError, match="integer"):
        ray_jobs.validate(ray_job)


def test_the_ray_job_runs_the_pinned_ray_with_a_token_and_a_script_that_exists(ray_job: Any) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pins()["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    script = ray_job["spec"]["entrypoint"].split()[1]
    assert (ROOT / Path(script).relative_to("/opt/portllm")).is_file()


def test_every_mounted_volume_is_defined(ray_job: Any) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


# --- ray up


def validate_for_ray_up(config: Any) -> None:
    """What `ray up` does before it talks to a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_up_accepts_the_cluster() -> None:
    validate_for_ray_up(read(ROOT / "ray_config.yaml"))


@pytest.mark.parametrize(
    ("path", "typo"),
    [
        (["idle_timeout_minutes"], "idle_timeout_minuts"),
        (["auth", "ssh_user"], "ssh_usr"),
        (["docker", "pull_before_run"], "pull_befor_run"),
        (["available_node_types", "gpu", "max_workers"], "max_worker"),
    ],
)
def test_ray_up_finds_a_planted_typo(path: list[Any], typo: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=typo):
        validate_for_ray_up(rename(read(ROOT / "ray_config.yaml"), path, typo))


def test_gpu_workers_are_spot_and_the_head_is_not() -> None:
    types = read(ROOT / "ray_config.yaml")["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "scheduling" not in types["head"]["node_config"]


# --- Slurm


def ray_help(*command: str) -> str:
    ray = Path(sys.executable).with_name("ray")
    return subprocess.run([ray, *command, "--help"], capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_slurm_script_is_bash_and_its_ray_options_exist() -> None:
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    call = re.search(r"ray symmetric-run (.*?)-- python (\S+)", script.read_text(), re.DOTALL)
    assert call is not None and (ROOT / call[2]).is_file()
    known = ray_help("symmetric-run") + ray_help("start")
    options = re.findall(r"--[a-z-]+", call[1])
    assert options == ["--address", "--min-nodes", "--num-cpus", "--num-gpus"]
    assert all(re.search(rf"{option}\b", known) for option in options)


def test_the_slurm_wait_is_one_that_ray_reads() -> None:
    from ray.scripts import symmetric_run

    name = "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"
    assert name in Path(symmetric_run.__file__).read_text() and name in (CLUSTER / "slurm.sh").read_text()


def test_on_slurm_every_node_runs_the_study_at_the_head_with_one_token(tmp_path: Path) -> None:
    """Slurm's commands and Ray's replaced by ones that say how they were called."""
    commands = {
        "scontrol": 'printf "node1\\nnode2\\n"',
        "srun": 'echo "$*" >> srun.log; while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "hostname": "echo 10.0.0.7 fe80::1",
        "ray": 'echo "ray $* wait=$RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT mode=$RAY_AUTH_MODE '
        'token=${#RAY_AUTH_TOKEN}"',
    }
    bin_ = tmp_path / "venv" / "bin"
    bin_.mkdir(parents=True)
    for name, body in commands.items():
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "41234",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "1",
        "VENV": "venv",
    }
    said = subprocess.run(
        ["bash", CLUSTER / "slurm.sh", "my study.yaml", "--store", "/scratch/store"],
        cwd=tmp_path,
        env=os.environ | slurm,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == (
        "ray symmetric-run --address 10.0.0.7:21234 --min-nodes 2 --num-cpus 16 --num-gpus 1 "
        "-- python jobs/ray_job.py my study.yaml --store /scratch/store wait=600 mode=token token=64\n"
    )
    assert "--cpus-per-task=16 ray symmetric-run" in (tmp_path / "srun.log").read_text()


def test_the_slurm_script_without_a_study_says_how_to_call_it() -> None:
    ended = subprocess.run(["bash", CLUSTER / "slurm.sh"], capture_output=True, text=True)
    assert ended.returncode == 2 and "usage: sbatch cluster/slurm.sh STUDY" in ended.stderr


# --- compose

SERVICE_KEYS = {
    "build",
    "command",
    "depends_on",
    "entrypoint",
    "environment",
    "healthcheck",
    "image",
    "ports",
    "restart",
    "volumes",
}
"""The keys of the Compose specification that this file uses; anything else is a typo or wants a test here."""
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}


def compose_problems(compose: Mapping[str, Any]) -> list[str]:
    """What is wrong with a compose file by the rules of the specification that it touches."""
    found = [f"unknown key {key}" for key in compose.keys() - {"name", "services", "volumes"}]
    for name, service in compose["services"].items():
        found += [f"{name}: unknown key {key}" for key in service.keys() - SERVICE_KEYS]
        health = service.get("healthcheck", {}).keys() - HEALTH_KEYS
        found += [f"{name}: unknown key healthcheck.{key}" for key in health]
        if not {"image", "build"} & service.keys():
            found.append(f"{name}: neither image nor build")
        if service.get("restart", "no") not in ("no", "always", "on-failure", "unless-stopped"):
            found.append(f"{name}: restart: {service['restart']}")
        for volume in service.get("volumes", []):
            if volume.split(":")[0] not in compose.get("volumes", {}):
                found.append(f"{name}: volume {volume} is not defined")
        for other, how in service.get("depends_on", {}).items():
            target = compose["services"].get(other)
            if target is None:
                found.append(f"{name}: waits for {other}, which is not defined")
            elif how["condition"] == "service_healthy" and "healthcheck" not in target:
                found.append(f"{name}: waits for {other}, which has no healthcheck")
    return found


@pytest.fixture
def compose() -> Any:
    return read(CLUSTER / "compose.yaml")


def test_the_compose_file_keeps_the_rules(compose: Any) -> None:
    assert compose_problems(compose) == []


@pytest.mark.parametrize(
    ("path", "typo", "problem"),
    [
        (["services", "mlflow", "depends_on"], "depend_on", "mlflow: unknown key depend_on"),
        (["services", "postgres", "healthcheck", "retries"], "retry", "postgres: unknown key healthcheck.retry"),
        (["services", "postgres", "healthcheck"], "health", "mlflow: waits for postgres, which has no healthcheck"),
        (["services", "objects"], "object", "bucket: waits for objects, which is not defined"),
        (["volumes", "database"], "databse", "postgres: volume database:/var/lib/postgresql/data is not defined"),
    ],
)
def test_a_typo_planted_in_the_compose_file_is_found(compose: Any, path: list[Any], typo: str, problem: str) -> None:
    assert problem in compose_problems(rename(compose, path, typo))


def test_the_compose_file_holds_no_secret() -> None:
    text = (CLUSTER / "compose.yaml").read_text()
    for name, value in re.findall(r"^\s*(\w*(?:PASSWORD|SECRET)\w*):\s*(\S.*)$", text, re.MULTILINE):
        assert value.startswith("${"), name
    assert re.findall(r"://\w+:(?!\$\{)\S+@", text) == []


def test_the_tracking_server_is_the_clients_version(compose: Any) -> None:
    assert f"mlflow=={pins()['mlflow']} " in compose["services"]["mlflow"]["build"]["dockerfile_inline"]


def test_the_tracking_servers_options_exist(compose: Any) -> None:
    mlflow = Path(sys.executable).with_name("mlflow")
    known = subprocess.run([mlflow, "server", "--help"], capture_output=True, text=True, check=True, timeout=120).stdout
    options = re.findall(r"(?<= )--[a-z-]+", compose["services"]["mlflow"]["command"])
    assert len(options) == 6 and all(option in known for option in options)


def test_docker_compose_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("no docker with compose here")
    secrets = {"PORTLLM_DB_PASSWORD": "x", "PORTLLM_S3_PASSWORD": "y"}
    subprocess.run(
        [docker, "compose", "-f", CLUSTER / "compose.yaml", "config", "--quiet"], check=True, env=os.environ | secrets
    )


# --- the image


def test_the_image_copies_what_exists_and_builds_with_make_env() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    sources = [s for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for s in line.split()[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    assert "make env" in text
