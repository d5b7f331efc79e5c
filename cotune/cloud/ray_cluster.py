"""One cloud on many machines: Ray Serve runs replicas of the same application and spreads connections over them.

A connection stays with its replica. When a replica is lost its devices connect again, land on any other, and go on
there from what they hold: an `Open` with an unknown ticket makes a new session from the tokens that it brings.

Serve's proxy carries WebSockets to the replicas as ASGI messages. It takes messages of up to 16 MiB, eight times our
largest frame; replicas refuse what is larger than ours. Ray is imported when a cluster starts, not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from cotune.cloud.front import FrontConfig, front
from cotune.cloud.host import HostConfig
from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import CloudService
from cotune.errors import InputError, first_line
from cotune.openai_api.bearer import BearerTokens
from cotune.openai_api.plain_chat import plain_chat_format
from cotune.wire.event_loop import asked_to_end

_APPLICATION = "cotune"


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How a cloud spreads over a Ray cluster.

    Attributes:
        replicas: how many hold the model.
        address: `local` starts a cluster of this machine alone; else of a running one, as `ray.init` takes it.
        cpus, gpus: that each replica asks the cluster for; parts of one are allowed.
        drain_timeout_s: at the end, for running texts to finish before their devices are sent away, seconds.
    """

    replicas: int = 2
    address: str = "local"
    cpus: float = 1.0
    gpus: float = 0.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise InputError(f"replicas is {self.replicas}, expected at least 1")
        for name in ("cpus", "gpus", "drain_timeout_s"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 or more")


def check_ray() -> None:
    """Refuse where Ray is not installed.

    Raises:
        InputError: says how to install it.
    """
    # Sends usage reports home by default. What is set before the first import counts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'Ray Serve is not installed ({error}), expected for --engine ray; run: pip install "cotune[cloud,ray]"'
        ) from error


async def host_on_ray(
    load: Callable[[], HostedModel],
    config: HostConfig,
    cluster: ClusterConfig,
    *,
    on_ready: Callable[[str], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serve a model from replicas until SIGINT, SIGTERM or `stop`; then drain them.

    Args:
        load: makes the model, in each replica's own process; a function of a module, with plain arguments.
        config: where and for whom; `service` limits each replica.
        cluster: how many, and where.
        on_ready: called once with the URL that devices connect to.
        stop: ends the service when set; by default only signals do.

    Raises:
        InputError: Ray is missing, or the cluster or a replica cannot start.
    """
    check_ray()
    stop = stop or asyncio.Event()
    tokens = None if config.token_file is None else BearerTokens.read(config.token_file)
    started = await asyncio.to_thread(_start, load, config, cluster, tokens)
    # After Ray's own handlers, which would end this process without draining.
    with asked_to_end(stop.set):
        try:
            on_ready(started.url)
            await stop.wait()
        finally:
            await asyncio.to_thread(started.close, cluster.drain_timeout_s)


def _start(
    load: Callable[[], HostedModel], config: HostConfig, cluster: ClusterConfig, tokens: BearerTokens | None
) -> _Started:
    import ray
    from ray import serve

    if config.port == 0:
        raise InputError("port is 0, and Ray Serve cannot take any free one; give a port")
    try:
        ray.init(
            address=cluster.address,
            include_dashboard=False if cluster.address == "local" else None,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"the Ray cluster at {cluster.address!r} cannot be used: {first_line(error)}; check --ray-address"
        ) from error
    drain = ray.remote(num_cpus=0)(_Drain).remote()
    http = {"host": config.host, "port": config.port}
    if config.tls_cert is not None and config.tls_key is not None:
        http |= {"ssl_certfile": str(config.tls_cert.absolute()), "ssl_keyfile": str(config.tls_key.absolute())}
    started = _Started(config, drain, cluster.replicas)
    try:
        serve.start(proxy_location="EveryNode", http_options=http)
        deployment: Any = serve.deployment(
            serve.ingress(_builder(load, config, tokens, drain))(),
            name=_APPLICATION,
            num_replicas=cluster.replicas,
            # Each device is one long request.
            max_ongoing_requests=2 * config.service.max_sessions,
            graceful_shutdown_timeout_s=cluster.drain_timeout_s + 5.0,
            ray_actor_options={
                "num_cpus": cluster.cpus,
                "num_gpus": cluster.gpus,
                # Before PyTorch is loaded; see `cotune.models.row_invariance`.
                "runtime_env": {"env_vars": {"MKL_CBWR": os.environ.get("MKL_CBWR", "AUTO,STRICT")}},
            },
        )
        serve.run(deployment.bind(), name=_APPLICATION, route_prefix="/")
    except Exception as error:
        started.close(0.0)
        raise InputError(f"the replicas cannot start: {first_line(error)}; see Ray's logs") from error
    return started


class _Started:
    """A cluster at work."""

    def __init__(self, config: HostConfig, drain: Any, replicas: int) -> None:
        scheme = "ws" if config.tls_cert is None else "wss"
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"{scheme}://{host}:{config.port}"
        self._drain = drain
        self._replicas = replicas

    def close(self, drain_timeout_s: float) -> None:
        """Let running texts finish, hand the rest back to their devices, and stop."""
        import ray
        from ray import serve

        with contextlib.suppress(Exception):  # also when the cluster is gone already
            ray.get(self._drain.begin.remote(drain_timeout_s, self._replicas), timeout=drain_timeout_s + 5.0)
        with contextlib.suppress(Exception):
            serve.delete(_APPLICATION)
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


class _Drain:
    """An actor that all replicas listen to: Serve itself tells a replica of its end only when its requests are over."""

    def __init__(self) -> None:
        self._timeout_s: float | None = None
        self._begun = asyncio.Event()
        self._num_done = 0

    async def begin(self, timeout_s: float, replicas: int) -> None:
        """All replicas drain; returns when they have."""
        self._timeout_s = timeout_s
        self._begun.set()
        ends_s = time.monotonic() + timeout_s + 2.0
        while self._num_done < replicas and time.monotonic() < ends_s:
            await asyncio.sleep(0.05)

    async def wait(self) -> float:
        """When draining begins: how long it may take, seconds."""
        await self._begun.wait()
        assert self._timeout_s is not None
        return self._timeout_s

    async def done(self) -> None:
        """A replica has drained."""
        self._num_done += 1


def _builder(
    load: Callable[[], HostedModel], config: HostConfig, tokens: BearerTokens | None, drain: Any
) -> Callable[[], ASGIApp]:
    """What makes the application in a replica; Ray sends this function there."""

    def build() -> ASGIApp:
        service = CloudService(load(), config.service)
        front_config = FrontConfig(
            tokens=tokens,
            max_connections=2 * config.service.max_sessions,
            chat_format=config.chat_format or plain_chat_format,
        )
        return _ReplicaApp(service, front(service, front_config), drain)

    return build


class _ReplicaApp:
    """The application of one replica, which drains when the cluster says so."""

    def __init__(self, service: CloudService, app: ASGIApp, drain: Any) -> None:
        self._service = service
        self._app = app
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # In the loop that runs requests, which is not the one that builds.
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain_in_time())
        await self._app(scope, receive, send)

    async def _drain_in_time(self) -> None:
        timeout_s = await self._drain.wait.remote()
        await self._service.drain(timeout_s)
        await self._drain.done.remote()
