"""A line of metrics.jsonl holds what belongs to groups, corpora and prompts, whole, and only where there is some."""

import json
from dataclasses import replace

import pytest

from pytrain.metrics import Evaluation, Sample, Saved, Traffic, as_json
from tests.test_metrics import STEP


@pytest.mark.parametrize("empty", [True, False])
def test_what_belongs_to_others_is_written_whole(empty: bool) -> None:
    more = {
        "heldout": {"wiki": Evaluation(2.0, 7.4, float("nan"))},
        "prompts": (Sample("Once", " upon"), Sample("Twice", "")),
        "groups": {"tp": Traffic(0.25, 0.5, 1024), "dp": Traffic(0.0, float("inf"), 0)},
        "saved": Saved(4, 0.5, 1.5),
    }
    found = as_json(STEP if empty else replace(STEP, **more))  # type: ignore[arg-type]
    assert found["loss"] == STEP.loss
    assert list(found)[:3] == ["step", "tokens", "samples"]
    if empty:
        assert not set(more) & set(found)
        return
    assert found["heldout"] == {"wiki": {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": None}}
    assert found["prompts"] == [{"prompt": "Once", "text": " upon"}, {"prompt": "Twice", "text": ""}]
    assert found["groups"] == {
        "tp": {"waited_s": 0.25, "hidden_s": 0.5, "bytes_sent": 1024},
        "dp": {"waited_s": 0.0, "hidden_s": None, "bytes_sent": 0},
    }
    assert found["saved"] == {"step": 4, "blocked_s": 0.5, "background_s": 1.5}
    json.dumps(found, allow_nan=False)
