from __future__ import annotations

import os
import resource
import warnings

# Set before torch is imported. On a machine that others use too, two threads can take many times as long as one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # set before triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny_models
from bf16_arithmetic import multiply_in_fp32
from tiny_run import build_pipeline, build_trainer, forget_accelerate_state
from tree_sums import add_up_as_trees

from ddpo_fast import DDPOTrainer

torch.set_num_threads(1)
# kept: the operators are PyTorch's again once it is gone
_bf16_arithmetic = multiply_in_fp32()
if os.environ.get("TRITON_INTERPRET") == "1":
    add_up_as_trees()


# The beginnings of names of files and tests that `make test-fast` leaves out. pytest's summary names each test that
# took more than SLOW_S seconds of processor time, that of its child processes included, and is not in this list.
SLOW = """
test_backends test_bad_folders test_bench test_cli test_compiled_blocks test_cuda_graphs test_damage test_engine
test_kernels_compile
test_differences_from_trl test_fused_layers test_groupnorm_silu test_health test_host_adamw test_optimizer test_plan
test_quiet_start
test_resumption test_stopping test_throughput test_trl_parity test_two_processes
test_learning_bench.py::test_runs_are test_learning_bench.py::test_the_trl_package
test_learning_bench.py::test_a_run_that_fails
test_lora.py::test_an_adapter_beside
test_adamw8bit.py::test_loops_and_avx512 test_adamw8bit.py::test_cpp_quantizes
test_batch_sizes.py::test_what_was_measured test_batch_sizes.py::test_a_run_that
test_objectives.py::test_a_resumed test_objectives.py::test_kl_is
test_ppo.py::test_ratio test_ppo.py::test_the_fast_path test_ppo.py::test_golden
test_notebook.py::test_the_notebook test_readme.py::test_the_example
test_rollout.py::test_sampling_ends test_scaling.py::test_command
test_step_credit.py::test_the_fused test_tiny_sd.py::test_the_flow_matching_model_trains
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
    # slow files first: if one began last, the other process of pytest-xdist would have nothing to do meanwhile
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
    """The folder of a pipeline with random weights."""
    folder = tmp_path_factory.mktemp("random_sd")
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def narrow_model_dir(tmp_path_factory) -> str:
    """The same with a sixteenth of the UNet's weights, for fp16, in which CPUs take ten times as long as in fp32."""
    folder = tmp_path_factory.mktemp("narrow_sd")
    build_pipeline(widths=(8, 16)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """`tiny_model(name)`: the folder of a model of `tiny_models.MODELS`, which the first call makes."""
    folders: dict[str, str] = {}

    def folder_of(name: str) -> str:
        if name not in folders:
            folders[name] = tiny_models.save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder_of


@pytest.fixture
def make_trainer(model_dir, narrow_model_dir, tmp_path):
    """`make_trainer(use_lora=..., hook=..., reward=..., prompts=..., **settings)`; its folder is `tmp_path / "run"`."""

    def make(*, model=None, output_dir=tmp_path / "run", **options) -> DDPOTrainer:
        model = model or (narrow_model_dir if options.get("mixed_precision") == "fp16" else model_dir)
        return build_trainer(model, output_dir, **options)

    return make


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fills new tensors of `torch.empty` with NaN, so that an element that a kernel does not write is noticed."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
