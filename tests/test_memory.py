"""Memory that is there is compared with what the class centers take, before anything of them is allocated."""

import os
from pathlib import Path

import pytest
import torch

from partial_fc import memory
from partial_fc.build import build_head, bytes_of_a_class, check_memory, head_wants
from partial_fc.checkpoint import state_by_class
from partial_fc.data.shards import load_index, write_shards
from partial_fc.memory import Pool, shortage
from partial_fc.parallel import distributed
from tests.conftest import run_ranks
from tests.processes import run_program
from tests.test_train import CONFIG, QUICK, config_for

GIB = 2**30
CPU = torch.device("cpu")


def files(root: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = (
    "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   25165824 kB\nHugePages_Total:       0\n"
)
STAT = "anon 5\ninactive_file 1073741824\nactive_file 1073741824\ntotal_inactive_file 2147483648\ntotal_active_file 0\n"
TREES = {
    "version 2, limited above": (
        {
            "proc/self/cgroup": "0::/slurm/job/step\n",
            "cgroup/slurm/job/step/memory.max": "max\n",
            "cgroup/slurm/job/step/memory.current": "1\n",
            "cgroup/slurm/job/memory.max": f"{16 * GIB}\n",
            "cgroup/slurm/job/memory.current": f"{6 * GIB}\n",
            "cgroup/slurm/job/memory.stat": STAT,
        },
        [24, 12],
    ),
    "version 2, a container": (
        {"proc/self/cgroup": "0::/\n", "cgroup/memory.max": f"{4 * GIB}", "cgroup/memory.current": f"{GIB}"},
        [24, 3],
    ),
    "version 2, a host's path": (
        {"proc/self/cgroup": "0::/../docker/a", "cgroup/memory.max": f"{4 * GIB}", "cgroup/memory.current": f"{GIB}"},
        [24, 3],
    ),
    "version 1, a container that knows its path on the host": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/docker/a\n",
            "cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
            "cgroup/memory/memory.usage_in_bytes": f"{5 * GIB}\n",
            "cgroup/memory/memory.stat": STAT,
        },
        [24, 5],
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "4:memory:/\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/memory/memory.usage_in_bytes": f"{5 * GIB}\n",
        },
        [24],
    ),
    "more in use than allowed": (
        {"proc/self/cgroup": "0::/\n", "cgroup/memory.max": f"{GIB}", "cgroup/memory.current": f"{2 * GIB}"},
        [24, 0],
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_what_the_kernel_says(tree, tmp_path, monkeypatch):
    """Its files, as they are on machines with either version of cgroups."""
    contents, wanted = TREES[tree]
    files(tmp_path, contents | {"proc/meminfo": MEMINFO})
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    assert [pool.free / GIB for pool in memory.pools(CPU)] == wanted


def test_this_machine():
    machine, *_ = memory.pools(CPU)
    assert 0 < machine.free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_ranks_share_a_machine_and_not_a_device():
    host, devices = Pool("a", "the memory of a", 10), [Pool(f"a GPU {n}", f"GPU {n} of a", 6) for n in range(2)]
    assert shortage([[(host, 5)], [(host, 5)]]) is None
    assert shortage([[(host, 5)], [(host._replace(free=9), 5)]]) == (
        "the class centers of 2 ranks need 10 B of the memory of a, 9 B are available"
    )
    assert shortage([[(host, 8)], [(host._replace(key="b"), 8)]]) is None
    assert shortage([[(device, 6), (host, 1)] for device in devices]) is None
    assert shortage([[(devices[0], 6)], [(devices[1], 7)]]) == (
        "the class centers of rank 1 need 7 B of GPU 1 of a, 6 B are available"
    )
    assert shortage([[(host, 11)]]) == "the class centers need 11 B of the memory of a, 10 B are available"


HEADS = {
    "sgd": (),
    "adamw": ("head.optim.name=adamw", "head.margin={name: subcenterarcface}"),
    "bias": ("head.margin={name: softmax}", "head.sample_rate=0.1", "head.embedding_losses={center: {}}"),
    "table": ("head.sample_rate=0.1", "head.hard_negatives={neighbours: 4}"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_what_is_asked_for_is_what_a_head_takes(kind, glyphs_ci, tmp_path):
    config = config_for(tmp_path / "run", glyphs_ci / "train", *HEADS[kind])
    head = build_head(config, 200, CPU, trust_code=False)
    tensors = {id(tensor): tensor for tensor in state_by_class(head).values()}
    taken = sum(tensor.nbytes for tensor in tensors.values())
    assert 200 * bytes_of_a_class(config, CPU, trust_code=False) == taken
    assert head_wants(config, 200, CPU, trust_code=False)[0][1] == taken


def wanted_of(run: Path, data: Path) -> tuple[int, str]:
    """Bytes of this rank's head; what is said where each of two ranks wants six tenths of the machine's memory."""
    config = config_for(run, data, "head.sample_rate=0.1", "head.hard_negatives={neighbours: 4}")
    pool, needed = head_wants(config, 101, CPU, trust_code=False)[0]
    with pytest.raises(distributed.RunError) as caught:
        check_memory([(pool, pool.free * 6 // 10)])
    return needed, str(caught.value)


@pytest.mark.slow
def test_ranks_share_the_classes_and_not_the_table(glyphs_ci, tmp_path):
    of_a_class = 2 * 64 * 4 + 4
    (first, said), (second, also) = run_ranks(wanted_of, 2, tmp_path / "run", glyphs_ci / "train")
    assert {first, second} == {50 * of_a_class + 101 * 16, 51 * of_a_class + 101 * 16}
    assert said == also and said.startswith("the class centers of 2 ranks need ")


IN_A_CGROUP = """
import os, runpy, sys
folder = os.environ["CGROUP"]
with open(f"{folder}/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
from partial_fc import cli
from partial_fc.head import centers
def never(*_):
    print("centers were allocated")
centers.initial_centers = lambda classes, *_: len(classes) > 100 and never()
sys.argv = sys.argv[1:]
if sys.argv[0] == "partial-fc":
    cli.main()
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def cgroup():
    """A folder whose processes may use 1 GiB together."""
    found = [(root, path, names[0]) for root, path, names in memory._hierarchies() if (root / path / names[0]).exists()]
    if not found:
        pytest.skip("not run: no cgroup of this process has a limit of memory")
    root, path, limit = found[0]
    folder = root / path / f"partial_fc_{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("not run: making a cgroup is not permitted")
    try:
        (folder / limit).write_text(str(GIB))
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.slow
def test_a_head_that_does_not_fit_its_cgroup_is_refused(cgroup, glyphs_ci, tmp_path):
    """By doctor and training, before it is allocated: 300,000 classes at 2 x 512 numbers, with SGD's, are 1.1 GiB."""
    index = load_index(glyphs_ci / "train")
    data = (index.path / "shard-000000.tar").read_bytes()
    samples = [
        (data[offset : offset + size], "png", number)
        for number, (offset, size) in enumerate(zip(index.offset[:96], index.size[:96], strict=True))
    ]
    write_shards(tmp_path / "many", samples, [str(n) for n in range(300_000)], prepared=index.prepared)
    (tmp_path / "program.py").write_text(IN_A_CGROUP)
    of_run = [CONFIG, *QUICK, f"run.dir={tmp_path}/run", f"data.train={tmp_path}/many", "evaluate.sets={}"]
    of_run += ["backbone.embedding_dim=512"]
    environment = {"CGROUP": str(cgroup)}
    said = run_program(tmp_path / "program.py", "partial-fc", "doctor", *of_run, env=environment)
    wanted = f"need 1.1 GiB of the 1.0 GiB that {cgroup}/"
    assert said.returncode == 1 and "problem  memory: the class centers need" in said.stdout, said.stdout + said.stderr
    assert wanted in said.stdout and "start more ranks" in said.stdout
    done = run_program(tmp_path / "program.py", "launch/train.py", *of_run, env=environment)
    assert done.returncode == 1 and "centers were allocated" not in done.stdout + said.stdout
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith("error: the class centers need") and wanted in line, done.stderr
