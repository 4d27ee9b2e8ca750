"""The manifests of configs/kubernetes: valid by the published schemas, and the names in them fit together."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_launcher.launcher import get_args_parser
from ft_launcher.meeting import parse_endpoints

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")

MANIFESTS = Path(__file__).resolve().parent.parent.parent / "configs" / "kubernetes"
JOBSET_SCHEMA = yaml.safe_load(Path(__file__).with_name("jobset.schema.yaml").read_text())
VERSIONS = ["1.31", "1.34", kubernetes_validate.utils.latest_version()]
Manifest = dict[str, Any]


def read(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((MANIFESTS / name).read_text()))


def jobs_of(jobset: Manifest) -> list[Manifest]:
    """Give the Jobs that the JobSet controller makes of a JobSet, with the names that it gives them."""
    jsonschema.validate(jobset, JOBSET_SCHEMA)
    name, spec = jobset["metadata"]["name"], jobset["spec"]
    jobs = []
    for replicated in spec["replicatedJobs"]:
        for index in range(replicated.get("replicas", 1)):
            job = {"apiVersion": "batch/v1", "kind": "Job", **copy.deepcopy(replicated["template"])}
            job["metadata"] = {"name": f"{name}-{replicated['name']}-{index}"}
            assert spec["network"]["enableDNSHostnames"]
            job["spec"]["template"]["spec"]["subdomain"] = spec["network"].get("subdomain", name)
            jobs.append(job)
    return jobs


def all_jobs() -> list[Manifest]:
    return [read("job.yaml")[1], *jobs_of(read("jobset.yaml")[0])]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_what_kubernetes_takes(version):
    for resource in [*read("job.yaml"), *all_jobs()]:
        kubernetes_validate.validate(resource, version, strict=True)


def test_a_misspelt_key_would_be_found():
    job = all_jobs()[0]
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)
    jobset = read("jobset.yaml")[0]
    jobset["spec"]["network"]["enableDnsHostnames"] = True
    with pytest.raises(jsonschema.ValidationError):
        jobs_of(jobset)


@pytest.mark.parametrize("job", all_jobs(), ids=lambda job: job["metadata"]["name"])
def test_the_command_fits_the_pods(job):
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    program, *flags = pod["containers"][0]["command"]
    assert program == "ft_launcher"
    arguments = get_args_parser().parse_args(flags)
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    assert int(arguments.nnodes) <= spec["completions"]
    assert arguments.term_timeout < pod["terminationGracePeriodSeconds"]
    hosts = [f"{job['metadata']['name']}-{index}.{pod['subdomain']}" for index in range(3)]
    assert [endpoint.host for endpoint in parse_endpoints(arguments.rdzv_endpoint)] == hosts
    # With spares, the index of a pod is no place among the nodes that train.
    names = [variable["name"] for variable in pod["containers"][0]["env"]]
    assert ("GROUP_RANK" in names) == (int(arguments.nnodes) == spec["completions"])
    assert "$(RUN_ID)" in arguments.rdzv_id
    assert "RUN_ID" in names


def test_the_service_gives_the_pods_their_names():
    service, job = read("job.yaml")
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
