"""Greedy tokens with attention and experts apart, against plain vLLM on the same checkpoint.

For every family, prefix caching on and off, chunked prefill on and off: plain vLLM generates, then
the split engine does with 1, 2 and 3 FFN actors and 1, 2 and 3 lanes. Everything in float32, where
composition does not round differently enough to flip a choice, so "equal" means every token.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.engine import AttentionConfig
from benchmarks.offline import PlainEngine
from benchmarks.processes import Remote
from benchmarks.report import make_report, write_report
from benchmarks.split import FFNHost, FFNPool, attention_process

MAX_MODEL_LEN = 256


@dataclass(frozen=True)
class Case:
    """One cell of the matrix and its outcome."""

    family: str
    prefix_cache: bool
    chunked_prefill: bool
    ffn: int
    lanes: int
    requests: int
    tokens: int
    different: int  # requests whose tokens differ from plain vLLM
    lanes_used: int
    errors: int


def engine_args(prefix_cache: bool, chunked_prefill: bool, eager: bool = True) -> dict[str, Any]:
    """The engine arguments that plain vLLM and the attention side both get."""
    return {
        "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 16,
        "enforce_eager": eager,
        "enable_prefix_caching": prefix_cache,
        "enable_chunked_prefill": chunked_prefill,
        "max_num_batched_tokens": 48 if chunked_prefill else MAX_MODEL_LEN,
        "kv_cache_memory_bytes": 64 << 20,
    }


def prompts(vocabulary: int, wave: int = 0) -> list[list[int]]:
    """Twelve prompts of 3 to 80 tokens; half of them share a prefix of 40 with each other."""
    shared = [(7 * j + 3) % (vocabulary - 10) + 5 for j in range(40)]
    made = []
    for i in range(12):
        own = [(31 * i + 11 * j + 17 * wave) % (vocabulary - 10) + 5 for j in range(3 + 4 * i)]
        made.append((shared + own)[:80] if i % 2 else own)
    return made


def compare(
    family: str,
    model: str,
    *,
    vocabulary: int,
    ffn: Sequence[int] = (1, 2, 3),
    lanes: Sequence[int] = (1, 2, 3),
    engines: Iterable[tuple[bool, bool]] = (
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ),
    max_tokens: int = 12,
    eager: bool = True,
    hosts: Sequence[Remote] | None = None,
    on_case: Callable[[Case], None] = lambda case: None,
) -> list[Case]:
    """Run the matrix for one checkpoint; see the module.

    Args:
        engines: (prefix_cache, chunked_prefill) pairs.
        hosts: FFN hosts to use again, at least ``max(ffn)``; None starts some and ends them.
    """
    cases: list[Case] = []
    own = [Remote(FFNHost) for _ in range(max(ffn))] if hosts is None else []
    others: list[Remote] = []
    try:
        waves = [prompts(vocabulary, wave) for wave in range(2)]
        pools = {
            n: FFNPool(hosts or own, model, n, n, dtype="float32", max_frame_tokens=64) for n in ffn
        }
        for number, (prefix_cache, chunked) in enumerate(engines):
            args = engine_args(prefix_cache, chunked, eager)
            plain = Remote(functools.partial(PlainEngine, model, "float32", args))
            name = f"attention-{number}"
            config = AttentionConfig(
                name,
                model,
                dtype="float32",
                engine=args,
                lanes=max(lanes),
                max_frame_tokens=64,
                timeout_s=60.0,
            )
            attention = attention_process(config)
            others += [plain, attention]
            expected = [plain.generate(wave, max_tokens).tokens for wave in waves]
            plain.kill()
            for pool in pools.values():
                pool.connect(attention, name)
            for n, m in itertools.product(ffn, lanes):
                attention.adopt(pools[n].table)
                attention.set_lanes(m)
                runs = [attention.generate(wave, max_tokens) for wave in waves]
                got = [run.tokens for run in runs]
                flat = list(itertools.chain(*expected)), list(itertools.chain(*got))
                case = Case(
                    family,
                    prefix_cache,
                    chunked,
                    n,
                    m,
                    requests=len(flat[0]),
                    tokens=sum(map(len, flat[1])),
                    different=sum(a != b for a, b in zip(*flat, strict=True)),
                    lanes_used=max(attention.facts()["lanes"][-20:]),
                    errors=sum(len(run.errors) for run in runs),
                )
                cases.append(case)
                on_case(case)
            attention.kill()
        for pool in pools.values():
            pool.stop()
    finally:
        for process in (*own, *others):
            process.kill()
    return cases


def write_matrix(cases: Sequence[Case], json_path: Path) -> dict[str, Any]:
    """Write a finished matrix as a report; ``tokens_match`` is true when no request differs."""
    report = make_report(
        "tokens",
        {
            "cases": len(cases),
            "families": ", ".join(sorted({case.family for case in cases})),
            "requests": sum(case.requests for case in cases),
            "requests_different": sum(case.different for case in cases),
            "tokens_match": all(not case.different and not case.errors for case in cases),
            "dtype": "float32",
        },
        {"cases": [asdict(case) for case in cases]},
    )
    write_report(report, json_path)
    return report
