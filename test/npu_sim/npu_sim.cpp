// A simulated NPU: torch's PrivateUse1 backend whose memory is the host's and whose kernels are the CPU's.
//
// Every operator without a kernel here goes through run_on_cpu: each npu tensor gets a CPU alias of the same memory, the
// operator runs on the aliases, and what it made becomes npu tensors. What a real device refuses is refused: tensors on
// two devices, CPU generators, operators without a kernel in torch_npu (they would compute on the CPU there), arithmetic
// in fp64, memory formats. Memory is counted per device, as tensors hold it.
//
// $NPU_SIM_NAME is the device's name; the first generation (see first_generation) saturates and has no bf16.
// $NPU_SIM_DATA is the folder of registered_operators.txt and autocast_lists.txt. $NPU_SIM_DISPATCHED names a file to
// which each operator is appended, once a process, that has computed on the device.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <unordered_map>
#include <unordered_set>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::Storage;
using torch::jit::Stack;

constexpr auto NPU = c10::DeviceType::PrivateUse1;
constexpr int MAX_DEVICES = 16;
thread_local DeviceIndex current_device = 0;

DeviceIndex device_count() {
  static const int count = [] {
    const char* asked = std::getenv("NPU_SIM_DEVICES");
    const int there = std::min(asked ? std::atoi(asked) : 8, MAX_DEVICES);
    const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");  // "2,3": as CANN, up to the first that is not there
    if (!visible || !*visible) return there;
    int seen = 0;
    std::istringstream list(visible);
    for (std::string id; std::getline(list, id, ',') && std::atoi(id.c_str()) < there;) ++seen;
    return seen;
  }();
  return static_cast<DeviceIndex>(count);
}

