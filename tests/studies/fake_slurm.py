"""SLURM's commands for tests: jobs are processes of this machine, states are files.

``install`` writes them into a folder for PATH.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scontrol")


def install(folder: Path) -> Path:
    """Write the commands; returns the folder that keeps scripts and states of jobs."""
    folder.mkdir()
    for name in COMMANDS:
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        command.chmod(0o755)
    return folder


def sbatch(script: str) -> None:
    """Start a job and print its id. ``#SBATCH --partition=none`` is refused, as SLURM does."""
    home, text = Path(os.environ["FAKE_SLURM"]), Path(script).read_text()
    if "--partition=none" in text:
        sys.exit("sbatch: error: Batch job submission failed: Invalid partition name specified")
    # Never an id of an earlier test: submitit remembers how jobs ended.
    job = str(time.time_ns())
    (home / f"{job}.sh").write_text(text)
    state = home / f"{job}.state"
    state.write_text("RUNNING")
    again = home / f"{job}.again"
    run = f"""
        while true; do
            bash "{home / job}.sh" && end=COMPLETED || end=FAILED
            rm "{again}" || break
        done
        printf $end > "{state}"
    """
    # The environment of the cluster's machines has no PYTHONPATH.
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
                  "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
                  "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NAME": "x"}  # fmt: skip
    null = subprocess.DEVNULL
    subprocess.Popen(
        ["sh", "-c", run], env=variables, stdout=null, stderr=null, start_new_session=True
    )
    print(f"Submitted batch job {job}")


def srun(*args: str) -> None:
    """Run a command with its output in the file of ``--output``."""
    at = args.index("--error") + 2
    output = args[args.index("--output") + 1].replace("%j", os.environ["SLURM_JOB_ID"])
    with Path(output.replace("%t", "0")).open("a") as file:
        process = subprocess.Popen(args[at:], stdout=file, stderr=file)
        Path(os.environ["FAKE_SLURM"], "newest.pid").write_text(str(process.pid))
        sys.exit(process.wait())


def scontrol(requeue: str, job: str) -> None:
    """Let a job start again when it has ended."""
    assert requeue == "requeue"
    Path(os.environ["FAKE_SLURM"], f"{job}.again").touch()


def sacct(*args: str) -> None:
    """Print the states of the jobs that are asked for."""
    print("JobID|State|NodeList")
    for name, job in pairwise(args):
        state = Path(os.environ["FAKE_SLURM"], f"{job}.state")
        if name == "-j" and state.exists():
            print(f"{job}|{state.read_text()}|node1")


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scontrol": scontrol}[sys.argv[1]](
        *sys.argv[2:]
    )
