"""Config and stage manifests of a run directory, read without opening a table."""

from __future__ import annotations

import re
from typing import Any

from qbert_ray.config.loading import flatten, merge
from qbert_ray.config.schema import Config, Domain
from qbert_ray.config.yaml_files import YamlError, read_yaml
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.storage.seals import STARTED
from qbert_ray.storage.stages import BY_NAME


class Facts:
    """A run's manifests, and its config, merged on the defaults but not validated, since another version may have written it."""

    def __init__(self, run: RunDir) -> None:
        """Read them.

        Raises:
            ArtifactError: there is no run in that directory.
        """
        if not run.exists("config.yaml"):
            raise ArtifactError(f"no run in {run.uri}: neither config.yaml nor sweep.json is there; name the run.dir of a qbert-ray run")
        self.given: dict[str, Any] = _read_given(run)
        self.config = merge(Config().model_dump(mode="json"), self.given)
        self.domains: dict[str, Any] = (self.given.get("data") or {}).get("domains") or self.config["data"]["domains"]
        loaded = {name: Manifest.load(run, name) for name in BY_NAME}
        self.manifests = {name: manifest for name, manifest in loaded.items() if manifest}
        self.started = {name for name in BY_NAME if run.exists(f"{name}/{STARTED}")} - set(self.manifests)

    @property
    def targets(self) -> list[str]:
        return [name for name, domain in self.domains.items() if (domain or {}).get("role", "target") == "target"]

    def counts(self, stage: str) -> dict[str, Any]:
        return self.manifests[stage].counts if stage in self.manifests else {}

    def left_out(self, stage: str) -> str | None:
        """Why the config leaves a stage out; None if it does not."""
        try:
            return BY_NAME[stage].skipped(Config.model_validate(self.config))
        except ValueError:  # a config that this version does not know
            return None

    def missing(self, stage: str) -> str | None:
        """Why a stage's outputs are missing; None if they are not."""
        if stage in self.manifests:
            return None
        why = self.left_out(stage)
        if why:
            return f"Left out: {why}."
        return (
            f"Not finished yet: {stage} has started."
            if stage in self.started
            else f"Not done yet: qbert-ray {BY_NAME[stage].command} makes it."
        )

    def differences(self) -> list[dict[str, str]]:
        """Config keys with a value other than the default: key, value, default."""
        defaults = flatten(Config().model_dump(mode="json"))
        domain = flatten(Domain().model_dump(mode="json"))
        result = []
        for path, value in flatten(self.given).items():
            short = re.sub(r"^data\.domains\.[^.]+\.", "", path)
            default = domain.get(short) if short != path else defaults.get(path)
            if value != default and path != "run.dir":
                result.append({"path": path, "value": redact(value), "default": redact(default)})
        return result


def redact(value: Any) -> str:
    """A config value as text, without the keys that an object store's URI may hold."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1…@", re.sub(r"\?\S*", "?…", text) if "://" in text else text)


def _read_given(run: RunDir) -> dict[str, Any]:
    try:
        given = read_yaml(run.read_bytes("config.yaml")) or {}
    except YamlError as error:
        raise ArtifactError(f"{run.uri}/config.yaml {error}") from None
    if not isinstance(given, dict):
        raise ArtifactError(f"{run.uri}/config.yaml must hold a mapping of sections, got {type(given).__name__}")
    return given
