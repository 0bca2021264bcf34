"""A run's counters of whole epochs and updates, and which checkpoint is kept when it stops before its end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ddpo_fast.config import DDPOConfig
from ddpo_fast.interruption import Interruption
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.run_folder import checkpoint, notebook
from ddpo_fast.run_folder.epoch_scores import EpochScores
from ddpo_fast.run_folder.resume_checks import refuse_changes
from ddpo_fast.run_folder.run_log import RunLog

logger = logging.getLogger(__name__)

# a file of this name in the run's folder ends training after the epoch
STOP = "stop"


class Progress:
    """Counts a run's epochs and updates, and decides where it resumes and what is kept when it is stopped.

    Args:
        output_dir: the run's folder.
        held_out: whether the best epoch is told by evaluations, see `EpochScores`.
    """

    def __init__(
        self,
        config: DDPOConfig,
        accelerator: Accelerator,
        output_dir: Path,
        run_log: RunLog,
        interruption: Interruption,
        held_out: bool = False,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.run_log = run_log
        self.interruption = interruption
        # whole epochs and updates since the run began, including those before it was resumed
        self.epochs = 0
        self.global_step = 0
        # whether a call of `train` has begun and not come to its end, and the epoch at which the call began
        self.was_interrupted = False
        self._train_from = 0
        # whether the updates of an epoch have begun and not ended: the weights are then not those of any whole epoch
        self.is_updating = False
        # in another folder the rewards, and so the scores, may be others
        self.continues = checkpoint.continues_in(output_dir, config.resume_from)
        self.scores = EpochScores(held_out)
        # the whole epochs when this process began, and the bytes of metrics.jsonl after the last whole epoch
        self._started_at = 0
        self._whole_bytes = 0
        # seconds that the last rolling checkpoint took to write, seconds of the last epoch, and the time of its end
        self._write_s = self._epoch_s = self._whole_at = 0.0

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    @property
    def has_trained(self) -> bool:
        """Whether this process has trained a whole epoch."""
        return self.epochs > self._started_at

    # resuming

    def prepare_resume(
        self, resume: Path | None, state: dict[str, Any], trained: dict[str, Any], settings: dict[str, Any]
    ) -> None:
        """Checks that this run can resume from the checkpoint `resume` (None: from the start), and prepares its folder.

        Args:
            state: the checkpoint's `state.json`.
            trained: what is trained now, as `checkpoint.describe_trained_weights` has it.
            settings: the present `run_settings`.

        Raises `ValueError` if the checkpoint is of another model, or of settings with which this run cannot go on.
        """
        in_place = self.continues
        self.run_log.resume(state, in_place)
        if resume is None:
            logger.warning("%s has no checkpoint yet: the run starts from the beginning", self.config.resume_from)
            return
        checkpoint.check_trained_weights_match(resume, state["trained"], trained)
        refuse_changes(self.config.resume_from, state, settings, in_place)
        if state["epochs"] >= self.config.num_epochs:
            logger.warning(
                "%s has trained for %d epochs, and num_epochs is %d: nothing is left to train; raise num_epochs to "
                "go on",
                self.config.resume_from,
                state["epochs"],
                self.config.num_epochs,
            )
        if in_place and self.accelerator.is_main_process:
            checkpoint.mark_later_superseded(resume)
            checkpoint.discard_last_epoch(self.checkpoints)
        self.config.resume_from = str(resume)

    def process_begins(self) -> None:
        """Notes where this process begins, once a checkpoint has set the counters."""
        self._started_at, self._whole_bytes = self.epochs, self.run_log.metrics.size()

    # one call of `train`

    def epochs_to_train(self, epochs: int) -> range:
        """The epochs that a call of `train` has to train, as their indices.

        Each call trains as many as the first one, as in TRL, or the rest of a call that was stopped.
        """
        if not self.was_interrupted:
            self._train_from = self.epochs
        return range(self.epochs, max(self.epochs, self._train_from + epochs - self._started_at))

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A context for training: signals stop it. If it is stopped or raises, a rolling checkpoint gets its number."""
        with self.interruption:
            try:
                yield
            except BaseException as error:
                self._keep_last_epoch(error)
                raise
            self.was_interrupted = False

    def train_begins(self) -> None:
        """Notes that a call of `train` has begun: if it is stopped from here on, the next call trains the rest."""
        self.was_interrupted, self._whole_at = True, time.monotonic()
        if self.accelerator.is_main_process:
            # one that came after the end of the last call
            (self.output_dir / STOP).unlink(missing_ok=True)

    def epoch_is_whole(self, epochs: int, global_step: int) -> None:
        """Notes that `epochs` epochs have been trained and logged."""
        self.epochs, self.global_step, self.is_updating = epochs, global_step, False
        self._epoch_s, self._whole_at = time.monotonic() - self._whole_at, time.monotonic()
        self._whole_bytes = self.run_log.metrics.size()

    def reason_to_end(self) -> str:
        """Why training ends after this epoch before its time, in words, or ''. The main process decides."""
        reason = ""
        if self.accelerator.is_main_process:
            patience, waited = self.config.early_stopping_patience, self.scores.epochs_without_gain()
            if (self.output_dir / STOP).exists():
                (self.output_dir / STOP).unlink()
                reason = f"as there was a file {self.output_dir / STOP}"
            elif patience and waited >= patience:
                best = self.scores.best()
                reason = f"as the best {self.scores.kind} was that after epoch {best}, {waited} epochs ago"
        return broadcast_from_main(self.accelerator, reason)

    def say_ended(self, reason: str) -> None:
        """Prints that training has ended early, and how to go on."""
        if self.accelerator.is_main_process:
            self._say_how_to_go_on(f"after epoch {self.epochs} {reason}")

    def rewind_epoch(self) -> bool:
        """Drops the stopped epoch's metrics; returns whether its updates had begun and weights must be restored."""
        if self.accelerator.is_main_process:
            self.run_log.metrics.truncate(self._whole_bytes)
        must_go_back, self.is_updating = self.is_updating, False
        return must_go_back

    # the rolling checkpoint after an epoch that `save_freq` leaves out

    @property
    def keeps_last_epoch(self) -> bool:
        """Whether to write a rolling checkpoint: not if the last one took more than 5 s and more than 5 % of an epoch.

        The main process decides for all.
        """
        return not broadcast_from_main(self.accelerator, self._write_s > max(5.0, 0.05 * self._epoch_s))

    @contextmanager
    def timing_write(self) -> Iterator[None]:
        """A context that measures how long the rolling checkpoint in it takes to write."""
        started = time.monotonic()
        yield
        self._write_s = time.monotonic() - started

    def _keep_last_epoch(self, error: BaseException) -> None:
        """Turns a rolling checkpoint into a numbered one and, after an interruption, prints how to resume."""
        if not self.accelerator.is_main_process:
            return
        with self.interruption.suppressed():
            checkpoint.promote_last_epoch(self.checkpoints)
            # an `Exception` has a message about what happened, which the caller shows; Ctrl-C and signals have none
            if not isinstance(error, Exception):
                self._say_how_to_go_on(f"in epoch {self.epochs + 1}")

    def _say_how_to_go_on(self, stopped: str) -> None:
        found = checkpoint.list_in(self.checkpoints)
        there = f"{found[-1]} is there" if found else "there is no checkpoint yet"
        how = f"--resume_from {self.output_dir}"
        if notebook.in_notebook():
            how = f"train() again, or in another kernel with resume_from={str(self.output_dir)!r}"
        print(f"\nstopped {stopped}, {there}: go on with {how}", file=sys.stderr, flush=True)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """A context for the work after training: an interruption in it prints how to resume the run."""
        try:
            with self.interruption:
                yield
        except (KeyboardInterrupt, SystemExit):
            if self.accelerator.is_main_process:
                self._say_how_to_go_on("after the training")
            raise