DeviceIndex resolved(int64_t index) {
  if (index < 0) return current_device;
  TORCH_CHECK(index < device_count(), "npu: invalid device ordinal ", index, ", there are ", int(device_count()));
  return static_cast<DeviceIndex>(index);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

struct Counter {
  std::atomic<int64_t> now{0}, peak{0};
  void add(int64_t bytes) {
    const int64_t total = now += bytes;
    for (int64_t seen = peak; total > seen && !peak.compare_exchange_weak(seen, total);) {
    }
  }
};
Counter counters[MAX_DEVICES];

// Memory of one storage: its own, or that of the CPU storage in which a kernel left its result.
struct Block {
  void* owned;
  int64_t bytes;
  DeviceIndex device;
  Storage host;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  counters[block->device].add(-block->bytes);
  if (block->owned) c10::free_cpu(block->owned);
  delete block;
}

c10::DataPtr new_block(size_t bytes, DeviceIndex device, Device label) {
  void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
  counters[device].add(static_cast<int64_t>(bytes));
  return {data, new Block{data, static_cast<int64_t>(bytes), device, {}}, &free_block, label};
}

// index -1: the current device. as_cpu: for the aliases' storages, which kernels may resize.
struct DeviceAllocator final : c10::Allocator {
  DeviceIndex index = -1;
  bool as_cpu = false;
  c10::DataPtr allocate(size_t bytes) override {
    const auto device = resolved(index);
    return new_block(bytes, device, as_cpu ? Device(c10::kCPU) : Device(NPU, device));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceAllocator allocator;
DeviceAllocator alias_allocators[MAX_DEVICES];

// Pinned host memory: ordinary memory that is remembered.
struct PinnedAllocator final : at::HostAllocator {
  static inline std::mutex mutex;
  static inline std::map<const char*, size_t> blocks;
  static void free(void* data) {
    const std::lock_guard lock(mutex);
    blocks.erase(static_cast<char*>(data));
    c10::free_cpu(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(std::max<size_t>(bytes, 1));
    const std::lock_guard lock(mutex);
    blocks[static_cast<char*>(data)] = std::max<size_t>(bytes, 1);
    return {data, data, &free, Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
  static bool holds(const void* data) {
    const std::lock_guard lock(mutex);
    auto after = blocks.upper_bound(static_cast<const char*>(data));
    if (after == blocks.begin()) return false;
    --after;
    return static_cast<const char*>(data) < after->first + after->second;
  }
};
PinnedAllocator pinned_allocator;

// ---- devices, streams, generators -------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return NPU; }
  Device getDevice() const override { return Device(NPU, current_device); }
  void setDevice(Device device) const override { current_device = resolved(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, Device(NPU, resolved(device.index())));
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  // Everything is done when it returns: an event is the time at which it was recorded.
  using Moment = std::chrono::steady_clock::time_point;
  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Moment;
    *static_cast<Moment*>(*event) = std::chrono::steady_clock::now();
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Moment*>(event); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  double elapsedTime(void* from, void* to, DeviceIndex) const override {
    TORCH_CHECK(from && to, "both events must be recorded before elapsed_time");
    return std::chrono::duration<double, std::milli>(*static_cast<Moment*>(to) - *static_cast<Moment*>(from)).count();
  }
};

// An npu generator is a CPU one under another name, so its numbers are its own.
struct NpuGenerator final : c10::GeneratorImpl {
  at::Generator host;
  NpuGenerator(DeviceIndex index, at::Generator host)
      : GeneratorImpl(Device(NPU, index), DispatchKeySet(DispatchKey::PrivateUse1)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "the simulated npu's generator has no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "the simulated npu's generator has no offset"); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new NpuGenerator(device_.index(), host.clone()); }
};

const at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (DeviceIndex i = 0; i < MAX_DEVICES; ++i)
      made.push_back(at::make_generator<NpuGenerator>(i, at::detail::createCPUGenerator()));
    return made;
  }();
  return generators[resolved(index)];
}

at::Generator& host_of(const at::Generator& generator) { return generator.get<NpuGenerator>()->host; }

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<NpuGenerator>(resolved(index), at::detail::createCPUGenerator());
  }
  Device getDeviceFromPtr(void*) const override { return Device(NPU, current_device); }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::holds(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  void setCurrentDevice(DeviceIndex index) const override { current_device = resolved(index); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(current_device, resolved(index)); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    const auto device = storage.device();
    auto block = new_block(bytes, device.index(), device);
    if (const auto kept = std::min(bytes, storage.nbytes())) std::memcpy(block.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(block));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// ---- npu tensors as CPU tensors and back ---------------------------------------------------------------------------

void release_aliased(void* context) { delete static_cast<Storage*>(context); }

Tensor make_tensor(Storage storage, const Tensor& like, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

// Aliases for the tensors of one call, and the way back.
class Bridge {
 public:
  explicit Bridge(std::string operation, bool check = true) : operation_(std::move(operation)), check_(check) {}

  Tensor to_cpu(const Tensor& tensor, bool may_be_elsewhere = false) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != NPU) {
      if (!may_be_elsewhere && tensor.dim() > 0 && !other_) other_ = tensor.device();
      check_devices();
      return tensor;
    }
    if (!may_be_elsewhere) meet(tensor.device());
    const auto known = aliases_of_.find(tensor.unsafeGetTensorImpl());
    if (known != aliases_of_.end()) return known->second;
    auto alias = make_tensor(to_cpu(tensor.storage()), tensor, DispatchKey::CPU);
    aliases_of_.emplace(tensor.unsafeGetTensorImpl(), alias);
    originals_.emplace(alias.unsafeGetTensorImpl(), tensor);
    return alias;
  }

  Storage to_cpu(const Storage& storage) {
    if (storage.device_type() != NPU) return storage;
    const auto known = storages_.find(storage.unsafeGetStorageImpl());
    if (known != storages_.end()) return known->second;
    const auto index = storage.device().index();
    c10::DataPtr data(storage.mutable_data(), new Storage(storage), &release_aliased, Device(c10::kCPU));
    Storage alias(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
                                                        std::move(data), &alias_allocators[index], true));
    storages_.emplace(storage.unsafeGetStorageImpl(), alias);
    npu_storages_.emplace(alias.unsafeGetStorageImpl(), storage);
    return alias;
  }

  Tensor to_npu(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    const auto known = originals_.find(tensor.unsafeGetTensorImpl());
    if (known != originals_.end()) return known->second;
    return make_tensor(to_npu(tensor.storage()), tensor, DispatchKey::PrivateUse1);
  }

  // Kernels may have resized the aliases or set them to other memory: the npu tensors follow.
  void take_back() {
    for (auto& [npu, alias] : storages_) {
      if (alias.data() == npu->data() && alias.nbytes() == npu->nbytes()) continue;
      auto* impl = alias.unsafeGetStorageImpl();
      if (impl->data_ptr().get_deleter() != &release_aliased) {
        auto data = impl->set_data_ptr(c10::DataPtr(nullptr, Device(c10::kCPU)));
        data.unsafe_set_device(npu->device());
        npu->set_data_ptr_noswap(std::move(data));
      }
      npu->set_nbytes(alias.nbytes());
    }
    for (auto& [alias, original] : originals_) {
      auto* impl = original.unsafeGetTensorImpl();
      auto storage = to_npu(alias->storage());
      if (!storage.is_alias_of(impl->storage())) impl->set_storage_keep_dtype(storage);
      if (alias->sizes() != impl->sizes() || alias->strides() != impl->strides() ||
          alias->storage_offset() != impl->storage_offset())
        impl->set_sizes_and_strides(alias->sizes(), alias->strides(), alias->storage_offset());
    }
  }

  void meet(Device device) {
    if (device_ && check_)
      TORCH_CHECK(*device_ == device, "Expected all tensors to be on the same device, but found at least two devices, ",
                  *device_, " and ", device, "! (", operation_, ")");
    if (!device_) device_ = device;
    check_devices();
  }

  Device device() const { return device_.value_or(Device(NPU, current_device)); }
  bool has_device() const { return device_.has_value(); }
  void set_device(Device device) { device_ = device; }

 private:
  void check_devices() const {
    TORCH_CHECK(!check_ || !device_ || !other_, "Expected all tensors to be on the same device, but found at least two ",
                "devices, ", device_.value_or(Device(NPU)), " and ", other_.value_or(Device(c10::kCPU)), "! (",
                operation_, ")");
  }

  Storage to_npu(const Storage& storage) {
    auto* host = storage.unsafeGetStorageImpl();
    const auto known = npu_storages_.find(host);
    if (known != npu_storages_.end()) return known->second;
    const auto bytes = static_cast<int64_t>(storage.nbytes());
    const auto index = device().index();
    counters[index].add(bytes);
    c10::DataPtr data(storage.mutable_data(), new Block{nullptr, bytes, index, storage}, &free_block, Device(NPU, index));
    Storage made(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, std::move(data),
                                                       &allocator, true));
    npu_storages_.emplace(host, made);
    return made;
  }

  std::string operation_;
  bool check_;
  std::optional<Device> device_, other_;
  std::unordered_map<c10::TensorImpl*, Tensor> aliases_of_;        // npu tensor -> its alias
  std::unordered_map<c10::TensorImpl*, Tensor> originals_;         // alias -> npu tensor
  std::unordered_map<c10::StorageImpl*, Storage> storages_;        // npu storage -> alias storage
  std::unordered_map<c10::StorageImpl*, Storage> npu_storages_;    // alias or new CPU storage -> npu storage
};

struct BelowAutograd {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                           c10::autocast_dispatch_keyset};
};

// For operators that draw without a generator argument: the device's generator stands in for the CPU's default one.
class SwappedGenerator {
 public:
  explicit SwappedGenerator(Device device) : lock_(mutex_), npu_(host_of(default_generator(device.index()))) {
    cpu_ = at::detail::getDefaultCPUGenerator();
    before_ = cpu_.get_state();
    cpu_.set_state(npu_.get_state());
  }
  ~SwappedGenerator() {
    npu_.set_state(cpu_.get_state());
    cpu_.set_state(before_);
  }

 private:
  static inline std::mutex mutex_;
  std::lock_guard<std::mutex> lock_;
  at::Generator npu_, cpu_;
  Tensor before_;
};

// ---- what the device is ----------------------------------------------------------------------------------------------

std::string device_name() {
  const char* name = std::getenv("NPU_SIM_NAME");  // read each time: tests change it
  return name && *name ? name : "Ascend910B3";
}

// CANN's names; the second generation's go on: Ascend910B1, Ascend910_9391.
bool first_generation() {
  static const std::set<std::string> names{"Ascend910",     "Ascend910A",    "Ascend910B",
                                           "Ascend910ProA", "Ascend910ProB", "Ascend910PremiumA"};
  return names.count(device_name()) > 0;
}

std::vector<std::string> lines_of(const char* file) {
  const char* folder = std::getenv("NPU_SIM_DATA");
  TORCH_CHECK(folder, "NPU_SIM_DATA is not set; start the process with test/npu_sim/environment.py");
  std::ifstream text(std::string(folder) + "/" + file);
  TORCH_CHECK(text, "the simulated npu lacks ", folder, "/", file);
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);)
    if (!line.empty() && line[0] != '#') lines.push_back(line);
  return lines;
}

