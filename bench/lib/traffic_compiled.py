"""Counts what torch.compile's blocks launch, read and write on a GPU, without one.

Inductor plans a graph for a GPU that it is told of: its lowerings, passes and fusions run, and each node of its
schedule is a kernel with the bytes that Inductor itself counts. No kernel is compiled. Calls of libraries and of this
project's ops, which Inductor leaves as they are, are counted by `traffic_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.decomposition as decomposition
import torch._inductor.scheduler as scheduler
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from ddpo_fast.unet import compiled_blocks
from lib.traffic_count import OPS_OF_GPU, Counter, as_cudnn_lays_out, memory_format
from lib.traffic_rules import Launch

# of an H100
GPU = {"multi_processor_count": 132, "max_threads_per_multi_processor": 2048, "regs_per_multiprocessor": 65536}
PROPERTIES = SimpleNamespace(name="H100", major=9, minor=0, warp_size=32, total_memory=80 * 2**30, **GPU)
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
OF_LIBRARIES = {
    *(aten.mm, aten.bmm, aten.addmm, aten.convolution, aten.convolution_backward),
    *(aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward),
}


def compile_for_counting(network: Any) -> Any:
    """`compile_blocks` with `backend`, for calls within `a_gpu`; returns the network."""
    compiled_blocks.compile_blocks(network, backend=backend, fullgraph=True, dynamic=False)
    for module in network.modules():
        if isinstance(call := module._compiled_call_impl, compiled_blocks.CompiledCall):
            module._compiled_call_impl = partial(_without_modes, call)
    return network


def _without_modes(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a block where no counter sees what runs: it runs PyTorch's ops in place of kernels."""
    with _disable_current_modes(), _pop_mode_temporarily():
        return call(*args, **kwargs)


@contextmanager
def a_gpu() -> Iterator[None]:
    """A context in which Inductor plans for an H100."""
    properties = DeviceProperties(type="cuda", index=0, cc=90, major=9, max_threads_per_block=1024, warp_size=32, **GPU)
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_properties", lambda device=None: PROPERTIES),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (DeviceProperties, "create", lambda device: properties),
            (scheduler, "has_triton", lambda: True),
            # decompositions are chosen while a graph is traced, on the device `meta`
            (decomposition, "is_gpu", lambda device_type: True),
            # without cuDNN, PyTorch would lay out results for other libraries
            (torch._C, "_conv_determine_backend_memory_format", lambda x, weight, _: memory_format(x, weight)),
            # as the function mode of a count replaces them elsewhere, which the compiler would have to trace
            *((F, of.__name__, with_) for of, with_ in OPS_OF_GPU.items()),
            # a graph for each number of rows: bytes are numbers
            (compiled_blocks, "for_any_rows", lambda *values: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def count_graph(graph: fx.GraphModule, inputs: Sequence[Any], is_inference: bool, is_backward: bool) -> list[Launch]:
    """The launches of a graph of PyTorch's ops as Inductor schedules it."""
    planned, mode = deepcopy(graph), detect_fake_mode(inputs)
    given = _moved(planned, inputs, mode)
    with V.set_fake_mode(mode):
        if is_inference:
            joint_graph_passes(planned)
        post_grad_passes(planned, is_inference)
        FakeTensorProp(planned, mode).propagate(*given)
        lowered = GraphLowering(
            planned, example_inputs=given, shape_env=mode.shape_env, is_inference=is_inference, is_backward=is_backward
        )
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*given)
            lowered.init_wrapper_code()
            lowered._update_scheduler()
            return [launch for node in lowered.scheduler.nodes for launch in launches_of_node(node)]


def _moved(graph: fx.GraphModule, inputs: Sequence[Any], mode: Any) -> list[Any]:
    """Makes a graph one of tensors on the GPU, in place, and returns such inputs; on `meta`, passes would fold it."""
    _create_on(CUDA, graph)
    with mode:
        given = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
            if isinstance(value, Tensor)
            else value
            for value in inputs
        ]
    FakeTensorProp(graph, mode).propagate(*given)
    return given


def _create_on(device: torch.device, graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
    graph.recompile()


def launches_of_node(node: Any) -> list[Launch]:
    """Those of a node of a schedule: one if it is a kernel of Inductor's."""
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return []
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        kind = "norm" if node.is_reduction() else "activation"
        return [Launch(kind, node.get_read_buffer_sizes(), node.get_write_buffer_sizes())]
    if type(node.node).__name__ == "MultiOutput":
        return []
    called = [origin for origin in node.node.get_origins() if _is_called(origin)]
    assert len(called) == 1, f"{node} is of {called}, and must be of one call of a library or an op"
    with _disable_current_modes(), Counter() as counter:
        called[0].target(*tree_map(_on_meta, called[0].args), **tree_map(_on_meta, called[0].kwargs))
    # Inductor adds the bias of a convolution, and makes its operands' layouts, in kernels that it schedules
    is_convolution = called[0].target is aten.convolution.default
    return [launch for launch in counter.launches if launch.kind == "conv" or not is_convolution]


def _is_called(origin: fx.Node) -> bool:
    target: Any = origin.target
    own = getattr(target, "namespace", "") in ("ddpo_fast", "traffic")
    return own or getattr(target, "overloadpacket", None) in OF_LIBRARIES


def _on_meta(value: Any) -> Any:
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, Tensor):
        with _disable_current_modes():
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


class LayoutsOfGPU(TorchDispatchMode):
    """The results of convolutions as cuDNN lays them out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return as_cudnn_lays_out(func, args, func(*args, **(kwargs or {})))


def _compiler(is_inference: bool, is_backward: bool) -> Callable[..., Any]:
    def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        # a backward pass is compiled at its first call, which a counter sees
        with _disable_current_modes():
            launches = count_graph(graph, inputs, is_inference, is_backward)
        _create_on(torch.device("meta"), graph)

        def run(*args: Any) -> Any:
            if Counter.current is not None:
                Counter.current.launches += launches
            with _disable_current_modes(), LayoutsOfGPU():
                return graph(*args)

        return make_boxed_func(run)

    return compile_graph


def _partition(graph: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
    # the inputs are two lists, of those of the forward pass and of the gradients
    mode: Any = detect_fake_mode(inputs)
    _moved(graph, [value for part in inputs for value in part], mode)
    with V.set_fake_mode(mode):
        joint_graph_passes(graph)
    return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **kwargs)


def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """A backend of torch.compile, whose kernels are PyTorch's ops and add what Inductor's would launch."""
    made = aot_autograd(
        fw_compiler=_compiler(False, False),
        bw_compiler=_compiler(False, True),
        inference_compiler=_compiler(True, False),
        decompositions=decomposition.select_decomp_table(),
        partition_fn=_partition,
    )
    return made(graph, inputs)
