"""The manifests: valid by Kubernetes' own schemas, and by the documented fields where none is packaged (KubeRay)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from baton.deploy.settings import from_yaml, resolve

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "baton.yaml").read_text()))
VERSIONS = ("1.29", "1.37")

# KubeRay's reference of ray.io/v1.
RAY_CLUSTER = frozenset({
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
})  # fmt: skip
HEAD = frozenset({
    "enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template",
})  # fmt: skip
GROUP = frozenset({
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
    "replicas", "resources", "scaleStrategy", "suspend", "template",
})  # fmt: skip
AUTOSCALER = frozenset({
    "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext",
    "upscalingMode", "version", "volumeMounts",
})  # fmt: skip


def only(kind: str, name: str = "baton") -> dict[str, Any]:
    (found,) = [m for m in MANIFESTS if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def pods() -> list[dict[str, Any]]:
    """Every pod template."""
    cluster = only("RayCluster")["spec"]
    return [
        only("Deployment")["spec"]["template"],
        cluster["headGroupSpec"]["template"],
        *[group["template"] for group in cluster["workerGroupSpecs"]],
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_them(version: str) -> None:
    for manifest in MANIFESTS:
        if manifest["kind"] != "RayCluster":
            kubernetes_validate.validate(manifest, version, strict=True)
    for pod in pods():
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod["spec"]}
        kubernetes_validate.validate(whole, version, strict=True)


def test_the_ray_cluster_has_documented_fields_only() -> None:
    cluster = only("RayCluster")
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert spec.keys() <= RAY_CLUSTER and spec["autoscalerOptions"].keys() <= AUTOSCALER
    assert spec["headGroupSpec"].keys() <= HEAD
    for group in spec["workerGroupSpecs"]:
        assert group.keys() <= GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert all(isinstance(value, str) for value in spec["headGroupSpec"]["rayStartParams"].values())


def test_the_configuration_in_them_is_valid_and_fits_what_is_around_it(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text(only("ConfigMap")["data"]["baton.yaml"])
    config = resolve(from_yaml(file))
    (serve,) = only("Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in serve["ports"]}
    assert ports == {"http": config.port, "admin": config.admin_port}
    assert (config.host, config.admin_host, config.launcher) == ("0.0.0.0", "0.0.0.0", "ray")
    (group,) = only("RayCluster")["spec"]["workerGroupSpecs"]
    gpus = sum(pool.count * pool.engine.tp * pool.resources.gpus for pool in config.pools)
    assert gpus == group["replicas"] and config.autoscale.max_workers == group["maxReplicas"]
    mounts = [mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]]
    assert any(config.model.startswith(mount) for mount in mounts)


def test_probes_tell_loading_from_unhealthy() -> None:
    (serve,) = only("Deployment")["spec"]["template"]["spec"]["containers"]
    live, ready = serve["livenessProbe"]["httpGet"], serve["readinessProbe"]["httpGet"]
    assert (live["path"], ready["path"]) == ("/health", "/ready")
    names = {port["name"] for port in serve["ports"]}
    assert {live["port"], ready["port"], serve["startupProbe"]["httpGet"]["port"]} <= names


def test_what_refers_to_something_finds_it() -> None:
    names = {(m["kind"], m["metadata"]["name"]) for m in MANIFESTS}
    labels = only("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert only("Deployment")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for service in ("baton", "baton-admin"):
        assert only("Service", service)["spec"]["selector"].items() <= labels.items()
    for pod in pods():
        for volume in pod["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
        for container in pod["spec"]["containers"]:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= {volume["name"] for volume in pod["spec"].get("volumes", [])}
            for variable in container.get("env", []):
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in only("Secret", reference["name"])["stringData"]
    assert len({c["image"] for pod in pods() for c in pod["spec"]["containers"]}) == 1, "all run the same code"
