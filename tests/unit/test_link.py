"""The way to broker and vaults, as far as it needs no cluster."""

import http.server
import socket
import subprocess
import threading

import pytest

from slime.cross_job import link
from slime.cross_job.errors import BadInput, ClusterUnreachable
from slime.cross_job.link import check_address, ensure_ray, find_address, local_clusters


def test_an_address_of_rays_client_is_refused_at_once(monkeypatch):
    with pytest.raises(BadInput, match=r"ray://head:10001 is an address of Ray's Client.*HOST:PORT"):
        ensure_ray("ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(BadInput, match="ray://head:10001"):
        ensure_ray()


@pytest.mark.parametrize("address", ["head:6379", "auto", "10.0.0.1:6379", "[::1]:6379"])
def test_other_addresses_are_taken_as_they_are(address):
    assert check_address(address) == address


@pytest.mark.parametrize(
    ("address", "why"),
    [("http://head:8265", "is the address of Ray's dashboard"), ("local", "would start another Ray cluster")],
)
def test_what_is_no_address_of_a_cluster_is_refused(address, why):
    with pytest.raises(BadInput, match=why):
        ensure_ray(address)


@pytest.fixture
def nodes(tmp_path):
    """nodes(ADDRESS): a process that Linux shows as a raylet of the cluster there."""
    started = []
    (tmp_path / "raylet").symlink_to("/bin/sh")

    def node(address):
        command = [str(tmp_path / "raylet"), "-c", "echo; read x", f"--gcs-address={address}", "--x=--gcs-address=no"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        started[-1].stdout.readline()

    yield node
    for process in started:
        process.communicate()


def test_auto_is_the_one_cluster_of_this_machine_and_several_are_named(nodes, monkeypatch):
    others = local_clusters()  # of whatever else runs here
    monkeypatch.setattr(link, "local_clusters", lambda: sorted({*local_clusters()} - {*others}))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterUnreachable, match="no Ray cluster has a node on this machine"):
        find_address("auto")
    nodes("10.9.9.9:1")
    nodes("10.9.9.9:1")  # another node of the same
    assert find_address("auto") == "10.9.9.9:1"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert find_address() == "10.9.9.9:1"
    nodes("10.9.9.9:2")
    for asked in ("auto", None):
        with pytest.raises(BadInput, match=r"several .* name one of them: 10\.9\.9\.9:1, 10\.9\.9\.9:2$"):
            find_address(asked)
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:2")  # named
    assert find_address() == "10.9.9.9:2"


def test_somebody_who_is_no_ray_is_not_waited_for():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterUnreachable, match="somebody listens there who is no Ray: it says b"):
            ensure_ray(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    with pytest.raises(ClusterUnreachable, match="nobody listens there"):
        ensure_ray(f"127.0.0.1:{server.server_port}")
    with pytest.raises(ClusterUnreachable, match="'head' is no address of a Ray cluster"):
        ensure_ray("head")


def test_somebody_who_says_nothing_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(link, "_SILENT_S", 0.2)
    said = r"somebody listens at 127\.0\.0\.1:\d+ and says nothing for 0\.2 s"
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ClusterUnreachable, match=said):
        ensure_ray(f"127.0.0.1:{silent.getsockname()[1]}")
