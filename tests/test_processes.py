"""How processes find each other, told by the environment or by a TPU VM's metadata server."""

import http.server
import threading

import jax
import pytest

from rlhf_jax import processes
from rlhf_jax.errors import UserError

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "MEGASCALE_NUM_SLICES",
    "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY", "GCE_METADATA_IP",
)  # fmt: skip


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Arguments of every call of jax.distributed.initialize; a bare environment."""
    calls: list[tuple] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    monkeypatch.setattr(jax.config, "update", lambda *args: calls.append(args))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCE_METADATA_IP", "localhost:1")  # nobody answers there
    return calls


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch):
    """Starts a metadata server that answers with a list of workers."""
    servers = []

    def start(workers: bytes) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path.endswith("/worker-network-endpoints") and self.headers["Metadata-Flavor"] == "Google"
                self.send_response(200 if known else 404)
                self.end_headers()
                self.wfile.write(workers)

            def log_message(self, *args: object) -> None:
                pass

        servers.append(http.server.HTTPServer(("localhost", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{servers[-1].server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_three_variables_describe_any_set_of_machines(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(UserError, match=r"JAX_PROCESS_ID must be a whole number; it is ''"):
        processes.start()
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    processes.start()
    assert joined == [("host:1234", 4, 3)]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    processes.start()
    assert joined[1:] == [("jax_cpu_collectives_implementation", "gloo"), ("host:1234", 4, 3)]


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, True),  # GKE, one slice
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471", "TPU_WORKER_HOSTNAMES": "localhost"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),  # slices of one host each
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}, False),
        ({}, False),  # chips, and no server that would tell of workers
    ],
)
def test_on_a_tpu_jax_finds_the_workers_itself(variables, several, joined, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.start(on_tpu=True)
    assert joined == ([()] if several else [])


@pytest.mark.parametrize(("workers", "several"), [(b"w0:0:10.0.0.2,w1:1:10.0.0.3", True), (b"w0:0:10.0.0.2", False)])
def test_a_tpu_vm_asks_its_metadata_server(workers, several, joined, metadata):
    metadata(workers)
    processes.start(on_tpu=True)
    assert joined == ([()] if several else [])
    processes.start()  # no chips: it is not asked
    assert len(joined) == several


def test_a_server_that_speaks_no_http_knows_of_no_workers(joined, metadata, monkeypatch):
    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "protocol_version", "SSH-2.0")
    metadata(b"w0,w1")
    processes.start(on_tpu=True)
    assert joined == []


def test_one_process_answers_at_once():
    assert processes.shared(lambda: {"values": [0.1]}) == {"values": [0.1]}
    assert processes.any_process(True)
    assert processes.together(lambda: "x") == "x"
    with pytest.raises(UserError, match="^no$"):
        processes.fail_together("no")
    processes.fail_together("")


def test_processes_hold_equally_many_devices():
    processes._check_even({0: 4, 1: 4})
    with pytest.raises(UserError, match="process 0 has 1, process 1 has 3: give each the same number"):
        processes._check_even({1: 3, 0: 1})