void note_dispatched(const std::string& name) {
  static const char* file = std::getenv("NPU_SIM_DISPATCHED");
  if (!file) return;
  static std::mutex mutex;
  static std::unordered_set<std::string> noted;
  const std::lock_guard lock(mutex);
  if (noted.insert(name).second) std::ofstream(file, std::ios::app) << name + "\n";
}

void check_registered(const c10::OperatorName& operation) {
  if (operation.name.rfind("aten::", 0) != 0) return;  // torch_npu's own, defined beside the simulated device
  static const auto lines = lines_of("registered_operators.txt");
  static const std::unordered_set<std::string> registered(lines.begin(), lines.end());
  const auto name = toString(operation).substr(6);
  note_dispatched(name);
  TORCH_CHECK_NOT_IMPLEMENTED(registered.count(name), "aten::", name, " has no kernel in torch_npu: a real NPU would "
                              "compute it on the CPU, with a warning once (test/npu_sim/registered_operators.txt)");
}

// torch_npu moves fp64 tensors, fills and reads them; CANN's operators compute with few of them.
bool only_moves(const c10::OperatorName& operation) {
  static const std::set<std::string> names{
      "aten::_local_scalar_dense", "aten::fill_", "aten::zero_", "aten::set_", "aten::resize_", "aten::clone",
      "aten::_reshape_alias", "aten::alias", "aten::detach", "aten::as_strided", "aten::view", "aten::permute",
      "aten::transpose", "aten::t", "aten::select", "aten::slice", "aten::expand", "aten::squeeze", "aten::unsqueeze",
      "aten::copy_", "aten::is_set_to", "aten::unbind", "aten::split", "aten::cat", "aten::_foreach_copy_"};
  return names.count(operation.name) > 0;
}

