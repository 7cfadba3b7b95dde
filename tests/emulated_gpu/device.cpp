// A device for tests: it refuses what CUDA refuses, and counts what costs time on a GPU.
//
// Its memory is the host's. Every operation runs at once, by the CPU's kernel on the same
// memory. So the numbers are the CPU's, and only the rules and the counts are a GPU's.
// emulated.py gives it a name and makes it known to torch and DeepSpeed.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <numeric>
#include <set>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
constexpr auto EMULATED = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex DEVICES = 8;

// ---- Counts ----

std::mutex counts_mutex;
std::map<std::string, int64_t> counts;
py::object* observer = nullptr;  // called with the reason of every wait

void count(const std::string& what, int64_t amount = 1) {
  std::lock_guard<std::mutex> lock(counts_mutex);
  counts[what] += amount;
}

void wait(const std::string& reason) {
  count("wait " + reason);
  if (observer) {
    py::gil_scoped_acquire gil;
    (*observer)(reason);
  }
}

// ---- Memory ----

c10::CachingAllocator::Stat memory[DEVICES];
std::mutex memory_mutex;
thread_local DeviceIndex current = 0;

void check_index(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < DEVICES, "emulated error: invalid device ordinal");
}

// A piece of device memory: `host` is memory that a CPU kernel has made.
struct Block {
  DeviceIndex device;
  size_t size;
  void* data;
  c10::Storage host;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(memory_mutex);
    memory[block->device].decrease(block->size);
  }
  if (!block->host) c10::free_cpu(block->data);
  delete block;
}

at::DataPtr take(DeviceIndex device, size_t size, void* data, c10::Storage host) {
  check_index(device);
  std::lock_guard<std::mutex> lock(memory_mutex);
  memory[device].increase(size);
  auto* block = new Block{device, size, data, std::move(host)};
  return {data, block, &release, Device(EMULATED, device)};
}

struct DeviceAllocator final : c10::DeviceAllocator {
  at::DataPtr allocate(size_t size) override {
    return take(current, size, size ? c10::alloc_cpu(size) : nullptr, {});
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const at::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    check_index(device);
    std::lock_guard<std::mutex> lock(memory_mutex);
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0] = stats.reserved_bytes[0] = memory[device];
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex device) override { memory[device].reset_accumulated(); }
  void resetPeakStats(DeviceIndex device) override { memory[device].reset_peak(); }
};
DeviceAllocator allocator;
REGISTER_ALLOCATOR(EMULATED, &allocator);

std::set<void*> pinned;

struct PinnedAllocator final : c10::Allocator {
  at::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    std::lock_guard<std::mutex> lock(memory_mutex);
    pinned.insert(data);
    return {data, data, &free, Device(c10::DeviceType::CPU)};
  }
  static void free(void* data) {
    std::lock_guard<std::mutex> lock(memory_mutex);
    pinned.erase(data);
    c10::free_cpu(data);
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* storage) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  return pinned.count(const_cast<void*>(storage)) > 0;
}

// ---- Devices, streams, events ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static thread_local c10::StreamId streams[DEVICES];
  c10::DeviceType type() const override { return EMULATED; }
  Device exchangeDevice(Device device) const override {
    Device old(EMULATED, current);
    setDevice(device);
    return old;
  }
  Device getDevice() const override { return {EMULATED, current}; }
  void setDevice(Device device) const override {
    check_index(device.index());
    current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::Stream stream(c10::StreamId id, Device device) const {
    auto index = device.has_index() ? device.index() : current;
    return c10::Stream(c10::Stream::UNSAFE, Device(EMULATED, index), id);
  }
  c10::Stream getStream(Device device) const override {
    return stream(streams[device.has_index() ? device.index() : current], device);
  }
  c10::Stream getDefaultStream(Device device) const override { return stream(0, device); }
  c10::Stream getNewStream(Device device, int) const override {
    static std::atomic<c10::StreamId> last{0};
    return stream(++last, device);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto old = getStream(next.device());
    streams[next.device_index()] = next.id();
    return old;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait("stream"); }
  // Everything has happened already when an event is recorded.
  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new int(0);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { wait("event"); }
  void synchronizeDevice(DeviceIndex) const override { wait("device"); }
  double elapsedTime(void*, void*, DeviceIndex) const override { return 0; }
  void destroyEvent(void* event, DeviceIndex) const noexcept override {
    delete static_cast<int*>(event);
  }
};
thread_local c10::StreamId Guard::streams[DEVICES] = {};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- Random numbers: the CPU's generator, one for each device ----

struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex index)
      : GeneratorImpl(Device(EMULATED, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    copy->host = host.clone();
    return copy;
  }
  at::Generator host;
};

const at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (DeviceIndex i = 0; i < DEVICES; ++i) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return generators.at(index < 0 ? current : index);
}

at::Generator host_generator(const std::optional<at::Generator>& given) {
  const auto& generator = given && given->defined() ? *given : default_generator(current);
  TORCH_CHECK(generator.device().type() == EMULATED, "Expected a '", Device(EMULATED),
              "' device type for generator but found '", generator.device(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(DeviceIndex device) const override {
    check_index(device);
    current = device;
  }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    auto old = current;
    setCurrentDevice(device);
    return old;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
};

// ---- The same memory, seen from the host and from the device ----

bool on_device(const Tensor& tensor) { return tensor.device().type() == EMULATED; }

void release_storage(void* context) { delete static_cast<c10::Storage*>(context); }

Tensor like(const Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

// A CPU tensor on the memory of a device tensor. A CPU kernel may give it new memory.
Tensor to_host(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  const auto& storage = tensor.storage();
  at::DataPtr data(storage.mutable_data(), new c10::Storage(storage), &release_storage,
                   Device(c10::DeviceType::CPU));
  auto host = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(data),
      c10::GetAllocator(c10::DeviceType::CPU), true);
  return like(tensor, c10::Storage(std::move(host)), c10::DispatchKey::CPU);
}

at::DataPtr adopt(const c10::Storage& host, DeviceIndex device) {
  return take(device, host.nbytes(), host.mutable_data(), host);
}

// A device tensor on memory that a CPU kernel has made.
Tensor to_device(const Tensor& host, DeviceIndex device) {
  if (!host.defined()) return host;
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), host.storage().nbytes(), adopt(host.storage(), device),
      &allocator, true);
  return like(host, c10::Storage(std::move(storage)), c10::DispatchKey::PrivateUse1);
}

// ---- Every operation without a kernel of its own below ----

// On CUDA the number of results decides a shape, or a value decides what the host does.
const std::set<std::string> DATA_DEPENDENT = {
    "aten::nonzero",  "aten::masked_select", "aten::_unique",  "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive",
    "aten::bincount", "aten::equal", "aten::histc"};
const std::set<std::string> INDEXING = {"aten::index", "aten::index_put", "aten::index_put_",
                                        "aten::_index_put_impl_", "aten::_unsafe_index",
                                        "aten::_unsafe_index_put"};

struct Call {
  const c10::OperatorHandle& op;
  const std::string& name = op.schema().name();
  DeviceIndex device = -1;
  struct Pair {
    Tensor device, host;
    bool written;
  };
  std::vector<Pair> pairs;
  bool host_waits = DATA_DEPENDENT.count(name) > 0;

  void see(const Tensor& tensor) {
    if (!tensor.defined() || !on_device(tensor)) return;
    TORCH_CHECK(device < 0 || device == tensor.device().index(),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                Device(EMULATED, device), " and ", tensor.device(), "! (", name, ")");
    device = tensor.device().index();
  }

  Tensor enter(const Tensor& tensor, bool written, bool in_list) {
    if (!tensor.defined()) return tensor;
    if (!on_device(tensor)) {
      const bool index = in_list && INDEXING.count(name) > 0;
      TORCH_CHECK(index || (tensor.is_cpu() && tensor.dim() == 0 && !written && !in_list),
                  "Expected all tensors to be on the same device, but found at least two devices, ",
                  Device(EMULATED, device < 0 ? current : device), " and ", tensor.device(), "! (",
                  name, ")");
      if (index) {
        count("copies to device pageable");
        count("bytes to device pageable", tensor.nbytes());
        host_waits = true;
      }
      return tensor;
    }
    // (`index` asks for the nonzero elements of a mask itself.)
    if (in_list && name == "aten::_index_put_impl_" && tensor.scalar_type() == at::kBool)
      host_waits = true;
    pairs.push_back({tensor, to_host(tensor), written});
    return pairs.back().host;
  }

