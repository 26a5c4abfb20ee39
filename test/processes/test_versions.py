"""What tells two installations apart."""

import torch

from library.processes import versions as facts


def test_versions_and_code_are_named():
    found = facts.software()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert len(found["this project's code"]) == 12


def test_a_changed_line_of_code_is_another_code(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "_ROOT", tmp_path)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a.py").write_text("x = 1\n")
    before = facts._code_digest()
    (tmp_path / "library" / "a.py").write_text("x = 2\n")
    assert facts._code_digest() != before


def test_differences_name_both_values_and_what_one_side_lacks():
    assert facts.differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b (2 and 3)", "c (none and 4)"]
