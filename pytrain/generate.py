"""Text from a trained model, a token at a time, with a cache of keys and values.

With tensor parallelism each rank holds its slice of the weights and its heads of the cache, and a pass stops at the
cuts of training (`pytrain.slices`): row-parallel products are summed, vocabulary slices of the logits gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pytrain.collectives import Group
from pytrain.errors import UserError
from pytrain.native import native, open_device
from pytrain.slices import LEAVES_PARTIAL
from pytrain.stage import Stage, half_of, native_shape

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.checkpoint import Checkpoint
    from pytrain.config import ModelConfig
    from pytrain.data.tokenizer import Tokenizer

CHUNK = 128  # tokens of a prompt that go through the model at once


class Generator:
    """Continues token sequences with a model whose weights are in memory already.

    Args:
        device: where the weights are.
        model: shape of the model.
        policy: storage types of weights and activations.
        weights: one buffer per bucket of the whole model, or of this rank's slice of it.
        capacity: most tokens of prompt and continuation together; with learned positions at most
            model.context.
        group: ranks that hold a slice each; all of them make the same calls with the same arguments.
    """

    def __init__(
        self,
        device: _native.Device,
        model: ModelConfig,
        policy: _native.Policy,
        weights: Sequence[_native.Buffer],
        capacity: int,
        group: Group | None = None,
    ) -> None:
        self.vocabulary = model.vocabulary
        self.group = group or Group()
        self._half = half_of(policy)
        self._weights = tuple(weights)  # the decoder points at them
        shape = native_shape(model)
        self._decoder: _native.Decoder = native().Decoder(
            device,
            shape,
            policy,
            capacity=capacity,
            chunk=min(CHUNK, capacity),
            tp_rank=self.group.rank,
            tp_size=self.group.size,
        )
        self._cuts = _cuts(shape, self._decoder.op_count) if self.group.size > 1 else []
        ranks = self.group.size
        self._slices = [native().balanced(model.vocabulary, rank, ranks) for rank in range(ranks)]
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
            self._pass(tokens[first : first + self._decoder.chunk])
            rows.append(self._whole(self._decoder.logits()))
            self._decoder.finish()
        return np.concatenate(rows)

    def _last_logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """As `logits`, (vocabulary,) of the last token alone: only its chunk goes through the head."""
        last = (len(tokens) - 1) // self._decoder.chunk * self._decoder.chunk
        for first in range(0, last, self._decoder.chunk):
            self._pass(tokens[first : first + self._decoder.chunk])
            self._decoder.finish()
        self._pass(tokens[last:])
        row: NDArray[np.float32] = self._whole(self._decoder.logits()[-1:])[0]
        self._decoder.finish()
        return row

    def _pass(self, tokens: Sequence[int]) -> None:
        """All ops but the head over one chunk."""
        decoder = self._decoder
        decoder.feed(np.asarray([tokens], np.int32))
        begin = 0
        for end in self._cuts:
            decoder.forward(begin, end)
            self.group.all_reduce(decoder.partial, self._half)
            begin = end
        decoder.forward(begin, decoder.op_count)

    def _whole(self, part: NDArray[np.float32]) -> NDArray[np.float32]:
        """(rows, vocabulary) from this rank's (rows, slice), on all ranks."""
        if self.group.size == 1:
            return part.copy()
        rows = len(part)
        edges = [0, *(rows * end for _, end in self._slices)]
        gathered = np.empty(edges[-1], np.float32)
        gathered[edges[self.group.rank] : edges[self.group.rank + 1]] = part.reshape(-1)
        self.group.all_gather(gathered, edges)
        return np.concatenate([piece.reshape(rows, -1) for piece in np.split(gathered, edges[1:-1])], axis=1)

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
        """Up to `tokens` tokens that follow `prompt`, one at a time, ending after `stop`; the same on all ranks.

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
        check_prompt(prompt, self.capacity)
        random = np.random.Generator(np.random.Philox(seed))
        room = min(tokens, self.capacity - len(prompt))

        def continuation() -> Iterator[int]:
            self.forget()
            logits = self._last_logits(prompt)
            chosen = np.zeros(1, np.int32)
            for left in range(room, 0, -1):
                # Member 0 chooses for all: exp() of another processor might round to another token.
                if self.group.rank == 0:
                    chosen[0] = choose(logits[:vocabulary], temperature, top_k, top_p, random)
                self.group.broadcast_array(chosen)
                token = int(chosen[0])
                yield token
                if token == stop or left == 1:
                    return
                logits = self.logits([token])[0]

        return continuation()  # the prompt was checked when asked, not when the first token is taken


def check_prompt(prompt: Sequence[int], capacity: int) -> None:
    """Refuse a prompt that a cache of `capacity` tokens cannot continue.

    Raises:
        UserError: it is empty, or leaves no room.
    """
    if not prompt:
        raise UserError("the prompt is empty: give at least one token to continue")
    if len(prompt) >= capacity:
        raise UserError(f"the prompt has {len(prompt)} tokens, and the model continues at most {capacity - 1}")


def _cuts(shape: _native.Shape, ops: int) -> list[int]:
    """Where a pass over the first `ops` ops stops for a sum over the tensor-parallel group."""
    return [op + 1 for op in range(ops) if shape.op_name(op).split()[-1] in LEAVES_PARTIAL]


class LoadedModel:
    """The weights of a checkpoint in memory, without optimizer or gradients.

    Args:
        path: a checkpoint, or a run folder (its newest); only member 0 of the group reads its manifest.
        group: ranks that hold a slice of the model each, and read that slice alone.
        device: "cpu" or "hip"; None for that of the run.

    Raises:
        UserError: there is no whole checkpoint, its bytes are damaged, or there is no such device.
    """

    def __init__(self, path: str | Path, group: Group | None = None, device: str | None = None) -> None:
        from pytrain.checkpoint import TensorPiece

        self.group = group or Group()
        self.checkpoint, self.model, dtype, run_device = self.group.on_root(lambda: _described(path, device))
        self._tokenizer: Tokenizer | None = None
        self.device: _native.Device = open_device(run_device, what=_asked_by(device))
        self.group.use_device(self.device)
        self.policy: _native.Policy = native().Policy(weights=dtype, activations=dtype)
        shape = native_shape(self.model)
        self.layout: _native.Layout = native().Layout(shape, 0, shape.op_count, self.group.rank, self.group.size)
        self.weights: list[_native.Buffer] = [
            native().Buffer(self.device, bucket.elements, dtype, "weights") for bucket in self.layout.buckets
        ]
        self.checkpoint.read_into(
            [
                TensorPiece(
                    "",
                    spec.name,
                    dtype,
                    spec.shape,
                    spec.first_element,
                    Stage.slice_of(self.weights[spec.bucket], spec),
                )
                for spec in self.layout.tensors
            ],
            convert_dtype=True,
        )

    def generator(self, capacity: int) -> Generator:
        """A generator over these weights for `capacity` tokens, but not for more than model.context."""
        capacity = min(capacity, self.model.context)
        return Generator(self.device, self.model, self.policy, self.weights, capacity, self.group)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was copied into the checkpoint."""
        from pytrain.data.tokenizer import load_tokenizer

        if self._tokenizer is not None:
            return self._tokenizer
        for name, path in self.checkpoint.extra_files().items():
            if name in ("tokenizer.model", "tokenizer.json"):
                self._tokenizer = load_tokenizer(path)
                return self._tokenizer
        raise UserError(f"{self.checkpoint.folder} holds no tokenizer, so it cannot read a prompt")


