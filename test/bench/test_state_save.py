"""The benchmark of saving a state: its figures are there and are those of a state that was written."""

import importlib.util
import json
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "bench" / "state_save.py"


def test_figures_are_one_json_object(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("bench_state_save", PATH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.TENSORS = 2
    assert bench.main(["--out", str(tmp_path), "--gigabytes", "0.002", "--saves", "2"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["stall_s"] > 0 < figures["write_s"]
    assert set(figures["hash_gb_per_s"]) == {"sha256", "blake2b", "sha512", "sha3_256"}
    assert list(tmp_path.iterdir()) == []
