"""``docs/shapes.ipynb``: its cells one after the other, with two steps of the third stage for the recipe."""

import ast
import json

from PIL import Image

from tests.commands import ROOT, TINY

QUICK = [word for word in TINY if "prompt" not in word]


def run_cell(source, names):
    """Run a cell; gives the value of its last line, if that is an expression."""
    *statements, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        statements, last = [*statements, last], None
    exec(compile(ast.Module(statements, []), "cell", "exec"), names)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_trains_looks_and_judges(tmp_path):
    cells = json.loads((ROOT / "docs/shapes.ipynb").read_text(encoding="utf-8"))["cells"]
    first, *others = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {}
    run_cell(first, names)
    names["settings"] = [*QUICK, f"exp_root_dir={tmp_path}"]
    given = [run_cell(cell.replace('train("shapes"', 'train("shapes_stage_3"'), names) for cell in others]
    pictures = [value.size for value in given if isinstance(value, Image.Image)]
    assert pictures == [(768, 192), (768, 192), (512, 384)]
    assert given[0] == 2 and 0 < given[-1]["iou"] < 1