def _asked_by(device: str | None) -> str:
    return 'the run\'s run.device is "hip" (--device cpu chooses otherwise)' if device is None else "--device hip"


def _described(path: str | Path, device: str | None) -> tuple[Checkpoint, ModelConfig, str, str]:
    """A checkpoint, its model, the type that it is stored in, and the device asked for, else that of its run."""
    import tomllib

    from pytrain.checkpoint import Checkpoint
    from pytrain.config import build_model
    from pytrain.config.checks import head_fits_hip

    checkpoint = Checkpoint.open(path)
    table = tomllib.loads(checkpoint.config_text)
    model = build_model(table["model"], str(checkpoint.folder / "config.toml"))
    chosen = device or table.get("run", {}).get("device", "cpu")
    refusal = head_fits_hip(chosen, model.head_size)
    if refusal is not None:
        raise UserError(refusal)
    return checkpoint, model, table.get("precision", {}).get("dtype", "fp32"), chosen


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
    group: Group | None = None,
    device: str | None = None,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as the model of a run folder or checkpoint writes them.

    Args:
        path: a checkpoint, or a run folder (its newest).
        prompt: what to continue; that of rank 0 counts.
        tokens, temperature, top_k, top_p, seed: see `Generator.continue_tokens`.
        group: ranks that hold a slice of the model each. All of them call this and take every piece; pieces are
            text on rank 0 and empty on the others.
        device: "cpu" or "hip"; None for that of the run.

    Raises:
        UserError: no whole checkpoint there, no tokenizer in it, or a prompt longer than the model's context.
    """
    from pytrain.data.tokenizer import StreamDecoder, prompt_ids

    loaded = LoadedModel(path, group, device)
    group = loaded.group

    def read() -> tuple[list[int], int, int]:
        tokenizer = loaded.tokenizer()
        ids = prompt_ids(tokenizer, prompt)
        check_prompt(ids, min(len(ids) + tokens, loaded.model.context))
        return ids, tokenizer.eod_id, tokenizer.vocabulary_size

    ids, stop, vocabulary = group.on_root(read)
    continuation = loaded.generator(len(ids) + tokens).continue_tokens(
        ids,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        vocabulary=vocabulary,
    )
    if group.rank:
        return ("" for _ in continuation)

    def pieces() -> Iterator[str]:
        decoder = StreamDecoder(loaded.tokenizer(), ids)
        for token in continuation:
            if token != stop and (piece := decoder.push(token)):
                yield piece
        if rest := decoder.finish():
            yield rest

    return pieces()
