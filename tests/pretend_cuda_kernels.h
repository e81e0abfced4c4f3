// A part of pretend_cuda.cpp, inside its namespace: what CUDA computes in one kernel, attention and RMSNorm,
// by CPU kernels of the same shapes and the same saved tensors.

struct BelowAutograd {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
};

void need_cuda(const char* op, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (t->defined() && !on_cuda(*t)) mismatch(op, *t);
}

// Which kernel CUDA takes (its sdp_utils.cpp, without cuDNN): 1 flash, 2 memory-efficient, 0 plain
// mathematics.
int64_t choose_attention(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, double,
    bool causal, std::optional<double>, bool) {
  const auto type = q.scalar_type();
  const auto d = q.size(-1);
  const bool half = type == at::kHalf || (type == at::kBFloat16 && sm >= 80);
  const bool same = k.size(-1) == d && v.size(-1) == d;
  const bool contiguous = q.stride(-1) == 1 && k.stride(-1) == 1 && v.stride(-1) == 1;
  const int align = type == at::kFloat ? 4 : 8;
  if (half && sm >= 80 && !mask && d <= 256 && same && contiguous && !(causal && q.size(2) != k.size(2)))
    return q.size(1) == k.size(1) ? 1 : 0;
  return (half || type == at::kFloat) && contiguous && d % align == 0 && v.size(-1) % align == 0 ? 2 : 0;
}
using at::native::_fused_sdp_choice_stub;
using at::native::_fused_sdp_choice_stub_DECLARE_DISPATCH_type;
using at::native::RegisterCUDADispatch;
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose_attention)

MaybeTensor host_bias(const MaybeTensor& bias) {
  return bias && bias->defined() ? MaybeTensor(to_host(*bias)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(const Tensor& q, const Tensor& k, const Tensor& v,
    const MaybeTensor& bias, bool, double p, bool causal, std::optional<double> scale) {
  const char* name = "aten::_scaled_dot_product_efficient_attention";
  need_cuda(name, {&q, &k, &v});
  if (bias && bias->defined()) {
    need_cuda(name, {&*bias});
    TORCH_CHECK(bias->dtype() == q.dtype(), "invalid dtype for bias - should match query's dtype");
    const int align = 16 / q.element_size();
    for (int i = 0; i < 3; i++)
      TORCH_CHECK(bias->size(i) == 1 || bias->stride(i) % align == 0,
          "attn_bias is not correctly aligned (stride ", bias->stride(i), ") [pretend_cuda]");
  }
  count("launch", name);
  BelowAutograd guard;
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      to_host(q), to_host(k), to_host(v), p, causal, host_bias(bias), scale);
  return {to_device(out), to_device(lse), to_device(at::empty({}, at::kLong)),
      to_device(at::empty({}, at::kLong))};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const char* name, const Tensor& g, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& out, const Tensor& lse, double p,
    bool causal, std::optional<double> scale) {
  count("launch", name);
  count("atomic", name);
  BelowAutograd guard;
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(to_host(g), to_host(q),
      to_host(k), to_host(v), to_host(out), to_host(lse), p, causal, host_bias(bias), scale);
  return {to_device(dq), to_device(dk), to_device(dv)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(const Tensor& g, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& out, const Tensor& lse, const Tensor&,
    const Tensor&, double p, std::array<bool, 4>, bool causal, std::optional<double> scale) {
  auto [dq, dk, dv] = attention_backward(
      "aten::_scaled_dot_product_efficient_attention_backward", g, q, k, v, bias, out, lse, p, causal, scale);
  return {dq, dk, dv, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> flash(
    const Tensor& q, const Tensor& k, const Tensor& v, double p, bool causal, bool,
    std::optional<double> scale) {
  const char* name = "aten::_scaled_dot_product_flash_attention";
  need_cuda(name, {&q, &k, &v});
  count("launch", name);
  BelowAutograd guard;
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      to_host(q), to_host(k), to_host(v), p, causal, std::nullopt, scale);
  auto seed = to_device(at::empty({2}, at::kLong)), offset = to_device(at::empty({}, at::kLong));
  return {to_device(out), to_device(lse), Tensor(), Tensor(), q.size(2), k.size(2), seed, offset, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor& g, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor&, const Tensor&, c10::SymInt,
    c10::SymInt, double p, bool causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  return attention_backward(
      "aten::_scaled_dot_product_flash_attention_backward", g, q, k, v, Tensor(), out, lse, p, causal, scale);
}

std::tuple<Tensor, Tensor> rms_norm(
    const Tensor& x, at::IntArrayRef, const MaybeTensor& weight, std::optional<double> eps) {
  need_cuda("aten::_fused_rms_norm", {&x});
  if (weight) need_cuda("aten::_fused_rms_norm", {&*weight});
  if (!x.is_contiguous()) count("launch", "aten::_fused_rms_norm, a copy");
  count("launch", "aten::_fused_rms_norm");
  BelowAutograd guard;
  auto h = to_host(x).to(at::kFloat);
  auto r = (h.square().mean(-1, true) + eps.value_or(std::numeric_limits<float>::epsilon())).rsqrt();
  auto y = h * r;
  if (weight && weight->defined()) y = y * to_host(*weight).to(at::kFloat);
  return {to_device(y.to(x.scalar_type())), to_device(r)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, at::IntArrayRef,
    const Tensor& rstd, const MaybeTensor& weight, std::array<bool, 2> want) {
  count("launch", "aten::_fused_rms_norm_backward");
  BelowAutograd guard;
  auto g = to_host(dy).to(at::kFloat), r = to_host(rstd), n = to_host(x).to(at::kFloat) * r;
  const bool weighted = weight && weight->defined();
  auto gw = weighted ? g * to_host(*weight).to(at::kFloat) : g;
  Tensor dx, dw;
  if (want[0]) dx = to_device(((gw - n * (gw * n).mean(-1, true)) * r).to(x.scalar_type()));
  if (want[1] && weighted) dw = to_device((g * n).reshape({-1, x.size(-1)}).sum(0).to(weight->scalar_type()));
  return {dx, dw};
}

TORCH_LIBRARY_IMPL(aten, CUDA, lib) {
  lib.impl("copy_",
      torch::CppFunction::makeFromBoxedFunction<&fallback>());  // composite, by a table of devices
  lib.impl("_scaled_dot_product_efficient_attention", &efficient);
  lib.impl("_scaled_dot_product_efficient_attention_backward", &efficient_backward);
  lib.impl("_scaled_dot_product_flash_attention", &flash);
  lib.impl("_scaled_dot_product_flash_attention_backward", &flash_backward);
  lib.impl("_fused_rms_norm", &rms_norm);
  lib.impl("_fused_rms_norm_backward", &rms_norm_backward);
}
