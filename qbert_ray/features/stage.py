"""The stage `features`: writes the vectors of every item for each modality (§3.1), part by part.

Texts and images are encoded in an actor pool; the user's own vectors and structural ones are one task per domain. All parts
of a modality have the same J and D: vectors that an item lacks are zeros and marked absent.

N items of a domain, J vectors per item, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from qbert_ray.config.schema import Config, Domain
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.features.encoding import ImagePart, TextPart, load_image_encoder, load_text_encoder, write_rejected
from qbert_ray.features.item_features import MODALITIES
from qbert_ray.features.structure import co_occurrence, collaborative_vectors
from qbert_ray.features.vectors import Placed, features_table, read_vectors, vectors_shape
from qbert_ray.inputs.addresses import Addresses
from qbert_ray.storage.columns import ATTRIBUTE_PREFIX, ITEM_ID, KEYS, TEXT_PREFIX, to_sequences
from qbert_ray.storage.directory import Counts, RunDir, join

SEED = 0  # of the factorisation; not a setting, since another seed only changes the last digits


@dataclass(frozen=True)
class Plan:
    """Source of each domain's vectors of one modality, and the shape that all share."""

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
    modalities = _modalities(config)
    for modality in modalities:
        plan = _plan(config, run, modality, executor)
        if plan is not None:
            progress.note(modality)
            counts[modality] = dict(_extract(config, run, modality, plan, executor, progress))
    warnings = _rejected_images(counts.get("image", {}))
    if not counts:
        raise ValueError(
            f"no domain has input for features.modalities={modalities}; "
            "set data.domains.<name>.text_fields, image_column or <modality>_features"
        )
    return counts | ({"warnings": warnings} if warnings else {})


def _rejected_images(counts: dict[str, int]) -> list[str]:
    """A warning if more than half of the images cannot be used."""
    given, lost = counts.get("images", 0) + counts.get("images_rejected", 0), counts.get("images_rejected", 0)
    if lost <= given / 2:
        return []
    reasons = {name.partition(".")[2]: count for name, count in counts.items() if name.startswith("images_rejected.")}
    said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]))
    return [
        f"{lost:,} of {given:,} images cannot be used ({said}); their items are used without one; qbert-ray validate shows some of them"
    ]


def extend_features(config: Config, run: RunDir, executor: Executor, progress: Progress) -> None:
    """Write vectors for parts that were appended to the catalog: made as the earlier ones, but without structure.

    Raises:
        ValueError: the shape of the user's own vectors has changed.
    """
    for modality in MODALITIES:
        there = run.parts(f"features/{modality}")
        plan = _plan(config, run, modality, executor) if there else None
        if plan is None:
            continue
        num_vectors, width = _shape(run, modality, there[0])
        if plan.num_vectors > num_vectors or plan.width not in (None, width):
            raise ValueError(
                f"{modality} vectors have {plan.num_vectors} x {plan.width} numbers; the run was made with {num_vectors} x {width}"
            )
        plan = replace(plan, num_vectors=num_vectors, width=width)
        progress.note(modality)
        tasks = _whole_domains(config, modality, plan, partial(_absent, plan))
        grown = [domain for domain in tasks if set(run.parts("ingest/items", domain)) - set(there)]
        for handle in [executor.submit(_write_domain, run, modality, domain, tasks[domain]) for domain in grown]:
            executor.get(handle)
        _encode(config, run, modality, plan, executor, progress)


def _extract(config: Config, run: RunDir, modality: str, plan: Plan, executor: Executor, progress: Progress) -> Counter[str]:
    tasks = _whole_domains(config, modality, plan, partial(_structure, config, run, plan))
    counts = _map_domains(run, modality, tasks, executor, progress) if tasks else Counter()
    counts.update(_encode(config, run, modality, plan, executor, progress))
    return counts


