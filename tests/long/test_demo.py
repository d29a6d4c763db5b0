"""The demo as a newcomer runs it: about two minutes on two cores."""

import json
from pathlib import Path

from pytrain import demo
from pytrain.generate import generate_text
from pytrain.metrics import read_metrics


def test_the_demo_learns_from_context(tmp_path: Path) -> None:
    """Loss on modules kept from tokenizer and training is at most 0.75 of their unigram entropy."""
    said: list[str] = []
    found = demo.run(tmp_path / "demo", said.append)
    print("\n".join(said))
    assert found.share <= 0.75
    assert len("".join(generate_text(found.run_folder, "class Queue:", tokens=40))) > 10
    losses = [line["loss"] for line in read_metrics(found.run_folder / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_the_library_is_split_by_modules(tmp_path: Path) -> None:
    """On the real library: no paragraph on both sides, and a held-out part worth the name."""
    train, heldout = demo.split_modules(demo.standard_library())
    seen = {key for text in train for key in demo.paragraph_keys(text)}
    held = [key for text in heldout for key in demo.paragraph_keys(text)]
    assert not seen & set(held)
    assert 50_000 < sum(map(len, heldout)) < 600_000
    demo.write_jsonl(tmp_path / "heldout.jsonl", heldout)
    lines = (tmp_path / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == heldout
