"""Whose requests are heard: names, origins, sites, tokens; and the headers of every answer."""

from __future__ import annotations

import pytest
from asgi import ask
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from cotune.device.serve.guards import CONTENT_SECURITY_POLICY, Guards, allowed_hosts
from cotune.openai_api.bearer import BearerTokens

EXTRA = ["laptop.local:7071", "laptop.local", "box:9000"]
HOSTS = allowed_hosts(7071, secure=False, extra=["Laptop.local", "box:9000"])
API = "/v1/models"


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("hello")(scope, receive, send)


def code(headers: dict[str, str], *, token: bool = False, path: str = API, scheme: str = "http") -> str | None:
    guards = Guards(hello, hosts=HOSTS, tokens=BearerTokens(["s3cret"]) if token else None, open_paths=["/"])
    refusal = guards.refusal(Headers({"host": "localhost:7071", **headers}), scheme, path)
    return None if refusal is None else refusal.code


@pytest.mark.parametrize(
    "host",
    [
        "localhost:7071",
        "LOCALHOST:7071",
        "127.0.0.1:7071",
        "[::1]:7071",
        "laptop.local:7071",
        "laptop.local",
        "box:9000",
    ],
)
def test_our_names_are_heard(host: str) -> None:
    assert code({"host": host}) is None


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost",
        "localhost:7072",
        "evil.example:7071",
        "localhost:7071.evil.example",
        "127.0.0.1:7071@evil",
        "box",
    ],
)
def test_a_name_that_was_bound_to_us_is_not(host: str) -> None:
    assert code({"host": host}) == "host_not_allowed"
    assert code({"host": host}, path="/") == "host_not_allowed"


def test_two_hosts_are_none() -> None:
    twice = Headers(raw=[(b"host", b"localhost:7071"), (b"host", b"localhost:7071")])
    refusal = Guards(hello, hosts=HOSTS).refusal(twice, "http", API)
    assert refusal is not None and refusal.code == "host_not_allowed"


@pytest.mark.parametrize(
    "origin",
    ["null", "http://evil.example", "http://localhost:3000", "https://localhost:7071", "http://127.0.0.1:7071", ""],
)
def test_other_origins_are_refused_also_for_reading(origin: str) -> None:
    assert code({"origin": origin}) == "origin_not_allowed"


def test_our_own_origin_is_heard() -> None:
    assert code({"origin": "http://localhost:7071"}) is None
    assert code({"origin": "https://localhost:7071"}, scheme="https") is None


@pytest.mark.parametrize(
    ("site", "heard"), [("same-origin", True), ("none", True), ("same-site", False), ("cross-site", False)]
)
def test_requests_of_other_sites_are_refused(site: str, heard: bool) -> None:
    assert code({"sec-fetch-site": site}) == (None if heard else "cross_site")


def test_a_token_opens_the_interface_and_the_page_needs_none() -> None:
    assert code({}, token=True) == "invalid_api_key"
    assert code({"authorization": "Bearer wrong"}, token=True) == "invalid_api_key"
    assert code({"authorization": "Bearer s3cret"}, token=True) is None
    assert code({}, token=True, path="/") is None
    assert code({}, token=True, path="//") == "invalid_api_key"


def test_standard_ports_may_be_left_out() -> None:
    assert "localhost" in allowed_hosts(443, secure=True) and "localhost" in allowed_hosts(80, secure=False)
    assert "localhost" not in allowed_hosts(443, secure=False)


@pytest.mark.parametrize("host", ["localhost:7071", "evil.example"])
async def test_every_answer_has_the_headers(host: str) -> None:
    reply = await ask(Guards(hello, hosts=HOSTS), "GET", "/", headers={"host": host})
    assert reply.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY and "default-src 'none'" in CONTENT_SECURITY_POLICY
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    for name in ("cross-origin-opener-policy", "cross-origin-resource-policy"):
        assert reply.headers[name] == "same-origin"
    assert reply.headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in reply.headers


async def test_a_refusal_never_shows_the_token_that_came() -> None:
    guards = Guards(hello, hosts=HOSTS, tokens=BearerTokens(["right"]))
    reply = await ask(guards, "GET", API, headers={"authorization": "Bearer s3cret"})
    assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
    assert b"s3cret" not in reply.body and b"right" not in reply.body