  // A result of the CPU kernel: an argument, a view of one, or new.
  Tensor leave(const Tensor& host) {
    if (!host.defined()) return host;
    for (const auto& pair : pairs)
      if (pair.host.is_same(host)) return pair.device;
    for (const auto& pair : pairs)
      if (host.storage().unsafeGetStorageImpl() == pair.host.storage().unsafeGetStorageImpl())
        return like(host, pair.device.storage(), c10::DispatchKey::PrivateUse1);
    made_new = made_new || host.numel() > 0;
    return to_device(host, device < 0 ? current : device);
  }
  bool made_new = false;

  // What the CPU kernel has done to a written argument: another shape, more memory.
  void write_back(const Pair& pair) {
    auto* to = pair.device.unsafeGetTensorImpl();
    const auto& from = pair.host.storage();
    if (from.data() != pair.device.storage().data()) {
      auto* storage = pair.device.storage().unsafeGetStorageImpl();
      storage->set_data_ptr_noswap(adopt(from, pair.device.device().index()));
      storage->set_nbytes(from.nbytes());
    }
    if (pair.host.sizes() != to->sizes() || pair.host.strides() != to->strides())
      to->set_sizes_and_strides(pair.host.sizes(), pair.host.strides(), pair.host.storage_offset());
  }
};

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call{op};
  const auto& schema = op.schema();
  const auto first = stack->size() - schema.arguments().size();
  auto each = [&](size_t i, auto&& change) {
    auto& value = (*stack)[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias && alias->isWrite();
    if (value.isTensor()) {
      value = change(value.toTensor(), written, false);
    } else if (value.isTensorList()) {
      c10::List<Tensor> changed;
      for (const Tensor& tensor : value.toTensorVector())
        changed.push_back(change(tensor, written, true));
      value = changed;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> changed;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
        changed.push_back(tensor ? std::optional<Tensor>(change(*tensor, written, true)) : tensor);
      value = changed;
    }
  };
  const auto arguments = schema.arguments().size();
  bool mixed_list = false;
  for (size_t i = 0; i < arguments; ++i)
    each(i, [&](const Tensor& tensor, bool, bool in_list) {
      call.see(tensor);
      mixed_list = mixed_list || (in_list && tensor.defined() && !on_device(tensor));
      return tensor;
    });
  if (mixed_list && call.name.rfind("aten::_foreach_", 0) == 0)  // as CUDA: one after the other
    return op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = 0; i < arguments; ++i) {
    each(i, [&](const Tensor& t, bool written, bool in_list) { return call.enter(t, written, in_list); });
    auto& value = (*stack)[first + i];
    const auto& type = schema.arguments()[i].type()->str();
    if (value.isDevice()) {
      if (call.device < 0) call.device = value.toDevice().has_index() ? value.toDevice().index() : current;
      value = Device(c10::DeviceType::CPU);
    } else if (type.find("Generator") != std::string::npos) {
      value = host_generator(value.isNone() ? std::nullopt : std::optional(value.toGenerator()));
    }
  }
  if (call.name == "aten::repeat_interleave" && schema.overload_name() == "Tensor")
    call.host_waits = stack->back().isNone();
  if (call.host_waits) wait(call.name.substr(6));
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  bool launched = schema.returns().empty();
  for (const auto& pair : call.pairs) {
    if (!pair.written) continue;
    call.write_back(pair);
    launched = launched || pair.device.numel() > 0;
  }
  bool other = true;  // a number, which the host has waited for
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.leave(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> changed;
      for (const Tensor& tensor : value.toTensorVector()) changed.push_back(call.leave(tensor));
      value = changed;
    } else {
      continue;
    }
    other = false;
  }
  if ((launched || call.made_new || other) && call.name != "aten::resize_")
    count("kernels " + c10::toString(op.operator_name()).substr(6));
}

