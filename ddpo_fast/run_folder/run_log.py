"""The records of a run: its folder, config.json, metrics.jsonl, the trackers and the reward curve."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import memory_held
from ddpo_fast.health import Health
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.run_folder import checkpoint, folder_lock, notebook, pictures
from ddpo_fast.run_folder.metrics_file import MetricsFile
from ddpo_fast.run_folder.trackers import image_trackers, log_array, log_images, tracker_config
from ddpo_fast.warning_limits import DRIFT_SHARE

logger = logging.getLogger(__name__)

# Letters of an epoch's different prompts up to which their mean rewards are logged: 400 short ones, or 100 sentences.
MOST_LETTERS = 8000


class RunLog:
    """The records of one run in `folder`. Every process calls it; only the main process writes.

    Args:
        clip_range: range of the ratio's clip, which warnings compare the policy's changes with.
    """

    def __init__(self, config: DDPOConfig, accelerator: Accelerator, folder: Path, clip_range: float) -> None:
        self.config = config
        self.accelerator = accelerator
        self.folder = folder
        self.clip_range = clip_range
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.health = Health(config, accelerator.is_main_process, clip_range)
        self.summary = ""
        # of the epoch's images, or '' where all have one size
        self.size = ""
        # seconds of training before this process resumed the run, and `time.monotonic()` when this process started
        self._earlier_s, self._started = 0.0, time.monotonic()
        self._last_update: dict[str, float] = {}
        self._warned_of_drift = False

    def lock_folder(self, is_new: bool) -> None:
        """Makes the run's folder and locks it until this process ends.

        Raises `ValueError` if another process writes there, or if the run `is_new` and the folder holds another one:
        metrics and checkpoints of two runs would be mixed.
        """
        problem = ""
        if self.accelerator.is_main_process:
            problem = folder_problem(self.folder) if is_new else ""
            if not problem:
                self.folder.mkdir(parents=True, exist_ok=True)
                # checked again under the lock, as another run may have started there since the first check
                problem = folder_lock.lock(self.folder) or (folder_problem(self.folder) if is_new else "")
        if problem := broadcast_from_main(self.accelerator, problem):
            raise ValueError(problem)

    def start_trackers(self, resumed_step: int | None) -> None:
        """Starts the trackers of `log_with`; TensorBoard hides earlier records of `resumed_step` and later steps."""
        init_kwargs: dict[str, Any] = dict(self.config.tracker_kwargs)
        if self.config.log_with == "tensorboard" and resumed_step is not None:
            init_kwargs = {"tensorboard": {"purge_step": resumed_step, **init_kwargs.get("tensorboard", {})}}
        sent = tracker_config(self.config.log_with, self.config.to_dict())
        if self.accelerator.is_main_process:
            self.accelerator.init_trackers(self.config.tracker_project_name, config=sent, init_kwargs=init_kwargs)

    def write_config(self, settings: dict[str, Any]) -> None:
        """Writes config.json, from which a run without a checkpoint is resumed."""
        self.write_text("config.json", json.dumps(settings, indent=2, default=str) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a file into the run's folder, in the main process."""
        if self.accelerator.is_main_process:
            # renamed when complete, so that a kill leaves no half-written file
            part = self.folder / f".{name}"
            part.write_text(text, encoding="utf-8")
            part.replace(self.folder / name)

    def resume(self, state: dict[str, Any], in_place: bool) -> None:
        """Continues after the records that the checkpoint's `state` counts; later ones are removed if `in_place`."""
        self._earlier_s = state.get("elapsed_s", 0.0)
        if in_place:
            # a run in a new folder may have another reward or other prompts, and so another variety
            self.health.first_spreads = state.get("first_spreads", {})
        if in_place and self.accelerator.is_main_process:
            self.metrics.truncate(state.get("metrics_bytes", 0))

    def use_size(self, size: str, clip_range: float) -> None:
        """Logs epochs as those of images of this size, and compares with others of it; see `BySize`."""
        self.size = self.health.size = size
        self.clip_range = self.health.clip_range = clip_range

    def elapsed_s(self) -> float:
        """Seconds of training so far, without the time between an interruption and its resumption."""
        return self._earlier_s + time.monotonic() - self._started

    def log_rewards(self, epoch: int, global_step: int, all_rewards: torch.Tensor) -> None:
        """Logs an epoch's rewards [images] of all processes, and checks that they differ."""
        values = all_rewards.cpu().numpy()
        # TensorBoard drops NumPy's scalars
        means = {"reward_mean": float(values.mean()), "reward_std": float(values.std())}
        self.health.begin_epoch()
        self.health.rewards(epoch, values)
        log_array(self.accelerator, "reward", values, global_step)
        if self.size:
            # a curve for each, as rewards of different sizes cannot be compared
            means |= {f"{name}/{self.size}": value for name, value in means.items()}
        self.accelerator.log({"epoch": epoch, **means}, step=global_step)

    def log_updates(
        self, updates: list[dict[str, torch.Tensor]], epoch: int, inner_epoch: int, global_step: int
    ) -> list[dict[str, float]]:
        """Logs the metrics of an inner epoch's updates, averaged over processes, and returns them.

        They are read from the device here, after the last update was queued, so that no update waits for the host.
        Raises `RunStopped` for an update whose numbers are broken, before a checkpoint of it can be saved.
        """
        infos = []
        for at, update in enumerate(updates, start=global_step):
            averaged = self.accelerator.reduce(update, reduction="mean")
            info = {name: float(value) for name, value in averaged.items()}
            self.health.update(at, info, self.folder)
            self.accelerator.log({**info, "epoch": epoch, "inner_epoch": inner_epoch}, step=at)
            self._write({"kind": "update", "update": at, "epoch": epoch, "inner_epoch": inner_epoch, **info})
            self._watch_drift(info.get("ratio_drift", 0.0))
            self._last_update = info
            infos.append(info)
        return infos

    def log_epoch(
        self,
        epoch: int,
        global_step: int,
        all_rewards: torch.Tensor,
        timings: dict[str, float],
        variety: dict[str, torch.Tensor],
        components: Mapping[str, np.ndarray],
        prompts: Sequence[str],
    ) -> None:
        """Logs an epoch's rewards, variety, timings and memory, and sets `summary` to one line about the epoch.

        Args:
            all_rewards, prompts: of the images of all processes.
            components: rewards [images] of each of several reward functions, as these returned them.
        """
        means = {"reward_mean": all_rewards.mean().item(), "reward_std": all_rewards.std(correction=0).item()}
        parts, quantiles = _moments("reward", components), _quantiles(all_rewards)
        spreads = {name: value.item() for name, value in variety.items()}
        self.health.variety(epoch, spreads)
        numbers = {**quantiles, **parts, **spreads, **timings, **memory_held(self.accelerator.device)}
        self.accelerator.log(numbers, step=global_step - 1)
        counts = {"kind": "epoch", "epoch": epoch, "updates": global_step, "images": len(all_rewards)}
        counts |= {"size": self.size} if self.size else {}
        counts |= {"clip_range": self.clip_range, **_of_prompts(prompts, all_rewards)}
        self._write({**counts, **means, **numbers, "elapsed_s": self.elapsed_s()})
        # an objective measures some of these, and a user's own `_train_batched_samples` may log no updates
        formats = {"approx_kl": "kl {:.1e}, ", "clipfrac": "clipped {:.0%}, "}
        of_update = "".join(
            text.format(self._last_update[name]) for name, text in formats.items() if name in self._last_update
        )
        of_parts = "".join(f"{name} {values.mean():.3f}, " for name, values in components.items())
        of_size = f" of {self.size}" if self.size else ""
        self.summary = (
            f"reward {means['reward_mean']:.3f}{of_size}, {of_parts}{of_update}{timings['images_per_s']:.2f} images/s"
        )

    def log_evaluation(self, epochs: int, global_step: int, scores: Mapping[str, np.ndarray]) -> None:
        """Logs the scores [images] of each reward of an evaluation after `epochs` epochs."""
        found = _moments("eval", scores)
        # with the epoch's last update: TensorBoard drops what a resumed run finds at its first step
        self.accelerator.log(found, step=max(global_step - 1, 0))
        images = max(map(len, scores.values()), default=0)
        counts = {"kind": "eval", "epoch": epochs, "updates": global_step, "images": images}
        self._write({**counts, **found, "elapsed_s": self.elapsed_s()})

    def show_images(
        self, epochs: int, global_step: int, prompts: Sequence[str], images: torch.Tensor, scores: Sequence[float]
    ) -> None:
        """Sends a grid of images [B, 3, H, W] of fixed prompts, with their rewards, to the trackers that take images.

        A notebook shows it too. Called in the main process.
        """
        takers = image_trackers(self.accelerator)
        rows = [(f"epoch {epochs}", images, scores)]
        is_shown = takers or notebook.in_notebook()
        grid = pictures.attempt(pictures.grid_pixels, prompts, rows) if is_shown else None
        if grid is not None:
            notebook.show(grid)
            for tracker in takers:
                log_images(tracker, {"samples": grid}, max(global_step - 1, 0))

    def draw_reward_curve(self) -> None:
        """Draws rewards.png from metrics.jsonl."""
        if self.accelerator.is_main_process:
            pictures.attempt(pictures.draw_rewards, self.metrics.read(), self.folder / "rewards.png")

    def _write(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.metrics.append(record)

    def _watch_drift(self, drift: float) -> None:
        """Warns once if the ratio before the first update, which should be 1, has used up half of the clip range.

        With `ema_sampling` other weights have sampled, and it should not be 1.
        """
        if self.config.ema_sampling:
            return
        if drift > DRIFT_SHARE * self.clip_range and not self._warned_of_drift:
            self._warned_of_drift = True
            logger.warning(
                "before the first update the ratio is already %.1e away from 1, and the clip range is %.1e: set "
                "train_recompute_log_probs, use a higher mixed_precision, or use guidance in training as in sampling "
                "(train_cfg)",
                drift,
                self.clip_range,
            )


def _moments(kind: str, values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means and standard deviations of the values [images] of each reward, as metrics.jsonl has them."""
    found: dict[str, float] = {}
    for name, of_images in values.items():
        # TensorBoard drops NumPy's scalars
        found |= {f"{kind}/{name}_mean": float(of_images.mean()), f"{kind}/{name}_std": float(of_images.std())}
    return found


def _quantiles(rewards: torch.Tensor) -> dict[str, float]:
    """The lowest, the highest and the quartiles of the rewards [images]."""
    names = ("reward_min", "reward_p25", "reward_median", "reward_p75", "reward_max")
    values = np.quantile(rewards.double().cpu().numpy(), (0, 0.25, 0.5, 0.75, 1))
    return dict(zip(names, map(float, values), strict=True))


def _of_prompts(prompts: Sequence[str], rewards: torch.Tensor) -> dict[str, Any]:
    """`prompt_rewards`, by prompt the mean reward and the number of images; nothing where they would fill the file."""
    of_each: dict[str, list[float]] = {}
    for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
        of_each.setdefault(prompt, []).append(reward)
    if sum(map(len, of_each)) > MOST_LETTERS:
        return {}
    return {"prompt_rewards": {prompt: [sum(found) / len(found), len(found)] for prompt, found in of_each.items()}}


def folder_problem(folder: Path) -> str:
    """Why a new run cannot use `folder`, in one sentence, or ''."""
    if folder.exists() and not folder.is_dir():
        return f"output_dir is {str(folder)!r}, which is a file: choose another folder"
    if (folder / checkpoint.STATE).exists():
        return f"output_dir is {str(folder)!r}, which is a checkpoint: give the run a folder of its own with output_dir"
    if (folder / "metrics.jsonl").exists() or checkpoint.list_in(folder / "checkpoints"):
        return (
            f"output_dir {str(folder)!r} already holds a run: continue it with resume_from={str(folder)!r}, "
            "or choose another folder"
        )
    return ""


def agree_on_folder(config: DDPOConfig, accelerator: Accelerator, folder: Path) -> Path:
    """The run's folder, the same path in all processes.

    A folder that the user named is used as it is. Otherwise the name contains the time in seconds; the main process
    makes the folder, and adds a number to the name if another run has the same one.
    """
    if not (config.output_dir or config.project_kwargs.get("project_dir") or config.resume_from or config.run_name):
        made = str(folder_lock.make_new(folder)) if accelerator.is_main_process else ""
        folder = Path(broadcast_from_main(accelerator, made))
        accelerator.project_configuration.project_dir = str(folder)
        if "logging_dir" not in config.project_kwargs:
            accelerator.project_configuration.logging_dir = str(folder)
    # a name with the time may differ between processes, which start at different seconds
    return Path(broadcast_from_main(accelerator, str(folder)))


def output_folder(config: DDPOConfig) -> Path:
    """Where a run writes: `output_dir`, `project_dir`, the resumed run's folder, or a new one in `logdir`."""
    if config.output_dir:
        return Path(config.output_dir).expanduser()
    if config.project_kwargs.get("project_dir"):
        return Path(config.project_kwargs["project_dir"]).expanduser()
    if config.resume_from:
        return checkpoint.run_folder_of(config.resume_from)
    return default_folder(config)


def default_folder(config: DDPOConfig) -> Path:
    """The folder in `logdir` named by `run_name`, else by `exp_name` and the time."""
    name = config.run_name or f"{config.exp_name or 'ddpo'}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path(config.logdir).expanduser() / name
