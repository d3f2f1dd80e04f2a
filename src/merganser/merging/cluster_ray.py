"""Tasks on Ray: a cluster that is there, or processes of this machine alone.

Ray carries names, digests and figures, never tensors; its object store holds the recipes once a machine.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from merganser.continual.stream import default_threads
from merganser.errors import ClusterError, ParameterError
from merganser.merging.cluster_jobs import LostError, Machine

#: What `--ray` takes for processes of this machine.
LOCAL = "local"
#: Seconds for a machine to answer, for a result that is there to arrive, and for tasks to end that are told to.
ANSWER_S, RESULT_S, STOP_S = 5.0, 60.0, 10.0
#: How a client of HTTP/2, which Ray's servers speak, begins; settings are answered with settings (RFC 9113, 3.4).
_HTTP2, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


class RayTasks:
    """Functions run by a Ray cluster that this process is connected to.

    Args:
        ray: the module.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._remote: dict[Any, Any] = {}  # a function that is made remote anew is sent to every worker anew

    @property
    def machines(self) -> Sequence[Machine]:
        """Those of the cluster that are alive and take tasks."""
        resources = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [Machine(int(r["CPU"]), int(r.get("memory", 0))) for r in resources if r.get("CPU", 0) >= 1]

    def share(self, value: Any) -> Any:
        """Put a value into the object store."""
        return self._ray.put(value)

    def start(self, task: Callable[..., Any], *args: Any, label: str, threads: int, memory_bytes: int) -> Any:
        """Have a function called; what becomes of a dead worker's is not for Ray to decide."""
        key = task, threads, memory_bytes
        if key not in self._remote:
            self._remote[key] = self._ray.remote(num_cpus=threads, memory=memory_bytes, max_retries=0)(task)
        return self._remote[key].options(name=f"merganser {label}").remote(*args)

    def now(self) -> float:
        """Seconds."""
        return time.monotonic()

    def ended(self, handles: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Those that have ended."""
        ready, _ = self._ray.wait([*handles], num_returns=1, timeout=timeout_s)
        if ready:  # and all others that have
            ready, _ = self._ray.wait([*handles], num_returns=len(handles), timeout=0)
        return list(ready)

    def result(self, handle: Any) -> Any:
        """What a function returned.

        Raises:
            LostError: If its worker died.
            ClusterError: If it could not even be called there.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(handle, timeout=RESULT_S)
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:
            cause = getattr(error, "cause", None) or error
            line = next((line for line in str(cause).strip().split("\n")[::-1] if line.strip()), type(cause).__name__)
            raise ClusterError(
                f"a worker cannot run its task: {line.strip()}",
                "all machines need the same versions of Python, Ray and merganser",
            ) from None
        except errors.RayError as error:
            raise LostError(_why(error)) from None

    def stop(self, handles: Sequence[Any]) -> None:
        """Kill the processes that run them."""
        for handle in handles:
            self._ray.cancel(handle, force=True)
        self._ray.wait([*handles], num_returns=len(handles), timeout=STOP_S)


def _why(error: Exception) -> str:
    """What became of a worker, in a few words."""
    known = {
        "WorkerCrashedError": "its process died",
        "NodeDiedError": "its machine is gone",
        "OutOfMemoryError": "its machine ran out of memory, and Ray ended it",
        "TaskCancelledError": "it was cancelled",
        "GetTimeoutError": "its result did not arrive",
    }
    return known.get(type(error).__name__, type(error).__name__)


@contextmanager
def connected(address: str, *, workers: int | None = None, threads: int | None = None) -> Iterator[RayTasks]:
    """Tasks on a cluster, for as long as the context lasts.

    Args:
        address: `local` for processes of this machine, which end with the context; HOST:PORT of a cluster's head;
            `auto` for the cluster that this machine, or this process, belongs to.
        workers: how many processes `local` has; by default as many as processors.
        threads: of each of them.

    Raises:
        ParameterError: If Ray is not installed.
        ClusterError: If there is no cluster at the address, or this process belongs to another one.
    """
    ray = _ray()
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in ("auto", here):
            raise ClusterError(f"this process belongs to the cluster {here} already, not to {address}", f"--ray {here}")
        yield RayTasks(ray)
        return
    each = threads or 1
    _connect(ray, address, workers * each if workers is not None else max(each, default_threads()))
    try:
        yield RayTasks(ray)
    finally:
        ray.shutdown()


def _ray() -> Any:
    # Ray reads these when it is imported, or starts processes: no chatter, nothing sent to its makers.
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ParameterError("--ray needs ray, which is missing", 'pip install "merganser[cluster]"') from error
    return ray


def _connect(ray: Any, address: str, processors: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == LOCAL:
            os.environ.setdefault("RAY_worker_niceness", "0")  # they do what this process would do, and as eagerly
            ray.init(address="local", num_cpus=processors, include_dashboard=False, **quiet)
            return
        if address != "auto":
            _refuse_silence(address)
        ray.init(address=address, **quiet)
    except (RuntimeError, ConnectionError, ValueError, OSError) as error:
        ray.shutdown()
        line = str(error).strip().split("\n", 1)[0]
        raise ClusterError(
            f"no Ray cluster at {address}: {line}", "ray start --head starts one and prints its address"
        ) from error


def _refuse_silence(address: str) -> None:
    """Refuse an address that nothing answers at, or something else, at once; Ray would go on asking for minutes.

    Raises:
        ClusterError: Names it.
        ParameterError: If it is no address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ParameterError(f"--ray is {address!r}; it is {LOCAL}, auto or HOST:PORT")
    hint = "ray start --head starts one and prints its address"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S) as link:
            if "RAY_USE_TLS" in os.environ:  # there is no looking into that
                return
            link.settimeout(ANSWER_S)
            link.sendall(_HTTP2 + _SETTINGS)
            answer = link.recv(9)
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster at {address}: {error}", hint) from error
    if answer[3:4] != _SETTINGS[3:4]:
        raise ClusterError(f"no Ray cluster at {address}: what answers there is something else", hint)
