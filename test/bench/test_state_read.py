"""The benchmark of reading a state: its figures are there, and a reader that opens every file pays most."""

import importlib.util
import json
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "bench" / "state_read.py"


def test_a_reader_of_its_own_rows_pays_less_than_one_of_every_file(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_state_read", PATH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.write(tmp_path, 8)
    figures = [bench.read(tmp_path / "last-state", 8, every_file) for every_file in (True, False)]
    assert json.loads(json.dumps(figures)) == figures
    assert figures[1]["cpu_s"] < 0.6 * figures[0]["cpu_s"]
