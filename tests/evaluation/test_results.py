"""What the harness returns, as the report tells it."""

from __future__ import annotations

import json
from pathlib import Path

from lowrank_pl.evaluation.results import Results, scores_of

FOUND = {
    "results": {
        "a": {"name": "a", "alias": " - a", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.25},
        "b": {"alias": "b", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
    },
    "groups": {"g": {"alias": "g", "acc,strict": 0.5, "acc_stderr,strict": float("nan")}},
    "higher_is_better": {"a": {"acc": True}, "b": {"word_perplexity": False}, "g": {"acc": None}},
    "versions": {"a": 1.0, "b": "Yaml"},
    "n-shot": {"a": 5, "b": 0},
    "n-samples": {"a": {"original": 1000, "effective": 4}, "b": {"original": 3, "effective": 3}},
}


def test_metrics_filters_and_uncertainty_of_tasks_and_groups(tmp_path: Path) -> None:
    results = Results({"device": "cpu", "dtype": "float32", "lm_eval": "0"}, {"m": 1234}, {"m": scores_of(FOUND)})
    results.save(tmp_path)
    assert (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[4:] == [
        "| parameters | | | | | | 1,234 |",
        "| a | 1.0 | 5 | 4 of 1,000 | acc ↑ | none | 0.5000 ± 0.2500 |",
        "| b | Yaml | 0 | 3 of 3 | word_perplexity ↓ | none | 12.5000 |",
        "| g |  |  |  | acc | strict | 0.5000 |",
    ]
    told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["models"]["m"]
    assert told["parameters"] == 1234
    assert told["tasks"]["g"]["scores"] == [
        {"metric": "acc", "filter": "strict", "value": 0.5, "stderr": None, "higher_is_better": None}
    ]
