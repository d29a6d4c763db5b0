"""Training from a configuration: builds everything top to bottom, then runs the loop."""

import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pytrain import checkpoint, learning_rate, resuming
from pytrain.collectives import Group
from pytrain.data.loader import Batch, HeldOut, Loader
from pytrain.data.tokenizer import StreamDecoder, prompt_ids
from pytrain.engine import StepResult
from pytrain.evaluate import HeldOutNote, evaluate
from pytrain.feeding import open_data, replica_batches
from pytrain.flops import hardware_flops, model_flops
from pytrain.generate import Generator
from pytrain.inputs import open_corpora, open_tokenizer, sample_capacity
from pytrain.loss_scale import LossScale
from pytrain.metrics import Evaluation, MetricsWriter, Sample, StepMetrics, Throughput, Traffic, resident_gigabytes
from pytrain.progress import NoProgress, Progress, make_progress
from pytrain.rank import RankModel
from pytrain.record import run_record, write_record
from pytrain.saving import Saver
from pytrain.stopping import stop_request

if TYPE_CHECKING:
    from pytrain.config import RunConfig

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """How training ended."""

    step: int
    stopped: str | None
    """The signal that ended it early, after a checkpoint."""
    last: StepMetrics | None
    """Of the last step; None if there was none to do."""


