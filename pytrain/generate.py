"""Text from a trained model, a token at a time, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pytrain.errors import UserError
from pytrain.native import native
from pytrain.stage import Stage, native_shape

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.config import ModelConfig
    from pytrain.data.tokenizer import Tokenizer

CHUNK = 128  # tokens of a prompt that go through the model at once


class Generator:
    """Continues token sequences with a model whose weights are in memory already.

    Args:
        device: where the weights are.
        model: shape of the model.
        policy: storage types of weights and activations.
        weights: one buffer per bucket of the whole model.
        capacity: most tokens of prompt and continuation together; with learned positions at most
            model.context.
    """

    def __init__(
        self,
        device: _native.Device,
        model: ModelConfig,
        policy: _native.Policy,
        weights: Sequence[_native.Buffer],
        capacity: int,
    ) -> None:
        self.vocabulary = model.vocabulary
        self._weights = tuple(weights)  # the decoder points at them
        self._decoder: _native.Decoder = native().Decoder(
            device, native_shape(model), policy, capacity=capacity, chunk=min(CHUNK, capacity)
        )
        for index, buffer in enumerate(self._weights):
            self._decoder.bind_weights(index, buffer.address)

    @property
    def capacity(self) -> int:
        """Most tokens of prompt and continuation together."""
        return self._decoder.capacity

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed further tokens; logits (len(tokens), vocabulary) of the token that follows each."""
        rows = []
        for first in range(0, len(tokens), self._decoder.chunk):
            part = np.asarray([tokens[first : first + self._decoder.chunk]], np.int32)
            self._decoder.feed(part)
            self._decoder.forward(0, self._decoder.op_count)
            rows.append(self._decoder.logits().copy())
            self._decoder.finish()
        return np.concatenate(rows)

    def _last_logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """As `logits`, of the last token alone: only its chunk goes through the head."""
        last = (len(tokens) - 1) // self._decoder.chunk * self._decoder.chunk
        for first in range(0, last, self._decoder.chunk):
            self._decoder.feed(np.asarray([tokens[first : first + self._decoder.chunk]], np.int32))
            self._decoder.forward(0, self._decoder.op_count)
            self._decoder.finish()
        row: NDArray[np.float32] = self.logits(tokens[last:])[-1]
        return row

    def forget(self) -> None:
        """Start a new sequence."""
        self._decoder.rewind(0)

    def continue_tokens(
        self,
        prompt: Sequence[int],
        *,
        tokens: int,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1234,
        stop: int | None = None,
        vocabulary: int | None = None,
    ) -> Iterator[int]:
        """Up to `tokens` tokens that follow `prompt`, one at a time, ending after `stop`.

        Args:
            prompt: at least one token.
            tokens: most tokens to come; ends early when the cache is full.
            temperature: 0 takes the likeliest.
            top_k: sample among the likeliest k only; 0 for all.
            top_p: sample among the likeliest that together have this probability.
            seed: the same seed, the same tokens.
            stop: id that ends the continuation (it comes too).
            vocabulary: only ids below; a model may have more rows than its tokenizer has pieces.

        Raises:
            UserError: the prompt is empty, or leaves no room to continue.
        """
        if not prompt:
            raise UserError("the prompt is empty: give at least one token to continue")
        if len(prompt) >= self.capacity:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and the model continues at most {self.capacity - 1}"
            )
        random = np.random.Generator(np.random.Philox(seed))
        room = min(tokens, self.capacity - len(prompt))

        def continuation() -> Iterator[int]:
            self.forget()
            logits = self._last_logits(prompt)
            for left in range(room, 0, -1):
                token = choose(logits[:vocabulary], temperature, top_k, top_p, random)
                yield token
                if token == stop or left == 1:
                    return
                logits = self.logits([token])[0]

        return continuation()  # the prompt was checked when asked, not when the first token is taken


class LoadedModel:
    """The weights of a checkpoint in memory, without optimizer or gradients.

    Args:
        path: a checkpoint, or a run folder (its newest).

    Raises:
        UserError: there is no whole checkpoint, or its bytes are damaged.
    """

    def __init__(self, path: str | Path) -> None:
        import tomllib

        from pytrain.checkpoint import Checkpoint, TensorPiece
        from pytrain.config import build_model

        self.checkpoint = Checkpoint.open(path)
        table = tomllib.loads(self.checkpoint.config_text)
        self.model = build_model(table["model"], str(self.checkpoint.folder / "config.toml"))
        dtype = table.get("precision", {}).get("dtype", "fp32")
        self.device: _native.CpuDevice = native().CpuDevice()
        self.policy: _native.Policy = native().Policy(weights=dtype, activations=dtype)
        shape = native_shape(self.model)
        self.layout: _native.Layout = native().Layout(shape, 0, shape.op_count)
        self.weights: list[_native.Buffer] = [
            native().Buffer(self.device, bucket.elements, dtype, "weights") for bucket in self.layout.buckets
        ]
        self.checkpoint.read_into(
            [
                TensorPiece("", spec.name, dtype, spec.shape, 0, Stage.slice_of(self.weights[spec.bucket], spec))
                for spec in self.layout.tensors
            ],
            convert_dtype=True,
        )

    def generator(self, capacity: int) -> Generator:
        """A generator over these weights for `capacity` tokens, but not for more than model.context."""
        capacity = min(capacity, self.model.context)
        return Generator(self.device, self.model, self.policy, self.weights, capacity)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was copied into the checkpoint."""
        from pytrain.data.tokenizer import load_tokenizer

        for name, path in self.checkpoint.extra_files().items():
            if name in ("tokenizer.model", "tokenizer.json"):
                return load_tokenizer(path)
        raise UserError(f"{self.checkpoint.folder} holds no tokenizer, so it cannot read a prompt")


def choose(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, random: np.random.Generator
) -> int:
    """One token from logits (vocabulary,); the options are those of `Generator.continue_tokens`."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    if top_p < 1.0:
        kept = int(np.searchsorted(np.cumsum(weights), top_p)) + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
    drawn = int(np.searchsorted(np.cumsum(weights), random.random(), side="right"))
    return int(order[min(drawn, len(order) - 1)])  # the sum of the weights may round to less than 1


def generate_text(
    path: str | Path,
    prompt: str,
    *,
    tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1234,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as the model of a run folder or checkpoint writes them.

    Raises:
        UserError: no whole checkpoint there, no tokenizer in it, or a prompt longer than the model's context.
    """
    from pytrain.data.tokenizer import StreamDecoder

    loaded = LoadedModel(path)
    tokenizer = loaded.tokenizer()
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
    continuation = loaded.generator(len(ids) + tokens).continue_tokens(
        ids,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tokenizer.eod_id,
        vocabulary=tokenizer.vocabulary_size,
    )

    def pieces() -> Iterator[str]:
        decoder = StreamDecoder(tokenizer)
        for token in continuation:
            if token != tokenizer.eod_id and (piece := decoder.push(token)):
                yield piece
        if rest := decoder.finish():
            yield rest

    return pieces()
