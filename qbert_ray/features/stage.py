"""The stage `features`: writes the vectors of every item for each modality (§3.1), part by part.

Parts are encoded in an actor pool; the user's own vectors and those that need a whole domain are one task per domain. All parts
of a modality have the same J and D: vectors that an item lacks are zeros and marked absent.

N items of a domain, J vectors per item, D width.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import Executor, StreamedWorker
from qbert_ray.execution.progress import Progress
from qbert_ray.features.modality import (
    DomainEncoder,
    Encoded,
    FittedEncoder,
    PartEncoder,
    Rejected,
    Source,
    StreamedEncoder,
    absent,
    encoder_of,
)
from qbert_ray.features.vectors import disturb, features_table, read_vectors, vectors_shape
from qbert_ray.storage.catalog import modalities_there
from qbert_ray.storage.columns import DOMAIN, ITEM_ID, KEYS, REJECTED
from qbert_ray.storage.directory import Counts, RunDir, join


@dataclass(frozen=True)
class Plan:
    """Source of each domain's vectors of one modality, and the shape that all share."""

    modality: str
    own: dict[str, str]  # domain -> URI of the user's vectors
    made: list[str]  # domains whose vectors are made here
    num_vectors: int  # J
    width: int | None  # D; None: as the encoder has it


def extract_features(config: Config, run: RunDir, executor: Executor, progress: Progress) -> Counts:
    """Write features/<modality> for each modality that any domain has input for, and features/rejected.

    Returns:
        Modality -> counts over all domains.

    Raises:
        ValueError: no domain has any input, vectors of one modality differ in width, or an encoder cannot be loaded.
    """
    counts: Counts = {}
    for modality in config.modalities:
        plan = _plan(config, modality, executor)
        if plan is not None:
            progress.note(modality)
            counts[modality] = dict(_extract(config, run, plan, executor, progress))
    if not counts:
        raise ValueError(
            f"no domain has input for features.modalities={config.modalities}; "
            "set data.domains.<name>.text_fields, image_column, inputs or vectors"
        )
    warnings = [warning for each in counts.values() for warning in _rejected_files(each)]
    return counts | ({"warnings": warnings} if warnings else {})


def _rejected_files(counts: dict[str, int]) -> list[str]:
    """A warning if more than half of the files of a modality cannot be used."""
    warnings = []
    for unit in (name.removesuffix("_rejected") for name in counts if name.endswith("_rejected")):
        lost = counts[f"{unit}_rejected"]
        given = counts[unit] + lost
        if lost > given / 2:
            start = f"{unit}_rejected."
            reasons = {name.removeprefix(start): count for name, count in counts.items() if name.startswith(start)}
            said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]))
            warnings.append(
                f"{lost:,} of {given:,} {unit} cannot be used ({said}); their items are used without one; "
                "qbert-ray validate shows some of them"
            )
    return warnings


def extend_features(config: Config, run: RunDir, executor: Executor, progress: Progress) -> None:
    """Write vectors for parts that were appended to the catalog: made as the earlier ones, but without structure.

    Raises:
        ValueError: the shape of the user's own vectors has changed.
    """
    for modality in modalities_there(run):
        there = run.parts(f"features/{modality}")
        plan = _plan(config, modality, executor)
        if plan is None:
            continue
        num_vectors, width = _shape(run, modality, there[0])
        if plan.num_vectors > num_vectors or plan.width not in (None, width):
            raise ValueError(
                f"{modality} vectors have {plan.num_vectors} x {plan.width} numbers; the run was made with {num_vectors} x {width}"
            )
        plan = replace(plan, num_vectors=num_vectors, width=width)
        progress.note(modality)
        tasks = _whole_domains(config, plan, appended=True)
        grown = [domain for domain in tasks if set(run.parts("ingest/items", domain)) - set(there)]
        for handle in [executor.submit(_write_domain, config, run, modality, domain, tasks[domain]) for domain in grown]:
            executor.get(handle)
        _encode(config, run, plan, executor, progress)


def _extract(config: Config, run: RunDir, plan: Plan, executor: Executor, progress: Progress) -> Counter[str]:
    tasks = _whole_domains(config, plan)
    counts = _map_domains(config, run, plan.modality, tasks, executor, progress) if tasks else Counter()
    counts.update(_encode(config, run, plan, executor, progress))
    return counts


def _whole_domains(config: Config, plan: Plan, appended: bool = False) -> dict[str, Callable[..., Encoded]]:
    """Domain -> function that makes its vectors, for domains that one task handles."""
    tasks: dict[str, Callable[..., Encoded]] = {
        domain: partial(_read_own, uri, plan.modality, plan.num_vectors, plan.width or 0) for domain, uri in plan.own.items()
    }
    encoder = encoder_of(config, plan.modality)
    whole = encoder is not None and issubclass(encoder, DomainEncoder)
    of_interactions = config.features.is_from_interactions(plan.modality)
    for domain in config.data.domains:
        if whole and domain in plan.made and not (appended and of_interactions):
            tasks[domain] = partial(_make, config, plan, domain)
        elif domain not in plan.own and (whole or not plan.made):
            tasks[domain] = partial(_absent, plan)
    return tasks


