// The schemas of the compiled ops. Each op fills tensors that its caller allocated. The module of the same name in
// `ddpo_fast/ops/` describes the arguments. Only the CPU's library contains this file; the CUDA library adds
// implementations to the same schemas.
#include "common.h"

STABLE_TORCH_LIBRARY(ddpo_fast_csrc, m) {
  m.def(
      "adamw8bit(Tensor(a!) master, Tensor(b!) codes1, Tensor(c!) codes2, Tensor(d!) absmax1, Tensor(e!) absmax2, "
      "Tensor grad, Tensor(f!)? out, Tensor maps, Tensor decades, float beta1, float beta2, float rest1, float rest2, "
      "float decay, float eps, float step_size) -> ()");
  m.def("geglu(Tensor x, Tensor? bias, Tensor(a!) y) -> ()");
  m.def("geglu_backward(Tensor grad, Tensor x, Tensor? bias, Tensor(a!) dx, Tensor(b!)? dbias) -> ()");
  m.def(
      "groupnorm_silu(Tensor x, Tensor weight, Tensor bias, float eps, bool silu, Tensor? addend, Tensor(a!) y, "
      "Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "groupnorm_silu_backward(Tensor x, Tensor grad, Tensor? skip, Tensor weight, Tensor bias, Tensor? addend, "
      "Tensor mean, Tensor rstd, bool silu, Tensor(a!) dx, Tensor(b!)? daffine, Tensor(c!)? daddend) -> ()");
  m.def("groupnorm_silu_fits(Tensor x, int groups, bool backward) -> bool");
  m.def(
      "step_logprob(Tensor model_output, Tensor latents, Tensor noise, Tensor table, Tensor timesteps, "
      "float? guidance_scale, Tensor(a!) next_latents, Tensor(b!) log_probs, Tensor(c!) next_input) -> ()");
  m.def(
      "step_logprob_backward(Tensor model_output, Tensor latents, Tensor next_latents, Tensor table, "
      "Tensor timesteps, float? guidance_scale, Tensor grad_next_latents, Tensor grad_log_probs, "
      "Tensor grad_next_input, Tensor(a!) grad_output, Tensor(b!) grad_latents) -> ()");
  m.def(
      "ppo_loss(Tensor model_output, Tensor? reference_output, Tensor latents, Tensor next_latents, "
      "Tensor old_log_probs, Tensor advantages, Tensor table, Tensor timesteps, Tensor? grad_scale, "
      "float? guidance_scale, float clip_range, float advantage_limit, float reference_weight, Tensor(a!) loss, "
      "Tensor(b!) metrics, Tensor(c!) log_probs, Tensor(d!) grad) -> ()");
}
