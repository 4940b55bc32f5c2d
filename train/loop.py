"""Training: draws a batch, predicts every next token, makes a step, and periodically saves, validates and samples.

The same settings give the same losses, bit by bit, whether or not the run was interrupted: every step's batch depends
only on (seed, step), and a checkpoint holds all state. So on the CPU with as many processes; another device or number
of processes rounds sums differently.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pastkey.command import say
from pastkey.contract import names
from pastkey.errors import InputError, LostProcessError, MissingFileError, NumericsError
from pastkey.files.durable import NewFolder, locked, new_folder, remove_leftovers
from pastkey.typed import parse

from .checkpoint import (
    TOKENS_TRAIN,
    TOKENS_VAL,
    Checkpoint,
    TrainingState,
    finish_or_discard,
    layout_of,
    load_checkpoint,
    save_checkpoint,
)
from .data.batches import Batch, Tokens, in_parts
from .data.prepare import LESSON, LESSON_PROMPTS, prepare, require_same_data
from .data.token_files import DataInfo
from .hardware.device import Device, choose_device, flops_per_token
from .hardware.ranks import Ranks
from .loss import next_token_loss, trained_targets
from .model import Decoder, generate
from .optimizer import make_optimizers, moments_of, restore_moments, schedule
from .pretrained import FineTuned, Pretrained, Start, checkpoint_activations, open_start, reopen
from .report import MetricsFile, TrainingProgress, draw_loss_curve
from .resumed import Resumed, read_training
from .settings import TrainConfig
from .tokenizer import TextTokenizer, read_tokenizer

_SAMPLE_TOKENS: Final = 200
# Settings that a resumed run may change.
_MAY_CHANGE: Final = (
    "steps", "minutes", "threads", "save_every", "learning_rate", "device", "precision", "compile", "shard",
    "peak_tflops",
)  # fmt: skip
_PLANNED_EVERY: Final = 10  # steps
_RECENT: Final = 50  # steps whose mean loss shows whether a run diverges
_RISE: Final = 1.0  # nats per token: a rise of that mean is no noise


# --- start and resume ---------------------------------------------------------------------------------------------
def train(config: TrainConfig, out: Path, *, data: Sequence[str | Path] = (), force: bool = False) -> dict[str, Any]:
    """Trains from the beginning into the new folder `out`. Returns the final figures.

    `data` names text files and folders; the default is the preset's built-in corpus. Raises InputError,
    MissingFileError, ExistingFolderError or NumericsError. The first save creates the folder, or replaces the old one.
    Under torchrun each process calls it; those other than the first return nothing.
    """
    ranks = Ranks.join()
    with ranks.ending_together():
        device = choose_device(config, ranks.local_rank)
        if config.init is not None and not data:
            raise InputError(f"--init {config.init} needs --data: the text that the model is to learn from")
        start = None if config.init is None else open_start(config, out)
        config = config if start is None else start.config
        _check_processes(config, ranks, lesson=_is_lesson(config, data))
        with _prepared(ranks, config, out, data, start, force=force) as (place, info):
            tokenizer = _tokenizer(place.path, info)
            model = _new_decoder(config, tokenizer, info) if start is None else start.model
            model.end_at(info.end)
            with ranks.connected(device):
                return Run(place, config, info, tokenizer, model, ranks, device, step=0, moments={}).go()


def _new_decoder(config: TrainConfig, tokenizer: TextTokenizer, info: DataInfo) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Decoder(config.model_config(tokenizer.vocab_size, info.begin, info.end))


def resume(out: Path, given: Mapping[str, Any], *, data: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Continues the run in `out` as if it had never stopped. Returns the final figures.

    `given` holds settings by their TrainConfig names. Raises InputError for one that differs from the run's, except
    those in _MAY_CHANGE, and MissingFileError if there is nothing to resume. The number of processes may differ.
    """
    ranks = Ranks.join()
    with ranks.ending_together():
        if not (out / names.MANIFEST).exists():
            raise MissingFileError(
                f"there is nothing to resume: {out} is not a checkpoint; leave out --resume to begin one"
            )
        with _opened(ranks, out):
            config, resumed, checkpoint = _resumed(out, given, data)
            device = choose_device(config, ranks.local_rank)
            _check_processes(config, ranks, lesson=resumed.info.is_lesson)
            tokenizer, place = _tokenizer(out, resumed.info), NewFolder(out, out)
            with ranks.connected(device):
                return Run(
                    place, config, resumed.info, tokenizer, checkpoint.model, ranks, device,
                    step=resumed.step, moments=resumed.moments,
                ).go()  # fmt: skip


