"""Drives a fresh vault with PyPI's hvac, which knows nothing of this project: init, unseal, KV v2, tokens.

Usage: hvac_client.py http://127.0.0.1:PORT
"""

import sys

import hvac
from hvac import exceptions


def refused(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"{call.__name__} was not refused with {kind.__name__}")


def main(address):
    client = hvac.Client(url=address)
    system, kv = client.sys, client.secrets.kv.v2

    assert not system.is_initialized()
    assert system.read_health_status(method="GET").status_code == 501
    made = system.initialize(secret_shares=5, secret_threshold=3)
    assert len(made["keys"]) == 5 and len(made["keys_base64"]) == 5
    refused(exceptions.InvalidRequest, system.initialize, secret_shares=1, secret_threshold=1)
    assert system.is_initialized() and system.is_sealed()
    assert system.read_health_status(method="HEAD").status_code == 503
    assert system.read_health_status(method="GET", sealed_code=200)["sealed"] is True

    client.token = made["root_token"]
    refused(exceptions.VaultDown, kv.read_secret_version, "app/config", raise_on_deleted_version=True)
    refused(exceptions.InvalidRequest, system.submit_unseal_key, "not a key")
    assert system.submit_unseal_key(made["keys"][0])["progress"] == 1
    assert system.submit_unseal_key(reset=True)["progress"] == 0
    status = system.submit_unseal_keys(made["keys"][1:3] + made["keys_base64"][4:5])
    assert not status["sealed"] and status["t"] == 3 and status["n"] == 5
    assert system.read_health_status(method="GET")["sealed"] is False
    assert client.is_authenticated()
    assert system.list_mounted_secrets_engines()["data"]["secret/"]["options"]["version"] == "2"

    # Versions, and numbers that a float cannot hold.
    big = 2**63 + 1
    first = kv.create_or_update_secret("app/config", {"user": "u", "big": big, "list": [1, "a", None]})
    assert first["data"]["version"] == 1 and first["request_id"]
    read = kv.read_secret_version("app/config", raise_on_deleted_version=True)
    assert read["data"]["data"] == {"user": "u", "big": big, "list": [1, "a", None]}
    assert kv.create_or_update_secret("app/config", {"user": "v"}, cas=1)["data"]["version"] == 2
    error = refused(exceptions.InvalidRequest, kv.create_or_update_secret, "app/config", {}, cas=1)
    assert "check-and-set" in str(error)
    old = kv.read_secret_version("app/config", version=1, raise_on_deleted_version=True)
    assert old["data"]["data"]["big"] == big
    assert kv.patch("app/config", {"more": "x"})["data"]["version"] == 3
    read = kv.read_secret_version("app/config", raise_on_deleted_version=True)
    assert read["data"]["data"] == {"user": "v", "more": "x"}

    # Listing.
    kv.create_or_update_secret("app/deep/er", {"k": "1"})
    assert kv.list_secrets("")["data"]["keys"] == ["app/"]
    assert kv.list_secrets("app")["data"]["keys"] == ["config", "deep/"]
    refused(exceptions.InvalidPath, kv.list_secrets, "nowhere")

    # Deletion and its undoing, destruction.
    kv.delete_latest_version_of_secret("app/config")
    refused(exceptions.InvalidPath, kv.read_secret_version, "app/config", raise_on_deleted_version=True)
    gone = kv.read_secret_version("app/config", raise_on_deleted_version=False)
    assert gone["data"]["data"] is None and gone["data"]["metadata"]["deletion_time"]
    kv.undelete_secret_versions("app/config", [3])
    kv.delete_secret_versions("app/config", [1, 2])
    assert kv.read_secret_version("app/config", raise_on_deleted_version=True)["data"]["metadata"]["version"] == 3
    kv.destroy_secret_versions("app/config", [1])
    metadata = kv.read_secret_metadata("app/config")["data"]
    assert metadata["versions"]["1"]["destroyed"] and not metadata["versions"]["3"]["destroyed"]
    assert metadata["current_version"] == 3

    # Settings.
    kv.update_metadata("app/config", max_versions=2, cas_required=True, custom_metadata={"owner": "team"})
    metadata = kv.read_secret_metadata("app/config")["data"]
    assert metadata["max_versions"] == 2 and metadata["custom_metadata"] == {"owner": "team"}
    refused(exceptions.InvalidRequest, kv.create_or_update_secret, "app/config", {})
    kv.create_or_update_secret("app/config", {"user": "w"}, cas=3)
    assert sorted(kv.read_secret_metadata("app/config")["data"]["versions"]) == ["3", "4"]
    kv.delete_metadata_and_all_versions("app/config")
    refused(exceptions.InvalidPath, kv.read_secret_metadata, "app/config")

    # Tokens.
    limited = client.auth.token.create(policies=["default"], ttl="1h", display_name="ci")["auth"]["client_token"]
    other = hvac.Client(url=address, token=limited)
    assert other.auth.token.lookup_self()["data"]["display_name"] == "token-ci"
    refused(exceptions.Forbidden, other.secrets.kv.v2.read_secret_version, "app/deep/er",
            raise_on_deleted_version=True)
    other.auth.token.revoke_self()
    assert not other.is_authenticated()
    refused(exceptions.Forbidden, hvac.Client(url=address, token="hvs.wrong").secrets.kv.v2.list_secrets, "")

    system.seal()
    assert system.is_sealed()
    print("hvac: all passed")


main(sys.argv[1])