// ---- Operations with a kernel of their own ----

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool> pin,
             std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  auto side = [](const Tensor& tensor) { return on_device(tensor) ? to_host(tensor) : tensor; };
  if (self.numel() > 0) {
    const bool both = on_device(self) && on_device(source);
    const std::string way = on_device(self) ? "to device " : "to host ";
    const auto& host = on_device(self) ? source : self;
    const bool direct = !both && is_pinned(host.storage().data());
    if (both) {
      count(self.device() == source.device() ? "kernels copy_" : "copies between devices");
    } else {
      const std::string kind = way + (direct ? "pinned" : "pageable");
      count("copies " + kind);
      count("bytes " + kind, source.nbytes());
      if (self.scalar_type() != source.scalar_type()) count("kernels copy_");
      // From pageable memory to the device, the host waits for the copy alone, not for
      // what was queued before it.
      if (!non_blocking) wait("blocking copy " + kind);
      if (non_blocking && !direct && !on_device(self)) wait("copy " + kind);
    }
  }
  side(self).copy_(side(source));
  return self;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  wait("item");
  return to_host(self).item();
}

Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(source));
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  at::DimVector strides(C10_AS_INTARRAYREF_SLOW(stride));
  if (strides.size() != sizes.size()) strides = c10::contiguous_strides(sizes);
  tensor->set_sizes_and_strides(sizes, strides, offset.guard_int(__FILE__, __LINE__));
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {size}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sym_sizes(),
                     source.sym_strides());
}

void record_stream(Tensor&, c10::Stream) {}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  count("kernels native_dropout");
  const auto device = input.device().index();
  const auto host = to_host(input);
  if (!train.value_or(true))
    return {to_device(host.clone(), device), to_device(at::ones_like(host, at::kBool), device)};
  const auto keep = at::empty_like(host).bernoulli_(1 - p, host_generator({}));
  return {to_device(host * (keep / (1 - p)), device), to_device(keep.to(at::kBool), device)};
}

// ---- Attention in one kernel, with the gradient of a bias, as on CUDA ----

int64_t choose_attention(const Tensor& query, const Tensor& key, const Tensor&,
                         const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  const bool same_heads = query.dim() == 4 && query.size(1) == key.size(1);
  return static_cast<int64_t>(same_heads ? sdp::SDPBackend::overrideable : sdp::SDPBackend::math);
}

Tensor attention_weights(const Tensor& query, const Tensor& key, const Tensor& bias, bool causal,
                         double scale) {
  auto scores = at::matmul(query, key.transpose(-1, -2)) * scale;
  if (bias.defined()) scores = scores + bias;
  if (causal)
    scores = scores.masked_fill(at::ones_like(scores, at::kBool).tril().logical_not(),
                                -std::numeric_limits<double>::infinity());
  return scores.softmax(-1);
}

Tensor wide(const Tensor& tensor) {  // as CUDA, sums are in float32
  if (!tensor.defined()) return tensor;
  const auto host = to_host(tensor);
  return host.scalar_type() == at::kDouble ? host : host.to(at::kFloat);
}

