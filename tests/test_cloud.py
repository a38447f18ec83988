"""launch/cloud: checked against the schemas of Kubernetes and SkyPilot, and run here as two nodes on one machine.

What this does not show: a cluster, a cloud, GPUs.
"""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from partial_fc import checkpoint
from tests.conftest import REPOSITORY
from tests.test_doctor import free_port

CLOUD = REPOSITORY / "launch" / "cloud"
MANIFEST = (CLOUD / "kubernetes.yaml").read_text()
SERVICE, JOB = yaml.safe_load_all(MANIFEST)
# what the sed of its head makes of it
WITH_ALL = list(yaml.safe_load_all(re.sub("^(.*?)#(?:kueue|rdma) ", r"\1", MANIFEST, flags=re.MULTILINE)))[1]
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
TASK = yaml.safe_load((CLOUD / "skypilot.yaml").read_text())
SKYPILOT = "skypilot==0.14.1"
ON_A_CPU = ("run.epochs=null", "track.wandb=disabled", "evaluate.sets={}", "data.workers=0", "checkpoint.every=10")

# ---- Kubernetes


@pytest.mark.parametrize("version", ["1.31", None])
def test_kubernetes_takes_the_manifest(version):
    """The schemas of the oldest release that has all of it, and of the newest; nothing unknown in it."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="not run: kubernetes-validate is not installed")
    version = version or kubernetes.latest_version()
    for document in (SERVICE, JOB, WITH_ALL):
        kubernetes.validate(document, version, strict=True)
    wrong = copy.deepcopy(JOB)
    wrong["spec"]["podFailurePolicy"]["rules"][0]["onExitCode"] = {}
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(wrong, version, strict=True)


def variables() -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in CONTAINER["env"]}


def test_the_manifest_agrees_with_itself():
    job, service, nodes = JOB["metadata"]["name"], SERVICE["metadata"]["name"], variables()["NODES"]
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(nodes)
    assert JOB["spec"]["backoffLimit"] % int(nodes) == 0, "a failure counts once for each pod"
    port = SERVICE["spec"]["ports"][0]["port"]
    assert variables()["RENDEZVOUS"] == f"{job}-0.{service}:{port}" and POD["subdomain"] == service
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}
    assert int(variables()["PROCESSES"]) == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert int(variables()["GRACE"]) < POD["terminationGracePeriodSeconds"]
    assert {claim["name"] for claim in POD["volumes"]} == {mount["name"] for mount in CONTAINER["volumeMounts"]}
    user = re.search(r"^USER (\d+):\d+$", (REPOSITORY / "docker" / "Dockerfile").read_text(), re.MULTILINE).group(1)
    assert POD["securityContext"]["runAsUser"] == int(user)
    assert (REPOSITORY / CONTAINER["args"][0]).exists() and (REPOSITORY / CONTAINER["command"][1]).exists()


def test_the_lines_for_kueue_and_rdma():
    """Off as it stands, where a cluster may have neither; all of them on by the sed of the manifest's head."""
    job = copy.deepcopy(WITH_ALL)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert "labels" not in JOB["metadata"] and "suspend" not in JOB["spec"]
    assert job["metadata"].pop("labels") == {"kueue.x-k8s.io/queue-name": "user-queue"}
    assert job["spec"].pop("suspend") is True
    assert CONTAINER["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["capabilities"].pop("add") == ["IPC_LOCK"]
    assert container["resources"]["limits"].pop("rdma/hca_shared_devices_a") == 1
    added = [entry for entry in container["env"] if entry not in CONTAINER["env"]]
    assert [entry["name"] for entry in added] == ["NCCL_IB_HCA", "NCCL_DEBUG"]
    container["env"] = CONTAINER["env"]
    assert job == JOB  # and nothing else


def test_exit_codes_mean_the_same_everywhere():
    codes = dict(re.findall(r"^#   (\d+) +(.*)$", (CLOUD / "node.sh").read_text(), re.MULTILINE))
    assert set(codes) == {"0", "1", "64", "85"}
    rules = {
        code: rule["action"]
        for rule in JOB["spec"]["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert rules == {64: "FailJob", 85: "Ignore"}
    assert TASK["resources"]["job_recovery"]["recover_on_exit_codes"] == [85]


# ---- SkyPilot

ASK_SKYPILOT = """
import sys, sky, yaml
task = sky.Task.from_yaml(sys.argv[1])
print("nodes", task.num_nodes, "spot", [resources.use_spot for resources in task.resources])
wrong = yaml.safe_load(open(sys.argv[1])) | {"nodes": 2}
try:
    sky.Task.from_yaml_config(wrong)
except ValueError as error:
    print("refused", error)
"""


@pytest.mark.soak("sky")
@pytest.mark.timeout(1200)
def test_skypilot_takes_the_task(tmp_path):
    """SkyPilot itself reads it. It brings 60 packages, so it is installed for this test alone."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", SKYPILOT], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not run: {SKYPILOT} cannot be installed: {done.stderr[-200:]}")
    home = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [python, "-c", ASK_SKYPILOT, CLOUD / "skypilot.yaml"]
    done = subprocess.run(command, env=home, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "nodes 2 spot [True]" in done.stdout and "refused" in done.stdout, done.stdout + done.stderr
    shutil.rmtree(tmp_path / "venv")


# ---- what they run


def start(command: list[str], values: dict[str, str], log: Path) -> subprocess.Popen:
    """A node: this environment's python first on PATH, and no home of anybody else's."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HOME": str(log.parent)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=environment | values, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT
        )


def pods(run: Path, attempt: str, *overrides: str, nodes: Iterable[int] = range(2)) -> list[subprocess.Popen]:
    """Both pods of the manifest, with this machine for both, one process each and a small config."""
    port = free_port()
    started = []
    for node in nodes:
        values = variables() | {"NODE": str(node), "RENDEZVOUS": f"localhost:{port}", "PROCESSES": "1"}
        command = [*CONTAINER["command"], "configs/glyphs_ci.yaml", f"run.dir={run}", *ON_A_CPU, *overrides]
        started.append(start(command, values, run.parent / f"{attempt}.{node}.log"))
    return started


def ended(processes: list[subprocess.Popen], logs: Path, seconds: float = 240) -> list[int]:
    """Exit codes; of nodes that hang, kills torchrun's tree by ending its agent."""
    try:
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    except subprocess.TimeoutExpired:
        texts = [log.read_text()[-2000:] for log in sorted(logs.glob("*.log"))]
        raise AssertionError("nodes do not end\n" + "\n----\n".join(texts)) from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def said(logs: Path, attempt: str) -> str:
    """By both nodes: torchrun chooses which of them has rank 0."""
    return "".join((logs / f"{attempt}.{node}.log").read_text() for node in range(2))


@pytest.mark.slow
def test_an_invalid_config_is_told_from_a_failure(tmp_path):
    run = tmp_path / "run"
    # one pod each: a pod looks at its config before it looks for the other, and each costs 4 s
    started = pods(run, "bad", "optim.lrr=1", nodes=[0])
    started += pods(run, "bad", "run.steps=9", "head.margin.name=arcfase", nodes=[1])
    assert ended(started, tmp_path) == [64, 64]
    assert "did you mean optim.lr?" in (tmp_path / "bad.0.log").read_text()
    assert "did you mean arcface?" in (tmp_path / "bad.1.log").read_text()
    bare = {"NODES": "1", "NODE": "0", "RENDEZVOUS": "127.0.0.1:29500"}
    assert start(["bash", "launch/cloud/node.sh"], bare, tmp_path / "none.log").wait(30) == 64
    without_python = bare | {"PATH": "/nowhere"}  # to start again may help
    bash = shutil.which("bash")
    assert start([bash, "launch/cloud/node.sh", "a.yaml"], without_python, tmp_path / "path.log").wait(30) == 1


def sky_nodes(run: Path, attempt: str, *overrides: str) -> list[subprocess.Popen]:
    """Both nodes of the task: its run script with what SkyPilot sets."""
    # an address each; the second one is this machine's as well
    values = TASK["envs"] | {
        "CONFIG": "configs/glyphs_ci.yaml",
        "DATA": "data/glyphs_ci/train",
        "OVERRIDES": " ".join((f"run.dir={run}", *ON_A_CPU, *overrides)),
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
    }
    script = TASK["run"].replace(":29500", f":{free_port()}")
    return [
        start(["bash", "-c", script], values | {"SKYPILOT_NODE_RANK": str(node)}, run.parent / f"{attempt}.{node}.log")
        for node in range(2)
    ]


@pytest.mark.soak("launch")
def test_two_nodes_train_with_skypilots_script(glyphs_ci, tmp_path):
    assert ended(sky_nodes(tmp_path / "run", "sky", "run.steps=3"), tmp_path) == [0, 0], said(tmp_path, "sky")
    assert checkpoint.find_latest(tmp_path / "run").step == 3
    assert "2 ranks on cpu" in said(tmp_path, "sky")


@pytest.mark.soak("launch")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("node", [0, 1])
def test_a_pod_that_must_go_saves_and_the_next_attempt_goes_on(glyphs_ci, tmp_path, node):
    """SIGTERM to either pod: both end with 85. Started again they end with 0, and a stale marker changes nothing."""
    run = tmp_path / "run"
    first = pods(run, "first", "run.steps=100000")
    until = time.monotonic() + 200
    while not (run / "checkpoints" / "step_00000010" / "manifest.json").exists():
        assert time.monotonic() < until and first[0].poll() is None, said(tmp_path, "first")[-3000:]
        time.sleep(0.5)
    first[node].send_signal(signal.SIGTERM)
    start_of_end = time.monotonic()
    assert ended(first, tmp_path) == [85, 85]
    took = time.monotonic() - start_of_end
    saved = checkpoint.find_latest(run).step
    assert saved >= 10 and (run / "preempted").read_text() == f"step {saved}\n"
    # a failure before the run begins, with the marker of the attempt before: no endless restart
    assert ended(pods(run, "failing", "run.steps=100000", "data.train=nowhere"), tmp_path) == [1, 1]
    assert ended(pods(run, "second", f"run.steps={saved + 5}"), tmp_path) == [0, 0]
    assert f"from {run}/checkpoints/step_{saved:08d}" in said(tmp_path, "second")
    assert checkpoint.find_latest(run).step == saved + 5 and not (run / "preempted").exists()
    print(f"SIGTERM to node {node}: both nodes ended {took:.0f} s later")
