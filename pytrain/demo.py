"""`pytrain demo`: the main job on the text that every Python has, its own standard library."""

import hashlib
import json
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pytrain.data.corpus import prepare
from pytrain.data.indexed import IndexedDataset
from pytrain.data.tokenizer import train_sentencepiece
from pytrain.errors import UserError
from pytrain.metrics import Evaluation
from pytrain.native import native

if TYPE_CHECKING:
    from pytrain.config import RunConfig

VOCABULARY = 2048
TOKENIZER_BYTES = 3 << 20  # of text that the tokenizer is trained on
HELDOUT_BYTES = 300_000  # of held-out text, in whole modules of at most half of it
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "turtledemo",
}
PROMPT = 'def read_lines(path):\n    """'

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """What the demo reached."""

    heldout: Evaluation
    unigram_entropy: float
    """Of the held-out tokens, in nats: what a model without any context could reach at best."""
    sample: str
    run_folder: Path

    @property
    def share(self) -> float:
        """Held-out loss over unigram entropy: smaller is better, 1 has learned nothing from context."""
        return self.heldout.loss / self.unigram_entropy


def run(folder: Path, say: Say = print, steps: int | None = None) -> DemoResult:
    """Text, tokenizer, corpus, training, held-out loss, sample; everything lies in `folder` afterwards.

    Args:
        folder: new or empty.
        say: told in lines what happens.
        steps: of training, instead of the preset's.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    from pytrain.config import build
    from pytrain.presets import find_preset
    from pytrain.train import Trainer

    started = time.monotonic()
    native()  # says at once if it cannot run here
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; remove it, or choose another --folder")
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    _prepare_data(data, say)
    recipe = {**find_preset("demo").recipe}
    if steps is not None:
        recipe |= {"run.steps": steps, "learning_rate.warmup_steps": min(steps, 20)}
    tables = _tables({**recipe, "run.folder": str(folder / "run"), "run.log_every": 50, "model.preset": "demo"})
    tables["tokenizer"] = {"path": str(data / "tokenizer.model")}
    tables["data"] |= {"train": [str(data / "train")], "heldout": [str(data / "heldout")]}
    tables["evaluation"] = {"every": int(recipe["run.steps"]), "batches": 0}
    config = build(tables, "the demo's configuration")
    say(f"training {_millions(config)} parameters for {config.run.steps} steps of {config.step_tokens} tokens")
    with Trainer(config) as trainer:
        result = trainer.run()
        if result.stopped or result.last is None:
            raise UserError(f"the demo was stopped by {result.stopped}; remove {folder} and start it again")
        text = trainer.sample(PROMPT, tokens=96).text
    found = DemoResult(
        result.last.heldout["heldout"], unigram_entropy(data / "heldout"), PROMPT + text, folder / "run"
    )
    _conclude(found, folder, time.monotonic() - started, say)
    return found


def standard_library() -> Path:
    """The folder of this Python's own modules."""
    return Path(sysconfig.get_paths()["stdlib"])


def _prepare_data(data: Path, say: Say) -> None:
    """Train and held-out text, tokenizer, and both corpora."""
    say("collecting the standard library of this Python: code and documentation")
    train, heldout = split_modules(standard_library())
    write_jsonl(data / "train.jsonl", train)
    write_jsonl(data / "heldout.jsonl", heldout)
    say(f"training a tokenizer of {VOCABULARY} pieces")
    train_sentencepiece(
        [data / "train.jsonl"], data / "tokenizer.model", VOCABULARY, "bpe", sample_bytes=TOKENIZER_BYTES
    )
    for name in ("train", "heldout"):
        report = prepare([data / f"{name}.jsonl"], data / name, data / "tokenizer.model")
        say(f"{name}: {report.documents} documents, {report.utf8_bytes / 1e6:.2f} MB, {report.tokens} tokens")


def _tables(values: dict[str, object]) -> dict[str, dict[str, object]]:
    tables: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return tables


def _millions(config: "RunConfig") -> str:
    from pytrain.config import parameter_count

    return f"{parameter_count(config.model) / 1e6:.2f}M"


def _conclude(found: DemoResult, folder: Path, seconds: float, say: Say) -> None:
    python = f"{Path(sys.executable).name} -m pytrain"
    bits = found.heldout.bits_per_byte
    say(
        f"\ndone in {seconds:.0f} s. Held-out loss {found.heldout.loss:.3f} nats per token, "
        f"{found.share:.2f} of the {found.unigram_entropy:.3f} that token frequencies alone give"
        + ("" if bits is None else f"; {bits:.3f} bits per byte")
    )
    say(f"\nA sample from the model:\n{found.sample}\n")
    say(
        f"{folder}/data       text, tokenizer and corpora\n"
        f"{folder}/run        run.toml, metrics.jsonl, record.json, checkpoints\n\n"
        f"Next:\n"
        f'  {python} generate {found.run_folder} --prompt "class Queue:"\n'
        f"  {python} inspect {found.run_folder}\n"
        f"  {python} init --preset llama-15m         a run.toml for your own text"
    )


def unigram_entropy(prefix: Path) -> float:
    """Entropy of the token frequencies of a corpus, in nats."""
    counts = np.bincount(IndexedDataset(prefix).tokens)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


# --- the text ------------------------------------------------------------------------------------------


def split_modules(library: Path) -> tuple[list[str], list[str]]:
    """Training and held-out documents: whole top-level modules on either side, no paragraph on both."""
    found = dict(modules(library))
    held_names: set[str] = set()
    held_bytes = 0
    for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = sum(map(len, found[name]))
        if held_bytes < HELDOUT_BYTES and size <= HELDOUT_BYTES // 2:
            held_names.add(name)
            held_bytes += size
    train = [text for name, texts in found.items() if name not in held_names for text in texts]
    held = [text for name in found if name in held_names for text in found[name]]
    if not train or not held:
        raise UserError(f"{library} has no Python sources to learn from; train on your own text instead")
    known = {key for text in train for key in paragraph_keys(text)}
    unseen = ("\n\n".join(part for part in paragraphs(text) if key_of(part) not in known) for text in held)
    return train, [text for text in unseen if text]


def modules(library: Path) -> Iterator[tuple[str, list[str]]]:
    """Top-level modules and packages of the standard library by name, with the texts of their files."""
    for path in sorted(library.iterdir()):
        if path.name in SKIPPED or path.name.startswith("_sysconfigdata"):
            continue
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.suffix == ".py" else []
        texts = [
            text for file in files if not SKIPPED & set(file.parts[len(library.parts) :]) and (text := read(file))
        ]
        if texts:
            yield path.stem, texts


def read(file: Path) -> str:
    """The text of a source file; empty where it is not UTF-8 (a few test data files are not)."""
    try:
        return file.read_text(encoding="utf-8").replace("\0", "")
    except (UnicodeDecodeError, OSError):
        return ""


def paragraphs(text: str) -> list[str]:
    """Runs of lines between blank lines."""
    return [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def key_of(paragraph: str) -> bytes:
    """Hash of a paragraph, whatever its white space."""
    return hashlib.sha256(" ".join(paragraph.split()).encode()).digest()


def paragraph_keys(text: str) -> Iterator[bytes]:
    """Hashes of all paragraphs of a text."""
    return map(key_of, paragraphs(text))


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    """One {"text": ...} per line."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
