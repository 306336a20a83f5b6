"""The best AFD configuration whose actors are one GPU each, as afflux's are.

Searches consider tensor parallelism too; who deploys without it wants the best of the others.
"""

from __future__ import annotations

from planner.explore.points import Group, Mode, Point
from planner.explore.question import Exploration


def best_of_single_gpus(found: Exploration) -> Point | None:
    """Most tokens per second within the targets, of the best AFD point and the front, among those
    without tensor parallelism and with as many replicas of either side; None where there is
    none."""
    best = found.best.get(Mode.AFD)
    known = [*([best] if best else []), *found.frontier.get(Mode.AFD, ())]
    targets = found.question.targets
    fitting = [point for point in known if point.meets(targets) and _single(point)]
    return max(fitting, key=lambda point: point.tokens_per_s, default=None)


def sides(point: Point) -> tuple[Group, Group]:
    """Attention and FFN group of an AFD point."""
    by_role = {group.role: group for group in point.groups}
    return by_role["attention"], by_role["ffn"]


def _single(point: Point) -> bool:
    attention, ffn = sides(point)
    return attention.replicas == ffn.replicas and attention.tp == 1 and ffn.moe_tp == 1
