"""launch/slurm on a real Slurm of two nodes: submitted, stopped by a signal, put back into the queue, finished."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from partial_fc import checkpoint
from tests.conftest import REPOSITORY, run_ranks
from tests.slurm_cluster import Cluster, missing
from tests.test_train import QUICK, checksums, curve, train_here

SBATCH = REPOSITORY / "launch" / "slurm" / "train.sbatch"
SWEEP = REPOSITORY / "launch" / "slurm" / "sweep.py"
CONFIG = str(REPOSITORY / "configs" / "glyphs_ci.yaml")
OPTIONS = (*QUICK, "run.steps=100", "checkpoint.every=100000", "evaluate.sets={}")
# the environment that is activated where sbatch is called
ACTIVATED = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
}
needs_slurm = pytest.mark.skipif(missing() is not None, reason=f"not run: {missing()}")


@pytest.fixture(scope="module")
def whole(glyphs_ci, tmp_path_factory) -> Path:
    """An uninterrupted run on two ranks without Slurm."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(train_here, 2, run, glyphs_ci / "train", *OPTIONS)
    return run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


def submit(
    cluster: Cluster, run: Path, *overrides: str, options: tuple[str, ...] = ("--nodes=2",), **environment: str
) -> str:
    log = f"--output={run}-%j.out"
    command = ["sbatch", "--parsable", log, *options, str(SBATCH), CONFIG, *OPTIONS, f"run.dir={run}", *overrides]
    return cluster.run(*command, cwd=REPOSITORY, **ACTIVATED, **environment).strip()


def log_of(run: Path, job: str) -> str:
    return run.with_name(f"{run.name}-{job}.out").read_text()


def steps_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def restarts(cluster: Cluster, job: str) -> int:
    return int(cluster.field(job, "Restarts"))


def finishes_as_if_nothing_had_been(cluster: Cluster, job: str, run: Path, whole: Path, seconds: float) -> None:
    try:
        cluster.wait_for_state(job, "COMPLETED", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log_of(run, job)}") from None
    assert checksums(run) == checksums(whole) and curve(run) == curve(whole)


@pytest.mark.soak("slurm")
@needs_slurm
def test_two_nodes_signal_requeue_finish(cluster, whole, tmp_path):
    """The job of a run that was asked to stop goes back into the queue and ends as if nothing had been.

    With options for srun, as a container needs them: here of variables that have torchrun write a log for each rank.
    """
    run = tmp_path / "run"
    logs = f"--export=ALL,PET_LOG_DIR={tmp_path}/logs,PET_TEE=3"
    job = submit(cluster, run, SRUN_OPTIONS=logs)
    cluster.wait_for(lambda: steps_of(run) >= 5, 120, "five steps")
    cluster.run("scancel", "--batch", "--signal=USR1", job, cwd=tmp_path)
    cluster.wait_for(lambda: restarts(cluster, job) == 1, 120, "the requeue")
    saved = checkpoint.find_latest(run).step
    assert 5 <= saved < 100
    finishes_as_if_nothing_had_been(cluster, job, run, whole, 200)
    log = log_of(run, job)
    assert "2 ranks on cpu" in log and f"preempted: stopped after step {saved};" in log
    assert f"from {run}/checkpoints/step_{saved:08d}" in log and not (run / "preempted").exists()
    assert restarts(cluster, job) == 1
    # of each rank and attempt, standard error among them
    assert sum("step 100/100" in file.read_text() for file in (tmp_path / "logs").rglob("stdout.log")) == 1
    assert len(list((tmp_path / "logs").rglob("stderr.log"))) == 4


