"""AFD by plain arithmetic, one configuration at a time: what the explorer's arrays are held to.

Written from the formulas of arXiv 2605.28302 and the schedule of aiconfigurator 0.12, without the
explorer's own modules for them.
"""

from __future__ import annotations

import math

import numpy as np

from planner.explore.kernels.base import KernelDB, Load
from planner.explore.network import Traffic, a2f, f2a
from planner.explore.placement import placements
from planner.explore.question import Question
from planner.explore.transfers import symmetric_time


def afd_point(
    question: Question,
    db: KernelDB,
    split: tuple[int, int, int, int],
    batch: int,
    lanes: int,
    chunk: int,
    replicas: int,
) -> tuple[float, float, float]:
    """tokens/s of the system, TTFT and TPOT in seconds.

    Args:
        split: tp, dp, moe_tp, ep.
    """
    prompt, output = question.shape.prompt, question.shape.output
    steps = math.ceil(prompt * batch / chunk)
    if batch == 1:
        decoding, mixed_steps, plain_steps = 0, math.ceil(prompt / chunk), output - 1
        riding = 0
    elif steps >= output:
        decoding, mixed_steps, plain_steps = max(1, int(batch / (steps / output))), steps, 0
        riding = steps
    else:
        decoding = max(1, batch - math.ceil(chunk / prompt))
        mixed_steps, plain_steps, riding = steps, output - steps, steps
    mixed = step(question, db, split, decoding, chunk, lanes)
    plain = step(question, db, split, batch, 0, lanes)
    queue = min(2 + (steps - 3) / 20, 4)
    ttft = mixed * math.ceil(prompt / chunk) * queue
    tpot = (mixed * riding + plain * plain_steps) / (riding + plain_steps)
    life = mixed * mixed_steps + plain * plain_steps
    rate = replicas * split[1] * batch * (output - 1) / life
    return rate, ttft, tpot


def step(
    question: Question,
    db: KernelDB,
    split: tuple[int, int, int, int],
    decode: int,
    prefill: int,
    lanes: int,
) -> float:
    """Seconds of one step by the safe bound."""
    tp, dp, moe_tp, ep = split
    model, shape, options = question.model, question.shape, question.options
    count = min(lanes, decode + prefill)
    decode, prefill = math.ceil(decode / count), math.ceil(prefill / count)
    prompts = max(1.0, prefill / shape.prompt)
    piece = prefill / prompts
    load = Load(
        decode=np.array([float(decode)]),
        context=np.array([shape.context]),
        prefill=np.array([float(prefill)]),
        past=np.array([shape.prefix + (shape.prompt - piece) / 2]),
        prompts=np.array([prompts]),
    )
    attention = float(db.attention(model, tp, options.sides, load).seconds[0])
    tokens = decode + prefill
    ffn = float(
        db.experts(model, moe_tp, ep, options.sides, np.array([float(dp * tokens)])).seconds[0]
    )
    traffic = Traffic(model.hidden, model.experts, model.top_k)
    if moe_tp > 1:
        # every GPU of a group gets its part of the group's results from the others
        answered = traffic.copies(ep) / ep * dp * tokens
        size = answered * model.hidden * 2.0 / moe_tp
        group = list(range(moe_tp))
        ffn += model.moe_layers * symmetric_time(question.system, group, group, size)
    there, back = min(
        (
            tuple(
                model.moe_layers
                * float(way(question.system, where, tokens / tp, traffic, ffn_tp=moe_tp))
                for way in (a2f, f2a)
            )
            for where in placements(question.system, tp * dp, moe_tp * ep)
            if max(where.attention + where.ffn) < tp * dp + moe_tp * ep
        ),
        key=sum,
    )
    stages = [attention, there, ffn, back]
    slowest = max(stages)
    paper = count * slowest + (sum(stages) - slowest) / model.layers
    return max(paper, sum(stages))
