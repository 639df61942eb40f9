"""What stands under deploy/ is held against its schemas, against itself, and against the commands.

No engine runs it here: these tests find what a schema, a missing file, a wrong flag or a wrong
setting can. Validators that are not installed skip on a laptop, and fail in CI.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from kvstore.cli.telemetry import app
from kvstore.telemetry.settings import load

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.31"  # an older one that is still run; newer ones refuse nothing more
ONCE = {"topics"}  # services that end, and so have no health


def needs(module):
    if importlib.util.find_spec(module) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{module} is not installed")
        pytest.skip(f"{module} is not installed")


def compose():
    return yaml.safe_load(COMPOSE.read_text())


def manifests():
    return [
        document
        for path in MANIFESTS
        for document in yaml.safe_load_all(path.read_text())
        if document["kind"] != "Kustomization"  # kubectl's own, in no cluster's schema
    ]


# ---- schemas ----


def check_compose(path):
    needs("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, path], capture_output=True, text=True, check=False)


def test_the_compose_file_is_one():
    done = check_compose(COMPOSE)
    assert done.returncode == 0, done.stdout


def test_a_compose_file_that_is_none_is_found(tmp_path):
    broken = tmp_path / "compose.yaml"
    broken.write_text(COMPOSE.read_text().replace("restart: unless-stopped", "restarts: always"))
    assert check_compose(broken).returncode != 0


def test_manifests_are_what_a_cluster_accepts():
    needs("kubernetes_validate")
    import kubernetes_validate  # noqa: PLC0415 - loads 100 MB of schemas

    assert len(manifests()) == 7
    for manifest in manifests():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", [("spec", "replicas"), ("spec", "template", "spec", "containers")])
def test_a_manifest_that_no_cluster_accepts_is_found(path):
    needs("kubernetes_validate")
    import kubernetes_validate  # noqa: PLC0415

    broken = next(each for each in manifests() if each["kind"] == "StatefulSet")
    *way, last = path
    inner = broken
    for step in way:
        inner = inner[step]
    inner[last] = "three"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


# ---- what a schema does not see ----


def test_every_service_that_stays_has_a_health_check_and_is_waited_for():
    services = compose()["services"]
    for name, service in services.items():
        if name not in ONCE:
            assert "healthcheck" in service, name
        for other, how in service.get("depends_on", {}).items():
            assert other in services
            wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
            assert how["condition"] == wanted, (name, other)


def test_files_and_volumes_that_are_mounted_are_there():
    found = compose()
    for name, service in found["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), (name, source)
            else:
                assert source in found["volumes"], (name, source)
        if build := service.get("build"):
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    listed = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == [path.name for path in MANIFESTS]


def test_no_password_stands_in_a_file():
    for path in [COMPOSE, *MANIFESTS]:
        for password in re.findall(r"//\w+:([^@\s]+)@", path.read_text()):
            assert password.startswith("${"), (path.name, password)


def test_pods_mount_what_they_have_and_keys_that_are_there():
    maps = {each["metadata"]["name"]: each for each in manifests() if each["kind"] == "ConfigMap"}
    for each in manifests():
        if each["kind"] != "StatefulSet":
            continue
        pod = each["spec"]["template"]["spec"]
        claims = each["spec"].get("volumeClaimTemplates", ())
        volumes = {volume["name"] for volume in pod["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in claims}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            for argument in container["args"]:
                if "--settings=/settings/" in argument:
                    assert argument.rpartition("/")[2] in maps["telemetry-settings"]["data"]
        selector = each["spec"]["selector"]["matchLabels"].items()
        assert selector <= each["spec"]["template"]["metadata"]["labels"].items()


def test_settings_are_read_as_the_worker_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRES_PASSWORD", "secret")
    monkeypatch.setenv("POD_NAME", "worker-postgres-0")
    (settings,) = [each for each in manifests() if each["kind"] == "ConfigMap"]
    kinds = set()
    for name, text in settings["data"].items():
        (tmp_path / name).write_text(text)
        read = load(tmp_path / name)
        assert len(read.source) == 1
        assert read.source[0].startswith("kafka://")
        kinds.add(read.sink[0])
    assert kinds == {"postgres", "lake"}


# ---- the commands in them ----


def commands():
    """Each `kvstore telemetry …` of the files, as its arguments."""
    for service in compose()["services"].values():
        for text in service.get("command", ()):
            for part in text.replace("$$", "$").split("|"):
                words = [word for word in shlex.split(part) if word != "exec"]
                if words[:2] == ["kvstore", "telemetry"]:
                    yield words[2:]
    for each in manifests():
        if each["kind"] == "StatefulSet":
            for container in each["spec"]["template"]["spec"]["containers"]:
                if container["args"][0] == "telemetry":
                    yield container["args"][1:]


def parse(arguments):
    """Read the arguments as the command does, and run nothing."""
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    return command.make_context(arguments[0], list(arguments[1:]))


def test_commands_are_such_as_kvstore_has():
    found = list(commands())
    assert [words[0] for words in found] == [
        "simulate",
        "produce",
        "ingest",
        "ingest",
        "ingest",
        "ingest",
    ]
    for words in found:
        parse(words)


def test_a_command_with_a_flag_that_is_not_there_is_found():
    with pytest.raises(Exception, match="No such option"):
        parse(["ingest", "kafka://h/t", "--lakes", "/lake"])
