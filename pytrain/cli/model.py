"""Commands about trained models: generate, evaluate, export, import, inspect."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from pytrain.errors import UserError

PATH = click.Path(path_type=Path)
DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "hip"]), help="What computes; by default that of the run (run.device)."
)


@click.command(short_help="Let a trained model write.")
@click.argument("checkpoint", type=PATH)
@click.option("--prompt", default="", help="Text to continue; - reads it from standard input.")
@click.option("--tokens", default=128, show_default=True, type=click.IntRange(min=1), help="Most tokens to write.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option(
    "--top-k", default=0, show_default=True, type=click.IntRange(min=0), help="Likeliest k only; 0 for all."
)
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Likeliest tokens that together have this probability.",
)
@click.option(
    "--seed",
    default=1234,
    show_default=True,
    type=click.IntRange(min=0),
    help="The same seed, the same text.",
)
@click.option("--stream/--no-stream", default=True, show_default=True, help="Show the text as it is written.")
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    help="Ranks that hold a slice of the model each; by default all that mpiexec started.",
)
@DEVICE
def generate(
    checkpoint: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stream: bool,
    tp: int | None,
    device: str | None,
) -> None:
    """Let the model of a run folder or CHECKPOINT continue a text.

    Started by mpiexec, every rank holds a slice of the model (tensor parallelism), reads its own bytes of the
    checkpoint, and rank 0 prints: for models that fit no single node.

    \b
    Examples:
      pytrain generate runs/llama-15m --prompt "Once upon a time"
      pytrain generate runs/llama-15m/checkpoints/step-001000 --temperature 0 --prompt - < prompt.txt
      mpiexec -n 4 pytrain generate runs/fugaku-13b --prompt "Once upon a time"
    """
    from pytrain import launch
    from pytrain.generate import generate_text

    text = sys.stdin.read() if prompt == "-" else prompt  # mpiexec gives its input to rank 0
    with launch.world(ranks=tp or 1) as world:
        world.on_root(lambda: _check_ranks(world.size, tp))
        pieces = generate_text(
            checkpoint,
            text,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            group=world,
            device=device,
        )
        _show(text, pieces, stream, world.rank == 0)


def _check_ranks(ranks: int, tp: int | None) -> None:
    if tp is not None and tp != ranks:
        raise UserError(f"--tp is {tp}, but the number of ranks is {ranks}; start with mpiexec -n {tp}")


def _show(text: str, pieces: Iterator[str], stream: bool, printing: bool) -> None:
    """Print a prompt and its continuation; a rank that does not print takes part in computing it."""
    if stream and printing:
        click.echo(text, nl=False)
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
        return
    rest = "".join(pieces)
    if printing:
        click.echo(text + rest)


@click.command(short_help="Loss of a checkpoint on held-out text.")
@click.argument("checkpoint", type=PATH)
@click.option(
    "--corpus",
    "corpora",
    multiple=True,
    metavar="PREFIX",
    help="Corpus to evaluate on; may be repeated. By default those of the run's data.heldout.",
)
@click.option("--batches", default=0, type=click.IntRange(min=0), help="Micro-batches per corpus at most; 0 for all.")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(min=1), help="Tensor-parallel ranks.")
@click.option("--pp", default=1, show_default=True, type=click.IntRange(min=1), help="Pipeline stages.")
@DEVICE
def evaluate(checkpoint: Path, corpora: tuple[str, ...], batches: int, tp: int, pp: int, device: str | None) -> None:
    """Loss, perplexity and bits per byte of a run folder or CHECKPOINT on held-out corpora.

    The grid need not be that of the training: the ranks that mpiexec started are tp * pp * replicas.

    \b
    Examples:
      pytrain evaluate runs/llama-15m
      mpiexec -n 4 pytrain evaluate runs/fugaku-13b --corpus data/heldout --tp 2 --pp 2
    """
    from pytrain import launch
    from pytrain.evaluate import evaluate_checkpoint

    with launch.world(ranks=tp * pp) as world:
        found_by_name = evaluate_checkpoint(checkpoint, world, corpora, tp=tp, pp=pp, batches=batches, device=device)
        for name, found in found_by_name.items():
            if world.rank == 0:
                click.echo(f"{name}: {found.sentence}")


@click.command(short_help="Checkpoint to Hugging Face model.")
@click.argument("checkpoint", type=PATH)
@click.option("--hf", "folder", required=True, type=PATH, metavar="DIR", help="Folder to write; must not exist yet.")
def export(checkpoint: Path, folder: Path) -> None:
    """Write a model in Hugging Face form: config.json, safetensors, tokenizer.

    \b
    Example:
      pytrain export runs/llama-15m --hf llama-15m-hf
    """
    from pytrain.checkpoint import Checkpoint
    from pytrain.checkpoint.huggingface import export_huggingface
    from pytrain.progress import byte_progress

    opened = Checkpoint.open(checkpoint)
    with byte_progress("export", sys.stderr) as progress:
        export_huggingface(opened, folder, lambda done, total: progress(done, total, None, None))
    click.echo(f"wrote {folder}")


@click.command("import", short_help="Hugging Face model to checkpoint.")
@click.option(
    "--hf", "folder", required=True, type=PATH, metavar="DIR", help="Folder with config.json and safetensors."
)
@click.option("--out", required=True, type=PATH, metavar="DIR", help="Run folder to make; must not exist yet.")
def import_(folder: Path, out: Path) -> None:
    """Make a run folder, to train onward or generate from, of a GPT-2 or LLaMA model in Hugging Face form.

    \b
    Example:
      pytrain import --hf llama-15m-hf --out runs/onward
    """
    from pytrain.checkpoint.huggingface import import_huggingface
    from pytrain.progress import byte_progress

    with byte_progress("import", sys.stderr) as progress:
        made = import_huggingface(folder, out, lambda done, total: progress(done, total, None, None))
    if made.widened:
        click.echo(f"note: the tensors are of {' and '.join(made.widened)}; all become fp32, which loses nothing")
    if made.tokenizer is None:
        prepare = "name a tokenizer under [tokenizer], and a corpus that was prepared with it"
    else:
        prepare = f"`pytrain prepare --tokenizer {made.tokenizer} --out PREFIX TEXT...`, name PREFIX"
    click.echo(
        f"wrote {out}; next: {prepare} under [data] in {made.run_toml}, then `pytrain train {out} --resume auto`"
    )


@click.command(short_help="Say what a checkpoint or corpus holds.")
@click.argument("path", type=PATH)
@click.option("--tensors", is_flag=True, help="A line for every tensor, the optimizer's too, not for each layer.")
def inspect(path: Path, tensors: bool) -> None:
    """Say what a checkpoint, run folder or corpus prefix holds.

    \b
    Examples:
      pytrain inspect runs/llama-15m
      pytrain inspect runs/llama-15m --tensors
      pytrain inspect data/train
    """
    from pytrain.data import description

    prefix = description.corpus_prefix(path)
    if prefix is not None:
        click.echo(description.describe(prefix))
        return
    from pytrain.checkpoint import inspect as inspection

    click.echo(inspection.inspect(path, tensors=tensors))
