"""The benchmarks of index and windows at sizes that take seconds."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def last_line(script, *arguments):
    command = [sys.executable, f"bench/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_start_is_measured():
    (case,) = last_line("index.py", "--cases", "60000/20", "--starts=1")["cases"]
    assert (case["rows"], case["shards"]) == (60_000, 20)
    assert case["seconds"] < 1
    assert 0 < case["mib"] < 100


def test_a_folder_is_measured():
    found = last_line("index.py", "--folder_images=2000", "--starts=1")
    assert found["images"] == 2000
    assert 0 < found["cpu_us_an_image"] < 2000


def test_windows_are_measured(tmp_path):
    arguments = [f"--folder={tmp_path}", "--shards=8", "--rows=70", "--rounds=1"]
    windows = {entry["window"]: entry for entry in last_line("shuffle_window.py", *arguments)["windows"]}
    assert windows[1]["most_from_one_shard"] > windows[4]["most_from_one_shard"] > 0.25
    assert windows[0]["cold_samples_per_second"] > 0
    assert list(tmp_path.iterdir()) == []
