"""Systems from YAML files, for clusters that aren't known by name.

name: my_h200
node: 8
kernels: h200_sxm            # measured kernels to use; left out: none
gpu:
  name: H200 SXM
  memory: 151397597184       # bytes
  bandwidth: 4.8e12          # bytes per second
  flops: {bf16: 989e12, fp8: 1978e12}
  source: data sheet of 2024
tiers:                       # innermost first, the last joins all
  - {name: nvlink, gpus: 8, latency: 10e-6, bandwidth: 450e9}
  - {name: cluster, latency: 10e-6, bandwidth: 25e9}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.errors import PlannerError
from planner.explore.system import Gpu, System, Tier

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Gpu(_Strict):
    name: str
    memory: Positive
    bandwidth: Positive
    flops: dict[Literal["bf16", "fp8", "fp4"], Positive]
    source: str
    bandwidth_share: Share = 0.8
    flops_share: Share = 0.7
    launch: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3e-6


class _Tier(_Strict):
    name: str
    gpus: Annotated[int, Field(ge=1)] | None = None
    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bandwidth: Positive
    p99: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0


class _System(_Strict):
    name: str
    node: Annotated[int, Field(ge=1)]
    gpu: _Gpu
    tiers: Annotated[list[_Tier], Field(min_length=1)]
    kernels: str = ""


def read_system(path: str | Path) -> System:
    """A system from a YAML file; its fields are those of ``System``, ``Gpu`` and ``Tier``.

    Raises:
        PlannerError: a file that can't be read, a field missing, unknown or out of range; names
            the field.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlannerError(f"{path} can't be read as YAML: {error}") from error
    try:
        read = _System.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PlannerError(
            f"{path}: {where}: {first['msg']}; expected name, node, gpu, tiers and kernels as in "
            "the documentation of planner.explore.system_files"
        ) from error
    if "bf16" not in read.gpu.flops:
        raise PlannerError(f"{path}: gpu.flops lacks bf16: expected at least its rate in bf16")
    gpu = read.gpu.model_dump()
    tiers = tuple(Tier(**tier.model_dump()) for tier in read.tiers)
    return System(read.name, Gpu(**gpu), read.node, tiers, read.kernels)
