"""What a new manager concludes from what the actors say."""

from actors.table import ExpertTable
from cluster.recovery import newest, pairs


def test_newest_table_wins() -> None:
    old, new = (ExpertTable(epoch, {0: (("ffn-0",),)}) for epoch in (3, 5))
    assert newest([new, old]) is new
    assert newest([]) is None


def test_a_connection_needs_both_sides() -> None:
    infos = {
        "attention-0": {"role": "attention", "peers": ["ffn-0", "ffn-1"]},
        "attention-1": {"role": "attention", "peers": ["ffn-0"]},
        "ffn-0": {"role": "ffn", "peers": ["attention-0"]},
        "ffn-1": {"role": "ffn", "peers": ["attention-0", "attention-1"]},
    }
    assert pairs(infos) == {("attention-0", "ffn-0"), ("attention-0", "ffn-1")}
