"""The part of the trainer that goes on: from a checkpoint, after an interrupt, and what it refuses to go on from."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from ddpo_fast import health
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.run_folder import checkpoint
from ddpo_fast.worker_threads import WorkerThreads

logger = logging.getLogger(__name__)

# a run goes on only with the same of these
FIXED = ("pretrained_model", "pretrained_revision", "lora_rank", "lora_alpha", "lora_target_modules", "prediction_type")
# with others of these a reward is not comparable with the earlier ones: that is a new run, which may start from an old
CURVE = (
    "reward prompts sample_num_steps sample_guidance_scale sample_eta negative_prompts per_prompt_stat_tracking"
).split()


def refuse_changes(resume_from: str, saved: dict[str, Any], present: dict[str, Any], in_place: bool) -> None:
    """Compares settings by name, nested `config` or not; names that either lacks are the same.

    Raises `ValueError` naming the first one with which the run `saved` cannot be gone on with, or not `in_place`.
    """
    was, now = ({**settings.get("config", {}), **settings} for settings in (saved, present))
    same_base = "" != was.get("base", "") == now.get("base")
    for name in (*FIXED, *(CURVE if in_place else ())):
        if name not in was or name not in now or _comparable(was[name]) == _comparable(now[name]):
            continue
        if name.startswith("pretrained") and (same_base or not _is_known(was[name])):
            continue
        remedy = f"leave {name} as it was"
        if name in CURVE:
            remedy += ", or begin a new run from there with another output_dir"
        raise ValueError(f"{name} is {now[name]!r}, but the run {resume_from!r} has {was[name]!r}: {remedy}")
    if was.get("base") and now.get("base") and not same_base:
        raise ValueError(
            f"pretrained_model {now.get('pretrained_model')!r} has other weights than the one that the run "
            f"{resume_from!r} started from: give that one"
        )


def _comparable(value: Any) -> Any:
    if isinstance(value, str) and Path(value).is_absolute():
        return str(Path(value).resolve())
    return sorted(value) if isinstance(value, (list, tuple, set)) else value or ""


def _is_known(model: str) -> bool:
    """Whether a recorded name says which model it was: a relative path does not."""
    return not model.startswith(".") and (Path(model).is_absolute() or not Path(model).exists())


def base_digest(pipeline: Any) -> str:
    """A digest of a few frozen weights of each tensor, which tells one base model from another; '' if not fp32."""
    found = hashlib.sha256()
    for part in ("text_encoder", "vae", "unet"):
        module = getattr(pipeline, part, None)
        if not isinstance(module, torch.nn.Module):
            return ""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                continue
            if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
                return ""
            found.update(name.replace(".base_layer", "").encode())
            found.update(parameter.detach().flatten()[:64].contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def described(pipeline: Any) -> dict[str, Any]:
    """What a run records of its pipeline; a folder by its whole path, to be found from anywhere."""
    found: dict[str, Any] = {}
    for name in ("pretrained_model", "pretrained_revision", "use_lora"):
        if hasattr(pipeline, name):
            found[name] = getattr(pipeline, name)
    model = found.get("pretrained_model")
    if model and Path(model).expanduser().exists():
        found["pretrained_model"] = str(Path(model).expanduser().absolute())
    prediction = getattr(getattr(getattr(pipeline, "scheduler", None), "config", None), "prediction_type", None)
    return found | ({"prediction_type": prediction} if prediction else {})


class Resumption:
    """Checkpoints read and kept; a mixin of `DDPOTrainer`, whose parts it uses."""

    accelerator: Any
    config: Any
    engine: Any
    executor: Any
    output_dir: Path
    prompt_fn: Any
    reward_fn: Any
    run_log: Any
    run_settings: dict[str, Any]
    sd_pipeline: Any
    stat_tracker: Any
    trainable_layers: Any
    interruption: Any

    first_epoch = 0
    _global_step = 0
    _dead_shares: list[float]
    # of the call of `train` that did not come to its end: where it began, and that it is to be gone on with
    _train_from = 0
    _is_broken = False
    _is_updating = False
    _is_proved = False
    _whole_bytes = 0
    _started_at = 0
    # seconds: how long the last of them took to write, an epoch took, and when one was whole
    _keeping_s = _epoch_s = _whole_at = 0.0

    @property
    def _checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    # a checkpoint that is gone on from

    def _resume(self, resume: Path | None, state: dict[str, Any]) -> None:
        in_place = checkpoint.continues_in(self.output_dir, self.config.resume_from)
        self.run_log.resume(state, in_place)
        if resume is None:
            logger.warning("%s has no checkpoint yet: the run starts from the beginning", self.config.resume_from)
            return
        checkpoint.check_trained_weights_match(resume, state["trained"], self._trained_part())
        refuse_changes(self.config.resume_from, state, self._run_settings(), in_place)
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
            checkpoint.discard_last_epoch(self._checkpoints)
        self.config.resume_from = str(resume)
        self._load(resume, state)

    def _verified(self, resume: Path | None) -> None:
        """Raises `ValueError`, in all processes, for a damaged checkpoint."""
        problem = ""
        if resume is not None and self.accelerator.is_main_process:
            try:
                checkpoint.verify(resume)
            except ValueError as error:
                problem = str(error)
        if problem := broadcast_from_main(self.accelerator, problem):
            raise ValueError(problem)

    def _load(self, resume: Path, state: dict[str, Any]) -> None:
        training = checkpoint.read_training(resume)
        with self.engine.exact(write=True):
            self._load_model_hook([self._model()], str(resume))
        self.engine.load_state_dict(training["engine"])
        self.stat_tracker.load_state_dict(training["stat_tracker"])
        self._dead_shares = training["dead_shares"]
        checkpoint.load_function_states(self._stateful_functions(), training)
        self.first_epoch, self._global_step = state["epochs"], state["global_step"]
        random_state = checkpoint.read_random_state(resume, self.accelerator.process_index)
        if random_state is None:
            # another draw than any process made in the epochs so far
            fresh = self.config.seed + 1_000_003 * self.first_epoch
            set_seed(fresh % (2**32 - self.accelerator.num_processes), device_specific=True)
        else:
            self.engine.load_process_state(random_state["own"])
            checkpoint.restore_random_state(random_state)

    # training that is stopped, and begun again

    def _epochs_to_train(self, epochs: int) -> range:
        """TRL's: as many for each call as for the first; a call that was stopped is gone on with."""
        if not self._is_broken:
            self._train_from = self.first_epoch
        return range(self.first_epoch, max(self.first_epoch, self._train_from + epochs - self._started_at))

    def _epoch_is_whole(self, epochs: int, global_step: int) -> None:
        self.first_epoch, self._global_step, self._is_updating = epochs, global_step, False
        self._epoch_s, self._whole_at = time.monotonic() - self._whole_at, time.monotonic()
        self._whole_bytes = self.run_log.metrics.size()

    def _save_between(self, epochs: int, is_last: bool) -> None:
        """After an epoch that `save_freq` leaves out: a checkpoint if it is the last, else the state in case that the
        next one is broken off, unless writing it takes too much of the time."""
        if is_last:
            self._save(epochs)
            return
        if broadcast_from_main(self.accelerator, self._keeping_s > max(5.0, 0.05 * self._epoch_s)):
            return
        started = time.monotonic()
        self._save(epochs, checkpoint.LAST_EPOCH)
        self._keeping_s = time.monotonic() - started

    @contextmanager
    def _attended(self) -> Iterator[None]:
        """Whatever ends the training in here, a checkpoint of the last whole epoch is there afterwards."""
        with self.interruption:
            try:
                self._prove_savable()
                if self._is_broken:
                    self._begin_epoch_again()
                self._is_broken, self._whole_at = True, time.monotonic()
                yield
            except BaseException as error:
                self._keep_last_epoch(error)
                raise
            self._is_broken = False

    def _keep_last_epoch(self, error: BaseException) -> None:
        # a reward that still runs in a thread ends there, for nobody
        self.executor.shutdown(wait=False)
        self.executor = WorkerThreads(self.executor.count, self.executor.name)
        if not self.accelerator.is_main_process:
            return
        with self.interruption.suppressed():
            checkpoint.promote_last_epoch(self._checkpoints)
            if isinstance(error, Exception):
                return
            self._say_how_to_go_on(f"in epoch {self.first_epoch + 1}")

    def _say_how_to_go_on(self, stopped: str) -> None:
        found = checkpoint.list_in(self._checkpoints)
        there = f"{found[-1]} is there" if found else "there is no checkpoint yet"
        print(f"\nstopped {stopped}, {there}: go on with --resume_from {self.output_dir}", file=sys.stderr, flush=True)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """For what comes after the training: who stops it is told how to go on."""
        try:
            with self.interruption:
                yield
        except (KeyboardInterrupt, SystemExit):
            if self.accelerator.is_main_process:
                self._say_how_to_go_on("after the training")
            raise

    def _begin_epoch_again(self) -> None:
        """Back to the start of the epoch that was broken off, if its updates had begun."""
        if self.accelerator.is_main_process:
            self.run_log.metrics.truncate(self._whole_bytes)
        if not self._is_updating:
            return
        if not self.engine.can_begin_again:
            raise RuntimeError(
                f"an update was broken off, and this engine cannot begin it again: make a new trainer with "
                f"resume_from={str(self.output_dir)!r}"
            )
        self._is_updating = False
        self.engine.zero_gradients()
        last = self._checkpoints / f"{checkpoint.PREFIX}{self.first_epoch}"
        if (last / checkpoint.STATE).exists():
            self._load(last, checkpoint.read_state(last))
        elif self.first_epoch:
            logger.warning("%s is not there: epoch %d goes on where it was", last, self.first_epoch + 1)

    # what a checkpoint keeps of the trainer's parts

    def _prove_savable(self) -> None:
        """Before the first update: what could not be saved must not be trained."""
        if self._is_proved:
            return
        states = checkpoint.function_states(self._stateful_functions())
        with self.engine.exact():
            if self.accelerator.is_main_process:
                checkpoint.trial_save(self._checkpoints, states, self._write_weights)
        self._is_proved = True

    def _write_weights(self, folder: Path) -> None:
        trained = {name: p.detach() for name, p in self._model().named_parameters() if p.requires_grad}
        health.check_weights(trained, self.first_epoch)
        self._save_model_hook([self._model()], [], str(folder))

    def _save_model_hook(self, models: list, weights: list, output_dir: str) -> None:
        self.sd_pipeline.save_checkpoint(models, weights, output_dir)

    def _load_model_hook(self, models: list, input_dir: str) -> None:
        self.sd_pipeline.load_checkpoint(models, input_dir)

    def _stateful_functions(self) -> dict[str, Any]:
        functions = {"reward_function": self.reward_fn, "prompt_function": self.prompt_fn}
        return {name: f for name, f in functions.items() if hasattr(f, "state_dict") and hasattr(f, "load_state_dict")}

    def _model(self) -> Any:
        return self.sd_pipeline.unet if isinstance(self.trainable_layers, list) else self.trainable_layers

    def _trained_part(self) -> dict[str, Any]:
        return checkpoint.describe_trained_weights(self._model().named_parameters())

    def _run_settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def _save(self, epochs: int, name: str = "") -> None:
        raise NotImplementedError