def _encode(config: Config, run: RunDir, plan: Plan, executor: Executor, progress: Progress) -> Counter[str]:
    """Encode the parts of the domains in `plan.made`; returns the counts."""
    encoder = encoder_of(config, plan.modality)
    if not plan.made or encoder is None or issubclass(encoder, DomainEncoder):
        return Counter()
    if issubclass(encoder, FittedEncoder) and not run.exists(f"{_fitted(plan.modality)}/model.json"):
        executor.get(executor.submit(_fit, config, run, plan))
    arguments = {"run": run, "config": config, "modality": plan.modality, "num_vectors": plan.num_vectors}
    parts = [part for domain in config.data.domains if domain not in plan.own for part in run.parts("ingest/items", domain)]
    worker = StreamPart if issubclass(encoder, StreamedEncoder) else EncodePart
    return executor.map_parts(run, worker, arguments, parts, f"features/{plan.modality}", config.compute.features, progress)


class EncodePart:
    """Writes the vectors of one part of the catalog.

    Args:
        num_vectors: J.
        load: whether to load the encoder's model now.

    Raises:
        ValueError: the encoder cannot be loaded.
    """

    def __init__(self, run: RunDir, config: Config, modality: str, num_vectors: int, load: bool = True) -> None:
        self.run, self.config, self.modality = run, config, modality
        encoder = encoder_of(config, modality)
        assert encoder is not None and issubclass(encoder, PartEncoder)
        self.encoder: Any = encoder(config.features, modality, num_vectors)
        if isinstance(self.encoder, FittedEncoder):
            self.encoder.load(run, _fitted(modality))
        if load:
            _ = self.encoder.width

    def __call__(self, part: str) -> dict[str, int]:
        source, items = self.items(part)
        return self.publish(part, items, self.encoder(items, source))

    def items(self, part: str) -> tuple[Source, pa.Table]:
        """Where a part comes from, and the columns that the encoder reads."""
        source = _source(self.config, self.modality, part.rsplit("-", 1)[0])
        return source, self.run.read_part("ingest/items", part, [*KEYS, *self.encoder.columns(source)])

    def publish(self, part: str, items: pa.Table, made: Encoded) -> dict[str, int]:
        write_rejected(self.run, part.removesuffix(".parquet"), self.modality, made.table, made.rejected)
        disturb(made, items[ITEM_ID], self.modality, self.config)
        self.run.write_part(f"features/{self.modality}", part, features_table(items, made.vectors, made.present))
        return {"items": len(items)} | made.counts


class StreamPart(EncodePart, StreamedWorker):
    """An `EncodePart` of a `StreamedEncoder`."""

    def chunks(self, part: str) -> list[Any]:
        source, items = self.items(part)
        return self.encoder.chunks(items, source)

    def preparer(self) -> Callable[[Any], Any]:
        return self.encoder.preparer()

    def encode(self, prepared: Any) -> Any:
        return self.encoder.encode(prepared)

    def write(self, part: str, encoded: list[Any]) -> dict[str, int]:
        items = self.run.read_part("ingest/items", part, KEYS)
        source = _source(self.config, self.modality, part.rsplit("-", 1)[0])
        return self.publish(part, items, self.encoder.collect(items, source, encoded))


def _fitted(modality: str) -> str:
    return f"features/{modality}/.model"


def _fit(config: Config, run: RunDir, plan: Plan) -> None:
    encoder = encoder_of(config, plan.modality)
    assert encoder is not None and issubclass(encoder, FittedEncoder)
    sources = [_source(config, plan.modality, domain) for domain in plan.made]
    encoder(config.features, plan.modality, plan.num_vectors).fit(run, sources, _fitted(plan.modality))


# planning


def _source(config: Config, modality: str, domain: str) -> Source:
    return Source(modality, domain, config.data.domains[domain], config.data.root)


