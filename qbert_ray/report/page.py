"""Writes `report/index.html`, a self-contained page on a run, finished or not, or on a sweep."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from qbert_ray.inputs.addresses import is_inside
from qbert_ray.report import codes, evaluation, fused, recommendations, summary, sweep
from qbert_ray.report.catalog import Album, Catalog
from qbert_ray.report.facts import Facts, redact
from qbert_ray.report.figures import dark_shades
from qbert_ray.storage.columns import label
from qbert_ray.storage.directory import ArtifactError, RunDir

PAGE = "report/index.html"
UNSAFE = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&'\u2028\u2029"}  # within <script> these could end it or open a tag


def write(uri: str) -> tuple[str, list[str]]:
    """Write the report of a run directory or of a sweep; returns its full path, and what could not be shown.

    Raises:
        ArtifactError: there is neither a run nor a sweep.
    """
    run = RunDir(uri)
    if "://" not in uri and not is_inside(run.path(PAGE), (run.path(),)):
        raise ArtifactError(f"{run.path('report')} is a link to another folder; remove it, and the report is written in the run directory")
    swept = run.exists(sweep.SWEEP)
    content: dict[str, Any] = {"content": sweep.gather(run)} if swept else gather(run)
    name = "sweep.html" if swept else "run.html"
    title = redact(run.uri).rstrip("/").rpartition("/")[2]
    run.write_bytes(PAGE, render(name, {"title": title, "place": redact(run.uri), **content}).encode())
    return run.path(PAGE), content.get("problems", [])


def gather(run: RunDir) -> dict[str, Any]:
    """Content of a run's page; a section that fails is replaced by its error, and the others are shown."""
    facts = Facts(run)
    problems: list[str] = []

    def attempt(name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return make(*arguments)
        except Exception as error:  # noqa: BLE001 - the rest of a damaged run is still worth showing
            problems.append(f"{name} could not be shown: {type(error).__name__}: {error}")
            return {"missing": f"Could not be shown: {error}"}

    def ranks() -> dict[str, Any]:
        there = [domain for domain in facts.targets if domain in catalogs and run.exists("evaluate/metrics.json")]
        return {domain: evaluation.read_ranks(run, domain, catalogs[domain]) for domain in there}

    def overview() -> dict[str, Any]:
        judged = summary.verdicts(facts, ranked)
        return {"verdicts": judged, "warnings": summary.warnings(run, facts, judged), "rejected": summary.rejected(facts)} | {
            "examples": summary.examples(run), "datasets": summary.datasets(facts), "stages": summary.stages(facts)}  # fmt: skip

    album = Album()
    catalogs = {domain: Catalog(run, domain) for domain in facts.domains if "ingest" in facts.manifests}
    found = attempt("The ranks", ranks)
    ranked = {} if "missing" in found else found
    content = {
        "summary": attempt("The summary", overview),
        "fusion": attempt("Stage 1", fused.gather, run, facts, catalogs, album),
        "recommendations": attempt("The recommendations", recommendations.gather, run, facts, catalogs, ranked, album),
        "ids": attempt("Stage 2", codes.gather, run, facts, catalogs, album),
        "sequences": attempt("Stage 3", evaluation.gather, run, facts, ranked),
    }
    images = attempt("The images", album.images, catalogs)
    players = attempt("The sounds and clips", album.players, catalogs)
    return content | {
        "facts": facts,
        "images": {} if "missing" in images else images,
        "players": {} if "missing" in players else players,
        "left_out": album.left_out,
        "problems": problems,
    }


def render(template: str, content: dict[str, Any]) -> str:
    """The page as HTML. All content is escaped: by jinja in the markup, by `embed` in scripts."""
    environment = Environment(
        loader=PackageLoader("qbert_ray.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"embed": embed, "label": label, "seconds": seconds}
    folder = files("qbert_ray.report") / "templates"
    scripts = [get_plotlyjs(), (folder / "report.js").read_text(encoding="utf-8")]
    shared = {
        "style": Markup((folder / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        "scripts": [Markup(script) for script in scripts],  # noqa: S704 - as above
        "hashes": Markup(" ".join(f"'sha256-{_hash(script)}'" for script in scripts)),  # noqa: S704
        "shades": dark_shades(),
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    return environment.get_template(template).render(shared | content)


def embed(value: Any) -> Markup:
    """JSON that is safe within <script>, whatever texts it holds."""
    return Markup(json.dumps(value, cls=PlotlyJSONEncoder, ensure_ascii=False, separators=(",", ":")).translate(UNSAFE))  # noqa: S704


def seconds(value: float | None) -> str:
    """A duration in readable units."""
    if value is None:
        return ""
    if value < 100:
        return f"{value:.1f} s"
    hours, rest = divmod(round(value), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
