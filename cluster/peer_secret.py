"""The secret that a deployment's actors share, so that they refuse strangers on the data plane.

Derived from Ray's cluster token, which every node has anyway; a manager that starts anew derives
the same. A Ray without token authentication keeps a random one for us, readable for whoever may use
that Ray: no more open than the rest of such a cluster. What it is good for: ``transport.trust``.
"""

from __future__ import annotations

import hmac
import secrets

_SPACE = b"afflux"


def peer_secret(deployment: str) -> bytes:
    """32 bytes. This process must be connected to Ray."""
    from ray._raylet import AuthenticationTokenLoader

    loader = AuthenticationTokenLoader.instance()
    if loader.has_token():
        return derived(loader.get_raw_token().encode(), deployment)
    return derived(_kept_by_ray(), deployment)


def derived(key: bytes, deployment: str) -> bytes:
    """A deployment's secret from the cluster's. Pure."""
    return hmac.digest(key, b"afflux data plane: " + deployment.encode(), "sha256")


def _kept_by_ray() -> bytes:
    """A random key, the same for everybody who asks this Ray."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    name = b"peer-key"
    # not overwritten: whoever comes first decides
    _internal_kv_put(name, secrets.token_bytes(32), overwrite=False, namespace=_SPACE)
    return bytes(_internal_kv_get(name, namespace=_SPACE))