def _whole_domains(config: Config, modality: str, plan: Plan, structure: Callable[..., Placed]) -> dict[str, Callable[..., Placed]]:
    """Domain -> function that makes its vectors, for domains that one task handles."""
    tasks: dict[str, Callable[..., Placed]] = {
        domain: partial(read_vectors, uri, num_vectors=plan.num_vectors, width=plan.width or 0) for domain, uri in plan.own.items()
    }
    rest = [domain for domain in config.data.domains if domain not in plan.own]
    if modality == "structure":
        tasks |= {domain: partial(structure, domain) for domain in rest}
    elif not plan.made:
        tasks |= {domain: partial(_absent, plan, domain) for domain in rest}
    return tasks


def _encode(config: Config, run: RunDir, modality: str, plan: Plan, executor: Executor, progress: Progress) -> Counter[str]:
    """Encode the parts of the domains in `plan.made`; returns the counts."""
    if not plan.made or modality == "structure":
        return Counter()
    rest = [domain for domain in config.data.domains if domain not in plan.own]
    worker = TextPart if modality == "text" else ImagePart
    arguments = {"run": run, "settings": getattr(config.features, modality), "num_vectors": plan.num_vectors}
    if modality == "text":
        arguments["fields"] = {domain: _text_columns(config.data.domains[domain]) for domain in rest}
    else:
        arguments["addresses"] = {domain: Addresses.of(config.data.root, config.data.domains[domain]) for domain in rest}
    parts = [part for domain in rest for part in run.parts("ingest/items", domain)]
    return executor.map_parts(run, worker, arguments, parts, f"features/{modality}", config.compute.features, progress)


# planning


def _modalities(config: Config) -> list[str]:
    """The modalities of a run; collaborative vectors join by default only where a catalog has no texts or images to distinguish its items.

    In training they encode which items the same users had, so the sequence model relies on them and ranks new interactions less well.
    """
    if config.features.modalities is not None:
        return sorted(config.features.modalities, key=MODALITIES.index)
    domains = config.data.domains.values()
    described = all(
        any(getattr(domain, f"{name}_features") or _has_input(domain, name) for name in ("text", "image")) for domain in domains
    )
    own = any(domain.structure_features for domain in domains)
    return ["text", "image"] if described and not own else list(MODALITIES)


def _plan(config: Config, run: RunDir, modality: str, executor: Executor) -> Plan | None:
    """The plan of a modality; None if no domain has input for it."""
    domains = config.data.domains
    given = {name: getattr(domain, f"{modality}_features") for name, domain in domains.items()}
    own = {name: join(config.data.root, location) for name, location in given.items() if location}
    made = [name for name, domain in domains.items() if name not in own and _has_input(domain, modality)]
    if not own and not made:
        return None
    handles = {name: executor.submit(vectors_shape, uri) for name, uri in own.items()}
    shapes = {name: executor.get(handle) for name, handle in handles.items()}
    widths = {f"{name} ({own[name]})": width for name, (_, width) in shapes.items()}
    if made and (own or modality == "structure"):
        widths[", ".join(made)] = _made_width(config, modality, executor)
    if len(set(widths.values())) > 1:
        listed = "; ".join(f"{width} of {name}" for name, width in widths.items())
        raise ValueError(f"{modality} vectors must have one width in all domains, given: {listed}; encode them with one model")
    counts = [count for count, _ in shapes.values()] + [_made_vectors(config, domains[name], modality) for name in made]
    return Plan(own, made, max(counts), next(iter(widths.values()), None))


def _has_input(domain: Domain, modality: str) -> bool:
    if modality == "text":
        return bool(domain.text_fields or domain.attributes)
    return modality == "structure" or domain.image_column is not None or domain.image_template is not None


def _text_columns(domain: Domain) -> dict[str, str]:
    """Column of ingest/items -> prefix of its text: a bare value such as "Blue" needs its column's name to be understood."""
    attributes = {f"{ATTRIBUTE_PREFIX}{name}": f"{name.replace('_', ' ')}: " for name in domain.attributes}
    return {f"{TEXT_PREFIX}{name}": "" for name in domain.text_fields} | attributes


