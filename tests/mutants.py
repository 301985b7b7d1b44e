"""Mutation score of a module by mutmut: the share of small changes to it that make one of its tests fail.

python -m tests.mutants qbert_ray/metrics.py --sample 100 --seed 0      (make mutants MODULE=qbert_ray/metrics.py SAMPLE=100 SEED=0)

The package and its tests are copied to build/mutants/<module>, so the checkout stays as it is. In the copy the decorators that
switch gradients off become `with` statements, because mutmut leaves decorated functions alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

# Module -> the tests that should notice a change to it.
TESTS = {
    "qbert_ray/fusion/model.py": ["tests/fusion"],
    "qbert_ray/semantic_ids/rqvae.py": [
        "tests/semantic_ids/test_rqvae.py",
        "tests/semantic_ids/test_rqvae_equations.py",
        "tests/semantic_ids/test_quantizers.py",
    ],
    "qbert_ray/semantic_ids/kmeans.py": ["tests/semantic_ids/test_kmeans.py", "tests/semantic_ids/test_quantizers.py"],
    "qbert_ray/semantic_ids/collisions.py": ["tests/semantic_ids/test_collisions.py"],
    "qbert_ray/semantic_ids/quality.py": ["tests/semantic_ids/test_quality.py"],
    "qbert_ray/sequence/model.py": ["tests/sequence/test_model.py", "tests/sequence/test_equations.py"],
    "qbert_ray/sequence/packing.py": ["tests/sequence/test_equations.py"],
    "qbert_ray/sequence/item_table.py": ["tests/sequence/test_item_table.py"],
    "qbert_ray/sequence/masking.py": ["tests/sequence/test_masking.py"],
    "qbert_ray/metrics.py": ["tests/test_metrics.py"],
    "qbert_ray/top_k.py": ["tests/test_top_k.py"],
    "qbert_ray/training.py": ["tests/test_training.py"],
    "qbert_ray/ranking/item_item.py": ["tests/ranking/test_item_item.py"],
    "qbert_ray/ranking/blend.py": ["tests/ranking/test_blend.py"],
    "qbert_ray/ranking/score_features.py": ["tests/ranking/test_item_item.py"],
    "qbert_ray/ranking/reranker.py": ["tests/ranking/test_reranker.py", "tests/ranking/test_reranker_fit.py"],
    "qbert_ray/inputs/k_core.py": ["tests/inputs/test_k_core.py"],
    "qbert_ray/inputs/stage.py": ["tests/inputs/test_k_core.py"],
    "qbert_ray/features/structure.py": ["tests/features/test_structure.py"],
    "qbert_ray/storage/catalog.py": ["tests/storage/test_catalog.py"],
}
COPIED = ("qbert_ray", "tests", "configs")
WITHOUT_GRADIENTS = {"torch.no_grad()", "torch.inference_mode()"}
# Text of an error or of a warning is checked by eye.
MESSAGES = [r"^\s*raise ", r"\bf?\"[^\"]*\{.*\}[^\"]*\"\s*$"]
CAUGHT = {1, 3, 24, -24, 36, 152, 255, -9, -11}  # exit codes of mutmut's children: a test failed, took too long, or crashed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="paths as in TESTS; all of them by default")
    parser.add_argument("--sample", type=int, default=100, help="mutants tried of each module; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tried at a time")
    parser.add_argument("--out", type=Path, help="file to which the table and the survivors are appended")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(TESTS):
        parser.error(
            f"no tests are named for {', '.join(sorted(unknown))}; add them to TESTS in tests/mutants.py, known: {', '.join(TESTS)}"
        )
    for module in arguments.modules:
        folder = prepare(module)
        names = mutant_names(folder, module)
        chosen = sorted(random.Random(arguments.seed).sample(names, min(arguments.sample or len(names), len(names))))
        text = report(folder, module, run(folder, module, chosen, arguments.jobs), len(names))
        print(text, flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(text + "\n")
    return 0


def prepare(module: str) -> Path:
    """Folder with a fresh copy of the package and the tests, and mutmut's settings for one module."""
    folder = ROOT / "build" / "mutants" / module.removesuffix(".py").replace("/", ".")
    shutil.rmtree(folder, ignore_errors=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / module
    path.write_text(without_decorators(path.read_text()))
    settings = {
        "source_paths": ["qbert_ray"],
        "only_mutate": [module],
        "also_copy": [f"{name}/" for name in COPIED if name != "qbert_ray"],
        "do_not_mutate_patterns": MESSAGES,
        "pytest_add_cli_args_test_selection": TESTS[module],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "--hypothesis-seed=0", "--noconftest"],
        "timeout_constant": 2.0,
        "timeout_multiplier": 4.0,
        "use_git_change_detection": False,
    }
    # JSON strings, numbers and lists are TOML too; only booleans are spelled the same by chance.
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n")
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


def mutant_names(folder: Path, module: str) -> list[str]:
    """Names of all mutants of a module, as `mutmut run` takes them."""
    script = (
        "import sys; from mutmut.mutation.file_mutation import mutate_file_contents; from mutmut.utils.format_utils import get_mutant_name;"
        "from pathlib import Path; path = Path(sys.argv[1]);"
        "print('\\n'.join(get_mutant_name(path, name) for name in mutate_file_contents(str(path), path.read_text()).mutant_names))"
    )
    done = subprocess.run([sys.executable, "-c", script, module], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


def run(folder: Path, module: str, names: list[str], jobs: int) -> dict[str, int | None]:
    """Exit code of the tests for each mutant."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # the tests must import the copy
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs), *names]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    meta = folder / "mutants" / f"{module}.meta"
    codes = json.loads(meta.read_text())["exit_code_by_key"] if meta.exists() else {}
    found = {name: codes.get(name) for name in names}
    if all(code is None for code in found.values()):
        raise RuntimeError(f"mutmut tried nothing of {module}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return found


def report(folder: Path, module: str, codes: dict[str, int | None], total: int) -> str:
    """Markdown: the row of the module's score, and what every survivor changes."""
    tried = {name: code for name, code in codes.items() if code is not None}
    survivors = [name for name, code in tried.items() if code not in CAUGHT]
    kinds = Counter("survived" if code == 0 else "no test" for name, code in tried.items() if name in survivors)
    score = 1 - len(survivors) / max(len(tried), 1)
    lines = [f"| {module} | {total} | {len(tried)} | {len(tried) - len(survivors)} | {score:.1%} |"]
    lines += [f"  {count} {kind}" for kind, count in kinds.items()]
    return "\n".join([*lines, *(changes(folder, survivors) if survivors else ())])


def changes(folder: Path, names: list[str]) -> Iterator[str]:
    """The lines that each of some mutants takes away and adds."""
    script = "import sys; from mutmut.mutation.diff_apply import get_diff_for_mutant; [print(get_diff_for_mutant(n)) for n in sys.argv[1:]]"
    done = subprocess.run([sys.executable, "-c", script, *names], cwd=folder, capture_output=True, text=True, check=True)
    for line in done.stdout.split("\n"):
        if line[:1] in ("+", "-") and line[:3] not in ("+++", "---"):
            yield f"    {line[0]} {line[1:].strip()}"


if __name__ == "__main__":
    sys.exit(main())
