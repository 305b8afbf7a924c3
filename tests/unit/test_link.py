"""The way to broker and vaults, as far as it needs no cluster."""

import pytest

from slime.cross_job.errors import BadInput
from slime.cross_job.link import check_address, ensure_ray


def test_an_address_of_rays_client_is_refused_at_once(monkeypatch):
    with pytest.raises(BadInput, match=r"ray://head:10001 is an address of Ray's Client.*HOST:PORT"):
        ensure_ray("ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(BadInput, match="ray://head:10001"):
        ensure_ray()


@pytest.mark.parametrize("address", ["head:6379", "auto", "10.0.0.1:6379", "[::1]:6379"])
def test_other_addresses_are_taken_as_they_are(address):
    assert check_address(address) == address
