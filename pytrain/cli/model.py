"""Commands about trained models: generate, export, import, inspect."""

import sys
from pathlib import Path

import click

PATH = click.Path(path_type=Path)


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
def generate(
    checkpoint: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stream: bool,
) -> None:
    """Let the model of a run folder or CHECKPOINT continue a text.

    \b
    Examples:
      pytrain generate runs/llama-15m --prompt "Once upon a time"
      pytrain generate runs/llama-15m/checkpoints/step-001000 --temperature 0 --prompt - < prompt.txt
    """
    from pytrain.generate import generate_text

    text = sys.stdin.read() if prompt == "-" else prompt
    pieces = generate_text(
        checkpoint, text, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if not stream:
        click.echo(text + "".join(pieces))
        return
    click.echo(text, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


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

    export_huggingface(Checkpoint.open(checkpoint), folder)
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

    import_huggingface(folder, out)
    click.echo(
        f"wrote {out}; next: name your corpus under [data] in {out / 'run.toml'}, then "
        f"`pytrain train {out} --resume auto`"
    )


@click.command(short_help="Say what a checkpoint or corpus holds.")
@click.argument("path", type=PATH)
def inspect(path: Path) -> None:
    """Say what a checkpoint, run folder or corpus prefix holds."""
    from pytrain.checkpoint import inspect as inspection

    click.echo(inspection.inspect(path))
