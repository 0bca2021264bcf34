"""The engine that splits optimizer states, gradients and weights over processes, by DeepSpeed's ZeRO.

ZeRO (Rajbhandari et al., arXiv 1910.02054) has three stages. From stage 1 on each process has its part of the fp32
weights and of Adam's moments, and updates that part alone. From stage 2 on it keeps its part of the averaged gradients
only. At stage 3 the half-precision weights are split too, and each layer's are gathered from all processes when it
computes.

An update's gradients are added up on each device as without ZeRO, and are split, averaged and (with offload) copied to
the host once an update, not once a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import moments
from ddpo_fast.engine.ema import EMA
from ddpo_fast.engine.master_weights import accumulate_into
from ddpo_fast.engine.optimizers import Warmup, buckets
from ddpo_fast.engine.zero_fragments import ZeroFragments
from ddpo_fast.temporary_values import temporary_values


class SplitLinear(nn.Linear):
    """A linear layer that does not keep its gathered weight alive until the backward pass, as PyTorch's would.

    It is DeepSpeed's function. DeepSpeed itself would replace `torch.nn.functional.linear` by it, for all that the
    process computes from there on: it sums the gradients of biases in another order, so that other networks, and later
    runs in the same process, would get other bits. Hence `memory_efficient_linear` is off in the settings.
    """

    def forward(self, x: Tensor) -> Tensor:
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        return zero3_linear_wrap(x, self.weight, self.bias)


# bitsandbytes' names of the tensors of an 8-bit state: codes and scales of the two moments
EIGHT_BIT_TENSORS = ("state1", "state2", "absmax1", "absmax2")


class ZeroEngine:
    """An `Engine` (protocol.py documents its methods) in which DeepSpeed keeps and updates the trained weights.

    Args:
        network: in fp32; DeepSpeed casts it and, for stage 3, splits it.
        trained: the parameters to train.
        make_optimizer: makes the optimizer of the trained parameters, unless DeepSpeed's settings name one.
        settings: DeepSpeed's, as `zero_settings` makes them.
    """

    # DeepSpeed counts backward passes when they begin, and a failed one would leave its count wrong
    can_begin_again = False

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        trained: Sequence[nn.Parameter],
        make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
        settings: dict[str, Any],
        config: DDPOConfig,
    ) -> None:
        import deepspeed

        self.accelerator = accelerator
        self.config = config
        self.network = network
        self.parameters = list(trained)
        self.updates = 0
        # DeepSpeed casts the parameters first and makes its fp32 weights from what is left of them
        exact = [p.detach().to("cpu", torch.float32, copy=True) for p in self.parameters]
        client_optimizer = None if "optimizer" in settings else make_optimizer(self.parameters)
        self.deepspeed, *_ = deepspeed.initialize(
            model=network,
            model_parameters=self.parameters if client_optimizer is None else None,
            optimizer=client_optimizer,
            config=settings,
            dist_init_required=False,
        )
        if self.stage == 3:
            for module in network.modules():
                if type(module) is nn.Linear:
                    module.__class__ = SplitLinear
        # `deepspeed.optimizer` is ZeRO's wrapper, which reduces gradients, around the one that updates weights
        self._zero: Any = self.deepspeed.optimizer
        self.optimizer = self._zero.optimizer
        self._fragments = ZeroFragments(self._zero, self.parameters, accelerator)
        # the fp32 tensors that the optimizer trains
        self._flats = self._fragments.flats
        self._fragments.set_weights([_from_main(values, accelerator) for values in exact])
        # holds DeepSpeed's context in which gradients stay on this device, from the first backward pass to the step
        self._accumulation = ExitStack()
        self._is_accumulating = False
        # gradients added up in fp32, where autograd would add them up in half precision
        self._fp32_gradients: list[Tensor | None] = [None] * len(self.parameters)
        self._gradient_dtype = torch.float32 if config.train_gradient_dtype == "fp32" else self.parameters[0].dtype
        if self._gradient_dtype != self.parameters[0].dtype:
            for i, parameter in enumerate(self.parameters):
                parameter.register_post_accumulate_grad_hook(accumulate_into(self._fp32_gradients, i, torch.float32))
        on_host = config.ema_device == "cpu"
        self.ema = EMA(self._flats, config.ema_decay, on_host) if config.ema_decay else None
        self._warmup = Warmup(self.optimizer, config.train_warmup_steps)
        self._warmup.set_rate(self.updates)

    @property
    def stage(self) -> int:
        """ZeRO's stage, 1, 2 or 3."""
        return self.deepspeed.zero_optimization_stage()

    def computing(self) -> AbstractContextManager[None]:
        # the network's parameters are in the compute precision all the time
        return nullcontext()

    @contextmanager
    def exact(self, write: bool = False) -> Iterator[None]:
        """As the protocol says; the weights, frozen ones included, are in host memory.

        Without `write` they are empty on all processes but the main one.
        """
        keep = write or self.accelerator.is_main_process
        with self._gathered_network({id(flat): flat for flat in self._flats}, keep):
            yield
            if write:
                written = [parameter.data for parameter in self.parameters]
        if write:
            self._fragments.set_weights(written)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with self._gathered_network(self._averages(), self.accelerator.is_main_process):
            yield

    def _averages(self) -> dict[int, Tensor]:
        """The moving average of each flat tensor, by its `id`."""
        assert self.ema is not None
        return {id(flat): average for flat, average in zip(self._flats, self.ema.averages, strict=True)}

    # gradients

    def loss_scale(self) -> Tensor:
        self._begin_accumulating()
        # `scale` also prepares DeepSpeed for a backward pass that it does not start itself. It wants a scalar with a
        # grad_fn, hence a 1 that is multiplied by 1.
        with torch.enable_grad():
            one = torch.ones((), device=self.accelerator.device, requires_grad=True)
            return self.deepspeed.scale(one * 1.0).detach()

    def backward(self, loss: Tensor) -> None:
        self._begin_accumulating()
        # DeepSpeed must not divide by its count of accumulated micro-batches: the loss is weighted already
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        self._begin_accumulating()
        output.backward(gradient)

    def zero_gradients(self) -> None:
        for i, parameter in enumerate(self.parameters):
            self._fp32_gradients[i] = parameter.grad = None

    def forward_passes(self, mine: int) -> int:
        """As many as the process that needs most: each pass of stage 3 gathers weights from all processes."""
        if self.stage != 3 or self.accelerator.num_processes == 1:
            return mine
        most = torch.tensor(mine, device=self.accelerator.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _begin_accumulating(self) -> None:
        """Makes gradients stay on this device until the step, where DeepSpeed would reduce each micro-batch's."""
        if not self._is_accumulating:
            self._accumulation.enter_context(self.deepspeed.coalesce_grad_reduction())
            self._is_accumulating = True

    def _complete_gradients(self) -> None:
        """Gives every parameter a gradient in its own precision, as DeepSpeed reduces them.

        Gradients that are missing become zeros. Processes reduce the gradients that they have, one message after the
        other: one that lacked a gradient which others have would leave those waiting for its message.
        """
        for parameter in self.parameters:
            # DeepSpeed refuses to release a gathered parameter while a layer is marked as using it. The mark goes in
            # the layer's backward hook, which is not called for a layer whose input needs no gradient.
            getattr(parameter, "ds_active_sub_modules", set()).clear()
        missing = [i for i, parameter in enumerate(self.parameters) if parameter.grad is None]
        for bucket in buckets(self._fragments.shapes[i].numel() for i in missing):
            members = [missing[i] for i in bucket]
            # a gradient must have its parameter's shape, and stage 3's parameters are empty unless they are gathered
            with self._gathered_parameters([self.parameters[i] for i in members]):
                for i in members:
                    parameter, total = self.parameters[i], self._fp32_gradients[i]
                    if total is None:
                        parameter.grad = torch.zeros_like(parameter)
                    else:
                        parameter.grad = total.to(parameter.dtype)
                    self._fp32_gradients[i] = None

    # one update

    def step(self) -> dict[str, Tensor]:
        self._begin_accumulating()
        self._complete_gradients()
        # when its context ends DeepSpeed reduces the gradients
        self._accumulation.close()
        self._is_accumulating = False
        # read before the step, which adapts it
        scale = self._zero.loss_scale
        # clips, updates and gathers the half-precision weights again
        self.deepspeed.step()
        self.updates += 1
        logged = {"grad_norm": self._scalar(self.deepspeed.get_global_grad_norm() or 0.0)}
        if self.deepspeed.fp16_enabled():
            skipped = not self.deepspeed.was_step_applied()
            logged |= {"skipped_step": self._scalar(skipped), "loss_scale": self._scalar(scale)}
        if self.ema is not None and self.deepspeed.was_step_applied():
            self.ema.update(self._flats)
        self._warmup.set_rate(self.updates)
        return logged

    def _scalar(self, value: Any) -> Tensor:
        return torch.tensor(float(value), device=self.accelerator.device)

    def bytes_before_first_step(self) -> int:
        # gradients are whole on each process until the step; of Adam's fp32 moments there is a part
        weights = sum(shape.numel() for shape in self._fragments.shapes)
        states = 0 if self.optimizer.state or self._flats[0].device.type == "cpu" else 8
        return weights * self._gradient_dtype.itemsize + states * sum(flat.numel() for flat in self._flats)

    # whole parameters

    @contextmanager
    def _gathered_network(self, values: dict[int, Tensor], keep: bool) -> Iterator[None]:
        """Inside, the network's parameters are whole and in host memory, the trained ones with these `values`.

        Args:
            values: of the flat tensors, see `ZeroFragments.gather`.
            keep: False if this process takes part in gathering only: its parameters are then empty.
        """
        trained = {id(parameter) for parameter in self.parameters}
        frozen = [p for p in self.network.parameters() if id(p) not in trained and hasattr(p, "ds_id")]
        wholes = self._fragments.gather_all(values, keep)
        for parameter in frozen:
            # only stage 3 splits them, and they have no fp32 values
            with self._gathered_parameters([parameter]):
                wholes.append(parameter.detach().cpu() if keep else torch.empty(0))
        with temporary_values([*self.parameters, *frozen], wholes):
            yield

    def _gathered_parameters(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside, the parameters are whole on the device and in the compute precision, whatever the stage."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters)) if self.stage == 3 else nullcontext()

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As the protocol says; 8-bit moments are kept in fp32 here, and as they are in `process_state`."""
        scaler = self._zero.loss_scaler
        # DeepSpeed counts updates, and remembers in which the last overflow was; a static scale counts nothing
        since = getattr(scaler, "cur_iter", 0) - getattr(scaler, "last_overflow_iter", -1) - 1
        state: dict[str, Any] = {"updates": self.updates, "step": moments.step_of(self.optimizer)}
        state["loss_scale"] = {"scale": float(scaler.cur_scale), "good_updates": since}
        is_main = self.accelerator.is_main_process
        for moment in moments.MOMENTS:
            values = {id(flat): moments.read(self.optimizer, flat, moment) for flat in self._flats}
            state[moment] = self._fragments.gather_all(values, is_main)
        if self.ema is not None:
            state["ema"] = self._fragments.gather_all(self._averages(), is_main)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the protocol says. Raises `ValueError` for the state of an optimizer other than Adam."""
        if "optimizer" in state:
            raise ValueError(
                "the checkpoint's optimizer is not Adam, and its state cannot be split for ZeRO: resume without ZeRO"
            )
        self.updates = state["updates"]
        self._load_scale(state["loss_scale"])
        if state["step"]:
            parts = {moment: self._fragments.from_checkpoint(state[moment], moment) for moment in moments.MOMENTS}
            for flat in self._flats:
                saved: dict[str, moments.SavedMoment] = {m: parts[m][id(flat)] for m in moments.MOMENTS}
                moments.write(self.optimizer, flat, saved, state["step"])
        if self.ema is not None:
            # fp32 tensors in the parameters' shapes, as moments that are not quantised: any name of a moment will do
            averages = self._fragments.from_checkpoint(state["ema"], "exp_avg") if "ema" in state else {}
            self.ema.set([averages.get(id(flat), flat) for flat in self._flats])
        self._warmup.set_rate(self.updates)

    def process_state(self) -> dict[str, Any]:
        """The codes and scales of 8-bit moments, which a resumed run needs to have the same bits.

        The blocks of 256 that share a scale are counted in this process's flat tensors: with another number of
        processes, whose cuts are elsewhere, they mean nothing.
        """
        states = [
            {name: value for name, value in self.optimizer.state.get(flat, {}).items() if name in EIGHT_BIT_TENSORS}
            for flat in self._flats
        ]
        if not any("absmax1" in state for state in states):
            return {}
        return {"sizes": [flat.numel() for flat in self._flats], "states": states}

    def load_process_state(self, saved: dict[str, Any]) -> None:
        """Sets 8-bit moments to those of `process_state`, if this process has flat tensors of the same sizes."""
        if saved.get("sizes") != [flat.numel() for flat in self._flats]:
            return
        for flat, state in zip(self._flats, saved["states"], strict=True):
            for name, value in state.items():
                self.optimizer.state[flat][name].copy_(value)

    def _load_scale(self, saved: dict[str, Any]) -> None:
        scaler = self._zero.loss_scaler
        if self.deepspeed.fp16_enabled():
            scaler.cur_scale = saved["scale"]
            # as if the last overflow had been just before the updates that were counted
            scaler.cur_iter = saved["good_updates"]
            scaler.last_overflow_iter = -1


def _from_main(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The main process's values, in host memory on every process."""
    if accelerator.num_processes == 1:
        return values
    # the backend (NCCL on GPUs) may not know host memory
    on_device = values.to(accelerator.device)
    dist.broadcast(on_device, src=0)
    return on_device.cpu()