def _plan(config: Config, modality: str, executor: Executor) -> Plan | None:
    """The plan of a modality; None if no domain has input for it."""
    domains, encoder = config.data.domains, encoder_of(config, modality)
    own = {name: join(config.data.root, domain.vectors[modality]) for name, domain in domains.items() if modality in domain.vectors}
    has_input = {name: config.features.is_from_interactions(modality) or domain.describes(modality) for name, domain in domains.items()}
    made = [name for name, there in has_input.items() if there and name not in own and encoder is not None]
    if not own and not made:
        return None
    handles = {name: executor.submit(vectors_shape, uri) for name, uri in own.items()}
    shapes = {name: executor.get(handle) for name, handle in handles.items()}
    widths = {f"{name} ({own[name]})": width for name, (_, width) in shapes.items()}
    counts = [count for count, _ in shapes.values()]
    if made:
        assert encoder is not None
        counts += [encoder.vectors_of(config.features, _source(config, modality, name)) for name in made]
        if own or issubclass(encoder, DomainEncoder):
            widths[", ".join(made)] = executor.get(executor.submit(_width, config, modality))
    if len(set(widths.values())) > 1:
        listed = "; ".join(f"{width} of {name}" for name, width in widths.items())
        raise ValueError(f"{modality} vectors must have one width in all domains, given: {listed}; encode them with one model")
    return Plan(modality, own, made, max(counts), next(iter(widths.values()), None))


def _width(config: Config, modality: str) -> int:
    """D of the vectors that are made; the encoder has to be loaded to know it."""
    encoder = encoder_of(config, modality)
    assert encoder is not None
    if issubclass(encoder, DomainEncoder):
        return encoder(config.features, modality).width
    return encoder(config.features, modality, 1).width


# one task per domain


def _map_domains(
    config: Config, run: RunDir, modality: str, tasks: dict[str, Callable[..., Encoded]], executor: Executor, progress: Progress
) -> Counter[str]:
    """Write the vectors of whole domains in parallel; domains that an earlier try finished are skipped."""
    marker = f"features/{modality}/.counts"
    done = set(run.names(marker))
    running = [
        executor.submit(_write_domain, config, run, modality, domain, make)
        for domain, make in tasks.items()
        if f"{domain}.json" not in done
    ]
    progress.start(len(tasks), len(tasks) - len(running))
    for _ in executor.as_completed(running):
        progress.advance()
    total: Counter[str] = Counter()
    for domain in tasks:
        total.update(run.read_json(f"{marker}/{domain}.json"))
    return total


def _write_domain(config: Config, run: RunDir, modality: str, domain: str, make: Callable[..., Encoded]) -> None:
    item_ids = run.read("ingest/items", domain, [ITEM_ID])[ITEM_ID]
    made = make(run=run, item_ids=item_ids.combine_chunks())
    disturb(made, item_ids, modality, config)
    write_rejected(run, f"{domain}-own", modality, made.table, made.rejected)
    start = 0
    for part in run.parts("ingest/items", domain):
        rows = run.read_part("ingest/items", part, KEYS)
        place = slice(start, start + len(rows))
        if not run.exists(f"features/{modality}/{part}"):  # existing parts may already have been read
            run.write_part(f"features/{modality}", part, features_table(rows, made.vectors[place], made.present[place]))
        start += len(rows)
    there = int(made.present.any(axis=1).sum())
    counts = {"items": start, f"{modality}_vectors": int(made.present.sum()), f"items_without_{modality}": start - there} | made.counts
    counts |= {f"{modality}_rejected.{reason}": count for reason, count in Counter(reason for reason, _ in made.rejected).items()}
    run.write_json(f"features/{modality}/.counts/{domain}.json", counts)


def _absent(plan: Plan, run: RunDir, item_ids: pa.Array) -> Encoded:
    return Encoded(*absent(len(item_ids), plan.num_vectors, plan.width or 1), {})


def _read_own(uri: str, modality: str, num_vectors: int, width: int, run: RunDir, item_ids: pa.Array) -> Encoded:
    return replace(read_vectors(uri, item_ids, num_vectors, width), table=f"vectors.{modality}")


def _make(config: Config, plan: Plan, domain: str, run: RunDir, item_ids: pa.Array) -> Encoded:
    encoder = encoder_of(config, plan.modality)
    assert encoder is not None and issubclass(encoder, DomainEncoder)
    return encoder(config.features, plan.modality)(run, _source(config, plan.modality, domain), plan.num_vectors)


def write_rejected(run: RunDir, name: str, modality: str, table: str, rows: Rejected) -> None:
    """Write rejected rows to features/rejected, or remove those of an earlier try if there are none.

    Args:
        name: `<domain>-...`, of a part or a domain.
        table: table that the rows belong to.
        rows: reason and row.
    """
    domain, part = name.rsplit("-", 1)[0], f"{name}.{modality}.parquet"
    if not rows:
        run.delete(f"features/rejected/{part}")
        return
    kept = [{DOMAIN: domain, "table": table, "reason": reason, "row": json.dumps(row, ensure_ascii=False)} for reason, row in rows]
    run.write_part("features/rejected", part, pa.Table.from_pylist(kept, schema=REJECTED))


def _shape(run: RunDir, modality: str, part: str) -> tuple[int, int]:
    """J and D of a part of features/<modality>."""
    kind = run.open_part(f"features/{modality}", part).schema_arrow.field("vectors").type
    return kind.list_size, kind.value_type.list_size
