"""The tables of records that are made at different times, and the check of the maps of the code."""

import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
CONDITIONS = {"python": "3.11.7", "numpy": "2.4.6", "cpu": "a processor", "machine": "Linux x86_64"}


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """The module, which reads the records of a temporary folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def write(folder, name, **record):
    (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize("name", ["kills", "damage", "mutants", "environments", "other_data"])
def test_without_its_record_a_part_gives_the_command_that_makes_it(tables, tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert getattr(tables, f"{name}_table")() == "Not recorded yet."  # there is no such command
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / f"{name}.py").touch()
    text = getattr(tables, f"{name}_table")()
    assert text.startswith("Not recorded yet. Command:\n\n    python ")
    assert f"benchmarks/{name}.py " in text
    assert text.endswith(f"--json benchmarks/results/{name}.json")
    assert "|" not in text


def test_kills_are_counted_by_phase_and_signal(tables, tmp_path):
    counts = [
        {"phase": "checkpoint", "signal": "SIGINT", "outcome": "same bits", "count": 3},
        {"phase": "checkpoint", "signal": "SIGKILL", "outcome": "other bits", "count": 1},
        {"phase": "checkpoint", "signal": "SIGKILL", "outcome": "same bits", "count": 4},
        {"phase": "start", "signal": "SIGKILL", "outcome": "same bits", "count": 2},
    ]
    write(tmp_path, "kills", conditions=CONDITIONS | {"command": "python kills.py"}, kills=10, counts=counts)
    text = tables.kills_table()
    assert "9 of 10 runs ended with the same bits" in text
    assert "* 1 x SIGKILL in checkpoint: other bits\n" in text
    assert "| phase of the run | SIGINT | SIGKILL |\n" in text
    assert "| checkpoint | 3 | 5 |\n" in text
    assert "| start | | 2 |\n" in text
    assert "    python kills.py\n\nMeasured on a processor, Linux x86_64, with Python 3.11.7, NumPy 2.4.6." in text
    write(tmp_path, "kills", conditions=CONDITIONS, kills=3, counts=counts[:1])
    assert "The others" not in tables.kills_table()


def test_damaged_files_are_counted_by_outcome(tables, tmp_path):
    good = {"refused": 1500, "identical": 3, "as the file says": 0, "WRONG": 0, "crashed": 0, "slow": 0}
    bad = {"refused": 1, "WRONG": 2, "crashed": 3, "slow": 4}
    records = [
        {"format": "model", "count": 1503, "outcomes": good},
        {"format": "picture", "count": 10, "outcomes": bad},
    ]
    write(tmp_path, "damage", conditions=CONDITIONS, records=records)
    text = tables.damage_table()
    assert "| model file | 1,503 | 1,500 | 3 | 0 | 0 |" in text
    assert "| picture of a digit | 10 | 1 | 0 | 0 | 9 |" in text
    assert "Measured on a processor" in text


def test_mutants_are_counted_by_kind(tables, tmp_path):
    kinds = {"comparison": {"killed": 5, "survived": 1}, "index": {"timeout": 1, "killed": 2, "equivalent": 1}}
    counts = {"mutants": 10, "killed": 7, "timeout": 1, "survived": 1, "equivalent": 1, "killed_percent": 80.0}
    write(tmp_path, "mutants", seed=3, conditions=CONDITIONS, summary=counts | {"kinds": kinds}, mutants=[])
    text = tables.mutants_table()
    assert "The tests detect **80.0 %** of the 10 mutants (seed 3). For 1 of them" in text
    assert "| comparison | 6 | 5 | 0 | 1 |" in text
    assert "| index | 4 | 3 | 1 | 0 |" in text
    assert "| **all** | 10 | 8 | 1 | 1 |" in text


def test_environments_show_what_ran_and_what_could_not_be_made(tables, tmp_path):
    counts = {"tests": 1400, "failed": 0, "skipped": 2}
    found = {
        "lowest": {"passed": True, **counts, "versions": {"python": "3.10.1", "numpy": "2.0.0"}, "failures": []},
        "one_core": {"passed": False, **counts, "versions": {}, "failures": [{"command": "tinyvit doctor"}]},
        "no_shm": {"passed": False, "missing": "needs the permission for unshare:\nrun it as root"},
    }
    command = "python benchmarks/environments.py --json environments.json"
    write(tmp_path, "environments", command=command, environments=found)
    text = tables.environments_table()
    assert "| `lowest` | passed | 3.10.1 | 2.0.0 | 1,400 | 0 | 2 |" in text
    assert "| `one_core` | **failed** | | | 1,400 | 0 | 2 |" in text
    assert "| `no_shm` | could not be made | | | | | |" in text
    assert text.endswith("    python benchmarks/environments.py --json benchmarks/results/environments.json")


def test_other_data_has_a_row_per_training_and_each_command_once(tables, tmp_path):
    row = {
        "data": "Fashion-MNIST",
        "settings": "patches of 4 x 4",
        "parameters": 804_554,
        "epochs": 60,
        "seeds": [0, 1],
        "test_percent": [92.0, 93.0],
        "validation_percent": [92.5, 92.5],
        "minutes": 12.3,
        "command": "python benchmarks/other_data.py",
    }
    one = row | {"data": "KMNIST", "test_percent": [95.125], "validation_percent": [96.0], "seeds": [0]}
    write(tmp_path, "other_data", conditions=CONDITIONS | {"command": "python x.py"}, rows=[row, one])
    text = tables.other_data_table()
    cells = "| Fashion-MNIST | patches of 4 x 4 | 804,554 | 60 | 92.50 ± 0.71 | 92.00, 93.00 | 92.50 ± 0.00 | 12 |"
    assert cells in text
    assert "| KMNIST | patches of 4 x 4 | 804,554 | 60 | 95.12 | 95.12 | 96.00 | 12 |" in text
    assert text.count("    python benchmarks/other_data.py") == 1
    assert "x.py" not in text
    assert "Measured on a processor" in text


# ---- maps of the code ----


def test_a_file_that_is_on_no_map_is_named_with_the_map_to_add_it_to(tables, monkeypatch):
    rows = [(tuple(part for part in parts if part != "tinyvit/console.py"), text) for parts, text in tables.FOLDERS]
    monkeypatch.setattr(tables, "FOLDERS", rows)
    with pytest.raises(ValueError, match=r"those of the library: add tinyvit/console\.py to a row of FOLDERS$"):
        tables.check_maps()


def test_a_file_that_is_gone_is_named_with_its_map(tables, monkeypatch):
    monkeypatch.setattr(tables, "ORDER", (*tables.ORDER, "tinyvit/data/gone.py"))
    with pytest.raises(ValueError, match=r"remove tinyvit/data/gone\.py from ORDER: there is no such file$"):
        tables.check_maps()
