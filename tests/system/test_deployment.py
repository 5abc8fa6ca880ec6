"""The commands of docs/deployment.md that fetch TDX's collateral, against a server that answers as Intel's does: by the
interface's version 4, texts and their signatures compact in one object, chains in headers, URL-encoded."""

import hashlib
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import domains
import pytest
from processes import ROOT
from tsm.pipeline import tdx_files

from attest import AttestationError, certificates
from attest.providers import tdx

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
INTEL = ("https://api.trustedservices.intel.com", "https://certificates.trustedservices.intel.com")
QUOTE = domains.quote(domains.living())


def answers() -> dict[str, tuple[dict[str, str], bytes]]:
    """What is at each path, its query included: headers and a body."""
    files = tdx_files()
    pck_chain = domains.pem(*(domains.living()[who].der for who in ("authority", "root")))
    return {
        f"/tdx/certification/v4/tcb?fmspc={domains.FMSPC.hex()}":
            ({"TCB-Info-Issuer-Chain": quote(files["signer.pem"], "")}, files["tcbInfo"]),
        "/tdx/certification/v4/qe/identity":
            ({"SGX-Enclave-Identity-Issuer-Chain": quote(files["signer.pem"], "")}, files["enclaveIdentity"]),
        "/sgx/certification/v4/pckcrl?ca=platform&encoding=der":
            ({"SGX-PCK-CRL-Issuer-Chain": quote(pck_chain, "")}, files["pck.crl"]),
        "/IntelSGXRootCA.der": ({}, files["root.crl"]),
    }  # fmt: skip


class Intel(ThreadingHTTPServer):
    """Answers at 127.0.0.1, and remembers what it was asked for. HTTP/2 spells headers in lower case."""

    def __init__(self, spelled: Callable[[str], str]) -> None:
        known, asked = answers(), []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                headers, body = known.get(self.path, ({}, b"<html>404</html>"))
                self.send_response(200 if self.path in known else 404)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(spelled(name), value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.known, self.asked = known, asked
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture(params=[str, str.lower], ids=["HTTP/1.1", "HTTP/2"])
def intel(request: pytest.FixtureRequest) -> Iterator[Intel]:
    with Intel(request.param) as server:
        yield server
        server.shutdown()


def fetch(intel: Intel, where: Path, fmspc: str) -> "subprocess.CompletedProcess[str]":
    """Runs the page's commands, word for word but for the hosts and the FMSPC."""
    blocks = re.findall(
        r"^```text\n(.*?)^```$", (ROOT / "docs" / "deployment.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (script,) = [block for block in blocks if block.startswith(f"site={INTEL[0]}")]
    for host in INTEL:
        assert host in script
        script = script.replace(host, f"http://127.0.0.1:{intel.server_port}")
    (where / "bin").mkdir()
    (where / "bin" / "python").symlink_to(sys.executable)
    environment = {"PATH": f"{where / 'bin'}:/usr/bin:/bin", "no_proxy": "*"}
    return subprocess.run(["bash", "-euo", "pipefail", "-c", script.replace("FMSPC", fmspc)], cwd=where,
                          env=environment, capture_output=True, text=True, timeout=60)  # fmt: skip


def test_the_commands_fetch_collateral_that_a_stage_takes(intel: Intel, tmp_path: Path) -> None:
    done = fetch(intel, tmp_path, domains.FMSPC.hex())
    assert done.returncode == 0, done.stderr
    assert sorted(intel.asked) == sorted(intel.known)
    found = tdx.endorsements(tdx.parse(QUOTE), certificates.files(str(tmp_path / "endorsements")))
    assert list(found) == domains.living_collateral()
    root = hashlib.sha256(domains.living()["root"].der).digest()
    statement = tdx.authenticate(QUOTE, found, [root])
    assert (statement.collateral, statement.status) == (True, "UpToDate")


def test_a_stage_that_misses_collateral_names_what_the_commands_fetch(intel: Intel, tmp_path: Path) -> None:
    with pytest.raises(AttestationError) as caught:
        tdx.endorsements(tdx.parse(QUOTE), certificates.files(str(tmp_path)))
    named = re.findall(r"https://[^/ ]*(/[^ ,;]*)", str(caught.value))
    assert sorted(named) == sorted(intel.known)


def test_what_intel_does_not_have_is_no_collateral(intel: Intel, tmp_path: Path) -> None:
    done = fetch(intel, tmp_path, "000000000000")
    assert done.returncode != 0
    assert "404" in done.stderr
    assert not any((tmp_path / "endorsements").iterdir())