def _resumed(
    out: Path, given: Mapping[str, Any], data: Sequence[str | Path]
) -> tuple[TrainConfig, Resumed, Checkpoint | FineTuned]:
    checkpoint = load_checkpoint(out) if layout_of(out) is None else reopen(out)
    resumed = read_training(checkpoint)
    saved, info = resumed.config, resumed.info
    for name, value in given.items():
        if name not in _MAY_CHANGE and value != getattr(saved, name):
            raise InputError(
                f"the run in {out} was started with {name} {getattr(saved, name)}, not {value}: "
                "leave the setting out, or start a new run"
            )
    if data:
        require_same_data(data, info)
    changes = {"minutes": None} | {name: given[name] for name in _MAY_CHANGE if name in given}  # the plan is in `steps`
    if changes["minutes"] is not None:
        changes["steps"] = resumed.step + saved.steps  # until it is planned
    config = dataclasses.replace(saved, **changes)
    if resumed.step >= config.steps:
        raise InputError(
            f"{out} is trained already, to step {resumed.step} of {config.steps}: give a larger --steps to continue"
        )
    return config, resumed, checkpoint


@contextmanager
def _prepared(
    ranks: Ranks, config: TrainConfig, out: Path, data: Sequence[str | Path], start: Start | None, *, force: bool
) -> Iterator[tuple[NewFolder, DataInfo]]:
    """Yields the new folder with tokenizer and token files, which the first process makes."""
    if not ranks.first:
        told = ranks.told()
        yield NewFolder(out, Path(told["path"])), parse(DataInfo, told["info"], "data")
        return
    with new_folder(out, force=force) as place:
        given = (None, None) if start is None else (start.tokenizer, config.context)
        info, _ = prepare(config, place.path, data, *given)
        ranks.tell({"path": str(place.path.absolute()), "info": info.to_json()})
        yield place, info


@contextmanager
def _opened(ranks: Ranks, out: Path) -> Iterator[None]:
    """Holds the lock of a checkpoint, in the first process, and cleans it up before the others read it."""
    if not ranks.first:
        ranks.told()
        yield
        return
    with locked(out):
        remove_leftovers(out)
        finish_or_discard(out)
        ranks.tell({})
        yield


def _check_processes(config: TrainConfig, ranks: Ranks, *, lesson: bool) -> None:
    if config.shard and config.init is not None:
        raise InputError("--shard divides a new model among processes, and --init has one: leave one of the two out")
    if config.shard and ranks.world == 1:
        raise InputError("--shard divides a model among processes, and this is one: start several with --processes")
    ranks.require_divides(len(LESSON) if lesson else config.batch_size)


def _tokenizer(folder: Path, info: DataInfo) -> TextTokenizer:
    return dataclasses.replace(read_tokenizer(folder / names.TOKENIZER), end=info.end, begin=info.begin)


def _is_lesson(config: TrainConfig, data: Sequence[str | Path]) -> bool:
    return config.preset == "classic" and not data


