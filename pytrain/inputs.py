"""What a run reads before its first step: tokenizer, prompts and corpora, and whether they fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytrain.collectives import Group
from pytrain.data.loader import CorpusSpec, HeldOut, Loader
from pytrain.data.mixture import Phase
from pytrain.data.tokenizer import Tokenizer, load_tokenizer, prompt_ids
from pytrain.errors import UserError
from pytrain.evaluate import open_heldout

if TYPE_CHECKING:
    from pytrain.config import RunConfig

SAMPLE_CAPACITY = 2048


def sample_capacity(config: RunConfig) -> int:
    """Tokens of prompt and continuation together: bounds what the cache of a long context would take."""
    return min(config.model.context, SAMPLE_CAPACITY)


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
        UserError: it cannot be read, has more tokens than the model, or makes a prompt of `sample.prompts` so long
            that it could not be continued at the first sample.
    """
    tokenizer = load_tokenizer(config.tokenizer.path)
    if tokenizer.vocabulary_size > config.model.vocabulary:
        raise UserError(
            f"model.vocabulary ({config.model.vocabulary}) is smaller than the "
            f"{tokenizer.vocabulary_size} tokens of {config.tokenizer.path}; raise it"
        )
    for prompt in config.sample.prompts:
        count = len(prompt_ids(tokenizer, prompt))
        if count >= sample_capacity(config):
            raise UserError(
                f'sample.prompts: "{prompt[:30]}..." has {count} tokens, and at most '
                f"{sample_capacity(config) - 1} can be continued; shorten it"
            )
    return tokenizer


def open_corpora(
    config: RunConfig, tokenizer_sha256: str | None, phases: Sequence[Phase] | None, readers: Group
) -> tuple[Loader, list[HeldOut]]:
    """The corpora to train on and those to evaluate on, opened by all `readers` together.

    Args:
        config: the whole run.
        tokenizer_sha256: that corpora must have been made with; None where it is not known.
        phases: of the mixture; None for the weights of the configuration throughout.
        readers: the ranks that need tokens.

    Raises:
        UserError: one cannot be read, is of another tokenizer or vocabulary, or has less than one sample.
    """
    data = config.data
    loader = Loader(
        [CorpusSpec(corpus.prefix, corpus.weight, corpus.name) for corpus in data.train],
        data.sequence_length,
        config.model.vocabulary,
        config.run.seed,
        data.document_boundaries,
        phases=phases,
        tokenizer_sha256=tokenizer_sha256,
        on_root=readers.on_root,
    )
    return loader, open_heldout(config, tokenizer_sha256, readers)


def describe(config: RunConfig) -> list[str]:
    """Lines on what of a run's data is here, for a dry run.

    A file that is missing is told and no error: the dry run of a large job is often made where the data is not.

    Raises:
        UserError: what training would refuse of the files that are here, in the same words.
    """
    missing, found, sha256 = [], [], None
    if Path(config.tokenizer.path).exists():
        tokenizer = open_tokenizer(config)
        sha256 = tokenizer.sha256
        found.append(f"a tokenizer of {tokenizer.vocabulary_size:,} tokens")
    else:
        missing.append(f"tokenizer {config.tokenizer.path}")
    here = {}
    for key in ("train", "heldout"):
        corpora = getattr(config.data, key)
        lacking = {corpus.prefix: _lacking(corpus.prefix) for corpus in corpora}
        missing += [f"data.{key} {prefix} ({', '.join(ends)})" for prefix, ends in lacking.items() if ends]
        here[key] = tuple(corpus for corpus in corpora if not lacking[corpus.prefix])
    part = config.model_copy(update={"data": config.data.model_copy(update=here)})
    if here["train"]:
        loader, _ = open_corpora(part, sha256, None, Group())
        found.append(f"{sum(loader.corpus_tokens):,} tokens to train on")
    else:
        open_heldout(part, sha256, Group())
    lines = [f"data:        {', '.join(found)}"] if found else []
    if missing:
        lines.append(f"data:        not found here: {', '.join(missing)}; training will need them")
    return lines


def _lacking(prefix: str | Path) -> list[str]:
    """The endings of a corpus's files that are not there."""
    return [ending for ending in (".bin", ".idx") if not Path(f"{prefix}{ending}").exists()]