void check_memory_format(std::optional<at::MemoryFormat> format, const char* where) {
  TORCH_CHECK(!format || *format == at::MemoryFormat::Contiguous || *format == at::MemoryFormat::Preserve, where,
              ": only contiguous_format or preserve_format is supported on an npu");
}

// The overflow flag of the first generation, which leaves the largest number instead of infinity, and 0 for NaN.
std::atomic<bool> overflowed{false};

bool overflows(const Tensor& host) {
  return host.defined() && (host.scalar_type() == at::kHalf || host.scalar_type() == at::kFloat) && host.numel() > 0 &&
      !host.isfinite().all().item<bool>();
}

// `by_itself`: the operator's arguments were finite, so it is the operator that overflows.
void saturate(Tensor host, bool by_itself = true) {
  if (!overflows(host)) return;
  if (by_itself) overflowed = true;
  host.nan_to_num_(0.0);  // infinities become the largest numbers
}

void run_on_cpu(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) {
  check_registered(op.operator_name());
  const auto& arguments = op.schema().arguments();
  const auto first = stack->size() - arguments.size();
  Bridge bridge(toString(op.operator_name()));
  const bool is_first = first_generation();
  const bool is_moving = only_moves(op.operator_name());
  const auto check_dtype = [&](const Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != NPU || is_moving) return;
    TORCH_CHECK(tensor.scalar_type() != at::kDouble, op.operator_name(), ": float64 is not computed with on an npu");
    TORCH_CHECK(!is_first || tensor.scalar_type() != at::kBFloat16, op.operator_name(), ": bfloat16 is not supported on ",
                device_name());
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = (*stack)[first + i];
    if (value.isTensor()) check_dtype(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) check_dtype(tensor);
    if (arguments[i].name() == "memory_format" && value.isInt())
      check_memory_format(static_cast<at::MemoryFormat>(value.toInt()), op.schema().name().c_str());
  }
  std::optional<Device> asked;  // where a factory shall put its result
  bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    const bool indices = arguments[i].name() == "indices";  // these may lie on the CPU, as on every accelerator
    if (value.isTensor()) {
      value = bridge.to_cpu(value.toTensor(), indices);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(bridge.to_cpu(tensor, indices));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional(bridge.to_cpu(*tensor, indices)) : std::nullopt);
      value = list;
    } else if (value.isStorage()) {
      const auto storage = value.toStorage();
      TORCH_CHECK(storage.device_type() == NPU, op.operator_name(), ": a storage on ", storage.device(), " for an npu tensor");
      value = bridge.to_cpu(storage);
    } else if (value.isDevice()) {
      asked = value.toDevice();
      if (asked->type() == NPU) asked = Device(NPU, resolved(asked->index()));
      value = Device(c10::kCPU);
    }
  }
  if (asked && asked->type() == NPU) bridge.set_device(*asked);
  bool finite = true;
  for (size_t i = 0; is_first && i < arguments.size(); ++i)
    if (const auto& value = (*stack)[first + i]; value.isTensor()) finite = finite && !overflows(value.toTensor());
    else if (value.isDouble()) finite = finite && std::isfinite(value.toDouble());
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (arguments[i].name() != "generator") continue;
    draws = false;
    if (value.isNone()) {
      value = host_of(default_generator(bridge.device().index()));
    } else if (value.isGenerator()) {
      const auto device = value.toGenerator().device();
      TORCH_CHECK(device.type() == NPU, "Expected a 'npu' device type for generator but found '", device, "'");
      TORCH_CHECK(bridge.has_device(), "Expected a 'cpu' device type for generator but found '", device, "'");
      value = host_of(value.toGenerator());
    }
  }
  {
    const BelowAutograd below;
    std::optional<SwappedGenerator> swapped;
    if (draws) swapped.emplace(bridge.device());
    op.callBoxed(stack);
    const auto& returns = op.schema().returns();
    for (size_t i = 0; is_first && !is_moving && i < returns.size(); ++i) {
      const auto& value = (*stack)[stack->size() - returns.size() + i];
      const bool is_view = returns[i].alias_info() && !returns[i].alias_info()->isWrite();
      if (value.isTensor() && !is_view) saturate(value.toTensor(), finite);
    }
  }
  bridge.take_back();
  if (asked && asked->is_cpu()) return;
  for (auto i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = bridge.to_npu(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(bridge.to_npu(tensor));
      value = list;
    }
  }
}

