"""Run a function in N real processes that form a jax.distributed job on CPU."""

import contextlib
import faulthandler
import importlib
import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# After one process has failed unexpectedly, the others may say in their own words what became of them.
_GRACE_S = 3.0
_OUTPUT_CHARS_SHOWN = 12_000


def run_processes(
    target: str,
    n: int,
    *,
    devices: int = 2,
    args: dict | None = None,
    timeout_s: float = 120,
    expect_failure: Collection[int] = (),
    env: Mapping[str, str] | None = None,
    distributed: bool | None = None,
    heartbeat_timeout_s: int = 100,
) -> list[object]:
    """Call ``target`` with ``args`` in ``n`` processes of ``devices`` CPU devices each: what each returned, by rank.

    ``target`` is ``"path/to/file.py:function"`` or ``"package.module:function"``; results must be JSON. Processes in
    ``expect_failure`` may raise or die, and give None then. AssertionError with the output of all processes when any
    other fails, or when they are not done after ``timeout_s``. None is left running, whatever happens.

    ``distributed`` says whether to call ``jax.distributed.initialize``; by default, if there are several processes.
    """
    join_job = n > 1 if distributed is None else distributed
    with tempfile.TemporaryDirectory(prefix="jaxckpt-processes-") as folder, _reserved_port() as port_holder:
        job = {
            "target": target,
            "n": n,
            "args": args or {},
            "port": port_holder.getsockname()[1] if join_job else None,
            "heartbeat_timeout_s": heartbeat_timeout_s,
        }
        processes: list[_Process] = []
        try:
            # Extended one by one, so that those started are ended when one cannot be started.
            processes.extend(_start(job, rank, Path(folder), _environment(devices, env)) for rank in range(n))
            _wait_for_all(processes, timeout_s, expect_failure)
            results = [_result(process) for process in processes]
            _release(processes)
            return results
        finally:
            for process in processes:
                process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    rank: int
    popen: "subprocess.Popen[bytes]"
    # Gets one byte when the result is written; its end means that the process has ended.
    done: BinaryIO
    result_path: Path
    output_path: Path

    def output(self) -> str:
        return self.output_path.read_text(errors="replace")[-_OUTPUT_CHARS_SHOWN:]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.killpg(self.popen.pid, signal.SIGKILL)  # with what it has started itself
        self.popen.wait()
        if self.popen.stdin is not None:
            self.popen.stdin.close()
        self.done.close()


def _reserved_port() -> socket.socket:
    """A socket that keeps its port from others; gRPC shares ports, so the service can still bind it."""
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.bind(("127.0.0.1", 0))
    # Set after binding: asked for earlier, the system could choose a port that another harness shares.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return holder


def _environment(devices: int, env: Mapping[str, str] | None) -> dict[str, str]:
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "PYTHONUNBUFFERED": "1",
        **(env or {}),
    }


def _start(job: dict, rank: int, folder: Path, env: Mapping[str, str]) -> _Process:
    result_path, output_path = folder / f"result-{rank}.json", folder / f"output-{rank}.txt"
    read_end, write_end = os.pipe()
    task = {**job, "rank": rank, "result_path": str(result_path), "done_fd": write_end}
    code = f"from {__name__} import _run_child; _run_child()"
    with output_path.open("wb") as output:
        popen = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            pass_fds=[write_end],
            start_new_session=True,
        )
    os.close(write_end)
    done = os.fdopen(read_end, "rb", buffering=0)
    return _Process(rank=rank, popen=popen, done=done, result_path=result_path, output_path=output_path)


def _wait_for_all(processes: list[_Process], timeout_s: float, expect_failure: Collection[int]) -> None:
    """Until all have a result or have ended; AssertionError when one fails that should not, or when time is up."""
    started = time.monotonic()
    deadline = started + timeout_s
    failures: dict[int, str] = {}
    with selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(process.done, selectors.EVENT_READ, process)
        while selector.get_map():
            ready = selector.select(max(0, deadline - time.monotonic()))
            if not ready:
                break
            for key, _ in ready:
                process: _Process = key.data
                selector.unregister(process.done)
                failure = _failure(process)
                if failure is not None and process.rank not in expect_failure:
                    failures[process.rank] = failure
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        unfinished: list[_Process] = [key.data for key in selector.get_map().values()]
    if unfinished:
        _print_stacks(unfinished)
        elapsed_s = time.monotonic() - started
        for process in unfinished:
            failures.setdefault(process.rank, f"was not done after {elapsed_s:.1f} s")
    if failures:
        raise AssertionError(_report(processes, failures))


def _failure(process: _Process) -> str | None:
    """What went wrong in a process that has written its result or ended."""
    if process.done.read(1):
        error = json.loads(process.result_path.read_text()).get("error")
        return None if error is None else f"raised {error}"
    code = process.popen.wait()
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code} without a result"


def _print_stacks(processes: list[_Process]) -> None:
    """Let processes that hang add the stacks of their threads to their output."""
    for process in processes:
        process.popen.send_signal(signal.SIGUSR1)
    time.sleep(0.3)  # faulthandler gives no sign that it has finished


def _report(processes: list[_Process], failures: dict[int, str]) -> str:
    lines = [f"Process {rank} of {len(processes)} {what}." for rank, what in sorted(failures.items())]
    for process in processes:
        lines += [f"--- output of process {process.rank} ---", process.output()]
    return "\n".join(lines)


def _result(process: _Process) -> object:
    if not process.result_path.exists():
        return None
    return json.loads(process.result_path.read_text()).get("value")


def _release(processes: list[_Process]) -> None:
    """Let the processes leave, process 0 last: JAX aborts the others when its service goes before them."""
    for process in reversed(processes):
        if process.popen.stdin is not None:
            process.popen.stdin.close()
        process.popen.wait(timeout=10)


# The rest runs in the started process.


def _run_child() -> None:
    task = json.loads(sys.argv[1])
    # A process that hangs is asked in this way where its threads are.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    released = threading.Event()
    threading.Thread(target=_watch_parent, args=[released, task], daemon=True).start()
    try:
        function = load_target(task["target"])
        _join_job(task)
        outcome = {"value": function(**task["args"])}
        text = json.dumps(outcome)
    except BaseException as error:
        traceback.print_exc()
        text = json.dumps({"error": f"{type(error).__name__}: {error}"})
    sys.stdout.flush()
    sys.stderr.flush()
    Path(task["result_path"]).write_text(text)
    os.write(task["done_fd"], b"1")
    released.wait()
    # Not sys.exit: JAX's shutdown at exit waits for all processes, also for those that died.
    os._exit(0)


def _watch_parent(released: threading.Event, task: dict) -> None:
    """The parent closes our stdin to release us; its death closes it too, and then nobody wants the result."""
    sys.stdin.buffer.read()
    if not Path(task["result_path"]).exists():
        os._exit(1)
    released.set()


def _join_job(task: dict) -> None:
    if task["port"] is None:
        return
    import jax

    address = f"127.0.0.1:{task['port']}"
    jax.distributed.initialize(
        address,
        num_processes=task["n"],
        process_id=task["rank"],
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        heartbeat_timeout_seconds=task["heartbeat_timeout_s"],
    )


def load_target(target: str) -> Callable[..., object]:
    """The function that ``"path/to/file.py:function"`` or ``"package.module:function"`` names."""
    module_name, _, function_name = target.rpartition(":")
    if module_name.endswith(".py"):
        name = Path(module_name).stem
        spec = importlib.util.spec_from_file_location(name, module_name)
        if spec is None or spec.loader is None:
            raise ImportError(f"Cannot load {module_name!r}.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    return getattr(module, function_name)
