"""The scripts for pods and clusters: what each would run, what they say when options are missing, and a real drill."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tpu_scripts"
TPU = ["--name", "n", "--project", "p", "--zone", "z-a"]
SLICE = ["--accelerator", "v5litepod-16", "--runtime", "v2-alpha-tpuv5-lite"]
BUCKET = ["--bucket", "gs://b/run"]
GKE = ["--name", "n", *BUCKET, "--image", "i:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4"]
CLUSTER = ["--folder", "/shared/run", "--hosts", "one,two"]
ARGUMENTS = {
    "create": [*TPU, *SLICE],
    "setup": TPU,
    "launch": [*TPU, *BUCKET],
    "preempt": TPU,
    "resume": [*TPU, *BUCKET],
    "teardown": TPU,
    "save_restore": [*TPU, *BUCKET],
    "drill": [*TPU, *SLICE, *BUCKET, "--to-accelerator", "v5litepod-8"],
    "stages": [*TPU, *BUCKET],
    "stages_drill": [*TPU, *SLICE, *BUCKET],
    "gke": GKE,
    "slurm": ["--name", "n", "--folder", "/shared/run"],
    "mpirun": CLUSTER,
    "ssh": CLUSTER,
}


@pytest.fixture(autouse=True)
def no_cloud(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tools of a cloud are installed, a test must not reach them even if a dry run fails to be one."""
    folder = tmp_path_factory.mktemp("refused")
    for name in ("gcloud", "kubectl", "sbatch", "mpirun", "ssh"):
        (folder / name).write_text(f'#!/bin/sh\necho "a test ran {name} $*" >&2\nexit 99\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def script(name: str, *arguments: str, timeout_s: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("NAME", "PROJECT", "ZONE", "MESH", "STEPS", "PORT")}
    return subprocess.run(
        [str(SCRIPTS / f"{name}.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env=plain | variables,
    )


def dry(name: str, *more: str, **variables: str) -> list[list[str]]:
    """The commands that a dry run prints, as words; nothing that they name is installed here."""
    done = script(name, *ARGUMENTS[name], *more, "--dry-run", **variables)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [shlex.split(line[1:]) for line in done.stdout.splitlines() if line.startswith("+")]


def text(commands: list[list[str]]) -> str:
    return "\n".join(" ".join(words) for words in commands)


def test_every_script_is_tested_and_named_in_the_readme() -> None:
    names = {path.stem for path in SCRIPTS.glob("*.sh")} - {"lib"}
    assert names == set(ARGUMENTS)
    readme = (SCRIPTS / "README.md").read_text()
    assert [name for name in sorted(names) if f"`{name}.sh`" not in readme] == []


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_dry_run_prints_commands_and_help_tells_the_options(name: str) -> None:
    assert dry(name)
    told = script(name, "--help")
    assert told.returncode == 0
    assert f"tpu_scripts/{name}.sh" in told.stdout
    assert "shellcheck" not in told.stdout


@pytest.mark.parametrize("name", ARGUMENTS)
def test_all_missing_options_are_named_with_what_they_are(name: str) -> None:
    done = script(name, "--dry-run")
    assert done.returncode == 2
    first = ARGUMENTS[name][0]
    assert re.search(rf"^  {first} \(or the variable [A-Z]+\): .{{5,}}$", done.stderr, re.MULTILINE), done.stderr
    assert not done.stdout


def test_an_unknown_option_and_one_without_a_value_are_refused() -> None:
    assert "unknown option --zoen" in script("create", "--zoen", "x").stderr
    assert "--zone needs a value" in script("create", "--zone").stderr
    assert "unknown argument extra" in script("create", "extra").stderr


def test_options_come_from_the_environment_too_and_the_line_wins() -> None:
    variables = {"NAME": "m", "PROJECT": "q", "ZONE": "y"}
    done = script("teardown", "--zone=z-b", "--dry-run", **variables)
    assert "delete m --project=q --zone=z-b --force --quiet" in done.stdout


def test_one_slice_and_several_are_asked_for() -> None:
    one, several = dry("create")[0], dry("create", "--slices", "2", "--spot")[0]
    assert one[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=n"} <= set(one)
    assert {"--node-count=2", "--node-prefix=n", "--spot"} <= set(several)
    assert "--node-id=n" not in several


def test_every_worker_of_every_slice_runs_the_same_line() -> None:
    commands = dry("launch", "--slices", "2", "--steps", "7", "--mesh", "8x2")
    assert [words[5] for words in commands] == ["n-0", "n-1"]
    lines = {words[-1] for words in commands}
    assert len(lines) == 1
    assert "train.py gs://b/run --preset 124m --steps 7 --save-every 100 --mesh 8x2 --distributed" in lines.pop()
    assert all("--worker=all" in words for words in commands)


def test_preemption_is_a_signal_on_one_worker() -> None:
    assert "--worker=0" in (soft := dry("preempt")[0])
    assert "pkill -TERM" in soft[-1]
    assert "pkill -KILL" in dry("preempt", "--hard", "--worker", "3")[0][-1]


def test_resume_may_ask_for_another_slice_first() -> None:
    assert len(dry("resume")) == 1
    found = text(dry("resume", "--create", *SLICE))
    places = [found.index(part) for part in ("queued-resources create", "tpu-vm scp", "train.py gs://b/run")]
    assert places == sorted(places)


def test_the_drill_kills_a_worker_resumes_on_the_other_slice_and_cleans_up() -> None:
    found = text(dry("drill"))
    order = [
        "queued-resources create n ",
        "train.py gs://b/run",
        "pkill -KILL",
        "queued-resources delete n ",
        "queued-resources create n-2 ",
        "--accelerator-type=v5litepod-8",
        "queued-resources delete n-2 ",
    ]
    places = [found.index(part) for part in order]
    assert places[2:] == sorted(places[2:])
    assert found.count("train.py gs://b/run") == 2


def test_a_pipeline_is_launched_on_all_workers_with_memory_of_its_own() -> None:
    (words,) = dry("stages", "--stages", "8", "--preset", "checkfree_124m")
    assert "--worker=all" in words
    assert "_stage_worker.py gs://b/run/checkpoints --memory /dev/shm/n --stages 8 --steps 1000" in words[-1]
    assert words[-1].endswith("--distributed --preset checkfree_124m; }")


def test_a_failed_launch_of_the_pipeline_is_followed_by_others_up_to_a_limit(tmp_path: Path) -> None:
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f"#!/bin/sh\necho . >> {tmp_path}/calls\n[ $(wc -l < {tmp_path}/calls) -ge 3 ]\n")
    gcloud.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert script("stages", *ARGUMENTS["stages"], PATH=path).returncode == 0
    assert len((tmp_path / "calls").read_text().split()) == 3
    (tmp_path / "calls").write_text("")
    done = script("stages", *ARGUMENTS["stages"], "--launches", "2", PATH=path)
    assert done.returncode == 2
    assert "launch 2 of 2 failed" in done.stderr


def test_the_drill_of_stages_takes_a_worker_and_its_memory_and_cleans_up() -> None:
    found = text(dry("stages_drill", "--worker", "3"))
    places = [found.index(part) for part in ("queued-resources create n ", 'pkill -KILL -u "$USER" -f', "delete n ")]
    assert places == sorted(places)
    assert "--worker=3" in found
    assert "rm -rf /dev/shm/n" in found
    local = script("stages_drill", "--local", "--folder", "/nowhere/run", "--dry-run")
    assert "stage_recovery.py /nowhere/run --processes 4 --stages 4" in local.stdout


def test_the_manifest_is_whole_and_filled_in() -> None:
    done = script("gke", *GKE, "--slices", "3", "--dry-run")
    assert "@" not in done.stdout.replace("pkg@", "")
    for part in ("replicas: 3", "parallelism: 4", "google.com/tpu: 4", 'tpu-topology: "4x4"', "train.py gs://b/run"):
        assert part in done.stdout, part
    manifest = yaml.safe_load("\n".join(line for line in done.stdout.splitlines() if not line.startswith("+")))
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "i:1"
    assert text([shlex.split(done.stdout.splitlines()[-1][1:])]) == "kubectl apply -f -"
    assert "kubectl delete jobset n" in text(dry("gke", "--delete"))


def test_clusters_of_gpus() -> None:
    batch = dry("slurm", "--processes", "8", "--partition", "fast")[0]
    assert {"--ntasks=8", "--gpus-per-node=4", "--signal=TERM@120", "--requeue", "--partition=fast"} <= set(batch)
    assert "srun" in batch[-1]
    mpi = dry("mpirun")[0]
    assert mpi[:5] == ["mpirun", "-np", "8", "--host", "one:4,two:4"]
    assert mpi[-1] == "--distributed"
    first, second = dry("ssh")
    assert (first[1], second[1]) == ("one", "two")
    assert first[2].endswith("--coordinator one:9876 --processes 2 --process 0")
    assert second[2].endswith("--coordinator one:9876 --processes 2 --process 1")


def test_the_scripts_are_clean() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    scripts = sorted(str(p.relative_to(ROOT)) for p in SCRIPTS.glob("*.sh"))
    command = [str(shellcheck), "--external-sources", *scripts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_worker_costs_no_bit_on_another_topology(tmp_path: Path) -> None:
    """Two processes of four devices; one is killed; three of two devices go on."""
    done = script("drill", "--local", "--folder", str(tmp_path), timeout_s=230, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"step \d+ came back to the bit on 3 processes, and the run ended", done.stdout)


def test_a_local_dry_run_starts_nothing() -> None:
    done = script("drill", "--local", "--folder", "/nowhere/run", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train.py") == 5
    assert "kill -KILL" in done.stdout
    assert not Path("/nowhere").exists()