// torch_npu computes gelu's tanh form whatever is asked (its npu_gelu knows both).
void gelu_by_tanh(const c10::OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i)
    if (arguments[i].name() == "approximate") (*stack)[stack->size() - arguments.size() + i] = std::string("tanh");
  run_on_cpu(op, keys, stack);
}

// ---- kernels of the device's own -----------------------------------------------------------------------------------

std::vector<int64_t> strides_for(const Tensor& self, std::optional<at::MemoryFormat> format) {
  if (format == at::MemoryFormat::Contiguous) {
    const auto strides = c10::contiguous_strides(self.sizes());
    return {strides.begin(), strides.end()};
  }
  if (self.is_non_overlapping_and_dense()) return self.strides().vec();
  return at::infer_dense_strides(self.sizes(), self.strides());
}

Tensor to_copy(const Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
               std::optional<Device> device, std::optional<bool> pin, bool non_blocking,
               std::optional<at::MemoryFormat> format) {
  check_memory_format(format, "_to_copy");
  const bool casts = dtype && !layout && !device && self.scalar_type() != *dtype;
  if (casts && *dtype == at::kDouble) {
    TORCH_WARN_ONCE("Device do not support double dtype now, dtype cast replace with float.");
    dtype = at::kFloat;
  }
  auto options = self.options().merge_in(c10::TensorOptions().dtype(dtype).layout(layout).device(device));
  if (options.device().type() == NPU) options = options.device(Device(NPU, resolved(options.device().index())));
  if (options.device().is_cpu()) options = options.pinned_memory(pin.value_or(false));
  auto copy = at::empty_strided(self.sizes(), strides_for(self, format), options);
  return copy.copy_(self, non_blocking);
}

