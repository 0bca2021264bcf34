"""The trained model with its card, as a folder that diffusers loads, on disk or on the Hub."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, PyTorchModelHubMixin, constants, errors, get_token, whoami
from huggingface_hub.utils import validate_repo_id

from ddpo_fast import lora
from ddpo_fast.families import family_of_pipeline
from ddpo_fast.model_configs import first_line
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.run_folder import files, model_card
from ddpo_fast.tiny_sd import MODELS

logger = logging.getLogger(__name__)

T = TypeVar("T")
# seconds between tries of an upload, and the status of a Hub that is asked too often
PAUSES, BUSY = (2.0, 8.0), 429


def push_problem(name: str, token: str = "") -> str:
    """Why a model cannot be pushed to the Hub as `name`, in one sentence, or ''; to be asked before training.

    Args:
        token: the user's access token (default: that of the environment or of `hf auth login`).
    """
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        return f"the Hub takes no repository of the name {name!r} ({error}): choose another hub_model_id or output_dir"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it, or leave push_to_hub out"
    if not (token or get_token()):
        return "nobody is logged in: run `hf auth login` or set HF_TOKEN, or leave push_to_hub out"
    try:
        whoami(token=token or None)
    except (OSError, errors.HTTPError) as error:
        return f"the Hub does not answer ({str(error).splitlines()[0]}): log in anew, or leave push_to_hub out"
    return ""


class HubModel(PyTorchModelHubMixin):
    """The part of the trainer that saves and uploads: `save_model`, `save_pretrained`, `push_to_hub`, the model card.

    Every process calls these methods, and the main one writes. If the run keeps a moving average of the weights,
    `save_model` writes that too, into a second folder named `<folder>_ema`.
    """

    _tag_names = ["ddpo_fast", "ddpo"]

    sd_pipeline: Any
    accelerator: Any
    engine: Any
    output_dir: Path
    progress: Any
    run_log: Any
    run_settings: dict[str, Any]
    config: Any
    reward_fn: Any
    prompt_fn: Any
    _pushed_to: str | None = None
    _dataset_name: str | None = None

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """Writes the model and its card to `output_dir` (default: `final` in the run's folder), for plain diffusers."""
        folder = Path(output_dir) if output_dir else self.output_dir / "final"
        self._save_pretrained(folder)
        if self.engine.ema is not None:
            with self.engine.averaged():
                self._write(folder.with_name(f"{folder.name}_ema"))

    def _save_pretrained(self, save_directory: str | os.PathLike) -> None:
        with self.engine.exact():
            self._write(Path(save_directory))

    def _write(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            try:
                if self._base_is_apart:
                    self.sd_pipeline.save_checkpoint([self.sd_pipeline.unet], [], str(folder))
                else:
                    self.sd_pipeline.save_pretrained(str(folder))
                if self.config.kohya_lora:
                    lora.save_kohya(family_of_pipeline(self.sd_pipeline), folder / lora.KOHYA_WEIGHTS)
                self.create_model_card(folder=folder)
                files.follow_umask(folder)
            except Exception as error:
                if not (reason := files.why_unwritten(error)):
                    raise
                raise OSError(
                    f"the model could not be written to {folder}: {reason}; make room there, then go on with "
                    f"--resume_from {self.output_dir} to write it (the run's checkpoints are as they were)"
                ) from error
            if folder.absolute() == self.output_dir.absolute():
                self.run_log.write_config(self.run_settings)
        self.accelerator.wait_for_everyone()

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        folder: str | os.PathLike | None = None,
    ) -> None:
        """Writes README.md into `folder` (default: the run's folder)."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(folder or self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        base = getattr(self.sd_pipeline, "pretrained_model", None)
        name, path = self._card_name(folder)
        card = model_card.make_model_card(
            model_name or name,
            family_of_pipeline(self.sd_pipeline),
            self._base_on_hub,
            self._is_lora,
            {*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])},
            dataset_name or self._dataset_name,
            model_name or path,
            self._card_settings(),
            model_card.curve_sentence(self.run_log.metrics.read()),
            model_card.copy_pictures(self.output_dir, folder),
            model_card.licence_of(base, asks_hub=self._pushed_to is not None) if base is not None else {},
            self._base_is_apart,
        )
        card.save(folder / "README.md")

    @property
    def _is_lora(self) -> bool:
        return bool(getattr(self.sd_pipeline, "use_lora", False))

    @property
    def _base_on_hub(self) -> str | None:
        """The base model's id on the Hub; a path on this machine, or a bundled model's name, is no model there."""
        base = getattr(self.sd_pipeline, "pretrained_model", None)
        return None if base is None or base in MODELS or Path(base).expanduser().exists() else base

    @property
    def _base_is_apart(self) -> bool:
        """Whether only a LoRA is written: to the Hub, where its base model is already."""
        return self._pushed_to is not None and self._is_lora and self._base_on_hub is not None

    def _card_name(self, folder: Path) -> tuple[str, str]:
        """The model's name, and the argument of `from_pretrained`: a repository of the Hub, or the path of `folder`."""
        if self._pushed_to:
            return self._pushed_to, self._pushed_to
        here, run = folder.absolute(), self.output_dir.absolute()
        near = here.is_relative_to(Path.cwd())
        return run.name if here.parent == run else here.name, str(here.relative_to(Path.cwd()) if near else here)

    def _card_settings(self) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for name, function in (("reward", self.reward_fn), ("prompts", self.prompt_fn)):
            used = self.run_settings.get(name) or getattr(function, "__name__", type(function).__name__)
            # a path on this machine means nothing to a reader
            known[name] = Path(str(used)).name
        known |= {
            key: value for key, value in self.run_settings.items() if key.startswith("lora_r") or key == "lora_alpha"
        }
        known["epochs trained"] = self._trained_epochs()
        values = {name: getattr(self.config, name, None) for name in model_card.CARD_SETTINGS}
        return known | {name: value for name, value in values.items() if value not in (None, "")}

    def _trained_epochs(self) -> str:
        """The whole epochs of the weights that are saved, and whether these are the best ones."""
        epochs, scores = self.progress.epochs, self.progress.scores
        if scores.best() != epochs:
            return str(epochs)
        return f"{epochs} (the best {scores.kind}, {scores.score(epochs):.4g})"

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        dataset_name: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        branch: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Uploads the model with its card in one commit and returns the address.

        Of a LoRA whose base model is on the Hub only the adapter is uploaded. An upload that fails on the way is tried
        again; files that have arrived are not sent twice.

        Args:
            repo_id: `owner/name`, or a name of the user's (default: `hub_model_id`, or the folder's name).
            dataset_name: a data set on the Hub, for the card.
            token: the user's access token (default: that of the environment or of `hf auth login`). It is not kept.
            private: whether only the owner sees the repository, if it is new (default: `hub_private`).
            branch: of the repository, which must be there (default: main).
            kwargs: further arguments of `HfApi.upload_folder`, such as `commit_message`.

        Raises `OSError` if the Hub refuses the upload or cannot be reached: the model on disk is as it was.
        """
        if not self.accelerator.is_main_process:
            # the main process saves the model for the upload, which is a collective call
            self._save_pretrained(self.output_dir)
            return broadcast_from_main(self.accelerator, "")
        name = repo_id or self.config.hub_model_id or self.output_dir.absolute().name
        private = private if private is not None else self.config.hub_private or None
        api = HfApi(token=token or None)
        with tempfile.TemporaryDirectory() as temporary:
            self._pushed_to, self._dataset_name = name, dataset_name
            try:
                repo = self._tried(lambda: api.create_repo(repo_id=name, private=private, exist_ok=True).repo_id)
                # without an owner in the name the Hub takes the user's
                self._pushed_to = repo
                self._save_pretrained(Path(temporary))
                given = {"commit_message": "Upload a model that ddpo_fast trained", "revision": branch, **kwargs}
                url = self._tried(lambda: api.upload_folder(repo_id=repo, folder_path=temporary, **given))
            finally:
                self._pushed_to = self._dataset_name = None
        return broadcast_from_main(self.accelerator, str(url))

    def _tried(self, work: Callable[[], T]) -> T:
        """`work()`, again after each of `PAUSES` while the Hub fails or does not answer."""
        for pause in (*PAUSES, None):
            try:
                return work()
            except errors.HTTPError as error:
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if pause is None or (status < 500 and status != BUSY):
                    raise OSError(
                        f"the model was not pushed to {self._pushed_to} ({first_line(error)}); nothing on this machine "
                        f"is lost: push it by --resume_from {self.output_dir} --push_to_hub"
                    ) from error
                logger.warning("the Hub failed (%s): tried again in %g s", first_line(error), pause)
                time.sleep(pause)
        raise AssertionError("the last pause is None")
