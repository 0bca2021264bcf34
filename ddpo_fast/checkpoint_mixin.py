"""The part of the trainer that writes checkpoints and goes on from them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from ddpo_fast.config import DDPOConfig
from ddpo_fast.guard import Guard
from ddpo_fast.health import check_weights
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.random_state import restore_random_state
from ddpo_fast.report import page
from ddpo_fast.run_folder import checkpoint, notebook, pictures
from ddpo_fast.run_folder.progress import Progress
from ddpo_fast.run_folder.resume_checks import run_settings
from ddpo_fast.run_folder.run_log import RunLog

logger = logging.getLogger(__name__)


class CheckpointMixin:
    """The methods of `DDPOTrainer` that save and restore its state, among them TRL's model hooks.

    `run_folder/checkpoint.py` writes and reads the files.
    """

    accelerator: Accelerator
    base: str
    guard: Guard | None
    config: DDPOConfig
    engine: Any
    interruption: Any
    named: dict[str, str]
    output_dir: Path
    ppo: Any
    progress: Progress
    prompt_fn: Callable[..., Any]
    reward_fn: Callable[..., Any]
    run_log: RunLog
    run_settings: dict[str, Any]
    sd_pipeline: Any
    stat_tracker: Any
    step_values: Any
    trainable_layers: Any
    _can_be_saved = False

    @property
    def first_epoch(self) -> int:
        """The number of whole epochs so far, under TRL's name for it."""
        return self.progress.epochs

    def draw_reports(self) -> None:
        """Draws `rewards.png` and `report.html` in the run's folder, from what it holds; a notebook shows pictures."""
        self.run_log.draw_reward_curve()
        self.write_report()
        if self.accelerator.is_main_process:
            notebook.show_run(self.output_dir)

    def write_report(self) -> None:
        """Writes `report.html` in the run's folder, from what it holds."""
        if self.accelerator.is_main_process:
            pictures.attempt(page.write, [self.output_dir], page.default_path([self.output_dir]))

    def _save(self, epochs: int, name: str = "") -> None:
        """Writes the checkpoint of `epochs` whole epochs into its numbered folder, or into one called `name`."""
        # written again, as more values may have been measured since the last time
        self.run_log.write_config(self.run_settings)
        state = {
            "epochs": epochs,
            "global_step": self.progress.global_step,
            "elapsed_s": self.run_log.elapsed_s(),
            "metrics_bytes": self.run_log.metrics.size(),
            "trained": self._trained_part(),
            "healthy": self.run_log.health.good,
            "first_spreads": self.run_log.health.first_spreads,
            "scores": self.progress.scores.state_dict(),
            **json.loads(json.dumps(self.run_settings, default=str)),
        }
        training = {
            "engine": self.engine.state_dict(),
            "dead_shares": self.ppo.zero_gradient_shares,
            **({} if self.guard is None else {"guard": self.guard.state_dict()}),
            **checkpoint.function_states({**self._reward_statistics(), **self._stateful_functions()}),
        }
        limit = self.config.project_kwargs.get("total_limit") or self.config.num_checkpoint_limit
        with self.interruption.deferred(), self.engine.exact():
            checkpoint.save(
                self.progress.checkpoints,
                self.accelerator,
                state,
                training,
                self.engine.process_state(),
                self._write_weights,
                limit,
                name,
                self._kept_checkpoints,
            )

    def _kept_checkpoints(self, present: list[int]) -> set[int]:
        """Of checkpoints of so many epochs, those that are kept beyond the limit: the best, and every so many."""
        best = self.progress.scores.best(present) if self.config.keep_best_checkpoint else None
        every = self.config.keep_checkpoint_every
        return {epochs for epochs in present if epochs == best or (every and epochs % every == 0)}

    def load_best_checkpoint(self) -> int | None:
        """Goes back to the best of the run's checkpoints; returns its whole epochs, or None if none has a score.

        The best is that with the highest held-out reward, or training reward where there is no evaluation.
        """
        present = [checkpoint.epochs_of(path) for path in checkpoint.list_in(self.progress.checkpoints)]
        best = broadcast_from_main(self.accelerator, self.progress.scores.best(present))
        if best is not None and best != self.first_epoch:
            folder = self.progress.checkpoints / f"{checkpoint.PREFIX}{best}"
            checkpoint.verify(folder)
            self._load(folder, checkpoint.read_state(folder))
        return best

    def _save_between(self, epochs: int, is_last: bool) -> None:
        """Saves after an epoch that `save_freq` leaves out.

        After the last epoch that is a numbered checkpoint, else a rolling one, which the next checkpoint replaces.
        """
        if is_last:
            self._save(epochs)
        elif self.progress.keeps_last_epoch:
            with self.progress.timing_write():
                self._save(epochs, checkpoint.LAST_EPOCH)

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        """Restores weights, optimizer, functions, counters and random states from the checkpoint in `folder`.

        Args:
            state: the content of its `state.json`.
        """
        training = checkpoint.read_training(folder)
        with self.engine.exact(write=True):
            self._load_model_hook([self._trained_model], str(folder))
        self.engine.load_state_dict(training["engine"])
        self.ppo.zero_gradient_shares = training["dead_shares"]
        # a checkpoint of a run without the setting has none: the best is found from here on
        if self.guard is not None and "guard" in training:
            self.guard.load_state_dict(training["guard"])
        checkpoint.load_function_states({**self._reward_statistics(), **self._stateful_functions()}, training)
        self.progress.epochs, self.progress.global_step = state["epochs"], state["global_step"]
        if self.progress.continues:
            self.progress.scores.load_state_dict(state.get("scores", []))
        random_state = checkpoint.read_random_state(folder, self.accelerator.process_index)
        if random_state is None:
            # The checkpoint is of fewer processes and has no random state for this one. A seed that depends on the
            # epoch repeats no draws of earlier epochs. `set_seed` adds the process's index, and NumPy's seeds end at
            # 2^32 - 1.
            fresh = self.config.seed + 1_000_003 * self.first_epoch
            set_seed(fresh % (2**32 - self.accelerator.num_processes), device_specific=True)
        else:
            self.engine.load_process_state(random_state["own"])
            restore_random_state(random_state)

    def _rewind_epoch(self) -> None:
        """Restores the state at the start of the epoch that was stopped, if its updates had begun."""
        if not self.progress.rewind_epoch():
            return
        if not self.engine.can_begin_again:
            # so that another call of `train` raises too
            self.progress.is_updating = True
            raise RuntimeError(
                "an update was stopped in its middle, and this engine cannot begin it again: make a new trainer with "
                f"resume_from={str(self.output_dir)!r}"
            )
        self.engine.zero_gradients()
        last = self.progress.checkpoints / f"{checkpoint.PREFIX}{self.first_epoch}"
        if (last / checkpoint.STATE).exists():
            self._load(last, checkpoint.read_state(last))
        else:
            logger.warning(
                "%s does not exist: epoch %d is trained again from the weights of its interrupted updates",
                last,
                self.first_epoch + 1,
            )

    def _check_that_it_can_be_saved(self) -> None:
        """Saves on trial before the first update, so that a run that cannot be saved fails before it has trained."""
        if self._can_be_saved:
            return
        states = checkpoint.function_states(self._stateful_functions())
        with self.engine.exact():
            if self.accelerator.is_main_process:
                checkpoint.trial_save(self.progress.checkpoints, states, self._write_weights)
        self._can_be_saved = True

    def _write_weights(self, folder: Path) -> None:
        trained = {name: p.detach() for name, p in self._trained_model.named_parameters() if p.requires_grad}
        check_weights(trained, self.first_epoch)
        self._save_model_hook([self._trained_model], [], str(folder))

    def _save_model_hook(self, models: list, weights: list, output_dir: str) -> None:
        self.sd_pipeline.save_checkpoint(models, weights, output_dir)

    def _load_model_hook(self, models: list, input_dir: str) -> None:
        self.sd_pipeline.load_checkpoint(models, input_dir)

    @property
    def _trained_model(self) -> Any:
        return self.sd_pipeline.unet if isinstance(self.trainable_layers, list) else self.trainable_layers

    def _trained_part(self) -> dict[str, Any]:
        return checkpoint.describe_trained_weights(self._trained_model.named_parameters())

    def _reward_statistics(self) -> dict[str, Any]:
        """What the trainer remembers of rewards to compare further ones with."""
        values = {"step_values": self.step_values} if self.config.train_image_credit == "value" else {}
        return {"stat_tracker": self.stat_tracker, **values}

    def _stateful_functions(self) -> dict[str, Any]:
        functions = {"reward_function": self.reward_fn, "prompt_function": self.prompt_fn}
        return {name: f for name, f in functions.items() if hasattr(f, "state_dict") and hasattr(f, "load_state_dict")}

    def _run_settings(self) -> dict[str, Any]:
        return {**run_settings(self.config, self.accelerator, self.sd_pipeline, self.base), **self.named}

    def finishing(self) -> AbstractContextManager[None]:
        """A context for the work after training: an interruption in it prints how to resume the run."""
        return self.progress.finishing()