Tensor empty_like(const Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                  std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  check_memory_format(format, "empty_like");
  auto options = self.options().merge_in(c10::TensorOptions().dtype(dtype).layout(layout).device(device));
  if (options.device().is_cpu()) options = options.pinned_memory(pin.value_or(false));
  return at::empty_strided(self.sizes(), strides_for(self, format), options);
}

// With infinities as torch has it; where the device saturates, by its flag, which this clears.
void check_and_unscale(at::TensorList gradients, Tensor& found_inf, const Tensor& inv_scale) {
  Bridge bridge("_amp_foreach_non_finite_check_and_unscale_");
  TORCH_CHECK(inv_scale.device().type() == NPU, "inv_scale must be NPU-Tensor");
  std::vector<Tensor> hosts;
  for (const auto& gradient : gradients) hosts.push_back(bridge.to_cpu(gradient));
  auto found = bridge.to_cpu(found_inf);
  const BelowAutograd below;
  if (!first_generation()) {
    at::_amp_foreach_non_finite_check_and_unscale_(hosts, found, bridge.to_cpu(inv_scale));
  } else if (overflowed.exchange(false)) {
    found.fill_(1);
  } else {
    for (auto& host : hosts) host.mul_(bridge.to_cpu(inv_scale));
  }
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!format || *format == at::MemoryFormat::Contiguous, "empty: only contiguous_format is supported for creating "
              "a npu tensor");
  const c10::DeviceGuard guard(device.value_or(Device(NPU)));
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(Device(NPU)));
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& self, const Tensor& dst, bool) {
  const BelowAutograd below;
  Bridge bridge("_copy_from", /*check=*/false);
  auto host = bridge.to_cpu(dst);
  host.copy_(bridge.to_cpu(self));
  if (dst.device().type() == NPU && self.scalar_type() != dst.scalar_type() && first_generation()) saturate(host);
  return dst;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}

// Matrix products of halves are summed in fp32, as the device's matrix unit does. (The CPU's own take minutes.)
bool is_half(const Tensor& tensor) { return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16; }

// The first generation's takes fp16 numbers only: what is fp32 is rounded.
Tensor wide(Bridge& bridge, const Tensor& tensor) {
  const auto alias = bridge.to_cpu(tensor);
  if (!alias.defined()) return alias;
  TORCH_CHECK(alias.scalar_type() != at::kDouble, "float64 is not computed with on an npu");
  if (first_generation()) {
    TORCH_CHECK(alias.scalar_type() != at::kBFloat16, "bfloat16 is not supported on ", device_name());
    return alias.scalar_type() == at::kFloat ? alias.to(at::kHalf).to(at::kFloat) : alias.to(at::kFloat);
  }
  return is_half(alias) ? alias.to(at::kFloat) : alias;
}

Tensor narrow(Bridge& bridge, const Tensor& result, const Tensor& like) {
  if (!result.defined()) return bridge.to_npu(result);
  auto narrowed = result.to(like.scalar_type());
  if (first_generation()) saturate(narrowed);
  return bridge.to_npu(narrowed);
}

// Devices are compared before dtypes: of two faults the user hears of the worse.
template <typename... Args>
void check_alike(const char* name, const Tensor& first, const Args&... others) {
  Bridge bridge(name);
  bridge.to_cpu(first);
  (bridge.to_cpu(others), ...);
  TORCH_CHECK(((first.scalar_type() == others.scalar_type()) && ...), name, ": expected all tensors to have the same ",
              "dtype, but found ", first.scalar_type(), " and another");
}

Tensor& keep(Bridge& bridge, const Tensor& result, Tensor& out) {
  auto alias = bridge.to_cpu(out);
  alias.resize_(result.sizes()).copy_(result);
  bridge.take_back();
  return out;
}

