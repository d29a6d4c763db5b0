"""The group of all commands, and those about a run: train, init, config, info, demo, bench, completion."""

import functools
from pathlib import Path
from typing import Any

import click

from pytrain.cli import corpus, model, plan
from pytrain.errors import ExitCode, UserError
from pytrain.presets import PRESETS

PATH = click.Path(path_type=Path)

EXIT_CODES = (
    f"Exit status: {ExitCode.OK:d} done; {ExitCode.CRASHED:d} unexpected exception, with traceback; "
    f"{ExitCode.BAD_INPUT:d} wrong command line, configuration or file; {ExitCode.STOPPED:d} stopped by "
    f"SIGTERM or SIGUSR1 after a checkpoint, run again with --resume auto; {ExitCode.INTERRUPTED:d} Ctrl-C."
)


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from pytrain.information import version

        click.echo(f"pytrain {version()}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXIT_CODES)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Version.")
def root() -> None:
    """Train GPT-2 and LLaMA models from text to weights, on one process or many.

    \b
    Examples:
      pytrain demo                                       see everything work, in two minutes
      pytrain tokenizer train --out data/tokenizer.model --vocabulary 8000 corpus/*.txt
      pytrain prepare --tokenizer data/tokenizer.model --out data/train corpus/*.txt
      pytrain init --preset llama-15m                    a commented run.toml
      pytrain train run.toml --dry-run                   what it would take
      pytrain train run.toml
      pytrain generate runs/llama-15m --prompt "Once upon a time"
    """


@root.command(short_help="Train as a run.toml says.")
@click.argument("run", metavar="RUN.toml", type=PATH)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key; may be repeated.")
@click.option(
    "--resume",
    default="none",
    show_default=True,
    metavar="none|auto|PATH",
    help="Start anew, go on from the run folder's newest whole checkpoint if any, or from this one.",
)
@click.option("--dry-run", is_flag=True, help="Print parameters, tokens, data, memory, disk and time; train nothing.")
def train(run: Path, overrides: tuple[str, ...], resume: str, dry_run: bool) -> int:
    """Train as RUN.toml says; a run folder in its place repeats that run.

    \b
    Examples:
      pytrain train run.toml
      pytrain train run.toml --set run.steps=2000 --set run.folder=runs/longer
      pytrain train run.toml --resume auto               also right when there is no checkpoint yet
      pytrain train runs/first --set run.folder=runs/again
    """
    from pytrain import config, launch

    if dry_run:
        from pytrain.estimate import report

        click.echo(report(config.load(run, overrides)))
        return ExitCode.OK

    @functools.cache
    def read() -> config.RunConfig:
        return config.load(run, overrides)

    with launch.world(lambda: launch.settings_of(read())) as world:
        settings = world.on_root(read)
        from pytrain import train as training  # after the configuration is known to be right

        result = training.train(settings, resume=resume, world=world)
    return ExitCode.STOPPED if result.stopped else ExitCode.OK


@root.command(short_help="Write a commented run.toml.")
@click.option(
    "--preset",
    required=True,
    metavar="NAME",
    help=f"One of {', '.join(PRESETS)}.",
    shell_complete=lambda _context, _option, start: [name for name in PRESETS if name.startswith(start)],
)
@click.option(
    "--out", default="run.toml", show_default=True, metavar="FILE", help="Where to write; - for the screen."
)
def init(preset: str, out: str) -> None:
    """Write a RUN.toml in which every key is explained.

    \b
    Example:
      pytrain init --preset gpt2-124m --out gpt2.toml
    """
    from pytrain.config import commented_toml

    text = commented_toml(preset)
    if out == "-":
        click.echo(text, nl=False)
        return
    try:
        with Path(out).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{out} exists already; give another --out, or remove it") from None
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    click.echo(f"wrote {out}; next: put your corpora and tokenizer into it, then `pytrain train {out} --dry-run`")


@root.command(short_help="Explain the keys of the configuration.")
@click.argument("key", required=False)
def config(key: str | None) -> None:
    """Explain a KEY or section of the configuration, or list all.

    \b
    Examples:
      pytrain config
      pytrain config learning_rate.schedule
      pytrain config batch
    """
    from pytrain.config import explain

    click.echo(explain(key))


@root.command(short_help="Describe this installation for a bug report.")
@click.option("--ring", is_flag=True, help="Pass a message round all ranks, and time each link.")
@click.option("--collectives", is_flag=True, help="Time every algorithm, and write the table for runs.")
@click.option(
    "--out",
    type=PATH,
    default=Path("collectives.json"),
    show_default=True,
    help="Where --collectives writes its table.",
)
@click.option(
    "--largest",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Size of the largest array that --collectives takes, in MiB.",
)
def info(ring: bool, collectives: bool, out: Path, largest: int) -> None:
    """Print one block about this installation and machine, for a bug report.

    \b
    Examples:
      pytrain info
      mpiexec -n 4 pytrain info --ring
      mpiexec -n 4 pytrain info --collectives --out collectives.json
    """
    if ring or collectives:
        from pytrain.cli.ranks import describe_ranks

        describe_ranks(ring, out if collectives else None, largest)
        return
    from pytrain.cli.ranks import progress_of_one_rank
    from pytrain.information import report

    click.echo(report({"MPI progress": progress_of_one_rank()}))


@root.command(short_help="See everything work, in two minutes.")
@click.option(
    "--folder",
    type=PATH,
    default=Path("pytrain-demo"),
    show_default=True,
    help="Where corpus, run and sample go.",
)
def demo(folder: Path) -> None:
    """Train a tokenizer and a small model on Python's own library, without a download, and let it write."""
    from pytrain import demo as demonstration

    demonstration.run(folder)


@root.command(
    short_help="Measure this machine: peak, kernels, step and more.",
    context_settings={"allow_interspersed_args": False},
)
@click.argument("name")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, arguments: tuple[str, ...]) -> None:
    """Measure this machine: NAME is peak, matmul, kernels, attention, step, collectives, loader, peers or another
    module of the benchmarks; report makes a page of results, compare sets two side by side.

    \b
    Examples:
      pytrain bench peak
      pytrain bench step --help
      pytrain bench step --model gpt2-14m --batch 16 --peers torch --json step.json
      pytrain bench report step.json --out report.html
    """
    import importlib

    wanted = f"pytrain.bench.{name}"
    main = None
    try:
        main = getattr(importlib.import_module(wanted), "main", None)
    except ModuleNotFoundError as error:
        if error.name not in ("pytrain.bench", wanted):
            raise  # of the benchmark itself
    if main is None:
        raise UserError(f'there is no benchmark "{name}" in this installation; `pytrain bench --help` names them')
    main(list(arguments))


@root.command(short_help="Completion code for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the code that teaches a shell to complete pytrain's commands.

    \b
    Examples:
      pytrain completion bash >> ~/.bashrc
      pytrain completion zsh >> ~/.zshrc
      pytrain completion fish > ~/.config/fish/completions/pytrain.fish
    """
    from click.shell_completion import get_completion_class

    shell_class: Any = get_completion_class(shell)
    click.echo(shell_class(root, {}, "pytrain", "_PYTRAIN_COMPLETE").source())


for command in (corpus.prepare, corpus.tokenizer, model.generate, model.evaluate):
    root.add_command(command)
for command in (model.export, model.import_, model.inspect):
    root.add_command(command)
root.add_command(plan.plan)
