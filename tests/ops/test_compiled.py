"""What compiled kernels on disk depend on."""

import ast
from pathlib import Path

from gqa.ops import compiled


def test_the_key_covers_all_that_kernels_are_made_of():
    folder = Path(compiled.__file__).parent
    for name in compiled.KERNELS:
        tree = ast.parse((folder / f"{name}.py").read_text("utf-8"))
        imports = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        ours = {module.removeprefix("gqa.ops.") for module in imports if module.startswith("gqa.ops")}
        assert ours <= set(compiled.KERNELS), name
