// A device "cuda:0" for PyTorch's CPU build, computed on the CPU. Built, loaded and explained by
// pretend_cuda.py.
//
// What libtorch_cuda would register is registered here: a device guard, the CUDA hooks, a generator, the
// choice of the attention kernel, and one boxed fallback for every operator at the dispatch key CUDA. A
// tensor on cuda:0 is a plain TensorImpl with that key whose storage is host memory. The fallback hands the
// CPU kernel aliases of the same memory and gives its results back as cuda tensors; on the way it checks
// devices as CUDA does and counts.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {
using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::IValue;
using Names = std::set<std::string>;
using MaybeTensor = std::optional<Tensor>;
const Device CUDA0(DeviceType::CUDA, 0);

// -- Counters -----------------------------------------------------------------------------------------------

std::mutex mutex_;                      // autograd runs backward passes on a thread of its own
std::map<std::string, int64_t> counts;  // "kind/operator" -> n; kinds: launch, item, shape, d2h, h2d, atomic
Names no_check;                         // operators whose kernels take a CPU tensor of 0 dimensions
int64_t live = 0, peak = 0, limit = 0;  // bytes of storages
int sm = 86;                            // compute capability
bool capturing = false;                 // within torch.cuda.graph

void count(const std::string& kind, const std::string& op) {
  // Whatever waits for the device, or copies from pageable memory, ends a capture with this error.
  TORCH_CHECK(!capturing || kind == "launch" || kind == "atomic",
      "CUDA error: operation not permitted when stream is capturing (", op, ") [pretend_cuda]");
  std::lock_guard<std::mutex> lock(mutex_);
  counts[kind + "/" + op]++;
}

// -- The device ---------------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return CUDA0; }
  Device getDevice() const override { return CUDA0; }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() <= 0, "CUDA error: invalid device ordinal");
  }
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, CUDA0); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, CUDA0); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Generator final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  Generator() : c10::GeneratorImpl(CUDA0, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator();
    copy->inner = inner.clone();
    return copy;
  }
};

const at::Generator& default_generator() {
  static at::Generator g = at::make_generator<Generator>();
  return g;
}

at::Generator host_generator(const at::Generator& g) {
  return static_cast<Generator*>(g.unsafeGetGeneratorImpl())->inner;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  Device getDeviceFromPtr(void*) const override { return CUDA0; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)  // asked for once, when CUDA is first used

// -- Memory: storages, each charged in blocks of 512 bytes as by the caching allocator ----------------------

struct Block {
  c10::Storage host;
  int64_t bytes;
};

void free_block(void* p) {
  auto* block = static_cast<Block*>(p);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    live -= block->bytes;
  }
  delete block;
}

c10::DataPtr charge(const c10::Storage& host) {
  int64_t bytes = (host.nbytes() + 511) / 512 * 512;
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK_WITH(OutOfMemoryError, !limit || live + bytes <= limit,
      "CUDA out of memory. Tried to allocate ", bytes / 1048576.0, " MiB. GPU 0 has a total capacity of ",
      limit / 1073741824.0, " GiB of which ", (limit - live) / 1048576.0, " MiB is free. [pretend_cuda]");
  live += bytes;
  peak = std::max(peak, live);
  return c10::DataPtr(host.mutable_data(), new Block{host, bytes}, &free_block, CUDA0);
}

bool on_cuda(const Tensor& t) { return t.defined() && t.device().is_cuda(); }

Tensor tensor_over(c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
  auto r =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  r.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) r._set_conj(true);
  if (like.is_neg()) r._set_neg(true);
  return r;
}

Tensor to_host(const Tensor& t) {  // cuda -> CPU, the same memory
  if (!on_cuda(t)) return t;
  auto& s = t.storage();
  c10::DataPtr pointer(s.mutable_data(), Device(DeviceType::CPU));
  c10::Storage storage({}, s.nbytes(), std::move(pointer), c10::GetCPUAllocator(), true);
  return tensor_over(std::move(storage), c10::DispatchKey::CPU, t);
}

Tensor to_device(const Tensor& t) {  // CPU -> cuda, the same memory, charged
  if (!t.defined()) return t;
  c10::Storage storage({}, t.storage().nbytes(), charge(t.storage()), c10::GetCPUAllocator(), true);
  return tensor_over(std::move(storage), c10::DispatchKey::CUDA, t);
}

// -- The fallback: every operator without a kernel of its own below -----------------------------------------

[[noreturn]] void mismatch(const std::string& op, const Tensor& cpu) {
  TORCH_CHECK(false,
      "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
      "cpu! (",
      op, ", a CPU tensor of shape ", cpu.sizes(), ") [pretend_cuda]");
}

