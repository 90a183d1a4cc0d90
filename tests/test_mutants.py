"""The mutants fit the code, and a bug that no test sees survives."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("mutants")


def test_every_mutant_of_the_table_fits_the_code_and_names_tests_that_exist(mutants):
    table = mutants.read_table()
    assert len({mutant.bug for mutant in table}) == len(table) > 40
    for mutant in table:
        compile(mutant.source(ROOT), mutant.file, "exec")
        assert all((ROOT / test.partition("::")[0]).exists() for test in mutant.tests), mutant.bug


def test_a_mutant_whose_text_is_gone_is_an_error(mutants):
    gone = mutants.Mutant("x", "fourdfy/seeds.py", "no such text", "", ())
    with pytest.raises(ValueError, match="occurs 0 times"):
        gone.source(ROOT)


@pytest.fixture
def project(tmp_path):
    """A function of two lines, of which its test sees one."""
    (tmp_path / "code.py").write_text(
        "def f(x):\n    seen = x + 1\n    unseen = x > 2\n    return seen, unseen\n"
    )
    (tmp_path / "test_code.py").write_text(
        "import code_of_it\n\ndef test_f():\n    assert code_of_it.f(1)[0] == 2\n"
    )
    (tmp_path / "code.py").rename(tmp_path / "code_of_it.py")
    return tmp_path


def test_what_no_test_sees_survives(mutants, project, capsys):
    seen = mutants.Mutant("seen", "code_of_it.py", "x + 1", "x + 2", ("test_code.py",))
    unseen = mutants.Mutant("unseen", "code_of_it.py", "x > 2", "x > 3", ("test_code.py",))
    deadly = mutants.Mutant(
        "deadly", "code_of_it.py", "    seen", "    import os; os._exit(130)\n    seen", ("test_code.py",)
    )
    endless = mutants.Mutant(
        "endless", "code_of_it.py", "    seen", "    while True: pass\n    seen", ("test_code.py",)
    )
    assert mutants.run(project, [seen, unseen, deadly], seconds=60) == [unseen]
    assert mutants.run(project, [endless], seconds=5) == []
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "killed",
        "SURVIVED",
        "killed",
        "killed",
    ]
    assert "x + 1" in (project / "code_of_it.py").read_text()


def test_tests_that_fail_without_a_bug_are_an_error(mutants, project):
    (project / "test_code.py").write_text("def test_f():\n    assert False\n")
    with pytest.raises(RuntimeError, match="without any bug"):
        mutants.run(
            project, [mutants.Mutant("x", "code_of_it.py", "x + 1", "x", ("test_code.py",))], seconds=60
        )


SOURCE = '''\
def f(x: int = 1, y=None):
    """Text of 2 lines."""
    if x:
        print(f"{x + 3}", end="")
    if not y and x < 4:
        raise ValueError
    return g(x, wide=True) if y is None else x
'''
MADE = [
    "1 -> (1 + 1)",
    "x -> not x",
    'print(f"{x + 3}", end="") -> pass',
    'print(f"{x + 3}", end="") -> print(f"{x + 3}")',
    "not y and x < 4 -> ((not y) or (x < 4))",
    "not y -> (y)",
    "x < 4 -> (x <= 4)",
    "4 -> (4 + 1)",
    "raise ValueError -> pass",
    "g(x, wide=True) if y is None else x -> (x if y is None else g(x, wide=True))",
    "y is None -> (y is not None)",
    "g(x, wide=True) -> g(x)",
    "True -> False",
]


def test_mutants_are_made_of_conditions_numbers_statements_and_arguments(mutants, tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    made = list(mutants.make_mutants(tmp_path, "a.py"))
    assert [mutant.bug.split(": ", 1)[1] for mutant in made] == MADE
    for mutant in made:
        compile(mutant.source(tmp_path), "a.py", "exec")
        assert mutant.source(tmp_path) != SOURCE
