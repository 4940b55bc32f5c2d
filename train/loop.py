"""Training: draws a batch, predicts every next token, takes a step, and periodically saves, validates and samples.

The same settings give the same losses, bit by bit, whether or not the run was interrupted: every step's batch depends
only on (seed, step), and a checkpoint holds all state.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pastkey.contract import names
from pastkey.errors import InputError, MissingFileError, NumericsError
from pastkey.files.durable import NewFolder, locked, new_folder, remove_leftovers

from .checkpoint import (
    TOKENS_TRAIN,
    TOKENS_VAL,
    TrainingState,
    finish_or_discard,
    load_checkpoint,
    save_checkpoint,
)
from .data.batches import NOT_TRAINED, Batch, Tokens
from .data.prepare import LESSON_PROMPTS, prepare, require_same_data
from .data.token_files import DataInfo
from .model import Decoder, generate, positions_like
from .optimizer import learning_rate, make_optimizer, moments_of, restore_moments
from .report import Metrics, Progress, draw_loss_curve
from .resumed import read_training
from .settings import TrainConfig
from .tokenizer import TextTokenizer, read_tokenizer

_SAMPLE_TOKENS: Final = 200
_MAY_CHANGE: Final = ("steps", "threads", "save_every")  # settings that a resumed run may change


# --- start and resume ---------------------------------------------------------------------------------------------
def train(config: TrainConfig, out: Path, *, data: Sequence[str | Path] = (), force: bool = False) -> dict[str, Any]:
    """Trains from the beginning into the new folder `out`. Returns the final figures.

    `data` names text files and folders; the default is the preset's built-in corpus. Raises InputError,
    MissingFileError, ExistingFolderError or NumericsError. The first save creates the folder, or replaces the old one.
    """
    with new_folder(out, force=force) as place:
        info, tokenizer = prepare(config, place.path, data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = Decoder(config.model_config(tokenizer.vocab_size, info.begin, info.end))
        return Run(place, config, info, tokenizer, model, step=0, moments={}).go()


def resume(out: Path, given: Mapping[str, Any], *, data: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Continues the run in `out` as if it had never stopped. Returns the final figures.

    `given` holds settings by their TrainConfig names. Raises InputError for one that differs from the run's, except
    those in _MAY_CHANGE, and MissingFileError if there is nothing to resume.
    """
    if not (out / names.MANIFEST).exists():
        raise MissingFileError(
            f"there is nothing to resume: {out} is not a checkpoint; leave out --resume to begin one"
        )
    with locked(out):
        remove_leftovers(out)
        finish_or_discard(out)
        return _resumed(out, given, data).go()


def _resumed(out: Path, given: Mapping[str, Any], data: Sequence[str | Path]) -> Run:
    checkpoint = load_checkpoint(out)
    resumed = read_training(checkpoint)
    saved, info, step = resumed.config, resumed.info, resumed.step
    for name, value in given.items():
        if name not in _MAY_CHANGE and value != getattr(saved, name):
            raise InputError(
                f"the run in {out} was started with {name} {getattr(saved, name)}, not {value}: "
                "leave the setting out, or start a new run"
            )
    if data:
        require_same_data(data, info)
    config = dataclasses.replace(saved, **{name: given[name] for name in _MAY_CHANGE if name in given})
    if step >= config.steps:
        raise InputError(f"{out} is trained already, to step {step} of {config.steps}: give a larger --steps to go on")
    tokenizer = dataclasses.replace(read_tokenizer(checkpoint.tokenizer_path), end=info.end, begin=info.begin)
    place = NewFolder(out, out)
    return Run(place, config, info, tokenizer, checkpoint.model, step=step, moments=resumed.moments)


