"""DeepSpeed's ZeRO under the same interface as `Engine`: states, gradients and weights split over processes.

An update's gradients are added up on each device, and split, averaged and (with offload) brought to the host once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import moments
from ddpo_fast.engine.ema import EMA, holding
from ddpo_fast.engine.master_weights import sums_to
from ddpo_fast.engine.optimizers import Warmup, buckets


class Fragment(NamedTuple):
    """The part of a parameter that this process keeps: `flat[start : start + size]` is `parameter[at : at + size]`."""

    flat: Tensor
    start: int
    at: int
    size: int


class SplitLinear(nn.Linear):
    """A linear layer that keeps no whole weight for its backward pass: DeepSpeed's function, in this layer only.

    DeepSpeed would put it into torch in place of `functional.linear`, where it sums biases' gradients of every other
    network of the process in another order.
    """

    def forward(self, x: Tensor) -> Tensor:
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        return zero3_linear_wrap(x, self.weight, self.bias)


# bitsandbytes' names of what a parameter's 8-bit state is made of
RAW = ("state1", "state2", "absmax1", "absmax2")


class ZeroEngine:
    """The trained weights of a network in DeepSpeed's hands.

    Args:
        network: in fp32; DeepSpeed casts it and, for stage 3, splits it.
        trained: the parameters to train.
        make_optimizer: makes the optimizer of the trained parameters, unless DeepSpeed's settings name one.
        settings: DeepSpeed's, as `zero_settings` makes them.
    """

    # DeepSpeed counts the backward passes that it has begun
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
        exact = [p.detach().to("cpu", torch.float32, copy=True) for p in self.parameters]
        own = None if "optimizer" in settings else make_optimizer(self.parameters)
        self.deepspeed, *_ = deepspeed.initialize(
            model=network,
            model_parameters=self.parameters if own is None else None,
            optimizer=own,
            config=settings,
            dist_init_required=False,
        )
        if self.stage == 3:
            for module in network.modules():
                if type(module) is nn.Linear:
                    module.__class__ = SplitLinear
        self._zero: Any = self.deepspeed.optimizer
        self.optimizer = self._zero.optimizer
        self._shapes = [getattr(p, "ds_shape", p.shape) for p in self.parameters]
        self._fragments = [self._fragment(p) for p in self.parameters]
        self._flats = list({id(f.flat): f.flat for f in self._fragments if f is not None}.values())
        self.put_exact([_from_main(values, accelerator) for values in exact])
        self._update = ExitStack()
        self._is_adding = False
        self._sums: list[Tensor | None] = [None] * len(self.parameters)
        self._gradient_dtype = torch.float32 if config.train_gradient_dtype == "fp32" else self.parameters[0].dtype
        if self._gradient_dtype != self.parameters[0].dtype:
            for i, parameter in enumerate(self.parameters):
                parameter.register_post_accumulate_grad_hook(sums_to(self._sums, i, torch.float32))
        on_host = config.ema_device == "cpu"
        self.ema = EMA(self._flats, config.ema_decay, on_host) if config.ema_decay else None
        self._warmup = Warmup(self.optimizer, config.train_warmup_steps)
        self._warmup.set_rate(self.updates)

    @property
    def stage(self) -> int:
        return self.deepspeed.zero_optimization_stage()

    def computing(self) -> AbstractContextManager[None]:
        """The network is always in the compute precision."""
        return nullcontext()

    @contextmanager
    def exact(self, write: bool = False) -> Iterator[None]:
        """The network's weights are whole: the trained ones fp32, in host memory, to read on the main process, or to
        write on all of them. Every process enters it."""
        keep = write or self.accelerator.is_main_process
        with self._all_whole({id(flat): flat for flat in self._flats}, keep):
            yield
            if write:
                written = [parameter.data for parameter in self.parameters]
        if write:
            self.put_exact(written)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Like `exact`, and the trained weights are their moving averages."""
        assert self.ema is not None
        averages = {id(flat): average for flat, average in zip(self._flats, self.ema.averages, strict=True)}
        with self._all_whole(averages, self.accelerator.is_main_process):
            yield

    # gradients

    def loss_scale(self) -> Tensor:
        """What losses are multiplied by before a backward pass, [] on the device: 1 except for fp16.

        DeepSpeed wants to be asked before every backward pass that is not its own.
        """
        self._add()
        with torch.enable_grad():
            one = torch.ones((), device=self.accelerator.device, requires_grad=True)
            return self.deepspeed.scale(one * 1.0).detach()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, which carries its share of the update's pairs already."""
        self._add()
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of a loss with this gradient for `output`, times `loss_scale`."""
        self._add()
        output.backward(gradient)

    def zero_gradients(self) -> None:
        for i, parameter in enumerate(self.parameters):
            self._sums[i] = parameter.grad = None

    def forward_passes(self, mine: int) -> int:
        """Forward passes that this process must make where it needs `mine`: as many as the one with the most, as
        stage 3 brings the weights together in each."""
        if self.stage != 3 or self.accelerator.num_processes == 1:
            return mine
        most = torch.tensor(mine, device=self.accelerator.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _add(self) -> None:
        """From here to the step gradients stay on this device."""
        if not self._is_adding:
            self._update.enter_context(self.deepspeed.coalesce_grad_reduction())
            self._is_adding = True

    def _hand_over(self) -> None:
        """Every parameter has a gradient in the network's precision, as processes that miss one would not be met."""
        for parameter in self.parameters:
            # no pass is under way, but DeepSpeed waits for backward hooks of layers whose input has no gradient
            getattr(parameter, "ds_active_sub_modules", set()).clear()
        missing = [i for i, parameter in enumerate(self.parameters) if parameter.grad is None]
        for bucket in buckets(self._shapes[i].numel() for i in missing):
            chosen = [missing[i] for i in bucket]
            with self._gathered([self.parameters[i] for i in chosen]):
                for i in chosen:
                    parameter, total = self.parameters[i], self._sums[i]
                    if total is None:
                        parameter.grad = torch.zeros_like(parameter)
                    else:
                        parameter.grad = total.to(parameter.dtype)
                    self._sums[i] = None

    # one update

    def step(self) -> dict[str, Tensor]:
        """One update from the gradients since the last one: `grad_norm` before clipping, and for fp16 the loss scale
        and whether the update was left out because a gradient overflowed."""
        self._add()
        self._hand_over()
        self._update.close()
        self._is_adding = False
        scale = self._zero.loss_scale
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
        """What the first update will allocate on the device: whole gradients, and a share of Adam's moments."""
        weights = sum(shape.numel() for shape in self._shapes)
        states = 0 if self.optimizer.state or self._flats[0].device.type == "cpu" else 8
        return weights * self._gradient_dtype.itemsize + states * sum(flat.numel() for flat in self._flats)

    # whole parameters from everybody's part

    def _fragment(self, parameter: Any) -> Fragment | None:
        rank = self.accelerator.process_index
        if hasattr(parameter, "ds_id"):
            group, start, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            part = parameter.ds_tensor.ds_numel
            size = min(part, parameter.ds_numel - rank * part)
            return (
                Fragment(self._zero.fp32_partitioned_groups_flat[group], start, rank * part, size) if size > 0 else None
            )
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(flat, here.start, there.start, here.numel)

    def _whole(self, i: int, values: dict[int, Tensor]) -> Tensor:
        """A parameter's values, fp32 in host memory, from what every process has for its flat tensors, by `id`."""
        fragment, shape = self._fragments[i], self._shapes[i]
        whole = torch.zeros(shape.numel(), device=self.accelerator.device)
        if fragment is not None:
            flat, start, at, size = fragment
            whole[at : at + size] = values[id(flat)].detach()[start : start + size].to(whole.device)
        if self.accelerator.num_processes > 1:
            dist.all_reduce(whole)
        return whole.view(shape).cpu()

    @contextmanager
    def _all_whole(self, values: dict[int, Tensor], keep: bool) -> Iterator[None]:
        """The trained weights are `values`, and the frozen ones whole; empty unless `keep`."""
        trained = {id(parameter) for parameter in self.parameters}
        frozen = [p for p in self.network.parameters() if id(p) not in trained and hasattr(p, "ds_id")]
        nothing = torch.empty(0)
        wholes = []
        for i in range(len(self.parameters)):
            whole = self._whole(i, values)
            wholes.append(whole if keep else nothing)
        for parameter in frozen:
            with self._gathered([parameter]):
                wholes.append(parameter.detach().cpu() if keep else nothing)
        with holding([*self.parameters, *frozen], wholes):
            yield

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters)) if self.stage == 3 else nullcontext()

    @torch.no_grad()
    def put_exact(self, values: Sequence[Tensor]) -> None:
        """Sets the trained weights, from the same whole values in every process."""
        for parameter, fragment, value in zip(self.parameters, self._fragments, values, strict=True):
            if fragment is not None:
                flat, start, at, size = fragment
                part = value.flatten()[at : at + size]
                flat[start : start + size].copy_(part)
                if hasattr(parameter, "ds_tensor"):
                    parameter.ds_tensor.data.view(-1)[:size].copy_(part)
            if parameter.numel() == value.numel():
                parameter.data.copy_(value)

    # what a checkpoint keeps

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the weights, for this engine or another one; every process calls it, the main one keeps."""
        scaler = self._zero.loss_scaler
        since = getattr(scaler, "cur_iter", 0) - getattr(scaler, "last_overflow_iter", -1) - 1
        kept: dict[str, Any] = {"updates": self.updates, "step": moments.step_of(self.optimizer)}
        kept["loss_scale"] = {"scale": float(scaler.cur_scale), "good_updates": since}
        for moment in moments.MOMENTS:
            values = {id(flat): moments.get(self.optimizer, flat, moment) for flat in self._flats}
            kept[moment] = self._everything(values)
        if self.ema is not None:
            kept["ema"] = self._everything({id(f): a for f, a in zip(self._flats, self.ema.averages, strict=True)})
        return kept

    def _everything(self, values: dict[int, Tensor]) -> list[Tensor]:
        wholes = (self._whole(i, values) for i in range(len(self.parameters)))
        if self.accelerator.is_main_process:
            return list(wholes)
        return [torch.empty(0) for _ in wholes]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what any engine's `state_dict` gave; the network has the weights already."""
        if "optimizer" in state:
            raise ValueError(
                "the checkpoint's optimizer is not Adam, and its state cannot be split for ZeRO: resume without ZeRO"
            )
        self.updates = state["updates"]
        self._load_scale(state["loss_scale"])
        if state["step"]:
            parts = {moment: self._parts(state[moment], moment) for moment in moments.MOMENTS}
            for flat in self._flats:
                values: dict[str, moments.Kept] = {moment: parts[moment][id(flat)] for moment in moments.MOMENTS}
                moments.put(self.optimizer, flat, values, state["step"])
        if self.ema is not None:
            averages = self._parts(state["ema"], "exp_avg") if "ema" in state else {}
            self.ema.set([averages.get(id(flat), flat) for flat in self._flats])
        self._warmup.set_rate(self.updates)

    def process_state(self) -> dict[str, Any]:
        """What only this process, with the same part of everything, can go on from to the bit: 8-bit states."""
        states = [
            {name: value for name, value in self.optimizer.state.get(flat, {}).items() if name in RAW}
            for flat in self._flats
        ]
        if not any("absmax1" in state for state in states):
            return {}
        return {"sizes": [flat.numel() for flat in self._flats], "states": states}

    def load_process_state(self, saved: dict[str, Any]) -> None:
        """Takes what `process_state` gave, if this process has the same part of everything."""
        if saved.get("sizes") != [flat.numel() for flat in self._flats]:
            return
        for flat, state in zip(self._flats, saved["states"], strict=True):
            for name, value in state.items():
                self.optimizer.state[flat][name].copy_(value)

    def _parts(self, kept: Sequence[moments.Kept], moment: str) -> dict[int, Tensor]:
        """What a checkpoint has of every parameter as values of this process's flat tensors, by `id`."""
        parts = {id(flat): torch.zeros(flat.numel()) for flat in self._flats}
        for value, fragment, shape in zip(kept, self._fragments, self._shapes, strict=True):
            if fragment is not None:
                flat, start, at, size = fragment
                whole = moments.restored(value, torch.empty(shape, device="meta"), moment)
                parts[id(flat)][start : start + size] = whole[at : at + size]
        return parts

    def _load_scale(self, saved: dict[str, Any]) -> None:
        scaler = self._zero.loss_scaler
        if self.deepspeed.fp16_enabled():
            scaler.cur_scale = saved["scale"]
            scaler.cur_iter = saved["good_updates"]
            scaler.last_overflow_iter = -1


def _from_main(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The main process's values, in host memory."""
    if accelerator.num_processes == 1:
        return values
    here = values.to(accelerator.device)
    dist.broadcast(here, src=0)
    return here.cpu()
