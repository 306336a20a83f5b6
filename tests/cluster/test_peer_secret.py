"""What the actors of a deployment know each other by."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.configs import attention_config, ffn_config
from cluster.peer_secret import derived
from cluster.spec import make_spec


@given(st.binary(min_size=1, max_size=40), st.text(max_size=10), st.text(max_size=10))
def test_every_deployment_has_its_own(key: bytes, one: str, other: str):
    assert len(derived(key, one)) == 32
    assert (derived(key, one) == derived(key, other)) == (one == other)
    assert derived(key + b"1", one) != derived(key, one)


def test_actors_are_told_it_and_show_it_nowhere():
    spec = make_spec({"model": {"path": "/models/x"}}, [])
    for config in (
        attention_config(spec, "attention-0", secret=b"very secret", address=None),
        ffn_config(spec, "ffn-0", {0: [1]}, 1, secret=b"very secret", address=None),
    ):
        assert config.secret == b"very secret" and "very secret" not in repr(config)