# --- the run ------------------------------------------------------------------------------------------------------
class Run:
    """One training run, new or resumed, until its last step. Each process of a run has one."""

    def __init__(
        self,
        place: NewFolder,
        config: TrainConfig,
        info: DataInfo,
        tokenizer: TextTokenizer,
        model: Decoder | Pretrained,
        ranks: Ranks,
        device: Device,
        *,
        step: int,
        moments: Mapping[str, Tensor],
    ) -> None:
        self.place, self.config, self.info, self.tokenizer, self.model = place, config, info, tokenizer, model
        self.ranks, self.device = ranks, device
        self.train_tokens, self.val_tokens = self._tokens()
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        self.parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.flops_per_token = flops_per_token(model, model.config if isinstance(model, Decoder) else None)
        self.spread = ranks.spread(model, device, shard=config.shard)
        self.optimizers = make_optimizers(model, config)
        restore_moments(self.optimizers, model, ranks.divided(model, moments), step)
        self.step = self.begun = step
        self.saved = step or None  # the step of the checkpoint in the folder
        self.recent: deque[float] = deque(maxlen=_RECENT)  # losses of the last steps
        self.first = math.inf  # loss of the first step
        self.lowest = math.inf  # the lowest mean of _RECENT losses at a save
        self.figures: dict[str, Any] = {}

    def _tokens(self) -> tuple[Tokens, Tokens]:
        context = self.config.context or self.model.config.max_position_embeddings
        folder = self.place.path
        return Tokens(folder / TOKENS_TRAIN, self.info, context), Tokens(folder / TOKENS_VAL, self.info, context)

    def go(self) -> dict[str, Any]:
        """Runs the remaining steps. Returns the final figures, in the first process."""
        first = self.ranks.first
        try:
            with (
                self.device.computing(self.config.threads),
                torch.random.fork_rng(devices=[]),
                closing(MetricsFile(self.place.path, self.step)) if first else nullcontext() as metrics,
                closing(TrainingProgress(self.step)) if first else nullcontext() as progress,
            ):
                return self._go(metrics, progress)
        except BaseException as error:
            if self.ranks.lost(error):
                raise LostProcessError(f"a process of this run ended or was stopped: {self._kept()}") from None
            if isinstance(error, OSError) and self.saved is not None:  # the disk is full
                say(self._kept())
            raise

    def _go(self, metrics: MetricsFile | None, progress: TrainingProgress | None) -> dict[str, Any]:
        started, tokens = time.monotonic(), 0
        if progress is not None:
            processes = f"{self.ranks.world} processes, each on " if self.ranks.world > 1 else ""
            progress.say(f"training {self.parameters:,} parameters on {processes}{self.device}")
        self._ahead = self._draw()
        while self.step < self.config.steps:
            row = self._one_step()
            tokens += row.pop("tokens")
            seconds = time.monotonic() - started
            speed = tokens / seconds
            self._plan(seconds)
            if metrics is not None and progress is not None:
                metrics.add(row)
                progress.update(self.step, self.config.steps, row["loss"], speed, self._utilization(speed))
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self._require_no_rise()
                self._validate(row["loss"], round(speed))
                self._save(metrics)
                if progress is not None:
                    progress.say(self._summary())
        if not self.ranks.first:
            return {}
        return {
            "checkpoint": str(self.place.target),
            "preset": self.config.preset,
            "step": self.step,
            "parameters": self.parameters,
            "seconds": round(time.monotonic() - started, 1),
        } | self.figures

    def _plan(self, seconds: float) -> None:
        """Sets the steps to those that the configured minutes allow at the speed so far; again, as the speed changes.

        The first process plans for all. Before the first plan, it ends a run whose time is over.
        """
        done = self.step - self.begun
        if self.config.minutes is None or (done > _PLANNED_EVERY and done % _PLANNED_EVERY):
            return
        left = 60 * self.config.minutes - seconds
        planned = self.step + max(0.0, left * done / seconds)
        if done < _PLANNED_EVERY and left > 0:  # the first steps compile, and tell little of the speed
            planned = self.config.steps
        told = self.ranks.total(torch.tensor(planned if self.ranks.first else 0.0, device=self.device.torch_device))
        self.config = dataclasses.replace(self.config, steps=int(told.item()))

    def _one_step(self) -> dict[str, Any]:
        """Runs an optimizer step: clipped gradients of `accumulate` batches, at the step's learning rate."""
        share = schedule(self.config, self.step)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = share * group["peak"]
        torch.manual_seed(hash((self.config.seed, self.step, self.ranks.rank)))  # of dropout, which some models have
        batches, count = self._ahead
        loss = self._backward(batches, count)
        norm = self.ranks.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip))
        self._ahead = self._draw(1)  # while a GPU still computes
        loss_now, norm_now = torch.stack((self.ranks.total(loss), norm)).tolist()
        if not (math.isfinite(loss_now) and math.isfinite(norm_now)):
            raise NumericsError(
                f"training broke at step {self.step + 1}: the loss is {loss_now} and the gradient norm {norm_now}; "
                f"{self._kept(slower=True)}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.recent.append(loss_now)
        self.first = loss_now if self.first == math.inf else self.first
        rate = share * self.config.learning_rate
        return {"step": self.step, "loss": loss_now, "learning_rate": rate, "gradient_norm": norm_now, "tokens": count}

    def _draw(self, after: int = 0) -> tuple[list[Batch], int]:
        """Returns this process's rows of the batches of a step, on the device, and the targets of all processes.

        Every process draws the whole batches, so that all know this number.
        """
        first = (self.step + after) * self.config.accumulate
        drawn = [
            self.train_tokens.draw(self.config.batch_size, self.config.seed, first + part)
            for part in range(self.config.accumulate)
        ]
        mine = [(self.ranks.mine(inputs), self.ranks.mine(targets)) for inputs, targets in drawn]
        if self.device.rows is not None:
            mine = [part for batch in mine for part in in_parts(batch, self.device.rows)]
        count = sum(trained_targets(targets) for _, targets in drawn)
        return [(self.device.put(inputs), self.device.put(targets)) for inputs, targets in mine], count

    def _backward(self, batches: Sequence[Batch], count: int) -> Tensor:
        """Adds up the gradients of the mean loss over the `count` targets of all processes. Returns this one's part."""
        self.model.train()
        total = torch.zeros((), device=self.device.torch_device)
        for number, batch in enumerate(batches, 1):
            with self.ranks.reducing(self.spread, number == len(batches)):
                with self.device.autocast():
                    loss = next_token_loss(self.spread, batch, count)
                (loss * self.ranks.world).backward()  # the processes' gradients are averaged
            total += loss.detach()
        return total

    def _require_no_rise(self) -> None:
        """Raises NumericsError if the loss has risen since the first step or an earlier save, the last good one.

        The first step is one batch, whose loss may be a nat off.
        """
        mean = sum(self.recent) / len(self.recent)
        if mean > min(self.first + _RISE, self.lowest) + _RISE:
            raise NumericsError(
                f"training diverges: the mean loss of the last {len(self.recent)} steps is {mean:.2f} nats at step "
                f"{self.step}, and was {min(self.first, self.lowest):.2f}; {self._kept(slower=True)}"
            )
        if len(self.recent) == _RECENT:  # the mean of a few may be low by chance
            self.lowest = min(self.lowest, mean)

    def _kept(self, *, slower: bool = False) -> str:
        """Returns the message of a run that stops here: its files, and how to continue."""
        rate = f" with a smaller --learning-rate than {self.config.learning_rate}" if slower else ""
        if self.saved is None:
            return f"nothing was saved yet, start again{rate}"
        return f"{self.place.target} keeps step {self.saved}, --resume continues from it{rate}"

    @torch.no_grad()
    def _validate(self, train_loss: float, tokens_per_second: int) -> None:
        """Measures the loss over the whole held-out text, in nats per token and tokenizer-independent bits per byte.

        Every process measures all of it: it is short, and the weights may be divided among all.
        """
        self.model.eval()
        nats, count = 0.0, 0
        with self.device.eager():
            for inputs, targets in self.val_tokens.windows(self.config.batch_size):
                trained = trained_targets(targets)
                batch = self.device.put(inputs), self.device.put(targets)
                with self.device.autocast():
                    nats += next_token_loss(self.model, batch, trained).item() * trained
                count += trained
        self.figures = {
            "train_loss": train_loss,
            "val_loss": nats / count,
            "bits_per_byte": nats / math.log(2) / max(1, self.info.val_bytes),  # special tokens have no text
            "tokens_per_second": tokens_per_second,
        }

    def _save(self, metrics: MetricsFile | None) -> None:
        """Saves the whole model and state, in the first process, whatever the number of processes."""
        weights = self.ranks.gathered(self.model.state_dict()) if isinstance(self.model, Decoder) else None
        moments = self.ranks.gathered(moments_of(self.optimizers, self.model))
        if metrics is None:
            self.saved = self.step
            return
        metrics.add({"step": self.step} | {name: self.figures[name] for name in ("val_loss", "bits_per_byte")})
        metrics.flush()
        settings = dataclasses.asdict(self.config)
        state = TrainingState(self.step, moments, settings, self.info.to_json(), self.figures)
        save_checkpoint(self.place.path, self.model, state, weights=weights)
        if self.place.path != self.place.target:
            # Windows cannot rename a folder with an open file.
            metrics.close()
            del self.train_tokens, self.val_tokens
            self.place.put()
            self.train_tokens, self.val_tokens = self._tokens()
            metrics.open(self.place.path, self.step)
        self.saved = self.step
        draw_loss_curve(self.place.path)

    def _summary(self) -> str:
        figures = (
            f"step {self.step}: held-out loss {self.figures['val_loss']:.3f} nats per token, "
            f"{self.figures['bits_per_byte']:.3f} bits per byte; saved in {self.place.target}"
        )
        return "\n".join([figures, *self.samples()]).replace("\n", "\n    ")

    def samples(self) -> list[str]:
        """Returns samples of the model: for the lesson's prompts, or for an empty prompt.

        None of a model that is divided among processes: each token would need all of them.
        """
        if self.config.shard:
            return []
        self.model.eval()
        if self.info.is_lesson:
            return [f"{prompt} -> {self._continue(self.tokenizer.prompt(prompt))}" for prompt in LESSON_PROMPTS]
        if self.info.masked:
            prompt = self.val_tokens.first_prompt()
            return [f"{self.tokenizer.decode(prompt)} -> {self._continue(prompt)}"]
        return [self._continue(self.tokenizer.prompt(""))]

    def _continue(self, prompt: list[int]) -> str:
        ids = torch.tensor([prompt or [self.info.end]], device=self.device.torch_device)  # (1, P)
        temperature = 0.0 if self.info.is_lesson else 0.7
        with self.device.eager(), self.device.autocast():
            if isinstance(self.model, Pretrained):
                (row,) = self.model.generate(ids, _SAMPLE_TOKENS, temperature=temperature, seed=self.step)
            else:
                (row,) = generate(self.model, ids, _SAMPLE_TOKENS, temperature=temperature, seed=self.step)
        return self.tokenizer.decode(row)

    def _utilization(self, tokens_per_second: float) -> float | None:
        peak = self.device.peak_flops
        return None if peak is None else tokens_per_second * self.flops_per_token / (peak * self.ranks.world)