const Names ANY_DEVICE = {"aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::_to_copy",
    "aten::set_.source_Storage", "aten::set_.source_Tensor", "aten::record_stream", "aten::resize_as_",
    "aten::is_set_to"};
// The shape of the result is in the data, so the host waits for it.
const Names SHAPED = {"aten::nonzero", "aten::nonzero.out", "aten::masked_select", "aten::masked_select.out",
    "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim", "aten::bincount", "aten::histc",
    "aten::repeat_interleave.Tensor", "aten::is_nonzero", "aten::linalg_eigh", "aten::_linalg_svd",
    "aten::median"};
const Names READ = {"aten::_local_scalar_dense", "aten::equal"};
// Summed with atomics, whose order differs from run to run.
const Names ATOMIC = {"aten::index_add", "aten::index_add_", "aten::index_add.out", "aten::scatter_add",
    "aten::scatter_add_", "aten::scatter_add.out", "aten::scatter_reduce.two", "aten::scatter_reduce_.two",
    "aten::embedding_dense_backward", "aten::index_reduce_", "aten::put_"};
const Names NO_LAUNCH = {"aten::empty.memory_format", "aten::empty_strided", "aten::empty_like",
    "aten::resize_", "aten::set_", "aten::set_.source_Storage", "aten::set_.source_Tensor",
    "aten::set_.source_Storage_storage_offset", "aten::new_empty_strided", "aten::is_pinned",
    "aten::record_stream", "aten::_local_scalar_dense"};

bool starts_with(const std::string& s, const char* prefix) { return s.rfind(prefix, 0) == 0; }

bool is_index(const std::string& op) {
  return op == "aten::index" || starts_with(op, "aten::index.") ||
         starts_with(op, "aten::_index_put_impl_") || starts_with(op, "aten::index_put") ||
         starts_with(op, "aten::_unsafe_index");
}

struct Call {
  std::string op;
  std::vector<std::pair<Tensor, Tensor>>
      pairs;  // cuda tensors and their CPU aliases, in the order of arguments
  std::vector<std::pair<Tensor, size_t>> host;  // CPU tensors and the number of their argument
  bool made_here = false, boolean_index = false;

  Tensor alias(const Tensor& t, size_t argument) {
    if (!t.defined()) return t;
    if (!t.device().is_cuda()) {
      host.emplace_back(t, argument);
      return t;
    }
    for (auto& [gpu, cpu] : pairs)
      if (gpu.is_same(t)) return cpu;
    pairs.emplace_back(t, to_host(t));
    return pairs.back().second;
  }