# --- the run ------------------------------------------------------------------------------------------------------
class Run:
    """One training run, new or resumed, until its last step."""

    def __init__(
        self,
        place: NewFolder,
        config: TrainConfig,
        info: DataInfo,
        tokenizer: TextTokenizer,
        model: Decoder,
        *,
        step: int,
        moments: Mapping[str, Tensor],
    ) -> None:
        self.place, self.config, self.info, self.tokenizer, self.model = place, config, info, tokenizer, model
        self.train_tokens, self.val_tokens = self._tokens()
        self.optimizer = make_optimizer(model, config)
        restore_moments(self.optimizer, model, moments, step)
        self.step = step
        self.figures: dict[str, Any] = {}

    def _tokens(self) -> tuple[Tokens, Tokens]:
        context = self.model.config.max_position_embeddings
        folder = self.place.path
        return Tokens(folder / TOKENS_TRAIN, self.info, context), Tokens(folder / TOKENS_VAL, self.info, context)

    def go(self) -> dict[str, Any]:
        """Takes the remaining steps. Returns the final figures."""
        with (
            _deterministic(self.config.threads),
            Metrics(self.place.path, self.step) as metrics,
            Progress(self.step, self.config.steps) as progress,
        ):
            started, tokens = time.monotonic(), 0
            while self.step < self.config.steps:
                row = self._one_step()
                tokens += row.pop("tokens")
                speed = tokens / (time.monotonic() - started)
                metrics.add(row)
                progress.update(self.step, row["loss"], speed)
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self._validate(row["loss"], round(speed))
                    self._save(metrics)
                    progress.say(self._summary())
        return {
            "checkpoint": str(self.place.target),
            "preset": self.config.preset,
            "step": self.step,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "seconds": round(time.monotonic() - started, 1),
        } | self.figures

    def _one_step(self) -> dict[str, Any]:
        """Takes an optimizer step: clipped gradients of `accumulate` batches, AdamW at the step's learning rate."""
        config = self.config
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss_sum, tokens = 0.0, 0
        for part in range(config.accumulate):
            inputs, targets = self.train_tokens.draw(
                config.batch_size, config.seed, self.step * config.accumulate + part
            )
            loss = next_token_loss(self.model, (inputs, targets))
            (loss / config.accumulate).backward()
            loss_sum += loss.item() / config.accumulate
            tokens += targets.numel()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip).item()
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            raise NumericsError(
                f"training broke at step {self.step + 1}: the loss is {loss_sum} and the gradient norm {norm}; "
                f"take a smaller --learning-rate than {config.learning_rate}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, "loss": loss_sum, "learning_rate": rate, "gradient_norm": norm, "tokens": tokens}

    @torch.no_grad()
    def _validate(self, train_loss: float, tokens_per_second: int) -> None:
        """Measures the loss over the whole held-out text, in nats per token and tokenizer-independent bits per byte."""
        self.model.eval()
        nats, count = 0.0, 0
        for inputs, targets in self.val_tokens.windows(self.config.batch_size):
            trained = int((targets != NOT_TRAINED).sum())
            nats += next_token_loss(self.model, (inputs, targets)).item() * trained
            count += trained
        self.figures = {
            "train_loss": train_loss,
            "val_loss": nats / count,
            "bits_per_byte": nats / math.log(2) / self.info.val_bytes,
            "tokens_per_second": tokens_per_second,
        }

    def _save(self, metrics: Metrics) -> None:
        metrics.add({"step": self.step} | {name: self.figures[name] for name in ("val_loss", "bits_per_byte")})
        metrics.flush()
        moments = moments_of(self.optimizer, self.model)
        save_checkpoint(self.place.path, self.model, _state(self.step, moments, self.config, self.info, self.figures))
        if self.place.path != self.place.target:
            # Windows cannot rename a folder with an open file.
            metrics.close()
            del self.train_tokens, self.val_tokens
            self.place.put()
            self.train_tokens, self.val_tokens = self._tokens()
            metrics.open(self.place.path, self.step)
        draw_loss_curve(self.place.path)

    def _summary(self) -> str:
        figures = (
            f"step {self.step}: held-out loss {self.figures['val_loss']:.3f} nats per token, "
            f"{self.figures['bits_per_byte']:.3f} bits per byte; saved in {self.place.target}"
        )
        return "\n".join([figures, *self.samples()]).replace("\n", "\n    ")

    def samples(self) -> list[str]:
        """Returns samples of the model: for the lesson's prompts, for one that is held out, or for an empty prompt."""
        self.model.eval()
        if self.info.is_lesson:
            return [f"{prompt} -> {self._continue(self.tokenizer.prompt(prompt))}" for prompt in LESSON_PROMPTS]
        if self.info.masked:
            prompt = self.val_tokens.first_prompt()
            return [f"{self.tokenizer.decode(prompt)} -> {self._continue(prompt)}"]
        return [self._continue(self.tokenizer.prompt(""))]

    def _continue(self, prompt: list[int]) -> str:
        ids = torch.tensor([prompt or [self.info.end]])  # (1, P)
        temperature = 0.0 if self.info.is_lesson else 0.7
        text = generate(self.model, ids, _SAMPLE_TOKENS, temperature=temperature, seed=self.step)[0]
        return self.tokenizer.decode(text)


# --- parts of a run -----------------------------------------------------------------------------------------------
def next_token_loss(model: Decoder, batch: Batch) -> Tensor:
    """Returns the mean cross-entropy, in nats, of the next token at every position whose target is trained."""
    inputs, targets = batch
    logits = model(inputs, positions_like(inputs))  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_TRAINED)


def _state(
    step: int, moments: Mapping[str, Tensor], config: TrainConfig, info: DataInfo, figures: Mapping[str, Any]
) -> TrainingState:
    return TrainingState(step, moments, dataclasses.asdict(config), info.to_json(), figures)


@contextmanager
def _deterministic(threads: int | None) -> Iterator[None]:
    """Sets deterministic algorithms and the requested threads; restores both afterwards."""
    before, threads_before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads_before)