#define PRODUCT(op)                                                                  \
  Tensor op(const Tensor& a, const Tensor& b) {                                      \
    check_alike(#op, a, b);                                                         \
    const BelowAutograd below;                                                       \
    Bridge bridge(#op);                                                              \
    return narrow(bridge, at::op(wide(bridge, a), wide(bridge, b)), a);              \
  }                                                                                  \
  Tensor& op##_out(const Tensor& a, const Tensor& b, Tensor& out) {                  \
    check_alike(#op, a, b, out);                                                    \
    const BelowAutograd below;                                                       \
    Bridge bridge(#op);                                                              \
    return keep(bridge, at::op(wide(bridge, a), wide(bridge, b)), out);              \
  }

#define SUM_WITH_PRODUCT(op)                                                                                          \
  Tensor op(const Tensor& c, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {     \
    check_alike(#op, c, a, b);                                                                                       \
    const BelowAutograd below;                                                                                        \
    Bridge bridge(#op);                                                                                               \
    return narrow(bridge, at::op(wide(bridge, c), wide(bridge, a), wide(bridge, b), beta, alpha), a);                 \
  }                                                                                                                   \
  Tensor& op##_out(const Tensor& c, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha, \
                   Tensor& out) {                                                                                     \
    check_alike(#op, c, a, b, out);                                                                                  \
    const BelowAutograd below;                                                                                        \
    Bridge bridge(#op);                                                                                               \
    return keep(bridge, at::op(wide(bridge, c), wide(bridge, a), wide(bridge, b), beta, alpha), out);                 \
  }

PRODUCT(mm)
PRODUCT(bmm)
SUM_WITH_PRODUCT(addmm)
SUM_WITH_PRODUCT(baddbmm)

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  check_alike("convolution", input, weight);
  const BelowAutograd below;
  Bridge bridge("convolution");
  const auto x = wide(bridge, input), w = wide(bridge, weight);
  const auto b = bias ? std::optional(wide(bridge, *bias)) : std::nullopt;
  const auto out = at::convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups);
  return narrow(bridge, out, input);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                                        at::IntArrayRef dilation, bool transposed,
                                                        at::IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> mask) {
  const BelowAutograd below;
  Bridge bridge("convolution_backward");
  const auto g = wide(bridge, grad), x = wide(bridge, input), w = wide(bridge, weight);
  const auto channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto [dx, dw, db] = at::convolution_backward(g, x, w, at::IntArrayRef{channels}, stride, padding, dilation, transposed,
                                               output_padding, groups, mask);
  return {narrow(bridge, dx, input), narrow(bridge, dw, weight), narrow(bridge, db, weight)};
}

bool shallow_copy_type(const Tensor& self, const Tensor& from) {
  const auto strided = [](const Tensor& tensor) {
    return tensor.layout() == at::kStrided && (tensor.device().type() == NPU || tensor.device().is_cpu());
  };
  return strided(self) && strided(from);
}

void record_stream(Tensor&, c10::Stream) {}

// ---- autocast ------------------------------------------------------------------------------------------------------

template <typename Cast>
void cast_tensors(const c10::FunctionSchema& schema, Stack* stack, Cast cast) {
  for (auto i = stack->size() - schema.arguments().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = cast(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(cast(tensor));
      value = list;
    }
  }
}

bool eligible(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == NPU && tensor.is_floating_point() &&
      tensor.scalar_type() != at::kDouble;
}

enum class Policy { lower, fp32, fp32_result, widest };

template <Policy policy>
void cast_and_call(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(DispatchKey::AutocastPrivateUse1);
  const auto& schema = op.schema();
  const auto first = stack->size() - schema.arguments().size();
  auto dtype = policy == Policy::fp32 ? at::kFloat : at::autocast::get_autocast_dtype(NPU);
  if constexpr (policy == Policy::widest) {
    cast_tensors(schema, stack, [&](const Tensor& tensor) {
      if (eligible(tensor) && tensor.scalar_type() == at::kFloat) dtype = at::kFloat;
      return tensor;
    });
  }
  if constexpr (policy == Policy::fp32_result) {
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      auto& value = (*stack)[first + i];
      if (schema.arguments()[i].name() == "dtype" && value.isNone() && eligible((*stack)[first].toTensor()))
        value = at::kFloat;
    }
  } else {
    cast_tensors(schema, stack, [&](const Tensor& tensor) {
      return tensor.defined() ? at::autocast::cached_cast(dtype, tensor, NPU) : tensor;
    });
  }
  op.callBoxed(stack);
}

#define BOXED(function) torch::CppFunction::makeFromBoxedFunction<&function>()

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  static std::list<std::string> names;
  for (const auto& line : lines_of("autocast_lists.txt")) {
    const auto space = line.find(' ');
    const auto policy = line.substr(0, space);
    names.push_back(line.substr(space + 1));
    const char* name = names.back().c_str();
    if (!c10::Dispatcher::singleton().findSchema(torch::jit::parseName("aten::" + names.back()))) continue;
    if (policy == "lower_precision_fp") m.impl(name, BOXED(cast_and_call<Policy::lower>));
    else if (policy == "fp32") m.impl(name, BOXED(cast_and_call<Policy::fp32>));
    else if (policy == "fp32_set_opt_dtype") m.impl(name, BOXED(cast_and_call<Policy::fp32_result>));
    else if (policy == "promote") m.impl(name, BOXED(cast_and_call<Policy::widest>));
    else TORCH_CHECK(false, "autocast_lists.txt: no policy ", policy);
  }
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(BOXED(run_on_cpu)); }

// What has a kernel below, for which there must not be a second one.
bool own(const std::string& name) {
  static const std::set<std::string> names{"mm",      "mm.out",      "bmm",           "bmm.out",
                                           "addmm",   "addmm.out",   "baddbmm",       "baddbmm.out",
                                           "gelu.out", "gelu_backward", "gelu_backward.grad_input"};
  return names.count(name) > 0;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("mm", &mm);
  m.impl("mm.out", &mm_out);
  m.impl("bmm", &bmm);
  m.impl("bmm.out", &bmm_out);
  m.impl("addmm", &addmm);
  m.impl("addmm.out", &addmm_out);
  m.impl("baddbmm", &baddbmm);
  m.impl("baddbmm.out", &baddbmm_out);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_has_compatible_shallow_copy_type", &shallow_copy_type);
  m.impl("record_stream", &record_stream);
  m.impl("_to_copy", &to_copy);
  m.impl("empty_like", &empty_like);
  m.impl("_amp_foreach_non_finite_check_and_unscale_", &check_and_unscale);
  for (const char* name : {"gelu.out", "gelu_backward", "gelu_backward.grad_input"}) m.impl(name, BOXED(gelu_by_tanh));
  // These have kernels for any backend, made of other operators, that would be taken before the fallback. torch_npu has
  // kernels of its own for them.
  std::list<std::string> names{"native_group_norm", "native_layer_norm"};
  for (const auto& name : lines_of("registered_operators.txt")) {
    const auto schema = c10::Dispatcher::singleton().findSchema(torch::jit::parseName("aten::" + name));
    if (schema && schema->hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional) && !own(name))
      names.push_back(name);
  }
  for (const auto& name : names) m.impl(name.c_str(), BOXED(run_on_cpu));
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("_has_compatible_shallow_copy_type", &shallow_copy_type); }

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

TORCH_LIBRARY(npu_sim, m) {
  m.def("device_count() -> int", [] { return int64_t(device_count()); });
  m.def("current_device() -> int", [] { return int64_t(current_device); });
  m.def("set_device(int index) -> ()", [](int64_t index) { current_device = resolved(index); });
  m.def("memory_allocated(int index) -> int", [](int64_t index) { return counters[resolved(index)].now.load(); });
  m.def("max_memory_allocated(int index) -> int", [](int64_t index) { return counters[resolved(index)].peak.load(); });
  m.def("reset_peak(int index) -> ()", [](int64_t index) {
    auto& counter = counters[resolved(index)];
    counter.peak = counter.now.load();
  });
  // The same memory as a CPU tensor, for collectives.
  m.def("cpu_alias(Tensor tensor) -> Tensor", [](const Tensor& tensor) {
    const BelowAutograd below;
    return Bridge("cpu_alias").to_cpu(tensor);
  });
  m.def("device_name() -> str", [] { return device_name(); });
  m.def("first_generation() -> bool", [] { return first_generation(); });
  m.def("overflowed(bool clear) -> bool", [](bool clear) { return clear ? overflowed.exchange(false) : overflowed.load(); });
  m.def("default_generator(int index) -> Generator?", [](int64_t index) { return default_generator(resolved(index)); });
}

[[maybe_unused]] const bool registered = [] {
  for (DeviceIndex i = 0; i < MAX_DEVICES; ++i) {
    alias_allocators[i].index = i;
    alias_allocators[i].as_cpu = true;
  }
  c10::SetAllocator(NPU, &allocator);
  at::setHostAllocator(NPU, &pinned_allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace
