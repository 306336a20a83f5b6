"""Schemas of the custom resources in deploy/kuberay: the fields that we use, nothing else.

By the references of KubeRay (ray.io/v1) and the Prometheus operator (monitoring.coreos.com). What
is not here is refused: look it up there, then add it.
"""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
ON_OFF = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
DURATION = {"type": "string", "pattern": r"^\d+(ms|s|m|h|d)$"}
POD_TEMPLATE = {"type": "object", "required": ["spec"]}
"""Checked by kubernetes-validate."""


def of(required: list[str], **fields: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": required,
        "additionalProperties": False,
    }


def many(item: Any) -> dict[str, Any]:
    """A list with at least one."""
    return {"type": "array", "items": item, "minItems": 1}


def document(spec: dict[str, Any]) -> dict[str, Any]:
    """A whole custom resource."""
    metadata = of(["name"], name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
    return of(["metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)


GROUP = {
    "rayStartParams": TEXTS,
    "labels": TEXTS,
    "resources": TEXTS,
    "template": POD_TEMPLATE,
}
RAY_CLUSTER = of(
    ["rayVersion", "headGroupSpec"],
    rayVersion=TEXT,
    enableInTreeAutoscaling=ON_OFF,
    autoscalerOptions=of(
        [],
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    ),
    authOptions=of(["mode"], mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    headGroupSpec=of(["template"], serviceType=TEXT, **GROUP),
    workerGroupSpecs=many(
        of(
            ["groupName", "template"],
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            **GROUP,
        )
    ),
)
RAY_SERVICE = of(
    ["serveConfigV2", "rayClusterConfig"],
    serveConfigV2=TEXT,
    serviceUnhealthySecondThreshold=COUNT,
    deploymentUnhealthySecondThreshold=COUNT,
    upgradeStrategy=of(
        ["type"], type={"enum": ["None", "NewCluster", "NewClusterWithIncrementalUpgrade"]}
    ),
    rayClusterConfig=RAY_CLUSTER,
)
RELABEL = of([], sourceLabels=many(TEXT), targetLabel=TEXT, regex=TEXT, replacement=TEXT)
POD_MONITOR = of(
    ["selector", "podMetricsEndpoints"],
    selector=of(
        [],
        matchLabels=TEXTS,
        matchExpressions=many(
            of(
                ["key", "operator"],
                key=TEXT,
                operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
                values=many(TEXT),
            )
        ),
    ),
    podMetricsEndpoints=many(
        of([], port=TEXT, interval=DURATION, path=TEXT, relabelings=many(RELABEL))
    ),
)
SCRAPE_CONFIG = of(
    [],
    jobName=TEXT,
    scrapeInterval=DURATION,
    httpSDConfigs=many(of(["url"], url=TEXT, refreshInterval=DURATION)),
)

OF = {
    ("ray.io/v1", "RayCluster"): document(RAY_CLUSTER),
    ("ray.io/v1", "RayService"): document(RAY_SERVICE),
    ("monitoring.coreos.com/v1", "PodMonitor"): document(POD_MONITOR),
    ("monitoring.coreos.com/v1alpha1", "ScrapeConfig"): document(SCRAPE_CONFIG),
}
