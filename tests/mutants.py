"""Mutation score of a module by mutmut: the share of small changes to it that make one of its tests fail.

python -m tests.mutants qbert_ray/metrics.py --sample 100 --seed 0      (make mutants MODULE=qbert_ray/metrics.py SAMPLE=100 SEED=0)

The package and its tests are copied to build/mutants/<module>, so the checkout stays as it is. In the copy the decorators that
switch gradients off become `with` statements, because mutmut leaves decorated functions alone. mutmut makes the mutants;
`tests/mutant_loop.py` runs the tests, without those that need a fixture of conftest.py: they run Ray or whole stages.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests import ROOT

# Module -> the tests that should notice a change to it.
TESTS = {
    "qbert_ray/fusion/model.py": ["tests/fusion/test_equations.py", "tests/fusion/test_model.py"],
    "qbert_ray/fusion/task.py": ["tests/fusion/test_task.py"],
    "qbert_ray/semantic_ids/task.py": ["tests/semantic_ids/test_task.py"],
    "qbert_ray/semantic_ids/rqvae.py": ["tests/semantic_ids/test_rqvae.py", "tests/semantic_ids/test_rqvae_equations.py"],
    "qbert_ray/semantic_ids/kmeans.py": ["tests/semantic_ids/test_kmeans.py"],
    "qbert_ray/semantic_ids/collisions.py": ["tests/semantic_ids/test_collisions.py"],
    "qbert_ray/semantic_ids/quality.py": ["tests/semantic_ids/test_quality.py"],
    "qbert_ray/sequence/model.py": ["tests/sequence/test_model.py", "tests/sequence/test_equations.py", "tests/sequence/test_causal.py"],
    "qbert_ray/sequence/packing.py": ["tests/sequence/test_equations.py", "tests/sequence/test_model.py"],
    "qbert_ray/sequence/item_table.py": ["tests/sequence/test_item_table.py", "tests/sequence/test_model.py"],
    "qbert_ray/sequence/masking.py": ["tests/sequence/test_masking.py"],
    "qbert_ray/sequence/recency.py": ["tests/sequence/test_model.py", "tests/sequence/test_causal.py"],
    "qbert_ray/sequence/catalog_softmax.py": ["tests/sequence/test_causal.py"],
    "qbert_ray/sequence/decoder.py": ["tests/sequence/test_decoder.py", "tests/sequence/test_beam_search.py"],
    "qbert_ray/sequence/beam_search.py": ["tests/sequence/test_beam_search.py"],
    "qbert_ray/metrics.py": ["tests/test_metrics.py"],
    "qbert_ray/top_k.py": ["tests/test_top_k.py"],
    "qbert_ray/training.py": ["tests/test_training.py"],
    "qbert_ray/random_streams.py": ["tests/sequence/test_masking.py"],
    "qbert_ray/ranking/item_item.py": ["tests/ranking/test_item_item.py"],
    "qbert_ray/ranking/blend.py": ["tests/ranking/test_blend.py"],
    "qbert_ray/ranking/score_features.py": ["tests/ranking/test_item_item.py", "tests/ranking/test_blend.py"],
    "qbert_ray/ranking/reranker.py": ["tests/ranking/test_reranker.py", "tests/ranking/test_reranker_fit.py"],
    "qbert_ray/ranking/cold_items.py": ["tests/ranking/test_cold_items.py"],
    "qbert_ray/ranking/evaluate.py": ["tests/ranking/test_evaluate.py"],
    "qbert_ray/inputs/splits.py": ["tests/inputs/test_splits.py"],
    "qbert_ray/inputs/k_core.py": ["tests/inputs/test_k_core.py"],
    "qbert_ray/inputs/stage.py": ["tests/inputs/test_k_core.py"],
    "qbert_ray/features/structure.py": ["tests/features/test_structure.py"],
    "qbert_ray/storage/catalog.py": ["tests/storage/test_catalog.py"],
}
COPIED = ("qbert_ray", "tests", "configs")
WITHOUT_GRADIENTS = {"torch.no_grad()", "torch.inference_mode()"}
# Text of an error or of a warning is checked by eye.
MESSAGES = [r"^\s*raise ", r"\bf?\"[^\"]*\{.*\}[^\"]*\"\s*$"]
# A device other than the default one is taken on GPUs only, and sequences given to a strict `zip` are equally long.
SET_ASIDE = re.compile(r"\b(device|non_blocking|strict)=[\w.]+|\.to\([\w.]*(device|None)\)|[\s,]")
LASTS = 3600  # seconds for one module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="paths as in TESTS; all of them by default")
    parser.add_argument("--sample", type=int, default=100, help="mutants tried of each module; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--only", nargs="*", metavar="MUTANT", help="these mutants of one module, by name, in place of a sample")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tried at a time")
    parser.add_argument("--out", type=Path, help="file to which the table and the survivors are appended")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(TESTS):
        parser.error(
            f"no tests are named for {', '.join(sorted(unknown))}; add them to TESTS in tests/mutants.py, known: {', '.join(TESTS)}"
        )
    for module in arguments.modules:
        folder = prepare(module)
        names = mutate(folder, module)
        drawn = random.Random(arguments.seed).sample(names, min(arguments.sample or len(names), len(names)))
        chosen = sorted(drawn) if arguments.only is None else [name for name in names if name.rpartition(".")[2] in arguments.only]
        text = report(module, run(folder, module, chosen, arguments.jobs), len(names), (folder / module).read_text())
        print(text, flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(text + "\n")
    return 0


def prepare(module: str) -> Path:
    """Folder with a fresh copy of the package and the tests, and mutmut's settings."""
    folder = ROOT / "build" / "mutants" / module.removesuffix(".py").replace("/", ".")
    shutil.rmtree(folder, ignore_errors=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / module
    path.write_text(without_decorators(path.read_text()))
    settings = f"\n[tool.mutmut]\nsource_paths = ['qbert_ray']\ndo_not_mutate_patterns = {json.dumps(MESSAGES)}\n"
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings)
    return folder