def _made_vectors(config: Config, domain: Domain, modality: str) -> int:
    """J of the vectors that are made for a domain."""
    return {"text": len(_text_columns(domain)), "image": config.features.image.grid**2, "structure": 1}[modality]


def _made_width(config: Config, modality: str, executor: Executor) -> int:
    """D of the vectors that are made; the encoder has to be loaded to know it."""
    if modality == "structure":
        return config.features.structure.dim
    return executor.get(executor.submit(_encoder_width, config, modality))


def _encoder_width(config: Config, modality: str) -> int:
    return (load_text_encoder(config.features.text) if modality == "text" else load_image_encoder(config.features.image)).width


# one task per domain


def _map_domains(
    run: RunDir, modality: str, tasks: dict[str, Callable[..., Placed]], executor: Executor, progress: Progress
) -> Counter[str]:
    """Write the vectors of whole domains in parallel; domains that an earlier try finished are skipped."""
    marker = f"features/{modality}/.counts"
    done = set(run.names(marker))
    running = [
        executor.submit(_write_domain, run, modality, domain, make) for domain, make in tasks.items() if f"{domain}.json" not in done
    ]
    progress.start(len(tasks), len(tasks) - len(running))
    for _ in executor.as_completed(running):
        progress.advance()
    total: Counter[str] = Counter()
    for domain in tasks:
        total.update(run.read_json(f"{marker}/{domain}.json"))
    return total


def _write_domain(run: RunDir, modality: str, domain: str, make: Callable[..., Placed]) -> None:
    items = run.read("ingest/items", domain, KEYS)
    placed = make(item_ids=items[ITEM_ID].combine_chunks())
    write_rejected(run, f"{domain}-own", modality, f"{modality}_features", placed.rejected)
    start = 0
    for part in run.parts("ingest/items", domain):
        rows = run.read_part("ingest/items", part, KEYS)
        place = slice(start, start + len(rows))
        if not run.exists(f"features/{modality}/{part}"):  # existing parts may already have been read
            run.write_part(f"features/{modality}", part, features_table(rows, placed.vectors[place], placed.present[place]))
        start += len(rows)
    there = int(placed.present.any(axis=1).sum())
    counts = {"items": start, f"{modality}_vectors": int(placed.present.sum()), f"items_without_{modality}": start - there}
    counts |= {f"{modality}_rejected.{reason}": count for reason, count in Counter(reason for reason, _ in placed.rejected).items()}
    run.write_json(f"features/{modality}/.counts/{domain}.json", counts)


def _absent(plan: Plan, domain: str, item_ids: pa.Array) -> Placed:
    shape = (len(item_ids), plan.num_vectors)
    return Placed(np.zeros((*shape, plan.width or 1), np.float32), np.zeros(shape, bool), [])


def _structure(config: Config, run: RunDir, plan: Plan, domain: str, item_ids: pa.Array) -> Placed:
    """Structural vectors of a domain from its training interactions."""
    settings, count = config.features.structure, len(item_ids)
    indptr, items, weights = _training_items(run, domain)
    together = co_occurrence(indptr, items, count, settings.window, weights)
    vectors = collaborative_vectors(together, settings.dim, SEED)
    placed = _absent(plan, domain, item_ids)
    placed.vectors[:, 0], placed.present[:, 0] = vectors, vectors.any(axis=1)
    return placed


def _training_items(run: RunDir, domain: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Offsets [U + 1] of each user's training items, the items of all users, and their weights where they have any."""
    if not run.parts("ingest/sequences", domain):
        return np.zeros(1, np.int64), np.zeros(0, np.int64), None
    sequences = to_sequences(run.read("ingest/sequences", domain))
    return sequences.indptr, sequences.items, sequences.weights


def _shape(run: RunDir, modality: str, part: str) -> tuple[int, int]:
    """J and D of a part of features/<modality>."""
    kind = run.open_part(f"features/{modality}", part).schema_arrow.field("vectors").type
    return kind.list_size, kind.value_type.list_size