@pytest.mark.slow
@needs_slurm
def test_a_job_that_cannot_start_is_not_requeued(cluster, tmp_path):
    """Not for the marker that an earlier job left either."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "preempted").write_text("step 7\n")
    job = submit(cluster, tmp_path / "run", "optim.lrr=3")
    cluster.wait_for_state(job, "FAILED", 120)
    assert "optim.lrr: unknown key; did you mean optim.lr?" in log_of(tmp_path / "run", job)
    assert restarts(cluster, job) == 0


@needs_slurm
@pytest.mark.soak("slurm")
@pytest.mark.parametrize(
    "start, ranks",
    [
        (("srun", "--nodes=1", "--ntasks=2"), 2),
        (("srun", "--nodes=2", "--ntasks=2", "--export=ALL,MASTER_ADDR=127.0.0.1"), 2),  # n1 has no address here
        (("salloc", "--ntasks=4"), 1),  # no step: a process alone
    ],
)
def test_srun_starts_ranks(cluster, glyphs_ci, tmp_path, start, ranks):
    train = (sys.executable, "launch/train.py", CONFIG, *OPTIONS, "run.steps=3", f"run.dir={tmp_path}/run")
    assert f"; {ranks} ranks on cpu" in cluster.run(*start, *train, cwd=REPOSITORY, **ACTIVATED)


@needs_slurm
@pytest.mark.soak("slurm")
def test_a_run_that_fails_is_not_requeued(cluster, glyphs_ci, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "preempted").write_text("step 7\n")
    job = submit(cluster, tmp_path / "run", "data.train=data/nowhere")
    cluster.wait_for_state(job, "FAILED", 240)
    assert "data/nowhere" in log_of(tmp_path / "run", job) and restarts(cluster, job) == 0


@needs_slurm
@pytest.mark.soak("slurm")
def test_a_cancelled_job_is_not_requeued(cluster, glyphs_ci, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, "run.steps=5000", options=("--nodes=2", "--ntasks-per-node=2"))
    cluster.wait_for(lambda: steps_of(run) >= 5, 120, "five steps")
    cluster.run("scancel", job, cwd=tmp_path)
    cluster.wait_for_state(job, "CANCELLED", 120)
    cluster.wait_for(lambda: (run / "preempted").exists(), 120, "the run to stop")
    cluster.wait_for(lambda: not cluster.run("squeue", "--noheader", cwd=tmp_path).strip(), 120, "the job to be gone")
    assert "4 ranks on cpu" in log_of(run, job)
    assert restarts(cluster, job) == 0 and cluster.field(job, "JobState") == "CANCELLED"


@needs_slurm
@pytest.mark.soak("slurm")
@pytest.mark.parametrize("minutes", [1, 2])
def test_the_time_limit_is_no_end(cluster, glyphs_ci, tmp_path, minutes):
    """Slurm sends the signal up to a minute early: with a limit of one minute before the trainer is there."""
    run = tmp_path / "run"
    limit = ("--nodes=1", "--ntasks-per-node=2", f"--time={minutes}", "--signal=B:USR1@30")
    job = submit(cluster, run, "run.steps=100000", options=limit)
    cluster.wait_for(lambda: restarts(cluster, job) == 1, 180, "the requeue")
    saved = checkpoint.find_latest(run).step
    assert saved > 0
    cluster.wait_for(lambda: steps_of(run) > saved, 120, "another step")
    cluster.run("scancel", job, cwd=tmp_path)
    cluster.wait_for_state(job, "CANCELLED", 120)
    assert f"from {run}/checkpoints/step_{saved:08d}" in log_of(run, job)


@needs_slurm
@pytest.mark.soak("slurm")
@pytest.mark.parametrize("parameters", ["", "SlurmctldParameters=preempt_send_user_signal"], ids=["TERM", "USR1"])
def test_preempted_by_a_more_urgent_job(whole, tmp_path, parameters):
    """Slurm sends TERM to the tasks, or what --signal says where the cluster is set up so."""
    run = tmp_path / "run"
    cluster = Cluster(tmp_path / "slurm", parameters)
    try:
        job = submit(cluster, run, options=("--nodes=2", "--exclusive"))
        cluster.wait_for(lambda: steps_of(run) >= 5, 120, "five steps")
        urgent = ("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 3")
        urgent_job = cluster.run(*urgent, cwd=tmp_path).strip()
        cluster.wait_for_state(urgent_job, "COMPLETED", 120)
        assert 5 <= checkpoint.find_latest(run).step < 100
        finishes_as_if_nothing_had_been(cluster, job, run, whole, 200)
        assert restarts(cluster, job) == 1
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", SWEEP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_points_of_a_sweep(sweep):
    grid = sweep.points(CONFIG, ["optim.lr=0.1,0.05", "run.seed=3", "head.margin={name: softmax},{name: arcface}"])
    assert len(grid) == 4 and len({run for run, _ in grid}) == 4
    run, overrides = grid[3]
    assert run == "runs/glyphs_ci/optim.lr=0.05,head.margin=_name_arcface_"
    assert overrides == ["run.seed=3", "optim.lr=0.05", "head.margin={name: arcface}", f"run.dir={run}"]
    assert sweep.points(CONFIG, ["run.dir=runs/x"]) == [("runs/x", ["run.dir=runs/x"] * 2)]
    stores = [overrides[-1] for _, overrides in sweep.points(CONFIG, ["optim.lr=0.1,0.2", "checkpoint.dir=s3://a/b"])]
    assert stores == ["checkpoint.dir=s3://a/b/optim.lr=0.1", "checkpoint.dir=s3://a/b/optim.lr=0.2"]
    for wrong in ("optim.lr=0.1,", "run.dir=a,b"):
        with pytest.raises(ValueError, match=wrong):
            sweep.points(CONFIG, [wrong])
    with pytest.raises(ValueError, match=r"optim\.lr"):
        sweep.points(CONFIG, ["optim.lr=0.1,fast"])
    with pytest.raises(ValueError, match="two points of the grid have the same run folder"):
        sweep.points(CONFIG, ["optim.lr=0.1,0.1"])


def test_a_dry_sweep_prints_its_commands(sweep, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py", CONFIG, "optim.lr=0.1,0.05", "--dry", "--gpus=2"])
    monkeypatch.chdir(REPOSITORY / "launch")
    with pytest.raises(SystemExit, match="no launch/train.py"):
        sweep.main()
    monkeypatch.chdir(REPOSITORY)
    sweep.main()
    first, second = capsys.readouterr().out.splitlines()
    assert "--nproc_per_node=2" in first and first.endswith("optim.lr=0.1 run.dir=runs/glyphs_ci/optim.lr=0.1")
    assert second.endswith("optim.lr=0.05 run.dir=runs/glyphs_ci/optim.lr=0.05")


@needs_slurm
@pytest.mark.soak("slurm")
def test_a_sweep_is_one_array_whose_points_resume(cluster, whole, glyphs_ci, tmp_path):
    command = [sys.executable, str(SWEEP), CONFIG, *OPTIONS, f"run.dir={tmp_path}/sweep", "optim.lr=0.02,0.01"]
    options = ("--gpus=0", "--processes=2", "--cpus=1", "--sbatch", "partition=main", "--sbatch", "nice=1")
    printed = cluster.run(*command, *options, cwd=REPOSITORY, **ACTIVATED).splitlines()
    jobs = [line.split()[0] for line in printed]
    runs = [tmp_path / "sweep" / f"optim.lr={lr}" for lr in ("0.02", "0.01")]
    assert len(jobs) == 2 and len({job.partition("_")[0] for job in jobs}) == 1
    cluster.wait_for(lambda: all(steps_of(run) >= 5 for run in runs), 120, "five steps of both")
    cluster.run("scancel", "--signal=USR2", jobs[0], cwd=tmp_path)
    cluster.wait_for(lambda: restarts(cluster, jobs[0]) == 1, 120, "the requeue")
    assert 5 <= checkpoint.find_latest(runs[0]).step < 100
    for job in jobs:
        cluster.wait_for_state(job, "COMPLETED", 200)
    assert restarts(cluster, jobs[1]) == 0
    run_ranks(train_here, 2, tmp_path / "whole", glyphs_ci / "train", *OPTIONS, "optim.lr=0.01")
    for run, other in zip(runs, (whole, tmp_path / "whole"), strict=True):
        assert checksums(run) == checksums(other) and curve(run) == curve(other)


@pytest.mark.slow
def test_the_batch_script_is_sound():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", str(SBATCH)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
