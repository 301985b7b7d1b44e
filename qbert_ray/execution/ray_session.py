"""Starts Ray, or connects to a cluster, for the duration of a run."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Read by Ray when it is imported. A training costs 12 s less to start with these, and each worker's line prints once.
for _name, _value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the core from those that work
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends a run
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables; a sweep prints its own
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray.data import DataContext  # noqa: E402

from qbert_ray.execution.determinism import ENVIRONMENT, MARK  # noqa: E402

_started_here = False  # Ray, by `session`
_ALONE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # this machine is not preempted: one process less in each training
    "RAY_idle_worker_killing_time_threshold_ms": "600000",  # processes that have imported torch wait for the next stage
}
TOKEN_NEEDED = (
    "Ray at {where} asks for a token ({reason}); set RAY_AUTH_MODE=token, and let ~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or "
    "RAY_AUTH_TOKEN hold what `ray get-auth-token` prints on the cluster's head"
)
SLOW = ("timed out during startup", "Timed out waiting for file")  # how Ray says that its processes are not ready in time
TRIES = 3  # at starting Ray on this machine
ANSWER_SECONDS = 10.0  # in which a cluster must accept a connection
ANYWHERE = "DEFAULT"  # strategy of tasks that a sweep's trial starts: else they would wait inside the trial's own placement group, which has no CPU


def started_locally() -> bool:
    """Whether this process started Ray by itself, so that Ray ends with it."""
    return _started_here


def _init(**arguments: Any) -> None:
    """`ray.init`, again if a node does not start in the 30 s that Ray gives it, as on a busy machine.

    Raises:
        ValueError: it does not start in several tries.
    """
    for attempt in range(TRIES):
        try:
            ray.init(**arguments)
            return
        except Exception as error:
            if not any(said in str(error) for said in SLOW):
                raise
            ray.shutdown()
            if attempt == TRIES - 1:
                raise ValueError(
                    f"Ray did not start on this machine: {TRIES} times its processes were not ready within 30 s. The machine is too busy or its "
                    "memory is used up; free it, or run without Ray: compute.executor=local"
                ) from None


def _check_reachable(address: str) -> None:
    """Raise if nothing answers at a host and port; Ray itself would wait for minutes.

    Raises:
        ValueError: with the reason of the operating system.
    """
    host, colon, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"no cluster answers at {address} ({error}); compute.address and RAY_ADDRESS take what `ray start --head` prints, such as 10.0.0.1:6379"
        ) from None


@contextmanager
def session(address: str | None = None) -> Iterator[None]:
    """Context with Ray connected to a cluster, or started on this machine; a Ray that this process already uses stays.

    Args:
        address: of the cluster; None: RAY_ADDRESS, or a Ray of the run's own, whatever else runs on this machine.

    Raises:
        ValueError: nothing answers at the address, the cluster asks for a token, and this process has none or another cluster's, or
            a Ray of the run's own does not start in time.
    """
    global _started_here
    owner = not ray.is_initialized()
    starts = owner and not address and not os.environ.get("RAY_ADDRESS")
    own = {name: value for name, value in _ALONE.items() if name not in os.environ} if starts else {}
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)  # messages for users are printed by the run itself
    os.environ.update(own)
    if owner:
        before = signal.getsignal(signal.SIGTERM)
        strict = {name: os.environ[name] for name in ENVIRONMENT if os.environ.get(MARK)}
        if not starts:
            _check_reachable(address or os.environ["RAY_ADDRESS"])
        try:
            _init(
                address="local" if starts else address,  # without an address Ray joins whatever cluster runs on this machine
                runtime_env={"env_vars": strict} if strict and not starts else None,  # processes that are started here inherit it
                include_dashboard=False if starts else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ray.exceptions.AuthenticationError as error:
            where = address or os.environ.get("RAY_ADDRESS", "of this run")
            raise ValueError(TOKEN_NEEDED.format(where=where, reason=error.message)) from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own handler ends the process silently
        _started_here = starts
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # so that the command line receives errors that it can explain
    context.execution_options.verbose_progress = False
    try:
        yield
    finally:
        if owner:
            _started_here = False
            ray.shutdown()
        for name in own:
            del os.environ[name]
