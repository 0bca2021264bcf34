from __future__ import annotations

import os
import resource
import warnings

# before torch: on a shared machine two threads can take many times as long as one
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # before anyone imports triton: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny_run import SETTINGS, Prompts, brightness, build_pipeline, forget_accelerate_state

from ddpo_fast import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

torch.set_num_threads(1)


# Files and tests that `make test-fast` leaves out, by what their names begin with. A test that takes more than SLOW_S
# of processor time, that of its processes included, and is not here is named at the end of a run.
SLOW = """
test_backends test_bad_folders test_bench test_cli test_cuda_graphs test_damage test_engine test_kernels_compile
test_differences_from_trl test_fused_layers test_groupnorm_silu test_health test_host_adamw test_optimizer test_plan
test_quiet_start
test_resumption test_stopping test_throughput test_trl_parity test_two_processes
test_adamw8bit.py::test_loops_and_avx512 test_adamw8bit.py::test_cpp_quantizes
test_batch_sizes.py::test_what_was_measured test_batch_sizes.py::test_a_run_that
test_ppo.py::test_ratio test_ppo.py::test_the_fast_path test_ppo.py::test_golden
test_readme.py::test_the_example
test_rollout.py::test_sampling_ends test_scaling.py::test_command
test_trainer.py::test_a_compiled test_trainer.py::test_packed test_trainer.py::test_packing
""".split()
SLOW_S = 8.0


def is_slow(item: pytest.Item) -> bool:
    return item.nodeid.removeprefix("tests/").startswith(tuple(SLOW))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow_files = set()
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
            slow_files.add(item.path)
    # a long file that is begun last has one of two processes wait for the other
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    before = processor_s()
    result = yield
    taken = processor_s() - before
    if taken > SLOW_S and not is_slow(item):
        warnings.warn(
            f"{item.nodeid} took {taken:.0f} s of processor time: add it to SLOW in conftest.py", stacklevel=1
        )
    return result


def processor_s() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    forget_accelerate_state()
    yield
    forget_accelerate_state()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> str:
    """The random pipeline, saved."""
    folder = tmp_path_factory.mktemp("random_sd")
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def narrow_model_dir(tmp_path_factory) -> str:
    """The same with a sixteenth of the UNet's weights, for fp16: processors take ten times as long in it as in fp32."""
    folder = tmp_path_factory.mktemp("narrow_sd")
    build_pipeline(widths=(8, 16)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_trainer(model_dir, narrow_model_dir, tmp_path):
    """`make_trainer(use_lora=..., hook=..., reward=..., prompts=..., **settings)`."""

    def make(
        *, use_lora=False, hook=None, reward=brightness, prompts=None, pipeline=None, model=None, **settings
    ) -> DDPOTrainer:
        model = model or (narrow_model_dir if settings.get("mixed_precision") == "fp16" else model_dir)
        config = DDPOConfig(**{**SETTINGS, "output_dir": str(tmp_path / "run"), **settings})
        pipeline = pipeline or DefaultDDPOStableDiffusionPipeline(model, use_lora=use_lora)
        return DDPOTrainer(config, reward, prompts or Prompts(), pipeline, image_samples_hook=hook)

    return make


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fresh memory is full of NaN: an element that a kernel forgets to write shows."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