def without_decorators(source: str) -> str:
    """The source with `@torch.no_grad()` and the like written as `with` around the function's body."""
    lines = source.split("\n")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for node in sorted(functions, key=lambda node: -node.lineno):  # from the end, so that line numbers above stay right
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if not decorators or not set(decorators) <= WITHOUT_GRADIENTS:
            continue
        first, last = node.body[0].lineno - 1, (node.end_lineno or node.lineno)
        body = [f"    {line}" if line else line for line in lines[first:last]]
        opening = " " * node.body[0].col_offset + "with " + ", ".join(decorators) + ":"
        lines[first:last] = [opening, *body]
        del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines)


def mutate(folder: Path, module: str) -> list[str]:
    """Turns the module of the copy into one that is any of its mutants at will; returns their names."""
    script = (
        "import sys, json; from mutmut.mutation.file_mutation import mutate_file_contents; from pathlib import Path;"
        "path = Path(sys.argv[1]); mutated = mutate_file_contents(str(path), path.read_text());"
        "path.write_text(mutated.code); print(json.dumps(mutated.mutant_names))"
    )
    done = subprocess.run([sys.executable, "-c", script, module], cwd=folder, capture_output=True, text=True, check=True)
    prefix = module.removesuffix(".py").replace("/", ".")
    return [f"{prefix}.{name}" for name in json.loads(done.stdout)]


def run(folder: Path, module: str, names: list[str], jobs: int) -> dict[str, str]:
    """What became of each mutant."""
    (folder / "plan.json").write_text(json.dumps({"mutants": names, "jobs": jobs}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # the tests must import the copy
    options = ["-q", "-p", "tests.mutant_loop", "-p", "no:cacheprovider", "--noconftest", "--hypothesis-seed=0"]
    command = [sys.executable, "-m", "pytest", *options, *TESTS[module]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LASTS)
    found = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}
    if set(found) != set(names):
        raise RuntimeError(f"nothing was tried of {module}:\n{done.stdout[-5000:]}\n{done.stderr[-3000:]}")
    return found


def report(module: str, results: dict[str, str], total: int, mutated: str) -> str:
    """Markdown: the row of the module's score, what became of the mutants, and what every survivor changes."""
    functions = {node.name: node for node in ast.walk(ast.parse(mutated)) if isinstance(node, ast.FunctionDef)}
    text = mutated.split("\n")
    unnoticed = {name: changes(text, functions, name) for name, result in results.items() if result in ("survived", "no test")}
    survivors = {name: lines for name, lines in unnoticed.items() if len({SET_ASIDE.sub("", line[1:]) for line in lines}) > 1}
    tried = len(results) - len(unnoticed) + len(survivors)
    lines = [f"| {module} | {total} | {tried} | {tried - len(survivors)} | {1 - len(survivors) / max(tried, 1):.1%} |"]
    kinds = [f"{count} {result}" for result, count in sorted(Counter(results.values()).items())]
    lines.append(f"  {', '.join(kinds)}; {len(unnoticed) - len(survivors)} of them set aside")
    for name, changed in survivors.items():
        lines += [f"  {name.rpartition('.')[2]}: {results[name]}", *(f"    {line}" for line in changed)]
    return "\n".join(lines)


def changes(text: list[str], functions: dict[str, ast.FunctionDef], name: str) -> list[str]:
    """The lines that a mutant takes away (-) and adds (+)."""
    key = name.rpartition(".")[2]
    own, original = functions[key], functions[key.rpartition("__mutmut_")[0] + "__mutmut_orig"]
    sides = [[line.strip().replace(node.name, "") for line in text[node.lineno - 1 : node.end_lineno]] for node in (original, own)]
    diff = difflib.unified_diff(*sides, n=0, lineterm="")
    return [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]


if __name__ == "__main__":
    sys.exit(main())
