"""Commands from text to tokens: prepare, tokenizer train."""

import sys
from pathlib import Path
from typing import Literal

import click

PATH = click.Path(path_type=Path)


@click.command(short_help="Tokenize text into a corpus.")
@click.argument("inputs", nargs=-1, required=True, type=PATH, metavar="FILE|FOLDER...")
@click.option("--tokenizer", required=True, type=PATH, help="SentencePiece .model or Hugging Face tokenizer.json.")
@click.option(
    "--out", "prefix", required=True, type=PATH, metavar="PREFIX", help="Writes PREFIX.bin, .idx and .json."
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Processes that tokenize.")
@click.option("--key", default="text", show_default=True, help="Key of the text in JSONL.")
@click.option(
    "--bos/--no-bos",
    default=True,
    show_default=True,
    help="Begin each document with the begin token, if the tokenizer's own tools put one there.",
)
@click.option("--eod/--no-eod", default=True, show_default=True, help="End each document with the end token.")
def prepare(
    inputs: tuple[Path, ...], tokenizer: Path, prefix: Path, workers: int, key: str, bos: bool, eod: bool
) -> None:
    """Tokenize text (a file is a document) or JSONL (a line is), plain, .gz or .zst, into a corpus.

    \b
    Example:
      pytrain prepare --tokenizer data/tokenizer.model --out data/train --workers 4 corpus/*.jsonl.gz
    """
    from pytrain.data import corpus
    from pytrain.progress import byte_progress

    with byte_progress("prepare", sys.stderr) as progress:
        report = corpus.prepare(
            inputs, prefix, tokenizer, workers, prepend_bos=bos, append_eod=eod, text_key=key, progress=progress
        )
    empty = f" ({report.empty_documents} of them empty)" if report.empty_documents else ""
    per_token = f", {report.utf8_bytes / report.tokens:.2f} bytes per token" if report.tokens else ""
    begun = "" if report.begin_id is None else f"; each begins with token {report.begin_id} (--no-bos leaves it out)"
    click.echo(
        f"wrote {prefix}.bin, .idx and .json: {report.files} file(s), {report.documents} documents{empty}, "
        f"{report.tokens} tokens{per_token}{begun}"
    )


@click.group()
def tokenizer() -> None:
    """Make a tokenizer."""


@tokenizer.command(short_help="Train a SentencePiece tokenizer.")
@click.argument("inputs", nargs=-1, required=True, type=PATH, metavar="FILE|FOLDER...")
@click.option("--out", "output", required=True, type=PATH, metavar="FILE.model", help="Where to write.")
@click.option("--vocabulary", required=True, type=click.IntRange(min=1), help="Number of tokens.")
@click.option("--type", "model_type", default="unigram", show_default=True, type=click.Choice(["unigram", "bpe"]))
@click.option("--key", default="text", show_default=True, help="Key of the text in JSONL.")
def train(
    inputs: tuple[Path, ...], output: Path, vocabulary: int, model_type: Literal["unigram", "bpe"], key: str
) -> None:
    """Train a SentencePiece tokenizer on text or JSONL, plain, .gz or .zst.

    \b
    Example:
      pytrain tokenizer train --out data/tokenizer.model --vocabulary 8000 corpus/*.txt
    """
    from pytrain.data.tokenizer import train_sentencepiece
    from pytrain.progress import byte_progress

    with byte_progress("read", sys.stderr) as progress:
        made = train_sentencepiece(
            inputs,
            output,
            vocabulary,
            model_type,
            text_key=key,
            progress=lambda done, total: progress(done, total, None, None),
        )
    click.echo(f"wrote {output}: {made.vocabulary_size} tokens, sha256 {made.sha256}")
