"""Attention and experts apart give plain vLLM's tokens, over real NIXL, for every family.

The fast part covers some families, all FFN counts and lanes, with prefix caching and chunked
prefill on (the hardest setting); ``make test-slow`` runs all families and the full matrix, and
records it in benchmarks/results/.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import Remote
from benchmarks.split import FFNHost
from benchmarks.tokens import Case, compare, write_matrix
from tests.models import VOCAB

REQUIRED = ("qwen3_moe", "deepseek_v3", "mixtral", "olmoe")
# families that no line of actors/ was written for; "stacked" keeps a layer's experts in one tensor
OTHERS = ("glm4_moe", "qwen2_moe", "granitemoe", "gpt_oss", "stacked")
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "tokens.json"


@pytest.fixture(scope="module")
def hosts():
    """Three processes that FFN actors of all families are started in, one family after another."""
    made = [Remote(FFNHost) for _ in range(3)]
    yield made
    for host in made:
        host.kill()


def wrong(cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.different or case.errors]


def seldom(families: Sequence[str], *slow: str) -> list[Any]:
    """All families; some with ``make test-slow`` only, since each takes most of a minute."""
    often = [family for family in families if family not in slow]
    return [*often, *(pytest.param(family, marks=pytest.mark.slow) for family in slow)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", seldom(REQUIRED, "olmoe", "mixtral"))
def test_tokens_equal_plain_vllm(family, moe_checkpoint, hosts):
    cases = compare(
        family, str(moe_checkpoint(family)), vocabulary=VOCAB, engines=[(True, True)], hosts=hosts
    )
    assert len(cases) == 9
    assert wrong(cases) == []
    assert {case.lanes_used for case in cases} == {1, 2, 3}
    assert all(case.tokens == case.requests * 12 for case in cases)


@pytest.mark.timeout(600)
def test_tokens_equal_without_chunking_and_prefix_cache(moe_checkpoint, hosts):
    cases = compare(
        "qwen3_moe",
        str(moe_checkpoint("qwen3_moe")),
        vocabulary=VOCAB,
        ffn=(1, 3),
        lanes=(1, 2),
        engines=[(False, False)],
        hosts=hosts,
    )
    assert wrong(cases) == []


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(600)
def test_tokens_equal_when_compiled(moe_checkpoint, hosts):
    """torch.compile on the attention side, shared experts in the graph, lanes inside of it."""
    cases = compare(
        "deepseek_v3",
        str(moe_checkpoint("deepseek_v3")),
        vocabulary=VOCAB,
        ffn=(2,),
        lanes=(1, 3),
        engines=[(True, True)],
        hosts=hosts,
        eager=False,
    )
    assert wrong(cases) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", seldom(["gpt_oss"], "stacked", "granitemoe"))
def test_a_family_never_heard_of(family, moe_checkpoint, hosts):
    cases = compare(
        family,
        str(moe_checkpoint(family)),
        vocabulary=VOCAB,
        ffn=(3,),
        lanes=(2,),
        engines=[(True, True)],
        hosts=hosts,
    )
    assert wrong(cases) == []


def full_matrix(families, moe_checkpoint, hosts) -> list[Case]:
    return [
        case
        for family in families
        for case in compare(
            family, str(moe_checkpoint(family)), vocabulary=VOCAB, hosts=hosts, on_case=print
        )
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_matrix(moe_checkpoint, hosts):
    cases = full_matrix(REQUIRED, moe_checkpoint, hosts)
    write_matrix(cases, RESULT)
    assert len(cases) == 36 * len(REQUIRED)
    assert wrong(cases) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_matrix_of_other_families(moe_checkpoint, hosts):
    assert wrong(full_matrix(OTHERS, moe_checkpoint, hosts)) == []


def test_no_model_name_in_actors():
    names = ("qwen", "deepseek", "mixtral", "olmoe", "llama", "gpt_oss", "gptoss", "glm", "granite")
    for file in (Path(__file__).parents[2] / "actors").rglob("*.py"):
        text = file.read_text().lower()
        assert [name for name in names if name in text] == [], file