  void to_cpu(IValue& v, size_t argument, bool wants_generator) {
    if (v.isTensor()) {
      v = alias(v.toTensor(), argument);
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(alias(t, argument));
      v = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<MaybeTensor> list;
      for (const MaybeTensor& t : v.toOptionalTensorList().vec()) {
        if (t && t->defined())
          boolean_index |= t->scalar_type() == at::kBool || t->scalar_type() == at::kByte;
        list.push_back(t ? MaybeTensor(alias(*t, argument)) : std::nullopt);
      }
      v = list;
    } else if (v.isDevice() && v.toDevice().is_cuda()) {
      v = IValue(Device(DeviceType::CPU));
      made_here = true;
    } else if (v.isGenerator()) {
      TORCH_CHECK(
          v.toGenerator().device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
      v = IValue(host_generator(v.toGenerator()));
    } else if (v.isNone() && wants_generator && (made_here || !pairs.empty())) {
      v = IValue(host_generator(default_generator()));
    }
  }

  void check_devices() const {
    if (is_index(op) && !pairs.empty() && !on_cuda(pairs[0].first)) mismatch(op, pairs[0].second);
    if (pairs.empty() || ANY_DEVICE.count(op)) return;
    for (auto& [t, argument] : host) {
      if (is_index(op) && argument == 1)
        count("h2d", op + " of a CPU index");  // moved to the device, blocking
      else if (t.dim() > 0 || !no_check.count(op))
        mismatch(op, t);  // of 0 dimensions: an argument of the kernel
    }
  }

  void count_cost() const {
    if (op == "aten::copy_" || op == "aten::_copy_from") {
      if (!host.empty() && !pairs.empty() && host[0].first.numel())
        count(host[0].second == 0 ? "d2h" : "h2d", op);
    } else if (READ.count(op)) {
      count("item", op);
    } else if (SHAPED.count(op)) {
      count("shape", op);
    } else if (is_index(op) && boolean_index && op != "aten::index.Tensor_out") {  // whose caller was counted
      count("shape", op + " by booleans");
    }
    if (ATOMIC.count(op) && !pairs.empty() && pairs[0].first.is_floating_point()) count("atomic", op);
  }

  // out= and resize_: the CPU kernel may have given its alias new sizes, or a new storage.
  void follow_resizes() const {
    for (auto& [gpu, cpu] : pairs) {
      auto* storage = gpu.storage().unsafeGetStorageImpl();
      if (cpu.storage().data() != gpu.storage().data() || cpu.storage().nbytes() != gpu.storage().nbytes()) {
        storage->set_data_ptr_noswap(charge(cpu.storage()));
        storage->set_nbytes(cpu.storage().nbytes());
      }
      if (cpu.sizes() != gpu.sizes() || cpu.strides() != gpu.strides() ||
          cpu.storage_offset() != gpu.storage_offset())
        gpu.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  // A result: an argument itself, a view of one, or new. `wrote` where a kernel must have run for it.
  Tensor from_cpu(const Tensor& t, bool& wrote) const {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (auto& [gpu, cpu] : pairs) {
      if (!cpu.is_same(t)) continue;
      wrote = true;
      return gpu;
    }
    for (auto& [cpu, argument] : host)
      if (cpu.is_same(t)) return t;
    for (auto& [gpu, cpu] : pairs)
      if (t.storage().unsafeGetStorageImpl() == cpu.storage().unsafeGetStorageImpl())
        return tensor_over(gpu.storage(), c10::DispatchKey::CUDA, t);
    wrote = true;
    return to_device(t);
  }
};

void fallback(const c10::OperatorHandle& handle, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = handle.schema();
  Call call;
  call.op = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const auto n = schema.arguments().size();
  auto arguments = torch::jit::last(*stack, n).vec();
  torch::jit::drop(*stack, n);
  for (size_t i = 0; i < n; i++) call.to_cpu(arguments[i], i, schema.arguments()[i].name() == "generator");
  call.check_devices();
  call.count_cost();

  for (auto& v : arguments) torch::jit::push(*stack, v);
  {
    c10::impl::ExcludeDispatchKeyGuard below(
        c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
    handle.callBoxed(stack);
  }
  call.follow_resizes();

  const auto m = schema.returns().size();
  auto results = torch::jit::last(*stack, m).vec();
  torch::jit::drop(*stack, m);
  bool wrote = m == 0;
  for (auto& v : results) {
    if (v.isTensor()) {
      v = call.from_cpu(v.toTensor(), wrote);
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(call.from_cpu(t, wrote));
      v = list;
    }
    torch::jit::push(*stack, v);
  }
  if (wrote && !NO_LAUNCH.count(call.op)) count("launch", call.op);
}

TORCH_LIBRARY_IMPL(_, CUDA, lib) { lib.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

#include "pretend_cuda_kernels.h"

Tensor host_below_autograd(const Tensor& t) {
  BelowAutograd guard;
  return to_host(t);
}
}  // namespace

// -- For Python ---------------------------------------------------------------------------------------------

TORCH_LIBRARY(pretend_cuda, lib) {
  lib.def("host(Tensor x) -> Tensor", &host_below_autograd);
  lib.def("device(Tensor x) -> Tensor", &to_device);
}

extern "C" {
// An operator for which a CUDA build has a kernel of its own where the CPU build composes it (foreach, for
// one).
void pretend_register(const char* name, const char* overload) {
  static std::vector<c10::RegistrationHandleRAII> handles;
  auto& dispatcher = c10::Dispatcher::singleton();
  auto op = dispatcher.findSchema({name, overload});
  if (!op || op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) return;
  auto kernel = c10::KernelFunction::makeFromBoxedFunction<&fallback>();
  auto handle =
      dispatcher.registerImpl({name, overload}, c10::DispatchKey::CUDA, kernel, std::nullopt, nullptr, "");
  handles.push_back(std::move(handle));
}
void pretend_no_check(const char* op) { no_check.insert(op); }
void pretend_launch(const char* op) { count("launch", op); }
void pretend_capturing(bool on) { capturing = on; }
void pretend_device(int64_t bytes, int capability) { limit = bytes, sm = capability; }
void pretend_reset_peak() { peak = live; }
int64_t pretend_live() { return live; }
int64_t pretend_peak() { return peak; }
int64_t pretend_counts(char* out, int64_t size) {  // "kind/operator<tab>n" by lines -> the bytes needed
  std::lock_guard<std::mutex> lock(mutex_);
  std::string lines;
  for (auto& [name, n] : counts) lines += name + "\t" + std::to_string(n) + "\n";
  if ((int64_t)lines.size() < size) memcpy(out, lines.c_str(), lines.size() + 1);
  return lines.size() + 1;
}
}