class Trainer:
    """A run: data, model, optimizer, and where they are in it.

    Args:
        config: the whole run.
        resume: "none" starts anew and refuses a folder that has checkpoints; "auto" goes on from the newest
            whole one if there is one; anything else is the path of a checkpoint.
        progress: who is told; by default a line on standard error, from rank 0.
        world: the ranks that train together; by default this process alone.
        operations: the file system that checkpoints are written to, for tests that break it.

    Raises:
        UserError: data, tokenizer, checkpoint or folder do not fit, before anything is trained.
    """

    def __init__(
        self,
        config: "RunConfig",
        resume: str = "none",
        progress: Progress | None = None,
        world: Group | None = None,
        operations: checkpoint.FileOperations | None = None,
    ) -> None:
        self.config = config
        self.folder = Path(config.run.folder)
        self.model = RankModel(config, world or Group())
        self.world = self.model.groups.world
        self.device, self.groups, self.engine = self.model.device, self.model.groups, self.model.engine
        self.optimizer, self.stage = self.model.optimizer, min(self.model.stages.items())[1]
        self._lock: checkpoint.FolderLock | None = None
        self.world.on_root(self._take_folder)
        resumed = resuming.find_checkpoint(self.folder, resume, self.world)
        self.phases = resuming.mixture_phases(resumed, config.data)
        self.tokenizer_sha256 = self.world.on_root(self._load_tokenizer)
        self.loader: Loader | None = None
        self.heldout: list[HeldOut] | None = None
        readers = self.groups.readers
        if opened := open_data(
            self.groups, lambda: open_corpora(config, self.tokenizer_sha256, self.phases, readers)
        ):
            self.loader, self.heldout = opened
        self.heldout_notes = self.world.broadcast([HeldOutNote.of(corpus) for corpus in self.heldout or ()])
        self.loss_scale = LossScale(config.precision.loss_scale, config.precision.dtype == "fp16")
        self.step_number = self.samples = self.tokens = 0
        self.record = self.world.broadcast(self._make_record())
        self.last_result: StepResult | None = None
        self._generator: Generator | None = None
        self._carried: dict[str, Any] = {}
        notes = []
        if self._lock is not None and not self._lock.works:
            notes.append(f"note: the file system of {self.folder} has no locks: nothing keeps a second job out of it")
        if resumed is None:
            self.optimizer.initialise(config.run.seed)
        else:
            notes += self._restore(resumed)
        self.world.on_root(lambda: write_record(self.folder, config, self.record))
        self.metrics = MetricsWriter(self.folder / METRICS, self.step_number) if self.is_root else None
        self._throughput = _throughput(config, self.world.size)
        self.saver = Saver(config, self.optimizer, self.world, self.device, self._note, operations)
        # Last, since a display that has taken over a terminal has to be closed, whatever happens after this.
        self.progress = progress or self._make_progress()
        for note in notes:
            self.progress.note(note)

    def _note(self, text: str) -> None:
        self.progress.note(text)

    @property
    def is_root(self) -> bool:
        """Whether this rank writes metrics, records and progress for all."""
        return self.world.rank == 0

    def _make_progress(self) -> Progress:
        if not self.is_root:
            return NoProgress()
        return make_progress(self.config.run.steps, sys.stderr, self.config.run.log_every)

    def _take_folder(self) -> None:
        """On the root alone: see that the folder can be written to, and that no other job does."""
        checkpoint.check_writable(self.folder)
        self._lock = checkpoint.FolderLock(self.folder)

    def _load_tokenizer(self) -> str:
        """On the root alone: the others need the hash and nothing else."""
        self.tokenizer = open_tokenizer(self.config)
        return self.tokenizer.sha256

    def _make_record(self) -> dict[str, Any]:
        ranks = self.world.gather((platform.node(), self.world.progress))
        if self.loader is None or not self.is_root:
            return {}
        return run_record(
            self.config, self.groups.grid, ranks, self.tokenizer_sha256, self.loader, self.heldout or []
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.saver.abandon()
        else:
            self.optimizer.settle()  # other ranks may still wait for what this one sends
        self.close()

    def close(self) -> None:
        """Finish the save under way, end the progress display and close the metrics file."""
        try:
            self.saver.finish()
        finally:
            self.progress.close()
            if self.metrics is not None:
                self.metrics.close()
            if self._lock is not None:
                self._lock.close()

    def run(self) -> TrainResult:
        """Train to the configured number of steps, or until a signal asks to stop; save at the end."""
        last = stopped = None
        with stop_request() as stop:
            while stopped is None and self.step_number < self.config.run.steps:
                last = self.advance()
                stopped = self._agreed(stop.name)  # read once: a signal from here on is for the next step
                if stopped or self.step_number == self.config.run.steps:
                    self.save()
                elif _is_due(self.step_number, self.config.checkpoint.every):
                    self.save(wait=False)
        if stopped:
            self.progress.note(f"stopped by {stopped} after step {self.step_number}; go on with --resume auto")
        return TrainResult(self.step_number, stopped, last)

    def _agreed(self, signal: str | None) -> str | None:
        """The signal that some rank got: all ranks stop after the same step.

        Also finishes the save under way, once all ranks have written their parts.
        """
        numbers = np.array([0.0 if signal is None else float(Signals[signal]), float(self.saver.status)])
        self.world.all_reduce(numbers, operation="max")
        self.saver.agreed(int(numbers[1]))
        return Signals(int(numbers[0])).name if numbers[0] else None

    def advance(self) -> StepMetrics:
        """One step, told to the metrics file and the progress display."""
        done = self.step()
        if self.metrics is not None:
            self.metrics.write(done)
        self.progress.step(done)
        return done

    def step(self) -> StepMetrics:
        """One optimizer step, with the evaluation and samples that are due after it."""
        config = self.config
        started = time.perf_counter()
        self.world.phase = f"step {self.step_number + 1}"  # for the watchdog
        rate = learning_rate.of_run(config, self.step_number + 1)
        batches = self._batches()
        scale = self.loss_scale.value
        for group in self._shared_groups.values():
            group.counters.reset()
        result = self.engine.run(self.model.training_program, batches, learning_rate=rate, loss_scale=scale)
        assert result.update is not None
        self.world.check_sequence()
        self.last_result = result
        traffic = {name: _traffic(group) for name, group in self._shared_groups.items()}
        if not result.update.finite:
            self.progress.note(
                f"step {self.step_number + 1}: {self._first_not_finite()}; the weights stay as they are"
            )
        self.loss_scale.after(result.update.finite)
        consumed = self.groups.grid.dp * sum(batch.tokens.size for batch in batches)
        self.step_number += 1
        self.samples += config.batch.global_batch
        self.tokens += consumed
        seconds = time.perf_counter() - started
        rates = self._throughput.rates(consumed, seconds)
        return StepMetrics(
            step=self.step_number,
            tokens=self.tokens,
            samples=self.samples,
            global_batch=config.batch.global_batch,
            loss=result.loss,
            lr=rate,
            grad_norm=result.update.gradient_norm,
            loss_scale=scale,
            skipped=not result.update.finite,
            step_s=seconds,
            tok_s=rates["tok_s"] or 0.0,
            tflops=rates["tflops"] or 0.0,
            mfu=rates["mfu"],
            hfu=rates["hfu"],
            mem_gb=resident_gigabytes(),
            heldout=self._due_evaluation(),
            prompts=self._due_samples(),
            groups=traffic,
            saved=self.saver.take_saved(),
        )

    @property
    def _shared_groups(self) -> dict[str, Group]:
        groups = self.groups
        named = {"world": groups.world, "tp": groups.tp, "pp": groups.pp, "dp": groups.dp}
        return {name: group for name, group in named.items() if group.size > 1}

    def _batches(self) -> list[Batch]:
        config = self.config
        source = None if self.loader is None else self.loader.batch
        return replica_batches(
            source,
            self.groups,
            self.samples,
            config.micro_batches,
            config.batch.micro_batch,
            config.data.sequence_length,
        )

    def _first_not_finite(self) -> str:
        """Which gradient of this rank, in the order of the table, is the first that is not finite."""
        for state in self.optimizer.states:
            for run in state.runs:
                squares = np.zeros(1)
                self.device.sum_squares(squares, state.gradient_of(run), state.stage.half)
                if not np.isfinite(squares[0]):
                    return f"the gradient of {run.spec.name} is not finite ({self.groups.grid.label})"
        return f"a gradient of another rank than {self.groups.grid.label} is not finite"

    # --- held-out text and samples -----------------------------------------------------------------

    def _due_evaluation(self) -> dict[str, Evaluation]:
        every = self.config.evaluation.every
        if not every or not (_is_due(self.step_number, every) or self.step_number == self.config.run.steps):
            return {}
        return self.evaluate()

    def evaluate(self) -> dict[str, Evaluation]:
        """Every held-out corpus, by name, with the weights as they are."""
        results = {}
        for index, note in enumerate(self.heldout_notes):
            corpus = None if self.heldout is None else self.heldout[index]
            found = evaluate(self.model, note, corpus, self.config.evaluation.batches)
            self.progress.note(f"step {self.step_number}: held-out {note.name}: {found.sentence}")
            results[note.name] = found
        return results

    def _due_samples(self) -> tuple[Sample, ...]:
        if not _is_due(self.step_number, self.config.sample.every) or self.groups.grid.dp_rank:
            return ()
        self.world.phase = f"sampling after step {self.step_number}"
        settings = self.config.sample
        samples = tuple(self.sample(prompt, settings.tokens, settings.temperature) for prompt in settings.prompts)
        for sample in samples:
            self.progress.note(f"step {self.step_number}: {sample.prompt}{sample.text}")
        return samples

    def sample(self, prompt: str, tokens: int = 64, temperature: float = 0.8) -> Sample:
        """What the model writes after `prompt`, with the weights as they are; no text on other ranks than the root.

        All ranks of the first replica call it together.
        """
        model = self.config.model
        self.optimizer.settle()
        if self._generator is None:
            self._generator = Generator(
                self.device,
                model,
                self.stage.policy,
                self.stage.weights,
                sample_capacity(self.config),
                self.groups.tp,
            )
        ids, stop, vocabulary = self.groups.tp.broadcast(self._encoded(prompt) if self.is_root else ([], 0, 0))
        written = list(
            self._generator.continue_tokens(
                ids,
                tokens=tokens,
                temperature=temperature,
                seed=self.config.run.seed,
                stop=stop,
                vocabulary=vocabulary,
            )
        )
        if not self.is_root:
            return Sample(prompt, "")
        decoder = StreamDecoder(self.tokenizer, ids)
        pieces = [decoder.push(token) for token in written if token != stop]
        return Sample(prompt, "".join(pieces) + decoder.finish())

    def _encoded(self, prompt: str) -> tuple[list[int], int, int]:
        """A prompt's tokens, the one that ends a document, and how many there are."""
        tokenizer = self.tokenizer
        return prompt_ids(tokenizer, prompt), tokenizer.eod_id, tokenizer.vocabulary_size

    # --- checkpoints ---------------------------------------------------------------------------------

    def save(self, wait: bool = True) -> Path:
        """Write a checkpoint of this moment, and delete those that need not be kept. All ranks call it together.

        Args:
            wait: return when it is whole. Else what is saved may change when this returns, and the checkpoint is
                made whole by `run`, by the next `save`, or by leaving the `with` block.

        Returns:
            Its folder.

        Raises:
            UserError: on all ranks, where one could not write; also where the save before this one failed.
        """
        self.optimizer.settle()
        state: dict[str, Any] = {
            "samples": self.samples,
            "tokens": self.tokens,
            "updates": self.optimizer.updates,
            "loss_scale": self.loss_scale.value,
            "loss_scale_good_steps": self.loss_scale.good_steps,
            "sequence_length": self.config.data.sequence_length,
            "seed": self.config.run.seed,
            "tokenizer_sha256": self.tokenizer_sha256,
            "phases": resuming.stored_phases(self.phases),
            "record": self.record,
            **self._carried,
        }
        save = self.saver.save if wait else self.saver.start
        return save(self.step_number, state)

    def _restore(self, found: checkpoint.Checkpoint) -> list[str]:
        """Weights, optimizer and position from a checkpoint; gives back what is to be told about it."""
        self.world.on_root(lambda: resuming.check_same_run(found, self.config, self.tokenizer_sha256))
        resuming.load_tensors(found, self.model)
        state = found.state
        self.step_number = found.step
        self.samples = int(state.get("samples", 0))
        self.tokens = int(state.get("tokens", 0))
        self.loss_scale.value = float(state.get("loss_scale", self.loss_scale.value))
        self.loss_scale.good_steps = int(state.get("loss_scale_good_steps", 0))
        self._carried = {key: state[key] for key in resuming.CARRIED if key in state}
        return [
            f"resumed from {found.folder} after step {found.step}, {self.samples} samples consumed",
            *(resuming.notes(found, self.config, self.record, self.phases) if self.is_root else ()),
        ]


def train(
    config: "RunConfig", resume: str = "none", progress: Progress | None = None, world: Group | None = None
) -> TrainResult:
    """Train as configured; see `Trainer`."""
    with Trainer(config, resume, progress, world) as trainer:
        return trainer.run()


def _traffic(group: Group) -> Traffic:
    counters = group.counters
    return Traffic(counters.waited_seconds, counters.hidden_seconds, sum(counters.bytes_sent.values()))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _throughput(config: "RunConfig", ranks: int) -> Throughput:
    length = config.data.sequence_length
    peak = config.run.peak_tflops
    return Throughput(
        model_flops(config.model, length),
        hardware_flops(config.model, length, config.recompute.of_stage(0)),
        None if peak is None else ranks * peak * 1e12,
        ranks,
    )
