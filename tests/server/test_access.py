"""Who may call and with how much: keys, origins, sizes, a full queue, TLS."""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.live_server import LiveServer, error_of, in_background, live_server, trusting

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
JSON = {"content-type": "application/json"}


def test_keys_guard_everything_but_probes_metrics_and_documentation() -> None:
    with live_server(api_key=["right", "also"]) as server, server.client() as http:
        for path in ("/health", "/livez", "/readyz", "/ping", "/version", "/metrics", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 200
        guarded = ("/v1/chat/completions", "/tokenize", "/detokenize", "/no/such/path", "/v1/models/../models")
        for method, path in [("GET", "/v1/models"), *(("POST", path) for path in guarded)]:
            response = http.request(method, path)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for header in (
            "Bearer wrong",
            "Bearer",
            "right",
            "Basic right",
            "Bearer right also",
            "Bearer rightx",
            "Bearer \xe9",
        ):
            headers = {"authorization": header.encode("latin-1")}
            assert error_of(http.get("/v1/models", headers=headers), 401)
        for header in ("Bearer right", "bearer also"):
            assert http.get("/v1/models", headers={"authorization": header}).status_code == 200


def test_browsers_may_call_from_allowed_origins_only() -> None:
    with live_server(api_key=["key"], allowed_origins=["https://app.example"]) as server, server.client() as http:
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        allowed = http.options("/v1/chat/completions", headers={"origin": "https://app.example", **ask})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        refused = http.options("/v1/chat/completions", headers={"origin": "https://evil.example", **ask})
        assert "access-control-allow-origin" not in refused.headers
        # An error must be readable by the page too, or it only sees "network error".
        error = http.get("/v1/models", headers={"origin": "https://app.example"})
        assert error.status_code == 401 and error.headers["access-control-allow-origin"] == "https://app.example"


def test_any_origin_by_default(http: httpx.Client) -> None:
    assert http.get("/health", headers={"origin": "https://x.example"}).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("implementation", ["httptools", "h11"])
def test_bodies_have_a_limit_announced_or_not(implementation: str) -> None:
    with live_server(max_request_bytes=1000, http=implementation) as server, server.client() as http:
        big = b'{"prompt": "' + b"x" * 2000 + b'"}'
        error = error_of(http.post("/tokenize", content=big, headers=JSON), 413)
        assert "--max-request-bytes" in error["message"]

        def pieces() -> Any:
            for start in range(0, len(big), 100):
                yield big[start : start + 100]

        assert error_of(http.post("/tokenize", content=pieces(), headers=JSON), 413)["code"] == "request_too_large"
        exact = b'{"prompt": "' + b"x" * (1000 - 14) + b'"}'
        assert len(exact) == 1000
        assert http.post("/tokenize", content=exact, headers=JSON).status_code == 200


def test_a_body_that_is_announced_too_large_is_not_waited_for() -> None:
    with live_server(max_request_bytes=1000) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 99999999\r\n\r\n"
            )
            answer = b""
            while data := connection.recv(4096):  # ends: the server closes the connection
                answer += data
        assert answer.startswith(b"HTTP/1.1 413")


def test_a_client_that_goes_away_in_the_middle_of_its_body_does_no_harm(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
    with server.client() as http:
        assert http.get("/health").status_code == 200


def test_too_many_prompts_in_one_request() -> None:
    with live_server(max_num_waiting=10) as server, server.client() as http:
        error = error_of(http.post("/v1/completions", json={"prompt": ["a"] * 6, "n": 2}), 400)
        assert "send them in several requests" in error["message"]


def test_a_full_queue_is_503_with_retry_after() -> None:
    with live_server(config={"max_num_seqs": 1}, engine={"max_num_waiting": 1}) as server, server.client() as http:
        server.do(server.core.gate.clear)
        with in_background(server, {"prompt": "a"}), in_background(server, {"prompt": "b"}):
            server.wait_until(lambda: server.engine.num_unfinished == 2)
            response = http.post("/v1/completions", json={"prompt": "a"})
            assert "--max-num-waiting" in error_of(response, 503)["message"]
            assert int(response.headers["retry-after"]) >= 1
            server.do(server.core.gate.set)


def make_certificate(directory: Path) -> tuple[str, str]:
    """Certificate and key for 127.0.0.1, by the cryptography package or the openssl command."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        if shutil.which("openssl") is None:
            pytest.skip("neither the cryptography package nor openssl is here to make a certificate")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        return str(certificate), str(key)
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(private, hashes.SHA256())
    )  # fmt: skip
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return str(certificate), str(key)


def test_tls(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    with live_server(ssl_certfile=certificate, ssl_keyfile=key) as server:
        assert server.url.startswith("https://")
        with server.client(verify=trusting(certificate)) as http:
            body = {**CHAT, "stream": True}
            assert http.post("/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", trust_env=False)
