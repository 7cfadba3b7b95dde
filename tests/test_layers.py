"""Imports go one way, and what needs no DeepSpeed does not import it."""

import ast
import subprocess
import sys

from launch import ROOT

# From the ground up; a package may import those before it, and itself.
LAYERS = (
    ("errors",),
    ("console",),
    ("files",),
    ("shipped",),
    ("modeling",),
    ("config", "status"),
    ("run_directory",),
    ("objective", "parallel"),
    ("phases", "data", "private_names", "pretrained"),
    ("inference",),
    ("metrics", "generation"),
    ("engine", "planning"),
    ("start",),
    ("reports",),
    ("export", "hub", "failures", "usage", "command_line"),
    ("train", "cli"),
)


def imported(path):
    """The modules of dsvae that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "dsvae":
                yield from (f"dsvae.{alias.name}" for alias in node.names)
            elif node.module.startswith("dsvae."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("dsvae."))


def test_imports_go_one_way():
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    upward = []
    for path in sorted((ROOT / "dsvae").rglob("*.py")):
        own = path.relative_to(ROOT / "dsvae").with_suffix("").parts[0]
        for module in imported(path):
            other = module.split(".")[1]
            if own != "__init__" and other[0].islower() and height[other] > height[own]:
                upward.append(f"{own} imports {module}")
    assert upward == []


def test_measuring_and_sampling_need_no_deepspeed():
    modules = "dsvae.reports.evaluation, dsvae.reports.runs, dsvae.generation.sentence_vae"
    code = f"import sys, {modules}; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=500, cwd=ROOT)


def test_training_starts_without_scikit_learn():
    """It is a fifth of the time to start, and only some evaluations need it."""
    code = "import sys, dsvae.train; sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=500, cwd=ROOT)


def test_the_scripts_of_a_cluster_get_their_answers_without_heavy_imports():
    """They ask on a login node, several times per job."""
    code = (
        "import sys, dsvae.run_directory;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=500, cwd=ROOT)