double scale_of(const Tensor& query, std::optional<double> scale) {
  return scale.value_or(1 / std::sqrt(static_cast<double>(query.size(-1))));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>
attention(const Tensor& query, const Tensor& key, const Tensor& value,
          const std::optional<Tensor>& bias, double dropout, bool causal, bool,
          std::optional<double> scale) {
  count("kernels attention");
  const auto device = query.device().index();
  for (const auto& tensor : {key, value, bias.value_or(query)})
    TORCH_CHECK(tensor.device() == query.device(), "Expected query, key, value and attn_bias to be on ",
                query.device(), ", but found ", tensor.device());
  auto weights = attention_weights(wide(query), wide(key), wide(bias.value_or(Tensor())), causal,
                                   scale_of(query, scale));
  auto keep = at::empty({0});
  if (dropout > 0) {
    keep = at::empty_like(weights).bernoulli_(1 - dropout, host_generator({})).div_(1 - dropout);
    weights = weights * keep;
  }
  const auto out = at::matmul(weights, wide(value)).to(query.scalar_type());
  const auto none = to_device(at::empty({0}), device);
  // CUDA keeps the seed of the dropout, and draws again in backward.
  return {to_device(out, device), none, none, none, query.sym_size(-2), key.sym_size(-2),
          to_device(keep.to(at::kBool), device), none, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& bias, std::array<bool, 4> needed, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool causal, const Tensor& kept,
    const Tensor&, std::optional<double> given) {
  count("kernels attention_backward");
  const auto device = query.device().index();
  const auto scale = scale_of(query, given);
  const auto q = wide(query), k = wide(key), v = wide(value), g = wide(grad);
  const auto weights = attention_weights(q, k, wide(bias), causal, scale);
  const auto keep = dropout > 0 ? wide(kept) / (1 - dropout) : at::ones({});
  const auto for_weights = at::matmul(g, v.transpose(-1, -2)) * keep;
  const auto for_scores = weights * (for_weights - (for_weights * weights).sum(-1, true));
  auto give = [&](size_t i, const Tensor& like, auto&& make) {
    return needed[i] ? to_device(make().to(like.scalar_type()), device) : Tensor();
  };
  return {give(0, query, [&] { return at::matmul(for_scores, k) * scale; }),
          give(1, key, [&] { return at::matmul(for_scores.transpose(-1, -2), q) * scale; }),
          give(2, value, [&] { return at::matmul((weights * keep).transpose(-1, -2), g); }),
          give(3, bias, [&] { return at::sum_to(for_scores, bias.sizes()).contiguous(); })};
}

// ---- RMS norm in one kernel, as on CUDA ----

std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, at::IntArrayRef shape,
                                    const std::optional<Tensor>& weight,
                                    std::optional<double> epsilon) {
  count("kernels rms_norm");
  const auto x = wide(input);
  const auto added = epsilon.value_or(std::numeric_limits<float>::epsilon());
  std::vector<int64_t> dims(shape.size());
  std::iota(dims.begin(), dims.end(), x.dim() - static_cast<int64_t>(shape.size()));
  const auto inverse = x.square().mean(dims, true).add(added).rsqrt();
  auto out = x * inverse;
  if (weight && weight->defined()) out = out * wide(*weight);
  const auto device = input.device().index();
  return {to_device(out.to(input.scalar_type()), device), to_device(inverse, device)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input,
                                             at::IntArrayRef shape, const Tensor& inverse,
                                             const std::optional<Tensor>& weight,
                                             std::array<bool, 2> needed) {
  count("kernels rms_norm_backward");
  std::vector<int64_t> dims(shape.size());
  std::iota(dims.begin(), dims.end(), input.dim() - static_cast<int64_t>(shape.size()));
  const auto normed = wide(input) * wide(inverse), given = wide(grad);
  const bool weighted = weight && weight->defined();
  const auto inner = weighted ? given * wide(*weight) : given;
  const auto device = input.device().index();
  Tensor for_input, for_weight;
  if (needed[0]) {
    const auto mean = (inner * normed).mean(dims, true);
    for_input = ((inner - normed * mean) * wide(inverse)).to(input.scalar_type());
  }
  if (needed[1] && weighted)
    for_weight = at::sum_to(given * normed, weight->sizes()).to(weight->scalar_type());
  return {to_device(for_input, device), to_device(for_weight, device)};
}

// As for CUDA: `module.to(device)` keeps the parameters and changes what is in them.
bool same_layout(const Tensor&, const Tensor&) { return true; }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", record_stream);
  m.impl("native_dropout", native_dropout);
  m.impl("_scaled_dot_product_fused_attention_overrideable", attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", attention_backward);
  m.impl("_fused_rms_norm", rms_norm);
  m.impl("_fused_rms_norm_backward", rms_norm_backward);
  m.impl("_has_compatible_shallow_copy_type", same_layout);
  // The CPU has loops over these lists; CUDA has kernels for whole lists.
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.rfind("aten::_foreach_", 0) == 0)
      m.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
}

// ---- Autocast: CUDA's lists ----

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

using namespace at::autocast;  // the lists use these names
using at::IntArrayRef;
using at::Scalar;
using at::ScalarType;
#define IN_16_BITS(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define TO_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define IN_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(IN_16_BITS)
  AT_FORALL_FP32(IN_FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(TO_FLOAT32)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(IN_WIDEST)
}

// ---- Collectives: NCCL's rules, gloo's work ----

struct Group final : c10d::Backend {
  using Work = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<Tensor>;

  Group(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size)
      : Backend(rank, size), gloo(std::move(gloo)) {}
  const std::string getBackendName() const override { return "emulated"; }

  static Tensor host(const Tensor& tensor) {
    TORCH_CHECK(on_device(tensor), "Tensors must be emulated and dense");
    TORCH_CHECK(tensor.is_contiguous(), "Tensors must be contiguous");
    return to_host(tensor);
  }
  static Tensors host(const Tensors& tensors) {
    Tensors hosts;
    for (const auto& tensor : tensors) hosts.push_back(host(tensor));
    return hosts;
  }
  static std::vector<Tensors> host(const std::vector<Tensors>& lists) {
    std::vector<Tensors> hosts;
    for (const auto& list : lists) hosts.push_back(host(list));
    return hosts;
  }
  static Work done(const char* name, Work work) {
    count(std::string("collectives ") + name);
    work->wait();
    return work;
  }
  // gloo has no average.
  template <class Options>
  Options summed(const Options& options, bool& average) const {
    Options changed = options;
    average = options.reduceOp == c10d::ReduceOp::AVG;
    if (average) changed.reduceOp = c10d::ReduceOp::SUM;
    return changed;
  }
  void divide(bool average, Tensors tensors) const {
    if (average)
      for (auto& tensor : tensors) tensor.div_(getSize());
  }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto hosts = host(tensors);
    return done("broadcast", gloo->broadcast(hosts, options));
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto hosts = host(tensors);
    bool average;
    auto work = done("allreduce", gloo->allreduce(hosts, summed(options, average)));
    divide(average, hosts);
    return work;
  }
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto hosts = host(tensors);
    bool average;
    auto work = done("reduce", gloo->reduce(hosts, summed(options, average)));
    divide(average, hosts);
    return work;
  }
  Work allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                 const c10d::AllgatherOptions& options) override {
    auto to = host(outputs);
    auto from = host(inputs);
    return done("allgather", gloo->allgather(to, from, options));
  }
  Work _allgather_base(Tensor& output, Tensor& input,
                       const c10d::AllgatherOptions& options) override {
    auto to = host(output), from = host(input);
    return done("allgather", gloo->_allgather_base(to, from, options));
  }
  Work allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::AllgatherOptions& options) override {
    auto to = host(outputs), from = host(inputs);
    return done("allgather", gloo->allgather_into_tensor_coalesced(to, from, options));
  }
  Work _reduce_scatter_base(Tensor& output, Tensor& input,
                            const c10d::ReduceScatterOptions& options) override {
    auto to = host(output), from = host(input);
    bool average;
    auto work = done("reduce_scatter", gloo->_reduce_scatter_base(to, from, summed(options, average)));
    divide(average, {to});
    return work;
  }
  Work gather(std::vector<Tensors>& outputs, Tensors& inputs,
              const c10d::GatherOptions& options) override {
    auto to = host(outputs);
    auto from = host(inputs);
    return done("gather", gloo->gather(to, from, options));
  }
  Work barrier(const c10d::BarrierOptions& options) override {
    wait("barrier");
    return done("barrier", gloo->barrier(options));
  }
  c10::intrusive_ptr<c10d::Backend> gloo;
};

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.attr("devices") = static_cast<int>(DEVICES);
  m.def("counts", [] {
    std::lock_guard<std::mutex> lock(counts_mutex);
    return counts;
  });
  m.def("reset_counts", [] {
    std::lock_guard<std::mutex> lock(counts_mutex);
    counts.clear();
  });
  m.def("observe_waits", [](py::object function) {
    observer = function.is_none() ? nullptr : new py::object(std::move(function));
  });
  m.def("default_generator", [](int index) { return default_generator(index); });
  m.def("group", [](c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<Group>(std::move(gloo), rank, size));
  });
}
