"""`make soak`: the parts that take longer than a suite may, one after another, or PART alone.

A part that has passed at this commit is not run again, so the command goes on where a machine was lost.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PASSED = REPOSITORY / ".soak.json"  # {commit: {part: what pytest said last}}

PARTS = {
    "dense": "partitioned against dense: the full product of margins, sample rates and world sizes",
    "float32": "float32 against the naive computation: the full product of margins, inputs, chunks, caches",
    "compiled": "the compiled head and backbone against the plain ones: every margin and rate",
    "deepspeed": "DeepSpeed against dense and DDP: stages, world sizes, options; killed and resumed",
    "train": "runs killed at random moments, many ranks, options resumed",
    "ends": "200 finished jobs beside two busy loops, all of which end with 0; whom torchrun blames",
    "launch": "two nodes, lost nodes, preempted pods",
    "storage": "object stores: preempted with nothing but the URL, what a save costs; one set here, on S3, in place",
    "study": "a study killed, stopped and finished",
    "export": "every backbone through every format",
    "benchmark": "the benchmarks' own tables",
    "slurm": "a real Slurm cluster of two nodes on this machine; needs its packages",
    "docker": "the image, built by buildah from a debootstrap; needs both",
    "mutated": "100,000 files of all formats, changed at random: read, or refused with words",
    "sky": "SkyPilot reads its task; installs it",
}


def commit() -> str:
    """This commit; empty where the working tree differs from it, of which nothing is remembered."""
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=REPOSITORY, capture_output=True, text=True)
    if changed.returncode or changed.stdout:
        return ""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return head.stdout.strip()


def run(part: str) -> tuple[bool, str]:
    """Whether the part passed, and pytest's last line."""
    # --soak=docker, or pytest takes the folder docker/ for what it shall test
    dist = "load" if part == "mutated" else "loadfile"  # that is one file of tests that share nothing
    command = [sys.executable, "-m", "pytest", f"--soak={part}", "-n", "2", "--dist", dist, "tests"]
    done = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line.strip("= \n") or last
    return done.wait() == 0, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="; ".join(f"{k}: {v}" for k, v in PARTS.items()))
    part = parser.parse_args().part
    now = commit()
    passed = json.loads(PASSED.read_text()).get(now, {}) if now and PASSED.exists() else {}
    failed = False
    said = {}
    for name in [part] if part else PARTS:
        if not part and name in passed:
            said[name] = f"passed before at this commit: {passed[name]}"
            continue
        print(f"---- {name}: {PARTS[name]}", flush=True)
        start = time.monotonic()
        fine, last = run(name)
        result = "FAILED" if not fine else "passed" if " passed" in last else "not run"
        said[name] = f"{result} in {time.monotonic() - start:.0f} s: {last}"
        failed |= not fine
        if result == "passed" and now:
            passed[name] = last
            PASSED.write_text(json.dumps({now: passed}, indent=1) + "\n")
    print()
    for name, line in said.items():
        print(f"{name:10} {line}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
