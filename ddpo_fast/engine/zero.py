"""The engine that splits optimizer states, gradients and weights over processes, by DeepSpeed's ZeRO.

ZeRO (Rajbhandari et al., arXiv 1910.02054) has three stages. From stage 1 on, each process stores only its part of the
fp32 weights and of Adam's moments, and updates only that part. From stage 2 on, it also keeps only its part of the
gradients. At stage 3 the half-precision weights are split too; each layer's weights are gathered from all processes
when the layer computes.

At stage 1, as without ZeRO, each device adds up whole gradients over the micro-batches of an update, and the processes
exchange them once per update. From stage 2 on DeepSpeed averages the gradients of each micro-batch over the processes
during its backward pass, a bucket at a time, and each process adds up its part of them: so there is never a whole
gradient on a device, but all processes must make the same number of backward passes, and exchange gradients in each.
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
from ddpo_fast.engine.from_main import copy_from_main
from ddpo_fast.engine.master_weights import accumulate_into
from ddpo_fast.engine.optimizers import LearningRate
from ddpo_fast.engine.zero_fragments import ZeroFragments
from ddpo_fast.temporary_values import temporary_values


class SplitLinear(nn.Linear):
    """A linear layer that does not keep its gathered weight in memory until the backward pass, unlike PyTorch's.

    It calls DeepSpeed's own function. With the setting `memory_efficient_linear` DeepSpeed would replace
    `torch.nn.functional.linear` by that function for the rest of the process. The function sums the gradients of biases
    in another order, so the results of other networks and of later runs in the process would change in their last bits.
    Therefore the setting is off (zero_settings.py), and only the trained network's layers get this class.
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

    # DeepSpeed counts backward passes when they begin, so its count would be wrong after a failed one
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
        # DeepSpeed casts the parameters to the compute precision before it makes its fp32 weights from them, so the
        # exact values are kept here and written back below
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
        # `deepspeed.optimizer` is ZeRO's wrapper, which reduces gradients; its `optimizer` is the one that updates
        # weights
        self._zero: Any = self.deepspeed.optimizer
        self.optimizer = self._zero.optimizer
        self._fragments = ZeroFragments(self._zero, self.parameters, accelerator)
        # the fp32 tensors that the optimizer trains
        self._flats = self._fragments.flats
        copy_from_main(exact, accelerator)
        self._fragments.set_weights(exact)
        # At stage 1, from the first backward pass of an update to its step, this holds the DeepSpeed context that keeps
        # gradients on this device.
        self._accumulation = ExitStack()
        self._is_accumulating = False
        # the sums of gradients in fp32, because autograd would add up half-precision gradients in half precision
        self._fp32_gradients: list[Tensor | None] = [None] * len(self.parameters)
        self._gradient_dtype = torch.float32 if config.train_gradient_dtype == "fp32" else self.parameters[0].dtype
        if not self._splits_gradients and self._gradient_dtype != self.parameters[0].dtype:
            for i, parameter in enumerate(self.parameters):
                parameter.register_post_accumulate_grad_hook(accumulate_into(self._fp32_gradients, i, torch.float32))
        on_host = config.ema_device == "cpu"
        self.ema = EMA(self._flats, config.ema_decay, on_host) if config.ema_decay else None
        self.rate = LearningRate(self.optimizer, config)
        self.rate.set_for(self.updates)

    @property
    def stage(self) -> int:
        """ZeRO's stage, 1, 2 or 3."""
        return self.deepspeed.zero_optimization_stage()

    @property
    def _splits_gradients(self) -> bool:
        """Whether each process keeps only its part of the gradients between micro-batches."""
        return self.stage >= 2

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

    def computing_averages(self) -> AbstractContextManager[None]:
        """Not supported, and refused by the config: the averages are split over processes."""
        raise NotImplementedError

    def _averages(self) -> dict[int, Tensor]:
        """The moving average of each flat tensor, by its `id`."""
        assert self.ema is not None
        return {id(flat): average for flat, average in zip(self._flats, self.ema.averages, strict=True)}

    # gradients

    def loss_scale(self) -> Tensor:
        # DeepSpeed's `scale` must be called before a backward pass that DeepSpeed does not start itself. It accepts
        # only a scalar with a grad_fn, and multiplying a leaf by 1 makes one.
        with torch.enable_grad():
            one = torch.ones((), device=self.accelerator.device, requires_grad=True)
            return self.deepspeed.scale(one * 1.0).detach()

    def backward(self, loss: Tensor) -> None:
        self._begin_backward()
        # the loss is weighted already, so DeepSpeed must not divide it by the number of accumulated micro-batches
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        self._begin_backward()
        output.backward(gradient)

    def keep_gradients(self) -> None:
        raise AssertionError("DeepSpeed's gradients move, and CUDA graphs are refused with ZeRO")

    def zero_gradients(self) -> None:
        """Not supported, as an update cannot begin again."""
        raise NotImplementedError

    def forward_passes(self, mine: int) -> int:
        """From stage 2 on the largest `mine` of all processes, and at least 1, as a step needs gradients."""
        if not self._splits_gradients:
            return mine
        most = torch.tensor(max(1, mine), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _begin_backward(self) -> None:
        """Must be called before each backward pass: prepares DeepSpeed's hooks for the pass's gradients."""
        if self._splits_gradients:
            # what DeepSpeed does in the forward and backward passes of its own wrapper of the network
            self._zero.clear_backward_seen_flag()
            self.deepspeed._backward_prologue()
        elif not self._is_accumulating:
            # keeps gradients on this device until the step
            self._accumulation.enter_context(self.deepspeed.coalesce_grad_reduction())
            self._is_accumulating = True

    def _complete_gradients(self) -> None:
        """Gives every parameter a gradient in the parameter's own dtype, in which DeepSpeed reduces gradients.

        Missing gradients become zeros. DeepSpeed reduces only the gradients that a process has, so if one process
        lacked a gradient that the others have, the others would wait forever for its message.
        """
        for i, (parameter, total) in enumerate(zip(self.parameters, self._fp32_gradients, strict=True)):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter) if total is None else total.to(parameter.dtype)
            self._fp32_gradients[i] = None

    # one update

    def step(self, settle: Callable[[], float] | None = None) -> dict[str, Tensor]:
        if not self._splits_gradients:
            if not self._is_accumulating:
                self._begin_backward()
            self._complete_gradients()
            # closing the context makes DeepSpeed reduce the gradients
            self._accumulation.close()
            self._is_accumulating = False
        for parameter in self.parameters:
            # Stage 3 does not release a gathered parameter while a layer is marked as using it. The layer's backward
            # hook removes the mark, but that hook is not called for a layer whose input needs no gradient.
            getattr(parameter, "ds_active_sub_modules", set()).clear()
        # read before the step, which changes the scale
        scale = self._zero.loss_scale
        before = [flat.detach().clone() for flat in self._flats] if settle is not None else []
        # clips, updates and gathers the half-precision weights again
        self.deepspeed.step()
        self.updates += 1
        while settle is not None and (share := settle()) != 1:
            self._scale_update(before, share)
        logged = {"grad_norm": self._scalar(self.deepspeed.get_global_grad_norm() or 0.0)}
        if self.deepspeed.fp16_enabled():
            skipped = not self.deepspeed.was_step_applied()
            logged |= {"skipped_step": self._scalar(skipped), "loss_scale": self._scalar(scale)}
        if self.ema is not None and self.deepspeed.was_step_applied():
            self.ema.update(self._flats)
        self.rate.set_for(self.updates)
        return logged

    def forget_direction(self) -> None:
        moments.forget_direction(self.optimizer)

    @torch.no_grad()
    def _scale_update(self, before: Sequence[Tensor], share: float) -> None:
        """Multiplies an update by `share`, given the weights `before` it."""
        torch._foreach_lerp_([flat.detach() for flat in self._flats], list(before), 1 - share)
        # the half-precision weights follow from the fp32 ones
        whole = self._fragments.gather_all({id(flat): flat for flat in self._flats}, keep=True)
        self._fragments.set_weights(whole)

    def _scalar(self, value: Any) -> Tensor:
        return torch.tensor(float(value), device=self.accelerator.device)

    def bytes_before_first_step(self) -> int:
        part = sum(flat.numel() for flat in self._flats)
        # The sums of gradients: whole at stage 1; at stage 3 they exist already. Of Adam's two fp32 moments each
        # process has its part, of 8 bytes a weight.
        weights = {1: sum(shape.numel() for shape in self._fragments.shapes), 2: part, 3: 0}[self.stage]
        states = 0 if self.optimizer.state or self._flats[0].device.type == "cpu" else 8
        return weights * self._gradient_dtype.itemsize + states * part

    # whole parameters

    @contextmanager
    def _gathered_network(self, values: dict[int, Tensor], keep: bool) -> Iterator[None]:
        """A context in which the network's parameters are whole, in host memory, the trained ones with these `values`.

        Args:
            values: of the flat tensors, see `ZeroFragments.gather_all`.
            keep: False if this process only takes part in gathering; its parameters are then empty.
        """
        trained = {id(parameter) for parameter in self.parameters}
        frozen = [p for p in self.network.parameters() if id(p) not in trained and hasattr(p, "ds_id")]
        wholes = self._fragments.gather_all(values, keep)
        for parameter in frozen:
            # only stage 3 splits frozen parameters, and there are no fp32 values of them
            with self._gathered_parameters([parameter]):
                wholes.append(parameter.detach().cpu() if keep else torch.empty(0))
        with temporary_values([*self.parameters, *frozen], wholes):
            yield

    def _gathered_parameters(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """A context in which the parameters are whole, on the device and in the compute precision, at every stage."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters)) if self.stage == 3 else nullcontext()

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As the protocol says; 8-bit moments are kept in fp32 here, and as they are in `process_state`."""
        scaler = self._zero.loss_scaler
        # Updates since the last overflow, from DeepSpeed's count of updates and the number of the last one that
        # overflowed. A static loss scale has neither.
        since = getattr(scaler, "cur_iter", 0) - getattr(scaler, "last_overflow_iter", -1) - 1
        state: dict[str, Any] = {"updates": self.updates, "step": moments.step_of(self.optimizer)}
        state |= {"rate_factor": self.rate.factor, "rate_shrunk": self.rate.shrunk}
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
        self.updates, self.rate.factor = state["updates"], state.get("rate_factor", 1.0)
        self.rate.shrunk = state.get("rate_shrunk", 1.0)
        self._load_scale(state["loss_scale"])
        if state["step"]:
            parts = {moment: self._fragments.from_checkpoint(state[moment], moment) for moment in moments.MOMENTS}
            for flat in self._flats:
                saved: dict[str, moments.SavedMoment] = {m: parts[m][id(flat)] for m in moments.MOMENTS}
                moments.write(self.optimizer, flat, saved, state["step"])
        if self.ema is not None:
            # Averages are fp32 tensors in the parameters' shapes, as unquantised moments are, so `from_checkpoint` can
            # split them. It uses the name of the moment only for quantised ones.
            averages = self._fragments.from_checkpoint(state["ema"], "exp_avg") if "ema" in state else {}
            self.ema.set([averages.get(id(flat), flat) for flat in self._flats])
        self.rate.set_for(self.updates)

    def process_state(self) -> dict[str, Any]:
        """The codes and scales of 8-bit moments, which a resumed run needs to have the same bits.

        The blocks of 256 values that share a scale are counted in this process's flat tensors. Another number of
        processes cuts the parameters elsewhere, so the codes cannot be used there.
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
            # sets the counts as if the last overflow had come just before the `good_updates`
            scaler.cur_iter = saved["good_updates"]
            scaler.last_overflow_iter = -1
